"""In a notebook the reader's cells are the reader's: what only CI needs is folded away, few names come from the
package, a name means one thing in all notebooks, and there is enough to write and not too much to read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell
from support import lessons

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
MOST_NAMES, MOST_WORDS, FEWEST_PLACES = 6, 1500, 8


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def cells(request) -> list:
    return lessons.cells_of(request.param)


def asserts(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.Assert) for node in ast.walk(tree))


def test_only_folded_cells_assert_and_reveal(cells):
    for cell, tree in lessons.trees(cells):
        scaffolding = lessons.tagged(cell, "scaffolding")
        assert scaffolding == bool(cell.metadata.get("jupyter", {}).get("source_hidden")), cell.source
        checks = asserts(tree) or ".reveal(" in cell.source or "teach.seen(" in cell.source
        assert checks == scaffolding, cell.source
        if scaffolding:  # who unfolds it is told what it is for
            assert cell.source.startswith(("# Run this too: ", "# Checks ")), cell.source


def test_what_ci_must_not_compare_is_said_by_tags(cells):
    assert [cell.source for cell in lessons.code(cells) if "NBVAL" in cell.source.upper()] == []
    for cell in lessons.code(cells):
        if "teach.seen(" in cell.source or "shown=" in cell.source:  # a busy machine is told so in the output
            assert lessons.tagged(cell, "nbval-ignore-output"), cell.source


def test_a_question_stands_once(cells):
    text = " ".join(lessons.markdown(cells).split())
    for _, tree in lessons.trees(cells):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "teach.predict":
                assert isinstance(node.args[0], ast.Constant)
                assert node.args[0].value not in text


def test_few_names_come_from_the_package(cells):
    names = lessons.imported(cells)
    assert "teach" in names
    assert len(names) <= MOST_NAMES, names


def test_the_text_is_short(cells):
    assert lessons.words(cells) <= MOST_WORDS


def test_there_is_enough_to_write(cells):
    assert len(lessons.places(cells)) >= FEWEST_PLACES


def test_a_name_means_the_same_in_every_notebook():
    meant: dict[str, tuple[str, str]] = {}
    for path in NOTEBOOKS:
        cells = lessons.cells_of(path)
        for name, what in {**lessons.imported(cells), **lessons.defined(cells)}.items():
            there, before = meant.setdefault(name, (path.name, what))
            assert what == before, f"{name} in {path.name} is not what it is in {there}"


def test_what_is_written_in_one_notebook_is_used_in_a_later_one():
    """Every notebook but the last takes something with `teach.yours`, or gives something to a later one."""
    wrote, took = {}, {}
    for number, path in enumerate(NOTEBOOKS):
        text = "\n".join(cell.source for cell in lessons.code(lessons.cells_of(path)))
        wrote |= {name: number for name in lessons.ANSWERS.findall(text)}
        for name in lessons.YOURS.findall(text):
            assert wrote.get(name, number) < number, f"{path.name} uses {name} before anybody wrote it"
            took.setdefault(number, []).append(name)
    taken = {wrote[name] for names in took.values() for name in names}
    assert {0, 1, 2, 4, 5} <= taken | set(took)


def test_the_counts_are_those_of_a_hand():
    cells = [
        new_markdown_cell(
            "# One two\n\n![Badge of it](../docs/badges/x.svg)\n\n[a three four](five_six.md)\n\n| no | row |"
        ),
        new_markdown_cell("<details><summary>Hint 1</summary>\n\n`x = 1`: so **it** is.\n\n</details>"),
        new_code_cell(
            "from asyncbatch import Request as Asked, AsyncBatcher\nimport torch\nimport asyncbatch.pictures"
        ),
        new_code_cell("def f(x):\n    return ...  # your code here"),
        new_code_cell("f = teach.check('f', f)".replace("'", '"')),
        new_code_cell("n = 3  # then try 4"),
        new_code_cell("# change nothing", metadata={"tags": ["scaffolding"]}),
        new_code_cell("def g():\n    return 1\n\ng = 5  # retry, exchange"),
    ]
    # One two a three four, Hint 1 x 1 so it is.
    assert lessons.words(cells) == 12
    assert [cell.source[0] for cell in lessons.places(cells)] == ["d", "n"]
    assert lessons.imported(cells) == {
        "Asked": "asyncbatch.Request",
        "AsyncBatcher": "asyncbatch.AsyncBatcher",
        "asyncbatch.pictures": "asyncbatch.pictures",
    }
    assert lessons.defined(cells) == {"f": "exercise f", "g": "def g():\n    return 1"}

"""Copies for a class hold no answer and no output; the answer key holds all of both. A sealed cell does what it did."""

from __future__ import annotations

import ast
import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from asyncbatch.lessons import kept, sealed, teach
from asyncbatch.lessons.exercises import EXERCISES
from tools import copies, lessons
from tools import notebooks as tool

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
DETAILS = re.compile(r"<details[^>]*>\s*<summary>(.*?)</summary>(.*?)</details>", re.DOTALL)
TOLD = re.compile(r"\.reveal\(")


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def original(request) -> nbformat.NotebookNode:
    return nbformat.read(request.param, as_version=4)


@pytest.fixture(scope="module")
def student(original) -> nbformat.NotebookNode:
    return copy_of(original, "students")


@pytest.fixture(scope="module")
def key(original) -> nbformat.NotebookNode:
    return copy_of(original, "key")


def copy_of(book: nbformat.NotebookNode, kind: str) -> nbformat.NotebookNode:
    made = copies.KINDS[kind](copy.deepcopy(book))
    nbformat.validate(made)
    return made


def text_of(book: nbformat.NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in book.cells)


def words(text: str) -> str:
    return " ".join(text.split())


def bodies(book: nbformat.NotebookNode) -> dict[str, str]:
    """Of each exercise in the notebook, the lines of the package's own solution, without its head and docstring."""
    found = {}
    for name in re.findall(r"^(\w+) = teach\.check\(", text_of(book), re.MULTILINE):
        function = next(each for each in ast.parse(copies.solution(name)).body if isinstance(each, ast.FunctionDef))
        statements = function.body[1:] if ast.get_docstring(function) else function.body
        found[name] = "\n".join(ast.unparse(each) for each in statements)
    return found


def test_a_copy_for_a_class_has_no_output_and_no_answer(original, student):
    text = text_of(student)
    assert [cell for cell in student.cells if cell.get("outputs") or cell.get("execution_count")] == []
    assert "<details" not in text
    assert not TOLD.search(text)
    assert "teach.solution" not in text
    for _, folded in DETAILS.findall(text_of(original)):
        sentences = [words(each) for each in re.split(r"(?<=[.:?])\s", folded) if len(each.split()) > 6]
        assert not [each for each in sentences if each in words(text)]
    code = "\n".join(ast.unparse(ast.parse(cell.source)) for cell in student.cells if cell.cell_type == "code")
    for name, body in bodies(original).items():
        assert body not in code, name
        assert f"def {name}(" in code
    assert len(student.cells) == len(original.cells)


def test_the_key_has_every_output_and_every_answer(original, key):
    text = text_of(key)
    code = "\n".join(ast.unparse(ast.parse(cell.source)) for cell in key.cells if cell.cell_type == "code")
    solutions = bodies(original)
    assert solutions or len(original.cells) < 20
    for name, body in solutions.items():
        assert body in re.sub(r"^    ", "", code, flags=re.MULTILINE), name
        assert "not attempted yet" not in "".join(lessons.saved_text(cell) for cell in key.cells)
    folded = DETAILS.findall(text_of(original))
    assert DETAILS.findall(text) == folded
    assert text.count("<details open>") == len(folded)
    for before, after in zip(original.cells, key.cells, strict=True):
        assert len(after.get("outputs", ())) == len(before.get("outputs", ()))
        assert not after.metadata.get("jupyter", {}).get("source_hidden")
        if TOLD.search(before.source):
            assert "The answer is " in lessons.saved_text(after)
            assert after.source == before.source


def test_both_have_nbgraders_tags(original, student, key):
    names = list(bodies(original))
    for book in (student, key):
        tagged = [cell.metadata["nbgrader"] for cell in book.cells if "nbgrader" in cell.metadata]
        assert [each["grade_id"] for each in tagged if each["solution"]] == names
        assert [each["grade_id"] for each in tagged if each["locked"]] == [f"check_{name}" for name in names]
        assert len({each["grade_id"] for each in tagged}) == len(tagged)


@pytest.mark.parametrize("name", EXERCISES)
def test_the_keys_solution_stands_alone_and_passes_its_check(name, capsys):
    function = kept.defined(copies.solution(name), name)
    assert teach.check(name, function) is function
    assert f"{name}: right in all" in capsys.readouterr().out


def test_sealed_cells_of_real_notebooks_hold_what_they_held(original, student):
    packed = {i: cell for i, cell in enumerate(student.cells) if "sealed.run(" in cell.source}
    assert len(packed) >= 3
    for i, cell in packed.items():
        assert sealed.opened(cell.source) == original.cells[i].source
        assert cell.metadata["jupyter"] == {"source_hidden": True}


def test_a_sealed_cell_uses_and_sets_the_names_of_its_notebook(capsys):
    names = {"guess": teach.predict("Which?", ["this", "that"]), "found": 2}
    cell = sealed.seal('assert found == 2\nlater = found + 1\nguess.reveal("B", f"There are {later}.")')
    assert "reveal" not in cell
    exec(cell, names)
    assert names["later"] == 3
    assert capsys.readouterr().out == "The answer is B: that.\nThere are 3.\n"
    with pytest.raises(AssertionError):
        exec(sealed.seal("assert found == 1"), names)


def test_a_sealed_cell_shows_its_last_value_once(capsys):
    names: dict = {"calls": []}
    exec(sealed.seal("calls.append(1)\nlen(calls)"), names)
    assert capsys.readouterr().out.strip() == "1"
    exec(sealed.seal("calls.append(2)"), names)
    assert capsys.readouterr().out == ""
    assert names["calls"] == [1, 2]


def test_what_cannot_be_sealed_is_refused():
    with pytest.raises(ValueError, match="awaits"):
        sealed.seal("await later()")
    with pytest.raises(SyntaxError):
        sealed.seal("%timeit 1")
    with pytest.raises(ValueError, match="nothing is sealed"):
        sealed.opened("print(1)")


def test_an_exercise_without_a_function_to_fill_in_is_named():
    book = new_notebook(
        cells=[
            new_code_cell("def order(a, b, event):\n    return a"),
            new_code_cell('order = teach.check("order", order)'),
        ]
    )
    with pytest.raises(ValueError, match="order is checked, and no cell before"):
        copies.for_students(book)


def test_a_fold_leaves_a_line_and_hints_leave_none():
    book = new_notebook(
        cells=[
            new_markdown_cell(
                "**1.** Why?\n\n<details><summary>Answer 1</summary>\n\nBecause of it.\n\n</details>\n\n**2.** How?"
            ),
            new_markdown_cell("<details><summary>Hint 1</summary>\n\nLook.\n\n</details>\n\nFrom here on it is used."),
        ]
    )
    texts = [cell.source for cell in copies.for_students(book).cells]
    assert texts == ["**1.** Why?\n\n*Answer 1: in the teacher's key.*\n\n**2.** How?", "From here on it is used."]


def test_the_tool_writes_them_and_what_is_there_stays(tmp_path, capsys):
    book = new_notebook(
        cells=[
            new_markdown_cell("# 09 Test"),
            new_code_cell(
                "1", outputs=[new_output("execute_result", {"text/plain": "1"}, execution_count=1)], execution_count=1
            ),
        ]
    )
    path = tmp_path / "09_test.ipynb"
    path.write_text(tool.text_of(tool.canonical(book)), encoding="utf-8")
    for option, kind in (("--students", "copies for a class"), ("--key", "the answer key")):
        folder = tmp_path / option.strip("-")
        assert tool.main([option, str(folder), str(path)]) == 0
        assert capsys.readouterr().out.startswith(f"{folder.name}/, {kind}: made 09; kept none")
        made = nbformat.read(folder / path.name, as_version=4)
        assert len(made.cells[1].outputs) == (option == "--key")
        (folder / path.name).write_text("a teacher's own")
        tool.main([option, str(folder), str(path)])
        assert "made none; kept 09" in capsys.readouterr().out
        assert (folder / path.name).read_text() == "a teacher's own"

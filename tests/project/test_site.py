"""What the site's pages are made of. That they open in a browser without faults, `make site` itself looks after."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools.website import look, prepare

ROOT = Path(__file__).parents[2]
PICTURE = {"image/png": "AAAA", "text/plain": "<Picture: 2 slots: 5 steps>"}


def house(root: Path) -> Path:
    """A small repository: a page of each kind, a picture, code."""
    files = {
        "README.md": "# Home\n\n[one](notebooks/00_one.ipynb#top) [doc](docs/a.md) [code](pack/code.py) [all](pack) "
        "![pic](docs/pic.png) [out](https://example.org) `[no](link)`\n\n```\n[no](link)\n```\n",
        "docs/a.md": "# A\n\n[home](../README.md) [`code`](../pack/code.py)\n",
        "docs/pic.png": "",
        "pack/code.py": "",
        "CHANGELOG.md": "# Changes\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    book = new_notebook(cells=[new_markdown_cell("# 00 One\n\n[doc](../docs/a.md) ![pic](../docs/pic.png)")])
    (root / "notebooks").mkdir()
    nbformat.write(book, root / "notebooks" / "00_one.ipynb")
    return root


def test_pages_link_to_pages_and_other_files_to_the_repository(tmp_path):
    root, to = house(tmp_path / "root"), tmp_path / "to"
    assert prepare.prepare(root, to) == ["README.md", "notebooks/00_one.ipynb", "docs/a.md", "CHANGELOG.md"]
    home = (to / "index.md").read_text()
    assert home.startswith(
        "# Home\n\n[one](notebooks/00_one.ipynb#top) [doc](docs/a.md) code all ![pic](docs/pic.png) "
        "[out](https://example.org) `[no](link)`\n\n```\n[no](link)\n```\n"
    )
    assert ":caption: Notebooks\n\nnotebooks/00_one.ipynb\n" in home
    assert ":caption: Project\n\nCHANGELOG.md\n" in home
    assert ":caption: Teaching" not in home
    assert (to / "docs/a.md").read_text() == "# A\n\n[home](../index.md) `code`\n"
    assert (to / "docs/pic.png").exists()
    prepare.prepare(root, to, "https://example.org/x/y/")
    blob = "https://example.org/x/y/blob/main/pack/code.py"
    assert f"[code]({blob}) [all](https://example.org/x/y/tree/main/pack)" in (to / "index.md").read_text()
    assert f"[`code`]({blob})" in (to / "docs/a.md").read_text()


def test_a_link_to_nowhere_is_named(tmp_path):
    root = house(tmp_path / "root")
    (root / "docs/a.md").write_text("[gone](../pack/none.py)")
    with pytest.raises(FileNotFoundError, match=r"docs/a.md has a link to ../pack/none.py"):
        prepare.prepare(root, tmp_path / "to")


def test_what_asserts_is_gone_what_answers_is_folded_and_pictures_have_words():
    scaffold = {"tags": ["scaffolding"]}
    told = [new_output("stream", text="The answer is A: this.\n")]
    book = new_notebook(
        cells=[
            new_code_cell("# NBVAL_IGNORE_OUTPUT\nimport os"),
            new_code_cell("guess = teach.predict('?', ['this', 'that'])\nguess"),
            new_code_cell("assert True", metadata=scaffold),
            new_code_cell('guess.reveal("A", "since")', metadata=scaffold, outputs=told),
            new_code_cell('assert 1\nguess.reveal("A", "since")', outputs=told),
            new_code_cell("draw()", outputs=[new_output("execute_result", PICTURE)]),
            new_markdown_cell("*Picture: a row for each `slot`. Which is free?*\n\nMore."),
            new_code_cell("draw()", outputs=[new_output("execute_result", {"image/png": "AAAA"})]),
        ]
    )
    cells = prepare.shown(book).cells
    tags = [cell.metadata.get("tags") for cell in cells if cell.cell_type == "code"]
    answer = ["hide-output", "remove-input"]
    assert [[tag for tag in each if tag != "scaffolding"] for each in tags] == [
        ["hide-input"], ["hide-input"], ["remove-cell"], answer, answer, [], []
    ]  # fmt: skip
    assert cells[0].source == "import os"
    assert cells[3].metadata["mystnb"]["code_prompt_show"] == "Show the answer"
    assert cells[5].metadata["mystnb"]["image"]["alt"] == "2 slots: 5 steps. a row for each slot. Which is free?"
    assert cells[7].metadata["mystnb"]["image"]["alt"] == "a row for each slot. Which is free?"  # the caption above


def test_every_page_of_this_repository_can_be_prepared(tmp_path):
    found = prepare.prepare(ROOT, tmp_path)
    assert {*found} >= {path.relative_to(ROOT).as_posix() for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert sum(path.suffix in (".md", ".ipynb") for path in tmp_path.rglob("*")) == len(found)


def test_broken_links_are_found(tmp_path):
    (tmp_path / "b.html").touch()
    uri = tmp_path.as_uri()
    good = [f"{uri}/b.html#here", f"{uri}/a.html", "https://example.org/c.html", "mailto:x@example.org"]
    found = {"a.html": {"targets": good, "ids": []}, "b.html": {"targets": [], "ids": ["here"]}}
    (tmp_path / "a.html").touch()
    assert look.broken_links(tmp_path, found) == []
    found["a.html"]["targets"] = [f"{uri}/b.html#there", f"{uri}/c.png"]
    assert [
        fault.split(": a link to ")[1].removeprefix(f"{tmp_path}/") for fault in look.broken_links(tmp_path, found)
    ] == [
        "b.html#there, which has no such part",
        "c.png, which is not there",
    ]

"""tools/badges.py writes the same badges everywhere, once, and keeps the repository that it was told."""

from __future__ import annotations

import shutil
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook

from tools import badges, notebooks

ROOT = Path(__file__).parents[2]
LOCAL = (
    "![Runs on: CPU and CUDA](../docs/badges/runs-on.svg) ![Checked by: nbval, strict](../docs/badges/checked-by.svg)"
)


@pytest.fixture
def root(tmp_path) -> Path:
    """A small repository: a README and two notebooks without badges."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "README.md").write_text("# Title\n\nText.\n", encoding="utf-8")
    for name in ("00_start_here", "02_more"):
        book = new_notebook(cells=[new_markdown_cell(f"# {name}\n\nMore text."), new_markdown_cell("Last")])
        text = notebooks.text_of(notebooks.canonical(book))
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text(text, encoding="utf-8")
    return tmp_path


def contents(root: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(root.rglob("*")) if path.is_file()}


def first_cell(root: Path, name: str) -> str:
    return nbformat.read(root / "notebooks" / f"{name}.ipynb", as_version=4).cells[0].source


def test_badges_stand_below_the_title_and_are_written_once(root, capsys):
    assert badges.main([], root) == 0
    source = first_cell(root, "02_more")
    assert source.startswith(f"# 02_more\n\n{badges.BEGIN}\n{LOCAL}")
    assert source.endswith(f"{badges.END}\n\nMore text.")
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert "](docs/badges/licence.svg)" in readme
    assert readme.endswith(f"{badges.END}\n\nText.\n")
    assert "Colab" not in readme + source
    before, _ = contents(root), capsys.readouterr()
    assert badges.main([], root) == 0
    assert contents(root) == before
    assert capsys.readouterr().out == ""
    assert notebooks.faults(root / "notebooks" / "02_more.ipynb") == []


def test_a_repository_is_linked_kept_and_exchanged(root):
    assert badges.main(["--repo", "ann/asyncbatch"], root) == 0
    source = first_cell(root, "02_more")
    assert "](https://colab.research.google.com/github/ann/asyncbatch/blob/main/notebooks/02_more.ipynb)" in source
    assert "](https://mybinder.org/v2/gh/ann/asyncbatch/main?labpath=notebooks%2F02_more.ipynb)" in source
    assert "`!git clone --depth 1 https://github.com/ann/asyncbatch /content/asyncbatch`" in source
    assert "`%env ASYNCBATCH_CLONE=/content/asyncbatch`" in source
    assert "blob/main/notebooks/00_start_here.ipynb" in (root / "README.md").read_text(encoding="utf-8")
    before = contents(root)
    for arguments in (["--repo", "ann/asyncbatch"], []):
        assert badges.main(arguments, root) == 0
        assert contents(root) == before
    shutil.copy(root / "notebooks" / "02_more.ipynb", root / "notebooks" / "03_new.ipynb")
    assert badges.main(["--check"], root) == 1, "a notebook that opens another one"
    assert badges.main([], root) == 0
    assert "ann/asyncbatch/blob/main/notebooks/03_new.ipynb" in first_cell(root, "03_new")
    assert badges.main(["--repo", "bob/copy", "--branch", "dev"], root) == 0
    assert "ann" not in first_cell(root, "02_more")
    assert "github/bob/copy/blob/dev/notebooks/02_more.ipynb" in first_cell(root, "02_more")


def test_check_names_what_differs_and_changes_nothing(root, capsys):
    before = contents(root)
    assert badges.main(["--check"], root) == 1
    assert contents(root) == before
    assert "notebooks/02_more.ipynb: badges differ" in capsys.readouterr().out
    assert badges.main([], root) == 0
    assert badges.main(["--check"], root) == 0


@pytest.mark.parametrize("repo", ["", "name", "a/b/c", "a b/c", "https://github.com/a/b"])
def test_a_bad_repository_is_refused(root, repo, capsys):
    with pytest.raises(SystemExit):
        badges.main(["--repo", repo], root)
    assert "allowed is OWNER/NAME" in capsys.readouterr().err


def test_a_page_without_a_title_is_named(root, capsys):
    path = root / "notebooks" / "02_more.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace("# 02_more", "No title"), encoding="utf-8")
    assert badges.main([], root) == 1
    assert "notebooks/02_more.ipynb: the first line is 'No title'" in capsys.readouterr().err


@pytest.mark.parametrize("name", badges.LOCAL | badges.HOSTED)
def test_pictures_are_svg_that_says_what_it_shows(name):
    picture = ElementTree.fromstring(badges.svg(*(badges.LOCAL | badges.HOSTED)[name]))
    title = picture.find("{http://www.w3.org/2000/svg}title").text
    assert title == picture.get("aria-label") == ": ".join((badges.LOCAL | badges.HOSTED)[name])
    assert "http" not in "".join(value for part in picture.iter() for value in part.attrib.values()), "fetches nothing"


def test_the_badges_of_this_repository_are_as_they_should_be(capsys):
    assert badges.main(["--check"]) == 0, capsys.readouterr().out

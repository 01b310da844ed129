"""tools/notebooks.py finds planted faults and is idempotent; the real notebooks keep the rules that need no kernel."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from asyncbatch.lessons import kept
from asyncbatch.tour.notebooks import ANSWERS, OWN, copy_to
from tools import notebooks as tool

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*NOTEBOOKS, *TEXTS]
WIDGET = {tool.WIDGET_VIEW: {"model_id": "1", "version_major": 2}, "image/png": "AAAA\n", "text/plain": "Figure"}


def messy() -> nbformat.NotebookNode:
    """A notebook as JupyterLab may leave it: every trace of the session that the canonical form removes."""
    book = new_notebook(
        cells=[
            new_markdown_cell("Text"),
            new_code_cell("print(1)", execution_count=7, outputs=[new_output("stream", text=t) for t in ("1", "2\n")]),
            new_code_cell("figure", execution_count=9, outputs=[new_output("display_data", WIDGET)]),
            new_code_cell("2", execution_count=12),
        ]
    )
    book.cells[3].outputs = [new_output("execute_result", {"text/plain": "2"}, execution_count=12)]
    book.cells[1].metadata = {"execution": {"iopub.execute_input": "2026-11-23T12:00:00Z"}, "tags": ["exercise"]}
    book.cells[2].metadata = {"jupyter": {"source_hidden": True, "outputs_hidden": False}, "scrolled": True}
    book.cells[3].id = book.cells[1].id
    book.metadata = {"widgets": {"state": {}}, "language_info": {"name": "python", "version": "3.11.7"}}
    return book


def saved(path: Path, book: nbformat.NotebookNode) -> Path:
    path.write_text(tool.text_of(book), encoding="utf-8")
    return path


@pytest.fixture
def clean(tmp_path) -> tuple[Path, nbformat.NotebookNode]:
    """A canonical notebook and its file."""
    book = tool.canonical(messy())
    return saved(tmp_path / "book.ipynb", book), book


def test_canonical_form_removes_what_the_session_left(clean):
    path, book = clean
    assert tool.faults(path) == []
    assert [cell.get("execution_count") for cell in book.cells] == [None, 1, 2, 3]
    assert book.cells[1].outputs == [new_output("stream", text="12\n")]
    assert book.cells[1].metadata == {"tags": ["exercise"]}
    assert book.cells[2].metadata == {"jupyter": {"source_hidden": True}}
    assert book.cells[2].outputs[0].data == {"image/png": "AAAA", "text/plain": "Figure"}
    assert book.cells[3].outputs[0].execution_count == 3
    assert "widgets" not in book.metadata
    assert "version" not in book.metadata.language_info


def test_canonical_form_is_stable():
    book = messy()
    ids = [cell.id for cell in book.cells]
    once = tool.text_of(tool.canonical(book))
    twice = tool.text_of(tool.canonical(nbformat.reads(once, as_version=4)))
    assert once == twice
    new_ids = [cell.id for cell in nbformat.reads(once, as_version=4).cells]
    assert new_ids[:3] == ids[:3]
    assert len(set(new_ids)) == 4


def test_progress_bar_keeps_its_last_state():
    cell = new_code_cell("bar", execution_count=1, outputs=[new_output("stream", text=" 0 %\r 50 %\r100 %\nend\n")])
    assert tool.canonical(new_notebook(cells=[cell])).cells[0].outputs[0].text == "100 %\nend\n"


def _add(book, kind, number=1, **fields):
    book.cells[number].outputs.append(new_output(kind, **fields))


FAULTS = {
    "not executed": (lambda book: book.cells[1].update(execution_count=None), "not executed (cell 1)"),
    "wrong count": (lambda book: book.cells[3].update(execution_count=5), "counts are not 1 to n (cell 3)"),
    "widget state": (lambda book: book.metadata.update(widgets={"state": {}}), "widget state"),
    "widget id": (lambda book: _add(book, "display_data", data=dict(WIDGET)), "widget's id"),
    "timing": (lambda book: book.cells[1].metadata.update(execution={}), "metadata of one session: execution (cell 1)"),
    "error": (lambda book: _add(book, "error", ename="KeyError", evalue="", traceback=[]), "error: KeyError"),
    "stderr": (lambda book: _add(book, "stream", name="stderr", text="Warning: old\n"), "stderr: 'Warning: old'"),
    "home path": (lambda book: _add(book, "stream", text="in /home/ann/x.py\n"), "one machine: /home/ann/x.py"),
    "root path": (lambda book: book.cells[1].update(source="open('/root/x')"), "one machine: /root/x"),
    "path in html": (lambda book: _add(book, "display_data", data={"text/html": "<b>/work/main</b>"}), "/work/main"),
    "too big": (lambda book: _add(book, "display_data", data={"image/png": "A" * tool.MAX_BYTES}), "bytes"),
    "other kernel": (lambda book: book.metadata.kernelspec.update(name="venv"), "not in canonical form"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_named(clean, fault):
    path, book = clean
    plant, words = FAULTS[fault]
    plant(book)
    saved(path, book)
    problems = tool.faults(path)
    assert problems
    assert any(words in problem for problem in problems), problems


def test_planted_json_faults_are_named(clean):
    path, book = clean
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('\n "nbformat"', '\n  "nbformat"'), encoding="utf-8")
    assert "first difference in line" in tool.faults(path)[0]
    path.write_text(text.replace(book.cells[1].id, book.cells[0].id), encoding="utf-8")
    with pytest.warns(nbformat.validator.DuplicateCellId):
        assert "first difference in line" in tool.faults(path)[0]
    path.write_text(text[:-20], encoding="utf-8")
    assert "not a valid notebook" in tool.faults(path)[0]


def test_marked_cells_may_end_with_an_error(clean):
    path, book = clean
    _add(book, "error", ename="KeyError", evalue="", traceback=[])
    book.cells[1].source = "# NBVAL_RAISES_EXCEPTION\nprint(1)"
    assert tool.faults(saved(path, book)) == []


def test_check_exits_1_changes_nothing_and_does_not_import_torch(clean):
    path, book = clean
    book.cells[1].execution_count = None
    before = saved(path, book).read_bytes()
    code = f"import sys; sys.argv[1:] = ['--check', {str(path)!r}]; from tools import notebooks; " + (
        "status = notebooks.main(); assert 'torch' not in sys.modules; sys.exit(status)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "book.ipynb: not executed (cell 1)" in run.stderr
    assert path.read_bytes() == before


def test_run_executes_in_the_notebooks_folder_and_saves(tmp_path):
    book = new_notebook(
        cells=[new_code_cell("from pathlib import Path"), new_code_cell("print(Path('mark').exists())")]
    )
    (tmp_path / "mark").touch()
    path = saved(tmp_path / "book.ipynb", book)
    assert tool.main([str(path)]) == 0
    assert nbformat.read(path, as_version=4).cells[1].outputs[0].text == "True\n"
    saved(path, new_notebook(cells=[new_code_cell("1 / 0")]))
    before = path.read_bytes()
    assert tool.main([str(path)]) == 1
    assert path.read_bytes() == before


# A reader's copies.


def test_a_copy_holds_no_result_and_all_that_its_author_wrote(clean, tmp_path):
    path, book = clean
    before = path.read_bytes()
    assert copy_to(tmp_path / "own", [path]) == (["book.ipynb"], [])
    copy = nbformat.read(tmp_path / "own" / "book.ipynb", as_version=4)
    assert [cell.get("outputs", []) for cell in copy.cells] == [[]] * 4
    assert {cell.get("execution_count") for cell in copy.cells} == {None}
    authors = [[(cell.id, cell.source, cell.metadata) for cell in each.cells] for each in (book, copy)]
    assert authors[0] == authors[1]
    assert path.read_bytes() == before
    assert [each.name for each in (tmp_path / "own").iterdir()] == ["book.ipynb"]


def test_what_a_reader_wrote_is_never_overwritten(clean, tmp_path):
    path, _ = clean
    own = tmp_path / "own"
    copy_to(own, [path])
    (own / "book.ipynb").write_text("what a reader wrote, not even a notebook")
    other = saved(tmp_path / "07_other.ipynb", tool.canonical(messy()))
    for folder, text in ((tmp_path, "old"), (own, "new")):
        (folder / kept.FOLDER).mkdir()
        (folder / kept.FOLDER / "prune.py").write_text(text)
    (tmp_path / kept.FOLDER / "order.py").write_text("old")
    assert copy_to(own, [path, other]) == (["07_other.ipynb"], ["book.ipynb"])
    assert (own / "book.ipynb").read_text() == "what a reader wrote, not even a notebook"
    assert {each.name: each.read_text() for each in (own / kept.FOLDER).iterdir()} == {
        "prune.py": "new",  # theirs stays
        "order.py": "old",  # kept beside the original, and brought along
    }


def test_make_lab_opens_the_copies_which_git_ignores():
    """Their folder stands where the originals' stands, so that their links lead somewhere. Answers are kept in it."""
    assert ANSWERS == kept.FOLDER
    assert not kept.FOLDER.startswith("/")  # beside the notebook that is open
    ignored = (ROOT / ".gitignore").read_text().split()
    assert f"{OWN}/" in ignored
    recipe = (ROOT / "Makefile").read_text().split("\nlab:")[1].split("\n\n")[0]
    assert re.findall(r"\$\(PY\) (.+)", recipe) == ["-m asyncbatch lab"]
    assert "asyncbatch lab" in (ROOT / "docs" / "using.md").read_text("utf-8")


# The real notebooks.


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def markdown(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def test_there_are_notebooks_and_the_readme_lists_them():
    assert NOTEBOOKS
    readme = markdown(ROOT / "README.md")
    assert [path.name for path in NOTEBOOKS if f"notebooks/{path.name}" not in readme] == []


SET_UP = """\
import os
import sys

sys.path.append(os.environ.get("ASYNCBATCH_CLONE", os.path.abspath("..")))  # used where asyncbatch is not installed
from asyncbatch.lessons import teach

device = teach.setup()"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_code_cell_is_the_same_in_all_notebooks(path):
    first = code_cells(path)[0]
    assert first.source == SET_UP
    assert first.metadata == {"tags": ["nbval-ignore-output"]}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_cells_are_short(path):
    lengths = [len([line for line in cell.source.splitlines() if line.strip()]) for cell in code_cells(path)]
    assert {number: length for number, length in enumerate(lengths) if length > 20} == {}
    assert statistics.median(lengths) < 8


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_images_have_alt_text_and_links_lead_somewhere(path):
    text = without_code(markdown(path))
    images = re.findall(r"!\[([^\]]*)\]\(", text)
    assert [alt for alt in images if len(alt.split()) < 3] == []
    tags = re.findall(r"<img[^>]*>", text)
    assert [tag for tag in tags if not re.search(r'alt="[^"]+"', tag)] == []
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r'(?:href|src)="([^"]+)"', text)
    local = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert [target for target in local if not (path.parent / target).exists()] == []

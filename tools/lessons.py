"""What the notebooks ask, read from their files: predictions with their answers, exercises, folds.

For tools/teaching.py (the teacher's page), tools/copies.py (student copies and the key) and tools/website (the pages).
A notebook joins by lying in notebooks/. Nothing here runs a cell, or imports the package.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
SCAFFOLDING = "scaffolding"  # the tag of cells that only assert, or tell which answer was right

_ASKED = re.compile(r"^Predict: (.*?)((?:\n  [A-H]: .*)+)", re.DOTALL)
_ASKS = re.compile(r"^(\w+) = teach\.predict\(", re.MULTILINE)
_REVEALS = re.compile(r"^(\w+)\.reveal\(", re.MULTILINE)
_TOLD = re.compile(r"^The answer is ([A-H]): (.*?)\.\n(.*?)\s*(?=^The answer is |\Z)", re.MULTILINE | re.DOTALL)
_CHECKS = re.compile(r"^(\w+) = teach\.check\(\"(\w+)\"", re.MULTILINE)
_TITLE = re.compile(r"^### (Exercise \d+: .*)$", re.MULTILINE)
_FOLD = re.compile(r"<details[^>]*>\s*<summary>(.*?)</summary>(.*?)</details>", re.DOTALL)


class Fold(NamedTuple):
    """A folded part of a text, as written: `whole`, what is seen (`summary`) and what is folded (`inside`)."""

    whole: str
    summary: str
    inside: str


class Prediction(NamedTuple):
    """A question of a notebook. options: letter -> words. right: a letter. because: what `reveal` says."""

    name: str  # of its variable
    question: str
    options: dict[str, str]
    right: str
    because: str


class ExerciseCells(NamedTuple):
    """An exercise in a notebook: its name and title, and the numbers of its cells: to fill in, and to check."""

    name: str
    title: str
    stub: int
    check: int


def read(path: Path) -> NotebookNode:
    return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)


def number_of(path: Path) -> str:
    """The notebook's number: "00" of 00_start_here.ipynb."""
    return path.stem.split("_")[0]


def title_of(book: NotebookNode) -> str:
    """The notebook's first heading, "00 Start here"."""
    return book.cells[0].source.splitlines()[0].lstrip("# ")


def folds(text: str) -> list[Fold]:
    return [Fold(match[0], match[1].strip(), match[2].strip()) for match in _FOLD.finditer(text)]


def saved_text(cell: NotebookNode) -> str:
    """All text that the cell's outputs hold, as saved."""
    return "".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in cell.get("outputs", ())
    )


def has_picture(cell: NotebookNode) -> bool:
    return any(kind.startswith("image/") for output in cell.get("outputs", ()) for kind in output.get("data", ()))


def reveals(cell: NotebookNode) -> bool:
    """Whether the cell tells the answer of a prediction."""
    return cell.cell_type == "code" and _REVEALS.search(cell.source) is not None


def asks(cell: NotebookNode) -> bool:
    """Whether the cell asks for a prediction."""
    return cell.cell_type == "code" and _ASKS.search(cell.source) is not None


def predictions(book: NotebookNode) -> list[Prediction]:
    """The predictions of an executed notebook, in order; question and answer are taken from its saved outputs.

    Raises ValueError for a question that is never answered, or an answer that was not saved."""
    asked: dict[str, tuple[str, dict[str, str]]] = {}
    found = []
    for cell in book.cells:
        if cell.cell_type != "code":
            continue
        if asks := _ASKS.search(cell.source):
            question, lines = _matched(_ASKED, saved_text(cell), asks[1]).groups()
            options = dict(line.strip().split(": ", 1) for line in lines.strip("\n").splitlines())
            asked[asks[1]] = (_one_line(question), options)
        names = _REVEALS.findall(cell.source)
        told = _TOLD.findall(saved_text(cell)) if names else []
        if len(told) != len(names):
            raise ValueError(f"{', '.join(names)}: {len(told)} answers are saved; run the notebook")
        for name, (letter, _, because) in zip(names, told, strict=True):
            if name not in asked:
                raise ValueError(f"{name} is revealed, and was never asked")
            found.append(Prediction(name, *asked.pop(name), letter, _one_line(because)))
    if asked:
        raise ValueError(f"{', '.join(asked)}: asked, and never revealed")
    return found


def _matched(pattern: re.Pattern[str], text: str, name: str) -> re.Match[str]:
    match = pattern.search(text)
    if match is None:
        raise ValueError(f"{name}: its question is not among the saved outputs; run the notebook")
    return match


def _one_line(text: str) -> str:
    return " ".join(text.split())


def exercises(book: NotebookNode) -> list[ExerciseCells]:
    """The exercises of a notebook, in order. Raises ValueError for a check without a function to fill in before it."""
    found = []
    title = ""
    for number, cell in enumerate(book.cells):
        if cell.cell_type != "code":
            titles = _TITLE.findall(cell.source)
            title = titles[-1] if titles else title
            continue
        for _, name in _CHECKS.findall(cell.source):
            stubs = [i for i in range(number) if is_stub(book.cells[i], name)]
            if not stubs:
                raise ValueError(f"{name} is checked, and no cell before has `def {name}(` with `...` to fill in")
            found.append(ExerciseCells(name, title, stubs[-1], number))
    return found


def is_stub(cell: NotebookNode, name: str) -> bool:
    """Whether the cell is a function `name` that waits for its body."""
    return (
        cell.cell_type == "code"
        and re.search(rf"^def {name}\(", cell.source, re.MULTILINE) is not None
        and re.search(r"^\s*(?:return )?\.\.\.(?:\s*#.*)?$", cell.source, re.MULTILINE) is not None
    )


def all_notebooks(folder: Path | None = None) -> Iterator[tuple[Path, NotebookNode]]:
    """Every notebook of the folder (notebooks/ when left out), in order."""
    for path in sorted((folder or ROOT / "notebooks").glob("*.ipynb")):
        yield path, read(path)

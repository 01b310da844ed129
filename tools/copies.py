"""Two kinds of copies of a notebook, made from the one source. `tools/notebooks.py` writes them.

- for a class (`for_students`): without outputs and without answers. Solutions are to be written, folded hints and
  answers are left out, and the cells that tell which prediction was right are sealed (asyncbatch/lessons/sealed.py);
- the answer key (`key`): every output, every exercise solved with the package's own function, every fold open.

Both have nbgrader's tags: the cell of an exercise is one that is graded by hand (its check prints, and does not
raise), the check is read-only.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from typing import Any

from nbformat import NotebookNode

from tools import lessons

SOLUTION = re.compile(r"^# teach\.(?:solution|hint)\(.*\n?", re.MULTILINE)


def cleared(book: NotebookNode) -> NotebookNode:
    """Without outputs and execution counts (in place)."""
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return book


def for_students(book: NotebookNode) -> NotebookNode:
    """Without outputs, and without anything that answers what the notebook asks (in place)."""
    from asyncbatch.lessons import sealed

    exercises = lessons.exercises(book)
    _tag(book, exercises)
    cleared(book)
    for cell in book.cells:
        if cell.cell_type != "code":
            cell.source = _without_folds(cell.source)
        elif lessons.reveals(cell) or lessons.SCAFFOLDING in cell.metadata.get("tags", ()):
            cell.source = sealed.seal(cell.source)
            cell.metadata["tags"] = sorted({*cell.metadata.get("tags", ()), lessons.SCAFFOLDING})
            cell.metadata["jupyter"] = {"source_hidden": True}
        else:
            cell.source = SOLUTION.sub("", cell.source).rstrip("\n")
    for exercise in exercises:
        cell = book.cells[exercise.check]
        hints = f'# teach.hint("{exercise.name}", 1)  # take away the first # to get a hint; there are two'
        cell.source = f"{cell.source}\n{hints}"
    return book


def _without_folds(text: str) -> str:
    """The text with a line in place of each fold, and one for hints that follow each other."""
    for fold in lessons.folds(text):
        words = "" if fold.summary.startswith("Hint") else f"*{fold.summary}: in the teacher's key.*"
        text = text.replace(fold.whole, words)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return text or "*Hints: see the last line of the cell above.*"


def key(book: NotebookNode) -> NotebookNode:
    """With every output and every answer (in place)."""
    from asyncbatch.lessons import kept

    exercises = lessons.exercises(book)
    _tag(book, exercises)
    for exercise in exercises:
        stub, check = book.cells[exercise.stub], book.cells[exercise.check]
        stub.source = solution(exercise.name)
        said = _what_the_check_says(exercise.name, kept.defined(stub.source, exercise.name))
        untouched = _what_the_check_says(exercise.name, lambda *args: ...)
        for output in check.get("outputs", ()):
            if "text" in output:
                output.text = output.text.replace(untouched, said)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("jupyter", None)
        else:
            cell.source = cell.source.replace("<details>", "<details open>")
    return book


def solution(name: str) -> str:
    """The package's own solution of the exercise `name`, as a cell that needs nothing of the notebook."""
    from asyncbatch.lessons import kept
    from asyncbatch.lessons.exercises import EXERCISES

    reference = EXERCISES[name].reference
    text = re.sub(r"^@\w+\n", "", kept.source_of(reference, name), flags=re.MULTILINE)  # a method may be decorated
    text = re.sub(r"^((?:from \S+ )?import (\w+)) as \2$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return f"# from {reference.__module__.replace('.', '/')}.py\n{text}"


def _what_the_check_says(name: str, function: Callable[..., Any]) -> str:
    from asyncbatch.lessons import teach

    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        teach.check(name, function)
    return told.getvalue()


def _tag(book: NotebookNode, exercises: list[lessons.ExerciseCells]) -> None:
    """Give the cells of exercises nbgrader's tags. An id stands once in a notebook, as nbgrader wants it."""
    for exercise in exercises:
        book.cells[exercise.stub].metadata["nbgrader"] = _nbgrader(exercise.name, grade=True, solution=True, points=1)
        book.cells[exercise.check].metadata["nbgrader"] = _nbgrader(f"check_{exercise.name}", locked=True)


def _nbgrader(name: str, grade: bool = False, solution: bool = False, locked: bool = False, points: int = 0) -> Any:
    tags = {
        "grade": grade,
        "grade_id": name,
        "locked": locked,
        "schema_version": 3,
        "solution": solution,
        "task": False,
    }
    return tags | ({"points": points} if grade else {})


KINDS: dict[str, Callable[[NotebookNode], NotebookNode]] = {"students": for_students, "key": key}
TITLES = {"students": "copies for a class", "key": "the answer key"}

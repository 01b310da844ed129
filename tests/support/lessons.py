"""What is counted in a notebook: its words, the places where its reader writes, the names it takes from the package.

`cells` is a notebook's list of cells, as nbformat reads it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat

BADGES = re.compile(r"^!\[.*\]\(\.\./docs/badges/.*$", re.MULTILINE)  # the line of them below the title
TABLE_LINES = re.compile(r"^\|.*$", re.MULTILINE)
# A comment that asks the reader to write something, or to change a number and to run the cell again.
ASKS = re.compile(r"#.*\b(your code here|your turn|change|try)\b", re.IGNORECASE)

ANSWERS, YOURS = re.compile(r'teach\.check\("(\w+)"'), re.compile(r'teach\.yours\("(\w+)"\)')


def cells_of(path: Path) -> list[Any]:
    return nbformat.read(path, as_version=4).cells


def code(cells: Sequence[Any]) -> list[Any]:
    return [cell for cell in cells if cell.cell_type == "code"]


def tagged(cell: Any, tag: str) -> bool:
    return tag in cell.metadata.get("tags", ())


def markdown(cells: Sequence[Any]) -> str:
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def words(cells: Sequence[Any]) -> int:
    """Words of the Markdown, hints and answers included, without the badges, HTML tags and the targets of links, and
    without tables, which are looked up and not read."""
    text = re.sub(r"<[^>]*>", " ", TABLE_LINES.sub("", BADGES.sub("", markdown(cells))))
    text = re.sub(r"\]\([^)\s]*\)", "]", text)
    return sum(bool(re.search(r"\w", word)) for word in text.split())


def places(cells: Sequence[Any]) -> list[Any]:
    """The code cells in which the reader writes code, or changes something and runs the cell again: those that say so
    in a comment (see ASKS)."""
    return [cell for cell in code(cells) if not tagged(cell, "scaffolding") and ASKS.search(cell.source)]


def trees(cells: Sequence[Any]) -> list[tuple[Any, ast.Module]]:
    """Each code cell with its Python, parsed."""
    return [(cell, ast.parse(cell.source)) for cell in code(cells)]


def imported(cells: Sequence[Any]) -> dict[str, str]:
    """The names that a notebook imports from the package, each with what it is, as "asyncbatch.pictures.plot"."""
    names = {}
    for _, tree in trees(cells):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "asyncbatch":
                names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
            elif isinstance(node, ast.Import):
                ours = [each for each in node.names if each.name.split(".")[0] == "asyncbatch"]
                names |= {each.asname or each.name: each.name for each in ours}
    return names


def defined(cells: Sequence[Any]) -> dict[str, str]:
    """The functions and classes that a notebook's cells define, each with its text. A stub of an exercise stands for
    the exercise: "exercise order"."""
    text = "\n".join(cell.source for cell in code(cells))
    names = {}
    for _, tree in trees(cells):
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                exercise = f'{node.name} = teach.check("{node.name}"' in text
                names[node.name] = f"exercise {node.name}" if exercise else ast.unparse(node)
    for name in YOURS.findall(text):
        names[name] = f"exercise {name}"
    return names

"""The pages of the site, prepared for Sphinx: where they stand, where their links lead, what is folded.

The folder has the form of the repository, so that links from one page to another stay what they are. README is its
first page. A link to anything that is no page leads to the repository if its address is known, and else is its words.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from asyncbatch.tour import links
from tools import lessons

HOME = "README.md"
FIRST, LAST = "index.md", ("CONTRIBUTING.md", "CHANGELOG.md")
ASSETS = {".png", ".svg", ".json"}
_CAPTION = re.compile(r"^\*Picture: (.*)\*$", re.MULTILINE)


def pages(root: Path) -> list[str]:
    """Every page, as a path from the repository's root: README, notebooks, docs, what else there is for readers."""
    found = [HOME, *_in(root, "notebooks", "ipynb"), *_in(root, "notebooks", "md"), *_in(root, "docs", "md")]
    return found + [name for name in LAST if (root / name).exists()]


def _in(root: Path, folder: str, ending: str) -> list[str]:
    return [path.relative_to(root).as_posix() for path in sorted((root / folder).glob(f"*.{ending}"))]


def prepare(root: Path, to: Path, repository: str = "") -> list[str]:
    """Write all pages, and what they show, into the folder `to`. Returns the pages. repository: its address, or ""."""
    found = pages(root)
    for asset in sorted(path for path in (root / "docs").rglob("*") if path.suffix in ASSETS):
        target = to / asset.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(asset, target)
    site = Links(root, found, repository)
    for page in found:
        target = to / (FIRST if page == HOME else page)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = (root / page).read_text(encoding="utf-8")
        if page.endswith(".ipynb"):
            book = shown(nbformat.reads(text, as_version=4))
            links.in_book(book, site.of(page))
            text = nbformat.writes(book)
        else:
            text = links.followed(text, site.of(page)) + (contents(found) if page == HOME else "")
        target.write_text(text, encoding="utf-8")
    return found


def contents(found: list[str]) -> str:
    """The site's table of contents, for Sphinx."""
    groups = {
        "Notebooks": [page for page in found if page.endswith(".ipynb")],
        "Reference": [page for page in found if page.startswith("docs/")],
        "Teaching": [page for page in found if page.startswith("notebooks/") and page.endswith(".md")],
        "Project": [page for page in found if page in LAST],
    }
    parts = [
        "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *members, "```"])
        for caption, members in groups.items()
        if members
    ]
    return "\n\n" + "\n\n".join(parts) + "\n"


class Links:
    """Where the links of a page lead on the site."""

    def __init__(self, root: Path, found: list[str], repository: str) -> None:
        self.root, self.pages, self.repository = root, set(found), repository.rstrip("/")

    def of(self, page: str) -> links.Place:
        """Where the targets of a page's links are on the site. FileNotFoundError for one that is nowhere."""
        return lambda target: self._place(target, page)

    def _place(self, link: str, page: str) -> str | None:
        target, _, anchor = link.partition("#")
        path = os.path.normpath((Path(page).parent / target).as_posix()).replace(os.sep, "/")
        if not (self.root / path).exists():
            raise FileNotFoundError(f"{page} has a link to {target}, which is not there")
        if path in self.pages or (path.startswith("docs/") and Path(path).suffix in ASSETS):
            place = FIRST if path == HOME else path
            from_page = Path(FIRST if page == HOME else page).parent.as_posix()
            relative = os.path.relpath(place, from_page).replace(os.sep, "/")
            return relative + ("#" + anchor if anchor else "")
        if not self.repository:
            return None
        kind = "tree" if (self.root / path).is_dir() else "blob"
        return f"{self.repository}/{kind}/main/{path}"


# ---- notebooks -------------------------------------------------------------------------------------------------------


def shown(book: NotebookNode) -> NotebookNode:
    """The notebook with myst-nb's tags (in place): what only asserts is not there, what answers is folded, and every
    picture has an alt text."""
    set_up = True
    for number, cell in enumerate(book.cells):
        if cell.cell_type != "code":
            continue
        tags = set(cell.metadata.get("tags", ()))
        if lessons.reveals(cell) or lessons.SCAFFOLDING in tags:
            tags |= {"remove-input", "hide-output"} if cell.outputs else {"remove-cell"}
        elif set_up or lessons.asks(cell):  # the first cell only finds the package; a question is its output
            tags.add("hide-input")
            set_up = False
        cell.source = re.sub(r"^# NBVAL_\w+\n", "", cell.source)
        cell.metadata = nbformat.from_dict({"tags": sorted(tags), "mystnb": _settings(book, number, tags)})
    return book


def _settings(book: NotebookNode, number: int, tags: set[str]) -> dict[str, Any]:
    """What myst-nb is told about one cell."""
    settings: dict[str, Any] = {}
    if "hide-output" in tags:
        settings |= {"code_prompt_show": "Show the answer", "code_prompt_hide": "Hide the answer"}
    if lessons.has_picture(book.cells[number]):
        settings["image"] = {"alt": alt_text(book, number)}
    return settings


def alt_text(book: NotebookNode, number: int) -> str:
    """What a picture shows: what its own text says (the results that can be said), and its caption, above or below."""
    cell = book.cells[number]
    said = [match[1] for match in re.finditer(r"^<(?:Picture: )?(.*)>$", lessons.saved_text(cell), re.MULTILINE)]
    for other in book.cells[number + 1 : number + 2] + book.cells[max(0, number - 1) : number]:
        if other.cell_type == "markdown" and (caption := _CAPTION.search(other.source)):
            said.append(re.sub(r"[*`]", "", caption[1]))
            break
    return ". ".join(said) or f"A picture of notebook {lessons.title_of(book)}"

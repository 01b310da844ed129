"""Where the links of a page lead, once it stands elsewhere: a link to what is not there becomes its words.

A copy of a notebook, a kit for a workshop and the site have each less around a page than the repository has.
"""

from __future__ import annotations

import filecmp
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

Place = Callable[[str], "str | None"]  # a target in this repository -> where it is now; None where it is not there

# A link, or code, in which nothing is a link; whichever begins first.
_LINK = re.compile(
    r"```.*?```|(?P<image>!?)\[(?P<words>(?:[^\[\]]|\[[^\]]*\](?:\([^)\s]*\))?)*)\]\((?P<target>[^)\s]+)\)|`[^`\n]*`",
    re.DOTALL,
)
_ELSEWHERE = re.compile(r"[a-z]+:|#")  # another place than a file: the web, or a part of this page


def followed(text: str, place: Place) -> str:
    """The Markdown with each link to a file led to `place` of its target. None: the link becomes its words."""

    def link(match: re.Match[str]) -> str:
        if match["target"] is None:
            return match[0]
        words = followed(match["words"], place)  # a picture may be a link
        target: str | None = match["target"]
        if not _ELSEWHERE.match(match["target"]):
            target = place(match["target"])
            if target is None:
                return words
            if _ELSEWHERE.match(target):  # a picture on another site: a link to it
                return f"[{words}]({target})"
        return f"{match['image']}[{words}]({target})"

    return _LINK.sub(link, text)


def in_book(book: dict[str, Any], place: Place) -> None:
    """The same for every Markdown cell of a notebook, in place."""
    for cell in book["cells"]:
        if cell["cell_type"] == "markdown":
            before = cell["source"]  # one text, or a list of its lines
            after = followed("".join(before), place)
            cell["source"] = after if isinstance(before, str) else after.splitlines(keepends=True)


def beside(page: Path) -> Place:
    """Links of the file `page` stay where they lead to something."""
    return lambda target: target if (page.parent / _path(target)).exists() else None


def of_copy(original: Path, folder: Path, copied: Collection[str]) -> Place:
    """Links of the copy of `original` in `folder` stay where they lead to another copy, one of the names `copied`, or
    to a file that is the same as the one that the original's link leads to."""

    def place(target: str) -> str | None:
        here, there = folder / _path(target), original.parent / _path(target)
        if _path(target) in copied or (here.is_file() and there.is_file() and filecmp.cmp(here, there, shallow=False)):
            return target
        return target if here.is_dir() and there.is_dir() and here.samefile(there) else None

    return place


def _path(target: str) -> str:
    return target.partition("#")[0]

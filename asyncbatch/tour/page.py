"""The first minute as one page that opens from disk, without a network."""

from __future__ import annotations

from pathlib import Path

from ..profile.document import Column, Table, render, timeline_view, write_html
from .findings import HEAD, NEXT, WHAT, WHO, Findings

NAME = "asyncbatch.html"
TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = {
    "timeline": "Both loops beside a recorded GPU",
    "where": "What it brings, and where",
    "answers": "Two questions, both loops",
    "next": "Next",
}


def write(path: Path, found: Findings) -> None:
    """Write the page. OSError if the file cannot be written."""
    write_html(path, page(found))


def page(found: Findings) -> str:
    """The text of the page."""
    return render(
        "tour.html.j2",
        SECTIONS,
        TEMPLATES,
        title="asyncbatch: the first minute",
        what=WHAT,
        who=WHO,
        found=found,
        captions=" ".join(f"{caption[0].upper()}{caption[1:]}." for caption in found.captions),
        timeline=timeline_view(found.timelines),
        table=Table.of("Idle time of the device, and what overlapping gives", map(Column, HEAD), found.rows),
        tokens=sum(answer.tokens for answer in found.answers),
        next=[(command, what) for what, command in NEXT],
    )

"""The first minute in a terminal: each part is printed as soon as it is there."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from ..measure.text import table_lines
from ..models.messages import ModelError
from ..pictures.picture import COLORS
from ..profile.terminal import console_for
from . import drawing
from .findings import HEAD, NEXT, WHAT, WHO, Findings, findings
from .measuring import Here, answers_here, beside_a_gpu

WIDEST, NARROWEST = 100, 60
LOOKS = {
    "": "",
    "bold": "bold",
    "quiet": "dim",
    "host": f"black on {COLORS['orange']}",
    "device": f"white on {COLORS['blue']}",
    "idle": f"bold {COLORS['vermillion']}",
}


class Paper:
    """Where lines are printed: with colours in a terminal where rich is installed, else as plain text. Both have the
    same characters."""

    def __init__(self, file: TextIO | None = None):
        self.file = sys.stdout if file is None else file
        self.console = console_for(self.file)
        self.width = max(NARROWEST, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))

    def line(self, *pieces: tuple[str, str]) -> None:
        """One line of (text, look)."""
        if self.console is None:
            print("".join(text for text, _ in pieces), file=self.file, flush=True)
            return
        from rich.text import Text

        # As Text: what a model said never becomes markup.
        self.console.print(Text.assemble(*((text, LOOKS[look]) for text, look in pieces)), soft_wrap=True)

    def text(self, text: str, look: str = "", indent: str = "") -> None:
        """A paragraph."""
        for line in textwrap.wrap(text, self.width, initial_indent=indent, subsequent_indent=indent):
            self.line((line, look))

    def heading(self, text: str) -> None:
        self.line(("", ""))
        self.text(text, "bold")


def show_all() -> Findings:
    """Measure, and print each part when it is there."""
    paper = Paper()
    paper.text(WHAT)
    paper.text(WHO)
    paper.heading("1 of 3  The embedded model answers two questions, through both loops")
    here, missing = _answers(paper)
    paper.heading("2 of 3  Your host beside a recorded GPU, in turns and overlapped")
    beside = beside_a_gpu()
    found = findings(here, beside, missing)
    _beside(paper, found)
    paper.heading("3 of 3  What it brings, and where")
    _table(paper, found)
    return found


def _answers(paper: Paper) -> tuple[Here | None, str | None]:
    try:
        here = answers_here()
    except ModelError as error:
        paper.text(str(error))
        return None, str(error)
    for question, text, _ in here.answers:
        paper.text(f"{question}  {text}", indent="  ")
    tokens = sum(answer.tokens for answer in here.answers)
    same = f"Both loops gave the same {tokens} tokens." if here.report.same_tokens else "THE LOOPS GAVE OTHER TOKENS."
    paper.text(f"{same} All of it is real: model, host and device ({here.report.device}).", "bold", "  ")
    return here, None


def _beside(paper: Paper, found: Findings) -> None:
    columns = paper.width - drawing.LABEL
    stretches = drawing.stretches(*found.timelines)
    for timeline, stretch, caption in zip(found.timelines, stretches, found.captions, strict=True):
        paper.line((caption, "bold"))
        for lane in drawing.lanes(timeline, stretch, columns):
            paper.line((lane.label.ljust(drawing.LABEL), "quiet"), *drawing.parts(lane))
    paper.line((" " * drawing.LABEL + drawing.scale(stretches[0], columns), "quiet"))
    paper.line((drawing.LEGEND, "quiet"))
    paper.line(("", ""))
    paper.text(found.point, "bold")
    paper.text(found.emulated, "quiet")


def _table(paper: Paper, found: Findings) -> None:
    for place, line in enumerate(_fitting(paper.width, [HEAD, *found.rows])):
        paper.line((line, "quiet" if place == 0 else ""))
    paper.line(("", ""))
    if found.here:
        paper.text(found.here, "bold")


def _fitting(width: int, rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; where they are too long for the width, what a row is about has a line of its own."""
    each = list(rows)
    lines = table_lines(each)
    if max(map(len, lines)) <= width:
        return lines
    short = table_lines([("", *row[1:]) for row in each])
    return [short[0], *(line for row, figures in zip(each[1:], short[1:], strict=True) for line in (row[0], figures))]


def end(path: Path) -> None:
    """What comes next, and where the page is."""
    paper = Paper()
    paper.heading("Next")
    for line in table_lines([(f"  {command}", what) for what, command in NEXT], "<"):
        paper.line((line, ""))
    paper.line(("", ""))
    paper.line(("All of this as a page, both timelines to zoom into:  ", ""), (str(path), "bold"))

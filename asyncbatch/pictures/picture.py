"""`Picture`: a matplotlib Figure that shows itself as a PNG, and the style that all pictures share.

The colours are the Okabe-Ito palette, which colour-blind readers can tell apart. What a colour says, a word or a hatch
says too. Labels are drawn as plain text, never as markup.
"""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ..shown.files import whole_file

COLORS = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
}
TEXT, GRID = "#222222", "#BBBBBB"
DPI = 120  # pixels per inch


class Picture:
    """A matplotlib Figure that a notebook shows as a PNG, with a text that is the same in every run.

    figure, axes: matplotlib's own, to draw on. title: the text."""

    def __init__(self, figure: Figure, title: str, axes: Axes | None = None):
        self.figure = figure
        self.title = title
        self.axes = axes

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.title}>"

    def savefig(self, path, **options) -> None:
        """matplotlib's `Figure.savefig`, with `dpi=120` as the default."""
        if not (isinstance(path, (str, os.PathLike)) and Path(path).suffix):
            self.figure.savefig(path, **{"dpi": DPI, **options})  # a stream, or matplotlib adds the ending
            return
        with whole_file(path) as beside:
            self.figure.savefig(beside, **{"dpi": DPI, **options})

    def png(self, dpi: int = DPI) -> bytes:
        """The picture as the bytes of a PNG file."""
        buffer, small = io.BytesIO(), io.BytesIO()
        self.savefig(buffer, dpi=dpi, format="png")
        # With a palette the file has a third of the size (it is stored in notebooks), and no colour changes visibly.
        image = Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
        image.save(small, "png", optimize=True)
        return small.getvalue()

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        return {"text/plain": repr(self), "image/png": base64.b64encode(self.png()).decode()}


def figure(width: float = 8, height: float = 3, title: str = "") -> Picture:
    """An empty picture, `width` x `height` inches, in this project's style: draw on its `.axes`, then show it."""
    fig = Figure((width, height), facecolor="white", layout="constrained")
    axes = fig.add_subplot()
    plain_axes(axes)
    axes.set_title(title, loc="left", fontsize=11, color=TEXT, parse_math=False)
    return Picture(fig, title or "figure", axes)


def drawable(text: str) -> str:
    """The text with "?" in place of lone surrogates (from file names that are not UTF-8), which matplotlib refuses."""
    return text.encode("utf-8", "replace").decode()


def plain_axes(axes: Axes) -> None:
    """Give axes the style of this project: no box, grey lines, small numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=TEXT, labelsize=8, color=GRID)

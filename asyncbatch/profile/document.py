"""What the pages of the profiling script share: one HTML file each, with everything inside.

`render(template, ...)` fills a template of `templates/`, and every text in it is escaped. Below stand the things that
templates show (`Table` with its `Meter`s and `ShowButton`s, `TimelineView`), and how numbers are written.

A page may load nothing. It runs no script and no style but its own two, whose hashes its Content-Security-Policy names.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from ..measure.attribution import attribute
from ..measure.text import in_seconds
from ..pictures.timelines import WIDGET
from ..shown.files import whole_file
from ..timeline import Timeline
from .rank_pictures import NOTE, plot_runs
from .rank_times import RankTimes

MOST_SPANS = 100_000  # in one page: about 11 bytes each, compressed and in base64
HERE = Path(__file__).parent


# ---- the document -------------------------------------------------------------------------------------------------


def render(template: str, sections: Mapping[str, str], folder: Path | None = None, **values: Any) -> str:
    """The text of a page. sections: the heading of each part, by its id; the values are the template's own. folder:
    where the template is, if not among this wing's."""
    files = (HERE / "static" / "report.css", WIDGET, HERE / "static" / "report.js")
    style, widget, code = (file.read_text(encoding="utf-8") for file in files)
    script = f"{widget}\n{code}"
    policy = f"default-src 'none'; img-src data:; script-src {_hash(script)}; style-src {_hash(style)}; "
    policy += "base-uri 'none'; form-action 'none'"
    return (
        _templates(folder)
        .get_template(template)
        .render(sections=sections, style=style, script=script, policy=policy, **values)
    )


@cache
def _templates(folder: Path | None) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([HERE / "templates", *([folder] if folder else [])]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}'"


def write_html(path: str | Path, text: str) -> None:
    """Write a page. OSError if the file cannot be written."""
    # Bytes, so that no system turns line ends into others. A lone surrogate, which is no text, becomes "&#55357;".
    with whole_file(path) as beside:
        beside.write_bytes(text.encode("utf-8", "xmlcharrefreplace"))


# ---- tables -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """The head of a column, and the class of its cells: "" for numbers, "text", "live-only"."""

    head: str
    kind: str = ""


@dataclass(frozen=True)
class Meter:
    """A number and, as a bar, the `share` that it is of the largest one. kind: the class that colours the bar."""

    text: str
    share: float
    kind: str
    note: str | None = None


@dataclass(frozen=True)
class ShowButton:
    """A button that shows the timeline from `low_s` to `high_s`."""

    label: str
    low_s: float
    high_s: float

    @classmethod
    def around(cls, label: str, start_s: float, long_s: float) -> ShowButton:
        """From a little before `start_s` to a little after what begins there and is `long_s` long."""
        return cls(label, max(0.0, start_s - 2 * long_s), start_s + 3 * long_s)


Cell = str | Meter | ShowButton


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows; each row has a cell for each column."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @classmethod
    def of(cls, caption: str, columns: Iterable[str | Column], rows: Iterable[Sequence[Cell]]) -> Table:
        heads = tuple(Column(one) if isinstance(one, str) else one for one in columns)
        table = cls(caption, heads, tuple(map(tuple, rows)))
        if any(len(row) != len(heads) for row in table.rows):
            raise ValueError(f"the table {caption!r} has {len(heads)} columns, and a row with another number of cells")
        return table


def causes_table(name: str, by: Mapping[str, float], idle_s: float, most_s: float) -> Table:
    """Idle time by cause, the largest first. by: seconds, which add up to `idle_s`; most_s: the page's longest bar."""
    rows: list[tuple[Cell, ...]] = [
        (cause, milliseconds(1e3 * seconds), Meter(percent(ratio(seconds, idle_s)), ratio(seconds, most_s), "idle"))
        for cause, seconds in sorted(by.items(), key=lambda item: -item[1])
    ]
    rows.append(("all gaps", milliseconds(1e3 * idle_s), Meter(percent(1.0), ratio(idle_s, idle_s), "none")))
    return Table.of(f"{name}: idle time by cause", ("Cause", "device idle", Column("share of it", "text")), rows)


# ---- the timeline -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimelineView:
    """Timelines to zoom into, for report.js, and a still picture of them. note: what to know about it; end: seconds."""

    note: str
    end: float
    packed: dict[str, Any]
    picture: str
    alt: str


def gap_causes(timeline: Timeline) -> Iterator[tuple[int, str, float]]:
    """What the page says of a gap that somebody points at: (step, cause, share of the gap), as `Causes` wants it."""
    for gap in [] if timeline.dropped else attribute(timeline, all_steps=True).gaps:
        if gap.host_s:  # nothing stands in a gap that is only a rounding error long
            yield gap.step, gap.cause, gap.host_s[gap.cause] / gap.seconds


def timeline_view(timelines: Sequence[Timeline], ranks: Sequence[Sequence[RankTimes]] = ()) -> TimelineView | None:
    """The view of the timelines; None without any. Of more than MOST_SPANS spans it keeps that many, and says which.
    ranks: of each run what its ranks did, where there are several."""
    if not timelines:
        return None
    figure = plot_runs(timelines, ranks, causes=gap_causes)
    about, spans = figure.packed(MOST_SPANS)
    note = "Each run begins at 0." if len(timelines) > 1 else ""
    if any(one.collective_s for group in ranks for one in group):
        note = f"{note} {NOTE}"
    if len(spans) // 24 < figure.num_spans:
        note = f"{note} {_left_out(figure.num_spans, len(spans) // 24, about)}"
    # The bytes in columns (all first bytes, then all second ones, ...): they compress to a third.
    columns = np.frombuffer(spans, np.uint8).reshape(-1, 24).T.tobytes()
    tracks = "; ".join(f"{track['name']}: {track['caption']}" for track in about["tracks"])
    return TimelineView(
        note=note.strip(),
        end=about["end"],
        packed={"about": about, "spans": base64.b64encode(zlib.compress(columns, 9)).decode()},
        picture="data:image/png;base64," + base64.b64encode(figure.png()).decode(),
        alt=f"Timeline of {tracks}.",
    )


def _left_out(total: int, kept: int, about: dict[str, Any]) -> str:
    low, high = about["lanes"][0]["kept"]
    all_steps = all(lane["kept"] is None for lane in about["lanes"] if lane["lane"] == "compute")
    what = "of the host and of the copies those" if all_steps else "those"
    steps = "every step of the device, so every idle gap, and " if all_steps else ""
    return (
        f"The runs have {total:,} spans. To stay small, this page holds {kept:,} of them: {steps}{what} from {low:.3f} "
        f"to {high:.3f} s. Where spans are left out, the picture says so. No number on this page is affected, and the "
        "trace that the profiling script writes beside it has all spans."
    )


# ---- numbers as text ----------------------------------------------------------------------------------------------


def percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} ms"


def seconds(value: float | None) -> str:
    return "-" if value is None else in_seconds(value)


def signed(share: float | None, digits: int = 2) -> str:
    """A share by which something is more (+) or less."""
    if share is None:
        return "-"
    text = f"{100 * share:+.{digits}f} %".replace("-", "\N{MINUS SIGN}")
    return text if any(digit in text for digit in "123456789") else text[1:]


def ratio(part: float | None, whole: float) -> float:
    return (part or 0.0) / whole if whole > 0 else 0.0

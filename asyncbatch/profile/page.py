"""The report as one page: a single HTML file that opens from disk, without a network, in any browser.

`write_page(path, report, timelines)` puts everything inside: the numbers of `report.report`, the timeline to zoom, drag
and hover over (`static/timeline.js`, the code that the notebooks' widget runs), and a picture of it for print and for
where scripts do not run. The page may load nothing, and runs no script and no style but its own two, whose hashes its
Content-Security-Policy names. Whatever text a report holds (names of models and files, errors) is shown as text: `tag`
escapes all that is not `Markup`. What a report lacks, or has as null, is left out, or said to be missing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..measure.points import MEANING
from ..pictures import plot
from ..pictures.timelines import WIDGET
from ..timeline import Timeline
from .report import FLOOR_ROWS, LATENCY_ROWS, OWN, ROWS, cost_in_words

MOST_SPANS = 100_000  # in one page: about 11 bytes each, compressed and in base64
STATIC = Path(__file__).with_name("static")
SECTIONS = {
    "summary": "Summary",
    "timeline": "Timeline",
    "gaps": "Idle gaps by cause",
    "what-if": "What if",
    "points": "Latency points",
    "measured": "How it was measured",
}
WORDS = (
    ("Device active", "time that the compute stream has a step running / wall time, over the decode steps."),
    ("Idle", "1 - active: over the decode steps, the time between the end of a step and the start of the next one."),
    ("Kernel busy", "union of kernel and copy intervals from the profiler / wall time over the same window."),
    ("Host work", "host time of a step that is not waiting; the table has the median over the decode steps."),
    ("Wasted token", "a token computed for a request that had finished already."),
)
Run = tuple[str, dict[str, Any]]  # what a run is called on the page, and its row of the report
Child = Any  # of an element: text, a number, None, or an iterable of these


def write_page(path: str | Path, report: dict[str, Any], timelines: Sequence[Timeline]) -> None:
    """Write the page. `report` and `timelines` are what `report.report` returns; there may be no timelines.

    Of more than MOST_SPANS spans the page keeps that many, and says which (see `TimelineFigure.packed`). OSError if the
    file cannot be written."""
    write_html(path, page(report, timelines))


def write_html(path: str | Path, text: str) -> None:
    # Bytes, so that no system turns line ends into others. A lone surrogate, which is no text, becomes "&#55357;".
    Path(path).write_bytes(text.encode("utf-8", "xmlcharrefreplace"))


def page(report: dict[str, Any], timelines: Sequence[Timeline]) -> str:
    """The text of the page, see `write_page`."""
    title = f"{report.get('model')} on {report.get('device')}"
    runs = named_runs(report)
    parts: dict[str, Child] = {
        "summary": _summary(report, runs),
        "timeline": timeline_part(timelines, title),
        "gaps": _gaps(runs),
        "what-if": _what_if(runs),
        "points": _points(runs),
        "measured": _measured(report, runs),
    }
    return document(f"Profile of {title}", _header(report), SECTIONS, parts)


def document(title: str, header: Markup, sections: dict[str, str], parts: dict[str, Child]) -> str:
    """A whole page: its header, and below it the parts, each under the heading that `sections` gives its key."""
    files = (STATIC / "report.css", WIDGET, STATIC / "report.js")
    style, widget, code = (file.read_text(encoding="utf-8") for file in files)
    script = f"{widget}\n{code}"
    policy = f"default-src 'none'; img-src data:; script-src {_hash(script)}; style-src {_hash(style)}; "
    policy += "base-uri 'none'; form-action 'none'"
    whole = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=policy),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("title", title),
            tag("style", Markup(style)),
        ),
        tag(
            "body",
            header,
            tag("nav", (tag("a", words, href=f"#{key}") for key, words in sections.items()), aria_label="On this page"),
            tag("main", (tag("section", tag("h2", sections[key], id=key), part) for key, part in parts.items())),
            tag("script", Markup(script), type="module"),
        ),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{whole}\n"


# ---- HTML ---------------------------------------------------------------------------------------------------------


class Markup(str):
    """Text that is HTML already."""


def tag(name: str, /, *children: Child, **attributes: Child) -> Markup:
    """An HTML element. Children and attributes are escaped, but for children that are Markup; None is left out. In the
    names of attributes `_` stands for a hyphen, and at the end for nothing: `class_`."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("meta", "img", "br"):
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{''.join(_texts(children))}</{name}>")


def _texts(children: Iterable[Child]) -> Iterable[str]:
    for child in children:
        if isinstance(child, Markup):
            yield child
        elif isinstance(child, (str, int, float)):
            yield html.escape(str(child))
        elif child is not None:
            yield from _texts(child)


def data(id: str, value: Any) -> Markup:
    """A script element of JSON for report.js. No text in it can end the element, or begin a comment in it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # all that is not ASCII is escaped already
    return tag("script", Markup(text.replace("<", "\\u003c")), type="application/json", id=id)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}'"


Column = tuple[str, str]  # its head, and the class of its cells: "" for numbers, "text", "live-only"


def table(caption: str, columns: Iterable[str | Column], rows: Iterable[Sequence[Child]]) -> Markup:
    """A table whose first column names its rows. It scrolls by itself where the window is narrow."""
    (first, _), *rest = ((column, "") if isinstance(column, str) else column for column in columns)
    kinds = [kind or None for _, kind in rest]
    lines = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            (tag("td", cell, class_=kind) for cell, kind in zip(cells, kinds, strict=True)),
        )
        for name, *cells in rows
    ]
    corner = tag("th", first, scope="col") if first else tag("td")
    inside = [
        tag("caption", caption),
        tag("thead", tag("tr", corner, (tag("th", head, scope="col", class_=kind or None) for head, kind in rest))),
        tag("tbody", lines),
    ]
    return tag("div", tag("table", inside), class_="scroll", tabindex=0, role="region", aria_label=caption)


def meter(text: str, share: float, kind: str, note: str | None = None) -> Markup:
    """A number and, as a bar, the `share` it is of the largest one. The bar says nothing that no number says."""
    width = f"{100 * min(1.0, max(0.0, share)):.2f}"
    bar = tag("svg", tag("rect", width=width, height=10), class_=f"bar {kind}", viewBox="0 0 100 10",
              preserveAspectRatio="none", aria_hidden="true")  # fmt: skip
    return tag(
        "div", tag("span", text), tag("small", note) if note else None, bar, class_="meter noted" if note else "meter"
    )


# ---- numbers as text ----------------------------------------------------------------------------------------------


def percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} ms"


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"


def signed(share: float | None, digits: int = 2) -> str:
    """A share by which something is more (+) or less."""
    if share is None:
        return "-"
    text = f"{100 * share:+.{digits}f} %".replace("-", "\N{MINUS SIGN}")
    return text if any(digit in text for digit in "123456789") else text[1:]


def ratio(part: float | None, whole: float) -> float:
    return (part or 0.0) / whole if whole > 0 else 0.0


def named_runs(report: dict[str, Any]) -> list[Run]:
    """The runs by name: mode, and where they differ in it also engine, model and batch size."""
    rows = report.get("runs") or []

    def differ(*keys: str) -> bool:
        return len({tuple(row.get(key) for key in keys) for row in rows}) > 1

    engine, workload = differ("engine"), differ("model", "batch_size")
    names = []
    for row in rows:
        where = f"{row.get('model')}, batch {row.get('batch_size')}: " if workload else ""
        names.append(where + (f"{row.get('engine')} " if engine else "") + str(row.get("mode")))
    return list(zip(names, rows, strict=True))


# ---- the parts, from the top --------------------------------------------------------------------------------------


def _header(report: dict[str, Any]) -> Markup:
    about = [report.get("model"), report.get("device"), report.get("date")]
    # The first sentence is what to do; it is followed by what that would bring.
    head, stop, rest = (report.get("first") or f"Profile of {report.get('model')}").partition(". ")
    return tag(
        "header",
        tag("p", "asyncbatch.profile: " + ", ".join(str(text) for text in about if text), class_="about"),
        tag("h1", head + stop.strip()),
        (tag("p", text, class_="verdict") for text in (rest, report.get("verdict")) if text),
        (tag("p", tag("strong", head), " ", text, class_="notice") for head, text in _notices(report)),
    )


def _notices(report: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """What has to be known before any number is read, as (in bold, the rest)."""
    rows, workload = report.get("runs") or [], report.get("workload") or {}
    if report.get("same_tokens") is False:
        yield "The tokens differ.", "That is a fault, and the comparison is void."
    for engine, same in (report.get("peers_same_tokens") or {}).items():
        if not same:
            yield "The tokens differ.", f"{engine}: sync and async gave different tokens."
    if any(row.get("interrupted") for row in rows):
        yield "Interrupted.", "The numbers are of what ran until then, and the runs may have served different requests."
    real = "and nothing was computed. The host's work is real and this machine's."
    if report.get("emulated"):
        yield "Emulated device.", f"The device's times come from the recording {report['emulated']}, {real}"
    if workload.get("step_ms") is not None:
        yield "Timed device.", f"Each step takes {workload['step_ms']:g} ms by definition, {real}"
    if workload.get("host_work_ms"):
        yield (
            "Host work added.",
            f"{workload['host_work_ms']:g} ms of Python were burnt in each step on request.",
        )
    if (workload.get("arrivals") or "all") != "all":
        yield (
            "Requests arrive over time",
            (f"({workload['arrivals']}): that bounds wall time and tokens per second, so compare the latencies."),
        )
    for failed in report.get("failed") or []:
        which = ", ".join(str(failed[key]) for key in ("engine", "mode", "model", "batch_size") if failed.get(key))
        yield "Not measured:", f"{which}: {failed.get('error')}"


def _summary(report: dict[str, Any], runs: list[Run]) -> Child:
    columns = [*runs, *((f"recorded {row.get('mode')}", row) for row in report.get("recorded") or [])]
    if not columns:
        return tag("p", "Nothing was measured.")
    floors = any(row.get("floor_s") is not None for _, row in columns)
    lines: list[list[Child]] = []
    for label, key, spec, factor in (*ROWS, *FLOOR_ROWS):
        values = [row.get(key) for _, row in columns]
        spec = spec.replace(".1f} %", ".2f} %") if floors else spec  # on a GPU the hundredths count
        if any(value is not None for value in values):
            lines.append([label, *("-" if value is None else spec.format(value * factor) for value in values)])
    for label, key, words in (
        ("wall time of each run", "wall_s_of_each_run", lambda each: ", ".join(f"{wall:.3f}" for wall in each) + " s"),
        ("kernel busy", "kineto", _busy),
        ("cost of measuring", "overhead", lambda cost: signed(cost.get("share"))),
    ):
        found = [row.get(key) for _, row in columns]
        if any(found):
            lines.append([label, *(words(value) if value else "-" for value in found)])
    head: list[str] = ["", *(name for name, _ in columns)]
    if len(columns) > 6:  # several workloads: a line each
        head, *lines = (list(line) for line in zip(head, *lines, strict=True))
    said = []
    if report.get("async_speedup") is not None:
        said.append(f"Async / sync speed: {report['async_speedup']:.3f}x, the median over the repeats.")
    if report.get("law_idle") is not None:
        said.append(
            f"By the law idle = host / (host + device) the synchronous device is idle for "
            f"{percent(report['law_idle'])} of a step."
        )
    if any(row.get("engine") == OWN for _, row in runs) and report.get("same_tokens"):
        said.append("All runs gave the same tokens.")
    return [
        table("Runs side by side", head, lines),
        tag("p", " ".join(said)) if said else None,
        _latencies(runs),
        _floor_points(columns),
        _targets(report.get("targets") or []),
    ]


def _latencies(runs: list[Run]) -> Child:
    columns = ["", *(f"{words}, {part}" for words, _ in LATENCY_ROWS for part in ("median", "p99"))]
    rows = [
        [name, *(milliseconds((row["latency"].get(key) or {}).get(part)) for _, key in LATENCY_ROWS
                 for part in ("median", "p99"))]
        for name, row in runs if row.get("latency")
    ]  # fmt: skip
    return table("Latency of requests, from their arrival", columns, rows) if rows else None


def _busy(kineto: dict[str, Any]) -> str:
    return percent(kineto.get("busy"), 2) + (", DIFFERS" if kineto.get("differs") else "")


def _floor_points(runs: list[Run]) -> Child:
    rows = [
        [f"{name}, {words} context", f"{point['context'] / point['rows']:.0f}", milliseconds(point["ms"]),
         milliseconds(point["floor_ms"]), f"{point['over_floor']:.3f}x"]
        for name, row in runs
        for words, key in (("smallest", "first_context"), ("largest", "last_context"))
        if (point := row.get(key))
    ]  # fmt: skip
    columns = ("", "context of a row", "device per step", "floor of a step", "step over floor")
    return table("Decode steps against the memory bandwidth", columns, rows) if rows else None


def _targets(targets: list[dict[str, Any]]) -> Child:
    words = {True: "reached", False: "NOT REACHED", None: "no claim"}
    rows = [[one["what"], one["reach"], one["value"], words[one["reached"]]] for one in targets]
    return table("Speed to reach", ("", "to reach", "measured", ("", "text")), rows) if rows else None


def timeline_part(timelines: Sequence[Timeline], title: str) -> Child:
    """The timelines to zoom into, and beneath the script a still picture of them."""
    if not timelines:
        return tag("p", "No timeline was kept.")
    figure = plot(*timelines)
    about, spans = figure.packed(MOST_SPANS)
    said = "Each run begins at 0." if len(timelines) > 1 else ""
    if len(spans) // 24 < figure.num_spans:
        said = f"{said} {_left_out(figure.num_spans, len(spans) // 24, about)}"
    # The bytes in columns (all first bytes, then all second ones, ...): they compress to a third.
    columns = np.frombuffer(spans, np.uint8).reshape(-1, 24).T.tobytes()
    packed = {"about": about, "spans": base64.b64encode(zlib.compress(columns, 9)).decode()}
    picture = "data:image/png;base64," + base64.b64encode(figure.png()).decode()
    alt = "; ".join(f"{track['name']}: {track['caption']}" for track in about["tracks"])
    keys = {"+": "Zoom in", "-": "Zoom out", "ArrowLeft": "Earlier", "ArrowRight": "Later", "0": "Reset"}
    buttons = [tag("button", words, type="button", data_key=key) for key, words in keys.items()]
    return [
        tag("p", said.strip()) if said else None,
        tag(
            "div",
            buttons,
            tag("button", "Whole run", type="button", data_from=0, data_to=about["end"]),
            class_="buttons live-only",
            role="group",
            aria_label="Timeline",
        ),  # fmt: skip
        tag("div", id="timeline-view"),
        tag("figure", tag("img", src=picture, alt=f"Timeline of {alt}.", width=1200), class_="still"),
        tag("noscript", tag("p", "Scripts do not run here, so this is a picture; with scripts it zooms and answers.")),
        data("timeline-data", packed),
    ]


def _left_out(total: int, kept: int, about: dict[str, Any]) -> str:
    low, high = about["lanes"][0]["kept"]
    all_steps = about["lanes"][2]["kept"] is None
    what = "of the host and of the copies those" if all_steps else "those"
    steps = "every step of the device, so every idle gap, and " if all_steps else ""
    return (
        f"The runs have {total:,} spans. To stay small, this page holds {kept:,} of them: {steps}{what} from {low:.3f} "
        f"to {high:.3f} s. Where spans are left out, the picture says so. No number on this page is affected, and the "
        "trace that the profiling script writes beside it has all spans."
    )


def _gaps(runs: list[Run]) -> Child:
    found = [(name, row["gaps"]) for name, row in runs if row.get("gaps")]
    if not found:
        return tag("p", "This report does not say what the host was doing in the idle gaps.")
    most = max((idle_s for _, gaps in found for idle_s in gaps["by"].values()), default=0.0)
    text = "What the host was doing in the device's idle gaps before decode steps; this adds up to all of their time."
    return [
        tag("p", text, " The bars of all runs have one scale." if len(found) > 1 else ""),
        tag(
            "div",
            (tag("div", causes_table(name, gaps, most), _longest(name, gaps)) for name, gaps in found),
            class_="runs",
        ),
    ]


def causes_table(name: str, gaps: dict[str, Any], most: float) -> Child:
    """Idle time (`idle_s`, seconds) by cause (`by`, seconds that add up to it); `most`: the longest bar of the page."""
    total = gaps["idle_s"]
    rows = [
        [cause, milliseconds(1e3 * idle_s), meter(percent(ratio(idle_s, total)), ratio(idle_s, most), "idle")]
        for cause, idle_s in sorted(gaps["by"].items(), key=lambda item: -item[1])
    ]
    rows.append(["all gaps", milliseconds(1e3 * total), meter(percent(1.0), ratio(total, total), "none")])
    return table(f"{name}: idle time by cause", ("Cause", "device idle", ("share of it", "text")), rows)


def _longest(name: str, gaps: dict[str, Any]) -> Child:
    rows = []
    for gap in gaps.get("longest") or []:
        step, start = gap["step"], gap["at_s"]
        look = show_button(f"Show the gap before step {step} of {name} in the timeline", start, 1e-3 * gap["ms"])
        rows.append([f"step\N{NO-BREAK SPACE}{step}", seconds(start), milliseconds(gap["ms"]), gap["cause"], look])
    columns = ("before", "at", "idle for", ("cause", "text"), ("in the timeline", "live-only"))
    return table(f"{name}: gaps that stand out", columns, rows) if rows else None


def show_button(label: str, start_s: float, long_s: float) -> Markup:
    """A button that shows the timeline from a little before `start_s` to a little after what is `long_s` long."""
    where = {"data_from": max(0.0, start_s - 2 * long_s), "data_to": start_s + 3 * long_s}
    return tag("button", "Show", type="button", aria_label=label, **where)


def _what_if(runs: list[Run]) -> Child:
    sync = [_where(row) for _, row in runs if row.get("mode") == "sync" and row.get("what_if")]
    # That of a synchronous run shows both loops, so beside it the asynchronous run has nothing to add.
    found = [
        (name, row) for name, row in runs if row.get("what_if") and (row["mode"] == "sync" or _where(row) not in sync)
    ]
    if not found:
        return tag("p", "This report does not say what each latency point would give back.")
    text = (
        "What a run would take in all if one latency point took no time, or half of its time, and all else stayed as "
        "it was: simulated from the run's own steps. Beside it stands how that changes the total. The bars show what "
        "is saved, on one scale within a table; what would save most comes first."
    )
    return [tag("p", text), (_what_if_of(name, row) for name, row in found)]


def _where(row: dict[str, Any]) -> tuple[Any, ...]:
    return row.get("engine"), row.get("model"), row.get("batch_size")


def _what_if_of(name: str, row: dict[str, Any]) -> Child:
    now = row.get("prediction") or {}
    totals = [f"{mode} {seconds(now[f'{mode}_s'])}" for mode in ("sync", "async") if now.get(f"{mode}_s") is not None]
    said = f"Simulated as it is: {', '.join(totals)}. {now.get('text') or ''}" if totals else None
    sides = dict.fromkeys(entry["where"] for entry in row["what_if"])
    return [(_what_if_table(name, row, side) for side in sides), tag("p", said) if said else None]


def _what_if_table(name: str, row: dict[str, Any], side: str) -> Child:
    cases = [(mode, factor) for mode in ("sync", "async") for factor in (0.0, 0.5)]
    median = {point["name"]: point["median_ms"] for point in row.get("points") or [] if point["where"] == side}
    points: dict[str, dict[float, dict[str, Any]]] = {}
    for entry in row["what_if"]:
        if entry["where"] == side:
            points.setdefault(entry["point"], {})[entry["factor"]] = entry
    most = max(entry.get(f"{mode}_saves") or 0.0 for one in points.values() for entry in one.values()
               for mode in ("sync", "async"))  # fmt: skip
    rows = []
    for point, of_factor in points.items():  # in the report's order: what saves most comes first
        cells: list[Child] = [point, milliseconds(median.get(point))]
        for mode, factor in cases:
            entry = of_factor.get(factor, {})
            saved = entry.get(f"{mode}_saves")
            cells.append(
                meter(
                    seconds(entry.get(f"{mode}_s")),
                    ratio(saved, most),
                    "saves",
                    None if saved is None else signed(-saved, 1),
                )
            )
        rows.append(cells)
    columns: list[str | Column] = ["Latency point", "takes now"]
    columns += ((f"{mode}, if it took {'half' if factor else 'no time'}", "text") for mode, factor in cases)
    return table(f"From the {name} run: points on the {side}", columns, rows)


def _points(runs: list[Run]) -> Child:
    found = [(name, row["points"]) for name, row in runs if row.get("points")]
    if not found:
        return tag("p", "This report does not have the times of the latency points.")
    text = (
        "Where the time of a step goes: median and p99 over the decode steps, total over all steps, and share of the "
        "host's or the device's time."
    )
    names = dict.fromkeys(point["name"] for _, points in found for point in points)
    meanings = [(tag("dt", name), tag("dd", MEANING[name])) for name in names if name in MEANING]
    return [
        tag("p", text),
        tag("div", (_points_tables(name, points) for name, points in found), class_="runs"),
        tag("details", tag("summary", "What the latency points are"), tag("dl", meanings)) if meanings else None,
    ]


def _points_tables(name: str, points: list[dict[str, Any]]) -> Markup:
    sides = dict.fromkeys(point["where"] for point in points)
    return tag("div", (_points_table(name, points, side) for side in sides))


def _points_table(name: str, points: list[dict[str, Any]], side: str) -> Child:
    rows = [
        [point["name"], milliseconds(point["median_ms"]), milliseconds(point["p99_ms"]), seconds(point["total_s"]),
         meter(percent(point["share"]), point["share"] or 0.0, side)]
        for point in points
        if point["where"] == side
    ]  # fmt: skip
    columns = ("Latency point", "median", "p99", "total", ("share", "text"))
    return table(f"{name}: points on the {side}", columns, rows)


def _measured(report: dict[str, Any], runs: list[Run]) -> Child:
    gpu, workload = report.get("gpu") or {}, report.get("workload") or {}
    bandwidth = report.get("copy_bandwidth_bytes_per_s")
    parts = {"memory_gib": "{} GiB", "driver": "driver {}", "compute_capability": "compute capability {}"}
    card = [gpu.get("name"), *(form.format(gpu[key]) for key, form in parts.items() if gpu.get(key))]
    versions = [f"{name} {number}" for name, number in (report.get("versions") or {}).items() if number]
    wanted = [
        f"{key.replace('_', ' ')} {f'{value:g}' if isinstance(value, float) else value}"
        for key, value in workload.items()
        if value is not None
    ]
    facts: dict[str, Child] = {
        "Command": tag("code", report.get("command")) if report.get("command") else None,
        "Date": report.get("date"),
        "Machine": report.get("machine"),
        "Device": report.get("device"),
        "GPU": ", ".join(str(part) for part in card if part) if gpu else None,
        "Copy bandwidth": f"{bandwidth / 1e12:.3f} TB/s, read plus write" if bandwidth else None,
        "Model": report.get("model"),
        "Workload": ", ".join(wanted),
        "Versions": ", ".join(versions),
        "Preset": report.get("preset"),
    }
    for name, row in runs:
        facts |= {f"{words}, {name}": text for words, text in _methods(row)}
    said = [(tag("dt", key), tag("dd", value)) for key, value in facts.items() if value]
    return [
        tag("dl", said),
        tag("p", "Each column of a table is the run of median wall time. Host times are read from the host's clock "
            "around each part of the loop. Device times are noted by the device itself, before and after each command "
            "(on CUDA: timing events on its streams), and are read when the step is committed."),
        tag("dl", ((tag("dt", word), tag("dd", text)) for word, text in WORDS)),
        as_json(report),
    ]  # fmt: skip


def as_json(report: dict[str, Any]) -> Markup:
    text = tag("pre", json.dumps(report, indent=1), tabindex=0, role="region", aria_label="The report as JSON")
    return tag("details", tag("summary", "The whole report as JSON"), text)


def _methods(row: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """What a run says of how it was measured, as (what, text)."""
    if row.get("setting"):
        yield "Setting", str(row["setting"])
    kineto, overhead = row.get("kineto") or {}, row.get("overhead") or {}
    if kineto:
        words = "THEY DIFFER" if kineto.get("differs") else "they agree"
        text = f"kernel busy {percent(kineto.get('busy'), 2)}, device active by events "
        yield (
            "Two methods",
            f"{text}{percent(kineto.get('event_active'), 2)}: {words}. {kineto.get('note') or ''}".strip(),
        )
    if overhead:
        yield "Cost of measuring", f"{cost_in_words(overhead)}: the same steps with and without it, in turns"

"""The report's page holds the report's numbers and all text as text, loads nothing, and needs no part of the report."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import re
import statistics
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from support.hostile import HOSTILE, hostile
from support.reports import EMULATED, REAL, measured
from support.timelines import steady_run as made_run

from asyncbatch.pictures import plot
from asyncbatch.profile import document
from asyncbatch.profile.page import page, write_page
from asyncbatch.profile.report import Report
from asyncbatch.profile.traces.page import MOST_GAPS, trace_page
from asyncbatch.profile.traces.read import read_trace
from asyncbatch.profile.traces.text import answers, facts
from asyncbatch.profile.verdict import who
from asyncbatch.timeline import Timeline

VOID = {"meta", "img", "br"}


class Parsed(HTMLParser):
    """The page as a browser reads it: `tags` (name, attributes), `text` of all but scripts and styles, `scripts` and
    `styles`, and `tables`: rows of cells as text, by caption, the head first."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.scripts, self.styles, self.tables = [], "", [], [], {}
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)
        if name == "table":
            self.rows = []
        elif name == "tr":
            self.rows.append([])
        elif name in ("td", "th"):
            self.rows[-1].append("")
        elif name in ("script", "style"):
            (self.scripts if name == "script" else self.styles).append("")

    def handle_endtag(self, name):
        assert self.open.pop() == name, "every element is closed where it should be"

    def handle_data(self, text):
        inside = self.open[-1] if self.open else ""
        if inside in ("script", "style"):
            (self.scripts if inside == "script" else self.styles)[-1] += text
            return
        self.text += text
        if inside == "caption":
            self.tables[text] = self.rows
        elif self.open and "table" in self.open and self.rows and self.rows[-1]:
            # a number and what stands beside it are told apart
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {text}".strip()

    def all(self, name: str) -> list[dict]:
        return [attributes for found, attributes in self.tags if found == name]


def page_of(report: dict, timelines=()) -> str:
    return page(Report.from_json(report), timelines)


def parsed(report: dict, timelines=()) -> Parsed:
    return Parsed(page_of(report, timelines))


@pytest.fixture(scope="module", params=[REAL, EMULATED], ids=["real", "emulated"])
def both(request):
    report, timelines = measured(request.param)
    return report, timelines, parsed(report, timelines)


def test_nothing_is_loaded_and_only_the_pages_own_script_and_style_may_run(both):
    report, timelines, seen = both
    text = page_of(report, timelines)
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest|WebSocket|import\(|import ", text)
    assert {attributes.get("href", "#")[0] for _, attributes in seen.tags} == {"#"}
    assert all(
        attributes["src"].startswith("data:image/png;base64,") for _, attributes in seen.tags if "src" in attributes
    )
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {name for name, _ in seen.tags}
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on") or name == "style"]

    (policy,) = (meta["content"] for meta in seen.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))

    def hash_of(source: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"

    kinds = dict(zip([script["type"] for script in seen.all("script")], seen.scripts, strict=True))
    assert list(kinds) == ["application/json", "module"]
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "script-src": hash_of(kinds["module"]),
        "style-src": hash_of(seen.styles[0]),
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_what_matters_most_comes_first(both):
    report, _, seen = both
    sentences = Report.from_json(report).sentences
    head, _, rest = sentences[0].partition(". ")
    order = [head, *[rest] * bool(rest), *sentences[1:], "Summary"]
    order += ["Runs side by side", "Each run begins at 0.", "why the device was idle", "What a run would take in all"]
    order += ["Where the time of a step goes", "How it was measured", report["command"], report["machine"]]
    body = seen.text[seen.text.index("asyncbatch.profile: ") :]
    heads = [attributes["id"] for attributes in seen.all("h2")]
    assert heads == ["summary", "timeline", "gaps", "what-if", "points", "measured"]
    assert [link["href"] for link in seen.all("a")] == [f"#{head}" for head in heads]
    for before, after in zip(order, order[1:], strict=False):
        before_at = body.index(before)
        assert body.find(after, before_at) >= 0, f"{after!r} comes after {before!r}"
        body = body[before_at:]


def in_s(value):
    """Three digits that count, and never less than a hundredth of a second where that is enough."""
    return f"{value:.3g} s" if value < 1 else f"{value:.2f} s" if value < 100 else f"{value:.1f} s"


def ms(value):
    return "-" if value is None else f"{value:.3f} ms"


def test_every_number_is_the_reports(both):
    report, _, seen = both
    tables = dict(seen.tables)
    runs = {run["mode"]: run for run in report["runs"]}
    summary = tables.pop("Runs side by side")
    head, rows = summary[0], {row[0]: row[1:] for row in summary[1:]}
    columns = [*report["runs"], *report["recorded"]]
    assert head[1:] == [*runs, *(f"recorded {run['mode']}" for run in report["recorded"])]
    digits = 2 if report["recorded"] else 1
    assert rows["device idle"] == [f"{100 * run['idle']:.{digits}f} %" for run in columns]
    assert rows["device active"] == [f"{100 * run['device_active']:.{digits}f} %" for run in columns]
    assert rows["wall time"] == [in_s(run["wall_s"]) for run in columns]
    assert rows["tokens per second"] == [f"{run['tokens_per_s']:.1f}" for run in columns]
    assert rows["host work per step"] == [ms(run["host_ms_per_step"]) for run in columns]
    assert rows["device per step"] == [ms(run["device_ms_per_step"]) for run in columns]
    for words, key in (("tokens", "tokens"), ("steps", "steps"), ("wasted tokens", "wasted_tokens")):
        assert rows[words] == [str(run[key]) for run in columns]
    each = rows["wall time of each run"]
    assert each[:2] == [", ".join(f"{s:.3f}" for s in run["wall_s_of_each_run"]) + " s" for run in runs.values()]
    assert f"{report['law_idle']:.1%}" in seen.text

    latencies = tables.pop("Latency of requests, from their arrival")[1:]
    assert latencies == [
        [f"{key.replace('_', ' ')}, {part}", *(ms(run["latency"][f"{key}_ms"][part]) for run in runs.values())]
        for key in ("first_token", "per_token", "end_to_end")
        for part in ("median", "p99")
    ]

    for mode, run in runs.items():
        gaps, wall_s = run["gaps"], statistics.median_high(run["wall_s_of_each_run"])
        *causes, last = tables.pop(f"{mode}: why the device was idle")[1:]
        by, decode = gaps["all_by"], gaps["by"]
        more = by != decode  # a column more, where there are other gaps than those before decode steps
        assert causes == [
            [
                cause,
                ms(1e3 * idle),
                f"{100 * idle / wall_s:.1f} %",
                who(cause),
                *[ms(1e3 * decode.get(cause, 0))] * more,
            ]
            for cause, idle in sorted(by.items(), key=lambda item: -item[1])
        ]
        share = f"{100 * sum(by.values()) / wall_s:.1f} %"
        assert last == ["all gaps", ms(1e3 * sum(by.values())), share, "", *[ms(1e3 * gaps["idle_s"])] * more]
        longest = tables.pop(f"{mode}: gaps that stand out", [[]])[1:]
        assert longest == [
            [f"step\xa0{gap['step']}", in_s(gap["at_s"]), ms(gap["ms"]), gap["cause"], "Show"]
            for gap in gaps["longest"]
        ]
        for side in ("host", "device"):
            assert tables.pop(f"{mode}: points on the {side}")[1:] == [
                [point["name"], ms(point["median_ms"]), ms(point["p99_ms"]), in_s(point["total_s"]),
                 f"{100 * point['share']:.1f} %"]
                for point in run["points"] if point["where"] == side
            ]  # fmt: skip

    sync = runs["sync"]
    median = {(point["name"], point["where"]): point["median_ms"] for point in sync["points"]}
    for side in ("host", "device"):
        shown = tables.pop(f"From the sync run: points on the {side}")[1:]
        wanted = {}
        for one in (one for one in sync["what_if"] if one["where"] == side):
            cells = wanted.setdefault(one["point"], {})
            for mode in ("sync", "async"):
                cells[mode, one["factor"]] = in_s(one[f"{mode}_s"]), one[f"{mode}_saves"]
        assert [row[0] for row in shown] == list(wanted), "in the order of the report: what saves most first"
        for point, takes, *cells in shown:
            assert takes == ms(median.get((point, side)))  # what is no point of its own, such as waking up, has none
            of_point = [wanted[point][case] for case in (("sync", 0.0), ("sync", 0.5), ("async", 0.0), ("async", 0.5))]
            for cell, (total, saves) in zip(cells, of_point, strict=True):
                number, changed = cell.rsplit(" s ", 1)
                assert f"{number} s" == total
                assert float(changed.replace("\N{MINUS SIGN}", "-").removesuffix(" %")) == round(-100 * saves, 1)
    guess = sync["prediction"]
    assert f"sync {in_s(guess['sync_s'])}, async {in_s(guess['async_s'])}" in seen.text
    tables.pop("Decode steps against the memory bandwidth", None)
    assert not tables, "no table is left that nothing checks"


@pytest.mark.parametrize("others", [[], [0.5], [0.5, 2.0]])
def test_bars_are_as_long_as_their_numbers_say(others):
    """Gaps are of one run, and their shares are of that run: the middle one, of two in the middle the slower one,
    however much quicker the other was."""
    report, timelines = measured()
    for run, timeline in zip(report["runs"], timelines, strict=True):
        wall_s = timeline.summary().wall_s
        run["wall_s_of_each_run"] = [wall_s, *(share * wall_s for share in others)]
        run["wall_s"] = statistics.median(run["wall_s_of_each_run"])
    wanted = [
        f"{100 * idle / statistics.median_high(run['wall_s_of_each_run']):.2f}"
        for run in report["runs"]
        for by in [run["gaps"]["all_by"].values()]
        for idle in [*sorted(by, reverse=True), sum(by)]
    ]
    section = page_of(report).split('id="gaps"')[1].split("</section>")[0]
    assert re.findall(r'<rect width="([\d.]+)"', section) == wanted


def test_no_text_becomes_markup():
    report, timelines = measured(EMULATED)
    clean = parsed(report, timelines)
    dirty = hostile(report)
    for run in dirty["runs"]:
        for key in ("by", "all_by"):
            run["gaps"][key] = {cause + HOSTILE: idle for cause, idle in run["gaps"][key].items()}
        run["kineto"] = {
            "busy": 0.5,
            "step_active": None,
            "event_active": 0.5,
            "differs": True,
            "kernels": 1,
            "note": HOSTILE,
        }
    dirty["failed"] = [{"engine": HOSTILE, "mode": HOSTILE, "model": HOSTILE, "batch_size": 1, "error": HOSTILE}]
    dirty["gpu"] = {"name": HOSTILE, "memory_gib": 1, "driver": HOSTILE, "compute_capability": HOSTILE}
    dirty["peers_same_tokens"] = {HOSTILE: False}
    named = []
    for timeline in timelines:
        named.append(Timeline(timeline.label + HOSTILE, HOSTILE))
        named[-1].spans = [span._replace(name=span.name + HOSTILE) for span in timeline.spans]
        named[-1].steps = timeline.steps
    seen = parsed(dirty, named)
    assert {name for name, _ in seen.tags} <= {name for name, _ in clean.tags}
    assert [len(seen.all(name)) for name in ("img", "script", "style", "meta")] == [1, 2, 1, 3]
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    assert json.loads(seen.scripts[0])["about"]["names"][0].endswith(HOSTILE)
    assert seen.text.count(HOSTILE) > 50
    assert seen.scripts[1] == clean.scripts[1]


def test_a_file_is_written_whatever_its_text_holds(tmp_path):
    report, _ = measured()
    strange = Report.from_json({**report, "model": "\ud83d\r\n\x00 \N{SNOWMAN}"})
    write_page(tmp_path / "report.html", strange, [])
    data = (tmp_path / "report.html").read_bytes()
    assert "\N{SNOWMAN}".encode() in data
    assert b"&#55357;" in data
    script = Parsed(data.decode()).scripts[0]
    assert "\r" not in script, "a browser would turn it into a line end, and the hash would not fit"
    with pytest.raises(OSError, match="nowhere"):
        write_page(tmp_path / "nowhere" / "report.html", strange, [])


@pytest.mark.parametrize("how", ["missing", "null"])
def test_a_report_that_lacks_something_still_has_a_page(how):
    report, _ = measured(EMULATED)

    def without(value: dict, key: str) -> None:
        if how == "missing":
            del value[key]
        else:
            value[key] = None

    for key in report:
        less = copy.deepcopy(report)
        without(less, key)
        seen = parsed(less)
        shown = seen.text.replace("null", "")
        assert [attributes["id"] for attributes in seen.all("h2")][-1] == "measured"
        assert "None" not in shown or key in ("model", "device"), key
    for key in set(report["runs"][0]) - {"mode", "engine", "model", "batch_size"}:
        less = copy.deepcopy(report)
        for run in less["runs"]:
            without(run, key)
        assert "None" not in parsed(less).text, key
    for key in ("sync_s", "async_s", "sync_saves", "async_saves"):
        less = copy.deepcopy(report)
        for one in less["runs"][0]["what_if"]:
            without(one, key)
        assert "None" not in parsed(less).text, key


def test_a_report_without_runs_or_timelines_says_so():
    report, _ = measured()
    seen = parsed({**report, "runs": [], "first": None, "verdict": None, "async_speedup": None, "law_idle": None})
    assert "Profile of random:tiny" in seen.text
    assert "Nothing was measured." in seen.text
    assert "No timeline was kept." in seen.text
    assert [script["type"] for script in seen.all("script")] == ["module"]


def test_what_has_to_be_known_first_is_said_loudly():
    def notices(report):
        header = page_of(report).split("</header>")[0]
        return " ".join(re.findall(r'<p class="notice">(.*?)</p>', header))

    report, _ = measured()
    assert notices(report) == ""
    emulated, _ = measured(EMULATED)
    assert "<strong>Emulated device.</strong>" in notices(emulated)
    assert "h200-llama-8b" in notices(emulated)
    report["workload"] |= {"step_ms": 2.5, "host_work_ms": 1.0, "arrivals": "poisson:5"}
    report["runs"][1]["interrupted"] = True
    report["same_tokens"] = False
    report["failed"] = [{"engine": "transformers", "mode": "sync", "model": "m", "batch_size": 8, "error": "no memory"}]
    said = notices(report)
    loud = ("Timed device.", "2.5 ms", "(poisson:5)", "Host work added.", "1 ms of Python", "Interrupted.")
    for words in (*loud, "The tokens differ.", "transformers, sync, m, 8: no memory"):
        assert words in said


def test_several_workloads_have_a_line_each():
    report, _ = measured()
    rows = [{**run, "model": f"random:llama-{size}"} for size in ("0.6b", "1b", "8b", "70b") for run in report["runs"]]
    table = parsed({**report, "runs": rows, "first": None, "verdict": None}).tables["Runs side by side"]
    assert [row[0] for row in table[1:]] == [f"{run['model']}, batch 3: {run['mode']}" for run in rows]
    assert table[0][1] == "wall time"
    assert table[1][1] == in_s(rows[0]["wall_s"])


def test_two_engines_are_told_apart():
    report, _ = measured()
    peer = {**report["runs"][0], "engine": "transformers", "setting": "attention: sdpa", "what_if": []}
    seen = parsed({**report, "runs": [*report["runs"], peer]})
    assert seen.tables["Runs side by side"][0][1:] == ["asyncbatch sync", "asyncbatch async", "transformers sync"]
    assert "attention: sdpa" in seen.text


def test_the_page_of_a_trace_has_the_numbers_of_its_report_and_no_text_becomes_markup():
    report = read_trace(Path(__file__).parent / "traces" / "asyncbatch-sync.json.gz")
    seen = Parsed(trace_page(report))
    assert dict(seen.tables["What the trace tells"][1:]) == dict(facts(report))
    assert all(f"{question} {answer}" in " ".join(seen.text.split()) for question, answer in answers(report).items())
    assert f"idle for {100 * (1 - report.step_active):.1f} %" in seen.text
    for where, idle_s in report.idle_s.items():
        *causes, last = seen.tables[f"{where}: idle time by cause"][1:]
        by = report.idle_by_cause(where == "inside steps")
        assert [cause[:2] for cause in causes] == [[name, ms(1e3 * value)] for name, value in by.items()]
        assert last[:2] == ["all gaps", ms(1e3 * idle_s)]
    rows, origin = seen.tables["Longest gaps"][1:], report.timeline().origin
    assert 3 < len(rows) <= MOST_GAPS
    for row, gap in zip(rows, report.longest(len(rows)), strict=True):
        assert row[1:4] == [ms(1e3 * (gap.start - origin)), ms(gap.ms), gap.cause]
    for button in [found for found in seen.all("button") if "data-from" in found][1:]:
        assert float(button["data-from"]) < float(button["data-to"])

    report.label, report.notes = "<b>label</b>", ["<script>note</script>"]
    hostile_page = trace_page(report)
    assert "<b>" not in hostile_page
    assert "<script>note" not in hostile_page
    assert "<script>note</script>" in Parsed(hostile_page).text


def test_every_table_can_be_read_aloud(both):
    text = page_of(*both[:2])
    for table in re.findall(r"<table>.*?</table>", text):
        assert table.startswith("<table><caption>")
        head, body = table.split("<tbody>")
        assert "<th>" not in table, "every head says what it is the head of"
        rows = re.findall(r"<tr>.*?</tr>", body)
        assert rows
        assert all(row.startswith('<tr><th scope="row">') for row in rows)
        assert len(re.findall(r'<th scope="col"', head)) + head.count("<td></td>") == rows[0].count("<td") + 1
    assert text.count('class="scroll" tabindex="0" role="region"') == text.count("<table>")
    assert re.search(r'<img [^>]*alt="Timeline of sync: device active', text)
    for button in re.findall(r"<button [^>]*>Show</button>", text):
        assert re.search(r'aria-label="Show the gap before step \d+ of a?sync in the timeline"', button)
    assert all('aria-hidden="true"' in bar for bar in re.findall(r"<svg[^>]*>", text)), (
        "the numbers beside them are read"
    )


def spans_in(seen: Parsed) -> tuple[dict, bytes]:
    data = json.loads(seen.scripts[0])
    columns = np.frombuffer(zlib.decompress(base64.b64decode(data["spans"])), np.uint8)
    return data["about"], columns.reshape(24, -1).T.tobytes()


def test_the_timeline_is_the_widgets(both):
    _, timelines, seen = both
    about, spans = spans_in(seen)
    widget = plot(*timelines, causes=document.gap_causes).widget
    assert spans == bytes(widget.spans)
    assert about == widget.about
    assert all(lane["kept"] is None for lane in about["lanes"])
    assert "spans are left out" not in seen.text


def test_of_a_long_run_the_page_keeps_some_spans_and_says_which(monkeypatch):
    report, _ = measured()
    timelines = [made_run("sync", 300), made_run("async", 300, active=1.0)]
    monkeypatch.setattr(document, "MOST_SPANS", 1000)
    seen = parsed(report, timelines)
    about, spans = spans_in(seen)
    kept = len(spans) // 24
    assert 900 < kept <= 1000
    low, high = about["lanes"][0]["kept"]
    assert "The runs have 3,000 spans." in seen.text
    assert f"holds {kept:,} of them: every step of the device, so every idle gap, and of the host" in seen.text
    assert f"those from {low:.3f} to {high:.3f} s" in seen.text
    monkeypatch.setattr(document, "MOST_SPANS", 500)
    seen = parsed(report, timelines)
    about, spans = spans_in(seen)
    assert len(spans) // 24 <= 500
    assert about["lanes"][2]["kept"] == about["lanes"][0]["kept"]
    assert "every idle gap" not in seen.text


def noisy(label: str, steps: int) -> Timeline:
    """Eight spans a step, with times as uneven as a clock of nanoseconds gives them."""
    timeline, now, random = Timeline(label), 12345.678, np.random.default_rng(0)
    parts = ("plan", "fill", "launch", "wait", "commit")
    for step, lengths in enumerate(random.integers(1, 10**7, (steps, 8)).tolist()):
        for name, length in zip(parts, lengths, strict=False):
            timeline.add("host", name, step, now, now + 1e-9 * length)
            now = now + 1e-9 * length
        for lane, name, length in zip(
            ("H2D", "compute", "D2H"), ("copy_in", "step", "copy_out"), lengths[5:], strict=True
        ):
            timeline.add(lane, name, step, now, now + 1e-9 * length)
            now = now + 1e-9 * length
        timeline.add_step(step, "decode", 8, 0)
    return timeline


def test_a_page_of_20000_spans_is_small_and_one_of_more_is_no_larger_than_the_limit(tmp_path):
    report, _ = measured()
    report = Report.from_json(report)
    write_page(tmp_path / "report.html", report, [noisy("sync", 1250), noisy("async", 1250)])
    assert os.path.getsize(tmp_path / "report.html") < 600_000
    write_page(tmp_path / "report.html", report, [noisy("sync", 15_000)])
    assert os.path.getsize(tmp_path / "report.html") < 2_000_000


def test_whatever_a_template_is_given_is_escaped():
    """Each piece that templates can show, with a hostile text wherever it takes a text."""
    cells = (document.Meter(HOSTILE, 2.0, HOSTILE, HOSTILE), document.ShowButton(HOSTILE, 0.5, 1.5), HOSTILE)
    columns = (document.Column(HOSTILE), *(document.Column(HOSTILE, HOSTILE) for _ in cells))
    made = document.Table.of(HOSTILE, columns, [(HOSTILE, *cells)])
    view = document.TimelineView(HOSTILE, 1.0, {"about": HOSTILE}, "data:", HOSTILE)
    values = {"title": HOSTILE, "label": HOSTILE, "heading": HOSTILE, "notes": [HOSTILE], "json": HOSTILE}
    values |= {"answers": [(HOSTILE, HOSTILE)], "nothing": HOSTILE}
    sections = dict.fromkeys(("summary", "timeline", "gaps", "longest", "read"), HOSTILE)
    text = document.render(
        "trace.html.j2", sections, summary=made, timeline=view, gaps=[[made]], longest=made, **values
    )
    seen = Parsed(text)
    assert [len(seen.all(name)) for name in ("img", "script", "style", "table")] == [1, 2, 1, 3]
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    assert json.loads(seen.scripts[0]) == {"about": HOSTILE}
    of_page, of_parts, of_tables = 4 + 2, 5 + 5 + 1 + 1, 3 * (1 + 4 + 1 + 3)
    assert seen.text.count(HOSTILE) == of_page + of_parts + of_tables
    assert {button["aria-label"] for button in seen.all("button") if "aria-label" in button} == {HOSTILE}
    assert [bar["width"] for bar in seen.all("rect")] == ["100.00"] * 3, "a bar is never longer than its place"


def test_a_table_with_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="has 2 columns"):
        document.Table.of("c", ("", "a"), [("x", "1"), ("y",)])

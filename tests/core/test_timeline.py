"""The timeline's numbers obey their laws, and what is saved is what is loaded."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.timelines import runs
from support.tiny import tiny_model

from asyncbatch import AsyncBatcher, Request
from asyncbatch.measure.law import idle_share
from asyncbatch.timeline import (
    LANES,
    Step,
    Timeline,
    busy_curve,
    device_activity,
    load_trace,
    save_trace,
)

times = st.floats(0, 1e6, allow_nan=False)


def contents(timeline: Timeline) -> tuple:
    """What must be the same of two timelines that are the same."""
    summary = timeline.summary().as_dict()
    return timeline.label, timeline.clock, timeline.spans, timeline.steps, timeline.dropped, summary


def worked_example() -> Timeline:
    """Three synchronous steps: the host works 1 s, then the device 4 s (for the first, a prefill, 10 s)."""
    timeline = Timeline("sync", "virtual")
    now = 100.0
    for number, device in enumerate((10.0, 4.0, 4.0)):
        timeline.add("host", "plan", number, now, now + 0.75)
        timeline.add("host", "wait", number, now + 0.75, now + 0.75 + device)
        timeline.add("compute", "step", number, now + 0.75, now + 0.75 + device)
        timeline.add("host", "commit", number, now + 0.75 + device, now + 1 + device)
        timeline.add_step(number, "decode" if number else "prefill", 8, number)
        now += 1 + device
    return timeline


@pytest.mark.parametrize("later", [False, True])
def test_the_times_of_a_step_become_spans_on_the_lanes_of_the_device(later):
    """Also where they are told later, by a function."""
    timeline, times = Timeline(), [(1.0, 2.0), (3.0, 5.0), (6.0, 7.0)]
    timeline.add_step(4, "decode", 2, 0, 2, 9, (lambda: times) if later else times)
    assert timeline.spans == [
        ("H2D", "copy_in", 4, 1.0, 2.0), ("compute", "step", 4, 3.0, 5.0), ("D2H", "copy_out", 4, 6.0, 7.0),
    ]  # fmt: skip
    assert timeline.steps == [(4, "decode", 2, 0, 2, 9)]


def test_a_step_that_has_no_span_adds_nothing_to_the_totals_of_the_device():
    """Decode steps of 2 s with 1 s before each; one in between, without times, had failed."""
    timeline = Timeline()
    for number, kind, first in ((0, "prefill", 0.0), (1, "decode", 3.0), (2, "decode", None), (3, "decode", 6.0)):
        times = [] if first is None else [(first, first), (first, first + 2), (first + 2, first + 2)]
        timeline.add_step(number, kind, 1, 0, 1, 1, times)
    totals = timeline.totals
    assert (totals.steps, totals.decode_steps, totals.active_s, totals.period_s) == (4, 3, 4.0, 6.0)


def test_what_was_dropped_still_counts_for_the_wall_time():
    timeline = Timeline(most_steps=1)
    for number, (start, end) in enumerate([(0.0, 100.0), (10.0, 50.0), (60.0, 70.0)]):
        timeline.add("host", "plan", number, start, end)
        timeline.add_step(number, "decode", 1, 0)
    assert (timeline.dropped, len(timeline.spans), timeline.summary().wall_s) == (2, 1, 100.0)


def test_the_first_step_has_no_period():
    timeline = Timeline()
    for number in range(2):
        timeline.add_step(number, "decode", 1, 0, 1, 1, [(0.0, 0.0), (3.0 * number, 3.0 * number + 2), (0.0, 0.0)])
    assert (timeline.totals.active_s, timeline.totals.period_s) == (2.0, 3.0)


def test_a_worked_example():
    timeline = worked_example()
    summary = timeline.summary()
    assert summary.wall_s == 21
    assert (summary.tokens, summary.wasted_tokens) == (24, 3)
    assert (summary.steps, summary.decode_steps) == (3, 2)
    assert summary.tokens_per_s == pytest.approx(24 / 21)
    assert summary.device_active == pytest.approx(0.8)
    assert summary.idle == pytest.approx(idle_share(1.0, 4.0)) == pytest.approx(0.2)
    assert summary.host_ms_per_step == pytest.approx(1000)
    first, second = timeline.gaps()
    assert (first.step, first.start, first.end, first.seconds) == (1, 110.75, 111.75, 1.0)
    assert first.host_s == second.host_s == {"commit": 0.25, "plan": 0.75}
    assert str(summary).splitlines()[4].split() == ["device", "active", "80.0", "%"]


def test_prefill_steps_end_a_period_but_do_not_count():
    timeline = worked_example()
    first, second, third = timeline.steps
    timeline.steps = [first, second._replace(kind="prefill"), third]
    (gap,) = timeline.gaps()
    assert gap.step == 2
    assert timeline.summary().device_active == pytest.approx(4 / 5)


def test_the_order_of_spans_does_not_matter():
    timeline = worked_example()
    expected = timeline.summary(), timeline.gaps()
    timeline.spans = timeline.spans[::-1]
    assert timeline.summary() == expected[0]
    assert [gap.start for gap in timeline.gaps()] == [gap.start for gap in expected[1]]


def test_an_empty_timeline_has_no_share_and_no_json_nan():
    summary = Timeline().summary()
    assert math.isnan(summary.device_active)
    assert math.isnan(summary.host_ms_per_step)
    assert summary.as_dict()["idle"] is None
    assert summary.as_dict()["wall_s"] == 0
    assert Timeline().gaps() == []


def test_device_activity():
    assert device_activity([0, 5, 10], [4, 9, 14]) == (8, 10)
    assert device_activity([0, 5, 10], [4, 9, 14], [True, False, True]) == (4, 5)
    assert device_activity([3], [4]) == (0, 0)


@given(runs())
def test_active_and_idle_make_one_and_gaps_are_the_idle_time(timeline):
    summary, gaps = timeline.summary(), timeline.gaps()
    if math.isnan(summary.device_active):
        assert not gaps
        return
    assert 0 <= summary.device_active <= 1
    assert summary.device_active + summary.idle == pytest.approx(1)
    decode = [step.step for step in timeline.steps if step.kind == "decode"]
    _, steps, starts, ends = timeline.lane("compute")
    active, period = device_activity(starts, ends, np.isin(steps, decode))
    assert sum(gap.seconds for gap in gaps) == pytest.approx(period - active, abs=1e-5)
    assert all(gap.step in decode for gap in gaps)
    assert all(seconds <= gap.seconds + 1e-5 for gap in gaps for seconds in gap.host_s.values())


@given(st.lists(st.tuples(times, times).map(sorted)), times, times)
def test_busy_curve_counts_overlaps_once(spans, low, high):
    low, high = sorted((low, high))
    curve = busy_curve([start for start, _ in spans], [end for _, end in spans])
    cuts = sorted({low, high, *(t for span in spans for t in span if low < t < high)})
    pieces = zip(cuts, cuts[1:], strict=False)
    expected = sum(b - a for a, b in pieces if any(start <= a and b <= end for start, end in spans))
    assert np.interp(high, *curve) - np.interp(low, *curve) == pytest.approx(expected, abs=1e-6)


class Watching(AsyncBatcher):
    """Notes every plan as it is made: the step's number, rows, and where each row's last query stands."""

    def __init__(self, *arguments, **options):
        self.plans = {}
        super().__init__(*arguments, **options)

    def plan(self):
        plan = super().plan()
        if plan is not None:
            self.plans[plan.step] = [(row.state.number, row.position + row.num_tokens) for row in plan.rows]
        return plan


def test_a_step_tells_its_rows_and_how_many_tokens_they_attend_to():
    """Each token of a request is the last query of one row, once: so over a run of greedy requests without a stop the
    contexts of the rows are known from the prompts' lengths alone."""
    requests = [Request(list(range(1, 2 + 3 * n)), max_new_tokens=2 + n) for n in range(5)]
    with Watching(tiny_model(), max_batch_size=3, prefill_tokens=4) as batcher:
        batcher.run(requests)
        steps = {step.step: step for step in batcher.timeline.steps}
    assert {number: (step.rows, step.context) for number, step in steps.items()} == {
        number: (len(rows), sum(end for _, end in rows)) for number, rows in batcher.plans.items()
    }
    expected = 0
    for request in requests:
        prompt, new = len(request.token_ids), request.max_new_tokens
        chunks = [*range(4, prompt, 4), prompt]
        expected += sum(chunks) + sum(range(prompt + 1, prompt + new))
    assert sum(step.context for step in steps.values()) == expected


@settings(deadline=None)
@given(st.lists(runs(), min_size=1, max_size=3))
def test_what_is_saved_is_loaded_exactly(tmp_path_factory, timelines):
    path = tmp_path_factory.mktemp("traces") / "trace.json"
    save_trace(path, timelines)
    for saved, loaded in zip(timelines, load_trace(path), strict=True):
        assert contents(saved) == contents(loaded)


def test_the_trace_is_as_perfetto_wants_it(tmp_path):
    sync, shifted = worked_example(), worked_example()
    shifted.label = "async"
    shifted.spans = [span._replace(start=span.start + 4e6, end=span.end + 4e6) for span in shifted.spans]
    save_trace(tmp_path / "trace.json", [sync, shifted])
    trace = json.loads((tmp_path / "trace.json").read_text())
    events = trace["traceEvents"]
    assert {event["pid"] for event in events} == {1, 2}, "process 0 is the kernel's in Perfetto"
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert list(lanes.values()) == [*LANES, *LANES], "thread ids are unique over both processes"
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == ["sync (virtual clock)", "async (virtual clock)"]
    spans = [event for event in events if event["ph"] == "X"]
    for pid in (1, 2):
        assert min(event["ts"] for event in spans if event["pid"] == pid) == 0, "each begins at time 0"
    step = next(event for event in spans if event["name"] == "step" and event["pid"] == 2)
    assert (lanes[step["tid"]], step["ts"], step["dur"]) == ("compute", 0.75e6, 10e6), "microseconds"
    for lane in lanes:
        own = sorted((event for event in spans if event["tid"] == lane), key=lambda event: event["ts"])
        assert all(round(a["ts"] + a["dur"], 3) <= b["ts"] for a, b in zip(own, own[1:], strict=False)), "no overlap"


def flows_of(path) -> tuple[list[dict], list[list[dict]]]:
    """The slices of a trace and its flows, each the list of its events."""
    events = json.loads(path.read_text())["traceEvents"]
    flows: dict[int, list[dict]] = {}
    for event in events:
        if event["ph"] in "stf":
            flows.setdefault(event["id"], []).append(event)
    return [event for event in events if event["ph"] == "X"], list(flows.values())


def two_device_runs() -> list[Timeline]:
    """Two runs of three steps that follow each other without a gap; the last step of each has no copy out."""
    timelines = [Timeline("sync", "virtual"), Timeline("async", "virtual")]
    for timeline in timelines:
        for step in range(3):
            timeline.add("H2D", "copy_in", step, 10.0 + step, 10.25 + step)
            timeline.add("compute", "step", step, 10.25 + step, 11.25 + step)
            if step < 2:
                timeline.add("D2H", "copy_out", step, 11.25 + step, 11.5 + step)
    return timelines


def test_arrows_lead_from_copy_in_to_step_to_copy_out(tmp_path):
    save_trace(tmp_path / "trace.json", two_device_runs())
    slices, flows = flows_of(tmp_path / "trace.json")
    assert len(flows) == 2 * 2, "a flow has an id of its own, in every run; a step without a copy out has none"
    assert len({flow[0]["pid"] for flow in flows}) == 2
    for flow in flows:
        assert [event["ph"] for event in flow] == ["s", "t", "f"]
        assert {(event["name"], event["cat"], event["bp"]) for event in flow} == {(flow[0]["name"], "flow", "e")}
        on = []
        for event in flow:
            (open_then,) = (
                x
                for x in slices
                if x["tid"] == event["tid"] and x["pid"] == event["pid"] and x["ts"] < event["ts"] < x["ts"] + x["dur"]
            )
            on.append((open_then["name"], f"step {open_then['args']['step']}"))
        assert on == [(name, flow[0]["name"]) for name in ("copy_in", "step", "copy_out")]


@given(st.lists(runs(), min_size=1, max_size=2), st.floats(-1, 5))
def test_every_arrow_begins_and_ends_in_a_slice_of_its_step_and_leads_forward(tmp_path_factory, timelines, late):
    for timeline in timelines:
        for span in [span for span in timeline.spans if span.lane == "compute"]:
            timeline.add("H2D", "copy_in", span.step, span.start - 1, span.start + late)
            timeline.add("D2H", "copy_out", span.step, span.end, span.end + 1)
    path = tmp_path_factory.mktemp("traces") / "trace.json"
    save_trace(path, timelines)
    slices, flows = flows_of(path)
    of = {(x["tid"], f"step {x['args']['step']}"): x for x in slices}
    for flow in flows:
        assert [event["ts"] for event in flow] == sorted(event["ts"] for event in flow)
        for event in flow:
            on = of[event["tid"], event["name"]]
            assert on["ts"] <= event["ts"] <= on["ts"] + on["dur"]
    forward = sum(
        of_step["H2D"] <= of_step["compute"] <= of_step["D2H"]
        for timeline in timelines
        for of_step in middles(timeline)
    )
    assert len(flows) == forward
    assert [contents(timeline) for timeline in load_trace(path)] == [contents(timeline) for timeline in timelines]


def middles(timeline: Timeline) -> list[dict[str, float]]:
    """For each step the middle of its span on each lane, in microseconds as a trace has them."""
    found: dict[int, dict[str, float]] = {}
    for lane, _, step, start, end in timeline.spans:
        ts, stop = (round(1e6 * (t - timeline.origin), 3) for t in (start, end))
        if lane != "host":
            found.setdefault(step, {})[lane] = round(ts + round(stop - ts, 3) / 2, 3)
    return list(found.values())


def test_one_timeline_saves_and_loads(tmp_path):
    timeline = worked_example()
    timeline.save(tmp_path / "trace.json")
    loaded = Timeline.load(tmp_path / "trace.json")
    assert contents(loaded) == contents(timeline)
    assert isinstance(loaded.steps[0], Step)
    assert loaded.summary() == timeline.summary()


def test_a_trace_from_before_steps_told_rows_and_context_still_loads(tmp_path):
    timeline = worked_example()
    timeline.save(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    (note,) = trace["metadata"]["asyncbatch"]
    note["steps"] = [step[:4] for step in note["steps"]]
    (tmp_path / "old.json").write_text(json.dumps(trace))
    loaded = Timeline.load(tmp_path / "old.json")
    assert loaded.steps == timeline.steps
    assert [(step.rows, step.context) for step in loaded.steps] == [(0, 0)] * 3
    assert loaded.summary() == timeline.summary()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"\xff\xfe", "is not JSON"),
        (b"hello", "is not JSON"),
        (b"[1, 2]", "holds a JSON list"),
        (b'{"traceEvents": []}', "with the keys ['traceEvents'], but no 'metadata'"),
        (b'{"metadata": {"asyncbatch": 3}, "traceEvents": []}', "not iterable"),
        (b'{"metadata": {"asyncbatch": []}, "traceEvents": [{"ph": "X", "pid": 1}]}', "but no 'args'"),
        (b'{"metadata": {"asyncbatch": []}, "traceEvents": []}', "0 timelines, expected 1"),
    ],
)
def test_another_file_is_refused_with_what_was_found_and_what_is_expected(tmp_path, content, found):
    (tmp_path / "other.json").write_bytes(content)
    with pytest.raises(ValueError, match="expected") as error:
        Timeline.load(tmp_path / "other.json")
    assert "other.json" in str(error.value)
    assert found in str(error.value)


def test_times_that_json_cannot_hold_are_refused(tmp_path):
    timeline = Timeline()
    timeline.add("host", "plan", 0, 0.0, math.nan)
    with pytest.raises(ValueError, match="JSON"):
        timeline.save(tmp_path / "trace.json")
    assert not (tmp_path / "trace.json").exists()

"""A run in numbers, counted a second time in plain Python from what each number is said to mean."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbatch import Timeline
from asyncbatch.timeline import Span, Step, busy_curve, device_activity, idle_gaps, union

NAMES = ["plan", "fill", "launch", "wait", "commit"]


@st.composite
def any_run(draw):
    """A timeline in whole seconds: steps of the device one after the other, and any spans of the host, which may lie
    over each other, be missing, or belong to steps that were never noted; all noted in any order."""
    now, spans, steps = draw(st.integers(0, 20)), [], []
    for number in range(draw(st.integers(0, 8))):
        start = now + draw(st.integers(0, 6))
        now = start + draw(st.integers(1, 6))
        spans.append(("compute", "step", number, start, now))
        for _ in range(draw(st.integers(0, 4))):
            begin = draw(st.integers(0, now + 5))
            owner = number + draw(st.sampled_from([0, 0, 1]))
            spans.append(("host", draw(st.sampled_from(NAMES)), owner, begin, begin + draw(st.integers(0, 6))))
        if draw(st.booleans()):
            spans.append(("D2H", "copy_out", number, now, now + draw(st.integers(0, 9))))
        steps.append((number, draw(st.sampled_from(["decode", "prefill"])), *[draw(st.integers(0, 9)) for _ in "tw"]))
    timeline = Timeline("a run", "virtual")
    for span in draw(st.permutations(spans)):
        timeline.add(*span)
    for step in steps:
        timeline.add_step(*step)
    return timeline


def in_plain_python(timeline):
    """(wall_s, tokens, wasted, steps, decode steps, active, host seconds of a decode step), as they are defined."""
    first = min([span.start for span in timeline.spans], default=0)
    wall_s = max([span.end for span in timeline.spans], default=0) - first
    decode = [step.step for step in timeline.steps if step.kind == "decode"]
    device = sorted((span.start, span.end, span.step) for span in timeline.spans if span.lane == "compute")
    ran = period = 0
    for (_, before, _), (start, end, step) in zip(device, device[1:], strict=False):
        if step in decode:
            ran, period = ran + end - start, period + end - before
    work = {}
    for span in timeline.spans:
        if span.lane == "host" and span.name != "wait" and span.step in decode:
            work[span.step] = work.get(span.step, 0) + span.end - span.start
    return (
        wall_s,
        sum(step.tokens for step in timeline.steps),
        sum(step.wasted for step in timeline.steps),
        len(timeline.steps),
        len(decode),
        ran / period if period else math.nan,
        statistics.median(work.values()) if work else math.nan,
    )


@settings(max_examples=100, deadline=None)
@given(any_run())
def test_the_summary_is_what_its_definitions_give(timeline):
    wall_s, tokens, wasted, steps, decode_steps, active, host_s = in_plain_python(timeline)
    summary = timeline.summary()
    assert (summary.wall_s, summary.tokens, summary.wasted_tokens) == (wall_s, tokens, wasted)
    assert (summary.steps, summary.decode_steps) == (steps, decode_steps)
    assert summary.tokens_per_s == pytest.approx(tokens / wall_s if wall_s else 0)
    assert summary.device_active == pytest.approx(active, nan_ok=True)
    assert summary.idle == pytest.approx(1 - active, nan_ok=True)
    assert summary.host_ms_per_step == pytest.approx(1e3 * host_s, nan_ok=True)
    assert summary.as_dict() == {
        key: None if isinstance(value, float) and math.isnan(value) else value for key, value in vars(summary).items()
    }


def covered(spans, begin, end):
    """How many seconds from begin to end lie in at least one of the spans; all in whole seconds."""
    return sum(any(start <= second < stop for start, stop in spans) for second in range(begin, end))


@settings(max_examples=100, deadline=None)
@given(any_run())
def test_a_gap_is_the_time_between_two_steps_and_names_what_the_host_did_in_it(timeline):
    decode = [step.step for step in timeline.steps if step.kind == "decode"]
    device = sorted((span.start, span.end, span.step) for span in timeline.spans if span.lane == "compute")
    expected = []
    for (_, before, _), (start, _, step) in zip(device, device[1:], strict=False):
        if start > before and step in decode:
            host_s = {}
            for name in NAMES:
                spans = [(s.start, s.end) for s in timeline.spans if (s.lane, s.name) == ("host", name)]
                if seconds := covered(spans, before, start):
                    host_s[name] = seconds
            expected.append((step, before, start, start - before, host_s))
    assert [(gap.step, gap.start, gap.end, gap.seconds, gap.host_s) for gap in timeline.gaps()] == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=10))
def test_stretches_are_what_the_intervals_cover_and_none_touches_the_next(intervals):
    starts, ends = [start for start, _ in intervals], [start + length for start, length in intervals]
    busy = [covered(list(zip(starts, ends, strict=True)), second, second + 1) for second in range(-1, 41)]
    expected = [
        (second - 1, second - 1 + busy[second:].index(0))
        for second in range(1, len(busy))
        if busy[second] and not busy[second - 1]
    ]
    found = union(starts, ends)
    assert list(zip(*(each.tolist() for each in found), strict=True)) == expected
    times, seconds = busy_curve(starts, ends)
    assert seconds[0] == 0
    for moment in range(41):
        before = covered(list(zip(starts, ends, strict=True)), 0, moment)
        assert np.interp(moment, times, seconds) == before


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), max_size=8))
def test_activity_and_gaps_of_steps_are_counted_from_the_second_one_on(steps):
    starts, ends, now = [], [], 3
    for idle, busy, _ in steps:
        starts.append(now + idle)
        now += idle + busy
        ends.append(now)
    counted = [counts for *_, counts in steps]
    later = range(1, len(steps))
    assert idle_gaps(starts, ends) == [(i, steps[i][0]) for i in later if steps[i][0]]
    assert device_activity(starts, ends) == (
        sum(steps[i][1] for i in later),
        sum(steps[i][0] + steps[i][1] for i in later),
    )
    assert device_activity(starts, ends, counted) == (
        sum(steps[i][1] for i in later if counted[i]),
        sum(steps[i][0] + steps[i][1] for i in later if counted[i]),
    )


def test_steps_that_lie_over_each_other_are_no_more_than_always_active():
    timeline = Timeline()
    for step, (start, end) in enumerate([(0.0, 2.0), (1.0, 4.0), (3.0, 5.0)]):
        timeline.add("compute", "step", step, start, end)
        timeline.add_step(step, "decode", 1, 0)
    assert (timeline.summary().device_active, timeline.summary().idle) == (1.0, 0.0)
    assert timeline.gaps() == []


def test_a_lane_gives_its_spans_in_the_order_of_their_starts_and_the_run_begins_with_the_first():
    timeline = Timeline("x", "cuda")
    timeline.add("host", "fill", 7, 5.0, 6.0)
    timeline.add("host", "plan", 7, 3.0, 4.5)
    timeline.add("H2D", "copy_in", 7, 2.0, 9.0)
    names, steps, starts, ends = timeline.lane("host")
    assert (names, steps.tolist(), starts.tolist(), ends.tolist()) == (["plan", "fill"], [7, 7], [3.0, 5.0], [4.5, 6.0])
    assert (steps.dtype, starts.dtype, ends.dtype) == (np.int64, float, float)
    assert [len(each) for each in timeline.lane("D2H")] == [0, 0, 0, 0]
    assert [each.dtype for each in timeline.lane("D2H")[1:]] == [np.int64, float, float]
    assert timeline.origin == 2.0
    assert Timeline().origin == 0.0
    assert list(timeline.spans)[0] == Span("host", "fill", 7, 5.0, 6.0)
    timeline.add_step(7, "decode", 3, 1)
    timeline.add_step(8, "prefill", 3, 1, 2, 9)
    assert list(timeline.steps) == [Step(7, "decode", 3, 1, 0, 0), Step(8, "prefill", 3, 1, 2, 9)]

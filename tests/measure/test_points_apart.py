"""The latency points of made-up runs, counted a second time by hand: what lies at each moment, second by second."""

from __future__ import annotations

import math
import statistics
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbatch import Timeline
from asyncbatch.measure.attribution import AttributedGap, Attribution, attribute
from asyncbatch.measure.points import DEVICE_LANE, LANE, host_segments, points_of, seconds_by_step

NAMES = {"plan": "schedule", "fill": "fill buffers", "launch": "step launch", "wait": "wait", "commit": "commit"}
INSIDE = ["admit", "KV allocate", "H2D launch", "prune", "detokenize", "garbage collection"]


@st.composite
def host_runs(draw):
    """A timeline whose host spans follow each other, with points inside them, inside points, and between two turns. All
    times are whole seconds, and no span is as long as the one around it, unless a point fills a host span."""
    timeline, now = Timeline("sync", "virtual"), draw(st.integers(0, 5))

    def inside(start, end, depth, step):
        while end - start > 1 and depth < 3 and draw(st.booleans()):
            a = draw(st.integers(start, end - 1))
            b = draw(st.integers(a + 1, end))
            if depth and b - a == end - start:
                b -= 1
            inside(a, b, depth + 1, step)
            timeline.add(LANE, draw(st.sampled_from(INSIDE)), draw(st.integers(0, 9)), a, b)
            start = b

    for step in range(draw(st.integers(1, 4))):
        for name in NAMES:
            pause, length = draw(st.integers(0, 4)), draw(st.integers(0, 8))
            if name == "plan" and pause > 0:
                timeline.add(LANE, "callbacks", step - 1, now, now + pause)
                inside(now, now + pause, 1, step)
            now += pause
            inside(now, now + length, 0, step)
            timeline.add("host", name, step, now, now + length)
            now += length
        timeline.add_step(step, draw(st.sampled_from(["decode", "prefill"])), 1, 0)
    for lane, name in (("H2D", "copy_in"), ("compute", "step"), ("D2H", "copy_out"), ("elsewhere", "what else")):
        for step in range(draw(st.integers(0, 4))):
            start = draw(st.integers(0, 50))
            timeline.add(lane, name, step, start, start + draw(st.integers(0, 9)))
    return timeline


def at_each_second(timeline):
    """(second, name, step, after) of what the host was at, by looking at each second by itself."""
    host = [span for span in timeline.spans if span.lane in ("host", LANE) and span.end > span.start]
    for second in range(max([span.end for span in host], default=0)):
        around = [span for span in host if span.start <= second < span.end]
        if not around:
            continue
        outermost = max(around, key=lambda span: (span.end - span.start, span.lane == "host"))
        innermost = min(around, key=lambda span: (span.end - span.start, span.lane == "host"))
        if outermost.lane == "host":
            step, after = outermost.step, outermost.name == "commit"
        else:
            step, after = outermost.step + 1, False
        name = NAMES[innermost.name] if innermost.lane == "host" else innermost.name
        yield second, name, step, after


@settings(max_examples=150, deadline=None)
@given(host_runs())
def test_every_second_of_the_host_is_at_its_innermost_point_for_the_step_of_the_outermost(timeline):
    seconds = list(at_each_second(timeline))
    found = [
        (second, segment.name, segment.step, segment.after)
        for segment in host_segments(timeline)
        for second in range(segment.start, segment.end)
    ]
    assert found == seconds
    counted = Counter((name, after, step) for _, name, step, after in seconds)
    by_step = seconds_by_step(timeline)[0]
    assert {(*key, step): s for key, of_step in by_step.items() for step, s in of_step.items()} == dict(counted)


def test_host_work_for_the_step_before_is_told_from_that_for_the_step_itself():
    timeline = Timeline()
    timeline.add("host", "commit", 4, 0, 10)
    timeline.add(LANE, "prune", 0, 2, 5)
    timeline.add(LANE, "garbage collection", 0, 3, 4)
    timeline.add(LANE, "callbacks", 4, 10, 13)
    timeline.add(LANE, "garbage collection", 0, 11, 12)
    timeline.add("host", "plan", 5, 13, 15)
    timeline.add(LANE, "garbage collection", 0, 13, 14)
    host, device = seconds_by_step(timeline)
    assert host == {
        ("commit", True): {4: 7}, ("prune", True): {4: 2}, ("garbage collection", True): {4: 1},
        ("callbacks", False): {5: 2}, ("garbage collection", False): {5: 2}, ("schedule", False): {5: 1},
    }  # fmt: skip
    assert device == {}


def test_a_point_is_cut_where_the_span_around_it_ends():
    timeline = Timeline()
    timeline.add("host", "commit", 4, 0, 10)
    timeline.add(LANE, "garbage collection", 0, 8, 12)
    timeline.add("host", "plan", 5, 14, 15)
    assert seconds_by_step(timeline)[0] == {
        ("commit", True): {4: 8}, ("garbage collection", True): {4: 2}, ("schedule", False): {5: 1},
    }  # fmt: skip


def test_a_step_on_the_device_is_its_parts_and_what_they_leave_is_the_models():
    timeline = Timeline()
    for step, start in ((0, 0), (1, 100)):
        timeline.add("H2D", "copy_in", step, start, start + 3)
        timeline.add("compute", "step", step, start + 3, start + 23)
        timeline.add("D2H", "copy_out", step, start + 23, start + 28)
    for name, seconds in (("carry-over", 2), ("forward", 11), ("sample", 4)):
        timeline.add(DEVICE_LANE, name, 1, 103, 103 + seconds)
    timeline.add("compute", "step", 2, 200, 210)
    for name in ("carry-over", "sample"):  # clocks differ a little: parts may be longer than their step
        timeline.add(DEVICE_LANE, name, 2, 200, 206)
    assert seconds_by_step(timeline)[1] == {
        "copy in": {0: 3, 1: 3}, "copy out": {0: 5, 1: 5}, "step": {0: 20},
        "carry-over": {1: 2, 2: 6}, "forward": {1: 11 + 3, 2: 0}, "sample": {1: 4, 2: 6},
    }  # fmt: skip


def nearest_rank(values, share):
    return sorted(values)[math.ceil(share * len(values)) - 1]


@settings(max_examples=100, deadline=None)
@given(host_runs())
def test_the_table_of_points_is_the_same_counted_by_hand(timeline):
    decode = [step.step for step in timeline.steps if step.kind == "decode"]
    host, device = Counter(), Counter()
    for _, name, step, _ in at_each_second(timeline):
        host[name, step] += 1
    for lane, name in (("H2D", "copy in"), ("compute", "step"), ("D2H", "copy out"), ("elsewhere", "")):
        for span in timeline.spans:
            if span.lane == lane and name:
                device[name, span.step] += span.end - span.start
    points = points_of(timeline)
    for where, seconds in (("host", host), ("device", device)):
        side = [point for point in points if point.where == where]
        assert sorted(point.name for point in side) == sorted({name for name, _ in seconds})
        assert [point.total_s for point in side] == sorted((point.total_s for point in side), reverse=True)
        for point in side:
            of_decode = [seconds[point.name, step] for step in decode]
            assert point.total_s == sum(s for (name, _), s in seconds.items() if name == point.name)
            assert point.share == pytest.approx(point.total_s / sum(seconds.values()) if sum(seconds.values()) else 0)
            if decode:
                assert point.median_ms == pytest.approx(1e3 * statistics.median(of_decode))
                assert point.p99_ms == pytest.approx(1e3 * nearest_rank(of_decode, 0.99))
            else:
                assert math.isnan(point.median_ms)
    assert [point.where for point in points] == sorted((point.where for point in points), reverse=True)


def test_a_rare_long_step_moves_the_99th_percentile_and_not_the_median():
    timeline = Timeline()
    for step in range(5):
        timeline.add("host", "fill", step, 10 * step, 10 * step + (9 if step == 3 else 1))
        timeline.add_step(step, "decode", 1, 0)
    (point,) = points_of(timeline)
    assert (point.name, point.where, point.median_ms, point.p99_ms) == ("fill buffers", "host", 1000, 9000)
    assert (point.total_s, point.share) == (13, 1)


# ---- the idle time ---------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(host_runs(), st.data())
def test_each_gap_is_divided_at_its_moments_second_by_second(run, data):
    timeline, now, moments, copied = Timeline(), data.draw(st.integers(0, 10)), [], {}
    launched = {span.step: span.end for span in run.spans if span.name == "launch"}
    for span in run.spans:
        if span.lane in ("host", LANE):
            timeline.add(*span)
    for step in run.steps:
        timeline.add_step(*step)
        idle, busy = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 9))
        moments.append((now + idle, now + idle + busy))
        timeline.add("compute", "step", step.step, *moments[-1])
        for lane, name, start in (("H2D", "copy_in", now), ("D2H", "copy_out", now + idle + busy)):
            if data.draw(st.booleans()):
                begin = start + data.draw(st.integers(0, 5))
                copied[name, step.step] = begin, begin + data.draw(st.integers(0, 5))
                timeline.add(lane, name, step.step, *copied[name, step.step])
        now += idle + busy
    at = {second: (name, step) for second, name, step, _ in at_each_second(timeline)}

    def cause(second, number):
        if second >= launched[number]:
            begin, end = copied.get(("copy_in", number), (0, 0))
            return "copy in" if begin <= second < end else "not begun"
        name, of_step = at.get(second, ("nothing recorded", None))
        if name != "wait":
            return name
        arrived = copied.get(("copy_out", of_step))
        return "copy out" if arrived is None or second < arrived[1] else "waking up"

    expected = []
    for step, before, own in zip(list(run.steps)[1:], moments, moments[1:], strict=False):
        if step.kind == "decode" and before[1] < own[0]:
            names = Counter(cause(second, step.step) for second in range(before[1], own[0]))
            expected.append((step.step, before[1], own[0], dict(names)))
    found = attribute(timeline)
    assert [(gap.step, gap.start, gap.end, gap.host_s) for gap in found.gaps] == expected
    total = sum((Counter(names) for *_, names in expected), Counter())
    assert found.by == dict(total)
    assert list(found.by.values()) == sorted(total.values(), reverse=True)
    assert found.idle_s == sum(total.values())
    assert found.steps == sum(step.kind == "decode" for step in timeline.steps)
    for gap in found.gaps:
        collecting = gap.host_s.get("garbage collection", 0)
        longest = max(gap.host_s.values())
        assert gap.cause == "garbage collection" if 3 * collecting > gap.seconds else gap.host_s[gap.cause] == longest


def run_with_gaps(milliseconds):
    """A run whose decode steps have these idle gaps before them (0: none)."""
    timeline, now = Timeline(), 1.0
    timeline.add("compute", "step", 0, 0.0, now)
    timeline.add_step(0, "prefill", 1, 0)
    for step, gap in enumerate(milliseconds, 1):
        timeline.add("compute", "step", step, now + gap * 1e-3, now + gap * 1e-3 + 0.5)
        timeline.add_step(step, "decode", 1, 0)
        now += gap * 1e-3 + 0.5
    return attribute(timeline)


@pytest.mark.parametrize(
    ("gaps", "longest"),
    [
        ([], []),
        ([0, 0, 0.19], []),  # too short to speak of
        ([0, 0, 0.21], [3]),  # steps without a gap have one of 0
        ([1, 1, 1, 2.9], []),
        ([1, 1, 1, 3.1], [4]),
        ([1, 5, 1, 3.1, 1, 7, 1], [6, 2, 4]),
        ([0] * 20 + [3 - n / 10 for n in range(12)], [*range(21, 31)]),
        ([0, 0, 5, 5], []),  # the median is 2.5
    ],
)
def test_a_gap_stands_out_from_a_fifth_of_a_millisecond_and_three_times_the_median_over_all_steps(gaps, longest):
    assert [gap.step for gap in run_with_gaps(gaps).longest()] == longest
    assert [gap.step for gap in run_with_gaps(gaps).longest(2)] == longest[:2]


def test_a_device_that_never_waits_has_no_idle_time_to_divide():
    found = run_with_gaps([0, 0])
    assert (found.idle_s, found.by, found.gaps, found.steps) == (0.0, {}, [], 2)


@pytest.mark.parametrize(
    ("host_s", "cause"),
    [
        ({"admit": 6.0, "garbage collection": 4.0}, "garbage collection"),
        ({"admit": 7.0, "garbage collection": 3.0}, "admit"),
        ({"admit": 3.0, "commit": 4.0, "wait": 3.0}, "commit"),
        ({"garbage collection": 10.0}, "garbage collection"),
    ],
)
def test_the_cause_of_a_gap_is_its_longest_point_or_a_collection_that_has_a_third_of_it(host_s, cause):
    assert AttributedGap(3, 5.0, 15.0, host_s).cause == cause


@pytest.mark.parametrize(("seconds", "longest"), [([1.0, 1.0, 3.0], [3]), ([2e-4], [1]), ([0.0, 0.0, 2e-4], [3])])
def test_a_gap_of_just_so_much_stands_out(seconds, longest):
    gaps = [AttributedGap(step, 0.0, end, {}) for step, end in enumerate(seconds, 1) if end]
    steps = 3 if len(seconds) > 1 else 9
    assert [gap.step for gap in Attribution(1.0, {}, gaps, steps).longest()] == longest

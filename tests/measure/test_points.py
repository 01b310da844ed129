"""Latency points: the innermost span counts, idle time is shared out completely, recording leaves no trace, and what-if
says what the loops then really do."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import tiny_model

from asyncbatch import AsyncBatcher, Request, SyncBatcher, Timeline
from asyncbatch.devices.virtual import Costs
from asyncbatch.measure import attribute, point_recorder, points_of, record_points
from asyncbatch.measure.points import (
    ADDED,
    CALLBACKS,
    GC,
    LANE,
    LAUNCHES,
    MEANING,
    NO_REQUEST,
    WAIT,
    host_segments,
)
from asyncbatch.measure.simulate import costs_of, simulate, what_if
from asyncbatch.models.toy import toy_llama
from asyncbatch.ordering.toy import toy_tokens, use_toy_model
from asyncbatch.ordering.trials import workload
from asyncbatch.profile.workload import serve_over_time

MODEL = toy_llama()
SIZES = dict(max_batch_size=4, block_size=4, max_length=64, prefill_tokens=16)
LOOPS = pytest.mark.parametrize("loop", [SyncBatcher, AsyncBatcher])


def run_virtually(loop, costs, requests, **options):
    with loop(MODEL, clock=costs, step_s=0.0, **SIZES, **options) as batcher:
        use_toy_model(batcher)
        with record_points(batcher):
            completions = batcher.run(requests)
    assert [completion.token_ids for completion in completions] == [toy_tokens(request) for request in requests]
    return batcher.timeline


# ---- which point counts ---------------------------------------------------------------------------------------------


@st.composite
def nested_spans(draw):
    """Host spans that follow each other, and points inside them or between two, nested as calls are."""
    timeline, now = Timeline("sync", "virtual"), 0

    def inside(start, end, depth):
        while start < end and depth < 3 and draw(st.booleans()):
            a = draw(st.integers(start, end - 1))
            b = draw(st.integers(a + 1, end))
            inside(a, b, depth + 1)
            timeline.add(
                LANE, draw(st.sampled_from(["admit", "prune", GC])), 0, a, b
            )  # noted when it ends, as calls are
            start = b

    for step in range(draw(st.integers(1, 5))):
        for name in ("plan", "wait", "commit"):
            gap, length = draw(st.integers(0, 6)), draw(st.integers(0, 12))
            inside(now, now + gap, 0)
            now += gap
            inside(now, now + length, 0)
            timeline.add("host", name, step, now, now + length)
            now += length
    return timeline, now


@given(nested_spans())
def test_the_innermost_span_counts(timeline_and_end):
    timeline, end = timeline_and_end
    segments = host_segments(timeline)
    assert all(a.end <= b.start for a, b in zip(segments, segments[1:], strict=False))
    for moment in range(end):
        t = moment + 0.5
        around = [span for span in timeline.spans if span.start < t < span.end]
        names = [segment.name for segment in segments if segment.start < t < segment.end]
        if not around:
            assert not names
            continue
        shortest = min(span.end - span.start for span in around)
        inner = {span.name for span in around if span.end - span.start == shortest}
        assert len(names) == 1
        assert names[0] in inner | ({"schedule"} if "plan" in inner else set())


@LOOPS
@pytest.mark.parametrize("seed", range(5))
def test_the_idle_time_is_shared_out_completely(loop, seed):
    timeline = run_virtually(loop, Costs(jitter=0.9, seed=seed), workload(seed))
    idle = attribute(timeline)
    gaps = timeline.gaps()
    assert idle.idle_s == pytest.approx(sum(gap.seconds for gap in gaps), abs=1e-12)
    assert sum(idle.by.values()) == pytest.approx(idle.idle_s, abs=1e-12)
    for one, gap in zip(idle.gaps, gaps, strict=True):
        assert (one.step, one.start, one.end) == (gap.step, gap.start, gap.end)
        assert sum(one.host_s.values()) == pytest.approx(one.seconds, abs=1e-12)
    assert set(idle.by) <= set(MEANING)


def test_calls_that_follow_each_other_are_one_piece_but_not_across_steps_or_other_calls():
    timeline = Timeline("sync")
    for name, step, start, end in (
        ("plan", 0, 0, 10),
        ("launch", 0, 10, 14),
        ("commit", 0, 15, 20),
        ("plan", 1, 20, 30),
    ):
        timeline.add("host", name, step, start, end)
    calls = [
        ("KV allocate", 1, 2), ("KV allocate", 3, 5),
        ("admit", 5, 8), ("KV allocate", 6, 7), ("KV allocate", 7, 8),  # these two inside it
        ("KV allocate", 9, 9.5),
        ("H2D launch", 10, None), ("step launch", 12, None), ("D2H launch", 13, None),
        ("admit", 14.2, 14.8),  # between two host spans: for no step
        ("prune", 16, 17), ("prune", 19, 20),
        ("prune", 21, 22),
    ]  # fmt: skip
    assert point_recorder._join_calls(calls, point_recorder._HostSpans(timeline)) == [
        ("KV allocate", 0, 1, 4),
        ("admit", 0, 5, 8), ("KV allocate", 0, 6, 8),
        ("KV allocate", 0, 9, 9.5),
        ("H2D launch", 0, 10, 12), ("step launch", 0, 12, 13), ("D2H launch", 0, 13, 14),
        ("prune", 0, 16, 18), ("prune", 1, 21, 22),
    ]  # fmt: skip


@LOOPS
def test_added_host_work_is_noted_once_a_step_and_for_no_plan_that_came_to_nothing(loop):
    timeline = run_virtually(loop, Costs(), workload(4), host_work_s=17e-3)
    added = [span for span in timeline.spans if span.name == ADDED]
    assert [span.step for span in added] == [step.step for step in timeline.steps]
    assert [span.end - span.start for span in added] == pytest.approx([17e-3] * len(added))


def test_each_part_of_a_gap_is_what_the_clock_says():
    costs = Costs(plan=1e-3, fill=2e-3, launch=3e-3, commit=5e-3, copy_in=7e-3, step=11e-3, copy_out=13e-3)
    timeline = run_virtually(SyncBatcher, costs, [Request([1, 2], 9, stop_token_ids=())], host_work_s=17e-3)
    idle = attribute(timeline)
    steps = len(idle.gaps)
    assert steps == 8
    expected = {"schedule": 1, "fill buffers": 2, "step launch": 3, "commit": 5, ADDED: 17}
    copies = {"copy in": 7, "copy out": 13}
    assert {name: round(1e3 * s / steps, 6) for name, s in idle.by.items()} == expected | copies
    assert len(idle.longest()) == 0, "no gap stands out where all are equal"
    medians = {point.name: round(point.median_ms, 6) for point in points_of(timeline) if point.where == "host"}
    assert {name: ms for name, ms in medians.items() if ms} == expected | {WAIT: 7 + 11 + 13}
    device = {point.name: round(point.median_ms, 6) for point in points_of(timeline) if point.where == "device"}
    assert device == {"copy in": 7, "step": 11, "copy out": 13}


def test_a_gap_that_stands_out_is_listed_with_its_cause():
    slow = lambda work: 40e-3 if work.context == 7 else 1e-3  # noqa: E731
    timeline = run_virtually(SyncBatcher, Costs(fill=slow), [Request([1, 2], 12, stop_token_ids=())])
    (longest,) = attribute(timeline).longest()
    assert longest.cause == "fill buffers"
    assert {step.step: step.context for step in timeline.steps}[longest.step] == 7


# ---- recording ------------------------------------------------------------------------------------------------------


def state_of(batcher):
    objects = (batcher, batcher.scheduler, batcher.kv, batcher.device, *batcher.device.streams)
    return [dict(vars(thing)) for thing in objects]


@LOOPS
@pytest.mark.parametrize("fails", [False, True])
def test_recording_leaves_no_trace(loop, fails):
    with loop(MODEL, clock=Costs(), step_s=0.0, **SIZES) as batcher:
        use_toy_model(batcher)
        callbacks = list(gc.callbacks)
        before = [set(state) for state in state_of(batcher)]
        with pytest.raises(KeyError) if fails else record_points(batcher):
            if fails:
                with record_points(batcher):
                    raise KeyError
            batcher.run(workload(0))
        assert [set(state) for state in state_of(batcher)] == before
        assert gc.callbacks == callbacks
        batcher.run(workload(0))
        assert not [span for span in batcher.timeline.spans if "points" in span.lane]


class Decoder:
    """A tokenizer whose decode has the garbage collector strike."""

    def decode(self, token_ids):
        gc.collect(0)
        return "x" * len(token_ids)


@LOOPS
def test_all_points_of_a_real_run_are_there_and_parts_fit_into_their_steps(loop):
    with loop(tiny_model(), tokenizer=Decoder(), max_batch_size=4, block_size=4) as batcher:
        batcher.run([Request([1, 2, 3], 2)])
        own = batcher.tokenizer
        with record_points(batcher):
            batcher.run([Request([1, 2, 3], 12, stop_token_ids=(), stop_strings=["never"])] * 6)
        assert batcher.tokenizer is own
    points = {(point.name, point.where): point for point in points_of(batcher.timeline)}
    names = {name for name, where in points if where == "host"}
    expected = {"schedule", "admit", "KV allocate", "fill buffers", "H2D launch", "step launch", "D2H launch", WAIT}
    assert expected | {"commit", "prune", "detokenize", CALLBACKS, GC} <= names <= set(MEANING)
    assert {name for name, where in points if where == "device"} == {
        "copy in", "carry-over", "forward", "sample", "copy out",
    }  # fmt: skip
    assert points[GC, "host"].total_s > 0
    steps = batcher.timeline.lane("compute")
    inside = sum(points[name, "device"].total_s for name in ("carry-over", "forward", "sample"))
    assert inside == pytest.approx(float((steps[3] - steps[2]).sum()))
    for where in ("host", "device"):
        assert sum(point.share for (_, side), point in points.items() if side == where) == pytest.approx(1)
    spans = [span for span in batcher.timeline.spans if span.lane == LANE]
    known = {step.step for step in batcher.timeline.steps}
    assert {span.step for span in spans} <= known | {max(known) + 1}


@LOOPS
def test_a_later_run_notes_nothing_on_the_timeline_of_an_earlier_one(loop):
    with loop(MODEL, clock=Costs(), step_s=0.0, **SIZES) as batcher:
        use_toy_model(batcher)
        with record_points(batcher):
            batcher.run(workload(0))
        earlier, spans = batcher.timeline, list(batcher.timeline.spans)
        batcher.device.work(1.0)
        with record_points(batcher):
            batcher.run(workload(0))
        assert batcher.timeline is not earlier
        assert earlier.spans == spans


@LOOPS
def test_on_a_real_clock_too_a_run_is_as_long_afterwards_as_it_was(loop):
    """Neither what comes after it, nor being recorded again, nor a collection changes it."""
    requests = [Request([1, 2, 3], 8, stop_token_ids=())] * 3
    with loop(tiny_model(), max_batch_size=4) as batcher:
        with record_points(batcher):
            batcher.run(requests)
            wall_s = batcher.timeline.summary().wall_s
            gc.collect()
        earlier, spans = batcher.timeline, list(batcher.timeline.spans)
        assert earlier.summary().wall_s == wall_s
        with record_points(batcher):
            gc.collect()
            batcher.run(requests)
            gc.collect()
            late = batcher.submit(requests[0])
        assert earlier.spans == spans
        with record_points(batcher):  # in the middle of a run
            late.result()
        assert earlier.spans == spans
        ends = [span.end for span in batcher.timeline.spans if span.name == CALLBACKS]
        assert len(ends) == len(set(ends))


def test_launches_follow_each_other_within_the_launch():
    timeline = run_virtually(AsyncBatcher, Costs(), workload(1))
    launches = {(span.step, span.name): span for span in timeline.spans if span.name == "launch"}
    parts = [span for span in timeline.spans if span.lane == LANE and span.name.endswith("launch")]
    assert parts
    for span in parts:
        outer = launches[span.step, "launch"]
        assert outer.start <= span.start <= span.end <= outer.end


@LOOPS
def test_on_a_real_clock_launches_fill_their_span_and_callbacks_the_time_between_two_turns(loop):
    """Of every run within one `record_points`, and though a request came late."""
    request = Request([1, 2, 3], 12, stop_token_ids=())
    with loop(tiny_model(), max_batch_size=4) as batcher, record_points(batcher):
        timelines = []
        for arrivals_s in (None, [0.3, 0.6]):  # before the first of all nothing can be served, however busy the machine
            serve_over_time(batcher, [request] * 2, arrivals_s)
            timelines.append(batcher.timeline)
        assert not [span for span in timelines[1].spans if span.name == CALLBACKS], "not yet: the run may go on"
    assert timelines[0] is not timelines[1]
    for timeline in timelines:
        by_name = {}
        for span in sorted(timeline.spans, key=lambda span: span.start):
            if span.lane in ("host", LANE):
                by_name.setdefault(span.name, []).append(span)
        assert {len(by_name[name]) for name in (*LAUNCHES, "launch")} == {len(timeline.steps)}
        for launch, h2d, step, d2h in zip(by_name["launch"], *(by_name[name] for name in LAUNCHES), strict=True):
            assert launch.step == h2d.step == step.step == d2h.step
            assert launch.start <= h2d.start < h2d.end == step.start < step.end == d2h.start < d2h.end == launch.end
        begins = by_name["plan"] + by_name.get(NO_REQUEST, [])
        last_in_a_turn = by_name["commit"] + by_name["launch"] + by_name.get(NO_REQUEST, [])
        assert len(by_name[CALLBACKS]) == len(begins) - 1
        assert {span.end for span in by_name[CALLBACKS]} <= {span.start for span in begins}
        assert {span.start for span in by_name[CALLBACKS]} <= {span.end for span in last_in_a_turn}
    assert NO_REQUEST in {span.name for span in timelines[1].spans}


# ---- what if --------------------------------------------------------------------------------------------------------

CHANGES = {
    "schedule": "plan", "fill buffers": "fill", "step launch": "launch", "commit": "commit",
    "copy in": "copy_in", "step": "step", "copy out": "copy_out",
}  # fmt: skip
MILLISECONDS = st.integers(1, 30).map(lambda tenths: tenths * 1e-4)
COSTS = st.builds(Costs, **dict.fromkeys(CHANGES.values(), MILLISECONDS))


@settings(max_examples=15, deadline=None)
@given(COSTS, st.sampled_from([*CHANGES]), st.sampled_from([0.0, 0.5]))
def test_what_if_is_what_both_loops_then_do(costs, point, factor):
    """Without early stops: those cost the asynchronous loop steps that the synchronous one never runs."""
    requests = [replace(request, stop_token_ids=()) for request in workload(2)]
    changed = replace(costs, **{CHANGES[point]: factor * getattr(costs, CHANGES[point])})
    timeline = run_virtually(SyncBatcher, costs, requests)
    (change,) = [one for one in what_if(timeline) if (one.point, one.factor) == (point, factor)]
    for loop, seconds in ((SyncBatcher, change.sync_s), (AsyncBatcher, change.async_s)):
        assert run_virtually(loop, changed, requests).summary().wall_s == pytest.approx(seconds, rel=1e-9)
    base = simulate(costs_of(timeline), 1).total_s
    assert change.sync_saves == pytest.approx(1 - change.sync_s / base)


@settings(max_examples=10, deadline=None)
@given(COSTS, st.sampled_from([0.0, 0.5]))
def test_from_an_asynchronous_run_too_every_point_is_what_the_loop_then_does(costs, factor):
    requests = [replace(request, stop_token_ids=()) for request in workload(2)]
    timeline = run_virtually(AsyncBatcher, costs, requests, host_work_s=5e-4)
    changes = {one.point: one for one in what_if(timeline, slots=2) if one.factor == factor}
    assert simulate(costs_of(timeline), 2).total_s == pytest.approx(timeline.summary().wall_s, rel=1e-9)
    assert set(CHANGES) | {ADDED} == set(changes)
    for point, change in changes.items():
        name, work = CHANGES.get(point), 5e-4 * (factor if point == ADDED else 1)
        changed = replace(costs, **{name: factor * getattr(costs, name)}) if name else costs
        again = run_virtually(AsyncBatcher, changed, requests, host_work_s=work)
        assert again.summary().wall_s == pytest.approx(change.async_s, rel=1e-9), point


def test_host_points_come_first_and_the_best_of_them_at_the_top():
    timeline = run_virtually(SyncBatcher, Costs(fill=9e-3, step=50e-3), workload(3))
    changes = what_if(timeline)
    where = [one.where for one in changes]
    assert where == sorted(where, key=lambda side: side == "device")
    assert changes[0].point == "fill buffers"
    saved = [one.sync_saves for one in changes if one.where == "host" and one.factor == 0]
    assert saved == sorted(saved, reverse=True)
    assert WAIT not in {one.point for one in changes}
    assert what_if(Timeline()) == []

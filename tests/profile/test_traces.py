"""Traces of other engines: steps, busy and idle time against what is known of them, and against brute force."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.make_trace import COMPUTE, COPY_OUT, OTHER_THREAD, THREAD, Trace, engine
from support.traces import from_zero, ns, read, steps_ns, union_ns

from asyncbatch.measure.points import NOTHING
from asyncbatch.profile.traces import report as report_module
from asyncbatch.profile.traces.events import ANNOTATION, OP, PYTHON, RUNTIME, TraceError
from asyncbatch.profile.traces.gaps import host_cause
from asyncbatch.profile.traces.intervals import innermost
from asyncbatch.profile.traces.read import busy_in, read_trace
from asyncbatch.profile.traces.report import GraphLaunches, TraceReport
from asyncbatch.timeline import device_activity

# ---- engines whose steps are known --------------------------------------------------------------------------------

ENGINES = {
    "sync, graphs": (dict(), "graph launches"),
    "async, graphs": (dict(mode="async"), "graph launches"),
    "sync, eager": (dict(graphs=False), "device-to-host copy"),
    "async, eager": (dict(mode="async", graphs=False), "device-to-host copy"),
    "async, eager, without idle time": (dict(mode="async", graphs=False, kernels=40), "device-to-host copy"),
    "sampled": (dict(sampling=True), "graph launches"),
    "sampled, async": (dict(sampling=True, mode="async"), "graph launches"),
    "prefill in between": (dict(sampling=True, prefill_at=5), "graph launches"),
    "prefill in between, async": (dict(prefill_at=5, mode="async"), "graph launches"),
    "ProfilerStep": (dict(annotation="ProfilerStep#{}"), "annotations 'ProfilerStep#'"),
    "ProfilerStep, async": (
        dict(annotation="ProfilerStep#{}", mode="async", graphs=False),
        "annotations 'ProfilerStep#'",
    ),
    "its own annotation": (dict(annotation="execute_new_0(0)_cached_8({})"), "'execute_new_#(#)_cached_#(#)'"),
    "neither copies nor graphs": (dict(copies=False, graphs=False), "rarest that recurs"),
    "neither, async": (dict(copies=False, graphs=False, mode="async"), "rarest that recurs"),
    "ROCm": (dict(runtime="hip"), "graph launches"),
    "ROCm, eager": (dict(runtime="hip", graphs=False, mode="async"), "device-to-host copy"),
}


@pytest.mark.parametrize("name", ENGINES)
def test_the_steps_of_an_engine_are_found_to_the_nanosecond(name, tmp_path):
    options, how = ENGINES[name]
    trace = engine(**options)
    report = read(trace, tmp_path)
    assert how in report.how_steps
    assert steps_ns(report) == from_zero(trace, trace.steps)
    starts, ends = np.array(trace.steps).T
    active, period = device_activity(starts, ends)
    assert report.step_active == pytest.approx(active / period)
    assert report.compute_stream == COMPUTE
    assert report.gpu == trace.gpu
    assert ns(report.window_s) == max(end for _, end in trace.kernels) - min(start for start, _ in trace.kernels)
    assert report.kernel_busy == pytest.approx(union_ns(trace.kernels) / ns(report.window_s))
    assert report.num_kernels + report.num_copies == len(trace.kernels)
    # The timeline says the same, and every copy and step is on it.
    timeline = report.timeline()
    assert timeline.summary().device_active == pytest.approx(report.step_active)
    assert len(timeline.lane("compute")[0]) == len(trace.steps)
    assert sum(gap.seconds for gap in timeline.gaps()) == pytest.approx(report.idle_s["between steps"])
    assert len(timeline.lane("H2D")[0]) + len(timeline.lane("D2H")[0]) == report.num_copies
    differ = abs(report.step_active - report.kernel_busy_in_steps) > 0.02
    assert [note[:37] for note in report.notes] == ["Step active and kernel busy differ by"] * differ


def test_copies_belong_to_their_steps_and_waits_are_waits(tmp_path):
    timeline = read(engine("async", steps=9), tmp_path).timeline()
    assert timeline.lane("H2D")[1].tolist() == list(range(9))
    assert timeline.lane("D2H")[1].tolist() == list(range(9))
    names, _, starts, ends = timeline.lane("host")
    assert names.count("wait") == 8
    assert (starts[1:] >= ends[:-1] - 1e-12).all(), "a host does one thing at a time"


def test_the_causes_of_a_gap_to_the_nanosecond(tmp_path):
    """The device waits from the end of one step to the next: the host sits in a synchronize, then in Python, in an
    operator, in nothing that is recorded, and in the launch. Another thread is not asked."""
    trace = Trace()
    first = trace.call("cudaGraphLaunch", 0, 10)
    trace.kernel("step", 20, 100, first)
    trace.kernel("step", 130, 10, first)
    trace.call("cudaStreamSynchronize", 12, 138)
    trace.host("python_function", "/opt/engine/core.py(7): update <at 0x7fde>", 150, 60)
    trace.host("python_function", "<built-in method sort of list object at 0x7f00a1>", 160, 20)
    trace.op("aten::cat", 190, 10)
    second = trace.call("cudaGraphLaunch", 230, 30)
    trace.kernel("step", 250, 100, second)
    trace.kernel("step", 350, 40, second)
    for thread in (1, OTHER_THREAD):
        trace.host("python_function", "elsewhere", 0, 400, tid=thread)
    report = read(trace, tmp_path)
    between, inside = report.gaps[1], report.gaps[0]
    assert (inside.step, inside.inside, ns(inside.seconds)) == (0, True, 10)
    assert (between.step, between.inside, ns(between.start), ns(between.end)) == (1, False, 120, 230)
    assert {cause: ns(seconds) for cause, seconds in between.host_s.items()} == {
        "cudaStreamSynchronize (waiting)": 10,
        "core.py(7): update <at 0x7fde>": 30,
        "<built-in method sort of list object>": 20,
        "aten::cat": 10,
        NOTHING: 20,
        "cudaGraphLaunch": 20,
    }
    assert between.cause == "core.py(7): update <at 0x7fde>"
    assert between.ms == pytest.approx(110e-6)
    assert report.longest(1) == [between]
    assert [gap.step for gap in report.longest()] == [1, 0]
    assert report.gaps[-1] == between
    assert report.gaps[:2] == list(report.gaps)
    assert {where: ns(seconds) for where, seconds in report.idle_s.items()} == {
        "between steps": 110,
        "inside steps": 10,
    }
    assert report.graph_launches == GraphLaunches(2, 4)
    assert report.step_active == pytest.approx(140 / 250)
    assert report.kernel_busy_in_steps == pytest.approx(140 / 250)
    assert report.kernel_busy == pytest.approx(250 / 370)


def test_where_the_two_methods_differ_it_says_what_makes_the_difference(tmp_path):
    """Steps of 100 with a pause of 10 inside, 50 apart, and a copy of 20 in between: 100 of 150 by the one method, 110
    by the other."""
    trace = Trace()
    for begin in range(0, 150 * 21, 150):
        launch = trace.call("cudaGraphLaunch", begin, 5)
        trace.kernel("a", begin, 60, launch)
        trace.kernel("b", begin + 70, 30, launch)
        trace.copy("Memcpy HtoD (Pinned -> Device)", begin + 110, 20)
    report = read(trace, tmp_path)
    assert report.step_active == pytest.approx(100 / 150)
    assert report.kernel_busy_in_steps == pytest.approx(110 / 150)
    assert report.notes == [
        "Step active and kernel busy differ by 6.7 points: in 6.7 % of the time nothing runs inside a step and "
        "in 13.3 % of the time a copy or another stream runs between steps."
    ]
    assert report.notes[0] in " ".join(str(report).split())
    assert report.as_dict()["notes"] == report.notes


def test_a_wait_is_named_as_one_and_its_operator_is_not(tmp_path):
    report = read(engine(runtime="hip"), tmp_path)
    assert "hipStreamSynchronize (waiting)" in report.idle_by_cause(inside=False)
    assert sum(report.idle_by_cause(False).values()) == pytest.approx(report.idle_s["between steps"])
    assert "other thread" not in " ".join(report.idle_by_cause())


@pytest.mark.parametrize(
    ("kind", "name", "cause"),
    [
        (RUNTIME, "cudaDeviceSynchronize", "cudaDeviceSynchronize (waiting)"),
        (RUNTIME, "cudaMemcpy", "cudaMemcpy (waiting)"),
        (RUNTIME, "cudaMemcpyAsync", "cudaMemcpyAsync"),
        (ANNOTATION, "decode[bs=8 tok=8]", "decode[bs=# tok=#]"),
        (PYTHON, "nn.Module: LlamaDecoderLayer_12", "nn.Module: LlamaDecoderLayer"),
        (PYTHON, "/usr/lib/vllm/v1/core/scheduler.py(88): schedule", "scheduler.py(88): schedule"),
        (OP, "aten::_local_scalar_dense", "aten::_local_scalar_dense"),
    ],
)
def test_readable_names(kind, name, cause):
    assert host_cause(name, kind) == cause


# ---- laws ---------------------------------------------------------------------------------------------------------

TIMES, LENGTHS = st.integers(0, 120), st.integers(0, 25)
CATEGORIES = ("user_annotation", "python_function", "cpu_op", "cuda_runtime")


@st.composite
def any_trace(draw) -> Trace:
    """Whatever may stand in a trace, in about 150 nanoseconds: on three streams, with overlaps, in any nesting."""
    trace = Trace()
    trace.kernel("first", draw(TIMES), draw(st.integers(1, 25)), 1)
    for _ in range(draw(st.integers(0, 14))):
        kind, start, length = draw(st.sampled_from(["kernel", "memset", "in", "out", "on"])), draw(TIMES), draw(LENGTHS)
        stream, launch = draw(st.sampled_from([COMPUTE, 20, COPY_OUT])), draw(st.integers(0, 6))
        if kind == "kernel":
            trace.kernel(draw(st.sampled_from("abc")), start, length, launch, stream)
        elif kind == "memset":
            trace.memset(start, length, launch, stream)
        else:
            where = {"in": "HtoD (Pinned -> Device)", "out": "DtoH (Device -> Pinned)", "on": "DtoD"}[kind]
            trace.copy(f"Memcpy {where}", start, length, launch, stream)
    there = st.sampled_from([0, *(event["args"]["correlation"] for event in trace.events)])
    launch = draw(st.sampled_from(["cudaGraphLaunch", "cudaLaunchKernel", "cudaLaunchKernel"]))
    for _ in range(draw(st.integers(0, 14))):
        name = draw(st.sampled_from([launch, "cudaLaunchKernel", "cudaEventSynchronize", "p", "q", "s#1"]))
        cat = "cuda_runtime" if name.startswith("cuda") else draw(st.sampled_from(CATEGORIES))
        args = {"correlation": draw(there)} if cat == "cuda_runtime" else {}
        trace.host(cat, name, draw(TIMES), draw(LENGTHS), **args)
    return trace


def brute_force(trace: Trace, report: TraceReport) -> tuple[int, dict[tuple[bool, str], int]]:
    """Nanosecond by nanosecond: how many of them busy, and the idle ones by (inside a step, what the host did)."""
    first = min(start for start, _ in trace.kernels)
    steps, idle, busy = steps_ns(report), {}, 0
    host = [event for event in trace.events if event["tid"] == THREAD and event["ph"] == "X"]
    kinds = {cat: i for i, cat in enumerate(CATEGORIES)}
    for now in range(max(end for _, end in trace.kernels) - first):
        runs = any(start - first <= now < end - first for start, end in trace.kernels)
        busy += runs
        inside = any(start <= now < end for start, end in steps)
        if not steps[0][0] <= now < steps[-1][1] or (inside and runs):
            continue
        active = [event for event in host if event["ts"] - first <= now < event["ts"] - first + event["dur"]]
        doing = NOTHING
        if active:
            key = [(e["ts"], -e["ts"] - e["dur"], kinds[e["cat"]], e["name"]) for e in active]
            event = active[key.index(max(key))]
            waits = " (waiting)" if event["cat"] == "cuda_runtime" and "Synchronize" in event["name"] else ""
            doing = event["name"].replace("s#1", "s#" if event["cat"] == "user_annotation" else "s#1") + waits
        idle[inside, doing] = idle.get((inside, doing), 0) + 1
    return busy, idle


@given(any_trace())
@settings(max_examples=150)
def test_busy_and_idle_are_what_counting_every_nanosecond_gives(tmp_path_factory, trace):
    report = read(trace, tmp_path_factory.mktemp("law"))
    busy, idle = brute_force(trace, report)
    window = max(end for _, end in trace.kernels) - min(start for start, _ in trace.kernels)
    assert ns(report.window_s) == window
    if not report.coverage.complete:
        assert (report.kernel_busy, report.step_active, len(report.gaps)) == (None, None, 0)
        return
    assert ns(report.kernel_busy * report.window_s) == busy
    by_cause = {
        (inside, cause): total for inside in (False, True) for cause, total in report.gaps.ns_by_cause(inside).items()
    }
    assert by_cause == idle
    # The shares of each gap add up to it, and the gaps to the idle time, exactly.
    for gap in report.gaps:
        assert sum(ns(seconds) for seconds in gap.host_s.values()) == ns(gap.end) - ns(gap.start) > 0
    steps = steps_ns(report)
    assert all(start <= end for start, end in steps)
    assert all(end <= start for (_, end), (start, _) in zip(steps, steps[1:], strict=False))
    between = sum(start - end for (_, end), (start, _) in zip(steps, steps[1:], strict=False))
    assert ns(report.idle_s["between steps"]) == between
    if report.step_active is not None:
        period = steps[-1][1] - steps[0][1]
        assert report.step_active == pytest.approx(1 - between / period)
        assert 0 <= report.step_active <= 1
    assert sum(report.gaps.ns_by_cause().values()) == sum(report.gaps.ns)


@given(any_trace(), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_the_order_of_events_in_the_file_does_not_matter(tmp_path_factory, trace, shuffler: random.Random):
    folder = tmp_path_factory.mktemp("order")
    expected = read(trace, folder)
    shuffler.shuffle(trace.events)
    report = read(trace, folder)
    assert report.as_dict() == expected.as_dict()
    assert (report.steps == expected.steps).all()
    assert list(report.gaps) == list(expected.gaps)
    assert sorted(report.timeline().spans) == sorted(expected.timeline().spans)


@given(any_trace(), TIMES, TIMES)
@settings(max_examples=60)
def test_busy_in_a_window(tmp_path_factory, trace, one, other):
    low, high = min(one, other), max(one, other) + 1
    report = read(trace, tmp_path_factory.mktemp("window"))
    if not report.coverage.complete:
        with pytest.raises(TraceError, match="does not tell how busy the device was"):
            busy_in(report)
        return
    inside = [(min(max(a, low), high), min(max(b, low), high)) for a, b in from_zero(trace, trace.kernels)]
    assert busy_in(report, 1e-9 * low, 1e-9 * high) == pytest.approx(union_ns(inside) / (high - low))
    assert busy_in(report) == report.kernel_busy


def test_busy_in_reads_a_file_and_takes_the_time_of_some_steps(tmp_path):
    trace = engine(steps=8)
    path = trace.save(tmp_path / "trace.json")
    report = read_trace(path)
    assert busy_in(path) == report.kernel_busy
    start, end = report.steps[2, 0], report.steps[5, 1]
    assert busy_in(path, start, end) == busy_in(report, start, end) < 1
    between = busy_in(report, report.steps[0, 1], report.steps[-1, 1])
    assert between == pytest.approx(report.kernel_busy_in_steps)


@pytest.mark.parametrize("window", [(2, 1), (1, 1), (float("nan"), 1), (0, float("inf"))])
def test_a_window_that_is_none_is_refused(tmp_path, window):
    with pytest.raises(ValueError, match=r"allowed are finite times with start_s < end_s"):
        busy_in(read(engine(steps=2), tmp_path), *window)


def test_the_innermost_event_is_the_one_that_began_last():
    starts, ends, names = (np.array(column) for column in ([0, 2, 3, 12], [10, 6, 20, 15], [1, 2, 3, 4]))
    stretches = list(zip(*(column.tolist() for column in innermost(starts, ends, names)), strict=True))
    assert stretches == [(0, 2, 1), (2, 3, 2), (3, 12, 3), (12, 15, 4), (15, 20, 3)]


def test_a_host_lane_of_too_many_pieces_closes_the_shortest_pauses(tmp_path, monkeypatch):
    report = read(engine(graphs=False, steps=6), tmp_path)
    full = [span for span in report.timeline().spans if span.name == "work"]
    monkeypatch.setattr(report_module, "MOST_HOST_PIECES", 7)
    few = [span for span in report.timeline().spans if span.name == "work"]
    assert 7 >= len(few) > 0
    assert len(full) > 7
    assert (few[0].start, few[-1].end) == (full[0].start, full[-1].end)

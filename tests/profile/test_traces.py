"""Traces of other engines: steps, busy and idle time against what is known of made traces, and against brute force."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.make_trace import COMPUTE, COPY_OUT, OTHER_THREAD, THREAD, US, Trace, engine, write_large

from asyncbatch import Timeline
from asyncbatch.pictures import plot
from asyncbatch.profile import cli
from asyncbatch.profile.traces import events as trace_events
from asyncbatch.profile.traces import report as traces
from asyncbatch.profile.traces.report import (
    NOTHING,
    GraphLaunches,
    TraceError,
    TraceReport,
    busy_in,
    innermost,
    read_trace,
)
from asyncbatch.timeline import device_activity


def read(trace: Trace | str, folder: Path, name: str = "trace.json", **options) -> TraceReport:
    path = folder / name
    if isinstance(trace, str):
        path.write_text(trace)
    else:
        trace.save(path, **options)
    return read_trace(path)


def ns(seconds: float) -> int:
    return round(1e9 * float(seconds))


def steps_ns(report: TraceReport) -> list[tuple[int, int]]:
    return [(ns(start), ns(end)) for start, end in report.steps]


def from_zero(trace: Trace, intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    first = min(start for start, _ in trace.kernels)
    return [(start - first, end - first) for start, end in intervals]


def union_ns(intervals: list[tuple[int, int]]) -> int:
    total, reach = 0, min((start for start, _ in intervals), default=0)
    for start, end in sorted(intervals):
        total += max(0, end - max(start, reach))
        reach = max(reach, end)
    return total


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
    assert report.notes[0] in str(report)
    assert report.as_dict()["notes"] == report.notes


def test_a_wait_is_named_as_one_and_its_operator_is_not(tmp_path):
    report = read(engine(runtime="hip"), tmp_path)
    assert "hipStreamSynchronize (waiting)" in report.idle_by_cause(inside=False)
    assert sum(report.idle_by_cause(False).values()) == pytest.approx(report.idle_s["between steps"])
    assert "other thread" not in " ".join(report.idle_by_cause())


@pytest.mark.parametrize(
    ("kind", "name", "cause"),
    [
        (traces.RUNTIME, "cudaDeviceSynchronize", "cudaDeviceSynchronize (waiting)"),
        (traces.RUNTIME, "cudaMemcpy", "cudaMemcpy (waiting)"),
        (traces.RUNTIME, "cudaMemcpyAsync", "cudaMemcpyAsync"),
        (traces.ANNOTATION, "decode[bs=8 tok=8]", "decode[bs=# tok=#]"),
        (traces.PYTHON, "nn.Module: LlamaDecoderLayer_12", "nn.Module: LlamaDecoderLayer"),
        (traces.PYTHON, "/usr/lib/vllm/v1/core/scheduler.py(88): schedule", "scheduler.py(88): schedule"),
        (trace_events.OP, "aten::_local_scalar_dense", "aten::_local_scalar_dense"),
    ],
)
def test_readable_names(kind, name, cause):
    assert traces.readable(name, kind) == cause


# ---- rules for steps ----------------------------------------------------------------------------------------------


def test_graph_launches_are_counted_with_their_kernels(tmp_path):
    assert read(engine(steps=5, kernels=8), tmp_path).graph_launches == GraphLaunches(5, 40)
    assert read(engine(steps=5, graphs=False), tmp_path).graph_launches == GraphLaunches(0, 0)


def test_kernels_of_graphs_that_are_missing_are_missed(tmp_path):
    trace = engine(steps=6, prefill_at=2)
    trace.events = [event for event in trace.events if "graph id" not in event.get("args", {})]
    report = read(trace, tmp_path)
    assert report.graph_launches == GraphLaunches(6, 0)
    assert "none of their kernels" in str(report)
    assert any("too low" in note for note in report.notes)


@pytest.mark.parametrize("runtime_events", [True, False])
def test_a_correlation_id_of_0_links_nothing(tmp_path, runtime_events):
    trace = engine("async", copies=False)
    for event in trace.events:
        if "correlation" in event.get("args", {}):
            event["args"]["correlation"] = 0
    trace.events = [event for event in trace.events if runtime_events or event["cat"] != "cuda_runtime"]
    report = read(trace, tmp_path)
    assert report.graph_launches == (GraphLaunches(12, 0) if runtime_events else None)
    assert "rarest that recurs" in report.how_steps
    assert steps_ns(report) == from_zero(trace, trace.steps)


def test_copies_from_and_to_the_host_are_no_part_of_a_step_on_whatever_stream(tmp_path):
    trace = engine(sampling=True)
    for event in trace.events:
        if event["cat"] == "gpu_memcpy":
            event["args"]["stream"] = event["tid"] = COMPUTE
    report = read(trace, tmp_path)
    assert len(report.streams) == 1
    assert steps_ns(report) == from_zero(trace, trace.steps)


def test_without_runtime_events_graphs_are_known_by_what_shares_an_id(tmp_path):
    trace = engine("async", sampling=True)
    for event in trace.events:
        if event["name"] == "argmax_kernel":
            event["args"]["correlation"] = 0  # not linked to anything, and so not to each other
    trace.events = [event for event in trace.events if event.get("cat") not in ("cuda_runtime", "cuda_driver")]
    report = read(trace, tmp_path)
    assert report.graph_launches is None
    assert "not known" in str(report)
    assert steps_ns(report) == from_zero(trace, trace.steps)


def test_without_runtime_events_eager_steps_end_where_their_copy_begins(tmp_path):
    trace = engine(graphs=False)
    trace.events = [event for event in trace.events if event.get("cat") not in ("cuda_runtime", "cuda_driver")]
    report = read(trace, tmp_path)
    assert "begun before it" in report.how_steps
    assert steps_ns(report) == from_zero(trace, trace.steps)


def test_without_runtime_events_the_gpus_own_annotations_count(tmp_path):
    trace = engine("async", graphs=False, copies=False)
    trace.events = [event for event in trace.events if event.get("cat") == "kernel"]
    for i, (start, end) in enumerate(trace.steps):
        for stream in (COMPUTE, COPY_OUT):  # each stream has its own, and they may overlap
            trace.complete("gpu_user_annotation", f"ProfilerStep#{i}", 0, stream, start, end - start, {})
    report = read(trace, tmp_path)
    assert "annotations 'ProfilerStep#': the kernels that ran in it" in report.how_steps
    assert steps_ns(report) == from_zero(trace, trace.steps)


@pytest.mark.parametrize("graphs_per_step", [1, 3])
def test_a_model_in_several_graphs_is_one_step_for_each_copy_of_results(tmp_path, graphs_per_step):
    trace, now = Trace(), 0
    for _ in range(6):
        begin = now + 10
        for _ in range(graphs_per_step):
            launch = trace.call("cudaGraphLaunch", now, 5)
            trace.kernel("attention", now + 10, 30, launch)
            trace.kernel("mlp", now + 40, 50, launch)
            now += 90
        trace.steps.append((begin, now))
        copy = trace.call("cudaMemcpyAsync", now, 5)
        trace.copy("Memcpy DtoH (Device -> Pinned)", now + 10, 5, copy, COPY_OUT)
        now += 100
    report = read(trace, tmp_path)
    assert ("graph launches" in report.how_steps) == (graphs_per_step == 1)
    assert steps_ns(report) == from_zero(trace, trace.steps)


def test_unlinked_work_in_the_middle_of_a_graph_is_part_of_its_step_however_long(tmp_path):
    trace = Trace()
    for begin in range(0, 900, 300):
        launch = trace.call("cudaGraphLaunch", begin, 5)
        trace.kernel("a", begin, 60, launch)
        trace.kernel("not linked", begin + 60, 90)
        trace.kernel("b", begin + 150, 60, launch)
        trace.steps.append((begin, begin + 210))
    report = read(trace, tmp_path)
    assert "graph launches" in report.how_steps
    assert steps_ns(report) == trace.steps


def test_annotations_of_layers_and_of_whole_runs_are_no_steps(tmp_path):
    trace = engine(graphs=False, steps=8, kernels=8)
    launches = [event for event in trace.events if event["name"] in ("cudaLaunchKernel", "cuLaunchKernelEx")]
    for i, event in enumerate(launches):
        trace.host("user_annotation", f"layer {i % 8}", event["ts"], event["dur"])
    end = max(event["ts"] for event in launches)
    trace.host("user_annotation", "generate", 0, end // 2)
    trace.host("user_annotation", "generate", end // 2, end)
    report = read(trace, tmp_path)
    assert "device-to-host" in report.how_steps
    assert len(report.steps) == 8


def test_a_profiler_step_of_many_batches_is_taken_and_said(tmp_path):
    trace = engine(steps=40)
    end = max(event["ts"] + event.get("dur", 0) for event in trace.events)
    for i in range(4):
        trace.host("user_annotation", f"ProfilerStep#{i}", i * end // 4, end // 4)
    report = read(trace, tmp_path)
    assert len(report.steps) == 4
    assert any("about 10 copies of results" in note for note in report.notes)


def test_annotations_that_do_not_cover_the_launches_are_no_steps(tmp_path):
    trace = engine(steps=10)
    launches = [event["ts"] for event in trace.events if event["name"] == "cudaGraphLaunch"]
    for i, start in enumerate(launches[:7]):
        trace.host("user_annotation", f"ProfilerStep#{i}", start, 20 * US)
    assert "graph launches" in read(trace, tmp_path).how_steps


def test_where_nothing_marks_a_step_the_whole_window_is_one_and_it_says_so(tmp_path):
    trace = Trace()
    for i in range(7):
        trace.kernel(f"kernel {i}", 10 * i, 5)
    report = read(trace, tmp_path)
    assert "the whole window is one step" in report.how_steps
    assert steps_ns(report) == [(0, 65)]
    assert (report.step_active, report.kernel_busy_in_steps) == (None, None)
    assert report.kernel_busy == pytest.approx(35 / 65)
    assert report.idle_by_cause() == {NOTHING: pytest.approx(30e-9)}
    assert report.as_dict()["step_active"] is None
    assert "not measured" in str(report)


def test_a_warm_up_long_before_the_first_step_is_in_none(tmp_path):
    trace = engine(start=100_000 * US)
    trace.kernel("warm_up", 0, 5 * US)
    report = read(trace, tmp_path)
    assert steps_ns(report) == from_zero(trace, trace.steps)


# ---- what a file may look like ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("trace.json", dict(numbers="string")),
        ("trace.json", dict(bare=True)),
        ("trace.json.gz", dict()),
        ("trace", dict(numbers="string", bare=True)),
    ],
)
def test_a_trace_may_be_written_in_several_ways(tmp_path, name, options):
    trace = engine("async", prefill_at=3, sampling=True)
    plain = read(trace, tmp_path)
    other = read(trace, tmp_path, name, **options)
    expected = plain.as_dict() | {"trace": name, "gpu": None if options.get("bare") else trace.gpu}
    assert other.as_dict() == expected
    packed = tmp_path / "packed.json"  # gzip whatever it is called, and a byte order mark
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf\n  " + trace.text().encode()))
    assert read_trace(str(packed)).as_dict() == plain.as_dict() | {"trace": "packed.json"}


def test_every_digit_of_a_time_counts_even_where_a_float_cannot_hold_it(tmp_path):
    trace = engine()
    trace.origin = 1_698_438_996_460_226_123  # nanoseconds since 1970: as microseconds a float64 rounds to 250 ns
    assert steps_ns(read(trace, tmp_path)) == from_zero(trace, trace.steps)


def test_whole_microseconds_and_other_names_of_categories_as_torch_had_them_until_2021(tmp_path):
    trace = engine(graphs=False)
    old = {"kernel": "Kernel", "gpu_memcpy": "Memcpy", "cuda_runtime": "Runtime", "cpu_op": "Operator"}
    for event in trace.events:
        event["cat"] = old.get(event["cat"], event["cat"])
        if event["ph"] == "X" and event["cat"] in ("Kernel", "Memcpy"):
            event["tid"] = f"stream {event['args'].pop('stream')}"
    report = read(trace, tmp_path, numbers="whole")
    assert steps_ns(report) == from_zero(trace, trace.steps)
    assert {stream.stream for stream in report.streams} == {COMPUTE, 20, COPY_OUT}


def test_of_two_gpus_the_one_with_most_kernel_time_is_reported(tmp_path):
    trace = engine()
    expected = read(trace, tmp_path).as_dict()
    for event in [event for event in trace.events if event.get("cat") == "kernel"][::2]:
        trace.kernel("other", event["ts"] + 3, 9 * US, stream=7, device=1)
    report = read(trace, tmp_path)
    assert report.device == 0
    assert any("2 devices" in note and "0 is reported" in note for note in report.notes)
    assert [(stream.device, stream.stream, stream.kernels) for stream in report.streams] == [
        (0, 7, 96), (0, 20, 0), (0, 24, 0), (1, 7, 48),
    ]  # fmt: skip
    same = ("kernel_busy", "step_active", "steps", "idle", "kernels", "copies", "graph_launches")
    assert {key: report.as_dict()[key] for key in same} == {key: expected[key] for key in same}
    for event in trace.events:
        if event.get("cat") == "kernel" and event["pid"] == 1:
            event["dur"] *= 10
    assert read(trace, tmp_path).device == 1


def test_streams_say_what_ran_on_each(tmp_path):
    trace = Trace()
    trace.kernel("a", 0, 10)
    trace.kernel("b", 5, 10)
    trace.memset(20, 5)
    trace.copy("Memcpy DtoD (Device -> Device)", 30, 5, stream=COMPUTE)
    trace.copy("Memcpy HtoD (Pageable -> Device)", 2, 20)
    report = read(trace, tmp_path)
    assert [(s.stream, ns(s.busy_s), s.kernels, s.copies) for s in report.streams] == [(7, 25, 2, 1), (20, 20, 0, 1)]
    assert (report.num_kernels, report.num_copies) == (2, 2)
    assert report.kernel_busy == pytest.approx((25 + 5) / 35)
    assert steps_ns(report) == [(0, 35)], "a memset and a copy within the device are part of a step"


def test_events_of_zero_length_overlap_nothing_and_break_nothing(tmp_path):
    trace = engine("async")
    before = read(trace, tmp_path)
    for start, end in trace.steps:
        trace.kernel("empty", start, 0)
        trace.kernel("empty", end, 0)
        trace.copy("Memcpy HtoD (Pinned -> Device)", start, 0)
        trace.host("cpu_op", "aten::empty", start, 0)
    after = read(trace, tmp_path)
    assert steps_ns(after) == steps_ns(before)
    assert after.kernel_busy == before.kernel_busy
    assert after.idle_by_cause() == before.idle_by_cause()
    alone = Trace()
    alone.kernel("empty", 5, 0)
    assert read(alone, tmp_path).kernel_busy == 0


def test_waits_on_the_device_and_profiler_overhead_are_no_work(tmp_path):
    trace = engine()
    before = read(trace, tmp_path).as_dict()
    end = max(end for _, end in trace.kernels)
    args = {"stream": COMPUTE, "correlation": 5, "device": 0, "cuda_sync_kind": "Stream Wait Event"}
    trace.complete("cuda_sync", "Stream Wait Event", 0, COMPUTE, 0, end, args)
    trace.complete("overhead", "Activity Buffer Request", -1, 0, 0, end, {})
    trace.complete("gpu_user_annotation", "ProfilerStep#1", 0, COMPUTE, 0, end, {"External id": 3})
    assert read(trace, tmp_path).as_dict() == before | {"events": before["events"] + 3}


BROKEN = [
    3, None, "text", [], {}, {"ph": "X"}, {"ph": "X", "cat": ["kernel"]}, {"ph": ["X"], "cat": "kernel"},
    {"ph": "X", "cat": "python_function", "name": None, "ts": 4.6e12, "dur": 0, "pid": [1], "tid": {}},
]  # fmt: skip
UNUSABLE = [
    {"ts": None}, {"ts": "soon"}, {"ts": True}, {"ts": []}, {"dur": -1}, {"dur": {}}, {"ts": "NaN"}, {"ts": "Infinity"},
    {"ts": 10**40}, {"dur": "1e400"}, {"ts": -(10**40)}, {"dur": 4.499e15},
]  # fmt: skip


def test_events_that_make_no_sense_are_left_out_and_counted(tmp_path):
    trace = engine()
    expected = read(trace, tmp_path).as_dict()
    kernel = {"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": 4.6e12, "dur": 1.0}
    text = trace.text(bare=True).rstrip("] \n")
    for event in [*BROKEN, *(kernel | wrong for wrong in UNUSABLE)]:
        text += ", " + json.dumps(event)
    huge = json.dumps(kernel | {"ts": "HUGE"}).replace('"HUGE"', "1e999999999")
    report = read(f"{text}, {huge}]", tmp_path)
    assert report.as_dict()["idle"] == expected["idle"]
    assert report.notes == [f"{len(UNUSABLE) + 1} events without a usable time were left out."]


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
    for _ in range(draw(st.integers(0, 14))):
        name = draw(st.sampled_from(["cudaGraphLaunch", "cudaLaunchKernel", "cudaEventSynchronize", "p", "q", "s#1"]))
        cat = "cuda_runtime" if name.startswith("cuda") else draw(st.sampled_from(CATEGORIES))
        args = {"correlation": draw(st.integers(0, 6))} if cat == "cuda_runtime" else {}
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
    assert ns(report.kernel_busy * report.window_s) == busy
    found = {
        (inside, cause): total for inside in (False, True) for cause, total in report.gaps.ns_by_cause(inside).items()
    }
    assert found == idle
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
    inside = [(min(max(a, low), high), min(max(b, low), high)) for a, b in from_zero(trace, trace.kernels)]
    assert busy_in(report, 1e-9 * low, 1e-9 * high) == pytest.approx(union_ns(inside) / (high - low))
    assert busy_in(report) == report.kernel_busy


def test_busy_in_reads_a_file_and_takes_the_time_of_an_annotation(tmp_path):
    trace = engine(steps=8, annotation="decode step")
    path = trace.save(tmp_path / "trace.json")
    report = read_trace(path)
    assert busy_in(path) == report.kernel_busy
    spans = report.annotation("decode step")
    assert spans.shape == (8, 2)
    assert report.annotation("no such name").shape == (0, 2)
    start, end = spans[2, 0], spans[5, 1]
    assert busy_in(path, start, end) == busy_in(report, start, end)
    between = busy_in(report, report.steps[0, 1], report.steps[-1, 1])
    assert between == pytest.approx(report.kernel_busy_in_steps)


@pytest.mark.parametrize("window", [(2, 1), (1, 1), (float("nan"), 1), (0, float("inf"))])
def test_a_window_that_is_none_is_refused(tmp_path, window):
    with pytest.raises(ValueError, match=r"allowed are finite times with start_s < end_s"):
        busy_in(read(engine(steps=2), tmp_path), *window)


def test_the_innermost_event_is_the_one_that_began_last():
    starts, ends, names = (np.array(column) for column in ([0, 2, 3, 12], [10, 6, 20, 15], [1, 2, 3, 4]))
    found = list(zip(*(column.tolist() for column in innermost(starts, ends, names)), strict=True))
    assert found == [(0, 2, 1), (2, 3, 2), (3, 12, 3), (12, 15, 4), (15, 20, 3)]


def test_a_host_lane_of_too_many_pieces_closes_the_shortest_pauses(tmp_path, monkeypatch):
    report = read(engine(graphs=False, steps=6), tmp_path)
    full = [span for span in report.timeline().spans if span.name == "work"]
    monkeypatch.setattr(traces, "MOST_HOST_PIECES", 7)
    few = [span for span in report.timeline().spans if span.name == "work"]
    assert 7 >= len(few) > 0
    assert len(full) > 7
    assert (few[0].start, few[-1].end) == (full[0].start, full[-1].end)


# ---- bad input ----------------------------------------------------------------------------------------------------

CPU_EVENT = '{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 1, "tid": 1, "ts": 4600000000001.5, "dur": 3.2}'
KERNEL = CPU_EVENT.replace("cpu_op", "kernel")
OPEN = '{"schemaVersion": 1, "traceEvents": ['
# What stands in the file, and what the one line says of it.
BAD = {
    "empty": (b"", "is empty"),
    "white space": (b" \n" * 9000, "is empty"),
    "text": (b"hello", "is not JSON"),
    "binary": (bytes(range(256)), "is not JSON"),
    "a zip archive": (b"PK\x03\x04" + bytes(500), "is not JSON"),
    "UTF-16": ("[]".encode("utf-16"), "is not JSON"),
    "text after some events": (f"{OPEN}{CPU_EVENT}, {CPU_EVENT}, oops]}}".encode(), "2 events were read"),
    "a name that is no text": (OPEN.encode() + b'{"name": "\xff\xfe"}]}', "is not JSON"),
    "cut off in an event": (f"{OPEN}{KERNEL}, {KERNEL[:40]}".encode(), "is cut off: the JSON ends too early; "),
    "cut off between events": (f"{OPEN}{KERNEL}, {KERNEL}".encode(), "2 events were read"),
    "cut off before the first": (OPEN[:-5].encode(), "is cut off"),
    "a cut off list": (f"[{KERNEL}".encode(), "is cut off"),
    "a cut off archive": (gzip.compress((OPEN + f"{KERNEL}, " * 9000).encode())[:500], "is cut off or damaged"),
    "a damaged archive": (gzip.compress(b"[]")[:-5] + b"12345", "is cut off or damaged"),
    "only the mark of an archive": (b"\x1f\x8b", "is cut off or damaged"),
    "no events": (b'{"traceEvents": []}', "holds no events: its traceEvents is an empty list"),
    "an empty list": (b"[]", "holds no events: it is a list of nothing"),
    "an empty object": (b"{}", "holds no events: it is an object; expected a Chrome trace"),
    "another object": (b'{"model": "x", "runs": [{"a": 1}]}', "an object with the keys 'model', 'runs'; expected"),
    "an object with many keys": (json.dumps(dict.fromkeys("abcdefgh", [1])).encode(), "'e', ...; expected"),
    "traceEvents that is no list": (b'{"traceEvents": {"a": 1}}', "its traceEvents is no list"),
    "a number": (b"12", "holds 12; expected"),
    "a string": (b'"' + b"trace " * 100 + b'"', "holds 'trace trace"),
    "events that are none": (b"[1, 2, null]", "none of them with a duration"),
    "metadata only": (b'[{"ph": "M", "name": "process_name"}]', "none of them with a duration"),
    "only the CPU's": (f"[{CPU_EVENT}]".encode(), "holds only CPU events: profile with ProfilerActivity.CUDA"),
    "copies only": (f"[{KERNEL.replace('kernel', 'gpu_memcpy')}]".encode(), "1 copies of a device and no kernel"),
    "kernels without a time": (f"[{KERNEL.replace('ts', 'when')}]".encode(), "no usable time (ts, dur) in 1 of them"),
    "categories of another tool": (f"[{KERNEL.replace('kernel', 'blink')}]".encode(), "its categories are blink"),
    "a number of 5,000 digits": (f"[{KERNEL.replace('3.2', '1' * 5000)}]".encode(), "hundreds of digits"),
    "a number across two reads": (f"[{' ' * 65000}{KERNEL.replace('3.2', '1' * 4400)}]".encode(), "hundreds of digits"),
    "a number out of range": (f"[{KERNEL.replace('3.2', '1e99999999999999999999')}]".encode(), "a number out of range"),
    "half a character": (f"[{KERNEL.replace('mm', chr(92) + 'udc00x')}]".encode(), "is not JSON"),
    "lists in lists": (b"[" * 100_000, "brackets in brackets"),
    "objects in objects": (b'[{"a":' * 100_000, "brackets in brackets"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_trace_is_refused_with_what_was_found(tmp_path, name, call):
    content, said = BAD[name]
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert said in message
    assert "\n" not in message
    assert len(message) < 300 + len(str(path))
    status, out, error = call("--trace", path)
    assert (status, out) == (2, "")
    assert error == f"asyncbatch.profile: {message}\n"


def test_files_that_cannot_be_opened_are_refused(tmp_path):
    with pytest.raises(TraceError, match=r"none\.json cannot be read: No such file"):
        read_trace(tmp_path / "none.json")
    with pytest.raises(TraceError, match=r"cannot be read: Is a directory"):
        read_trace(tmp_path)


def test_a_trace_of_torch_profiler_without_a_gpu_says_how_to_get_one_with_it(tmp_path):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        torch.mm(torch.ones(8, 8), torch.ones(8, 8)).relu()
    profiler.export_chrome_trace(str(tmp_path / "cpu.json"))
    with pytest.raises(TraceError, match=r"cpu\.json holds only CPU events: profile with ProfilerActivity\.CUDA"):
        read_trace(tmp_path / "cpu.json")


def test_our_own_trace_says_what_reads_it(tmp_path):
    timeline = Timeline("sync")
    timeline.add("host", "plan", 0, 0.0, 1.0)
    timeline.add("compute", "step", 0, 1.0, 2.0)
    timeline.save(tmp_path / "trace.json")
    with pytest.raises(TraceError, match=r"written by Timeline\.save or this script: .*load_trace reads it"):
        read_trace(tmp_path / "trace.json")


@given(st.binary(max_size=60), st.integers(0, 400))
@settings(max_examples=150)
def test_no_file_gives_anything_but_a_report_or_a_trace_error(tmp_path_factory, noise, at):
    text = engine(steps=2, kernels=2).text(bare=True).encode()[:2000]
    path = tmp_path_factory.mktemp("noise") / "trace.json"
    path.write_bytes(text[:at] + noise + text[at:])
    with contextlib.suppress(TraceError):
        read_trace(path)


# ---- size ---------------------------------------------------------------------------------------------------------


def test_memory_grows_by_arrays_not_by_objects(tmp_path):
    """The events as parsed take 1,000 to 2,000 bytes each. Measured: 50 while reading, 200 with the report."""
    count = write_large(tmp_path / "large.json", 4)
    read(engine(steps=3), tmp_path)  # whatever is loaded once
    tracemalloc.start()
    try:
        events = trace_events.read_events(tmp_path / "large.json", False)
        reading = tracemalloc.get_traced_memory()[1]
        traces.report_on("large.json", events)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert events.count == count > 15_000
    assert reading < 100 * count + 1_000_000
    assert peak < 400 * count + 1_000_000


def test_a_bar_shows_how_much_of_a_large_file_is_read(tmp_path, monkeypatch, capsys):
    path = engine().save(tmp_path / "trace.json.gz")
    read_trace(path, progress=True)
    assert capsys.readouterr().err == "", "a small file is read before a bar could be looked at"
    monkeypatch.setattr(trace_events, "BAR_FROM", 1000)
    read_trace(path, progress=True)
    assert "reading trace.json.gz" in capsys.readouterr().err
    read_trace(path)
    assert capsys.readouterr().err == ""


# ---- the command line ---------------------------------------------------------------------------------------------


@pytest.fixture
def call(capsys):
    """Run the script in this process: (exit status, standard output, standard error)."""

    def run(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


def test_the_script_prints_the_report_as_a_table_or_as_json(call, tmp_path):
    path = engine(prefill_at=4, sampling=True, graphs=False).save(tmp_path / "run.pt.trace.json.gz")
    status, table, error = call("--trace", path)
    assert (status, error) == (0, "")
    report = read_trace(path)
    assert table == f"{report}\n"
    for said in (
        "run.pt.trace.json.gz",
        "0 (NVIDIA H100 80GB HBM3)",
        "7, one of 3",
        f"step active     {100 * report.step_active:.2f} %, idle",
        "idle between steps: ",
        "cudaStreamSynchronize (waiting)",
        "scheduler.py(88): plan",
        "more",
        "before step",
    ):
        assert said in table
    assert max(map(len, table.splitlines())) < 140
    status, out, error = call("--trace", path, "--json")
    assert (status, error) == (0, "")
    assert json.loads(out) == report.as_dict()


def test_the_report_as_a_dict(tmp_path):
    data = read(engine("async", steps=30), tmp_path).as_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["schema"] == 1
    assert data["steps"]["count"] == 30
    assert data["steps"]["ms_median"] == pytest.approx(0.327)
    assert data["graph_launches"] == {"calls": 30, "kernels": 240}
    for idle in data["idle"].values():
        assert sum(idle["by_cause"].values()) == pytest.approx(idle["s"])
    assert len(data["longest_gaps"]) == 20
    longest = [round(gap["ms"], 6) for gap in data["longest_gaps"]]
    assert longest == sorted(longest, reverse=True)


def test_out_has_the_report_and_a_picture(call, tmp_path):
    path = engine().save(tmp_path / "trace.json")
    status, _, error = call("--trace", path, "--out", tmp_path / "new" / "out")
    assert (status, error) == (0, "")
    assert json.loads((tmp_path / "new" / "out" / "report.json").read_text()) == read_trace(path).as_dict()
    assert (tmp_path / "new" / "out" / "trace-timeline.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in (tmp_path / "new" / "out").iterdir()) == [
        "report.html",
        "report.json",
        "trace-timeline.png",
    ]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model", "random:tiny"], "--model"),
        (["--batch-size", "4", "--seed", "3"], "--batch-size, --seed"),
        (["--mode", "sync"], "--mode"),
        (["--emulate", "h200-llama-8b"], "--emulate"),
        (["--host-work-ms", "3"], "--host-work-ms"),
    ],
)
def test_options_that_measure_are_refused_beside_a_trace(call, tmp_path, options, named):
    path = engine(steps=2).save(tmp_path / "trace.json")
    status, out, error = call("--trace", path, *options)
    assert (status, out) == (2, "")
    assert error.count("\n") == 1
    assert error.endswith(f"it cannot be had with {named}\n")


def test_an_out_that_cannot_be_written_is_refused_before_the_file_is_read(call, tmp_path):
    (tmp_path / "file").write_text("mine")
    status, out, error = call("--trace", tmp_path / "none.json", "--out", tmp_path / "file")
    assert (status, out) == (2, "")
    assert "none.json" not in error
    assert error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_debug_shows_where_it_went_wrong(tmp_path):
    with pytest.raises(TraceError, match="cannot be read"):
        cli.main(["--trace", str(tmp_path / "none.json"), "--debug"])


def test_names_stay_text_in_the_table_and_the_picture(tmp_path):
    trace = engine(steps=3)
    for event in trace.events:
        if event["name"].endswith("commit"):
            event["name"] = "x\n\x1b[31m<b>$_{y}$"
    report = read(trace, tmp_path)
    picture = io.BytesIO()
    plot(report.timeline()).savefig(picture)
    assert all(line.isprintable() for line in str(report).splitlines())

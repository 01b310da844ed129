"""Where steps begin and end in a trace: each rule, and what it must not be misled by."""

from __future__ import annotations

import pytest
from support.make_trace import COMPUTE, COPY_OUT, US, Trace, engine
from support.traces import from_zero, read, steps_ns

from asyncbatch.measure.points import NOTHING
from asyncbatch.profile.traces.report import GraphLaunches


def test_graph_launches_are_counted_with_their_kernels(tmp_path):
    assert read(engine(steps=5, kernels=8), tmp_path).graph_launches == GraphLaunches(5, 40)
    assert read(engine(steps=5, graphs=False), tmp_path).graph_launches == GraphLaunches(0, 0)


def test_kernels_of_graphs_that_are_missing_are_missed(tmp_path):
    trace = engine(steps=6, prefill_at=2)
    trace.events = [event for event in trace.events if "graph id" not in event.get("args", {})]
    report = read(trace, tmp_path)
    assert report.graph_launches == GraphLaunches(6, 0)
    assert "none of their kernels" in str(report)
    assert report.kernel_busy is None, "it would be too low"
    assert report.coverage.missing == {"graph launches": 6}


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

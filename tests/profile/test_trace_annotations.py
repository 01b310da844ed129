"""Which annotations are steps: one alone, two kinds together, and parts of steps; and a graph is never divided."""

from __future__ import annotations

import pytest
from support.make_trace import COPY_OUT, US, Trace, engine
from support.traces import read, steps_ns

VLLM, SGLANG = "execute_context_0(0)_generation_8(8)", "step[DECODE bs=8]"
LAYER = ("rms_norm", "qkv_gemm", "attention", "mlp_gemm")


def one_step(how: str, annotation: str | None, layers: int = 12, results: int = 1) -> Trace:
    """One step of an engine: its model eagerly, as one graph, or as a graph a layer with eager attention between."""
    trace, now, busy = Trace(), 10 * US, 100 * US
    whole = trace.call("cudaGraphLaunch", now, 20 * US) if how == "one graph" else 0
    for layer in range(layers):
        piece = trace.call("cudaGraphLaunch", now + layer * US, US) if how == "a graph a layer" else whole
        trace.host("user_annotation", f"layer {layer}", now + layer * US, US)
        for name in LAYER:
            launch = piece or trace.call("cudaLaunchKernel", now + layer * US, 200)
            trace.kernel(name, busy, 20 * US, launch)
            busy += 21 * US
        busy += 15 * US  # a pause, as between steps
    for _ in range(results):
        copy = trace.call("cudaMemcpyAsync", now + 20 * US, US)
        trace.copy("Memcpy DtoH (Device -> Pinned)", busy + 2 * US, US, copy, COPY_OUT)
    if annotation:
        trace.host("user_annotation", annotation, 0, 80 * US)
    return trace


@pytest.mark.parametrize("how", ["eager", "one graph", "a graph a layer"])
@pytest.mark.parametrize("annotation", [VLLM, SGLANG, "ProfilerStep#4", "decode batch"])
@pytest.mark.parametrize("results", [0, 1])
def test_one_annotated_step_is_one_step_and_its_activity_is_not_measured(tmp_path, how, annotation, results):
    """Before: 12 steps, a layer each, and 94 % active."""
    report = read(one_step(how, annotation, results=results), tmp_path)
    assert len(report.steps) == 1
    assert report.how_steps.startswith("there is one annotation")
    assert (report.step_active, report.overlap) == (None, None)
    assert "How idle Not measured: for that, several steps must be found" in " ".join(str(report).split())
    assert report.coverage.complete


@pytest.mark.parametrize("annotation", [VLLM, "ProfilerStep#4"])
def test_a_step_of_an_engine_may_copy_out_several_results(tmp_path, annotation):
    assert len(read(one_step("eager", annotation, results=5), tmp_path).steps) == 1


@pytest.mark.parametrize("how", ["one graph", "a graph a layer"])
def test_the_kernels_of_one_graph_launch_are_never_divided(tmp_path, how):
    report = read(one_step(how, None), tmp_path)
    assert len(report.steps) == 1, "its layers recur, its copy tells only before from after"


def test_annotations_of_the_gpu_do_not_divide_a_graph(tmp_path):
    """Two graph launches and three annotations, of which the second lies across both: the launches win."""
    trace = Trace()
    for number in range(2):
        for at in range(10):
            trace.kernel("abcde"[at % 5], 1000 * number + 50 * at, 40, correlation=number + 1)
    for number, (start, end) in enumerate([(0, 300), (300, 1200), (1200, 1500)]):
        trace.complete("gpu_user_annotation", f"ProfilerStep#{number}", 0, 7, start, end - start, {})
    assert steps_ns(read(trace, tmp_path)) == [(0, 490), (1000, 1490)]


def annotated(kinds: str, apart: int = 600 * US) -> tuple[Trace, list[tuple[int, int]]]:
    """A trace of eager steps, each in an annotation by its letter: (P)refill takes three times as long as (D)ecode."""
    trace, now, steps = Trace(), 0, []
    for kind in kinds:
        length, begin = (30, now)
        name = {"P": "prefill 128 tokens", "D": "decode 8 rows"}[kind]
        count = 9 if kind == "P" else 3
        for at in range(count):
            launch = trace.call("cudaLaunchKernel", now + 5 * US * at, 2 * US)
            trace.kernel("abc"[at % 3], begin + 60 * US + length * US * at, length * US, launch)
        end = begin + 60 * US + length * US * count
        trace.host("user_annotation", name, now - US, 5 * US * count)
        steps.append((begin + 60 * US, end))
        copy = trace.call("cudaMemcpyAsync", now + 5 * US * count, US)
        trace.copy("Memcpy DtoH (Device -> Pinned)", end + US, US, copy, COPY_OUT)
        now += apart
    return trace, steps


@pytest.mark.parametrize("kinds", ["PDDDPDDDDPDDD", "PPPDDDDDDDDDD", "PDPDD"])
@pytest.mark.parametrize("results", [True, False])
def test_two_kinds_of_annotation_are_steps_together(tmp_path, kinds, results):
    """3 of prefill and 10 of decode are 13 steps: neither covers nine tenths of the work."""
    trace, steps = annotated(kinds)
    trace.events = [event for event in trace.events if results or "emcpy" not in event["name"]]
    report = read(trace, tmp_path)
    first = steps[0][0]
    assert steps_ns(report) == [(start - first, end - first) for start, end in steps]


def test_parts_of_a_step_that_follow_each_other_are_no_steps(tmp_path):
    trace = engine(graphs=False, steps=8, kernels=8)
    launches = [event for event in trace.events if event["name"] in ("cudaLaunchKernel", "cuLaunchKernelEx")]
    for step in range(8):
        for part, name in enumerate(("forward", "sample")):
            begin, end = launches[8 * step + 4 * part], launches[8 * step + 4 * part + 3]
            trace.host("user_annotation", name, begin["ts"], end["ts"] + end["dur"] - begin["ts"])
    report = read(trace, tmp_path)
    assert len(report.steps) == 8
    assert "device-to-host" in report.how_steps


def test_of_an_engines_annotations_in_one_another_the_outer_ones_are_steps(tmp_path):
    """SGLang's step holds another annotation that looks like a step; a third one is around the whole run."""
    trace = engine(graphs=False, steps=8, annotation="execute_context_0(0)_generation_{}")
    inner = [event for event in trace.events if event["name"].startswith("execute")]
    for number, event in enumerate(inner):
        trace.host("user_annotation", f"step[DECODE bs={number}]", event["ts"], event["dur"])
        event["ts"], event["dur"] = event["ts"] + 1, event["dur"] - 2
    trace.host("user_annotation", "run", 0, max(event["ts"] + event["dur"] for event in inner) + 9)
    report = read(trace, tmp_path)
    assert len(report.steps) == 8
    assert "'step[DECODE bs=#]'" in report.how_steps


def test_kernels_whose_launch_was_not_recorded_go_to_the_step_beside_them(tmp_path):
    """A third of the launches is missing, as in public traces of the H100: annotations are still steps."""
    trace = engine(graphs=False, steps=9, kernels=9, annotation="ProfilerStep#{}")
    expected = steps_ns(read(trace, tmp_path))
    for event in [event for event in trace.events if event.get("cat") == "cuda_driver"]:
        trace.events.remove(event)
    report = read(trace, tmp_path)
    assert "9 annotations 'ProfilerStep#'" in report.how_steps
    assert steps_ns(report) == expected

"""Profilers lose events, and whole replays of graphs. The idle figure of such a trace is that of the whole trace, or it
is refused."""

from __future__ import annotations

import functools
import gzip
import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.make_trace import US, Trace, engine
from support.traces import read

from asyncbatch.profile.traces.analysis import report_on
from asyncbatch.profile.traces.events import Events, TraceError
from asyncbatch.profile.traces.page import write_trace
from asyncbatch.profile.traces.read import busy_in, read_trace
from asyncbatch.profile.traces.report import TraceReport

FOLDER = Path(__file__).parent / "traces"
NAMES = ("asyncbatch-async", "asyncbatch-sync", "transformers-async", "transformers-sync")
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@functools.cache
def events_of(name: str) -> tuple[list[dict], list[dict]]:
    """The timed events of a real trace: (those of the device in order of start, all others)."""
    text = gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes())
    events = [event for event in json.loads(text, parse_float=str)["traceEvents"] if event["ph"] == "X"]
    device = sorted((event for event in events if event["cat"] in DEVICE), key=lambda event: float(event["ts"]))
    return device, [event for event in events if event["cat"] not in DEVICE]


def report(name: str, device: list[dict], others: list[dict]) -> TraceReport:
    events = Events()
    for event in [*device, *others]:
        events.add(event)
    return report_on(name, events)


@functools.cache
def whole(name: str) -> TraceReport:
    return report(name, *events_of(name))


def launches(name: str) -> list[int]:
    return [event["args"]["correlation"] for event in events_of(name)[1] if event["name"] == "cudaGraphLaunch"]


def without_launches(name: str, lost: set[int]) -> TraceReport:
    device, others = events_of(name)
    return report(name, [event for event in device if event["args"]["correlation"] not in lost], others)


def assert_whole_or_refused(name: str, found: TraceReport) -> None:
    expected = whole(name)
    for key in ("step_active", "kernel_busy_in_steps"):
        value = getattr(found, key)
        assert value is None or value == pytest.approx(getattr(expected, key), abs=2e-3), key
    if found.coverage.complete:
        assert found.step_active is not None
    else:
        assert (found.kernel_busy, found.step_active, len(found.gaps)) == (None, None, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_trace_is_known_to_be_whole(name):
    coverage = whole(name).coverage
    assert coverage.complete
    assert coverage.known
    assert coverage.calls["graph launches"] == len(launches(name))
    assert (coverage.missing, coverage.early, coverage.problems()) == ({}, 0, [])
    assert "All that was launched has events of the device" in str(whole(name))


@pytest.mark.parametrize("lost", [1, 5, 9])
def test_launches_without_device_events_are_counted_and_no_figure_is_given(lost, tmp_path):
    """What was told before: idle 43.0 % without 5 of 10 launches, and 30 steps, 99.2 % active, without 9."""
    found = without_launches("asyncbatch-async", set(launches("asyncbatch-async")[1 : 1 + lost]))
    assert found.coverage.missing == {"graph launches": lost}
    text = " ".join(str(found).split())
    assert f"How idle Not told: {lost} of 10 graph launches have no event of the device" in text
    assert "Record fewer steps" in text
    assert "step active not measured" in text
    data = found.as_dict()
    assert (data["idle"], data["step_active"], data["kernel_busy"], data["longest_gaps"]) == (None, None, None, [])
    assert data["coverage"]["without_device_events"] == {"graph launches": lost}
    with pytest.raises(TraceError, match=f"does not tell how busy the device was: {lost} of 10 graph launches"):
        busy_in(found)
    write_trace(tmp_path, found)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h1>How idle the device was is not told: events are missing from this trace</h1>" in page
    assert not re.search(r"(active|idle) \d", page), "the captions of a timeline"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


@given(st.sampled_from(NAMES), st.data())
@settings(max_examples=25, deadline=None)
def test_lost_launches_never_give_a_wrong_figure(name, data):
    lost = data.draw(st.sets(st.sampled_from(launches(name)), min_size=1, max_size=len(launches(name)) - 1))
    found = without_launches(name, lost)
    assert found.step_active is None
    assert found.coverage.missing == {"graph launches": len(lost)}


@given(st.sampled_from(NAMES), st.sampled_from([1e-4, 5e-4, 0.002, 0.02, 0.2, 0.5, 0.9, 0.99]), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_single_lost_events_of_the_device_never_give_a_wrong_figure(name, chance, seed):
    dice = random.Random(seed)
    device, others = events_of(name)
    kept = [event for event in device if dice.random() >= chance]
    if any(event["cat"] == "kernel" for event in kept):
        assert_whole_or_refused(name, report(name, kept, others))


@given(st.sampled_from(NAMES), st.floats(0, 1), st.floats(0, 0.6))
@settings(max_examples=40, deadline=None)
def test_a_lost_buffer_of_events_never_gives_a_wrong_figure(name, begin, part):
    device, others = events_of(name)
    first, count = int(begin * len(device)), int(part * len(device))
    assert_whole_or_refused(name, report(name, device[:first] + device[first + count :], others))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("end", ["first", "last", "middle"])
def test_a_part_of_the_only_launch_of_its_kind_is_missed(name, end):
    """The first launch is the prefill, like no other: what it lost cannot be counted, but it leaves a hole."""
    device, others = events_of(name)
    rows = [at for at, event in enumerate(device) if event["args"]["correlation"] == launches(name)[0]]
    part = len(rows) // 4
    lost = set({"first": rows[:part], "last": rows[-part:], "middle": rows[part : 2 * part]}[end])
    found = report(name, [event for at, event in enumerate(device) if at not in lost], others)
    assert_whole_or_refused(name, found)
    if end != "first":  # what is lost at the beginning of the first step is before the window
        assert not found.coverage.complete
        assert "nothing ran beside a graph launch" in found.coverage.problems()[0]


@given(st.sampled_from(NAMES), st.sampled_from([0.001, 0.05, 0.5]), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_lost_events_of_the_host_too_never_give_a_wrong_figure(name, chance, seed):
    dice = random.Random(seed)
    device, others = ([event for event in events if dice.random() >= chance] for events in events_of(name))
    if any(event["cat"] == "kernel" for event in device):
        assert_whole_or_refused(name, report(name, device, others))


# ---- small traces ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph_ids", [True, False])
def test_a_launch_that_brings_a_part_of_what_the_others_bring_is_counted(tmp_path, graph_ids):
    trace = engine(steps=6, kernels=8)
    kernels = [event for event in trace.events if event["cat"] == "kernel"]
    for event in kernels if not graph_ids else ():
        del event["args"]["graph id"]
    assert read(trace, tmp_path).coverage.complete
    trace.events = [event for event in trace.events if event not in (kernels[10], kernels[11], kernels[20])]
    coverage = read(trace, tmp_path).coverage
    assert (coverage.partial, coverage.missing) == (2, {})
    assert coverage.problems() == ["2 of 6 graph launches lack a part"]


def test_a_graph_that_was_launched_once_lacks_nothing_though_its_kernels_are_some_of_another_one_s(tmp_path):
    """The caller knows which graph each launch was: here one of 6 kernels, and then one of 8, five times."""
    trace = engine(steps=6, kernels=8)
    kernels = [event for event in trace.events if event["cat"] == "kernel"]
    for event in kernels:
        del event["args"]["graph id"]
    path = tmp_path / "trace.json"
    trace.events = [event for event in trace.events if event not in kernels[6:8]]
    trace.save(path)
    assert read_trace(path).coverage.partial == 1, "by the trace alone it looks as if two were lost"
    assert read_trace(path, graphs=[1, 2, 2, 2, 2, 2]).coverage.complete
    assert read_trace(path, graphs=[2, 2, 2, 2, 2, 2]).coverage.partial == 1
    assert read_trace(path, graphs=[1, 2, 2]).coverage.partial == 1, "numbers that do not fit the launches tell nothing"
    trace.events.remove(kernels[30])
    trace.save(path)
    assert read_trace(path, graphs=[1, 2, 2, 2, 2, 2]).coverage.partial == 1


def test_kernels_and_copies_without_an_event_are_counted_by_kind(tmp_path):
    trace = engine(steps=6, graphs=False)
    kernels = [event for event in trace.events if event.get("cat") == "kernel"]
    copies = [event for event in trace.events if event.get("cat") == "gpu_memcpy"]
    trace.events = [event for event in trace.events if event not in (kernels[7], copies[2], copies[5])]
    coverage = read(trace, tmp_path).coverage
    assert coverage.missing == {"kernel launches": 1, "copies": 2}
    assert coverage.problems() == [
        "1 of 48 kernel launches have no event of the device",
        "2 of 12 copies have no event of the device",
    ]


def test_what_is_launched_while_a_graph_is_captured_runs_nothing_and_is_not_missed(tmp_path):
    trace = engine(steps=6, start=1000 * US)
    expected = read(trace, tmp_path).as_dict()
    for thread in (1, 2):  # the other thread's launches, in between, are none of the capture
        trace.host("cuda_runtime", "cudaStreamBeginCapture", 100 * US, 2 * US, tid=thread, correlation=1)
        for at in range(5):
            trace.call("cudaLaunchKernel", (110 + 10 * at) * US, 4 * US, tid=thread)
        trace.host("cuda_runtime", "cudaStreamEndCapture", 200 * US, 2 * US, tid=thread, correlation=2)
    found = read(trace, tmp_path)
    assert found.coverage.complete
    assert found.as_dict()["idle"] == expected["idle"]
    trace.call("cudaLaunchKernel", 210 * US, 4 * US, tid=1)
    trace.call("cudaLaunchKernel", 150 * US, 4 * US, tid=3)
    assert read(trace, tmp_path).coverage.missing == {"kernel launches": 2}


def test_memsets_of_nothing_are_not_missed(tmp_path):
    trace = engine(steps=6)
    trace.call("cudaMemsetAsync", 40 * US, 3 * US)
    assert read(trace, tmp_path).coverage.complete


def test_without_calls_of_the_runtime_it_says_that_nothing_can_be_known(tmp_path):
    trace = engine(steps=30)
    trace.events = [event for event in trace.events if event.get("cat") not in ("cuda_runtime", "cuda_driver")]
    found = read(trace, tmp_path)
    assert not found.coverage.known
    assert found.step_active is not None
    assert "To be believed Unknown: the trace has no calls of the runtime" in " ".join(str(found).split())


def test_a_device_that_begins_before_the_launch_has_another_clock(tmp_path):
    """All device times 60 us early: the gaps are as long as before, and what the host did in them is not told."""
    trace = engine(steps=30, start=1000 * US)
    expected = read(trace, tmp_path)
    for event in trace.events:
        if event.get("cat") in DEVICE:
            event["ts"] -= 60 * US
    found = read(trace, tmp_path)
    assert found.step_active == expected.step_active
    assert found.coverage.early > 30
    assert found.coverage.early_ms == pytest.approx(0.053)
    assert found.overlap is None
    text = " ".join(str(found).split())
    assert "The clocks of host and device disagree" in text
    assert "Why Not told: by its clock the device begins before the host launches" in text


def test_a_short_trace_of_graphs_that_are_all_different_cannot_be_checked(tmp_path):
    trace, now = Trace(), 0
    for number in range(4):
        launch = trace.call("cudaGraphLaunch", now, 5)
        for at, name in enumerate("abcd"):
            trace.kernel(f"{name}{number}", now + 10 + 20 * at, 20, launch)
        now += 200
    found = read(trace, tmp_path)
    assert found.coverage.problems() == [
        "only 0 of 4 graph launches brought the same kernels as another one, so that missing ones would not be seen"
    ]
    assert found.step_active is None

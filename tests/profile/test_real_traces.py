"""`--trace` on what torch.profiler wrote of real runs on a GPU, of this engine and of transformers.

The same runs were timed by events around each step (`traces/events.json`; `traces/record.py` says how both were made).
Two methods that know nothing of each other have to tell of the same steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from asyncbatch.profile.traces.read import busy_in, read_trace
from asyncbatch.timeline import device_activity

FOLDER = Path(__file__).parent / "traces"
EVENTS = json.loads((FOLDER / "events.json").read_text())["runs"]


@pytest.fixture(scope="module", params=sorted(EVENTS))
def run(request):
    """(name, the report of its trace, [N, 2] microseconds of its steps by events)."""
    events = EVENTS[request.param]
    times = np.column_stack([events["starts_us"], events["ends_us"]])
    return request.param, read_trace(FOLDER / f"{request.param}.json.gz"), times


def test_the_steps_are_those_of_the_events_to_the_microsecond(run):
    name, report, events = run
    assert "graph launches" in report.how_steps
    assert len(report.steps) == len(events) == (11 if name == "transformers-async" else 10)
    # A step ends with its last kernel and its end event: both clocks tell the same time from one end to the next.
    np.testing.assert_allclose(1e6 * np.diff(report.steps[:, 1]), np.diff(events[:, 1]), atol=1)
    # It begins with its start event, then its launch, then its first kernel.
    early = (events[:, 1] - events[:, 0]) - 1e6 * (report.steps[:, 1] - report.steps[:, 0])
    assert early.min() > 0
    if name.endswith("-async"):
        assert np.median(early) < 10, "the launch came while the step before was still computed"
    else:
        assert np.median(early) > 500, "the idle stream's event was passed long before the profiled launch arrived"


def test_idle_and_busy_are_told_apart_and_add_up(run):
    name, report, events = run
    start, end = float(report.steps[0, 1]), float(report.steps[-1, 1])
    between, inside = report.idle_s["between steps"], report.idle_s["inside steps"]
    assert report.step_active == pytest.approx(1 - between / (end - start))
    by_events, period = device_activity(events[:, 0], events[:, 1])
    assert report.step_active <= by_events / period
    if name.endswith("-async"):
        assert report.step_active > 0.99
        assert report.step_active == pytest.approx(by_events / period, abs=0.01)
    assert report.kernel_busy_in_steps == busy_in(report, start, end)
    # (A gap inside a step may lie in the first one, before the window.)
    assert report.kernel_busy_in_steps >= report.step_active - inside / (end - start)
    assert sum(report.idle_by_cause().values()) == pytest.approx(between + inside)


def test_the_host_launches_while_the_synchronous_device_waits(run):
    name, report, _ = run
    causes = report.idle_by_cause(inside=False)
    if name.endswith("-sync"):
        assert next(iter(causes)) == "cudaGraphLaunch"
    assert report.gpu == "NVIDIA H200"
    assert report.graph_launches.calls == len(report.steps)
    assert report.graph_launches.kernels > 0.99 * report.num_kernels

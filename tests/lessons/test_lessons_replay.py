"""Notebook 06's replay of a recorded H200: its times are those that follow by hand, and a promise is kept."""

from __future__ import annotations

import numpy as np
import pytest

from asyncbatch.kv_cache import KVCache
from asyncbatch.lessons import measuring, replay
from asyncbatch.measure.recording import Recording


def test_a_synchronous_replay_idles_for_the_hosts_work_and_an_asynchronous_one_does_not():
    costs = Recording.load(replay.NAME).costs(replay.ROWS)
    host_s = costs.plan + costs.fill + costs.launch + costs.commit
    for loop, idle_s in (("sync", host_s), ("async", 0.0)):
        _, _, starts, ends = measuring.replayed(loop).lane("compute")
        assert len(starts) > 60
        gaps = (starts[1:] - ends[:-1])[8:-2]  # between decode steps
        assert gaps == pytest.approx(np.full(len(gaps), idle_s), abs=1e-9)
    with pytest.raises(ValueError, match="no loop 'both'; there are sync, async"):
        measuring.replayed("both")


def test_copies_count_as_busy():
    run = measuring.replayed("sync", copy_in=1e-4, copy_out=2e-4)
    starts, ends = measuring.intervals(run)
    steps = len(run.steps)
    assert len(starts) == 3 * steps
    _, _, begins, stops = run.lane("compute")
    assert (ends - starts).sum() == pytest.approx((stops - begins).sum() + steps * 3e-4)


def test_without_its_culprit_the_sent_trace_takes_as_long_as_promised():
    sent = measuring.sent_trace()
    parts = ("schedule", "fill buffers", "step launch", "commit")
    told = {part: measuring.without(sent, part) for part in parts}
    assert all(
        text.startswith(f"now {1e3 * sent.summary().wall_s:.1f} ms; without {part}") for part, text in told.items()
    )
    wall_ms = 1e3 * measuring.replayed("sync", fill=0.0).summary().wall_s
    assert f"without fill buffers {wall_ms:.1f} ms, which is 26.9% less" in told["fill buffers"]
    saved = {part: float(text.split()[-2].rstrip("%")) for part, text in told.items()}
    assert [part for part in parts if saved[part] > 2] == ["fill buffers"]
    assert measuring.without(sent, "filling") == (
        "'filling' is no part of the host's work; these are: commit, fill buffers, schedule, step launch"
    )


def test_a_comparison_that_noise_has_spoiled_says_so_and_goes_on():
    slow, fast = (measuring.replayed("sync", fill=seconds) for seconds in (2e-3, 1e-5))
    told = measuring.compared(slow, fast)
    assert "2.000 ms before, 0.010 ms after" in told
    assert "Disturbed" not in told
    assert "Disturbed, run me again" in measuring.compared(fast, slow)


def test_the_mended_code_runs_in_the_batcher_of_this_machine():
    calls = []

    def tables(self, owners):
        calls.append(len(owners))
        return KVCache.tables(self, owners)

    run = measuring.on_your_host(tables)
    assert run.summary().tokens == 32 * 64
    assert len(calls) >= len(run.steps) - 8
    assert max(calls) == 32


def test_the_recorded_gaps_are_those_of_one_row():
    gaps_ms, device_ms = measuring.recorded_gaps()
    assert len(gaps_ms) == len(device_ms) > 100
    assert round(float(gaps_ms.max())) == 322
    assert 4.5 < np.median(device_ms) < 4.9

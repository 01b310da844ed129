"""The recorded pair on a virtual clock: the same everywhere, and what the law says of its times."""

from __future__ import annotations

import numpy as np
import pytest

from asyncbatch.measure.recording import Recording
from asyncbatch.tour import replay


@pytest.fixture(scope="module")
def timelines():
    return replay.replay(6)


def test_in_turns_every_gap_is_the_hosts_work_as_it_was_recorded(timelines):
    """The medians of plan, fill, launch and commit of the recorded synchronous run, added up by hand: 51.3, 65.6, 62.4
    and 76.6 us."""
    _, steps, starts, ends = timelines[0].lane("compute")
    decode = {step.step for step in timelines[0].steps if step.kind == "decode"}
    gaps = [gap for number, gap in zip(steps[1:], starts[1:] - ends[:-1], strict=True) if number in decode]
    assert len(gaps) >= 3
    assert np.allclose(gaps, 255.9e-6, atol=1e-9)


def test_overlapped_the_device_is_never_idle_and_both_loops_run_steps_of_the_recorded_length(timelines):
    sync, other = timelines
    _, _, starts, ends = other.lane("compute")
    assert np.allclose(starts[1:], ends[:-1], atol=1e-9)
    times = Recording.load(replay.RECORDING).step_times(replay.ROWS, replay.MODEL)
    for timeline in timelines:
        _, steps, starts, ends = timeline.lane("compute")
        kinds = {step.step: step for step in timeline.steps}
        for number, seconds in zip(steps.tolist(), ends - starts, strict=True):
            step = kinds[number]
            if step.kind == "decode" and step.rows == replay.ROWS:
                assert seconds == pytest.approx(times("decode", step.context))
    assert sync.summary().tokens == other.summary().tokens == 6 * replay.ROWS
    assert sync.summary().wall_s > other.summary().wall_s

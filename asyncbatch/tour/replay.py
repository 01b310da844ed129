"""A recorded pair of runs, run again: today's loops on a virtual clock, with the times of that GPU and its host.

A step takes as long as it took there, and each part of the host's work as long as it took in the recorded run of the
same loop (medians). So it is the same on every machine, however busy that is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..batcher import AsyncBatcher, SyncBatcher
from ..devices.virtual import HOST_PHASES, Costs
from ..measure.recording import Recording
from ..profile.options import each_of
from ..profile.report import OWN
from ..request import Request
from ..timeline import Timeline

RECORDING, MODEL, ROWS = "h200-sweep-1b", "random:llama-1b", 128  # short steps beside much of the host's work
WORDS = f"a 1B model, {ROWS} requests at a time"


def recorded_run(recording: Recording, mode: str) -> dict[str, Any]:
    """This package's recorded run in one loop, of `MODEL` and `ROWS`."""
    same = {"engine": OWN, "mode": mode, "model": MODEL, "batch_size": ROWS}
    return next(run for run in recording.runs if all(run[key] == value for key, value in same.items()))


def costs(recording: Recording, mode: str) -> Costs:
    """The recorded GPU's steps, and the host's work in the recorded run of this loop."""
    phases = recorded_run(recording, mode)["phase_us"]
    return replace(recording.costs(ROWS, MODEL), **{name: 1e-6 * phases[name] for name in HOST_PHASES})


def replay(new_tokens: int) -> tuple[Timeline, Timeline]:
    """(synchronous, asynchronous): the first `new_tokens` of the recorded requests. RuntimeError if one of them fails,
    which none does."""
    recording = Recording.load(RECORDING)
    run = recorded_run(recording, "sync")
    requests = [Request([1] * run["prompt_tokens"], new_tokens, stop_token_ids=())] * ROWS
    options = {
        "max_batch_size": ROWS,
        "max_length": run["prompt_tokens"] + new_tokens,
        "prefill_tokens": each_of(run["prefill_tokens"]),
        "step_s": 0.0,
    }
    timelines = []
    for loop in (SyncBatcher, AsyncBatcher):
        with loop(recording.stand_in_model(MODEL), clock=costs(recording, loop.mode), **options) as batcher:
            errors = [one.error for one in batcher.run(requests) if one.error is not None]
        if errors:
            raise RuntimeError(f"the recording could not be run again: {errors[0]}")
        timelines.append(batcher.timeline)
    return timelines[0], timelines[1]

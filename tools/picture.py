"""Draw docs/timeline.png, the picture of the README: both loops on a recorded GPU.

    python tools/picture.py            write it, and print what it shows
    python tools/picture.py FILE.png   write it there

The loops are today's code. The clock is virtual: a step takes as long as it took on the recorded GPU, and each part of
the host's work as long as that host took for it in the same loop (medians), so the picture is the same in every run.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from asyncbatch import AsyncBatcher, Request, SyncBatcher
from asyncbatch.devices.virtual import HOST_PHASES, Costs
from asyncbatch.measure.recording import Recording
from asyncbatch.pictures import plot

PICTURE = Path(__file__).parent.parent / "docs" / "timeline.png"
RECORDING, MODEL, ROWS, NEW_TOKENS = "h200-sweep-128", "random:llama-1b", 128, 64


def costs(recording: Recording, mode: str) -> Costs:
    """The recorded GPU's steps, and the host's work in the recorded run of this loop."""
    same = {"engine": "asyncbatch", "mode": mode, "model": MODEL, "batch_size": ROWS}
    (run,) = [one for one in recording.runs if all(one[key] == value for key, value in same.items())]
    return replace(recording.costs(ROWS, MODEL), **{name: 1e-6 * run["phase_us"][name] for name in HOST_PHASES})


def main() -> int:
    recording = Recording.load(RECORDING)
    run = recording.main_run(MODEL)
    requests = [Request([1] * run["prompt_tokens"], NEW_TOKENS, stop_token_ids=())] * ROWS
    options = dict(
        max_batch_size=ROWS,
        max_length=run["prompt_tokens"] + NEW_TOKENS,
        prefill_tokens=run["prefill_tokens"],
        step_s=0.0,
    )
    timelines = []
    for loop in (SyncBatcher, AsyncBatcher):
        with loop(recording.stand_in_model(MODEL), clock=costs(recording, loop.mode), **options) as batcher:
            completions = batcher.run(requests)
        assert all(one.error is None for one in completions)
        timelines.append(batcher.timeline)
        print(f"{loop.mode}: idle {1 - batcher.timeline.summary().device_active:.1%}")
    title = f"{recording.gpu['name']}, 1B shape, {ROWS} requests at a time, as recorded"
    target = Path(sys.argv[1]) if sys.argv[1:] else PICTURE
    plot(*timelines, title=title).savefig(target)
    print(target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

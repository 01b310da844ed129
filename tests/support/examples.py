"""Runs on the virtual clock, written down: tokens and times of both loops on the toy model, whose tokens are exact.

    python tests/support/examples.py FILE        # writes them; `test_examples.py` compares the committed ones

The committed file was made by the code before the package got its folders. Every part that may be rebuilt is in it:
both loops, one to four slots, small pools (preemption), chunks of prompts, several batch sizes, sampling, stop tokens,
cancelled requests, a jittery clock, a busier host and the race checker.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from asyncbatch import AsyncBatcher, SyncBatcher
from asyncbatch.devices.virtual import Costs, StepWork
from asyncbatch.models.toy import toy_llama
from asyncbatch.ordering.toy import use_toy_model
from asyncbatch.ordering.trials import workload


def step_s(work: StepWork) -> float:
    return 1e-3 * (1 + 0.1 * work.rows + 0.003 * work.context + 0.05 * work.num_prefill_tokens)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "small pool": {"num_blocks": 16},
    "one row": {"max_batch_size": 1, "prefill_tokens": 4},
    "three slots": {"num_slots": 3, "clock": Costs(step=step_s, copy_in=0.5e-3, copy_out=0.7e-3)},
    "four slots, small pool": {"num_slots": 4, "num_blocks": 20, "clock": Costs(step=0.3e-3)},
    "sizes": {"batch_sizes": (1, 2), "clock": Costs(step=step_s, jitter=0.5, seed=3)},
    "busy host": {"host_work_s": 2e-3, "clock": Costs(step=step_s, jitter=0.2)},
    "checked": {"check_races": True, "num_blocks": 18, "clock": Costs(step=step_s)},
}
LOOPS = {"sync": SyncBatcher, "async": AsyncBatcher}


def example(name: str, mode: str) -> dict[str, Any]:
    """What one case gives: tokens, reasons and times of the completions, spans and steps of the timeline."""
    options = {"clock": Costs(step=2e-3), "max_batch_size": 4, "block_size": 4, "num_blocks": 40, "max_length": 64}
    options |= {"prefill_tokens": 16, **CASES[name]}
    with LOOPS[mode](toy_llama(), **options) as batcher:
        use_toy_model(batcher)
        completions = batcher.run(workload(len(name)))
        spans = [list(span) for span in batcher.timeline.spans]
        steps = [list(step) for step in batcher.timeline.steps]
        ended = batcher.timeline.summary().wall_s
        stream = batcher.stream(workload(8)[2])
        streamed = [next(stream)]
        handles = [batcher.submit(request) for request in workload(7)[:6]]
        streamed += [next(stream), next(stream)]
        batcher.cancel(handles[0])
        batcher.cancel(handles[5])
        handles[1].result()
        batcher.cancel(handles[2])
        stream.close()
        completions += [handle.result() for handle in handles]
    return {
        "tokens": [completion.token_ids for completion in completions],
        "reasons": [completion.finish_reason for completion in completions],
        "first_token_s": [completion.first_token_s for completion in completions],
        "finished_s": [completion.finished_s for completion in completions],
        "streamed": streamed,
        "wall_s": ended,
        "spans": spans,
        "steps": steps,
    }


def examples() -> dict[str, Any]:
    return {f"{name}, {mode}": example(name, mode) for name in CASES for mode in LOOPS}


if __name__ == "__main__":
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in examples().items())
    Path(sys.argv[1]).write_text(f"{{\n{text}\n}}\n", encoding="utf-8")

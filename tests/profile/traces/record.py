"""How the traces of this folder were made, on one NVIDIA H200, 2026-11-25, with torch 2.11.0 and transformers 5.23.0:

    PYTHONPATH=. python tests/profile/traces/record.py FOLDER

Each is torch.profiler's own file of one warm run: 4 requests of 16 prompt and 10 new tokens, the 0.6B shape with random
weights, bfloat16. `events.json` holds the same runs' steps as the events around them timed them, in microseconds from
the first one's start: the other method, against which `test_real_traces.py` holds what `--trace` reads.

(The traces come from a longer form of this script, which also profiled the CPU. This form ran on an H200 only until a
time limit of 60 s came, and had written the two traces of asyncbatch by then.)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from asyncbatch import AsyncBatcher, Request, SyncBatcher, load_model
from asyncbatch.profile.peers.batcher import TransformersBatcher

LIMITS = dict(max_batch_size=4, max_length=64)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model, _ = load_model("random:llama-0.6b", device="cuda")
    requests = [Request([1 + n] * 16, 10, stop_token_ids=()) for n in range(4)]
    opened = {
        "asyncbatch-sync": lambda: SyncBatcher(model, **LIMITS),
        "asyncbatch-async": lambda: AsyncBatcher(model, **LIMITS),
        "transformers-sync": lambda: TransformersBatcher(model, mode="sync", **LIMITS),
        "transformers-async": lambda: TransformersBatcher(model, mode="async", **LIMITS),
    }
    runs = {}
    for name, open_batcher in opened.items():
        with open_batcher() as batcher:
            for _ in range(2):
                batcher.run(requests)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                batcher.run(requests)
            profiler.export_chrome_trace(str(folder / f"{name}.json.gz"))
            _, _, starts, ends = batcher.timeline.lane("compute")
            times = {key: [round(1e6 * (t - starts[0]), 1) for t in each] for key, each in
                     (("starts_us", starts), ("ends_us", ends))}  # fmt: skip
            runs[name] = {"setting": getattr(batcher, "setting", None), **times}
    found = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "runs": runs}
    (folder / "events.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

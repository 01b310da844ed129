"""What tests/ranks/test_ranks_cuda.py runs under torchrun, on each of the GPUs: prints one line of JSON on rank 0."""

from __future__ import annotations

import faulthandler
import json
import os
import sys

import torch

from asyncbatch import AsyncBatcher, Request, SamplingParams, SyncBatcher, load_model
from asyncbatch.ranks.world import join

PROMPTS = [[1 + i, 2, 3 + i, 7] * (3 + 40 * i) for i in range(6)]


def requests(new: int = 24) -> list[Request]:
    sampling = [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9, seed=5)]
    return [Request(prompt, new + 3 * i, sampling=sampling[i % 2]) for i, prompt in enumerate(PROMPTS)]


def main(name: str, compile: bool) -> None:
    faulthandler.dump_traceback_later(240, exit=True)
    size = int(os.environ["WORLD_SIZE"])
    told: dict = {}
    with join(size, on_cuda=True, name=name) as world:
        model, _ = load_model(name, device="cuda", dtype=torch.float32, tp=size, progress=False)
        # transformers' own forward of the sharded model, for the first token of each prompt
        with torch.inference_mode():
            first = [int(model(torch.tensor([p], device="cuda")).logits[0, -1].argmax()) for p in PROMPTS]
        for kind in (SyncBatcher, AsyncBatcher):
            with kind(model, max_batch_size=4, max_length=1024, num_blocks=200, compile=compile) as batcher:
                told["graphs"] = len(batcher.device.program.graphs)
                if world.leads:
                    told[kind.mode] = [c.token_ids for c in batcher.run(requests())]
                else:
                    batcher.follow()
            told["digest", kind.mode] = batcher.lockstep.digest
        digests = world.gather([told["digest", mode] for mode in ("sync", "async")])
        if world.leads:
            whole, _ = load_model(name, device="cuda", dtype=torch.float32, progress=False)
            with AsyncBatcher(whole, max_batch_size=4, max_length=1024, num_blocks=200, compile=compile) as batcher:
                alone = [c.token_ids for c in batcher.run(requests())]
            line = {"sync": told["sync"], "async": told["async"], "alone": alone, "first": first, "digests": digests}
            print("TOLD " + json.dumps(line | {"graphs": told["graphs"]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "compile")

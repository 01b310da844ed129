"""One replica for tests, started by torchrun: a tiny model on a CPU, requests of uneven lengths, and a watch. Rank 0
writes what it got, of both batchers, to FOLDER/answers.json, or, where a rank was lost, what is finished.

    torchrun --nproc-per-node 2 rank_replicas.py FOLDER {serve,kill,raise}
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from asyncbatch import AsyncBatcher, Request, SyncBatcher
from asyncbatch.ranks.replicas import Replicas
from asyncbatch.ranks.watch import Watch

OPTIONS = {"max_batch_size": 2, "block_size": 4, "max_length": 64, "prefill_tokens": 8}
REQUESTS = [Request([number + 1, 2, 3], 3 + 5 * number % 17, stop_token_ids=()) for number in range(12)]
FAULTY = 1  # the rank that does not go on


def write(path: Path, answers) -> None:
    kept = [(answer.finish_reason, list(answer.token_ids), str(answer.error)) for answer in answers]
    path.write_text(json.dumps(kept), encoding="utf-8")


def main(folder: Path, fault: str) -> None:
    from support.tiny import tiny_model

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    port = int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=timedelta(seconds=240))
    store.set(f"pid/{rank}", str(os.getpid()))
    names = [f"here, pid {store.get(f'pid/{one}').decode()}" for one in range(size)]
    watch = Watch(store, rank, size, names, 600.0, group=rank)
    replicas = Replicas(store, rank, size, watch=watch)
    if rank == 0:
        watch.on_lost = lambda error: write(folder / "answers.json", replicas.so_far(error))
    requests = [*REQUESTS]
    if fault != "serve":  # long enough to be under way when a rank is lost; the short ones are finished then
        requests += [Request([5], 60, stop_token_ids=())] * 400
    with watch:
        answers = []
        for kind in (SyncBatcher, AsyncBatcher):
            with kind(tiny_model(), **OPTIONS) as batcher:
                if rank == FAULTY and fault != "serve":
                    break_after(batcher, fault)
                answers += replicas.serve(batcher, requests)
        if rank == 0:
            write(folder / "answers.json", answers)


def break_after(batcher, fault: str, steps: int = 100) -> None:
    step = batcher.step

    def broken() -> bool:
        if batcher.scheduler.num_steps >= steps:
            if fault == "raise":
                raise MemoryError("planted in a step")
            os.kill(os.getpid(), signal.SIGKILL)
        return step()

    batcher.step = broken


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

"""One replica for tests, on each rank: a tiny model on a CPU, requests of uneven lengths, and a watch. Rank 0 writes
what it got, of both batchers, to FOLDER/answers.json, or, where a rank was lost, what is finished. Standard error goes
to FOLDER/stderr-RANK, and the processes of a rank are noted in FOLDER/processes-RANK."""

from __future__ import annotations

import json
import os
import signal
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from asyncbatch import AsyncBatcher, Request, SyncBatcher
from asyncbatch.devices.process import DeviceProcess
from asyncbatch.ranks.neighbour import _fields
from asyncbatch.ranks.replicas import Replicas
from asyncbatch.ranks.watch import Watch

OPTIONS = {"max_batch_size": 2, "block_size": 4, "max_length": 64, "prefill_tokens": 8}
REQUESTS = [Request([number + 1, 2, 3], 3 + 5 * number % 17, stop_token_ids=()) for number in range(12)]
FAULTY = 1  # the rank that does not go on


def write(path: Path, answers) -> None:
    kept = [(answer.finish_reason, list(answer.token_ids), str(answer.error)) for answer in answers]
    path.write_text(json.dumps(kept), encoding="utf-8")


def main(folder: Path, fault: str) -> None:
    """fault: "serve" (none), "kill" or "raise"."""
    from support.tiny import tiny_model

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with (folder / f"stderr-{rank}").open("w") as stderr:
        os.dup2(stderr.fileno(), 2)
    note(folder, rank, os.getpid())
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
                note(folder, rank, *[worker.process.pid for worker in DeviceProcess._of.values()])
                if rank == FAULTY and fault != "serve":
                    break_after(batcher, fault)
                answers += replicas.serve(batcher, requests)
        if rank == 0:
            write(folder / "answers.json", answers)


def note(folder: Path, rank: int, *pids: int) -> None:
    """That these processes belong to the rank, with when they began: a number may be given to another later."""
    with (folder / f"processes-{rank}").open("a", encoding="utf-8") as file:
        file.writelines(f"{pid} {_fields(pid)[-1]}\n" for pid in pids)


def break_after(batcher, fault: str, steps: int = 100) -> None:
    step = batcher.step

    def broken() -> bool:
        if batcher.scheduler.num_steps >= steps:
            if fault == "raise":
                raise MemoryError("planted in a step")
            os.kill(os.getpid(), signal.SIGKILL)
        return step()

    batcher.step = broken

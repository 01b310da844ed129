"""What ranks do in the tests, by function: each runs in a process of its own, started by `ranks.launch.on_ranks`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from asyncbatch import AsyncBatcher, Request, SamplingParams, SyncBatcher, load_model
from asyncbatch.ranks import world as world_module
from asyncbatch.ranks.world import join

LONG_S = 600.0  # a time-out that no test lives to see


def requests() -> list[Request]:
    """Prompts of one and of several chunks, greedy and sampled, short and long, one that stops early."""
    made = []
    for i in range(6):
        sampling = SamplingParams(temperature=0.8, top_p=0.9, seed=i) if i % 2 else SamplingParams()
        made.append(Request([1 + i, 2, 3 + i, 7] * (3 + 6 * i), max_new_tokens=6 + 3 * i, sampling=sampling))
    return made


def use(batcher: Any) -> dict[str, Any]:
    """All that a caller does with a batcher; the same with one process and on the leader of several."""
    first = batcher.run(requests())
    again = batcher.run(requests()[:3])
    numbers = [step.step for step in batcher.timeline.steps]
    stop = first[2].token_ids[4]
    (stopped,) = batcher.run([Request(requests()[2].token_ids, 12, stop_token_ids=[stop])])
    handles = [batcher.submit(request) for request in requests()[3:]]
    for _ in range(6):
        batcher.turn()
    cancelled = batcher.cancel(handles[0]), batcher.cancel(handles[0])
    later = batcher.submit(requests()[0])
    results = [handle.result() for handle in (*handles, later)]
    stream = batcher.stream(requests()[5])
    streamed = [next(stream) for _ in range(4)]
    stream.close()
    bad, good = batcher.run([Request([10**9], 2), requests()[1]])
    return {
        "first": [(c.token_ids, c.finish_reason) for c in first],
        "again": [c.token_ids for c in again],
        "numbers": numbers[0],
        "stopped": (stopped.token_ids, stopped.finish_reason),
        "cancelled": (*cancelled, results[0].finish_reason),
        "cancelled tokens": results[0].token_ids,
        "beside it": [(c.token_ids, c.finish_reason) for c in results[1:]],
        "streamed": streamed,
        "bad": (bad.finish_reason, str(bad.error)),
        "good": good.token_ids,
    }


def serve(tp: int) -> dict[str, Any]:
    """Both batchers, used by the leader; and what the others say where they are used."""
    told: dict[str, Any] = {}
    with join(tp, timeout_s=LONG_S) as world:
        told["place"] = world.rank, world.tp_rank, world.replica, world.replicas, world.leads
        told["gathered"] = world.gather(world.rank * 10)
        told["shared"] = world.share(f"of rank {world.rank}")
        try:
            world.agree(size_of_batch=4 + world.rank)
        except Exception as error:
            told["difference"] = str(error)
        model, _ = load_model("random:tiny", device="cpu", tp=tp, progress=False)
        for kind in (SyncBatcher, AsyncBatcher):
            with kind(model, max_batch_size=4, num_blocks=24) as batcher:
                if world.leads:
                    told[kind.mode] = use(batcher)
                else:
                    try:
                        batcher.run(requests())
                    except Exception as error:
                        told["refusal"] = str(error)
                    batcher.follow()
            told["digest", kind.mode] = batcher.lockstep.digest, batcher.lockstep.steps
            told["in collectives", kind.mode] = list(batcher.collective_s)
            told["steps", kind.mode] = [step.step for step in batcher.timeline.steps]
    return told


def fail(how: str, folder: str) -> None:
    """Rank 1 fails in the middle of a run; rank 0 keeps what is finished."""
    rank = int(os.environ["RANK"])
    # That of the process that it was forked from is anybody's.
    with Path(folder, f"stderr-{rank}").open("w") as stderr:
        os.dup2(stderr.fileno(), 2)
    if how == "version" and rank == 1:
        right = world_module.versions
        world_module.versions = lambda: {**right(), "torch": "1.13"}
    with join(2, timeout_s=5.0 if rank == 0 else LONG_S) as world:
        finished: list[list[int]] = []
        world.watch.on_lost = lambda error: Path(folder, f"kept-{rank}").write_text(json.dumps([str(error), finished]))
        model, _ = load_model("random:tiny", device="cpu", tp=2, progress=False)
        with AsyncBatcher(model, max_batch_size=2) as batcher:
            if rank == 1:
                right_plan, steps = batcher.scheduler.plan, iter(range(1000))

                def plan():
                    if next(steps) == 20:
                        act(how)
                    return right_plan()

                batcher.scheduler.plan = plan
                batcher.follow()
                return
            handles = [batcher.submit(Request([1, 2, 3], 4)), batcher.submit(Request([4, 5], 400))]
            finished.append(handles[0].result().token_ids)
            completion = handles[1].result()
            Path(folder, "served").write_text(f"{completion.finish_reason}: {completion.error}")
            if completion.error is not None:
                raise completion.error


def act(how: str) -> None:
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "memory":
        raise MemoryError("no 3 GB are left")

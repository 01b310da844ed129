"""All ranks that torchrun has started: which of them share a model, and which are replicas of each other.

Rank r is number `r % tp` of replica `r // tp`. Each replica is a world of its own for torch.distributed and for
transformers: `tp` ranks that share one model. What connects all replicas is torchrun's store alone.
"""

from __future__ import annotations

import datetime
import os
import pickle
import socket
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from .errors import RankError
from .group import Connection, difference, kill_workers, versions
from .watch import Watch

STARTING = datetime.timedelta(minutes=10)  # so long one rank waits for another to start
LEAVING_S = 60.0
LOADING = datetime.timedelta(hours=2)  # for collectives while a model is loaded; who is dead is found out by the watch


@dataclass
class World:
    """This process among the ranks. store: connects all of them, for this thread alone. hosts: each rank's machine."""

    rank: int
    size: int
    tp: int
    store: Any
    hosts: list[str] = field(default_factory=list)
    watch: Any = None
    _exchanges: int = 0

    here: ClassVar[World | None] = None  # the one that this process has joined

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def replica(self) -> int:
        return self.rank // self.tp

    @property
    def replicas(self) -> int:
        return self.size // self.tp

    @property
    def leads(self) -> bool:
        """Whether this rank takes its replica's requests."""
        return self.tp_rank == 0

    def gather(self, thing: Any) -> list[Any] | None:
        """On rank 0 the things of all ranks, in their order; None on the others. All ranks call `gather`, `share` and
        `agree` in the same order. RankError once a rank is lost."""
        key = self._next()
        if self.rank != 0:
            self.store.set(f"{key}/{self.rank}", pickle.dumps(thing))
            return None
        others = [self._wait_for(f"{key}/{rank}") for rank in range(1, self.size)]
        return [thing, *map(pickle.loads, others)]

    def share(self, thing: Any) -> Any:
        """Rank 0's thing, on each rank."""
        key = self._next()
        if self.rank == 0:
            self.store.set(key, pickle.dumps(thing))
            return thing
        return pickle.loads(self._wait_for(key))

    def agree(self, **settings: Any) -> None:
        """RankError, on each rank, unless all of them have the same settings. They are compared as text."""
        of_all = self.gather({name: str(setting) for name, setting in settings.items()})
        refusal = self.share(None if of_all is None else difference(of_all, self.hosts))
        if refusal:
            raise RankError(refusal)

    def close(self) -> None:
        """Leave, at an ordinary end."""
        World.here = None
        with self.watch.busy("leaving", LEAVING_S):
            if dist.is_initialized():
                dist.destroy_process_group()
        self.watch.close()

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.close()
        else:
            self.watch.end(error)

    def _next(self) -> str:
        self._exchanges += 1
        return f"asyncbatch/exchange/{self._exchanges}"

    def _wait_for(self, key: str) -> bytes:
        while not self.store.check([key]):
            if self.watch is not None:
                self.watch.check()
            time.sleep(0.01)
        return bytes(self.store.get(key))


def join(tp: int = 1, *, on_cuda: bool = False, timeout_s: float = 30.0, **settings: Any) -> World:
    """Make this process one of the ranks that torchrun has started; each of them calls it. `tp` ranks share a model.

    on_cuda: the models lie on GPUs, one a rank (LOCAL_RANK), and NCCL connects them; else gloo. timeout_s: a rank that
    says nothing for so long ends all. settings: what must be the same on all ranks, besides the versions.

    ValueError without torchrun, or for a `tp` that does not divide the ranks. RankError where the ranks differ."""
    size = int(os.environ.get("WORLD_SIZE", "0"))
    if not size or "MASTER_ADDR" not in os.environ:
        raise ValueError(f"torchrun has not started this process: torchrun --nproc-per-node {tp} your_script.py")
    if tp < 1 or size % tp:
        raise ValueError(f"tp is {tp}: allowed are numbers that divide the {size} ranks")
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=STARTING)))
    world = World(rank, size, tp, store)
    pid = f"{socket.gethostname()}, pid {os.getpid()}"
    world.hosts = world.share(world.gather(pid))
    world.watch = Watch(store, rank, size, world.hosts, timeout_s, group=world.replica)
    world.watch.kills.append(kill_workers)
    world.agree(tp=tp, **versions(), **settings)
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if tp > 1:
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=dist.PrefixStore(f"asyncbatch/replica/{world.replica}", store),
            rank=world.tp_rank,
            world_size=tp,
            timeout=LOADING,
            device_id=torch.device("cuda", torch.cuda.current_device()) if on_cuda else None,
        )
    World.here, Connection.first = world, world.replica * tp
    return world

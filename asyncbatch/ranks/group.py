"""Which ranks share a model, and how they reach each other."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import socket
import zlib
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from ..devices.process import DeviceProcess
from .collectives import Group
from .errors import RankError
from .watch import Watch

PATIENT = datetime.timedelta(days=7)  # a leader may be idle for long; who is dead is found out elsewhere (watch.py)


class Connection:
    """The ranks of a process group of torch.distributed, which share a model. Made by all of them at the same time.

    rank, size: this one's number among them, and how many they are; number 0 leads. control: a gloo process group, for
    what they agree about when something is opened. hosts: of each rank, its machine and process. store: where they
    leave each other word."""

    _of: ClassVar[dict[str, Connection]] = {}
    first: ClassVar[int] = 0  # the number that its rank 0 has in messages

    @classmethod
    def of(cls, process_group: Any) -> Connection:
        """The connection of a process group: one, however many models and batchers it serves."""
        name = process_group.group_name
        if name not in cls._of:
            cls._of[name] = cls(process_group)
        return cls._of[name]

    def __init__(self, process_group: Any):
        self.process_group, self.ranks = process_group, dist.get_process_group_ranks(process_group)
        self.rank, self.size = dist.get_rank(process_group), len(self.ranks)
        self.control: Any = dist.new_group(self.ranks, PATIENT, backend="gloo", use_local_synchronization=True)
        machines = self.gather(socket.gethostname())
        self.hosts: list[str] = self.gather(f"{socket.gethostname()}, pid {os.getpid()}")
        # A store of their own, for worker processes and heartbeats: the process group may have come from anywhere.
        host = "127.0.0.1" if len(set(machines)) == 1 else machines[0]
        server = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if self.rank == 0 else None
        self.host, self.port = host, self.share(server.port if server else None)
        self.store = server or dist.TCPStore(host, self.port, is_master=False)
        self._models = self._watches = self._batchers = 0

    def group_of_next_model(self) -> Group:
        """A group for the modules of one more model."""
        self._models += 1
        name = f"{self.process_group.group_name}/{self.port}/{self._models}"
        group = Group(name, self.rank, self.size, self.host, self.port)
        group.join(self.process_group)
        return group

    def group_of_next_batcher(self) -> Any:
        """A gloo process group for one more batcher's messages. Two batchers may be open, each followed by a thread of
        its own, and in one group the messages of both would have to come in one order on all ranks."""
        self._batchers += 1
        return dist.ProcessGroupGloo(
            dist.PrefixStore(f"batcher/{self._batchers}", self.store), self.rank, self.size, PATIENT
        )

    def gather(self, thing: Any) -> list[Any]:
        """The things of all ranks, in their order, on each of them."""
        things = [None] * self.size
        dist.all_gather_object(things, thing, group=self.control)
        return things

    def share(self, thing: Any) -> Any:
        """The leader's thing, on each rank."""
        things = [thing]
        dist.broadcast_object_list(things, src=self.ranks[0], group=self.control)
        return things[0]

    def agree(self, **settings: Any) -> None:
        """RankError, on each rank, unless all of them have the same settings. They are compared as text."""
        refusal = difference(self.gather({name: str(setting) for name, setting in settings.items()}), self.hosts)
        if refusal:
            raise RankError(refusal)

    def name(self, rank: int | None = None) -> str:
        """What messages call a rank of the group; None is this one."""
        number = self.rank if rank is None else rank
        return f"rank {self.first + self.ranks[number]} ({self.hosts[number]})"

    def new_watch(self) -> Watch:
        """A watch of these ranks alone, where none watches over all (`world.py`). Made by all of them."""
        self._watches += 1
        options: dict[str, Any] = {"hosts_store": self.rank == 0, "name": f"watch/{self._watches}"}
        watch = Watch(self.store, self.rank, self.size, self.hosts, **options)
        watch.kills.append(kill_workers)
        return watch


def difference(of_all: list[dict[str, str]], hosts: list[str]) -> str:
    """In which of their settings ranks differ, as a text that names them; empty where they do not."""
    for name in of_all[0]:
        values = [of_one.get(name) for of_one in of_all]
        if len(set(values)) > 1:
            told = "; ".join(f"rank {n} ({hosts[n]}) has {value}" for n, value in enumerate(values))
            return f"the ranks must have the same {name.replace('_', ' ')}: {told}"
    return ""


def kill_workers() -> None:
    """End the processes that compute on a CPU for this one."""
    for process in list(DeviceProcess._of.values()):
        process.kill()


@functools.cache
def versions() -> dict[str, str]:
    """What must be the same on all ranks besides the model, by name. Of this package, which may be a checkout, it is
    the text itself."""
    import transformers

    digest = 0
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest = zlib.crc32(file.read_bytes(), digest)
    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "text_of_asyncbatch": f"{digest:08x}",
    }

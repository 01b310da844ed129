"""Where ranks exchange numbers within a step: one all-reduce after the attention and one after the MLP of each layer.

transformers shards a model so that a layer's first matrix products need nothing from other ranks and its last one gives
a part of a sum. So two sums a layer are all that ranks exchange (Shoeybi et al. 2019, "Megatron-LM"), besides those of
the embedding and of the logits.

The sum is an operator of its own. `torch.compile` calls it as it stands, a CUDA graph holds what it launches, and on a
CPU it works in the worker process, where the model computes, which connects to the workers of the other ranks.
"""

from __future__ import annotations

import datetime
import time
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

PATIENCE = datetime.timedelta(minutes=10)  # of a sum on a CPU. Who is dead or hangs is found out much sooner (watch.py)


class Counter:
    """The seconds that this process has spent in collectives on a CPU, the waiting for other ranks included."""

    seconds = 0.0


@dataclass(frozen=True)
class Group:
    """The ranks that share a model, for its modules; it travels with them. name: the same on all of its ranks, and no
    other group's. host, port: a torch.distributed.TCPStore by which the worker processes find each other."""

    name: str
    rank: int
    size: int
    host: str
    port: int

    def __post_init__(self) -> None:
        _groups.setdefault(self.name, self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Group, astuple(self)  # so that it is known wherever it arrives

    def join(self, process_group: Any) -> None:
        """Take this process group (of NCCL or gloo) for the collectives of this process."""
        _joined[self.name] = process_group


_groups: dict[str, Group] = {}
_joined: dict[str, Any] = {}


def _process_group(name: str) -> Any:
    """The process group of a group in this process. In a worker process it is made at the first use."""
    if name not in _joined:
        group = _groups[name]
        store = dist.TCPStore(group.host, group.port, is_master=False, timeout=PATIENCE)
        own = dist.PrefixStore(name, store)
        _joined[name] = dist.ProcessGroupGloo(own, group.rank, group.size, PATIENCE)
    return _joined[name]


def _wait(work: Any, start: float) -> None:
    work.wait()
    Counter.seconds += time.perf_counter() - start


@torch.library.custom_op("asyncbatch::all_reduce", mutates_args=("x",))
def all_reduce(x: torch.Tensor, group: str) -> None:
    """Replace `x`, of any shape, by the sum of all ranks' `x`. On every rank it has the same bits."""
    process_group = _process_group(group)
    if x.is_cuda:
        dist.all_reduce(x, group=process_group)
    else:
        start = time.perf_counter()
        _wait(process_group.allreduce([x]), start)


@all_reduce.register_fake
def _(x, group):
    return None


@torch.library.custom_op("asyncbatch::all_gather", mutates_args=())
def all_gather(x: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """The `x` of all ranks, in their order: [size, *x.shape]."""
    process_group = _process_group(group)
    gathered = x.new_empty(size, *x.shape)
    if x.is_cuda:
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=process_group)
    else:
        start = time.perf_counter()
        _wait(process_group.allgather([list(gathered.unbind(0))], [x.contiguous()]), start)
    return gathered


@all_gather.register_fake
def _(x, group, size):
    return x.new_empty(size, *x.shape)


def all_of(numbers: list[int], group: Group, device: torch.device) -> list[list[int]]:
    """The numbers of each rank, for what all of them must do alike."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    return all_gather(mine, group.name, group.size).tolist()


def share_of(size: int, group: Group) -> tuple[int, int]:
    """(first, end) of this rank's part of `size` rows, as torch and transformers cut them: the last parts may be
    shorter, or empty."""
    most = -(-size // group.size)
    return min(size, group.rank * most), min(size, (group.rank + 1) * most)


class Summed(nn.Module):
    """A linear layer whose weight is cut by columns: each rank gives a part of a sum. The bias is added once."""

    def __init__(self, linear: nn.Linear, group: Group):
        super().__init__()
        self.group, self.bias = group, linear.bias
        linear.bias = None
        self.part = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.part(x)
        torch.ops.asyncbatch.all_reduce(y, self.group.name)
        return y if self.bias is None else y + self.bias


class Gathered(nn.Module):
    """A linear layer whose weight is cut by rows, and whose whole output is wanted on every rank: the logits."""

    def __init__(self, linear: nn.Linear, out_features: int, group: Group):
        super().__init__()
        self.group, self.out_features, self.part = group, out_features, linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.part(x)
        missing = -(-self.out_features // self.group.size) - y.shape[-1]
        if missing:  # the last rank's part is shorter
            y = nn.functional.pad(y, (0, missing))
        gathered = torch.ops.asyncbatch.all_gather(y, self.group.name, self.group.size)
        return gathered.movedim(0, -2).flatten(-2)[..., : self.out_features]


class SharedEmbedding(nn.Embedding):
    """An embedding of which each rank has some rows: it gives zeros for the others' tokens, and the ranks add up. Made
    of an nn.Embedding by changing its class; `first` is its first token."""

    group: Group
    first: int

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        own = ids - self.first
        mine = (own >= 0) & (own < len(self.weight))
        if len(self.weight):
            y = nn.functional.embedding(own * mine, self.weight) * mine[..., None]
        else:  # more ranks than rows
            y = self.weight.new_zeros(*ids.shape, self.weight.shape[1])
        torch.ops.asyncbatch.all_reduce(y, self.group.name)
        return y

"""The runner of a rank: its steps have the shapes that they have on the other ranks, or all would wait for ever."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..devices.cuda.memory import Memory
from ..devices.cuda.runner import CudaRunner
from ..devices.padding import PaddedRunner, padding_for, products_of
from ..scheduler import StepKind
from .collectives import Counter, Group, all_of

COLLECTIVES = 4  # the column of `Runner.moments` with a step's seconds in collectives


class AgreedRunner(PaddedRunner):
    """Rows of padding that are right on all ranks. The model is one of `local.py`, and has a `group`."""

    def _find_padding(self) -> None:
        super()._find_padding()
        group: Group = self.model.ranks
        counts = sorted(self.padding)
        while True:
            of_all = all_of([self.padding[count] for count in counts], group, self.device)
            if all(of_one == of_all[0] for of_one in of_all):
                return
            products = list(products_of(self.model))
            most = [max(each) for each in zip(*of_all, strict=True)]  # what one rank needs, another has to try
            tried = [padding_for(products, [rows])[rows] for rows in most]
            self.padding = dict(zip(counts, tried, strict=True))


class RankRunner(AgreedRunner):
    """On a CPU. It tells how long each step was in collectives."""

    def _step(self, slot: int, kind: StepKind) -> None:
        before = Counter.seconds
        super()._step(slot, kind)
        if self.moments is not None:
            self.moments[slot, COLLECTIVES] = Counter.seconds - before


class RankCudaRunner(CudaRunner, AgreedRunner):
    """On CUDA. The KV cache gets on each rank as many blocks as the fullest GPU has room for."""

    def _measure_memory(self) -> Memory:
        memory = super()._measure_memory()
        least = min(left for (left,) in all_of([memory.left], self.model.ranks, self.device))
        return replace(memory, free=memory.free - (memory.left - least))


def runner_for(on_cuda: bool) -> Any:
    return RankCudaRunner if on_cuda else RankRunner

"""The toy model: its next token is a checksum of the whole context, so that no damage goes unseen.

A real model can give the right token from a damaged context. This one cannot: change, drop or swap a single token and
(nearly always) the next one is another. The package's own batchers serve it on the virtual clock. Where a real model
has keys and values in the KV cache, it has the tokens themselves, and it reads them through the same block tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..base import BatcherBase
from ..models.toy import VOCABULARY
from ..request import Request
from ..runner import Runner
from ..sampling import uniforms
from ..scheduler import StepKind

MODULUS = 1_000_003


def next_token(context: Sequence[int], uniform: float | None) -> int:
    """A checksum of the context that depends on the order and the number of its tokens. `uniform` is the random number
    (0 to 1) of a sampled token, which moves the result; None for a greedy one."""
    total = 0
    for token in context:
        total = (total * 31 + int(token) + 1) % MODULUS
    return _token(total, uniform)


def _token(total: int, uniform: float | None) -> int:
    return (total % MODULUS + (0 if uniform is None else int(uniform * VOCABULARY))) % VOCABULARY


def toy_tokens(request: Request) -> list[int]:
    """The tokens that the toy model generates for a request, computed without any batcher."""
    context = list(request.token_ids)
    params = request.sampling
    for _ in range(request.max_new_tokens):
        number = None
        if params.temperature > 0:
            number = float(uniforms(np.array([params.seed], np.uint64), np.array([len(context)]))[0])
        context.append(next_token(context, number))
        if context[-1] in (request.stop_token_ids or ()):
            break
    return context[len(request.token_ids) :]


class ToyRunner(Runner):
    """A runner whose model is `next_token`. Its KV cache holds the tokens themselves, as int64
    [num_blocks + 1, block_size]."""

    def __init__(self, shape, host):
        self.shape, self.host = shape, host
        self.inputs = [torch.zeros(shape.num_inputs, dtype=torch.int32) for _ in host]
        self.outputs = torch.zeros(shape.num_slots, shape.max_batch_size, dtype=torch.int32)
        self.cache = np.zeros((shape.num_blocks + 1, shape.block_size), np.int64)

    def _step(self, slot: int, kind: StepKind) -> None:
        fields = self.shape.fields(self.inputs[slot], kind)
        answers = np.zeros(kind.rows, np.int32)
        for row, context in self._contexts(fields):
            answers[row] = next_token(context.tolist(), self._uniform(fields, row))
        self.outputs[slot, : kind.rows] = torch.from_numpy(answers)

    @staticmethod
    def _uniform(fields: dict[str, torch.Tensor], row: int) -> float | None:
        return float(fields["uniform"][row]) if fields["temperature"][row] > 0 else None

    def _contexts(self, fields: dict[str, torch.Tensor]) -> Iterator[tuple[int, np.ndarray]]:
        """Write the step's tokens into the cache; for each row that has some, (row, what the cache holds of it)."""
        carried = self._input_ids(fields).numpy()
        arrays = {name: part.numpy() for name, part in fields.items()}
        for row in range(len(carried)):
            start, count = int(arrays["position"][row]), int(arrays["prefill_count"][row])
            first = int(arrays["prefill_start"][row])
            tokens = carried[row : row + 1] if arrays["decodes"][row] else arrays["prefill_id"][first : first + count]
            if len(tokens):
                places = np.arange(start + len(tokens))
                blocks = arrays["tables"][row][places // self.shape.block_size]
                self._keep(blocks[start:], places[start:], tokens)
                yield row, self.cache[blocks, places % self.shape.block_size]

    def _keep(self, blocks: np.ndarray, places: np.ndarray, tokens: np.ndarray) -> None:
        self.cache[blocks, places % self.shape.block_size] = tokens


class ShardRunner(ToyRunner):
    """One rank's part of the toy model: of each context it keeps every `size`-th token, from number `rank` on, and its
    part of the checksum. Only the sum over all ranks says what the next token is."""

    def __init__(self, shape, host, rank: int, size: int):
        super().__init__(shape, host)
        self.rank, self.size = rank, size
        self.totals: dict[tuple[int, str], np.ndarray] = {}  # by slot and forward pass

    def _keep(self, blocks: np.ndarray, places: np.ndarray, tokens: np.ndarray) -> None:
        mine = places % self.size == self.rank
        super()._keep(blocks[mine], places[mine], tokens[mine])

    def share(self, command: StepKind, slot: int, passes: str) -> np.ndarray:
        """The part of the checksum of each row of a forward pass, int64 [rows]; 0 for the other rows."""
        fields = self.shape.fields(self.inputs[slot], command)
        part = np.zeros(command.rows, np.int64)
        for row, context in self._contexts(fields):
            if bool(fields["decodes"][row]) == (passes == "decode"):
                last = len(context) - 1
                mine = range(self.rank, len(context), self.size)
                part[row] = sum((int(context[i]) + 1) * pow(31, last - i, MODULUS) for i in mine) % MODULUS
        return part

    def take(self, slot: int, passes: str, total: np.ndarray) -> None:
        self.totals[slot, passes] = total

    def _step(self, slot: int, kind: StepKind) -> None:
        fields = self.shape.fields(self.inputs[slot], kind)
        parts = ("decode", "prefill") if kind.passes == "mixed" else (kind.passes,)
        sums = np.sum([self.totals[slot, passes] for passes in parts], axis=0)
        answers = [_token(int(total), self._uniform(fields, row)) for row, total in enumerate(sums)]
        self.outputs[slot, : kind.rows] = torch.tensor(answers, dtype=torch.int32)


def program_of(batcher: BatcherBase) -> Any:
    """What runs on the device of a batcher on the virtual clock: its `Runner`, or a `ToyRunner`."""
    device: Any = batcher.device
    return device.program


def use_toy_model(batcher: BatcherBase) -> None:
    """Let a batcher on the virtual clock serve the toy model, in place of the model that it was made for. One of
    several ranks gets its part of it."""
    device: Any = getattr(batcher.device, "device", batcher.device)  # within a CheckedDevice
    host, ranks = device.program.host, getattr(device, "ranks", None)
    if ranks is not None and ranks.all_reduces.count:
        device.program = ShardRunner(batcher.shape, host, device.rank, ranks.size)
    else:
        device.program = ToyRunner(batcher.shape, host)

"""The toy model: its next token is a checksum of the whole context, so that no damage goes unseen.

A real model can give the right token from a damaged context. This one cannot: change, drop or swap a single token and
(nearly always) the next one is another. The package's own batchers serve it on the virtual clock. Where a real model
has keys and values in the KV cache, it has the tokens themselves, and it reads them through the same block tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..base import BatcherBase
from ..models.toy import VOCABULARY
from ..request import Request
from ..runner import Runner
from ..sampling import uniforms
from ..scheduler import StepKind


def next_token(context: Sequence[int], uniform: float | None) -> int:
    """A checksum of the context that depends on the order and the number of its tokens. `uniform` is the random number
    (0 to 1) of a sampled token, which moves the result; None for a greedy one."""
    total = 0
    for token in context:
        total = (total * 31 + int(token) + 1) % 1_000_003
    return (total + (0 if uniform is None else int(uniform * VOCABULARY))) % VOCABULARY


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
        rows = kind.rows
        fields = {name: part.numpy() for name, part in self.shape.fields(self.inputs[slot], kind).items()}
        carried = self._input_ids(self.shape.fields(self.inputs[slot], kind)).numpy()
        answers = np.zeros(rows, np.int32)
        for row in range(rows):
            start, count = int(fields["position"][row]), int(fields["prefill_count"][row])
            first = int(fields["prefill_start"][row])
            tokens = [carried[row]] if fields["decodes"][row] else fields["prefill_id"][first : first + count]
            if not len(tokens):
                continue
            places = np.arange(start + len(tokens))
            blocks = fields["tables"][row][places // self.shape.block_size]
            self.cache[blocks[start:], places[start:] % self.shape.block_size] = tokens
            context = self.cache[blocks, places % self.shape.block_size]
            answers[row] = next_token(context, fields["uniform"][row] if fields["temperature"][row] > 0 else None)
        self.outputs[slot, :rows] = torch.from_numpy(answers)


def program_of(batcher: BatcherBase) -> Any:
    """What runs on the device of a batcher on the virtual clock: its `Runner`, or a `ToyRunner`."""
    device: Any = batcher.device
    return device.program


def use_toy_model(batcher: BatcherBase) -> None:
    """Let a batcher on the virtual clock serve the toy model, in place of the model that it was made for."""
    device: Any = getattr(batcher.device, "device", batcher.device)  # within a CheckedDevice
    device.program = ToyRunner(batcher.shape, device.program.host)

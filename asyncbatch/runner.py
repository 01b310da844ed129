"""The runner: what the device does when the host launches a command on a slot.

It has three commands, one a stream: "copy_in" copies a slot's inputs from the host, a step (its `StepKind` is the
command) carries tokens over, runs the model, and samples, and "copy_out" copies the output ids to the host. The kind
says all that the host must decide about a step. Nothing in a step depends on a value that only the device knows, so a
device never has to ask the host, nor the host to wait.

A step has up to two forward passes, each of a fixed shape: [rows, 1] for decode and [1, tokens] for chunks of prompts.
How the same is done on CUDA stands in `devices/cuda/runner.py`.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from .attention import NAME, Batch, attend_on_cpu, register
from .kv_cache import blocks_for, place
from .models.probe import attention_layers, shared_copy
from .sampling import greedy, sample
from .scheduler import StepKind
from .slot import StepShape


class Runner:
    """The device side for one batcher.

    model: a causal language model of transformers, used as it is: the runner works on a copy of its module tree that
        shares its weights and has another attention implementation in its config.
    host: the (inputs, output ids) buffers of each slot on the host.
    """

    # Four moments of each slot's step: its beginning, after the carry-over, after the model, its end; and how long it
    # was in collectives (`ranks/`). A shared array [slots, 5] of seconds, which the device gives.
    moments: np.ndarray | None = None

    def __init__(self, model, *, shape: StepShape, host: list[tuple[torch.Tensor, torch.Tensor]]):
        register()
        self.model, self.layers = shared_copy(model), attention_layers(model, shape.max_length)
        self.model.set_attn_implementation(NAME)
        self.shape, self.host = shape, host
        self.device = next(model.parameters()).device
        # These belong to the compute stream, except `inputs`, which "copy_in" writes on the H2D stream.
        self.inputs = [torch.zeros(shape.num_inputs, dtype=torch.int32, device=self.device) for _ in host]
        self.outputs = torch.zeros(shape.num_slots, shape.max_batch_size, dtype=torch.int32, device=self.device)
        self.first = torch.arange(shape.max_batch_size, dtype=torch.int32, device=self.device)
        self.greedy = greedy  # where it is compiled, another one
        self._make_pools()

    def _make_pools(self) -> None:
        """Give each layer its keys and values, [num_blocks + 1, kv_heads, block_size, size of a key or value] each."""
        for layer in self.layers:
            size = self.shape.num_blocks + 1, layer.kv_heads, self.shape.block_size
            module = self.model.get_submodule(layer.name)
            # What was never written is never read, so it may hold anything, and on a CPU costs nothing until touched.
            module.paged_pools = tuple(
                torch.empty(*size, each, dtype=layer.dtype, device=self.device)
                for each in (layer.key_size, layer.value_size)
            )
            module.paged_window = layer.window

    def run(self, command: str | StepKind, slot: int) -> None:
        """Do a command. Called by the stream that it was launched on."""
        if command == "copy_in":
            self.inputs[slot].copy_(self.host[slot][0], non_blocking=True)
        elif command == "copy_out":
            self.host[slot][1].copy_(self.outputs[slot], non_blocking=True)
        elif command in self.shape.kinds:
            self._step(slot, command)  # type: ignore[arg-type]
        else:
            kinds = ", ".join(map(str, self.shape.kinds))
            raise ValueError(f"command {str(command)!r}: a runner knows copy_in, copy_out, {kinds}")

    def _step(self, slot: int, kind: StepKind) -> None:
        self._mark(slot, 0)
        fields = self.shape.fields(self.inputs[slot], kind)
        carried = None if kind.passes == "prefill" else self.decode_inputs(fields)
        self._mark(slot, 1)
        if carried is None:
            logits = self._prefill(fields)
        else:
            logits = self._decode(fields, *carried)
            if kind.passes == "mixed":
                logits = torch.where(fields["decodes"].bool()[:, None], logits, self._prefill(fields))
        self._mark(slot, 2)
        self.outputs[slot, : kind.rows] = sample(logits, fields) if kind.sampled else self.greedy(logits)
        self._mark(slot, 3)

    def _mark(self, slot: int, moment: int) -> None:
        if self.moments is not None:
            self.moments[slot, moment] = time.perf_counter()

    def _decode(self, fields, ids, positions, places) -> torch.Tensor:
        """One token a row. Returns logits [rows, vocabulary]; those of rows that do not decode mean nothing."""
        rows = len(ids)
        ids, positions, places = (self._padded(each) for each in (ids, positions, places))
        batch = self._batch(fields, places, self.first[:rows], fields["decodes"], decode=True)
        output = self.model(ids[:, None], position_ids=positions[:, None], use_cache=False, paged=batch)
        return output.logits[:rows, 0]

    def _padded(self, of_rows: torch.Tensor) -> torch.Tensor:
        """The same, with zeros for rows of padding where matrix products need some (`devices/padding.py`)."""
        return of_rows

    def decode_inputs(self, fields) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each row's input token, its position and its place in a pool; 0 (nobody's) for rows that do not decode."""
        live, size = fields["decodes"], self.shape.block_size
        positions = (fields["position"] * live).long()
        rows = self.first[: len(positions)].long()
        return self._input_ids(fields), positions, place(fields["tables"], rows, positions, size) * live

    def _input_ids(self, fields) -> torch.Tensor:
        return self.carry_over(fields["carry"], self.outputs.view(-1), fields["input_id"])

    @staticmethod
    def carry_over(carry, outputs, ids) -> torch.Tensor:
        """A row's input token is an output of a step before, or the host has written it. carry: [rows], the index into
        `outputs` (of all slots, one after the other), or -1. ids: [rows], what the host wrote. int32 [rows]."""
        carried = outputs[carry.clamp(min=0)].clamp(min=0)  # NO_TOKEN is no row of the embedding
        return torch.where(carry >= 0, carried, ids)

    def _prefill(self, fields) -> torch.Tensor:
        """Chunks of prompts, packed. Returns the logits after each row's last token, [rows, vocabulary]."""
        first, count, tables = fields["prefill_start"], fields["prefill_count"], fields["tables"]
        size = self.shape.block_size
        positions, rows = fields["prefill_position"].long(), fields["prefill_row"].long()
        used = torch.arange(len(positions), device=self.device) < count.sum()
        places = torch.where(used, place(tables, rows, positions, size), 0)  # padding goes to block 0
        batch = self._batch(fields, self._padded(places), first, count, decode=False)
        last = self._padded((first + count - 1).clamp(min=0).long())
        ids, positions = self._padded(fields["prefill_id"])[None], self._padded(positions)[None]
        output = self.model(ids, position_ids=positions, use_cache=False, logits_to_keep=last, paged=batch)
        return output.logits[0, : len(first)]

    def _batch(self, fields, places, first, count, decode: bool) -> Batch:
        """What attention has to know of a forward pass."""
        batch = Batch(places, fields["tables"], first, count, fields["position"], attend_on_cpu)
        rows = zip(*(x.tolist() for x in (first, count, batch.position)), batch.tables.long(), strict=True)
        size = self.shape.block_size
        batch.parts = [(f, n, p, table[: blocks_for(p + n, size)]) for f, n, p, table in rows if n]
        return batch

"""A slot: one set of input and output buffers, on the host and on the device, and the three events of a step.

A step's inputs are many small arrays. They lie in one int32 buffer, so that one copy brings them all to the device;
`StepShape.fields` says which part is which, for both sides. Who may write what, and when:

- host inputs: the host, in `fill`, once it has waited for the `outputs_ready` of the slot's last step.
- device inputs: the H2D stream, in "copy_in". The step that read them is done, since the host has waited for it.
- device output ids: the compute stream, in a step. Later steps on the same stream read them too (carry-over).
- host output ids: the D2H stream, in "copy_out". The host reads them after `outputs_ready`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from .kv_cache import blocks_for
from .sampling import uniforms
from .scheduler import BatchPlan, StepKind
from .streams import EVENTS, Device

ROW_FIELDS = ("input_id", "carry", "position", "decodes", "prefill_start", "prefill_count", "top_k")
FLOAT_FIELDS = ("temperature", "top_p", "uniform")
PREFILL_FIELDS = ("prefill_id", "prefill_position", "prefill_row")


def slot_of(step: int, num_slots: int) -> int:
    """Which slot a step uses: the slots take turns."""
    return step % num_slots


def carry_ids(carries, num_slots: int, batch: int) -> list[int]:
    """For each row: where its input token is among the outputs of all slots, or -1 if the host has it.

    carries: for each row (step, row) of the one that samples the token, or None. Slot s begins at s * batch."""
    return [-1 if carry is None else slot_of(carry[0], num_slots) * batch + carry[1] for carry in carries]


@dataclass(frozen=True)
class StepShape:
    """The fixed shape of every step. Fixed, because the number of rows of a matrix product can change the last bits of
    each row: only with the same shapes does a request get the same tokens whoever else is in the batch."""

    max_batch_size: int
    num_slots: int
    block_size: int
    num_blocks: int
    max_length: int  # tokens, prompt and output of one request
    prefill_sizes: tuple[int, ...]  # rising: so many prompt tokens has a step, padding included
    batch_sizes: tuple[int, ...] = ()  # rising; a step has the smallest that holds its rows; () is (max_batch_size,)

    def rows_for(self, count: int) -> int:
        """The number of rows, padding included, of a step with `count` requests."""
        return next(size for size in (*self.batch_sizes, self.max_batch_size) if size >= count)

    @cached_property  # a runner looks a command up in it
    def kinds(self) -> list[StepKind]:
        """All kinds of step, the largest first (the memory of a graph is used again by smaller ones)."""
        sizes = sorted({*self.batch_sizes, self.max_batch_size}, reverse=True)
        of_prefill = [(passes, tokens) for tokens in reversed(self.prefill_sizes) for passes in ("mixed", "prefill")]
        works = [*of_prefill, ("decode", 0)]
        return [StepKind(passes, s, rows, tokens) for rows in sizes for passes, tokens in works for s in (False, True)]

    @property
    def prefill_tokens(self) -> int:
        """The most prompt tokens of one step."""
        return self.prefill_sizes[-1]

    @property
    def max_blocks(self) -> int:
        return blocks_for(self.max_length, self.block_size)

    def fields(self, buffer, kind: StepKind | None = None):
        """The parts of `buffer` by name, as views: buffer is an int32 array or tensor of `num_inputs` elements. Rows
        beyond the batch are 0. kind: of the step whose part is wanted: its number of rows (B) and of prompt tokens (T);
        None gives all.

        input_id: [B], the token of a decode row. position: [B], its place, or that of the first token of a chunk.
        carry: [B], -1, or slot * B + row of the output that is the input token.
        decodes: [B], 1 for a decode row. prefill_start, prefill_count: [B], the row's chunk within the prefill tokens.
        temperature, top_p, uniform: [B] float32 in the same bits. top_k: [B].
        prefill_id, prefill_position, prefill_row: [T]. tables: [B, max_blocks].
        """
        batch, parts, start = self.max_batch_size, {}, 0
        rows, tokens = (None, None) if kind is None else (kind.rows, kind.tokens)
        for names, size, used in (
            (ROW_FIELDS + FLOAT_FIELDS, batch, rows),
            (PREFILL_FIELDS, self.prefill_tokens, tokens),
        ):
            for name in names:
                parts[name] = buffer[start : start + size][:used]
                start += size
        for name in FLOAT_FIELDS:
            parts[name] = parts[name].view(np.float32 if isinstance(buffer, np.ndarray) else torch.float32)
        parts["tables"] = buffer[start:].reshape(batch, self.max_blocks)[:rows]
        return parts

    @property
    def num_inputs(self) -> int:
        rows = len(ROW_FIELDS) + len(FLOAT_FIELDS) + self.max_blocks
        return rows * self.max_batch_size + len(PREFILL_FIELDS) * self.prefill_tokens


class Slot:
    """The host's side of slot number `index`. `plan` is the step that the slot holds, from fill to commit."""

    def __init__(self, index: int, shape: StepShape, buffers: tuple[torch.Tensor, torch.Tensor], device: Device):
        self.index, self.shape = index, shape
        self.inputs, self.output_ids = buffers[0].numpy(), buffers[1].numpy()
        self.fields = shape.fields(self.inputs)
        self.plan: BatchPlan | None = None
        self.step = -1  # number of the newest step
        self.command: StepKind | None = None  # what computes it
        self.inputs_ready, self.step_done, self.outputs_ready = (device.event(name, index) for name in EVENTS)

    def fill(self, plan: BatchPlan, kv) -> None:
        """Write the step's inputs into the host buffer. The slot's last step must have been committed."""
        assert self.plan is None, f"slot {self.index} still holds step {self.plan.step}"  # type: ignore[union-attr]
        self.plan, self.step = plan, plan.step
        rows, fields = plan.rows, self.fields
        count, batch = len(rows), self.shape.max_batch_size
        self.inputs[: -batch * self.shape.max_blocks] = 0
        fields["tables"][:count] = kv.tables([row.state.number for row in rows])
        fields["tables"][count:] = 0
        fields["position"][:count] = [row.position for row in rows]
        fields["carry"][:] = -1
        fields["carry"][:count] = carry_ids([row.carry for row in rows], self.shape.num_slots, batch)
        decode = plan.num_decode
        fields["decodes"][:decode] = 1
        fields["input_id"][:decode] = [
            state.generated[position - state.num_prompt] if carry is None else 0
            for state, position, _, carry, _ in rows[:decode]
        ]
        if decode < count:
            self._fill_prefill(rows, decode)
        self.command = plan.kind(self.shape.rows_for(count))
        if self.command.sampled:
            self._fill_sampling(rows)

    def _fill_prefill(self, rows, first: int) -> None:
        fields, start = self.fields, 0
        for index, (state, position, count, *_) in enumerate(rows[first:], first):
            part = slice(start, start + count)
            fields["prefill_start"][index], fields["prefill_count"][index] = start, count
            fields["prefill_id"][part] = state.known_tokens(position, count)
            fields["prefill_position"][part] = np.arange(position, position + count)
            fields["prefill_row"][part] = index
            start += count

    def _fill_sampling(self, rows) -> None:
        """Write each row's sampling parameters and its random number. A greedy step needs neither."""
        params = [row.state.request.sampling for row in rows]
        count, fields = len(rows), self.fields
        for name in ("temperature", "top_k", "top_p"):
            fields[name][:count] = [getattr(p, name) for p in params]
        # The token that a row samples stands right after the row's last one: its position seeds its random number.
        positions = np.array([row.position + row.num_tokens for row in rows])
        fields["uniform"][:count] = uniforms(np.array([p.seed for p in params], np.uint64), positions)

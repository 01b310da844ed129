"""Notebook 05: an asynchronous batcher made of what the learner wrote, on any device, and one that cannot hang.

YourBatcher(model, step=step, launch_step=launch_step, prune=prune, carry_over=carry_over)

Each part is the learner's own function, or None for the package's own. In the puzzles more parts can be put in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import numpy as np

from ..base import host_span
from ..batcher import AsyncBatcher
from ..devices.padding import PaddedRunner
from ..runner import Runner
from ..sampling import uniforms
from . import kept
from .lab import wait_stream

MOST_TURNS, MOST_LINES = 400, 20_000  # of a run on the virtual clock; the lessons' runs take less than a tenth of it


class Endless(BaseException):
    """A learner's function did not come to an end. (No Exception: `except Exception` in a loop must not swallow it.)"""


def learned_runner(model: Any, *, source: str, **options: Any) -> Runner:
    """The device's own runner, with the learner's `carry_over`. It travels to a worker process as text."""
    base: Any = PaddedRunner
    if next(model.parameters()).is_cuda:
        from ..devices.cuda.runner import CudaRunner

        base = CudaRunner
    carry_over = kept.defined(source, "carry_over")
    return type("LearnedRunner", (base,), {"carry_over": staticmethod(carry_over)})(model, **options)


class BatcherStream:
    """A stream of a batcher as the lab of notebook 02 has it: there "step" is the name of every step."""

    def __init__(self, stream: Any, batcher: Any):
        self.stream, self.batcher, self.name = stream, batcher, stream.name
        self.marks: dict[str, Any] = {}

    def launch(self, command: Any, slot: int) -> None:
        self.stream.launch(self.batcher.slots[slot].command if command == "step" else command, slot)

    def wait_stream(self, other: BatcherStream) -> None:
        """As PyTorch's: what is launched here later starts after all that `other` has been given so far."""
        wait_stream(self, other, self.batcher.device.event)

    def __getattr__(self, name: str) -> Any:
        if name == "stream":
            raise AttributeError(name)
        return getattr(self.stream, name)


class YourBatcher(AsyncBatcher):
    """The asynchronous batcher with a learner's parts in place of its own.

    step(batcher), launch_step(streams, slot), prune(kv, owner), carry_over(carry, outputs, ids): as in the notebooks.
    wait(batcher, slot), commit(scheduler, plan, token_ids), carry_ids(carries, num_slots, batch), token_number(row),
    host_buffers(shape, on_cuda): for the puzzles; the last one only on the virtual clock.
    most_turns: Endless after so many turns; None for a run that may last.

    kept.CannotKeep if `carry_over` uses what cannot be written down: its text travels to the device.
    """

    mode = "yours"

    def __init__(self, model: Any, *, most_turns: int | None = None, **options: Any):
        names = "step launch_step prune carry_over wait commit carry_ids token_number host_buffers"
        self.parts = {name: options.pop(name, None) for name in names.split()}
        self.turns_left = most_turns
        carry_over = self.parts["carry_over"]
        if carry_over is not None and carry_over is not Runner.carry_over:
            self.runner = partial(learned_runner, source=kept.source_of(carry_over, "carry_over"))
        super().__init__(model, **options)
        self.lab_streams = [BatcherStream(stream, self) for stream in self.device.streams]

    def _new_books(self) -> None:
        super()._new_books()
        for owner, name in ((self.kv, "prune"), (self.scheduler, "commit")):
            if self.parts[name] is not None:
                setattr(owner, name, MethodType(self.parts[name], owner))

    def use_buffers(self, program: Any) -> None:
        """Let the slots and the program on the device share the buffers that the learner's `host_buffers` makes."""
        if self.parts["host_buffers"] is not None:
            pairs = self.parts["host_buffers"](self.shape, False)
            program.host[:] = pairs
            for slot, (inputs, output_ids) in zip(self.slots, pairs, strict=True):
                slot.inputs, slot.output_ids = inputs.numpy(), output_ids.numpy()
                slot.fields = self.shape.fields(slot.inputs)

    def step(self) -> bool:
        if self.turns_left is not None:
            self.turns_left -= 1
            if self.turns_left < 0:
                raise Endless("the loop goes on turning, though all should have been served long ago")
        step = self.parts["step"]
        return super().step() if step is None else step(self)

    @host_span
    def fill(self, plan: Any) -> Any:
        slot = AsyncBatcher.fill.__wrapped__(self, plan)  # type: ignore[attr-defined]
        rows, fields = plan.rows, slot.fields
        if self.parts["carry_ids"] is not None:
            carries = [row.carry for row in rows]
            fields["carry"][: len(rows)] = self.parts["carry_ids"](carries, len(self.slots), self.shape.max_batch_size)
        if self.parts["token_number"] is not None and slot.command.sampled:
            seeds = np.array([row.state.request.sampling.seed for row in rows], np.uint64)
            fields["uniform"][: len(rows)] = uniforms(
                seeds, np.array([self.parts["token_number"](row) for row in rows])
            )
        return slot

    @host_span
    def launch(self, slot: Any) -> None:
        if self.parts["launch_step"] is None:
            AsyncBatcher.launch.__wrapped__(self, slot)  # type: ignore[attr-defined]
        else:
            self.parts["launch_step"](tuple(self.lab_streams), slot)

    @host_span
    def wait(self, slot: Any) -> None:
        if self.parts["wait"] is None:
            AsyncBatcher.wait.__wrapped__(self, slot)  # type: ignore[attr-defined]
        else:
            self.parts["wait"](self, slot)


def limited(function: Callable[..., Any], most: int = MOST_LINES) -> Callable[..., Any]:
    """The function, but it raises Endless once it has run so many of its lines in one call. What it calls may run as
    many lines as it likes, if it was not written in the same cell."""

    def call(*args: Any) -> Any:
        count, file, before = 0, function.__code__.co_filename, sys.gettrace()

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal count
            if frame.f_code.co_filename != file:
                return None
            count += event == "line"
            if count > most:
                raise Endless(f"it was stopped after {most:,} lines: a loop in it does not end")
            return trace

        sys.settrace(trace)
        try:
            return function(*args)
        finally:
            sys.settrace(before)

    return call

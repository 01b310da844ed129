"""Streams and events: how the host tells a device what to do without waiting for it.

A *stream* is a queue of work that runs in order; two streams run at the same time unless an *event* orders them. The
names are those of `torch.cuda`; `launch` stands for a kernel launch or graph replay: it names a command and a slot, and
never carries a closure. Every device of `devices/` speaks this protocol. What runs on it is a *program*, any object
with `run(command, slot)`; `runner.py` has the one that serves a model.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

STREAMS = ("H2D", "compute", "D2H")
EVENTS = ("inputs_ready", "step_done", "outputs_ready")  # of a slot, one recorded on each of the streams


class DeviceError(RuntimeError):
    """A command failed on the device, or the device is gone. The message says what happened there."""


def check_process(owner: int) -> None:
    """DeviceError in any process but number `owner`: a forked copy of a batcher must not use what is not its own."""
    if os.getpid() != owner:
        raise DeviceError(
            f"the batcher belongs to process {owner}, and this is process {os.getpid()}, made from it by fork: open a "
            "batcher of your own here, or start processes by spawn"
        )


class Event(Protocol):
    """A mark in a stream. Recording it again moves the mark; a wait means the newest mark at the time of the call."""

    def synchronize(self) -> None: ...  # the host waits until the device has reached the mark
    def query(self) -> bool: ...  # has it? (True if the event was never recorded, as in CUDA)


class Stream(Protocol):
    """Work in order. Every method but `synchronize` returns at once."""

    name: str

    def launch(self, command: Any, slot: int) -> None: ...
    def wait_event(self, event: Any) -> None: ...  # what is launched here later starts after the event's mark
    def record_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool: ...


class CostModel(Protocol):
    """Says the times of a virtual clock (`Costs` in `devices/virtual.py`)."""

    def seconds(self, name: str, work: Any, number: int) -> float: ...


class Device(Protocol):
    """Three streams and a program. `clock` says in words whose times its times are, `shape` is that of its steps."""

    clock: str
    shape: Any

    @property
    def streams(self) -> tuple[Stream, Stream, Stream]: ...

    def event(self, name: str = "an event", slot: int | None = None) -> Event:
        """A new event. `name` is for messages; with `slot` it is one of the slot's own `EVENTS`."""

    def now(self) -> float:
        """Seconds on the host's clock."""

    def wait_until(self, moment: float) -> None:
        """The host does nothing until then."""

    def host_begins(self, phase: str, plan: Any, kv: Any) -> None:
        """The host begins a part of a step: "plan", "fill", "launch", "wait" or "commit". `plan` is the step's, None
        while it is planned; `kv` are the books of the KV cache."""

    def host_ends(self, phase: str, plan: Any) -> None:
        """The host has done that part. `plan` is None if there was nothing to plan."""

    def spans(self, slot: int) -> Any:
        """[start, end] of the slot's newest commands, one on each stream: seconds of `now()`. Asked when done. On CUDA
        it is a function that gives them at any later time: reading its events takes long, and the device may wait."""

    def parts(self, slot: int) -> Any:
        """The seconds that the slot's newest step spent on carry-over, on the model and on sampling, or a function that
        gives them; zeros where the device does not tell them apart. Asked after `spans`."""

    def failure(self, slot: int) -> str | None:
        """The text of the error in the slot's newest commands, or None."""

    def abandon(self, slots: Any) -> None:
        """The device is lost: keep alive what must not be freed any more. `slots` hold buffers of the host."""

    def close(self) -> None: ...


def order(earlier: Stream, later: Stream, event: Any) -> None:
    """What is launched on `later` from now on starts after all that `earlier` has been given so far. The host waits for
    none of it. (`torch.cuda` calls these two lines `later.wait_stream(earlier)`.)"""
    earlier.record_event(event)
    later.wait_event(event)


def launch_step(streams: tuple[Stream, Stream, Stream], slot: Any) -> None:
    """Tell the three streams to copy a step's inputs in, to compute it and to copy its results out, each after the one
    before. The host waits for none of it; later it waits for `slot.outputs_ready`. `slot` (`slot.py`) names the command
    and has the three events. The copy in waits for nobody: the host fills a slot only when its last step is done."""
    h2d, compute, d2h = streams
    h2d.launch("copy_in", slot.index)
    order(h2d, compute, slot.inputs_ready)
    compute.launch(slot.command, slot.index)
    order(compute, d2h, slot.step_done)
    d2h.launch("copy_out", slot.index)
    d2h.record_event(slot.outputs_ready)

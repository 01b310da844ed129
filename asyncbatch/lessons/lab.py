"""Notebook 02: a small device to try streams on. Its step multiplies a number by 6, and its times are known.

lab = Lab("virtual")                 # exact times; "cpu" (a second process) and "cuda" (a GPU) really measure
lab.run(launch_step, [7, 8, 9])      # [42, 48, 54]
draw({"in order": lab})              # lab_pictures.py: lanes, and arrows for the events that were waited for
explore(program(launch_step))        # lab_orders.py: the same launch in every order that is possible
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from .. import streams
from ..devices import open_program
from ..devices.virtual import Costs, VirtualDevice

# ---- the device ------------------------------------------------------------------------------------------------------

COMMANDS = {"copy_in": "H2D", "step": "compute", "copy_out": "D2H"}  # each with the stream that it belongs on
EVENTS = ("inputs_ready", "step_done", "outputs_ready")  # of a slot: the end of its command on each stream
MS = {"copy_in": 10.0, "step": 40.0, "copy_out": 10.0}
HOST_MS = {"fill": 2.0, "launch": 1.0}  # only on the virtual clock: on the others, this work takes real time


def check_command(command: str) -> None:
    """ValueError for a command that the lab does not have."""
    if command not in COMMANDS:
        raise ValueError(f"there is no command {command!r}: there are {', '.join(COMMANDS)}")


class LabProgram:
    """What the lab's device runs: "copy_in" brings the number of a slot to the device, "step" multiplies it by 6, and
    "copy_out" brings the result to the host. A command first takes its time, and has its effect at the end, as on the
    virtual clock."""

    def __init__(self, model, *, host, ms):
        where = torch.device("cpu") if model is None else next(model.parameters()).device
        self.host, self.ms = host, ms
        self.inputs = [torch.zeros(1, dtype=torch.int64, device=where) for _ in host]
        self.results = [torch.zeros(1, dtype=torch.int64, device=where) for _ in host]
        self.spend = spend_on_gpu() if where.type == "cuda" else lambda ms: time.sleep(1e-3 * ms)

    def run(self, command: str, slot: int) -> None:
        self.spend(self.ms.get(command, 0.0))
        host_input, host_output = self.host[slot]
        if command == "copy_in":
            self.inputs[slot].copy_(host_input, non_blocking=True)
        elif command == "step":
            torch.mul(self.inputs[slot], 6, out=self.results[slot])
        else:
            host_output.copy_(self.results[slot], non_blocking=True)


def spend_on_gpu() -> Callable[[float], None]:
    """A function that keeps the current CUDA stream busy for a number of milliseconds, in a small part of the GPU."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(1000)  # the first launch loads the kernel
    start.record()
    torch.cuda._sleep(10_000_000)
    end.record()
    end.synchronize()
    per_ms = 10_000_000 / start.elapsed_time(end)
    return lambda ms: torch.cuda._sleep(int(per_ms * ms)) if ms else None


@cache
def _owner(where: str) -> torch.nn.Module:
    """A device belongs to a model. This is the smallest model that there is, and it computes nothing."""
    return torch.nn.Linear(1, 1).to(where)


_OPEN: list[tuple[weakref.ref[Lab], Any]] = []  # the labs on real devices, each with its device


def _close_unused() -> None:
    """Close the devices of labs that no longer exist: readers run the cells of a notebook again and again. (Not with
    `weakref.finalize`, which can run in the middle of another call to the device.)"""
    for entry in list(_OPEN):
        lab, device = entry
        if lab() is None:
            _OPEN.remove(entry)
            device.close()


class Call(NamedTuple):
    """Something that the host did.

    kind: "launch", "record", "wait", "synchronize", "fill", "read" or "work". lane: the stream that was called, or
    "host". what: the command, the event, or the number that was read. start, end: seconds on the host's clock. span:
    when the device did it, if that is known at once, as on the virtual clock.
    """

    kind: str
    lane: str
    what: Any
    slot: int | None
    start: float
    end: float
    span: tuple[float, float] | None = None


class LabEvent:
    """An event of a lab, which notes each wait of the host."""

    def __init__(self, lab: Lab, name: str):
        self.lab, self.name, self.event = lab, name, lab.device.event()

    def synchronize(self) -> None:
        with self.lab.noting("synchronize", "host", self):
            self.event.synchronize()

    def query(self) -> bool:
        return self.event.query()


class LabStream:
    """A stream of a lab, which notes each call."""

    def __init__(self, lab: Lab, stream: Any):
        self.lab, self.stream, self.name = lab, stream, stream.name
        self.marks: dict[str, LabEvent] = {}

    def launch(self, command: str, slot: int) -> None:
        check_command(command)
        with self.lab.noting("launch", self.name, command, slot):
            self.stream.launch(command, slot)
        if self.lab.device.clock == "virtual":
            end = self.stream.time
            self.lab.calls[-1] = self.lab.calls[-1]._replace(span=(end - 1e-3 * self.lab.ms[command], end))

    def record_event(self, event: LabEvent) -> None:
        with self.lab.noting("record", self.name, event):
            self.stream.record_event(event.event)

    def wait_event(self, event: LabEvent) -> None:
        with self.lab.noting("wait", self.name, event):
            self.stream.wait_event(event.event)

    def wait_stream(self, other: LabStream) -> None:
        """As PyTorch's: what is launched here later starts after all that `other` has been given so far."""
        wait_stream(self, other, self.lab.event)

    def synchronize(self) -> None:
        with self.lab.noting("synchronize", "host", self):
            self.stream.synchronize()

    def query(self) -> bool:
        return self.stream.query()


def wait_stream(later: Any, earlier: Any, event: Callable[[str], Any]) -> None:
    """PyTorch's `later.wait_stream(earlier)`, with an event of its own for each pair of streams."""
    if earlier.name not in later.marks:
        later.marks[earlier.name] = event(f"{later.name}'s mark in {earlier.name}")
    streams.order(earlier, later, later.marks[earlier.name])


@dataclass(frozen=True)
class LabSlot:
    """Like `asyncbatch.slot.Slot`: a number, the command to launch as the step, and the three events of a step."""

    index: int
    inputs_ready: Any
    step_done: Any
    outputs_ready: Any
    command: str = "step"


def lab_slot(index: int, event: Callable[[str], Any]) -> LabSlot:
    return LabSlot(index, *(event(f"slot {index}'s {name}") for name in EVENTS))


class Lab:
    """A device with three streams and some slots. It notes every call of the host.

    where: "virtual" (exact times, and nobody really waits), "cpu" (a second process is the device) or "cuda".
    ms: milliseconds of the commands, if they are not those of `MS`.
    """

    def __init__(self, where: str = "virtual", num_slots: int = 3, ms: Mapping[str, float] | None = None):
        self.ms = {**MS, **(ms or {})}
        host = [tuple(torch.zeros(1, dtype=torch.int64) for _ in range(2)) for _ in range(num_slots)]
        if where == "virtual":
            cost = lambda work: 1e-3 * self.ms[work.kind]  # noqa: E731
            program = LabProgram(None, host=host, ms={})
            self.device: Any = VirtualDevice(program, num_slots, Costs(copy_in=cost, step=cost, copy_out=cost))
        elif where in ("cpu", "cuda"):
            host = [tuple(t.pin_memory() if where == "cuda" else t.share_memory_() for t in pair) for pair in host]
            self.device = open_program(_owner(where), LabProgram, num_slots, host=host, ms=self.ms)
            _close_unused()
            _OPEN.append((weakref.ref(self), self.device))
        else:
            raise ValueError(f"a Lab is on 'virtual', 'cpu' or 'cuda', not on {where!r}")
        self.host = host
        self.calls: list[Call] = []
        self.streams = tuple(LabStream(self, stream) for stream in self.device.streams)
        self.slots = [lab_slot(index, self.event) for index in range(num_slots)]
        if where == "cuda":
            for stream, command in zip(self.streams, COMMANDS, strict=True):
                stream.launch(command, 0)  # the first launch loads kernels, and anything may have to wait for that
                stream.synchronize()
            self.calls.clear()

    def event(self, name: str = "event") -> LabEvent:
        return LabEvent(self, name)

    @contextlib.contextmanager
    def noting(self, kind: str, lane: str, what: Any = None, slot: int | None = None) -> Iterator[None]:
        """Note what the host does in the `with` block. On the virtual clock it first takes the time in `HOST_MS`."""
        start = self.device.now()
        if self.device.clock == "virtual":
            self.device.work(1e-3 * HOST_MS.get(kind, 0.0))
        yield
        self.calls.append(Call(kind, lane, what, slot, start, self.device.now()))

    def fill(self, slot: LabSlot, number: int) -> None:
        """The host writes a number into a slot's host inputs."""
        with self.noting("fill", "host", number, slot.index):
            self.host[slot.index][0].fill_(number)

    def read(self, slot: LabSlot) -> int:
        """The host reads the output of a slot, whatever it is at that moment. It waits for nothing."""
        now = self.device.now()
        number = int(self.host[slot.index][1])
        self.calls.append(Call("read", "host", number, slot.index, now, now))
        return number

    def work(self, ms: float) -> None:
        """The host does other work for so many milliseconds."""
        with self.noting("work", "host"):
            self.device.work(1e-3 * ms) if self.device.clock == "virtual" else time.sleep(1e-3 * ms)

    def run(self, launch: Callable[[Any, Any], Any], numbers: Sequence[int]) -> list[int]:
        """Serve one batch for each number, with `launch(streams, slot)` for each; see `serve`."""
        return serve(self, launch, numbers)

    def times(self, command: str) -> tuple[list[float], list[float]]:
        """Starts and ends of a command of all slots, in milliseconds since the host's first call. Waits until all
        launches are done. ValueError for a command that the lab does not have."""
        check_command(command)
        origin = self.calls[0].start if self.calls else 0.0
        spans = [(start, end) for (what, _), (_, start, end) in sorted(self.spans().items()) if what == command]
        in_ms = [[round(1e3 * (moment - origin), 6) for moment in span] for span in spans]
        return [start for start, _ in in_ms], [end for _, end in in_ms]

    def spans(self) -> dict[tuple[str, int], tuple[str, float, float]]:
        """For each (command, slot): the stream, start and end (seconds) of its newest launch. Waits until all launches
        are done."""
        for stream in self.device.streams:
            stream.synchronize()
        spans = {}
        for call in self.calls:
            if call.kind == "launch" and call.slot is not None:
                start, end = call.span or self._newest(streams.STREAMS.index(call.lane), call.slot)
                spans[call.what, call.slot] = call.lane, start, end
        return spans

    def _newest(self, number: int, slot: int) -> tuple[float, float]:
        """Start and end (seconds) of a slot's newest command on a stream. On CUDA this cannot use the device's `spans`,
        which may be called once a step, and only after all three streams were used."""
        if self.device.clock != "cuda":
            start, end = self.device.spans(slot)[number]
        else:
            events, clock = self.device.timing[slot][number], self.device.event_clock
            start, end = (clock.origin + 1e-3 * clock.event.elapsed_time(event) for event in events)
        return start, end

    @property
    def total_ms(self) -> float:
        """Milliseconds from the host's first call to the end of everything that it launched or waited for."""
        ends = [end for _, _, end in self.spans().values()]
        return 1e3 * (max(ends + [call.end for call in self.calls]) - self.calls[0].start)

    def waited_ms(self, calls: Sequence[Call] | None = None) -> float:
        """How many milliseconds the host waited for the device, in these calls (None: in all)."""
        chosen = self.calls if calls is None else calls
        return 1e3 * sum(call.end - call.start for call in chosen if call.kind == "synchronize")


def serve(lab: Any, launch: Callable[[Any, Any], Any], numbers: Sequence[int]) -> list[Any]:
    """The asynchronous loop in small. One number is a batch. While there is a free slot, batches are launched; when
    there is none, the host waits for the oldest batch. Returns what it read for each number."""
    slots, read = lab.slots, []
    for batch, number in enumerate(numbers):
        slot = slots[batch % len(slots)]
        if batch >= len(slots):
            slot.outputs_ready.synchronize()
            read.append(lab.read(slot))
        lab.fill(slot, number)
        if launch(lab.streams, slot) is ...:
            raise NotImplementedError
    for batch in range(len(read), len(numbers)):
        slots[batch % len(slots)].outputs_ready.synchronize()
        read.append(lab.read(slots[batch % len(slots)]))
    return read


def serve_without_waiting(lab: Any, launch: Callable[[Any, Any], Any], numbers: Sequence[int], host_ms: float = 0.0):
    """Like `serve`, but the host waits for nothing. It reads a batch after it has launched the next one and done other
    work for `host_ms`."""
    read = []
    for batch, number in enumerate(numbers):
        lab.fill(lab.slots[batch], number)
        launch(lab.streams, lab.slots[batch])
        lab.work(host_ms)
        if batch:
            read.append(lab.read(lab.slots[batch - 1]))
    lab.work(host_ms)
    return [*read, lab.read(lab.slots[len(numbers) - 1])]

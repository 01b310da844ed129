"""The virtual clock: a device without threads, whose times are chosen beforehand and are the same in every run.

    costs = Costs(plan=1e-3, step=lambda work: 2e-3 + 1e-6 * work.context)
    AsyncBatcher(model, clock=costs)             # the loops are unchanged; `timeline` is exact

No time passes here. The host's clock is a number, and each part of a step moves it on by what the part costs. Every
command on a stream gets its start and end at its launch. It starts when the stream is free, the events that it was told
to wait for are reached, and the host has launched it. It takes effect at its end: before the host does anything at a
virtual time, all commands that have ended by then are run, in the order of their ends (of equal ones, in the order of
launch). So a copy that comes too early brings the old value, and one that nobody waits for has brought nothing yet:
every time.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch

from ..scheduler import BatchPlan
from ..slot import slot_of
from ..streams import STREAMS, CostModel, DeviceError

HOST_PHASES = ("plan", "fill", "launch", "commit")
OPERATIONS = ("copy_in", "step", "copy_out")  # what a command on each of the three streams is to the cost model
QUERY_S = 1e-6  # what a `query` that finds nothing costs the host: otherwise a loop that polls would never end


class StepWork(NamedTuple):
    """What a cost function is told. kind: "decode" or "prefill" (any prefill row). rows: requests in the step.
    context: tokens that the rows' last queries attend to, over all rows. num_prefill_tokens: prompt tokens computed.
    For a command that no batcher launched, `kind` is the command, and the others are 0."""

    kind: str
    rows: int
    context: int
    num_prefill_tokens: int

    @classmethod
    def of(cls, plan: BatchPlan) -> StepWork:
        prefill = sum(row.num_tokens for row in plan.rows[plan.num_decode :])
        return cls(plan.work, len(plan.rows), plan.context, prefill)


Cost = float | Callable[[StepWork], float]


def is_time(value: Any) -> bool:
    """Whether it is a number of seconds from 0."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf


@dataclass(frozen=True)
class Costs:
    """Seconds of everything, each a number or a function of a `StepWork`.

    plan, fill, launch, commit: the host's parts of a step. What `launch` launches can start at its end.
    copy_in, step, copy_out: the device's, one on each stream.
    jitter: each time is multiplied by a number from 1 - jitter to 1 + jitter that depends on `seed`, the step's number
        and which of the seven it is, and on nothing else: the same in every run, and in both loops.

    ValueError for anything else than seconds from 0; a function's results are looked at when they are used.
    """

    plan: Cost = 0.4e-3
    fill: Cost = 0.3e-3
    launch: Cost = 0.1e-3
    commit: Cost = 0.2e-3
    copy_in: Cost = 0.1e-3
    step: Cost = 3e-3
    copy_out: Cost = 0.1e-3
    jitter: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in (*HOST_PHASES, *OPERATIONS) and not callable(value) and not is_time(value):
                raise ValueError(f"Costs: {name} is {value!r}, allowed are seconds from 0, or a function of a StepWork")
        if not is_time(self.jitter) or self.jitter > 1:
            raise ValueError(f"Costs: jitter is {self.jitter!r}, allowed is a share from 0 to 1")

    def seconds(self, name: str, work: StepWork, number: int) -> float:
        """What `name` ("plan", ..., "copy_out") costs for this work; `number` is the step's, for the jitter."""
        cost = getattr(self, name)
        value = cost(work) if callable(cost) else cost
        if not is_time(value):
            raise ValueError(f"Costs: {name} gave {value!r} for {work}, allowed are seconds from 0")
        if not self.jitter:
            return float(value)
        draw = random.Random(f"{self.seed} {name} {number}").uniform(-1.0, 1.0)
        return float(value) * (1.0 + self.jitter * draw)


class VirtualEvent:
    """`time`: when the device reaches the newest mark, known as soon as it is recorded. Before that: long ago."""

    def __init__(self, device: VirtualDevice):
        self.device, self.time = device, -math.inf

    def synchronize(self) -> None:
        self.device.wait_until(self.time)

    def query(self) -> bool:
        return self.device.has_reached(self.time)


class VirtualStream:
    """`time`: when all that was put into the stream so far is done."""

    def __init__(self, device: VirtualDevice, number: int):
        self.device, self.number, self.name, self.time = device, number, STREAMS[number], 0.0

    def launch(self, command: Any, slot: int) -> None:
        self.device._launch(self, command, slot)

    def wait_event(self, event: VirtualEvent) -> None:
        self.time = max(self.time, event.time)

    def record_event(self, event: VirtualEvent) -> None:
        # Not before the host has said so.
        self.time = event.time = max(self.time, self.device.now())

    def synchronize(self) -> None:
        self.device.wait_until(self.time)

    def query(self) -> bool:
        return self.device.has_reached(self.time)


class VirtualDevice:
    """A device on the virtual clock. program: any object with `run(command, slot)`; it runs in this process, when a
    command's end has come. A command that fails takes its time all the same, and so do those that are skipped for it.

    host_work_s: what each plan costs the host more than `costs` says.
    Host time begins at 0.0 and never goes back. Any thread may ask for it.
    """

    clock = "virtual"
    shape: Any = None

    def __init__(self, program: Any, num_slots: int, costs: CostModel | None = None, host_work_s: float = 0.0):
        self.program, self.host_work_s = program, host_work_s
        self.costs: CostModel = Costs() if costs is None else costs
        self.num_slots = num_slots
        self.streams = (VirtualStream(self, 0), VirtualStream(self, 1), VirtualStream(self, 2))
        self._host_s = 0.0
        self._lock = threading.RLock()  # around the host's time and what it brings about
        self._under_way: list[tuple[float, int, float, int, str, int]] = []  # a heap: the first to end comes first
        self._order = itertools.count()
        self._plans: dict[int, tuple[int, StepWork]] = {}  # by slot: step number and work of its newest plan
        self._times = np.zeros((num_slots, len(STREAMS), 2))
        self._errors: list[str | None] = [None] * num_slots

    # ---- the host's time ---------------------------------------------------------------------------------------

    def now(self) -> float:
        """The host's virtual time in seconds. What has ended by then has taken effect."""
        with self._lock:
            self._settle()
            return self._host_s

    def work(self, seconds: float) -> None:
        """The host is busy for so long."""
        if not is_time(seconds):
            raise ValueError(f"the host works for {seconds!r}: allowed are seconds from 0")
        self.wait_until(self._host_s + seconds)

    def host_begins(self, phase: str, plan: BatchPlan | None, kv: Any) -> None:
        if phase == "launch":  # paid for beforehand: what it launches starts when the host is through with it
            self._charge(phase, plan)

    def host_ends(self, phase: str, plan: BatchPlan | None) -> None:
        if phase != "launch":
            self._charge(phase, plan)

    def _charge(self, phase: str, plan: BatchPlan | None) -> None:
        """A part of a step costs the host what the cost model says. Waiting costs nothing of its own."""
        if plan is None or phase not in HOST_PHASES:
            return
        work = StepWork.of(plan)
        if phase != "commit":  # by then the slot may hold another step
            self._plans[slot_of(plan.step, self.num_slots)] = plan.step, work
        extra = self.host_work_s if phase == "plan" else 0.0
        self.work(self.costs.seconds(phase, work, plan.step) + extra)

    def wait_until(self, moment: float) -> None:
        """The host does nothing until then."""
        with self._lock:
            self._host_s = max(self._host_s, moment)
            self._settle()

    def has_reached(self, moment: float) -> bool:
        with self._lock:
            self._settle()
            reached = moment <= self._host_s
            if not reached:
                self.wait_until(self._host_s + QUERY_S)
            return reached

    # ---- the device --------------------------------------------------------------------------------------------

    def event(self, name: str = "an event", slot: int | None = None) -> VirtualEvent:
        return VirtualEvent(self)

    def spans(self, slot: int) -> list[list[float]]:
        self.now()
        return self._times[slot].tolist()

    def parts(self, slot: int) -> list[float]:
        return [0.0, 0.0, 0.0]  # a step has one cost

    def failure(self, slot: int) -> str | None:
        self.now()
        return self._errors[slot]

    def abandon(self, slots: Any) -> None:
        pass

    def close(self) -> None:
        """Wait for all that is under way, and free the program."""
        if self.program is not None:
            for stream in self.streams:
                stream.synchronize()
            self.program = None

    def check_launch(self, command: Any, slot: int) -> None:
        """DeviceError for a command that the device cannot take."""
        if self.program is None:
            raise DeviceError(f"{str(command)!r} launched on a device that is closed")
        if not 0 <= slot < self.num_slots:
            raise DeviceError(
                f"{str(command)!r} launched on slot {slot}: the device has slots 0 to {self.num_slots - 1}"
            )

    def _launch(self, stream: VirtualStream, command: Any, slot: int) -> None:
        self.check_launch(command, slot)
        order = next(self._order)
        step, work = self._plans.get(slot, (order, StepWork(command, 0, 0, 0)))
        start = max(stream.time, self.now())
        stream.time = end = start + self.costs.seconds(OPERATIONS[stream.number], work, step)
        with self._lock:
            heapq.heappush(self._under_way, (end, order, start, stream.number, command, slot))
            self._settle()

    def _settle(self, moment: float = -math.inf) -> None:
        """Let everything take effect that has ended by now, or by a later moment."""
        while self._under_way and self._under_way[0][0] <= max(self._host_s, moment):
            self._run(*heapq.heappop(self._under_way))

    def _run(self, end: float, order: int, start: float, number: int, command: Any, slot: int) -> None:
        if number == 0:
            self._errors[slot] = None  # a step begins on H2D; its later commands are skipped once one of them failed
        if self._errors[slot] is None:
            try:
                with torch.inference_mode():
                    self.program.run(command, slot)
            except Exception:
                self._errors[slot] = f"{command} failed on the device:\n{traceback.format_exc()}"
        self._times[slot, number] = start, end

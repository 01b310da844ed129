"""Several devices on one virtual clock, which compute each step together: ranks, without a GPU and without a process.

    ranks = VirtualRanks(2, AllReduces(count=2, seconds=0.2e-3))
    batchers = [AsyncBatcher(model, clock=ranks.clock(rank, Costs(...)), ...) for rank in range(2)]
    ranks.turn = [batcher.turn for batcher in batchers]

Every rank has a host and a device of its own, with the unchanged loop, and times of its own. What binds them is the
all-reduces in each step: one begins when all ranks have arrived, and ends for all at the same moment. So when a step
ends may not be known yet when it is launched: a stream is a queue, which goes on as soon as what it waits for is known.
A host that waits for such a moment lets the other hosts go on meanwhile, each a turn of its loop at a time, within its
own call: there is one thread, and every run is the same.

All-reduces are matched as NCCL does it, by nothing but their order. So ranks that disagree on a step hang for ever, or,
where the sizes happen to fit, add up what does not belong together. Here both are found: see `DisagreementError`.

What a step needs of the other ranks (`ShareProgram`) is computed when all have arrived. By then a device may be ahead
of what its host has seen, as devices are; hosts that do not wait for theirs belong to `check_races`, one at a time.
"""

from __future__ import annotations

import heapq
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ..scheduler import BatchPlan, StepKind
from ..slot import slot_of
from ..streams import STREAMS, CostModel, DeviceError
from .all_reduces import NEVER, OTHER_SIZES, WRONG_SUMS, AllReduce, AllReduces, DisagreementError, Exchange, plan_digest
from .virtual import OPERATIONS, Costs, StepWork, VirtualDevice


class ShareProgram(Protocol):
    """A program that computes a step together with those of other ranks. `share` is called when the rank is at the last
    all-reduce of a forward pass ("decode" or "prefill") and gives its part of the sum, an array of the same shape on
    all ranks; `take` gets the sum. `run` comes later, at the step's end, as always."""

    def share(self, command: StepKind, slot: int, passes: str) -> np.ndarray: ...
    def take(self, slot: int, passes: str, total: np.ndarray) -> None: ...


@dataclass(frozen=True)
class RankClock:
    """What a batcher takes as its `clock` to be rank number `rank` of `ranks`. costs: the times of its host, and of its
    device without the all-reduces."""

    ranks: VirtualRanks
    rank: int
    costs: CostModel

    def seconds(self, name: str, work: StepWork, number: int) -> float:
        return self.costs.seconds(name, work, number)

    def open_device(self, program: Any, num_slots: int, host_work_s: float) -> RankDevice:
        """The rank's device; called once, by its batcher."""
        return self.ranks._open(self, program, num_slots, host_work_s)


class VirtualRanks:
    """Ranks that share a virtual clock.

    size: how many. all_reduces: of each step; one rank alone has none. check: raise `DisagreementError` as soon as two
    ranks are at the same all-reduce with different plans. Without it they do what GPUs do: go on if the shapes fit, and
    wait for ever if not, which is found in any case.

    turn: for each rank a function that turns its loop once, and says whether it did anything (`batcher.turn`). It is
    asked when another rank waits for this one. exchanges: the all-reduces that were done, in order."""

    def __init__(self, size: int, all_reduces: AllReduces | None = None, check: bool = True):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"size is {size!r}: allowed are whole numbers from 1")
        given = AllReduces() if all_reduces is None else all_reduces
        self.size, self.check = size, check
        self.all_reduces = given if size > 1 else AllReduces(0, given.seconds, given.width)
        self.turn: list[Callable[[], bool]] = []
        self.devices: list[RankDevice | None] = [None] * size
        self.exchanges: list[Exchange] = []
        self.broken = ""  # why nothing goes on any more
        self._asked: list[int] = []  # the ranks whose hosts wait for others at this moment, each within the one before

    def clock(self, rank: int, costs: CostModel | None = None) -> RankClock:
        """The clock of a rank's batcher. ValueError for a rank that is not there, or is taken."""
        if not isinstance(rank, int) or not 0 <= rank < self.size:
            raise ValueError(f"rank is {rank!r}: allowed are 0 to {self.size - 1}")
        return RankClock(self, rank, Costs() if costs is None else costs)

    def _open(self, clock: RankClock, program: Any, num_slots: int, host_work_s: float) -> RankDevice:
        if self.devices[clock.rank] is not None:
            raise ValueError(f"rank {clock.rank} has a batcher: each rank has one, with a clock of its own")
        device = RankDevice(self, clock, program, num_slots, host_work_s)
        self.devices[clock.rank] = device
        return device

    def wait_for(self, rank: int, known: Callable[[], bool]) -> None:
        """The host of `rank` waits for what other ranks bring about: they get their turns until `known()`.
        DisagreementError if none of them can go on."""
        self._asked.append(rank)
        try:
            while not known() and not self.broken:
                others = [other for other in range(self.size) if other not in self._asked]
                # Who has launched least first: it is the one that is waited for, and it can always go on.
                others.sort(key=lambda other: self.devices[other].last_step if self.devices[other] else -1)  # type: ignore[union-attr]
                if not any(self.turn[other]() or known() for other in others if other < len(self.turn)):
                    raise self._hang()
        finally:
            self._asked.remove(rank)

    # ---- all streams of all ranks --------------------------------------------------------------------------------

    def go_on(self) -> None:
        """Let every stream go as far as is known by now."""
        if self.broken:
            raise DeviceError(f"the ranks do not go on: {self.broken}")
        moved = True
        while moved:
            devices = [device for device in self.devices if device is not None]
            moved = any([stream.go_on() for device in devices for stream in device.streams])
            moved = self._exchange() or moved

    def _exchange(self) -> bool:
        """Do the all-reduce at which all ranks are; False if there is none."""
        at = [None if device is None else device.streams[1].at for device in self.devices]
        here = [one for one in at if one is not None]
        if len(here) < self.size:
            return False
        if self.check and len({one.wanted[2:] for one in here}) > 1:
            raise self._disagreement(here)
        if len({one.wanted.shape for one in here}) > 1:
            return False
        began = max(one.arrived for one in here)
        ended = began + self.all_reduces.took(here[0].wanted.shape)
        wanted = [one.wanted for one in here]
        steps, arrived = tuple(one.step for one in wanted), tuple(one.arrived for one in here)
        self.exchanges.append(Exchange(wanted[0].sequence, steps, arrived, began, ended))
        if here[0].last:
            self._add_up(here)
        for device in self.devices:
            device.streams[1].exchanged(ended)  # type: ignore[union-attr]
        return True

    def _add_up(self, here: Sequence[_Arrival]) -> None:
        """Give each rank the sum of what all of them have. If one of them fails, the step fails on all."""
        devices = [device for device in self.devices if device is not None]
        try:
            with torch.inference_mode():
                shares = [device.share(one) for device, one in zip(devices, here, strict=True)]
        except Exception:
            for device, one in zip(devices, here, strict=True):
                device.fail(one.launched.slot, f"{one.wanted.kind} failed on a rank:\n{traceback.format_exc()}")
            return
        if all(share is not None for share in shares):
            for device, one in zip(devices, here, strict=True):
                device.program.take(one.launched.slot, one.passes, np.sum(shares, axis=0))

    # ---- what went wrong -----------------------------------------------------------------------------------------

    def _disagreement(self, here: Sequence[_Arrival]) -> DisagreementError:
        hangs = len({(one.wanted.number, tuple(one.launched.reduces)) for one in here}) > 1
        wanted = [one.wanted for one in here]
        return self._break(DisagreementError(wanted, hangs, OTHER_SIZES if hangs else WRONG_SUMS))

    def _hang(self) -> DisagreementError:
        """Nobody can go on: say where each rank is."""
        wanted, told = [], []
        for device in self.devices:
            at = device.streams[1].at if device is not None else None
            wanted.append(None if at is None else at.wanted)
            last = device.last_step if device is not None else -1
            told.append(f"its last was step {last}" if last >= 0 else "it has launched none")
        return self._break(DisagreementError(wanted, True, NEVER, told))

    def _break(self, error: DisagreementError) -> DisagreementError:
        self.broken = str(error).splitlines()[0]
        return error


class RankMark:
    """A place in a stream. time: when the device gets there, None while that is not known."""

    def __init__(self, time: float | None = None):
        self.time = time


class RankEvent:
    """The newest mark counts; before there is one, it was reached long ago."""

    def __init__(self, device: RankDevice):
        self.device, self.mark = device, RankMark(float("-inf"))

    def synchronize(self) -> None:
        self.device.wait_for(self.mark)

    def query(self) -> bool:
        return self.device.knows(self.mark) and self.device.has_reached(self.mark.time)  # type: ignore[arg-type]


class _Launched:
    """A command in a stream's queue. host_s: when the host launched it."""

    def __init__(self, device: RankDevice, stream: int, command: Any, slot: int):
        self.order, self.host_s = next(device._order), device.now()
        self.command, self.slot = command, slot
        self.step, self.work = device._plans.get(slot, (self.order, StepWork(command, 0, 0, 0)))
        self.digest, self.requests = device.agreed.get(slot, ("", ()))
        self.reduces = device.ranks.all_reduces.of(command) if stream == 1 else []
        seconds = device.costs.seconds(OPERATIONS[stream], self.work, self.step)
        self.part_s = seconds / (len(self.reduces) + 1)
        self.start: float | None = None
        self.done = 0  # of its all-reduces


class _Arrival(NamedTuple):
    """A step that is at an all-reduce. last: of its forward pass, `passes`."""

    launched: _Launched
    wanted: AllReduce
    arrived: float
    passes: str
    last: bool


class RankStream:
    """A queue of commands, waits and records. time: when all is done that has left it. at: the all-reduce that it is
    waiting in, if any."""

    def __init__(self, device: RankDevice, number: int):
        self.device, self.number, self.name, self.time = device, number, STREAMS[number], 0.0
        self.queue: deque[Any] = deque()
        self.at: _Arrival | None = None
        self.sequence = 0  # all-reduces done

    def launch(self, command: Any, slot: int) -> None:
        self.device.check_launch(command, slot)
        self._put(_Launched(self.device, self.number, command, slot))

    def wait_event(self, event: RankEvent) -> None:
        self._put(event.mark)

    def record_event(self, event: RankEvent) -> None:
        event.mark = RankMark()
        self._put((event.mark, self.device.now()))  # not before the host has said so

    def synchronize(self) -> None:
        self.device.wait_for(self._end())

    def query(self) -> bool:
        end = self._end()
        return self.device.knows(end) and self.device.has_reached(end.time)  # type: ignore[arg-type]

    def _end(self) -> RankMark:
        if not self.queue:
            return RankMark(self.time)
        mark = RankMark()
        self._put((mark, float("-inf")))
        return mark

    def _put(self, item: Any) -> None:
        self.queue.append(item)
        self.device.ranks.go_on()

    def go_on(self) -> bool:
        """Do what is known by now; whether that was anything."""
        moved = False
        while self.queue and self.at is None:
            item = self.queue[0]
            if isinstance(item, _Launched):
                self._run(item)
            elif isinstance(item, RankMark):  # a wait
                if item.time is None:
                    break
                self.time = max(self.time, item.time)
            else:
                mark, host_s = item
                self.time = mark.time = max(self.time, host_s)
            moved = True
            if self.at is None:
                self.queue.popleft()
        return moved

    def _run(self, launched: _Launched) -> None:
        if launched.start is None:
            launched.start = self.time = max(self.time, launched.host_s)
        self.time += launched.part_s
        if launched.done < len(launched.reduces):
            self.at = self._arrival(launched)
        else:
            self.device.ends(self.number, launched, self.time)

    def _arrival(self, launched: _Launched) -> _Arrival:
        number, of, kind = launched.done + 1, len(launched.reduces), str(launched.command)
        passes, shape = launched.reduces[launched.done]
        last = number == of or launched.reduces[number][0] != passes
        wanted = AllReduce(
            self.device.rank, self.sequence, launched.step, kind, number, of, shape, launched.digest, launched.requests
        )
        return _Arrival(launched, wanted, self.time, passes, last)

    def exchanged(self, ended: float) -> None:
        """The all-reduce is done."""
        assert self.at is not None
        self.at.launched.done += 1
        self.at, self.time, self.sequence = None, ended, self.sequence + 1


class RankDevice(VirtualDevice):
    """The device of one rank."""

    streams: tuple[RankStream, RankStream, RankStream]  # type: ignore[assignment]

    def __init__(self, ranks: VirtualRanks, clock: RankClock, program: Any, num_slots: int, host_work_s: float):
        super().__init__(program, num_slots, clock, host_work_s)
        self.ranks, self.rank = ranks, clock.rank
        self.streams = (RankStream(self, 0), RankStream(self, 1), RankStream(self, 2))
        self.agreed: dict[int, tuple[str, tuple[int, ...]]] = {}  # by slot: digest and requests of its newest plan
        self.last_step = -1

    def host_begins(self, phase: str, plan: BatchPlan | None, kv: Any) -> None:
        if phase == "launch" and plan is not None:
            # Now: by the time when the device gets there, the host may have seen more tokens.
            requests = tuple(row.state.number for row in plan.rows)
            self.agreed[slot_of(plan.step, self.num_slots)] = plan_digest(plan), requests
            self.last_step = plan.step
        super().host_begins(phase, plan, kv)

    def event(self, name: str = "an event", slot: int | None = None) -> Any:
        return RankEvent(self)

    def close(self) -> None:
        """As for one rank; but where the ranks have disagreed, nothing will ever be done."""
        if self.ranks.broken:
            self.program = None
        super().close()

    def wait_for(self, mark: RankMark) -> None:
        """The host waits until the device gets to the mark."""
        if self.knows(mark):
            self.wait_until(mark.time)  # type: ignore[arg-type]

    def knows(self, mark: RankMark) -> bool:
        """Whether the mark's time is known, once the other ranks have gone on as far as it takes. False only where they
        never will, because they disagreed before."""
        if mark.time is None:
            self.ranks.wait_for(self.rank, lambda: mark.time is not None)
        return mark.time is not None

    def ends(self, number: int, launched: _Launched, end: float) -> None:
        """A command has its times: it takes effect at its end."""
        item = (end, launched.order, launched.start or 0.0, number, launched.command, launched.slot)
        with self._lock:
            heapq.heappush(self._under_way, item)
            self._settle()

    def share(self, at: _Arrival) -> np.ndarray | None:
        """The rank's part of a sum; None where its program computes alone."""
        if not hasattr(self.program, "share"):
            return None
        self._settle(at.arrived)
        return self.program.share(at.launched.command, at.launched.slot, at.passes)

    def fail(self, slot: int, text: str) -> None:
        """The step in the slot has failed on another rank."""
        self._errors[slot] = text

"""A device of any kind with a race checker around it. Every call is forwarded, and every access is checked before."""

from __future__ import annotations

from typing import Any

from ..kv_cache import blocks_for
from ..ordering.races import HOST, RaceChecker, RaceError
from ..scheduler import BatchPlan
from ..slot import slot_of
from ..streams import EVENTS, STREAMS, Device


class CheckedDevice:
    """A device around another one: it forwards every call, and checks every access first.

    The checker knows what "copy_in" and "copy_out" access. Every other command counts as the step of its slot; which
    blocks and carried outputs that one uses it learns when the host fills the slot. With `collect` races are kept in
    `races`, without it the first one is raised as RaceError, and what would have raced is not launched.
    """

    def __init__(self, device: Device, num_slots: int, *, collect: bool = False):
        self.device: Any = device
        self.num_slots = num_slots
        self.checker = RaceChecker([stream.name for stream in device.streams], collect=collect)
        first, second, third = (CheckedStream(self, stream) for stream in device.streams)
        self.streams = (first, second, third)
        self._filled: dict[int, tuple[int, list, list]] = {}  # slot: its step, and what that reads and writes besides

    @property
    def races(self) -> list[RaceError]:
        return self.checker.races

    def event(self, name: str = "an event", slot: int | None = None) -> CheckedEvent:
        event = CheckedEvent(self, self.device.event(name, slot))
        event.mark.name = name if slot is None else f"slot {slot}'s {name}"
        if slot is not None:
            event.mark.meant_for = STREAMS[EVENTS.index(name)], slot
        return event

    def __getattr__(self, name: str) -> Any:  # all else is the device's own
        if name == "device":
            raise AttributeError(name)
        return getattr(self.device, name)

    def host_begins(self, phase: str, plan: BatchPlan | None, kv) -> None:
        """`fill` writes a slot's inputs, and `commit` reads its output ids: the host's own accesses."""
        if plan is not None and phase in ("fill", "commit"):
            slot = slot_of(plan.step, self.num_slots)
            if phase == "fill":
                self.checker.access(HOST, "fill", plan.step, writes=[("host inputs", slot)], slot=slot)
                self._filled[slot] = plan.step, *step_accesses(plan, kv, self.num_slots)
            else:
                self.checker.access(HOST, "commit", plan.step, reads=[("host output ids", slot)], slot=slot)
        self.device.host_begins(phase, plan, kv)

    def before_launch(self, lane: str, command: Any, slot: int) -> None:
        step, more_reads, more_writes = self._filled.get(slot, (None, [], []))
        if command == "copy_in":
            reads, writes = [("host inputs", slot)], [("device inputs", slot)]
        elif command == "copy_out":
            reads, writes = [("output ids", slot)], [("host output ids", slot)]
        else:
            reads, writes = [("device inputs", slot), *more_reads], [("output ids", slot), *more_writes]
        self.checker.access(lane, command, step, reads, writes, slot)


def step_accesses(plan: BatchPlan, kv, num_slots: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """What a step (reads, writes) besides its slot's inputs and outputs: outputs of the slots that it carries tokens
    from, and KV blocks. Block 0 is not among them: padding writes it, and nobody cares what is there."""
    reads: dict[tuple[str, int], None] = {}
    writes: dict[tuple[str, int], None] = {}
    for row in plan.rows:
        if row.carry is not None:
            reads["output ids", slot_of(row.carry[0], num_slots)] = None
        table = kv.table(row.state.number)
        end = row.position + row.num_tokens
        for block in table[: blocks_for(end, kv.block_size)]:
            reads["KV block", block] = None
        for block in table[row.position // kv.block_size : blocks_for(end, kv.block_size)]:
            writes["KV block", block] = None
    return list(reads), list(writes)


class CheckedStream:
    def __init__(self, owner: CheckedDevice, stream):
        self.owner, self.stream, self.name = owner, stream, stream.name

    def launch(self, command: Any, slot: int) -> None:
        self.owner.before_launch(self.name, command, slot)
        self.stream.launch(command, slot)

    def wait_event(self, event: Any) -> None:
        self.stream.wait_event(event.event)
        self.owner.checker.wait(self.name, event.mark)

    def record_event(self, event: Any) -> None:
        self.stream.record_event(event.event)
        self.owner.checker.record(self.name, event.mark)

    def synchronize(self) -> None:
        self.stream.synchronize()
        self.owner.checker.finished(self.name)

    def query(self) -> bool:
        done = self.stream.query()
        if done:
            self.owner.checker.finished(self.name)
        return done

    def __getattr__(self, name: str) -> Any:
        if name == "stream":
            raise AttributeError(name)
        return getattr(self.stream, name)


class CheckedEvent:
    def __init__(self, owner: CheckedDevice, event):
        self.owner, self.event, self.mark = owner, event, owner.checker.mark()

    def synchronize(self) -> None:
        self.event.synchronize()
        self.owner.checker.wait(HOST, self.mark)

    def query(self) -> bool:
        done = self.event.query()
        if done:
            self.owner.checker.wait(HOST, self.mark)
        return done

    def __getattr__(self, name: str) -> Any:
        if name == "event":
            raise AttributeError(name)
        return getattr(self.event, name)

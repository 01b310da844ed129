"""A checker for missing waits. It finds two accesses of the same memory that nothing puts in order.

Right tokens do not prove that the waits are right: if one is missing, the device is still quick enough most of the
time. So the checker does not look at times. It looks at what is in order *whatever* the times are. There are only five
reasons for that:

- the work of one stream runs in order, and so does the host;
- work starts after the host has launched it;
- `stream.wait_event(event)`: work launched there later starts after the event's mark;
- `event.synchronize()`, or `event.query()` that said True: the host goes on after the event's mark;
- `stream.synchronize()`, or `stream.query()` that said True: the host goes on after all work of the stream.

Each lane (host, H2D, compute, D2H) has a *vector clock*, which says for every lane how many of its operations are
surely done (Fidge 1988, Mattern 1989). Two accesses of one resource, of which at least one is a write, are a *race* if
the clock of the second does not count the first. For each resource the checker keeps only the last write and, from each
lane, the newest read since then (Pozniansky and Schuster 2003). So its memory does not grow with the number of steps.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from ..scheduler import StepKind

HOST = "host"
NAMES = {
    "host inputs": "slot {}'s host inputs",
    "device inputs": "slot {}'s device inputs",
    "output ids": "slot {}'s output ids on the device",
    "host output ids": "slot {}'s output ids on the host",
    "KV block": "KV block {}",
}


class Access(NamedTuple):
    """Who touched a resource, and how. lane: "host" or the name of a stream. name: the command, or what the host was
    doing. step: the number of the step, None if there is none. kind: "reads" or "writes"."""

    lane: str
    name: str | StepKind
    step: int | None
    kind: str

    def __str__(self) -> str:
        of_step = "" if self.step is None else f" of step {self.step}"
        where = f"the {HOST}" if self.lane == HOST else self.lane
        return f"{self.name}{of_step} on {where}"

    @property
    def spoken(self) -> str:
        """Its name within a sentence."""
        return "the step" if isinstance(self.name, StepKind) else self.name


class RaceError(RuntimeError):
    """Two accesses that nothing puts in order. first, second: the two, as Access, in the order in which the host came
    to them. resource: what they both touch. mend: the call that is missing, in words."""

    def __init__(self, first: Access, second: Access, resource: Hashable, mend: str):
        self.first, self.second, self.resource, self.mend = first, second, resource, mend
        what = resource_name(resource)
        super().__init__(
            f"{second} {second.kind} {what}, {first} {first.kind} the same, and nothing puts the two in order. "
            f"Which of them comes first is chance, so a result may be right now and wrong at the next run. "
            f"What is missing: {mend}."
        )


def resource_name(resource: Hashable) -> str:
    if isinstance(resource, tuple) and len(resource) == 2 and resource[0] in NAMES:
        return NAMES[resource[0]].format(resource[1])
    return str(resource)


class Mark:
    """What the checker knows of an event.

    clock: what is surely done when the newest mark is reached; empty if the event was never recorded. lane: the stream
    of that mark. waited: the lanes that have waited for it. meant_for: the (lane, slot) whose end the event is meant to
    mark, if it is one of the three events of a slot.
    """

    def __init__(self, name: str = "an event"):
        self.name = name
        self.clock: dict[str, int] = {}
        self.lane: str | None = None
        self.waited: set[str] = set()
        self.meant_for: tuple[str, int | None] | None = None


class Use(NamedTuple):
    """An access, its number in its lane (the first operation there is number 1), and its slot, None if it has none."""

    access: Access
    number: int
    slot: int | None = None

    @property
    def lane(self) -> str:
        return self.access.lane

    @property
    def kind(self) -> str:
        return self.access.kind

    def __repr__(self) -> str:
        return f"{self.lane}'s operation {self.number} {self.kind}"


def racing(clock: Mapping[str, int], kind: str, earlier: Iterable[Use]) -> list[Use]:
    """The uses among `earlier` that race with a new use of the same resource: nothing puts the two in order, and at
    least one of them writes.

    clock: for each lane, how many of its operations are surely done when the new one starts. kind: what the new one
    does, "reads" or "writes"."""
    return [use for use in earlier if "writes" in (kind, use.kind) and clock[use.lane] < use.number]


class _Uses:
    """The newest uses of one resource: the last write, and from each lane the newest read since then."""

    def __init__(self) -> None:
        self.write: Use | None = None
        self.reads: dict[str, Use] = {}

    @property
    def newest(self) -> list[Use]:
        return [*([] if self.write is None else [self.write]), *self.reads.values()]


class RaceChecker:
    """Follows the calls of one host thread, in the order in which it makes them, and finds races.

    lanes: the names of the streams. The host is one more lane.
    collect: do not raise a race, but put it into `races` and go on. For each resource, the same pair of commands is put
        there only once.
    """

    def __init__(self, lanes: Sequence[str], *, collect: bool = False):
        self.collect = collect
        self.races: list[RaceError] = []
        self._seen: set[tuple] = set()
        self._clocks: dict[str, dict[str, int]] = {}
        self._uses: dict[Hashable, _Uses] = {}
        self._marks: list[Mark] = []
        for lane in (HOST, *lanes):
            self.add_lane(lane)

    def add_lane(self, lane: str) -> None:
        """One more stream. Nothing has run on it yet, so no clock counts anything of it."""
        for clock in self._clocks.values():
            clock[lane] = 0
        self._clocks[lane] = dict.fromkeys([*self._clocks, lane], 0)

    def clock(self, lane: str) -> dict[str, int]:
        """For every lane, how many of its operations are surely done when the next one on `lane` starts."""
        clock = dict(self._clocks[lane])
        _join(clock, self._clocks[HOST])  # it starts after its launch
        return clock

    def mark(self, name: str = "an event") -> Mark:
        """A new event."""
        self._marks.append(Mark(name))
        return self._marks[-1]

    def access(
        self,
        lane: str,
        name: str,
        step: int | None = None,
        reads: Iterable[Hashable] = (),
        writes: Iterable[Hashable] = (),
        slot: int | None = None,
    ) -> None:
        """The host does something (lane "host"), or launches a command on a stream. If that races with an earlier
        access, RaceError is raised, and it does not count as launched."""
        clock = self.clock(lane)
        written = dict.fromkeys(writes)
        read = [resource for resource in dict.fromkeys(reads) if resource not in written]
        for resource, kind in [(r, "reads") for r in read] + [(r, "writes") for r in written]:
            second = Access(lane, name, step, kind)
            if resource in self._uses:
                for first in racing(clock, kind, self._uses[resource].newest):
                    self._found(first, second, resource)
        clock[lane] += 1
        self._clocks[lane] = clock
        for resource in read:
            uses = self._uses.setdefault(resource, _Uses())
            uses.reads[lane] = Use(Access(lane, name, step, "reads"), clock[lane], slot)
        for resource in written:
            uses = self._uses.setdefault(resource, _Uses())
            uses.write, uses.reads = Use(Access(lane, name, step, "writes"), clock[lane], slot), {}

    def record(self, lane: str, mark: Mark) -> None:
        """The event is recorded on this lane: its mark comes after all that was launched there so far."""
        mark.clock, mark.lane = dict(self._clocks[lane]), lane
        mark.waited.clear()

    def wait(self, lane: str, mark: Mark) -> None:
        """What is launched on this lane from now on comes after the mark. For the host it means that it has seen the
        mark reached."""
        _join(self._clocks[lane], mark.clock)
        mark.waited.add(lane)

    def finished(self, lane: str) -> None:
        """The host has seen that all work of the stream is done."""
        _join(self._clocks[HOST], self._clocks[lane])

    def _found(self, first: Use, second: Access, resource: Hashable) -> None:
        key = resource, first.access._replace(step=None), second._replace(step=None)
        if key in self._seen:
            return
        race = RaceError(first.access, second, resource, self._mend(first, second))
        if not self.collect:
            raise race
        self._seen.add(key)
        self.races.append(race)

    def _mend(self, use: Use, second: Access) -> str:
        """The call that would put the two in order: a wait for an event that is recorded after the first one. If there
        is no such event: the record and the wait."""

        def waiting(name: str) -> str:
            call = f"{name}.synchronize()" if second.lane == HOST else f"{second.lane}.wait_event({name})"
            return f"{call} before {second.spoken}"

        def marks_end(mark: Mark) -> bool:
            return mark.lane == first.lane and mark.clock[use.lane] >= use.number

        first = use.access
        meant = [mark for mark in self._marks if mark.meant_for == (first.lane, use.slot)]
        right = [mark for mark in meant or self._marks if marks_end(mark)]
        if right:
            return waiting(min(right, key=lambda mark: mark.clock[use.lane]).name)
        after = f"after {first.spoken}"
        for mark in meant:
            if mark.lane is None:
                where = "it was never recorded"
            elif mark.lane != first.lane:
                where = f"it was recorded on {mark.lane}"
            else:
                where = "it was recorded before that"
            waits = "" if second.lane in mark.waited else f", and {waiting(mark.name)}"
            return f"{first.lane}.record_event({mark.name}) {after} ({where}){waits}"
        return f"{first.lane}.record_event(event) {after}, and {waiting('event')}"


def _join(clock: dict[str, int], other: Mapping[str, int]) -> None:
    """Count as done what either clock counts."""
    for lane, count in other.items():
        if count > clock[lane]:
            clock[lane] = count

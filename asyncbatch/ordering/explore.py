"""Every order in which a small program of streams and events can run, and what each of them leaves behind.

A program is a function that takes a `Program`. It makes streams and events, and says line by line what the host does,
as real code with streams would:

    def program(p):
        p.cells.update(inputs=0, device=0, result=0)
        h2d, compute, ready = p.stream("H2D"), p.stream("compute"), p.event("ready")
        p.host.do("fill", lambda cells: cells.update(inputs=7), writes="inputs")
        h2d.do("copy_in", lambda cells: cells.update(device=cells["inputs"]), reads="inputs", writes="device")
        h2d.record(ready)
        compute.wait(ready)
        compute.do("step", lambda cells: cells.update(result=cells["device"] * 6), reads="device", writes="result")

    print(explore(program))     # 1 outcome; without compute.wait(ready) there are 2

Each `do` happens in one moment. On a real device two operations that race can also run at the same time, with their
reads and writes mixed. To show that, split an operation into several.

The orders are not tried one by one. If two orders have so far done the same operations and left the same cells, what
can follow is the same for both. From there on they are followed together, and only counted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Iterator, MutableMapping
from typing import Any, NamedTuple

from .races import HOST, RaceChecker, RaceError

MOST_SHOWN = 20  # outcomes in a printed table


class _Operation(NamedTuple):
    """One `do`. before: the operations that have surely ended when this one starts, as a bit set (bit i: operation
    i)."""

    name: str
    effect: Callable[[_Cells], Any]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    before: int


class ProgramEvent:
    """A mark in a stream. Recording the event again moves the mark. A wait is for the newest mark at the time of the
    call."""

    def __init__(self, program: Program, name: str):
        self.program, self.name, self.mark = program, name, program._checker.mark(name)
        self.after = 0  # the operations that have ended when the mark is reached, as a bit set

    def synchronize(self) -> None:
        """The host waits for the mark."""
        self.program.host.synchronize(self)


class _Lane:
    """The host or a stream. done: the operations that come before its next one, as a bit set."""

    def __init__(self, program: Program, name: str):
        self.program, self.name, self.done = program, name, 0

    def do(
        self,
        name: str,
        effect: Callable[[Any], Any],
        *,
        reads: str | Iterable[str] = (),
        writes: str | Iterable[str] = (),
    ) -> None:
        """Launch an operation on a stream, or do it on the host.

        name: different for each operation of the program (ValueError for one that is taken).
        effect: a function of the cells. It reads `cells["x"]` and sets `cells["y"] = ...` or `cells.update(y=...)`,
            and may depend on nothing else.
        reads, writes: the names of the cells that it reads and writes.
        """
        reads, writes = _names(reads), _names(writes)
        self.program._add(self, name, effect, reads, writes)


class ProgramStream(_Lane):
    """Operations that run in order. As in `torch.cuda`, `record` and `wait` also go by the names `record_event` and
    `wait_event`, and streams and events have a method `synchronize`."""

    def record(self, event: ProgramEvent) -> None:
        """Put the event's mark after all that was launched here so far."""
        event.after = self.done
        self.program._checker.record(self.name, event.mark)

    def wait(self, event: ProgramEvent) -> None:
        """What is launched here from now on comes after the event's mark. If the event was never recorded, this waits
        for nothing."""
        self.done |= event.after
        self.program._checker.wait(self.name, event.mark)

    def synchronize(self) -> None:
        """The host waits for all that was launched here so far."""
        self.program.host.synchronize(self)

    record_event, wait_event = record, wait


class ProgramHost(_Lane):
    """The host goes through the program line by line. Only `synchronize` makes it wait."""

    def synchronize(self, awaited: ProgramEvent | ProgramStream) -> None:
        """Wait for an event's mark, or for all that was launched on a stream so far."""
        if isinstance(awaited, ProgramEvent):
            self.done |= awaited.after
            self.program._checker.wait(HOST, awaited.mark)
        else:
            self.done |= awaited.done
            self.program._checker.finished(awaited.name)


class Program:
    """Takes down what a program function says. cells: the values at the start, set by the program function."""

    def __init__(self) -> None:
        self.cells: dict[str, Hashable] = {}
        self.operations: list[_Operation] = []
        self._streams: dict[str, ProgramStream] = {}
        self._checker = RaceChecker([], collect=True)
        self.host = ProgramHost(self, HOST)

    def stream(self, name: str) -> ProgramStream:
        """The stream of that name; the first call makes it. ValueError for the host's own name."""
        if name == HOST:
            raise ValueError(f"a stream cannot be called {HOST!r}: that is the host's own name")
        if name not in self._streams:
            self._checker.add_lane(name)
            self._streams[name] = ProgramStream(self, name)
        return self._streams[name]

    def event(self, name: str = "event") -> ProgramEvent:
        """A new event. The name is for messages."""
        return ProgramEvent(self, name)

    def _add(self, lane: _Lane, name: str, effect: Callable, reads: tuple[str, ...], writes: tuple[str, ...]) -> None:
        if any(operation.name == name for operation in self.operations):
            raise ValueError(f"two operations are called {name!r}: an order could not tell them apart")
        before = lane.done | self.host.done
        lane.done = before | 1 << len(self.operations)
        self.operations.append(_Operation(name, effect, reads, writes, before))
        self._checker.access(lane.name, name, None, reads, writes)


class Outcome(NamedTuple):
    """One way to end. cells: their values at the end. orders: how many orders lead to it. order: the names of the
    operations in one of these orders."""

    cells: dict[str, Hashable]
    orders: int
    order: tuple[str, ...]


class Outcomes:
    """All ends that `explore` found; `len` and `for` work on it, and printing it gives a table.

    outcomes: the most frequent first.
    complete: whether all orders were tried. If not, there may be more outcomes.
    orders: how many orders were tried.
    races: pairs of operations that nothing puts in order, as RaceError. Without a race there is only one outcome.
    """

    def __init__(self, outcomes: list[Outcome], complete: bool, races: list[RaceError]):
        self.outcomes = sorted(outcomes, key=lambda outcome: (-outcome.orders, outcome.order))
        self.complete, self.races = complete, races
        self.orders = sum(outcome.orders for outcome in outcomes)

    def __len__(self) -> int:
        return len(self.outcomes)

    def __iter__(self) -> Iterator[Outcome]:
        return iter(self.outcomes)

    def __str__(self) -> str:
        cells = list(dict.fromkeys(cell for outcome in self.outcomes for cell in outcome.cells))
        rows = [["orders", *cells, "for example"]]
        for outcome in self.outcomes[:MOST_SHOWN]:
            values = [str(outcome.cells.get(cell, "-")) for cell in cells]
            rows.append([str(outcome.orders), *values, ", ".join(outcome.order)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        outcomes, orders = (
            f"{number} {word}{'s' * (number != 1)}"
            for number, word in ((len(self), "outcome"), (self.orders, "order" if self.complete else "random order"))
        )
        rest = "all that there are" if self.complete else "there may be more"
        lines.insert(0, f"{outcomes} in {orders}: {rest}")
        if len(self) > MOST_SHOWN:
            lines.append(f"... and {len(self) - MOST_SHOWN} more outcomes")
        if not self.races:
            lines.append("races: none, so there is one outcome, whatever the order")
        return "\n".join(lines + [f"race: {race}" for race in self.races])

    __repr__ = __str__


def explore(program: Callable[[Program], Any], *, bound: int = 10_000, seed: int | None = None) -> Outcomes:
    """Run a program in every order that its streams and events allow.

    bound: how much to try at most. A program with no more than `bound` orders is always tried in all of them. So are
        many larger programs, because what counts is the number of different situations (operations done, values of the
        cells) after any number of operations. If that is more than `bound`, `bound` random orders are tried instead.
    seed: if given, `bound` random orders are tried in any case, drawn from this seed.

    Raises ValueError for a program that makes no sense: an operation uses a cell that it does not name, or reads one
    that has no value at the start, or puts into a cell something that is not hashable (numbers, strings and tuples
    are). Also for a `bound` below 1.
    """
    if not isinstance(bound, int) or bound < 1:
        raise ValueError(f"bound is {bound!r}: allowed are whole numbers from 1")
    script = Program()
    program(script)
    start = dict(script.cells)
    for name, value in start.items():
        _check_value("program.cells", name, value)
    operations = script.operations
    for operation in operations:
        for cell in operation.reads:
            if cell not in start:
                raise ValueError(_no_value(operation, cell))
    outcomes = _all_orders(operations, start, bound) if seed is None else None
    complete = outcomes is not None
    if outcomes is None:
        outcomes = _random_orders(operations, start, bound, random.Random(seed or 0))
    # A table reads best in the order in which the program names its cells: from the inputs to the result.
    names = [*start, *sorted({name for outcome in outcomes for name in outcome.cells} - start.keys())]
    ordered = [one._replace(cells={name: one.cells[name] for name in names if name in one.cells}) for one in outcomes]
    return Outcomes(ordered, complete, script._checker.races)


# A situation: the operations done so far (as a bit set), and the cells.
_Situation = tuple[int, frozenset[tuple[str, Hashable]]]


def _all_orders(operations: list[_Operation], start: dict[str, Hashable], bound: int) -> list[Outcome] | None:
    """All outcomes, or None if after some number of operations there are more than `bound` situations. (There are
    never more situations than orders.)"""
    level: dict[_Situation, tuple[int, tuple[str, ...]]] = {(0, frozenset(start.items())): (1, ())}
    for _ in operations:
        following: dict[_Situation, tuple[int, tuple[str, ...]]] = {}
        for (done, cells), (orders, example) in level.items():
            for number in _ready(operations, done):
                operation = operations[number]
                after = done | 1 << number, frozenset(_run(operation, dict(cells)).items())
                so_far = following.get(after, (0, (*example, operation.name)))
                following[after] = so_far[0] + orders, so_far[1]
            if len(following) > bound:
                return None
        level = following
    return [Outcome(dict(cells), orders, example) for (_, cells), (orders, example) in level.items()]


def _random_orders(
    operations: list[_Operation], start: dict[str, Hashable], count: int, numbers: random.Random
) -> list[Outcome]:
    """The outcomes of `count` random orders. At each point, all operations that may come next are equally likely."""
    ends: dict[frozenset, tuple[int, tuple[str, ...]]] = {}
    for _ in range(count):
        done, cells, order = 0, start, []
        for _ in operations:
            number = numbers.choice(_ready(operations, done))
            done |= 1 << number
            cells = _run(operations[number], cells)
            order.append(operations[number].name)
        orders, example = ends.get(frozenset(cells.items()), (0, tuple(order)))
        ends[frozenset(cells.items())] = orders + 1, example
    return [Outcome(dict(cells), orders, example) for cells, (orders, example) in ends.items()]


def _ready(operations: list[_Operation], done: int) -> list[int]:
    """The numbers of the operations that may come next."""
    return [
        number
        for number, operation in enumerate(operations)
        if not done >> number & 1 and operation.before & ~done == 0
    ]


class _Cells(MutableMapping[str, Any]):
    """The cells as an operation sees them: only those that it names. If it could use others, the race checker would
    judge another program than the one that runs."""

    def __init__(self, operation: _Operation, values: dict[str, Hashable]):
        self._operation, self._values = operation, values

    def __getitem__(self, name: str) -> Any:
        if name not in self._operation.reads and name not in self._operation.writes:
            raise ValueError(f"{self._operation.name!r} reads {name!r} but does not name it in reads")
        if name not in self._values:
            raise ValueError(_no_value(self._operation, name))
        return self._values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self._operation.writes:
            raise ValueError(f"{self._operation.name!r} writes {name!r} but does not name it in writes")
        _check_value(repr(self._operation.name), name, value)
        self._values[name] = value

    def __delitem__(self, name: str) -> None:
        raise ValueError(f"{self._operation.name!r} deletes {name!r}: cells can be read and written")

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(self._operation.reads + self._operation.writes))

    def __len__(self) -> int:
        return len(set(self._operation.reads + self._operation.writes))


def _run(operation: _Operation, cells: dict[str, Hashable]) -> dict[str, Hashable]:
    after = dict(cells)
    returned = operation.effect(_Cells(operation, after))
    if returned is not None:
        raise ValueError(f"{operation.name!r} returns {returned!r}: an effect sets cells['...'] and returns nothing")
    return after


def _no_value(operation: _Operation, cell: str) -> str:
    return f"{operation.name!r} reads {cell!r}, which has no value: program.cells[{cell!r}] = 0 gives it one"


def _names(cells: str | Iterable[str]) -> tuple[str, ...]:
    return (cells,) if isinstance(cells, str) else tuple(cells)


def _check_value(who: str, name: str, value: Any) -> None:
    try:
        hash(value)
    except TypeError:
        raise ValueError(
            f"{who} puts {value!r} into {name!r}: cells take what can be compared for good, such as numbers, strings "
            "and tuples"
        ) from None

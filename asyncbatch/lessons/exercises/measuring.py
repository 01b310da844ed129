"""Exercises of notebook 06: `time_work`, `union` and `tables`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ... import kv_cache, timeline
from ...kv_cache import KVCache
from ...measure import timing
from ...pictures.picture import Picture
from ..measuring import draw_union
from ..parts import Case, Exercise

SAME_WORK = "as much Python for 64 as for 4"


class _Desk:
    """A host and a device, on a clock that stands still between calls. earlier_ms: how long the device is still busy
    with earlier work."""

    def __init__(self, earlier_ms: float, launch_ms: float, step_ms: float):
        self.host, self.device, self.launch_ms, self.step_ms = 0.0, earlier_ms, launch_ms, step_ms

    def work(self) -> None:
        self.host += self.launch_ms
        self.device = max(self.device, self.host) + self.step_ms

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def now(self) -> float:
        return self.host


def _on_desk(function: Callable[..., Any], *times: float) -> Any:
    desk = _Desk(*times)
    return function(desk.work, desk.synchronize, desk.now)


def _explain_times(args: tuple[Any, ...], got: Any, want: tuple[float, float]) -> str | None:
    earlier_ms, launch_ms, step_ms = args
    if not isinstance(got, tuple | list) or len(got) != 2:
        return "Return two times, (back, done): the host was back after the first, the device done after the second."
    slips = {
        (
            launch_ms,
            launch_ms,
        ): "You never wait for the device, so both looks at the clock come when the launch is over. "
        "Call synchronize() before the last one.",
        (want[1], want[1]): "Both looks come after synchronize(). Look once before it: when was the host back?",
        (launch_ms, step_ms): "Your second time begins when the launch is over. Launching is part of the work: both "
        "times begin before the call.",
        (0.0, step_ms): "Your clock starts after work(). Start it before: launching costs time, too.",
        (launch_ms, earlier_ms + step_ms): f"{earlier_ms:g} ms of that are somebody else's: the device was still busy "
        "with earlier work. Call synchronize() before you start the clock.",
        (earlier_ms + launch_ms, earlier_ms + want[1]): "You wait for the earlier work, but your clock is running "
        "already. Start it after that wait.",
    }
    return slips.get(tuple(got))


def _stretches(function: Callable[..., Any], starts: Sequence[int], ends: Sequence[int]) -> Any:
    """The two arrays of an answer as lists of plain numbers; any other answer as it is."""
    got = function(np.array(starts), np.array(ends))
    if isinstance(got, tuple | list) and len(got) == 2:
        return tuple(np.asarray(part).tolist() for part in got)
    return got


def _explain_union(args: tuple[Any, ...], got: Any, want: tuple[list[int], list[int]]) -> str | None:
    starts, ends = args
    if not isinstance(got, tuple) or not all(isinstance(part, list) for part in got) or len(got[0]) != len(got[1]):
        return "Return two arrays of the same length: where the stretches begin, and where they end."
    total, right = (sum(part[1]) - sum(part[0]) for part in (got, want))
    if got[0] and want[0] and got == ([min(starts)], [max(ends)]):
        return (
            f"That is one stretch from the first start to the last end, {total} ms. It counts the idle time in the "
            f"middle as busy: only {right} ms are."
        )
    if total == sum(ends) - sum(starts) > right:
        return f"Your stretches are {total} ms together: what two intervals share counts twice. Busy are {right} ms."
    return None


def _draw_union(args: tuple[Any, ...], got: Any, want: Any) -> Picture:
    starts, ends = args
    return draw_union(starts, ends, got)


def _books(tables: Mapping[int, Sequence[int]], max_blocks: int) -> KVCache:
    """A KV cache in which these owners have these blocks. All blocks from 1 on must have an owner."""
    owner_of = {block: owner for owner, blocks in tables.items() for block in blocks}
    kv, used = KVCache(len(owner_of), 1, max_blocks, len(tables)), dict.fromkeys(tables, 0)
    for block in sorted(owner_of):
        owner = owner_of[block]
        used[owner] += 1
        kv.allocate(owner, used[owner])
    return kv


def _gathered(function: Callable[..., Any], tables: Any, owners: list[int], width: int) -> Any:
    """The rows that `function` returns. If `tables` is a text: how much more Python it runs for a long table."""
    if not isinstance(tables, str):
        got = function(_books(tables, width), list(owners))
        return got.tolist() if isinstance(got, np.ndarray) else got
    short, long = (instructions(function, _books({0: range(1, blocks + 1)}, width), owners) for blocks in (4, width))
    return SAME_WORK if long <= 1.5 * short else f"{long / short:.0f} times as much Python for {width} as for 4"


def instructions(function: Callable[..., Any], *arguments: Any) -> int:
    """How many bytecode instructions of Python a call runs, with all calls inside it, but without what runs in C.
    Unlike a time, that is the same in each run. The function is called twice, as the first call may load something."""
    count = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    function(*arguments)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*arguments)
    finally:
        sys.settrace(before)
    return max(count, 1)


def _explain_tables(args: tuple[Any, ...], got: Any, want: Any) -> str | None:
    tables, owners, width = args
    if want == SAME_WORK:
        return None
    if not isinstance(got, list) or not all(isinstance(row, list) for row in got):
        return "Return one NumPy array with two dimensions: a row for each owner."
    if got == sorted(want) != want or got == [want[owners.index(owner)] for owner in sorted(owners)] != want:
        return f"The rows must stand in the order that was asked for, {owners}, and not sorted."
    if [[block for block in row if block] for row in got] == [list(tables[owner]) for owner in owners]:
        return f"The blocks are right. Every row must be {width} wide, with 0 behind the last block."
    return None


# fmt: off
EXERCISES = {
    "time_work": Exercise(
        timing.time_work,
        "With {0:g} ms of earlier work under way, a launch that costs the host {1:g} ms and a step of {2:g} ms", "says",
        (
            Case((0.0, 0.25, 20.0), "The launch gives the host back after 0.25 ms; the device is done 20 ms later."),
            Case((8.0, 0.25, 20.0), "The earlier work is none of yours: wait until the device has nothing to do."),
            Case((0.0, 5.0, 0.0), "All of this work is the host's: the device adds nothing."),
        ),
        (
            "Three moments: the start, `work()` has returned, the device is done. Which need a `synchronize()` before "
            "them?",
            "`synchronize()`, look, `work()`, look, `synchronize()`, look. Then return two differences, both to the "
            "first look.",
        ),
        answer=_on_desk, explain=_explain_times,
    ),
    "union": Exercise(
        timeline.union, "For kernels that start at {0} and end at {1} ms", "found",
        (
            Case(((0, 10), (4, 16)), "The two do not touch, so they stay two stretches."),
            Case(((0, 3, 12), (8, 10, 15)), "The first two overlap from 3 to 8: together they are one stretch, 0 to "
                 "10."),
            Case(((0, 2, 12), (9, 4, 15)), "The second interval lies inside the first, so the stretch ends at 9. Do "
                 "not take the end of the last one that joined: take the latest end."),
            Case(((0, 5, 12), (5, 8, 15)), "One ends at 5 and the next begins at 5: no time between them, so they are "
                 "one stretch."),
            Case(((12, 0, 3), (15, 8, 10)), "Spans of several streams do not come in order of time. Sort by start "
                 "first."),
        ),
        (
            "Go through the intervals in order of their starts and keep the stretch that is still open. An interval "
            "either joins it or begins the next one.",
            "It joins if start <= the open stretch's end. The new end is then max(old end, end), as it may lie inside.",
        ),
        answer=_stretches, explain=_explain_union, picture=_draw_union,
    ),
    "tables": Exercise(
        kv_cache.KVCache.tables, "With the block tables {0}, for the owners {1} and rows {2} wide", "gives",
        (
            Case(({0: (1, 3), 1: (2,)}, [0, 1], 4), "Row by row the owner's blocks, then zeros."),
            Case(({0: (1, 3), 1: (2,)}, [1, 0], 4), "The rows stand in the order of `owners`."),
            Case(({0: (2,), 1: (1, 3, 5), 2: (4,)}, [2], 3), "Only the owners that were asked for get a row."),
            Case(("of 4 and of 64 blocks", [0], 64), "Your rows are right, but there is still a loop over the "
                 "blocks in it, in Python. Let NumPy copy whole rows at once."),
        ),
        (
            "`self._tables` is one array, a row for each owner, zeros included. `self._row[owner]` says which row.",
            "A NumPy array takes a list of row numbers as its index and copies those rows at once: "
            "`self._tables[[2, 0]]`.",
        ),
        answer=_gathered, explain=_explain_tables,
    ),
}
# fmt: on

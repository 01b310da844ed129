"""A profiler's trace of any engine: how idle was its GPU, step by step and gap by gap?

    python -m asyncbatch.profile --trace vllm.pt.trace.json.gz

`read_trace` takes what `torch.profiler` exports (Chrome trace JSON, also .gz), finds the compute stream and where each
step begins and ends, and says what the host was doing in each gap of the device. The file is read event by event into
arrays, 21 to 50 bytes an event, so a large file needs little memory.

Two methods, as everywhere in this project. **Step active** counts the compute stream as active from the first to the
last kernel of a step, over the time from the end of the first step to the end of the last, as
`timeline.device_activity` does. **Kernel busy** is the union of all kernel, copy and memset intervals of the device,
over a window.

Times are whole nanoseconds while anything is added up, and seconds in what is returned; 0 is the beginning of the first
kernel or copy of the device. torch writes microseconds near 4.6e12 with three decimals. They are parsed as decimal
numbers, which keeps every digit and took no longer here than floats. A float64 keeps the nanosecond up to 8.8e12 only,
and a quarter of a microsecond in older traces, which count from 1970 (1.7e15).

Tested on traces that tests/make_trace.py writes in torch.profiler's format, on a CPU-only trace of torch.profiler
itself, and on excerpts of published CUDA traces, old and new. Not yet on traces of GPU runs of this project.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import os
import re
import sys
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import ijson
import numpy as np
from tqdm import tqdm

from .timeline import Gap, Timeline

SCHEMA = 1
BAR_FROM = 20_000_000  # bytes: below that a file is read before a bar could be looked at
LATEST = 45 * 10**14  # microseconds, the year 2112: a time beyond it is none. Differences of nanoseconds fit an int64
NOTHING = "nothing recorded"
MOST_HOST_PIECES = 100_000  # of the host lane of `timeline`

# What a device event is. A memset and a copy within the device are part of a step, copies from and to the host are not.
KERNEL, MEMSET, COPY, H2D, D2H = range(5)
# What a host event is, the outer before the inner where two begin and end together.
ANNOTATION, PYTHON, OP, RUNTIME = range(5, 9)
GPU_ANNOTATION = 9
CATEGORIES = {
    "kernel": KERNEL, "gpu_memset": MEMSET, "memset": MEMSET, "gpu_memcpy": COPY, "memcpy": COPY,
    "user_annotation": ANNOTATION, "python_function": PYTHON, "cpu_op": OP, "operator": OP,
    "cuda_runtime": RUNTIME, "cuda_driver": RUNTIME, "runtime": RUNTIME, "gpu_user_annotation": GPU_ANNOTATION,
}  # fmt: skip
TO_HOST = re.compile(r"DtoH|DeviceToHost|Device -> (Pinned|Pageable|Host)", re.IGNORECASE)
FROM_HOST = re.compile(r"HtoD|HostToDevice|(Pinned|Pageable|Host) -> Device", re.IGNORECASE)
GRAPH_LAUNCH = re.compile(r"(cuda|cu|hip)GraphLaunch")
WAITS = re.compile(r"Synchronize|(cuda|hip)Memcpy$")


class TraceError(ValueError):
    """A file that cannot be reported on, with one line that says what was found and what is needed."""


class Stream(NamedTuple):
    """One stream of a device: seconds in which something ran on it, and how many kernels and copies."""

    device: int
    stream: int
    busy_s: float
    kernels: int
    copies: int


class GraphLaunches(NamedTuple):
    """How many graphs the host launched, and how many of the device's kernels came from them, by correlation id."""

    calls: int
    kernels: int


@dataclass(frozen=True)
class TraceGap(Gap):
    """The device idle from `start` to `end` (seconds): before step `step`, or in the middle of it where `inside`.

    `host_s`: seconds by what the launching host thread was doing; they add up to the gap."""

    inside: bool = False

    @property
    def ms(self) -> float:
        return 1e3 * self.seconds

    @property
    def cause(self) -> str:
        """What took most of it."""
        return max(self.host_s, key=self.host_s.__getitem__)


# ---- reading ------------------------------------------------------------------------------------------------------


class _Names(dict):
    """Numbers names in the order in which they are first asked for."""

    def __missing__(self, name: str) -> int:
        number = self[name] = len(self)
        return number


class _Table:
    """Columns of integers, a letter of `array` each, that grow row by row."""

    def __init__(self, **types: str):
        self.names = list(types)
        self.columns = [array(letter) for letter in types.values()]

    def add(self, *row: int) -> None:
        for column, value in zip(self.columns, row, strict=True):
            column.append(value)

    def __len__(self) -> int:
        return len(self.columns[0])

    def arrays(self) -> dict[str, np.ndarray]:
        """The columns by name, without a copy of them."""
        pairs = zip(self.names, self.columns, strict=True)
        return {name: np.frombuffer(c, c.typecode) if c else np.zeros(0, c.typecode) for name, c in pairs}


def nanoseconds(microseconds: Any) -> int:
    """A time of a trace as whole nanoseconds, whether it is a number or a number in a string.

    ValueError, TypeError or ArithmeticError for anything else, and for times beyond the year 2112."""
    if isinstance(microseconds, bool):
        raise TypeError("true and false are no times")
    value = Decimal(microseconds) if isinstance(microseconds, str) else microseconds
    if not -LATEST < value < LATEST:  # also: 1e999999999 would make an integer that fills the memory
        raise ValueError(f"{microseconds} microseconds")
    return round(value * 1000)


def whole(value: Any, otherwise: int) -> int:
    """`value` as an integer that fits 64 bits, `otherwise` where it is none; "stream 7" is 7."""
    with contextlib.suppress(ValueError, TypeError, ArithmeticError):
        number = int(value.rpartition(" ")[2] if isinstance(value, str) else value)
        if -(2**63) <= number < 2**63:
            return number
    return otherwise


class _Events:
    """The events of a trace that matter here, as columns of numbers."""

    def __init__(self) -> None:
        self.names, self.threads = _Names(), _Names()
        self.device = _Table(start="q", end="q", kind="b", device="q", stream="q", correlation="q", name="i")
        self.host = _Table(start="q", end="q", kind="b", thread="i", name="i")
        self.runtime = _Table(correlation="q", start="q", thread="i", name="i")
        self.gpu_annotations = _Table(start="q", end="q", device="q", stream="q", name="i")
        self.kinds: dict[str, int | None] = dict(CATEGORIES)
        self.count = self.timed = self.unusable = 0

    def add(self, event: Any) -> None:
        """Note one event if it is of use. Never fails, whatever the event is."""
        self.count += 1
        if not isinstance(event, dict) or event.get("ph") != "X":
            return
        self.timed += 1
        category = event.get("cat")
        if not isinstance(category, str):
            return
        kind = self.kinds[category] if category in self.kinds else self._kind(category)
        if kind is None:
            return
        try:
            start, length = nanoseconds(event.get("ts")), nanoseconds(event.get("dur", 0))
        except (ValueError, TypeError, ArithmeticError):
            start, length = 0, -1
        if length < 0 or start + length > 1000 * LATEST:
            self.unusable += 1
            return
        args = event.get("args")
        args = args if isinstance(args, dict) else {}
        text = str(event.get("name", "unnamed"))
        name, end = self.names[text], start + length
        if kind in (ANNOTATION, PYTHON, OP, RUNTIME):
            thread = self.threads[f"{event.get('pid')} {event.get('tid')}"]
            self.host.add(start, end, kind, thread, name)
            if kind == RUNTIME:
                self.runtime.add(whole(args.get("correlation"), 0), start, thread, name)
            return
        device = whole(args.get("device", event.get("pid")), 0)
        stream = whole(args.get("stream", event.get("tid")), 0)
        if kind == GPU_ANNOTATION:
            self.gpu_annotations.add(start, end, device, stream, name)
            return
        if kind == COPY:
            kind = D2H if TO_HOST.search(text) else H2D if FROM_HOST.search(text) else COPY
        self.device.add(start, end, kind, device, stream, whole(args.get("correlation"), 0), name)

    def _kind(self, category: str) -> int | None:
        """Of a category not seen before: another spelling, as older traces and other vendors' runtimes have it."""
        spelled = category.lower()
        kind = CATEGORIES.get(spelled)
        if kind is None and spelled.endswith(("_runtime", "_driver")):
            kind = RUNTIME
        if len(self.kinds) < 1000:
            self.kinds[category] = kind
        return kind


class _Counted(io.RawIOBase):
    """A file that counts the bytes read from it, on a progress bar."""

    def __init__(self, file, bar: tqdm):
        self.file, self.bar, self.done = file, bar, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.done += len(data)
        self.bar.update(len(data))
        return data


class _Guarded:
    """Bytes already taken from a file, then the rest of it, for the parser.

    ijson 3.6 crashes on an integer of more than 4,300 digits and takes memory by the square of the nesting. Neither
    stands in a trace, so a piece of the file that holds more than 1,000 digits in a row, or opens 2,000 brackets more
    than it closes, is refused."""

    def __init__(self, head: bytes, file):
        self.head, self.file = head, file

    def read(self, size: int = -1) -> bytes:
        if size == 0:  # ijson asks for nothing, to see whether it gets bytes or text
            return b""
        data, self.head = self.head, b""
        data = data or self.file.read(size)
        if any(data[i : i + 500].isdigit() for i in range(0, len(data) - 499, 500)):
            raise ijson.JSONError("a number of hundreds of digits")
        if data.count(b"[") + data.count(b"{") - data.count(b"]") - data.count(b"}") > 2000:
            raise ijson.JSONError("brackets in brackets, thousands deep")
        return data


@contextlib.contextmanager
def _unpacked(path: Path, progress: bool):
    """The file as (first bytes, file of all bytes, counter), unpacked if it is gzip, whatever it is called."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        look = {"total": size, "unit": "B", "unit_scale": True, "desc": f"reading {path.name}", "leave": False}
        with tqdm(**look, disable=not (progress and size > BAR_FROM)) as bar:
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            counted = _Counted(file, bar)
            data = gzip.GzipFile(fileobj=counted) if packed else counted
            head, piece = b"", b"begin"
            while piece and not head:
                piece = data.read(4096)
                head = piece.removeprefix(b"\xef\xbb\xbf").lstrip()
            yield head, _Guarded(head, data), counted


def _read_events(path: Path, progress: bool) -> _Events:
    events, counted = _Events(), None
    try:
        with _unpacked(path, progress) as (head, file, counted):
            if not head:
                raise TraceError(f"{path} is empty: nothing but white space was found in {_bytes(counted.done)}")
            for event in ijson.items(file, "item" if head[:1] == b"[" else "traceEvents.item"):
                events.add(event)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TraceError(f"{path} is cut off or damaged ({error}): {_so_far(counted, events)}") from error
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ijson.JSONError, ArithmeticError, UnicodeError) as error:
        reason = _reason(error)
        if "premature EOF" in reason or "ncomplete JSON" in reason:
            raise TraceError(f"{path} is cut off: the JSON ends too early; {_so_far(counted, events)}") from error
        raise TraceError(f"{path} is not JSON ({reason}); {_so_far(counted, events)}") from error
    return events


def _reason(error: Exception) -> str:
    """What the parser says, in one line. It gives text, or bytes where the file is no text, with the place below."""
    said = error.args[0] if error.args else ""
    text = said.decode(errors="replace") if isinstance(said, bytes) else str(error)
    if isinstance(error, ArithmeticError) or not text.strip():
        return "a number out of range"
    return text.strip().splitlines()[0].strip().rstrip(".")


def _so_far(counted: _Counted | None, events: _Events) -> str:
    return f"{_bytes(counted.done if counted else 0)} and {events.count} events were read"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"


def _why_unusable(path: Path, events: _Events) -> str | None:
    """What is wrong with a file that is JSON; None if it has kernels."""
    kinds = events.device.arrays()["kind"]
    if (kinds == KERNEL).any():
        return None
    if not events.count:
        return _why_empty(path)
    if len(kinds):
        return f"{path} holds {len(kinds)} copies of a device and no kernel: there is no compute stream"
    if {"host", "compute"} <= events.kinds.keys():
        return f"{path} was written by Timeline.save or this script: asyncbatch.timeline.load_trace reads it"
    if not events.timed:
        return f"{path} holds {events.count} events, none of them with a duration (ph: X): not a profiler's trace"
    if events.unusable and not len(events.host):
        return f"{path} holds {events.timed} events, and no usable time (ts, dur) in {events.unusable} of them"
    if len(events.host):
        return f"{path} holds only CPU events: profile with ProfilerActivity.CUDA"
    found = ", ".join(sorted(events.kinds.keys() - CATEGORIES.keys())[:5]) or "none"
    return f"{path} holds no kernels: its categories are {found}; expected a trace of torch.profiler"


def _why_empty(path: Path) -> str:
    wanted = "expected a Chrome trace: a list of events, or an object with traceEvents"
    keys, kind = [], "list of nothing"
    with _unpacked(path, False) as (_, file, _):
        for i, (prefix, event, value) in enumerate(ijson.parse(file)):
            if i == 0 and event not in ("start_map", "start_array"):
                return f"{path} holds {_short(value)}; {wanted}"
            if not prefix and event == "start_map":
                kind = "object"
            if not prefix and event == "map_key":
                keys.append(value)
            if prefix == "traceEvents":
                what = "is an empty list" if event == "start_array" else "is no list"
                return f"{path} holds no events: its traceEvents {what}; {wanted}"
            if len(keys) == 6 or i == 100_000:
                break
    named = f" with the keys {', '.join(map(_short, keys[:5]))}{', ...' if len(keys) > 5 else ''}" if keys else ""
    return f"{path} holds no events: it is an {kind}{named}; {wanted}".replace("an list", "a list")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _gpu_name(path: Path, device: int) -> str | None:
    """The device's name, where the trace has it before the events, as torch writes it."""
    with _unpacked(path, False) as (head, file, _):
        beginning = head + file.read(1 << 20) if head else b""
    for key in ("deviceProperties", "computeProperties"):
        with contextlib.suppress(ijson.JSONError, ArithmeticError, AttributeError):
            for one in ijson.items(io.BytesIO(beginning), f"{key}.item"):
                if one.get("id") == device:
                    return str(one.get("name"))
    return None


# ---- intervals, in whole nanoseconds ------------------------------------------------------------------------------


def union(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stretches that the intervals cover together, in order, none touching the next. Int64, any order."""
    real = ends > starts
    starts, ends = starts[real], ends[real]
    if not len(starts):
        return starts, ends
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(ends[order])
    first = np.flatnonzero(np.r_[True, starts[1:] > reach[:-1]])
    return starts[first], reach[np.r_[first[1:] - 1, len(reach) - 1]]


def outside(starts: np.ndarray, ends: np.ndarray, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """What of `low` to `high` the stretches that `union` gave leave free."""
    begins, stops = np.maximum(np.r_[low, ends], low), np.minimum(np.r_[starts, high], high)
    free = stops > begins
    return begins[free], stops[free]


def covered_before(points: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """How much of the stretches (in order, not overlapping) lies before each point."""
    if not len(starts):
        return np.zeros(len(points), np.int64)
    total = np.r_[0, np.cumsum(ends - starts)]
    which = np.searchsorted(starts, points, "right")
    last = ends[np.maximum(which - 1, 0)]
    return total[which] - np.where(which > 0, np.maximum(last - points, 0), 0)


def intersections(a: tuple, b: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(starts, ends, which of a, which of b): where the stretches `a` and `b` overlap. Both are (starts, ends), in
    order and not overlapping among themselves."""
    (a_starts, a_ends), (b_starts, b_ends) = a, b
    cuts = np.unique(np.concatenate([a_starts, a_ends, b_starts, b_ends]))
    begins, stops = cuts[:-1], cuts[1:]
    if not len(a_starts) or not len(b_starts) or not len(begins):
        none = np.zeros(0, np.int64)
        return none, none, none, none
    in_a = np.searchsorted(a_starts, begins, "right") - 1
    in_b = np.searchsorted(b_starts, begins, "right") - 1
    both = (in_a >= 0) & (in_b >= 0) & (begins < a_ends[in_a]) & (begins < b_ends[in_b])
    return begins[both], stops[both], in_a[both], in_b[both]


def innermost(starts: np.ndarray, ends: np.ndarray, names: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(starts, ends, names) of the stretches in which the same event is the innermost: of those that run, the one that
    began last. Given in order of start, outer events first."""
    found = array("q"), array("q"), array("q")
    begins, stops, inner = found
    stack: list[tuple[int, int]] = []  # (end, name), the innermost last
    now = 0
    last = int(ends.max()) if len(ends) else 0
    rows = zip([*starts.tolist(), last], [*ends.tolist(), last], [*names.tolist(), -1], strict=True)
    for start, end, name in rows:  # the last one only brings what is on the stack to its end
        while stack and now < start:
            top_end, top_name = stack[-1]
            stop = min(top_end, start)
            if now < stop:
                begins.append(now)
                stops.append(stop)
                inner.append(top_name)
                now = stop
            if top_end <= now:
                stack.pop()
        now = start
        stack.append((end, name))
    return tuple(np.array(column, np.int64) for column in found)  # type: ignore[return-value]


# ---- where a step begins and ends ---------------------------------------------------------------------------------


class _Work(NamedTuple):
    """What ran on the compute stream, by start: kernels, memsets and copies within the device (nanoseconds).

    `launch` is when the host launched each one; where that is not recorded for all of them, None."""

    start: np.ndarray
    end: np.ndarray
    name: np.ndarray
    correlation: np.ndarray
    launch: np.ndarray | None
    is_graph: np.ndarray

    @property
    def length(self) -> np.ndarray:
        return self.end - self.start


class _Found(NamedTuple):
    """The step of each piece of work (any numbers; -1: in none), the sentence, and what else should be said."""

    step: np.ndarray
    how: str
    note: str | None = None


def find_steps(
    work: _Work, results: np.ndarray, by_launch: bool, annotations: list[tuple], gpu_annotations: list[tuple], name_of
) -> _Found:
    """The first of the four rules that gives at least two steps; else the whole window is one.

    `results`: when each copy to the host was launched, or began where not `by_launch`. `annotations` and
    `gpu_annotations`: (pattern of names, starts, ends) of each, on the host and on the device."""
    by_copies = _by_copies(work, results, by_launch)
    copies = 0 if by_copies is None else int(by_copies.step.max()) + 1
    for found in (
        _by_annotations(work, annotations, gpu_annotations, copies),
        _by_graphs(work, copies),
        by_copies,
        _by_pattern(work, name_of),
    ):
        if found is not None and len(np.unique(found.step[found.step >= 0])) > 1:
            return found
    how = "no step boundary was found (no annotation, graph launch, result copy or regular pattern of kernels): "
    return _Found(np.zeros(len(work.start), np.int64), how + "the whole window is one step")


def _by_annotations(work: _Work, on_host: list[tuple], on_device: list[tuple], copies: int) -> _Found | None:
    """A step is what was launched in one occurrence of a repeated annotation; without launches, what ran in it."""
    times, groups, verb = work.launch, on_host, "launched in it"
    if times is None:
        times, groups, verb = work.start, on_device, "that ran in it"
    candidates = []
    for pattern, starts, ends in groups:
        which = np.searchsorted(starts, times, "right") - 1
        inside = (which >= 0) & (times <= ends[np.maximum(which, 0)])
        count = len(np.unique(which[inside]))
        if count < 2 or work.length[inside].sum() < 0.9 * work.length.sum():
            continue
        profiler_step = pattern.startswith("ProfilerStep")
        far = abs(math.log(count / copies)) if copies > 1 else 0.0
        if profiler_step or far <= math.log(2):  # else it is a whole run, or a part of a step
            candidates.append((not profiler_step, far, count, pattern, np.where(inside, which, -1)))
    if not candidates:
        return None
    _, _, count, pattern, step = min(candidates, key=lambda candidate: candidate[:4])
    note = None
    if copies > 3 * count:
        note = (
            f"Each {pattern} holds about {copies / count:.0f} copies of results: for a step a batch, call "
            "prof.step() after each batch, or not at all."
        )
    how = f"a step is one of {count} annotations {pattern!r}: the kernels {verb}"
    return _Found(_with_loose_work(step, work), how, note)


def _by_graphs(work: _Work, copies: int) -> _Found | None:
    """A step is a graph launch: its kernels share a correlation id."""
    if work.length[work.is_graph].sum() < 0.5 * work.length.sum():
        return None
    step = np.where(work.is_graph, work.correlation, -1)
    launches = len(np.unique(step[step >= 0]))
    if launches < 2 or (copies > 1 and launches > 1.5 * copies):  # then a graph is a piece of a step
        return None
    how = (
        f"a step is one of {launches} graph launches (kernels of one correlation id), or the eager kernels between two"
    )
    return _Found(_with_loose_work(step, work), how)


def _by_copies(work: _Work, results: np.ndarray, by_launch: bool) -> _Found | None:
    """A copy to the host that follows work ends a step: of what was launched before it, or, without launches, of what
    began before it."""
    times = work.launch if by_launch else work.start
    if times is None or not len(results):
        return None
    _, step = np.unique(np.searchsorted(np.sort(results), times, "left"), return_inverse=True)
    order = "launched" if by_launch else "begun"
    return _Found(step, f"a step ends with a device-to-host copy that follows kernels ({order} before it)")


def _by_pattern(work: _Work, name_of) -> _Found | None:
    """A step is one period of the rarest kernel that recurs after always the same number of kernels. It begins at the
    longest gap of the period."""
    total = len(work.start)
    _, first, inverse, counts = np.unique(work.name, return_index=True, return_inverse=True, return_counts=True)
    for kernel in sorted(np.flatnonzero(counts >= 3), key=lambda k: (counts[k], first[k])):
        places = np.flatnonzero(inverse == kernel)
        distances = np.diff(places)
        period = int(np.median(distances))
        if period < 2 or (distances == period).mean() < 0.8 or total > (len(places) + 2) * period:
            continue
        pauses = np.r_[0, work.start[1:] - np.maximum.accumulate(work.end)[:-1]]
        full = places[:-1][distances == period]
        offset = int(np.median(pauses[full[:, None] + np.arange(1, period + 1)], axis=0).argmax()) + 1
        begins = np.r_[places[0] - period, places] + offset
        step = np.searchsorted(begins, np.arange(total), "right")
        how = f"a step is a period of {period} kernels: {name_of(work.name[places[0]])!r} is the rarest that recurs so"
        return _Found(step, how)
    return None


def _with_loose_work(step: np.ndarray, work: _Work) -> np.ndarray:
    """Give a step to the work that has none (-1), run by run.

    In the middle of a step it belongs to that step. Between two steps a short run, of less than half a typical step's
    work, is what surrounds a step (sampling, preparing inputs): it is cut at its longest pause, and each part goes to
    the step on its side. A long run is a step of its own, a prefill, but for a short part at either end that is closer
    to the step there. Before the first step and after the last, what a pause as long as half a step's work parts from
    it is in no step."""
    step = step.copy()
    loose = step < 0
    edges = np.flatnonzero(np.diff(np.r_[False, loose, False]))
    _, which = np.unique(step[~loose], return_inverse=True)
    half = np.median(np.bincount(which, work.length[~loose])) / 2
    pauses = np.r_[half, work.start[1:] - np.maximum.accumulate(work.end)[:-1], half]  # before each piece of work
    done, fresh = np.r_[0, np.cumsum(work.length)], int(step.max()) + 1
    for begin, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        before = step[begin - 1] if begin else -1
        after = step[stop] if stop < len(step) else -1
        if before == after:
            step[begin:stop] = before
        elif done[stop] - done[begin] < half:
            cut = begin + int(pauses[begin : stop + 1].argmax())
            step[begin:cut], step[cut:stop] = before, after
        else:
            while stop - begin > 1:
                cut = begin + 1 + int(pauses[begin + 1 : stop].argmax())
                if done[cut] - done[begin] < half and pauses[begin] < pauses[cut]:
                    step[begin:cut], begin = before, cut
                elif done[stop] - done[cut] < half and pauses[stop] < pauses[cut]:
                    step[cut:stop], stop = after, cut
                else:
                    break
            step[begin:stop] = fresh
            fresh += 1
    return step


def _extents(step: np.ndarray, work: _Work) -> np.ndarray:
    """[N, 2] start and end of each step, in order; one that begins before the one before it ends is cut there."""
    kept = step >= 0
    _, which = np.unique(step[kept], return_inverse=True)
    extents = np.full((int(which.max()) + 1, 2), (np.iinfo(np.int64).max, np.iinfo(np.int64).min), np.int64)
    np.minimum.at(extents[:, 0], which, work.start[kept])
    np.maximum.at(extents[:, 1], which, work.end[kept])
    extents = extents[np.lexsort((extents[:, 1], extents[:, 0]))]
    extents[:, 1] = np.maximum.accumulate(extents[:, 1])
    extents[1:, 0] = np.maximum(extents[1:, 0], extents[:-1, 1])
    return extents


# ---- the report ---------------------------------------------------------------------------------------------------


class Gaps(Sequence):
    """The idle gaps of a trace in order of time, `TraceGap`s made when asked for: a trace can have millions."""

    def __init__(self, starts, ends, steps, inside, causes: list[str], pieces: tuple[np.ndarray, ...]):
        self.ns = ends - starts
        self.steps, self.inside, self.causes = steps, inside, causes
        self._starts, self._ends = starts, ends
        gap, self._cause, self._ns = pieces  # for each gap its causes, in order of the gaps
        self._first = np.searchsorted(gap, np.arange(len(starts) + 1))
        self._gap = gap

    def __len__(self) -> int:
        return len(self.ns)

    def __getitem__(self, at):
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        part = slice(self._first[at], self._first[at + 1])
        host_s = {
            self.causes[cause]: 1e-9 * ns
            for cause, ns in zip(self._cause[part].tolist(), self._ns[part].tolist(), strict=True)
        }
        bounds = 1e-9 * float(self._starts[at]), 1e-9 * float(self._ends[at])
        return TraceGap(int(self.steps[at]), *bounds, host_s, bool(self.inside[at]))

    def ns_by_cause(self, inside: bool | None = None) -> dict[str, int]:
        """Nanoseconds of all gaps by cause, the largest first; `inside` takes those inside, or between, steps only."""
        wanted = np.ones(len(self._gap), bool) if inside is None else self.inside[self._gap] == inside
        totals = np.zeros(len(self.causes), np.int64)
        np.add.at(totals, self._cause[wanted], self._ns[wanted])
        order = sorted(np.flatnonzero(totals), key=lambda cause: (-totals[cause], self.causes[cause]))
        return {self.causes[cause]: int(totals[cause]) for cause in order}

    def longest(self, count: int) -> list[TraceGap]:
        order = np.lexsort((self._starts, -self.ns))[:count]
        return [self[int(at)] for at in order]


@dataclass(eq=False, repr=False)
class TraceReport:
    """How idle the GPU of a trace was. Times are seconds from the first kernel or copy of `device`.

    `streams`: a `Stream` for each stream of each device of the file. `compute_stream`: the one of `device` with most
    kernel time. `steps`: float64 [N, 2], start and end of each step on it; `how_steps` says how they were found.
    `step_active`: share of the time from the end of the first step to the end of the last in which a step ran, None
    with fewer than two steps. `kernel_busy`: share of `window_s`, from the first to the last event of the device, in
    which any kernel, copy or memset ran on it. `kernel_busy_in_steps`: the same share over the time of `step_active`.
    `graph_launches`: None where the trace has no runtime events. `gaps`: see `Gaps`. Between two steps a gap is all
    the time from the end of the one to the start of the other, so that these add up to the idle time behind
    `step_active`. Inside a step a gap is time in which nothing runs on the device. `notes`: what else a reader must
    know."""

    label: str
    device: int
    gpu: str | None
    streams: list[Stream]
    compute_stream: int
    steps: np.ndarray
    how_steps: str
    kernel_busy: float
    kernel_busy_in_steps: float | None
    step_active: float | None
    window_s: float
    num_events: int
    num_kernels: int
    num_copies: int
    graph_launches: GraphLaunches | None
    gaps: Gaps
    notes: list[str]
    _busy: tuple[np.ndarray, np.ndarray]  # nanoseconds, as all that begins with _ but the annotations
    _copies: dict[str, tuple[np.ndarray, np.ndarray]]
    _host: tuple[np.ndarray, np.ndarray, np.ndarray]  # starts, ends, is a wait: events of the launching thread
    _annotations: dict[str, np.ndarray]

    def __repr__(self) -> str:
        return f"<TraceReport: {self.label}, {len(self.steps)} steps, {self.num_kernels} kernels>"

    @cached_property
    def idle_s(self) -> dict[str, float]:
        """Seconds idle, "between steps" and "inside steps": what the gaps add up to."""
        inside = int(self.gaps.ns[self.gaps.inside].sum())
        return {"between steps": 1e-9 * (int(self.gaps.ns.sum()) - inside), "inside steps": 1e-9 * inside}

    def idle_by_cause(self, inside: bool | None = None) -> dict[str, float]:
        """Seconds of the gaps by what the host was doing, the largest first; `inside` True or False: of those only."""
        return {cause: 1e-9 * ns for cause, ns in self.gaps.ns_by_cause(inside).items()}

    def longest(self, count: int = 10) -> list[TraceGap]:
        """The `count` longest gaps, the longest first."""
        return self.gaps.longest(count)

    def annotation(self, name: str) -> np.ndarray:
        """float64 [N, 2]: start and end of each user annotation of that name on the host, to be given to `busy_in`."""
        return self._annotations.get(name, np.zeros((0, 2)))

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON, with `schema` (a number). Seconds in keys with `_s`, milliseconds in
        keys with `ms`, shares from 0 to 1; null where something is not in the trace.

        `steps`: count, how, and the median and 99th percentile of their length and of the period from end to end.
        `idle`: for "between_steps" and "inside_steps" the seconds `s` and `by_cause`. `longest_gaps`: twenty."""
        lengths, periods = 1e3 * (self.steps[:, 1] - self.steps[:, 0]), 1e3 * np.diff(self.steps[:, 1])
        steps = {"count": len(self.steps), "how": self.how_steps}
        for key, values in (("ms", lengths), ("period_ms", periods)):
            steps[f"{key}_median"] = float(np.median(values)) if len(values) else None
            steps[f"{key}_p99"] = float(np.percentile(values, 99)) if len(values) else None
        idle = {
            key.replace(" ", "_"): {"s": seconds, "by_cause": self.idle_by_cause(key == "inside steps")}
            for key, seconds in self.idle_s.items()
        }
        return {
            "schema": SCHEMA,
            "trace": self.label,
            "device": self.device,
            "gpu": self.gpu,
            "streams": [stream._asdict() for stream in self.streams],
            "compute_stream": self.compute_stream,
            "window_s": self.window_s,
            "kernel_busy": self.kernel_busy,
            "kernel_busy_in_steps": self.kernel_busy_in_steps,
            "step_active": self.step_active,
            "events": self.num_events,
            "kernels": self.num_kernels,
            "copies": self.num_copies,
            "graph_launches": self.graph_launches and self.graph_launches._asdict(),
            "steps": steps,
            "idle": idle,
            "longest_gaps": [
                {"step": gap.step, "inside": gap.inside, "start_s": gap.start, "ms": gap.ms, "cause": gap.cause}
                for gap in self.longest(20)
            ],
            "notes": self.notes,
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def timeline(self) -> Timeline:
        """The steps, copies and host work as a `Timeline`, to plot: lanes host, H2D, compute, D2H.

        Every step counts as "decode", so that its summary has the `step_active` of this report. The host lane is the
        launching thread: "wait" is a call that synchronizes, "work" anything else that is recorded. Where that would be
        more than 100,000 pieces, the shortest pauses between them are closed."""
        timeline = Timeline(self.label, "cuda")
        starts, ends = self.steps[:, 0], self.steps[:, 1]
        for number, (start, end) in enumerate(self.steps.tolist()):
            timeline.add("compute", "step", number, start, end)
            timeline.add_step(number, "decode", 0, 0)
        last = len(self.steps) - 1
        for lane, name, side in (("H2D", "copy_in", "left"), ("D2H", "copy_out", "right")):
            begins, stops = (1e-9 * column for column in self._copies[lane])
            # Copied in for the step that begins after it; copied out from the last one that began before it.
            near = np.searchsorted(starts, begins, side) - (lane == "D2H")
            for number, start, end in zip(np.clip(near, 0, last), begins, stops, strict=True):
                timeline.add(lane, name, int(number), float(start), float(end))
        begins, stops, waits = self._host
        pieces = {"wait": union(begins[waits], stops[waits])}
        work = union(begins[~waits], stops[~waits])
        if len(work[0]):
            work = intersections(work, outside(*pieces["wait"], work[0][0], work[1][-1]))[:2]
        pieces["work"] = _at_most(MOST_HOST_PIECES, *work)
        for name, (begins, stops) in pieces.items():
            near = np.clip(np.searchsorted(ends, 1e-9 * begins, "right"), 0, last)
            for number, start, end in zip(near.tolist(), begins.tolist(), stops.tolist(), strict=True):
                timeline.add("host", name, number, 1e-9 * start, 1e-9 * end)
        return timeline


def _at_most(most: int, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stretches, with the shortest pauses between them closed until there are at most so many."""
    if len(starts) <= most:
        return starts, ends
    pauses = starts[1:] - ends[:-1]
    kept = pauses > np.partition(pauses, len(pauses) - most)[len(pauses) - most]
    return starts[np.r_[True, kept]], ends[np.r_[kept, True]]


def _plain(text: str, longest: int = 80) -> str:
    """A name of the file as text for a terminal: no control characters, not too long."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _lines(report: TraceReport) -> Iterator[str]:
    def row(label: str, text: str) -> str:
        return f"{label:<16}{text}"

    def share(value: float | None) -> str:
        return "not measured" if value is None else f"{100 * value:.2f} %"

    data, others = report.as_dict(), len(report.streams) - 1
    yield row("trace", _plain(report.label))
    yield row("device", f"{report.device}{f' ({_plain(report.gpu)})' if report.gpu else ''}")
    yield row("compute stream", f"{report.compute_stream}" + (f", one of {others + 1}" if others else ""))
    yield row("window", f"{report.window_s:.6g} s, {report.num_kernels} kernels, {report.num_copies} copies")
    if report.graph_launches is None:
        yield row("graph launches", "not known: the trace has no runtime events")
    elif report.graph_launches.calls and not report.graph_launches.kernels:
        yield row("graph launches", f"{report.graph_launches.calls}, but none of their kernels is in the trace")
    else:
        calls, kernels = report.graph_launches
        yield row("graph launches", f"{calls}, with {kernels} of the kernels" if calls else "none")
    yield row("steps", f"{len(report.steps)}: {_plain(report.how_steps, 300)}")
    steps = data["steps"]
    if steps["ms_median"] is not None:
        yield row("ms a step", f"{steps['ms_median']:.3f} (median), {steps['ms_p99']:.3f} (99th percentile)")
    active = report.step_active
    yield row("step active", share(active) + (f", idle {100 * (1 - active):.2f} %" if active is not None else ""))
    yield row(
        "kernel busy", f"{share(report.kernel_busy_in_steps)} over these steps, {share(report.kernel_busy)} over all"
    )
    for note in report.notes:
        yield row("note", _plain(note, 300))
    for where, seconds in report.idle_s.items():
        if seconds:
            yield ""
            yield f"idle {where}: {1e3 * seconds:.3f} ms, by what the host was doing"
            causes = list(report.idle_by_cause(where == "inside steps").items())
            rest = sum(value for _, value in causes[8:])
            causes = causes[:8] + ([(f"{len(causes) - 8} more", rest)] if rest else [])
            yield from (
                f"{1e3 * value:>12.3f} ms {100 * value / seconds:>6.1f} %  {_plain(name)}" for name, value in causes
            )
    longest = [gap for gap in report.longest(5) if gap.seconds > 0]
    if longest:
        yield ""
        yield "longest gaps"
        for gap in longest:
            where = "inside" if gap.inside else "before"
            yield f"{gap.ms:>12.3f} ms  {where} step {gap.step}, at {gap.start:.6f} s: {_plain(gap.cause)}"


def read_trace(path: str | os.PathLike, progress: bool = False) -> TraceReport:
    """The report on a trace file. `progress` shows a bar on stderr for files larger than 20 MB.

    TraceError, with one line that says what was found, for a file that cannot be read, is no JSON, is cut off, or has
    no events or none of a device. Of several devices the one with most kernel time is reported, and a note says so."""
    path = Path(path)
    events = _read_events(path, progress)
    problem = _why_unusable(path, events)
    if problem is not None:
        raise TraceError(problem)
    report = _report(path.name, events)
    report.gpu = _gpu_name(path, report.device)
    return report


def _report(label: str, events: _Events) -> TraceReport:
    device, host, runtime = events.device.arrays(), events.host.arrays(), events.runtime.arrays()
    on_gpu, names = events.gpu_annotations.arrays(), sorted(events.names)
    for table in (device, host, runtime, on_gpu):
        table["name"] = _renumbered(table["name"], events.names)
    for table in (host, runtime):
        table["thread"] = _renumbered(table["thread"], events.threads)
    notes = [f"{events.unusable} events without a usable time were left out."] if events.unusable else []
    time = np.where(device["kind"] == KERNEL, device["end"] - device["start"], 0)
    number, numbers = _busiest(device["device"], time)
    streams = _streams(device)
    if numbers > 1:
        notes.append(f"{numbers} devices are in the trace: {number} is reported, the one with most kernel time.")
    own = device["device"] == number
    # In one order, whatever order the file has.
    order = np.lexsort([device[key][own] for key in ("name", "correlation", "end", "start")])
    device = {key: column[own][order] for key, column in device.items()}
    origin, last = int(device["start"][0]), int(device["end"].max())
    device["start"], device["end"] = device["start"] - origin, device["end"] - origin
    kinds = device["kind"]
    time = np.where(kinds == KERNEL, device["end"] - device["start"], 0)
    compute, _ = _busiest(device["stream"], time)
    busy = union(device["start"], device["end"])

    row, known = _launched_by(device["correlation"], runtime)
    graph_names = np.array([bool(GRAPH_LAUNCH.match(name)) for name in names], bool)
    if len(runtime["name"]):
        is_graph = known & graph_names[runtime["name"][row]]
        calls = int(graph_names[runtime["name"]].sum())
        launches = GraphLaunches(calls, int((is_graph & (kinds == KERNEL)).sum()))
        if calls and not launches.kernels:
            notes.append("Graphs were launched, and none of their kernels is in the trace: kernel busy is too low.")
    else:  # then several kernels of one correlation id can only have come from a graph
        _, inverse, counts = np.unique(device["correlation"], return_inverse=True, return_counts=True)
        is_graph, launches = (counts[inverse] > 1) & (device["correlation"] > 0), None

    at_work = (device["stream"] == compute) & (kinds != H2D) & (kinds != D2H)
    launch = runtime["start"][row] - origin if len(runtime["start"]) else np.zeros(len(kinds), np.int64)
    launch_known = bool(known[at_work].mean() > 0.99)
    is_result = kinds == D2H
    by_launch = bool(launch_known and known[is_result].all())
    # The few whose launch is not recorded take the launch before them.
    seen = np.where(known[at_work], np.arange(at_work.sum()), known[at_work].argmax())
    seen = np.maximum.accumulate(seen)
    work = _Work(
        start=device["start"][at_work],
        end=device["end"][at_work],
        name=device["name"][at_work],
        correlation=device["correlation"][at_work],
        launch=launch[at_work][seen] if launch_known else None,
        is_graph=is_graph[at_work],
    )
    results = launch[is_result] if by_launch else device["start"][is_result]
    on_gpu = {
        key: column[(on_gpu["device"] == number) & (on_gpu["stream"] == compute)] for key, column in on_gpu.items()
    }
    annotated = host["kind"] == ANNOTATION
    annotations = {key: column[annotated] for key, column in host.items()}
    for table in (annotations, on_gpu):
        table["start"], table["end"] = table["start"] - origin, table["end"] - origin
    found = find_steps(
        work,
        results,
        by_launch,
        [group for thread in np.unique(annotations["thread"]) for group in _repeated(annotations, names, thread)],
        _repeated(on_gpu, names),
        names.__getitem__,
    )
    notes += [found.note] if found.note else []
    steps = _extents(found.step, work)
    active_ns, period_ns = (steps[1:, 1] - steps[1:, 0]).sum(), steps[-1, 1] - steps[0, 1]

    thread = _launching_thread(runtime, row[at_work & known], time[at_work & known], host)
    mine = np.flatnonzero((host["thread"] == thread) & (host["end"] > host["start"]))
    mine = mine[np.lexsort([host[k][mine] * s for k, s in (("name", 1), ("kind", 1), ("end", -1), ("start", 1))])]
    mine_starts, mine_ends = host["start"][mine] - origin, host["end"][mine] - origin
    waits = np.array([bool(WAITS.search(name)) for name in names], bool)[host["name"][mine]]
    waits &= host["kind"][mine] == RUNTIME
    gaps = _gaps(steps, busy, mine_starts, mine_ends, host["name"][mine], host["kind"][mine], names)

    report = TraceReport(
        label=label,
        device=number,
        gpu=None,
        streams=streams,
        compute_stream=compute,
        steps=1e-9 * steps,
        how_steps=found.how,
        kernel_busy=float((busy[1] - busy[0]).sum() / (last - origin)) if last > origin else 0.0,
        kernel_busy_in_steps=None,
        step_active=float(active_ns / period_ns) if period_ns > 0 else None,
        window_s=1e-9 * (last - origin),
        num_events=events.count,
        num_kernels=int((kinds == KERNEL).sum()),
        num_copies=int(np.isin(kinds, (COPY, H2D, D2H)).sum()),
        graph_launches=launches,
        gaps=gaps,
        notes=notes,
        _busy=busy,
        _copies={
            lane: (device["start"][kinds == k], device["end"][kinds == k]) for lane, k in (("H2D", H2D), ("D2H", D2H))
        },
        _host=(mine_starts, mine_ends, waits),
        _annotations=_by_name(annotations, names),
    )
    if period_ns > 0:
        report.kernel_busy_in_steps = _busy_share(busy, int(steps[0, 1]), int(steps[-1, 1]))
    return report


def _busiest(which: np.ndarray, time: np.ndarray) -> tuple[int, int]:
    """The value of `which` with most `time`, the smaller one of two alike; and how many values have any."""
    values, inverse = np.unique(which, return_inverse=True)
    totals = np.zeros(len(values), np.int64)
    np.add.at(totals, inverse, time)
    return int(values[totals.argmax()]), int((totals > 0).sum())


def _streams(device: dict[str, np.ndarray]) -> list[Stream]:
    pairs = np.column_stack([device["device"], device["stream"]])
    values, inverse = np.unique(pairs, axis=0, return_inverse=True)
    inverse, found = inverse.ravel(), []
    for i, (number, stream) in enumerate(values.tolist()):
        one = inverse == i
        starts, ends = union(device["start"][one], device["end"][one])
        kinds = device["kind"][one]
        copies = int(np.isin(kinds, (COPY, H2D, D2H)).sum())
        found.append(Stream(number, stream, 1e-9 * int((ends - starts).sum()), int((kinds == KERNEL).sum()), copies))
    return found


def _launched_by(correlation: np.ndarray, runtime: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """For each device event the row of `runtime` that launched it, and whether there is one."""
    order = np.lexsort((runtime["name"], runtime["start"], runtime["correlation"]))
    sorted_ids = runtime["correlation"][order]
    if not len(order):
        return np.zeros(len(correlation), np.int64), np.zeros(len(correlation), bool)
    at = np.minimum(np.searchsorted(sorted_ids, correlation), len(order) - 1)
    return order[at], (sorted_ids[at] == correlation) & (correlation > 0)


def _launching_thread(runtime, rows: np.ndarray, time: np.ndarray, host) -> int:
    """The thread that launched most of the compute stream's kernel time; where none is known, the one that recorded
    most time of its own."""
    if len(rows):
        return _busiest(runtime["thread"][rows], time)[0]
    if len(host["thread"]):
        return _busiest(host["thread"], host["end"] - host["start"])[0]
    return -1


def _renumbered(column: np.ndarray, numbers: _Names) -> np.ndarray:
    """Names numbered in their own order, not in that in which they stand in the file."""
    new = np.zeros(len(numbers), np.int64)
    for i, name in enumerate(sorted(numbers)):
        new[numbers[name]] = i
    return new[column]


def _pattern(name: str) -> str:
    """A name with its numbers left open: one for all occurrences of an annotation."""
    return re.sub(r"#?\d+", "#", name)


def _repeated(table: dict[str, np.ndarray], names: list[str], thread: int | None = None) -> list[tuple]:
    """(pattern, starts, ends) of the annotations of one thread that occur more than once and never overlap themselves,
    in order of start; at most the hundred patterns that cover most time."""
    rows = np.arange(len(table["name"])) if thread is None else np.flatnonzero(table["thread"] == thread)
    starts, ends, numbers = (table[key][rows] for key in ("start", "end", "name"))
    order = np.lexsort((ends, starts))
    starts, ends, numbers = starts[order], ends[order], numbers[order]
    patterns, groups = _Names(), np.zeros(len(names), np.int64)
    for number in np.unique(numbers).tolist():
        groups[number] = patterns[_pattern(names[number])]
    found, group = [], groups[numbers]
    for pattern, number in patterns.items():
        begins, stops = starts[group == number], ends[group == number]
        if len(begins) > 1 and (begins[1:] >= stops[:-1]).all():
            found.append((pattern, begins, stops))
    return sorted(found, key=lambda one: (-(one[2] - one[1]).sum(), one[0]))[:100]


def _by_name(annotations: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    order = np.lexsort([annotations[key] for key in ("end", "start", "name")])
    bounds = 1e-9 * np.column_stack([annotations["start"][order], annotations["end"][order]])
    numbers, first = np.unique(annotations["name"][order], return_index=True)
    parts = np.split(bounds, first[1:])
    return {names[number]: part for number, part in zip(numbers.tolist(), parts, strict=False)}


def readable(name: str, kind: int) -> str:
    """The cause that an event of the host stands for: what differs from one occurrence to the next is left out."""
    if kind == RUNTIME:
        return f"{name} (waiting)" if WAITS.search(name) else name
    if kind == ANNOTATION:
        return _pattern(name)
    if kind == PYTHON:
        name = re.sub(r" at 0x[0-9a-fA-F]+", "", name)
        name = re.sub(r"^(nn\.Module: \w+?)_\d+$", r"\1", name)
        return re.sub(r"^\S*[/\\](?=[^/\\]+\.pyx?\(\d+\): )", "", name)
    return name


def _gaps(steps, busy, starts, ends, name, kind, names: list[str]) -> Gaps:
    """The gaps between steps and inside them, with what the host's events (sorted, outer first) say of each."""
    between_steps = steps[:-1, 1], steps[1:, 0], np.arange(1, len(steps))
    real = steps[:, 1] > steps[:, 0]
    numbers = np.flatnonzero(real)
    idle = outside(busy[0], busy[1], steps[0, 0], steps[-1, 1])
    inside_starts, inside_ends, which, _ = intersections((steps[real, 0], steps[real, 1]), idle)
    gap_starts = np.r_[between_steps[0], inside_starts]
    gap_ends = np.r_[between_steps[1], inside_ends]
    gap_steps = np.r_[between_steps[2], numbers[which]]
    inside = np.arange(len(gap_starts)) >= len(between_steps[0])
    order = np.lexsort((gap_ends, gap_starts))
    order = order[gap_ends[order] > gap_starts[order]]
    gap_starts, gap_ends, gap_steps, inside = (column[order] for column in (gap_starts, gap_ends, gap_steps, inside))

    # Only what overlaps a gap needs to be looked at one by one.
    seen = covered_before(ends, gap_starts, gap_ends) > covered_before(starts, gap_starts, gap_ends)
    pairs, cause_of = np.unique(name[seen] * 16 + kind[seen].astype(np.int64), return_inverse=True)
    numbered = _Names({NOTHING: 0})
    causes = np.array([numbered[readable(names[pair // 16], pair % 16)] for pair in pairs.tolist()], np.int64)
    begins, stops, doing = innermost(starts[seen], ends[seen], causes[cause_of] if len(pairs) else cause_of)
    begins, stops, gap, piece = intersections((gap_starts, gap_ends), (begins, stops))
    cause, ns = doing[piece], stops - begins
    left = (gap_ends - gap_starts).astype(np.int64)
    np.subtract.at(left, gap, ns)
    unrecorded = np.flatnonzero(left)
    gap, cause, ns = np.r_[gap, unrecorded], np.r_[cause, np.zeros_like(unrecorded)], np.r_[ns, left[unrecorded]]
    keys, inverse = np.unique(gap * len(numbered) + cause, return_inverse=True)
    totals = np.zeros(len(keys), np.int64)
    np.add.at(totals, inverse, ns)
    pieces = keys // len(numbered), keys % len(numbered), totals
    return Gaps(gap_starts, gap_ends, gap_steps, inside, list(numbered), pieces)


def busy_in(trace: str | os.PathLike | TraceReport, start_s: float | None = None, end_s: float | None = None) -> float:
    """Kernel busy from `start_s` to `end_s`: the share in which any kernel, copy or memset ran on the device.

    `trace` is a file or a report; the times are the report's, None is its first or last event. TraceError for a file as
    in `read_trace`, ValueError for an empty window."""
    report = trace if isinstance(trace, TraceReport) else read_trace(trace)
    start = 0.0 if start_s is None else start_s
    end = report.window_s if end_s is None else end_s
    if not (math.isfinite(start) and math.isfinite(end) and start < end):
        raise ValueError(f"the window is {start} to {end} s; allowed are finite times with start_s < end_s")
    return _busy_share(report._busy, round(1e9 * start), round(1e9 * end))


def _busy_share(busy: tuple[np.ndarray, np.ndarray], start: int, end: int) -> float:
    before = covered_before(np.array([start, end]), *busy)
    return float(before[1] - before[0]) / max(end - start, 1)


# ---- the command line ---------------------------------------------------------------------------------------------


def main_trace(options) -> int:
    """`asyncbatch.profile --trace FILE`: print the report, as a table or with --json, and write it with --out DIR.

    `options` has trace, json, out, debug, and changed: the names of all options that do not have their default. Exit
    status 0, or 2 with one line on stderr."""
    from .profile import tell

    try:
        others = [name for name in options.changed if name not in ("trace", "json", "out", "debug")]
        if others:
            flags = ", ".join("--" + name.replace("_", "-") for name in others)
            raise ValueError(f"--trace reads a file and measures nothing: it cannot be had with {flags}")
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            if not os.access(options.out, os.W_OK):
                raise PermissionError(f"--out {options.out}: this folder cannot be written to")
        report = read_trace(options.trace, progress=sys.stderr.isatty())
        print(json.dumps(report.as_dict(), indent=1) if options.json else report)
        if options.out is not None:
            from .plot import plot  # matplotlib is needed for pictures only

            (options.out / "report.json").write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
            plot(report.timeline(), title=f"{report.label}, device {report.device}").savefig(
                options.out / "trace-timeline.png"
            )
    except (ValueError, OSError, MemoryError) as error:
        if options.debug:
            raise
        tell(f"asyncbatch.profile: {str(error).strip() or type(error).__name__}")
        return 2
    except KeyboardInterrupt:
        tell("asyncbatch.profile: interrupted")
        return 130
    return 0

"""The events of a profiler's trace as columns of numbers.

What matters here (kernels, copies, calls of the runtime, operators, annotations, Python functions) is kept in arrays,
25 to 57 bytes an event, in whole nanoseconds; everything else is skipped. `files.py` reads them, one by one.

torch writes microseconds near 4.6e12 with three decimals. They come as text, and every digit counts: a float64 keeps
the nanosecond only up to 8.8e12, and in traces that count from 1970 (1.7e15) it would keep a quarter of a microsecond.
"""

from __future__ import annotations

import contextlib
import re
from array import array
from collections import Counter
from decimal import Decimal
from typing import Any

import numpy as np

LATEST = 45 * 10**14  # microseconds, the year 2112. With no later time, differences of nanoseconds fit an int64

# Kinds of device events. A memset and a copy within the device are part of a step, copies from and to the host are not.
KERNEL, MEMSET, COPY, H2D, D2H = range(5)
# Kinds of host events. Where two events begin and end together, the one with the smaller number is the outer one.
ANNOTATION, PYTHON, OP, RUNTIME = range(5, 9)
GPU_ANNOTATION = 9
CATEGORIES = {
    "kernel": KERNEL, "gpu_memset": MEMSET, "memset": MEMSET, "gpu_memcpy": COPY, "memcpy": COPY,
    "user_annotation": ANNOTATION, "python_function": PYTHON, "cpu_op": OP, "operator": OP,
    "cuda_runtime": RUNTIME, "cuda_driver": RUNTIME, "runtime": RUNTIME, "gpu_user_annotation": GPU_ANNOTATION,
}  # fmt: skip
# As CUDA, ROCm and XPU (which says M, memory, for the host) name copies.
_TO, _HOST = r"\s*(?:->|_?to_?|2)\s*", "(?:Host|Pinned|Pageable|Memory)"
TO_HOST = re.compile(rf"D(?:to|2)[HM]|Device{_TO}{_HOST}", re.IGNORECASE)
FROM_HOST = re.compile(rf"[HM](?:to|2)D|{_HOST}{_TO}Device", re.IGNORECASE)
# Calls of the runtime after which something must run on the device: kernels, graphs, copies. (A memset of no bytes runs
# nothing, and profilers record such calls too.)
GRAPH_LAUNCH = re.compile(r"^(cuda|cu|hip)GraphLaunch")
KERNEL_LAUNCH = re.compile(r"^(cuda|cu|hip)\w*Launch\w*Kernel")
COPY_CALL = re.compile(r"^(cuda|cu|hip)Memcpy")
LAUNCHES = re.compile("|".join(one.pattern for one in (GRAPH_LAUNCH, KERNEL_LAUNCH, COPY_CALL)))
Columns = dict[str, np.ndarray]  # events as columns by name, all of the same length


class TraceError(ValueError):
    """A file that no report can be made of. The message is one line: what was found, and what is needed."""


class Names(dict):
    """The numbers of names; a name gets the next number when it is first asked for."""

    def __missing__(self, name: str) -> int:
        number = self[name] = len(self)
        return number


class _GrowingColumns:
    """Columns of integers that grow row by row. `types`: the type code of `array` for each column."""

    def __init__(self, **types: str):
        self.names = list(types)
        self.columns = [array(letter) for letter in types.values()]

    def add(self, *row: int) -> None:
        for column, value in zip(self.columns, row, strict=True):
            column.append(value)

    def __len__(self) -> int:
        return len(self.columns[0])

    def arrays(self) -> Columns:
        """The columns by name; they are not copied."""
        pairs = zip(self.names, self.columns, strict=True)
        return {name: np.frombuffer(c, c.typecode) if c else np.zeros(0, c.typecode) for name, c in pairs}


def nanoseconds(microseconds: Any) -> int:
    """A time of a trace as whole nanoseconds, whether it is a number or a number in a string.

    ValueError, TypeError or ArithmeticError for anything else, and for times after the year 2112."""
    if isinstance(microseconds, bool):
        raise TypeError("true and false are not times")
    value = microseconds
    if isinstance(microseconds, str):
        whole, _, part = microseconds.partition(".")
        if len(part) == 3 and len(whole) < 16 and whole.isdecimal() and part.isdecimal():  # as torch writes them
            return 1000 * int(whole) + int(part)
        value = Decimal(microseconds)
    if not -LATEST < value < LATEST:  # also: 1e999999999 would make an integer that fills the memory
        raise ValueError(f"{microseconds} microseconds")
    return round(value * 1000)


def to_int64(value: Any) -> int:
    """The value as an integer that fits 64 bits ("stream 7" is 7), 0 where it is none."""
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    with contextlib.suppress(ValueError, TypeError, ArithmeticError):
        number = int(value.rpartition(" ")[2] if isinstance(value, str) else value)
        if -(2**63) <= number < 2**63:
            return number
    return 0


class Events:
    """The events of a trace that matter here, as columns of numbers. `count`: all events of the file; `timed`: those
    with a duration; `unusable`: those that would matter, but have no time that makes sense. `kinds`: the kind of each
    category in the file, None where it does not matter; `others`: how many events have such a category. `about`: what
    the file says beside its events, by key."""

    def __init__(self) -> None:
        self.names, self.threads = Names(), Names()
        self.device = _GrowingColumns(
            start="q", end="q", kind="b", device="q", stream="q", correlation="q", name="i", graph="q"
        )
        self.host = _GrowingColumns(start="q", end="q", kind="b", thread="i", name="i")
        self.runtime = _GrowingColumns(correlation="q", start="q", end="q", thread="i", name="i")
        self.gpu_annotations = _GrowingColumns(start="q", end="q", device="q", stream="q", name="i")
        self.kinds: dict[str, int | None] = dict(CATEGORIES)
        self.others: Counter[str] = Counter()
        self.about: dict[str, Any] = {}
        self.count = self.timed = self.unusable = 0

    def add(self, event: Any) -> None:
        """Keep one event if it matters. Whatever the event is, this does not fail."""
        self.count += 1
        if not isinstance(event, dict) or event.get("ph") != "X":
            return
        self.timed += 1
        category = event.get("cat")
        if not isinstance(category, str):
            return
        kind = self.kinds[category] if category in self.kinds else self._kind(category)
        if kind is None:
            if category in self.kinds:
                self.others[category] += 1
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
                self.runtime.add(to_int64(args.get("correlation")), start, end, thread, name)
            return
        device = to_int64(args.get("device", event.get("pid")))
        stream = to_int64(args.get("stream", event.get("tid")))
        if kind == GPU_ANNOTATION:
            self.gpu_annotations.add(start, end, device, stream, name)
            return
        if kind == COPY:
            kind = D2H if TO_HOST.search(text) else H2D if FROM_HOST.search(text) else COPY
        graph = to_int64(args["graph id"]) if "graph id" in args else 0
        self.device.add(start, end, kind, device, stream, to_int64(args.get("correlation")), name, graph)

    def columns(self) -> tuple[Columns, Columns, Columns, Columns, list[str]]:
        """(device, host, runtime, gpu_annotations, names): four kinds of events, and the list of names that the columns
        `name` count in. The numbers of names and threads do not depend on the order of the file."""
        device, host, runtime, gpu_annotations = (
            columns.arrays() for columns in (self.device, self.host, self.runtime, self.gpu_annotations)
        )
        for columns in (device, host, runtime, gpu_annotations):
            for key, names in (("name", self.names), ("thread", self.threads)):
                if key in columns:
                    columns[key] = _renumber(columns[key], names)
        readable = [name.encode("utf-8", "replace").decode() for name in sorted(self.names)]  # no half characters
        return device, host, runtime, gpu_annotations, readable

    def _kind(self, category: str) -> int | None:
        """The kind of a category not seen before. Older traces and other vendors' runtimes spell some differently."""
        spelling = category.lower()
        kind = CATEGORIES.get(spelling)
        if kind is None and spelling.endswith(("_runtime", "_driver")):
            kind = RUNTIME
        if len(self.kinds) < 1000:
            self.kinds[category] = kind
        return kind


def _renumber(column: np.ndarray, numbers: Names) -> np.ndarray:
    """A column of numbers of names, numbered again in the order of the names and not in that of the file."""
    new = np.zeros(len(numbers), np.int64)
    for i, name in enumerate(sorted(numbers)):
        new[numbers[name]] = i
    return new[column]

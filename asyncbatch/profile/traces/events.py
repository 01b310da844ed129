"""The events of a profiler's trace as columns of numbers, read one by one from a file of any size.

`read_events` takes Chrome trace JSON as torch.profiler writes it, packed with gzip or not, an object with traceEvents
or the bare list. What matters here (kernels, copies, calls of the runtime, operators, annotations, Python functions) is
kept in arrays, 25 to 49 bytes an event, in whole nanoseconds; everything else is passed over.

torch writes microseconds near 4.6e12 with three decimals. They are parsed as decimal numbers, which keeps every digit
and took no longer here than floats. A float64 keeps the nanosecond up to 8.8e12 only, and a quarter of a microsecond in
older traces, which count from 1970 (1.7e15).
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import re
import zlib
from array import array
from decimal import Decimal
from pathlib import Path
from typing import Any

import ijson
import numpy as np
from tqdm import tqdm

BAR_FROM = 20_000_000  # bytes: below that a file is read before a bar could be looked at
LATEST = 45 * 10**14  # microseconds, the year 2112: a time beyond it is none. Differences of nanoseconds fit an int64

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


class TraceError(ValueError):
    """A file that cannot be reported on, with one line that says what was found and what is needed."""


class Names(dict):
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


class Events:
    """The events of a trace that matter here, as columns of numbers."""

    def __init__(self) -> None:
        self.names, self.threads = Names(), Names()
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

    def tables(self) -> tuple[Any, Any, Any, Any, list[str]]:
        """(device, host, runtime, gpu_annotations, names): tables of columns by name, and the list of names that the
        column `name` counts in. Numbers of names and threads do not depend on the order of the file."""
        tables = [table.arrays() for table in (self.device, self.host, self.runtime, self.gpu_annotations)]
        for table in tables:
            for key, names in (("name", self.names), ("thread", self.threads)):
                if key in table:
                    table[key] = _renumbered(table[key], names)
        device, host, runtime, gpu_annotations = tables
        return device, host, runtime, gpu_annotations, sorted(self.names)

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


def read_events(path: Path, progress: bool) -> Events:
    """The events of a file, at least one kernel among them. TraceError for any other file."""
    events, counted = Events(), None
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
    problem = _why_unusable(path, events)
    if problem is not None:
        raise TraceError(problem)
    return events


def _reason(error: Exception) -> str:
    """What the parser says, in one line. It gives text, or bytes where the file is no text, with the place below."""
    said = error.args[0] if error.args else ""
    text = said.decode(errors="replace") if isinstance(said, bytes) else str(error)
    if isinstance(error, ArithmeticError) or not text.strip():
        return "a number out of range"
    return text.strip().splitlines()[0].strip().rstrip(".")


def _so_far(counted: _Counted | None, events: Events) -> str:
    return f"{_bytes(counted.done if counted else 0)} and {events.count} events were read"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"


def _why_unusable(path: Path, events: Events) -> str | None:
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


def gpu_name(path: Path, device: int) -> str | None:
    """The device's name, where the trace has it before the events, as torch writes it."""
    with _unpacked(path, False) as (head, file, _):
        beginning = head + file.read(1 << 20) if head else b""
    for key in ("deviceProperties", "computeProperties"):
        with contextlib.suppress(ijson.JSONError, ArithmeticError, AttributeError):
            for one in ijson.items(io.BytesIO(beginning), f"{key}.item"):
                if one.get("id") == device:
                    return str(one.get("name"))
    return None


def _renumbered(column: np.ndarray, numbers: Names) -> np.ndarray:
    """Names numbered in their own order, not in that in which they stand in the file."""
    new = np.zeros(len(numbers), np.int64)
    for i, name in enumerate(sorted(numbers)):
        new[numbers[name]] = i
    return new[column]

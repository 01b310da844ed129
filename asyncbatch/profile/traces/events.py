"""The events of a profiler's trace as columns of numbers, read one by one from a file of any size.

`read_events` takes Chrome trace JSON as torch.profiler writes it, packed with gzip or not, an object with traceEvents
or just the list. What matters here (kernels, copies, calls of the runtime, operators, annotations, Python functions) is
kept in arrays, 25 to 49 bytes an event, in whole nanoseconds; everything else is skipped.

torch writes microseconds near 4.6e12 with three decimals. They are parsed as decimal numbers, which keeps every digit
and took no longer than floats. A float64 keeps the nanosecond only up to 8.8e12; in older traces, which count from 1970
(1.7e15), it would keep a quarter of a microsecond.
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

BAR_FROM = 20_000_000  # bytes: a smaller file is read before anybody could look at a bar
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
TO_HOST = re.compile(r"DtoH|DeviceToHost|Device -> (Pinned|Pageable|Host)", re.IGNORECASE)
FROM_HOST = re.compile(r"HtoD|HostToDevice|(Pinned|Pageable|Host) -> Device", re.IGNORECASE)
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
    value = Decimal(microseconds) if isinstance(microseconds, str) else microseconds
    if not -LATEST < value < LATEST:  # also: 1e999999999 would make an integer that fills the memory
        raise ValueError(f"{microseconds} microseconds")
    return round(value * 1000)


def to_int64(value: Any) -> int:
    """The value as an integer that fits 64 bits ("stream 7" is 7), 0 where it is none."""
    with contextlib.suppress(ValueError, TypeError, ArithmeticError):
        number = int(value.rpartition(" ")[2] if isinstance(value, str) else value)
        if -(2**63) <= number < 2**63:
            return number
    return 0


class Events:
    """The events of a trace that matter here, as columns of numbers. `count`: all events of the file; `timed`: those
    with a duration; `unusable`: those that would matter, but have no time that makes sense. `kinds`: the kind of each
    category in the file, None where it does not matter."""

    def __init__(self) -> None:
        self.names, self.threads = Names(), Names()
        self.device = _GrowingColumns(start="q", end="q", kind="b", device="q", stream="q", correlation="q", name="i")
        self.host = _GrowingColumns(start="q", end="q", kind="b", thread="i", name="i")
        self.runtime = _GrowingColumns(correlation="q", start="q", thread="i", name="i")
        self.gpu_annotations = _GrowingColumns(start="q", end="q", device="q", stream="q", name="i")
        self.kinds: dict[str, int | None] = dict(CATEGORIES)
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
                self.runtime.add(to_int64(args.get("correlation")), start, thread, name)
            return
        device = to_int64(args.get("device", event.get("pid")))
        stream = to_int64(args.get("stream", event.get("tid")))
        if kind == GPU_ANNOTATION:
            self.gpu_annotations.add(start, end, device, stream, name)
            return
        if kind == COPY:
            kind = D2H if TO_HOST.search(text) else H2D if FROM_HOST.search(text) else COPY
        self.device.add(start, end, kind, device, stream, to_int64(args.get("correlation")), name)

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
        return device, host, runtime, gpu_annotations, sorted(self.names)

    def _kind(self, category: str) -> int | None:
        """The kind of a category not seen before. Older traces and other vendors' runtimes spell some differently."""
        spelling = category.lower()
        kind = CATEGORIES.get(spelling)
        if kind is None and spelling.endswith(("_runtime", "_driver")):
            kind = RUNTIME
        if len(self.kinds) < 1000:
            self.kinds[category] = kind
        return kind


class _CountingFile(io.RawIOBase):
    """A file that counts the bytes read from it, and shows them on a progress bar."""

    def __init__(self, file, bar: tqdm):
        self.file, self.bar, self.done = file, bar, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.done += len(data)
        self.bar.update(len(data))
        return data


class _GuardedFile:
    """For the parser: the bytes already taken from a file, then the rest of it.

    ijson 3.6 crashes on an integer of more than 4,300 digits, and its memory grows with the square of the nesting.
    Neither belongs in a trace, so a piece of the file that holds more than 1,000 digits in a row, or opens 2,000
    brackets more than it closes, is refused."""

    def __init__(self, head: bytes, file):
        self.head, self.file = head, file

    def read(self, size: int = -1) -> bytes:
        if size == 0:  # ijson asks for nothing, to learn whether this gives bytes or text
            return b""
        data, self.head = self.head, b""
        data = data or self.file.read(size)
        if any(data[i : i + 500].isdigit() for i in range(0, len(data) - 499, 500)):
            raise ijson.JSONError("a number of hundreds of digits")
        if data.count(b"[") + data.count(b"{") - data.count(b"]") - data.count(b"}") > 2000:
            raise ijson.JSONError("brackets in brackets, thousands deep")
        return data


@contextlib.contextmanager
def _open_unpacked(path: Path, progress: bool):
    """(first bytes, file of all bytes, file that counts) of a path; unpacked if it is gzip, whatever its name."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        look = {"total": size, "unit": "B", "unit_scale": True, "desc": f"reading {path.name}", "leave": False}
        with tqdm(**look, disable=not (progress and size > BAR_FROM)) as bar:
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            raw = _CountingFile(file, bar)
            data = gzip.GzipFile(fileobj=raw) if packed else raw
            head, piece = b"", b"begin"
            while piece and not head:
                piece = data.read(4096)
                head = piece.removeprefix(b"\xef\xbb\xbf").lstrip()
            yield head, _GuardedFile(head, data), raw


def read_events(path: Path, progress: bool) -> Events:
    """The events of a file that has at least one kernel. TraceError for any other file. `progress`: show a bar."""
    events, raw = Events(), None
    try:
        with _open_unpacked(path, progress) as (head, file, raw):
            if not head:
                raise TraceError(f"{path} is empty: nothing but white space was found in {_bytes(raw.done)}")
            for event in ijson.items(file, "item" if head[:1] == b"[" else "traceEvents.item"):
                events.add(event)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TraceError(f"{path} is cut off or damaged ({error}): {_so_far(raw, events)}") from error
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ijson.JSONError, ArithmeticError, UnicodeError) as error:
        reason = _reason(error)
        if "premature EOF" in reason or "ncomplete JSON" in reason:
            raise TraceError(f"{path} is cut off: the JSON ends too early; {_so_far(raw, events)}") from error
        raise TraceError(f"{path} is not JSON ({reason}); {_so_far(raw, events)}") from error
    problem = _why_unusable(path, events)
    if problem is not None:
        raise TraceError(problem)
    return events


def _reason(error: Exception) -> str:
    """What the parser says, in one line. It gives text, or bytes where the file is no text, and shows the place in
    further lines."""
    message = error.args[0] if error.args else ""
    text = message.decode(errors="replace") if isinstance(message, bytes) else str(error)
    if isinstance(error, ArithmeticError) or not text.strip():
        return "a number out of range"
    return text.strip().splitlines()[0].strip().rstrip(".")


def _so_far(raw: _CountingFile | None, events: Events) -> str:
    return f"{_bytes(raw.done if raw else 0)} and {events.count} events were read"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"


def _why_unusable(path: Path, events: Events) -> str | None:
    """What is wrong with a file that is JSON; None if it has kernels and so is a trace."""
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
    categories = ", ".join(sorted(events.kinds.keys() - CATEGORIES.keys())[:5]) or "none"
    return f"{path} holds no kernels: its categories are {categories}; expected a trace of torch.profiler"


def _why_empty(path: Path) -> str:
    """What is wrong with a file of JSON in which there are no events."""
    expected = "expected a Chrome trace: a list of events, or an object with traceEvents"
    keys, kind = [], "list of nothing"
    with _open_unpacked(path, False) as (_, file, _):
        for i, (prefix, event, value) in enumerate(ijson.parse(file)):
            if i == 0 and event not in ("start_map", "start_array"):
                return f"{path} holds {_short(value)}; {expected}"
            if not prefix and event == "start_map":
                kind = "object"
            if not prefix and event == "map_key":
                keys.append(value)
            if prefix == "traceEvents":
                what = "is an empty list" if event == "start_array" else "is no list"
                return f"{path} holds no events: its traceEvents {what}; {expected}"
            if len(keys) == 6 or i == 100_000:
                break
    with_keys = f" with the keys {', '.join(map(_short, keys[:5]))}{', ...' if len(keys) > 5 else ''}" if keys else ""
    return f"{path} holds no events: it is an {kind}{with_keys}; {expected}".replace("an list", "a list")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def gpu_name(path: Path, device: int) -> str | None:
    """The name of the device; None where the trace does not have it before the events, as torch writes it."""
    with _open_unpacked(path, False) as (head, file, _):
        beginning = head + file.read(1 << 20) if head else b""
    for key in ("deviceProperties", "computeProperties"):
        with contextlib.suppress(ijson.JSONError, ArithmeticError, AttributeError):
            for properties in ijson.items(io.BytesIO(beginning), f"{key}.item"):
                if properties.get("id") == device:
                    return str(properties.get("name"))
    return None


def _renumber(column: np.ndarray, numbers: Names) -> np.ndarray:
    """A column of numbers of names, numbered again in the order of the names and not in that of the file."""
    new = np.zeros(len(numbers), np.int64)
    for i, name in enumerate(sorted(numbers)):
        new[numbers[name]] = i
    return new[column]

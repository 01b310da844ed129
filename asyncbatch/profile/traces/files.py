"""The file of a trace: Chrome trace JSON as torch.profiler writes it, packed with gzip or not, an object with
traceEvents or just the list of events. `read_events` gives its events, or says what is wrong with it."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .events import KERNEL, LAUNCHES, Events, TraceError
from .json_stream import JSONProblem, JSONStream

SIZE = "<size>"  # in a message, where the bytes read are told
BAR_FROM = 20_000_000  # bytes: a smaller file is read before anybody could look at a bar
KEPT = ("deviceProperties", "computeProperties", "distributedInfo")  # of what stands beside the events
NO_DEVICE = ("Trace", "overhead", "cuda_sync", "python_function")  # categories that say nothing of a device


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


class _Text:
    """The text of a file of bytes in UTF-8, with a mark of its byte order or without."""

    def __init__(self, file):
        self.file, self.decode, self.done = file, codecs.getincrementaldecoder("utf-8-sig")().decode, 0

    def read(self, size: int) -> str:
        text = ""
        while not text:
            data = self.file.read(size)
            try:
                text = self.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise JSONProblem(f"no text in UTF-8 about byte {self.done + error.start}") from None
            self.done += len(data)
            if not data:
                break
        return text


@contextlib.contextmanager
def _open_unpacked(path: Path, progress: bool) -> Iterator[tuple[JSONStream, _CountingFile]]:
    """(the JSON in a file, the file that counts) of a path; unpacked if it is gzip, whatever its name."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        look = {"total": size, "unit": "B", "unit_scale": True, "desc": f"reading {path.name}", "leave": False}
        with tqdm(**look, disable=not (progress and size > BAR_FROM)) as bar:
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            raw = _CountingFile(file, bar)
            yield JSONStream(_Text(gzip.GzipFile(fileobj=raw) if packed else raw)), raw


def read_events(path: Path, progress: bool) -> Events:
    """The events of a file that has at least one kernel. TraceError for any other file. `progress`: show a bar."""
    events, raw = Events(), None
    try:
        with _open_unpacked(path, progress) as (stream, raw):
            what = _read(stream, events)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TraceError(f"{path} is cut off or damaged ({error}): {_so_far(raw, events)}") from error
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror or error}") from error
    except JSONProblem as error:
        if error.cut_off:
            raise TraceError(f"{path} is cut off: the JSON ends too early; {_so_far(raw, events)}") from error
        raise TraceError(f"{path} is not JSON ({error}); {_so_far(raw, events)}") from error
    problem = what if what else _why_unusable(events)
    if problem:
        raise TraceError(f"{path} {problem.replace(SIZE, _bytes(raw.done))}")
    return events


def _read(stream: JSONStream, events: Events) -> str | None:
    """Fill `events`. What is wrong with a text of JSON that can hold no events; None for any other."""
    first, problem = stream.peek(), None
    expected = "expected a Chrome trace: a list of events, or an object with traceEvents"
    if not first:
        return "is empty: nothing but white space was found in " + SIZE
    if first == "[":
        _add_all(stream, events)
        problem = None if events.count else f"holds no events: it is a list of nothing; {expected}"
    elif first == "{":
        keys, kind = [], "no list"
        for key in stream.members():
            keys.append(key)
            if key == "traceEvents" and stream.peek() == "[":
                _add_all(stream, events)
                kind = "an empty list"
                continue
            value = stream.value()
            if key in KEPT:
                events.about[key] = value
        if not events.count:
            problem = f"holds no events: {_about_keys(keys, kind)}; {expected}"
    else:
        problem = f"holds {_short(stream.value())}; {expected}"
    stream.end()
    return problem


def _add_all(stream: JSONStream, events: Events) -> None:
    add = events.add
    for event in stream.items():
        add(event)


def _about_keys(keys: list[str], kind: str) -> str:
    """What an object without events is; `kind`: what its traceEvents are."""
    if "traceEvents" in keys:
        return f"its traceEvents is {kind}"
    shown = ", ".join(map(_short, keys[:5]))
    return "it is an object" + (f" with the keys {shown}{', ...' if len(keys) > 5 else ''}" if keys else "")


def _so_far(raw: _CountingFile | None, events: Events) -> str:
    return f"{_bytes(raw.done if raw else 0)} and {events.count} events were read"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


# ---- JSON, but no trace of a GPU ------------------------------------------------------------------------------------


def _why_unusable(events: Events) -> str | None:
    """What is wrong with a file that holds events; None if it has kernels and so is a trace."""
    kinds = events.device.arrays()["kind"]
    if (kinds == KERNEL).any():
        return None
    if len(kinds):
        return f"holds {len(kinds)} copies of a device and no kernel: there is no compute stream"
    if {"host", "compute"} <= events.kinds.keys():
        return "was written by Timeline.save or this script: asyncbatch.timeline.load_trace reads it"
    if not events.timed:
        return f"holds {events.count} events, none of them with a duration (ph: X): not a profiler's trace"
    if events.unusable and not len(events.host):
        return f"holds {events.timed} events, and no usable time (ts, dur) in {events.unusable} of them"
    return _what_is_there(events)


def _what_is_there(events: Events) -> str:
    """What a trace without a kernel holds instead, and what is missing."""
    names = list(events.names)
    calls = events.runtime.arrays()["name"]
    launches = int(np.isin(calls, [at for at, name in enumerate(names) if LAUNCHES.search(name)]).sum())
    others = {category: count for category, count in events.others.most_common() if category not in NO_DEVICE}
    shown = ", ".join(f"{count} of {category!r}" for category, count in list(others.items())[:5])
    if launches:
        also = f" (its other categories: {shown})" if others else ""
        return (
            f"holds {launches} launches and none of the kernels that they launched{also}: the driver gave the profiler "
            "no events of the device. Is another profiler at work in the process, or was one before? May this user "
            "profile (CUPTI_ERROR_INSUFFICIENT_PRIVILEGES in the log)? Does CUPTI fit the driver?"
        )
    if others:
        return (
            f"holds no kernels: there are {shown}, and {len(events.host)} events of the CPU. Those categories are not "
            "read, whatever device they are of; needed are events of category 'kernel' (CUDA, ROCm, XPU)"
        )
    if len(events.host):
        return "holds only CPU events: profile with ProfilerActivity.CUDA"
    return "holds no kernels, and nothing of a CPU: expected a trace of torch.profiler"

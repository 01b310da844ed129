"""What the profiling script says while it works: one line at a time, on standard error."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TextIO

from ..shown import progress
from ..streams import DeviceError

_silent = ContextVar("silent", default=False)
_passing = ContextVar("passing", default=False)


@contextlib.contextmanager
def silent(wanted: bool = True) -> Iterator[None]:
    """In the `with` block, and if it is wanted, nothing is said here."""
    token = _silent.set(wanted)
    try:
        yield
    finally:
        _silent.reset(token)


@contextlib.contextmanager
def passing() -> Iterator[None]:
    """In the `with` block a terminal shows only what is gone when it ends: bars, and what is waited for."""
    token = _passing.set(True)
    try:
        yield
    finally:
        _passing.reset(token)


@contextlib.contextmanager
def muted(rank: int) -> Iterator[None]:
    """In the `with` block, of a rank that does not speak: nothing is said here and nothing goes to standard output; on
    standard error, what others say (warnings) has the rank's name in front of it."""
    with silent(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(_Named(sys.stderr, rank)):
        yield


@contextlib.contextmanager
def quiet(wanted: bool) -> Iterator[None]:
    """In the `with` block, and if it is wanted, nothing goes to standard error."""
    with contextlib.redirect_stderr(io.StringIO()) if wanted else contextlib.nullcontext():
        yield


class _Named(io.TextIOBase):
    """A stream whose lines begin with the number of a rank; what is no whole line, like a bar, is dropped."""

    def __init__(self, stream: TextIO, rank: int):
        self.stream, self.rank, self._begun = stream, rank, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.strip():
                self.stream.write(f"rank {self.rank}: {line.rpartition(chr(13))[2]}\n")
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()


def tell(text: str) -> None:
    """Print one line on standard error, at once."""
    if not _silent.get() and not (_passing.get() and sys.stderr.isatty()):
        print(text, file=sys.stderr, flush=True)


def waiting(what: str) -> contextlib.AbstractContextManager[None]:
    """`shown.progress.waiting`."""
    return contextlib.nullcontext() if _silent.get() else progress.waiting(what)


def is_looked_at() -> bool:
    """Whether progress bars are of use."""
    return sys.stderr.isatty() and not _silent.get()


def one_line(error: BaseException) -> str:
    """The first line of an error; of a device's error also the last one, without the traceback between them."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, DeviceError):
        lines = [" ".join(dict.fromkeys([lines[0], lines[-1]]))]
    return lines[0]

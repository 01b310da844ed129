"""What the profiling script says while it works: one line at a time, on standard error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar

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

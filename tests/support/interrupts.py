"""Ctrl-C at a chosen line: the lines that a piece of work runs, and the work run again up to one of them."""

from __future__ import annotations

import contextlib
import dis
import faulthandler
import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import NamedTuple

from _pytest.faulthandler import fault_handler_stderr_fd_key


class Line(NamedTuple):
    """A line of a piece of work, at its time number `nth` (from 1)."""

    code: CodeType
    line: int
    nth: int

    def __str__(self) -> str:
        text = linecache.getline(self.code.co_filename, self.line).strip()
        return f"{self.code.co_filename}:{self.line}, time {self.nth}: {text}"


def _can_be_interrupted(frame: FrameType) -> bool:
    """Python looks for signals after calls and before it jumps back. It traces two lines more where it does not: a bare
    "try:", outside of its handlers; and a "with" once more on the way out, when the body is done and the exit is not
    yet called."""
    code, line = frame.f_code, frame.f_lineno
    text = linecache.getline(code.co_filename, line).strip()
    if text.startswith("with "):
        return frame.f_lasti == min(offset for offset, number in dis.findlinestarts(code) if number == line)
    return text != "try:"


def lines_of(work: Callable[[], object], files: set[str], most: int) -> list[Line]:
    """The lines in these files that `work` runs in this thread, in order, each at its first `most` times."""
    seen: Counter[tuple[CodeType, int]] = Counter()
    found: list[Line] = []

    def trace(frame, event, _):
        if frame.f_code.co_filename not in files or frame.f_code.co_name == "__del__":
            return None
        if event == "line" and _can_be_interrupted(frame):
            place = frame.f_code, frame.f_lineno
            seen[place] += 1
            if seen[place] <= most:
                found.append(Line(*place, seen[place]))
        return trace

    with _tracing(trace):
        work()
    return found


def run_until(target: Line, work: Callable[[], object]) -> bool:
    """`work`, with a KeyboardInterrupt before that line. Whether it came to it."""
    left = target.nth

    def trace(frame, event, _):
        nonlocal left
        if frame.f_code is not target.code:  # so all other code runs at nearly its full speed
            return None
        if event == "line" and frame.f_lineno == target.line and _can_be_interrupted(frame):
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    with contextlib.suppress(KeyboardInterrupt), _tracing(trace):
        work()
    return left <= 0


@contextlib.contextmanager
def _tracing(trace) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@contextlib.contextmanager
def watchdog(config, seconds: float) -> Iterator[None]:
    """Whoever hangs in here for so long says where, in every thread, and ends."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=config.stash[fault_handler_stderr_fd_key])
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()

"""A process of the same machine, seen through /proc: whether it has ended, or is stopped. Where there is no /proc
(macOS, Windows) there are no neighbours: a rank is then known by its heartbeat only."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from dataclasses import dataclass
from pathlib import Path

ENDED = "ended"  # also while it waits for its parent to ask for its exit code
STOPPED = "stopped"
RUNS = "runs"


@functools.cache
def this_place() -> str:
    """Where a number means the same process: the machine since it was booted, and its space of process numbers (each
    container has one). "" if that cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


@dataclass(frozen=True)
class Neighbour:
    """pid: its number. begun: when it began, in the kernel's own ticks: the number may be given to another later."""

    pid: int
    begun: str

    @classmethod
    def me(cls) -> Neighbour | None:
        """This process; None where there is no /proc."""
        fields = _fields(os.getpid()) if this_place() else None
        return cls(os.getpid(), fields[-1]) if fields else None

    def state(self) -> str:
        fields = _fields(self.pid)
        if fields is None or fields[-1] != self.begun or fields[0] in "ZXx":
            return ENDED
        return STOPPED if fields[0] in "Tt" else RUNS

    def kill(self) -> None:
        if self.state() != ENDED:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


def _fields(pid: int) -> tuple[str, str] | None:
    """State and time of beginning, fields 3 and 22 of /proc/PID/stat; None for a process that is not there."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the program's name may hold anything
    return fields[0], fields[19]

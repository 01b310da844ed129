"""What the ranks of one machine tell each other without the store: they share a page of memory to which each appends.

The store decides who says what, while it is there; once it is gone, ranks can no longer agree through it, and a slow
one could not know what a quick one has said before it ended. What was put on the page stays until the last rank of the
machine has ended, and the kernel puts one word after the other: of those who say the same kind of thing, one is first,
and all of them see who.

The page has no name in any folder, so nothing is left behind. Where there is no /proc (macOS, Windows), where the
kernel refuses, and where one rank may not look into another (of another user), a rank has a page to itself, which
holds nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from typing import Any

from .neighbour import ENDED, Neighbour


class Page:
    """Of several threads. file: its number in this process; -1 is a page that holds nothing."""

    def __init__(self, file: int):
        self._file, self._lock = file, threading.Lock()

    @classmethod
    def shared(cls, store: Any, key: str) -> Page:
        """The page of all processes of this machine that ask the store for this key; whoever comes first makes it."""
        me = Neighbour.me()
        if me is None or not hasattr(os, "memfd_create"):
            return cls(-1)
        import fcntl  # (not on Windows)

        try:
            file = os.memfd_create("asyncbatch-ranks")
        except OSError:  # too many open files, or a kernel that is told to refuse it
            return cls(-1)
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_APPEND)
        mine = json.dumps([me.pid, me.begun, file, os.fstat(file).st_ino])
        found = store.compare_set(key, "", mine).decode()
        while found != mine:
            pid, begun, number, inode = json.loads(found)
            maker, opened = Neighbour(pid, begun), None
            with contextlib.suppress(OSError):
                opened = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
                if os.fstat(opened).st_ino == inode:
                    os.close(file)
                    return cls(opened)
            if opened is not None:
                os.close(opened)
            if maker.state() != ENDED:
                os.close(file)
                return cls(-1)
            found = store.compare_set(key, found, mine).decode()  # its maker ended before anybody could open it
        return cls(file)

    @property
    def is_shared(self) -> bool:
        return self._file >= 0

    def put(self, word: str, thing: Any) -> Any:
        """Say something of a kind. Returns what was said first of that kind, by whomever."""
        # (Between two line ends: a process that was killed may have left half a line.)
        text = f"\n{json.dumps([word, thing])}\n".encode()
        with self._lock:
            if self._file < 0:
                return thing
            os.write(self._file, text)
        return self.first(word)

    def first(self, word: str) -> Any:
        """None if nothing of that kind was said."""
        return next(iter(self.all(word)), None)

    def all(self, word: str) -> list[Any]:
        """What was said of a kind, in the kernel's order."""
        with self._lock:
            if self._file < 0:
                return []
            text = os.pread(self._file, os.fstat(self._file).st_size, 0)
        said = []
        for line in text.split(b"\n")[:-1]:  # (the last one is empty, or is just being written)
            with contextlib.suppress(ValueError):
                said.append(json.loads(line))
        return [thing for kind, thing in said if kind == word]

    def close(self) -> None:
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
            self._file = -1

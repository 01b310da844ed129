"""Ranks as real processes, for the tests of the watch: started, asked, and found again where they were left behind."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch.distributed as dist

from .rank_process import LIMIT_S, STEPS, main, wait_for_port
from .workers import PRELOADED

LONG_S = 600.0  # a time-out that no test lives to see: whoever has it never calls another one silent


@functools.cache
def server():
    """Forks the ranks: one that is spawned imports torch again, which is seconds of work each time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # (one server for all tests)
    return context


class Group:
    """Ranks, each in a process group of its own so that its children are found."""

    def __init__(self, folder: Path, faults: list[str], timeouts: list[float], port: int | None = None, **more):
        self.folder, self.faults = folder, faults
        self.ranks = []
        for rank, (fault, timeout_s) in enumerate(zip(faults, timeouts, strict=True)):
            settings = {"rank": rank, "size": len(faults), "folder": str(folder), "fault": fault}
            settings |= {"timeout_s": timeout_s, "child": True, "port": port, **more}
            (folder / f"stderr-{rank}").touch()
            self.ranks.append(server().Process(target=main, args=(settings,)))
            self.ranks[-1].start()
        self.store = dist.FileStore(str(folder / "store")) if port is None and "host" not in more else None

    def ready(self, store=None) -> None:
        """Until all have come to where the fault is planted, and those that wait have said so."""
        store, end = store or self.store, time.monotonic() + LIMIT_S
        words = [f"watch/0/{rank}" for rank, fault in enumerate(self.faults) if fault in ("wait", "blocked")]
        while (
            store.add("ready", 0) < len(self.ranks)
            or not store.check(words)
            or not all(json.loads(word)["doing"] for word in store.multi_get(words))
        ):
            assert time.monotonic() < end, self.texts()
            time.sleep(0.02)

    def port(self) -> int:
        """Of the store that one of them hosts."""
        return wait_for_port(self.folder)

    def stop(self, rank: int) -> None:
        """Like a machine that is so busy that the rank does not get to anything; until SIGCONT."""
        pid = self.ranks[rank].pid
        os.kill(pid, signal.SIGSTOP)
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.01)

    def ended(self) -> list[int]:
        """The exit codes, once all have ended."""
        end = time.monotonic() + LIMIT_S
        for rank in self.ranks:
            rank.join(max(1.0, end - time.monotonic()))
        codes = [rank.exitcode for rank in self.ranks]
        assert None not in codes, self.texts()
        return codes

    def texts(self) -> list[str]:
        return [(self.folder / f"stderr-{rank}").read_text() for rank in range(len(self.ranks))]

    def messages(self) -> list[tuple[int, str]]:
        """(rank that printed it, text)."""
        lines = [(rank, line) for rank, text in enumerate(self.texts()) for line in text.splitlines()]
        return [(rank, line) for rank, line in lines if line.startswith("asyncbatch: ")]

    def kept(self, rank: int) -> list[dict]:
        path = self.folder / f"kept-{rank}"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def left_behind(self) -> list[str]:
        """Processes that are still in the group of a rank, other than those that wait to be asked for their code."""
        groups, found = {str(rank.pid) for rank in self.ranks}, []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[2] in groups and fields[0] not in "ZX":
                found.append(stat.parent.name)
        return found

    def clean_up(self) -> None:
        for rank in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.join()


def check_end(ranks: Group, told: str, by: int, alive: list[int]) -> str:
    """The one message, everywhere the same; what was finished is kept once on each rank that lives; nobody is left."""
    ((rank, message),) = ranks.messages()
    assert (rank, told in message) == (by, True), message
    text = message.removeprefix("asyncbatch: ").removesuffix(". All ranks end.")
    for one in alive:
        assert ranks.kept(one) == [{"finished": list(range(STEPS)), "error": text}]
    end = time.monotonic() + LIMIT_S
    while ranks.left_behind() and time.monotonic() < end:
        time.sleep(0.05)  # killed, and not yet gone
    assert ranks.left_behind() == []
    return text

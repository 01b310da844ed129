"""A rank that dies, hangs or fails ends the run on all ranks, with one message that names the rank and the cause.

    watch = Watch(store, rank, size, names)
    watch.on_lost = write_what_is_finished          # called once, on every rank, before it ends
    watch.kills.append(process.kill)                # the device processes of this rank
    with watch:                                     # its end: leaves; left with an exception: all ranks end
        with watch.busy("serving, step"):           # from here on, progress is expected
            watch.progress += 1                     # by the main thread, as it goes on
            watch.check()                           # RankError, once any rank is lost

Two threads, neither of which the main thread ever waits for. One talks to the store once a second: it says what this
rank does, reads what the others say, and enters a verdict (`judge.py`). The first verdict that is entered is the one
that all ranks give: what follows from it, such as a connection that is closed, is not a cause. The other ends the
process, if the main thread has not done so within `grace_s`: it may be stuck in a collective that nobody answers.
It also hears SIGTERM, which `torchrun` sends to the ranks that are left, and notices where the store does not answer.

Who tells: the lowest rank that is alive, which users look at; another one if that has not done so for `TELLER_S`.
While the store is there, exactly one of all ranks tells. Once it is gone, exactly one on each machine, however slow a
rank is: they decide on a page of memory that they share (`page.py`), where the first verdict stands, too. (A rank that
is killed at the very moment takes the message with it; without /proc there is no page, and a slow one may tell again.)

The end is `os._exit(1)`: an ordinary one would wait for threads and devices that wait for a rank that is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch.distributed
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from .errors import RankError
from .judge import Beat, Judge, Verdict
from .neighbour import RUNS, Neighbour, this_place
from .page import Page

KEEP_S = 15.0  # for `on_lost`: torchrun's agent kills what is left 30 s after its SIGTERM
TELLER_S = 10.0  # with it and KEEP_S a rank has ended by itself before torchrun's agent kills it
TERMINATED_S = 3.0  # after SIGTERM so long a better cause is waited for
STORE_LOST = (
    "the store that connects the ranks is gone: the process that hosts it has ended (torchrun's agent, if that started "
    "the ranks)"
)
STORE_SILENT = "the store that connects the ranks has not answered for {:g} s"
# In texts of errors that follow from another rank's end: until `timeout_s` the cause itself is waited for.
FOLLOWS = (
    "closed by peer", "connection closed", "connection reset", "broken pipe", "nccl", "gloo", "socket", "timed out",
    "device process ended (exit code -15)",  # torchrun's SIGTERM reaches it, too
)  # fmt: skip


class Watch:
    """store: of torch.distributed; a connection of its own is made. names: of each rank, for messages
    ("host-a, pid 4711"). timeout_s: a rank that says nothing, or goes on with nothing, for so long ends the run.
    group: the ranks with the same number wait for each other at every step, and give their steps as `progress`.
    hosts_store: this process is the store's server, so it leaves last. name: of this watch in the store; a second one
    there needs another.

    progress, doing: assigned by the main thread, without a lock; `doing` says what it does at this moment, and begins
    with "wait" where it waits for others or for the device. on_lost(error), kills: called before the process ends.
    error: the verdict, or None.

    Made by the main thread, it hears SIGTERM until `close`; by another, it does not."""

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        names: Sequence[str],
        timeout_s: float = 30.0,
        *,
        group: int = 0,
        grace_s: float = 5.0,
        hosts_store: bool = False,
        name: str = "watch",
    ):
        if len(names) != size or not 0 <= rank < size:
            raise ValueError(f"rank {rank} of {size} with {len(names)} names: allowed are ranks from 0, one name each")
        self.rank, self.timeout_s, self.grace_s, self.hosts_store = rank, timeout_s, grace_s, hosts_store
        self.progress, self.doing = 0, ""
        self.on_lost: Callable[[RankError], None] | None = None
        self.kills: list[Callable[[], None]] = []
        self.error: RankError | None = None
        self._verdict: Verdict | None = None
        self._store, self._judge = store.clone(), Judge(names, timeout_s)
        self._name = f"{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._every_s = min(1.0, timeout_s / 8)
        self._phase: tuple[str, float] = ("", timeout_s)
        self._standing: tuple[object, float] = (None, 0.0)  # what the main thread did at the last look, and since when
        me = Neighbour.me()
        self._beat = Beat(0, group) if me is None else Beat(0, group, place=this_place(), pid=me.pid, begun=me.begun)
        self._own: tuple[Verdict, float] | None = None  # why this rank ends, and how long a better cause is waited for
        self._terminated = self._recorded = False
        self._store_lost, self._turns_untold = False, 0
        self._leaving, self._left, self._told, self._news = (threading.Event() for _ in range(4))
        self._wake, self._ending, self._speaking = threading.Event(), threading.Lock(), threading.Lock()
        self._page = Page.shared(self._store, f"{self._name}/page/{this_place()}")
        self._page.put("here", [rank, self._beat.pid, self._beat.begun])
        self._ears, self._unlisten = _ears(self._note_sigterm)
        self._say(left=False)
        self._talker = threading.Thread(target=self._talk, name="asyncbatch-watch", daemon=True)
        self._talker.start()
        threading.Thread(target=self._stand_by, name="asyncbatch-watch-end", daemon=True).start()

    # ---- what the main thread uses --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def busy(self, phase: str, allowance_s: float | None = None) -> Iterator[None]:
        """Within this block progress is expected, at least once in `allowance_s` seconds (`timeout_s` if None)."""
        before, self._phase = self._phase, (phase, self.timeout_s if allowance_s is None else allowance_s)
        try:
            yield
        finally:
            self._phase = before

    @contextlib.contextmanager
    def idle(self) -> Iterator[None]:
        """Within this block nothing is expected: no request is there, or another rank decides when it goes on."""
        with self.busy(""):
            yield

    def check(self) -> None:
        """RankError once a rank is lost."""
        if self.error is not None:
            raise RankError(str(self.error), self.error.rank)

    def fail(self, error: BaseException) -> RankError:
        """Tell all ranks that this one cannot go on. The verdict comes back: another rank's, if that was lost before.

        An error that looks like what follows from another's end (a closed connection) waits for the cause, `timeout_s`
        at most."""
        text = f"{self._judge.who(self.rank)} failed: {_on_one_line(error)}"
        follows = isinstance(error, torch.distributed.DistError) or any(sign in text.lower() for sign in FOLLOWS)
        verdict = Verdict(text, self.rank)
        if isinstance(error, RankError):  # heard from another rank, on another way
            verdict, follows = Verdict(str(error), error.rank), True
        self._ends_with(verdict, self.timeout_s + 2 * self._every_s if follows else 0.0)
        self._news.wait(2 * self.timeout_s + 10)  # (for ever only if the store neither answers nor closes)
        return self.error or RankError(verdict.text, verdict.rank)

    def close(self) -> None:
        """Leave: from now on this rank is not missed. If a rank is lost already, this one ends as the others do."""
        if self.error is not None:
            self.end(self.error)
        self._leaving.set()
        self._wake.set()
        while not self._left.wait(self._every_s):
            if self.error is not None:
                self.end(self.error)
        self._talker.join(self.timeout_s)  # found in the store's own code by the interpreter's end it would abort
        self._page.put("left", self.rank)
        self._page.close()
        self._unlisten()

    def end(self, error: BaseException) -> NoReturn:
        """End all ranks because of this error, and this process. What is finished is kept."""
        if isinstance(error, Exception) and not isinstance(error, RankError):
            self._record(error)
            if "TORCHELASTIC_ERROR_FILE" not in os.environ:  # else torchrun's summary shows where it was raised
                traceback.print_exception(type(error), error, error.__traceback__)
        if self.error is None:
            self.fail(error)
        self._end(error)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, where: Any) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.close()
        else:
            self.end(error)

    # ---- the thread that talks to the store -----------------------------------------------------------------------

    def _talk(self) -> None:
        try:
            last = time.monotonic()
            while not self._left.is_set():
                now = time.monotonic()
                # After a pause of this process the others' newest words are read first; little of the time counts.
                self._turn(min(now - last, 2 * self._every_s))
                last = now
                self._wake.wait(self._every_s)
                self._wake.clear()
        except Exception:  # of the store's: whatever it is, nobody can be heard any more
            if self._leaving.is_set() and self.error is None:
                self._left.set()
                return
            for _ in range(20):  # a rank that hosts the store closes its connections a little before it has ended
                if self._ended() is not None:
                    break
                time.sleep(0.1)
            self._lose_store(self._ended() or Verdict(STORE_LOST))
            while not self._told.is_set():
                self._tell()
                self._told.wait(self._every_s)

    def _turn(self, passed_s: float) -> None:
        leaving = self._leaving.is_set()
        self._say(left=leaving)
        beats = self._hear()
        verdict = self._judge.look(beats, passed_s)
        if self.error is None and self._store.check([f"{self._name}/verdict"]):
            self._accept(Verdict.unpacked(self._store.get(f"{self._name}/verdict")))
        if leaving and self.error is None and not (self.hosts_store and self._others_are_there()):
            self._left.set()
            return
        if self.error is None:
            # (Read again: it may have left between what was heard and its end.)
            if self._ended() is not None:
                self._judge.look(self._hear(), 0.0)
            verdict = self._ended() or verdict or self._reason(passed_s)
            if verdict is not None:
                first = self._store.compare_set(f"{self._name}/verdict", "", verdict.packed())
                self._accept(Verdict.unpacked(first))
        if self._verdict is not None and not self._told.is_set():
            if self._store_lost:  # to another rank of this machine: those of other machines may hear of it
                self._store.compare_set(f"{self._name}/verdict", "", self._verdict.packed())
            self._tell()

    def _say(self, left: bool) -> None:
        """What this rank does, for the others."""
        (phase, allowance_s), progress, doing = self._phase, self.progress, self.doing
        standing, now = (phase, progress, doing), time.monotonic()
        if standing != self._standing[0]:
            self._standing = standing, now
        self._beat = dataclasses.replace(
            self._beat,
            count=self._beat.count + 1,
            phase=phase,
            allowance_s=allowance_s,
            progress=progress,
            doing=doing,
            since_s=round(now - self._standing[1], 1),
            left=left,
            ending=self._own is not None,
        )
        self._store.set(f"{self._name}/{self.rank}", self._beat.packed())

    def _hear(self) -> dict[int, Beat]:
        """The newest word of each rank that has said anything."""
        ranks = [rank for rank in range(len(self._judge.names)) if rank in self._judge.beats or self._has_come(rank)]
        words = self._store.multi_get([f"{self._name}/{rank}" for rank in ranks])
        return {rank: Beat.unpacked(word) for rank, word in zip(ranks, words, strict=True)}

    def _has_come(self, rank: int) -> bool:
        return self._store.check([f"{self._name}/{rank}"])

    def _others_are_there(self) -> bool:
        others = [rank for rank in range(len(self._judge.names)) if rank != self.rank]
        return any(self._judge.speaks(rank, self.timeout_s) for rank in others)

    def _reason(self, passed_s: float) -> Verdict | None:
        """Why this rank itself ends, once a better cause was waited for."""
        if self._terminated and self._own is None:
            told = Verdict(f"{self._judge.who(self.rank)} was told to end (SIGTERM)", self.rank)
            self._ends_with(told, min(TERMINATED_S, self.timeout_s))
        if self._own is None:
            return None
        verdict, patience_s = self._own
        self._own = verdict, patience_s - passed_s
        return verdict if patience_s <= 0 else None

    def _ends_with(self, why: Verdict, patience_s: float) -> None:
        self._own = self._own or (why, patience_s)
        self._wake.set()

    def _ended(self) -> Verdict | None:
        return self._judge.ended(left=self._page.all("left"))

    def _lose_store(self, verdict: Verdict) -> None:
        """From now on the ranks of this machine are on their own."""
        self._accept(verdict)
        self._store_lost = True
        self._page.put("lost", self.rank)

    def _accept(self, verdict: Verdict) -> None:
        """Give this verdict; or the one that a rank of this machine gave before, which may have ended because of it."""
        verdict = Verdict(**self._page.put("verdict", dataclasses.asdict(verdict)))
        with self._speaking:
            if self.error is None:
                self._verdict, self.error = verdict, RankError(verdict.text, verdict.rank)
                self._news.set()

    # ---- the one message ------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        """Print the message, if no rank has, and if it is not for another one."""
        self._turns_untold += 1
        key = f"{self._name}/told"
        if not self._store_lost and self._store.add(key, 0) > 0:
            self._page.put("told", -1)  # on another machine, if nobody here has said that it tells
            self._told.set()
        elif self._store_lost and not self._page.is_shared:
            self._print(not self._is_for_another())
        elif not self._is_for_another() or self._turns_untold * self._every_s > min(self.timeout_s, TELLER_S):
            mine = self._page.put("told", self.rank) == self.rank
            self._print(mine and (self._store_lost or self._store.add(key, 1) == 1))

    def _is_for_another(self) -> bool:
        """Whether a lower rank is alive. One of this machine is until its process ends, however slow it is."""
        gone = self._verdict.rank if self._verdict is not None and self._verdict.gone else None
        here, left = {rank: its for rank, *its in self._page.all("here")}, self._page.all("left")
        unheard = self._store_lost and self._page.is_shared  # those of other machines
        return any(
            Neighbour(*here[rank]).state() == RUNS
            if rank in here
            else not unheard and self._judge.speaks(rank, 4 * self._every_s)
            for rank in range(self.rank)
            if rank != gone and rank not in left
        )

    def _print(self, mine: bool) -> None:
        with self._speaking:  # of several threads
            if mine and not self._told.is_set():
                # Not through sys.stderr: the main thread may have been stopped while it holds its lock.
                with contextlib.suppress(OSError):
                    os.write(2, f"asyncbatch: {self.error}. All ranks end.\n".encode())
            self._told.set()

    # ---- the thread that ends the process -------------------------------------------------------------------------

    def _note_sigterm(self) -> None:
        self._terminated = True
        self._wake.set()

    def _stand_by(self) -> None:
        last, silent_s = time.monotonic(), 0.0
        turn = self._beat.count
        while self.error is None and not self._left.is_set():
            self._listen(self._every_s)
            now = time.monotonic()
            silent_s = silent_s + min(now - last, 2 * self._every_s) if turn == self._beat.count else 0.0
            last, turn = now, self._beat.count
            if silent_s >= self.timeout_s:
                self._lose_store(Verdict(STORE_SILENT.format(self.timeout_s)))
            elif self._page.first("lost") is not None and (found := self._page.first("verdict")) is not None:
                self._lose_store(Verdict(**found))  # another rank found it out
        patience_s = self.grace_s
        while self.error is not None and not self._left.is_set():
            if self._store_lost and not self._told.is_set():
                self._tell()
            if patience_s <= 0 and not self._left.is_set():
                self._end(self.error)
            self._left.wait(min(patience_s, self._every_s))
            patience_s -= self._every_s

    def _listen(self, seconds: float) -> None:
        if self._ears is None:
            self._news.wait(seconds)
            return
        try:
            if select.select([self._ears], [], [], seconds)[0] and signal.SIGTERM in self._ears.recv(64):
                self._note_sigterm()
        except (OSError, ValueError):
            self._news.wait(seconds)  # closed meanwhile

    def _end(self, error: BaseException) -> NoReturn:
        """Keep what is finished, and end the process. Whichever thread comes first does it."""
        if not self._ending.acquire(blocking=False):
            while True:
                time.sleep(60)
        verdict = self.error or RankError(str(error))
        for turn in itertools.count():
            if turn * self._every_s > min(self.timeout_s, TELLER_S) + 2.0:  # the store is of no use, either
                self._lose_store(Verdict(str(verdict), verdict.rank))
            if self._store_lost:
                self._tell()
            if self._told.wait(self._every_s):
                break
        keeper = threading.Thread(target=self._keep, args=(verdict,), daemon=True)
        keeper.start()
        keeper.join(KEEP_S)
        for kill in self.kills:
            with contextlib.suppress(Exception):
                kill()
        if self._verdict is not None and self._verdict.gone and self._verdict.rank != self.rank:
            # A stopped process would stay; if it goes on later, nobody waits for it.
            beat = self._judge.beats.get(self._verdict.rank) if self._verdict.rank is not None else None
            neighbour = beat.neighbour() if beat else None
            if neighbour is not None:
                neighbour.kill()
        os._exit(1)

    def _keep(self, error: RankError) -> None:
        try:
            if self.on_lost is not None:
                self.on_lost(error)
        except Exception:
            traceback.print_exc()
        self._record(error)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()

    def _record(self, error: Exception) -> None:
        """For torchrun's own summary: the first error that this rank was ended by."""
        if not self._recorded:
            self._recorded = True
            with contextlib.suppress(Exception):
                try:
                    raise error
                except Exception as raised:
                    get_error_handler().record_exception(raised)


def _on_one_line(error: BaseException, most: int = 400) -> str:
    """Type and text; of a long one (a traceback of the device's) the beginning and the end."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= most else f"{text[: most // 3]} ... {text[-most * 2 // 3 :]}"


def _ears(heard: Callable[[], None]) -> tuple[socket.socket | None, Callable[[], None]]:
    """A socket into which the number of each signal is written as it comes, also while the main thread is stuck outside
    of Python, where its own handlers wait; and what puts everything back. None unless called by the main thread, or
    where another (asyncio) listens already: then the handler has to do."""
    if threading.current_thread() is not threading.main_thread():
        return None, lambda: None
    before = signal.signal(signal.SIGTERM, lambda *_: heard())
    ears, mouth = socket.socketpair()
    ears.setblocking(False)
    mouth.setblocking(False)
    other = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    if other != -1:
        signal.set_wakeup_fd(other)

    def unlisten() -> None:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, before)
            if other == -1:
                signal.set_wakeup_fd(-1)
        ears.close()
        mouth.close()

    return (ears if other == -1 else None), unlisten

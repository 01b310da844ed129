"""Data parallel: several replicas of a model serve the requests of one caller.

Rank 0 deals each request, when it arrives, to the replica that has the fewest (`dealer.py`), and gathers the answers
in the order of the requests. What travels goes through the store of `torch.distributed` (`post.py`), and no step waits
for it. Threads do it: they pickle, send and receive, and hand requests to `submit`, which any thread may call. Between
two turns the main thread looks at the handles of its own requests, at most one batch and a few, and no more. (All of
it between two turns would make the device wait for the store's server and the network; a thread waits for them without
holding the interpreter.)

A replica has more requests than rows in its batch, a few, so that a row that becomes free is taken in the next step,
before rank 0 has heard of it.

Times in completions are those of rank 0's clock, and `submitted_s` is the moment of arrival there. Processes of one
machine have one clock. For another machine its difference is measured when a run begins: of several questions to it the
one that was answered fastest counts, and its clock is taken to have been read in the middle. The error is at most half
of that answer's time, plus what the two clocks drift apart during the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..request import Completion, Request, RequestError, shown
from ..streams import DeviceError
from .dealer import Dealer
from .errors import RankError
from .neighbour import this_place
from .post import Letters
from .watch import Watch

PINGS = 8
JOIN_S = 5.0
PAUSE_S = 0.1  # a main thread without requests looks so often whether it should stop


class Replicas:
    """Made once by the leader of each replica, with the same arguments but `replica`; the one of replica 0 is rank 0.

    store: of torch.distributed, with queues (TCPStore). ranks: the rank of each replica's leader, for messages.
    watch: asked between turns, and told of steps and of times without requests. clock: the batcher's."""

    def __init__(
        self,
        store: Any,
        replica: int,
        replicas: int,
        ranks: Sequence[int] | None = None,
        *,
        watch: Watch | None = None,
        clock: Callable[[], float] = time.perf_counter,
        place: str | None = None,
    ):
        self.replica, self.replicas = replica, replicas
        self.ranks = list(ranks) if ranks is not None else list(range(replicas))
        self.watch, self.clock, self.place = watch, clock, this_place() if place is None else place
        self._store, self._runs = store, 0
        self._run: _Dealing | _Following | None = None

    def serve(
        self,
        batcher: Any,
        requests: Iterable[Request] = (),
        arrivals_s: Sequence[float] | None = None,
        *,
        update: Callable[[int], None] = lambda finished: None,
        idle: Callable[[float, float], None] = lambda start, end: None,
    ) -> list[Completion]:
        """Serve rank 0's requests on all replicas; all of them call it, and only rank 0's requests count. Rank 0 gets
        all completions, in the order of the requests; the others get none. The batcher must be idle.

        arrivals_s: when each request arrives, in seconds from the moment at which all replicas are there; None for all
        at once. update: told by rank 0 how many have ended. idle: told the start and the end of each time in which
        this replica had nothing to serve. A request that cannot be served fails alone, as in the batcher's `run`.

        RankError if another replica fails. Whoever is interrupted, or fails, ends the run of all."""
        name = f"replicas/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{self._runs}"
        self._runs += 1
        run = self._run = (
            _Dealing(self, batcher, name, requests, arrivals_s)
            if self.replica == 0
            else _Following(self, batcher, name)
        )
        try:
            batcher.run([])  # begins a new timeline
            run.start()
            with self.watch.busy("serving, step") if self.watch else contextlib.nullcontext():
                self._turn(batcher, run, update, idle)
            if run.failure is not None:
                raise run.failure
        except BaseException as error:
            run.stop(error)
            raise
        finally:
            run.join()
        return run.completions()

    def check(self) -> None:
        """RankError once a rank is lost."""
        if self.watch is not None:
            self.watch.check()

    def so_far(self, error: Exception) -> list[Completion]:
        """On rank 0, at any moment and from any thread: the completions of the run. Requests that have not ended have
        the finish_reason "error", this error, and the tokens that are known here."""
        return self._run.completions(error) if self._run is not None else []

    def _turn(self, batcher: Any, run: _Run, update: Callable[[int], None], idle: Callable) -> None:
        watch, told = self.watch, 0
        while True:
            run.wake.clear()  # first: what is told from here on is not overlooked
            if run.over.is_set():
                break
            self.check()
            busy = batcher.turn()
            run.hand_on()
            if watch is not None and not hasattr(batcher, "lockstep"):  # else that tells of its steps
                watch.progress = batcher.scheduler.num_steps
            if run.finished != told:
                told = run.finished
                update(told)
            if not busy:
                start = self.clock()
                with watch.idle() if watch else contextlib.nullcontext():
                    while not run.wake.wait(PAUSE_S):
                        self.check()
                if run.begun_s is not None:  # else this replica waited for the others, and not for requests
                    idle(max(start, run.begun_s), self.clock())
        if run.finished != told:
            update(run.finished)


class _Over(Exception):
    """The run has ended."""


class _Run:
    """One call of `serve` on one replica. failure: why it cannot go on. finished: how many requests have ended.
    begun_s: when all replicas were there."""

    def __init__(self, replicas: Replicas, batcher: Any, name: str):
        self.all, self.batcher, self.name = replicas, batcher, name
        self.over, self.wake = threading.Event(), threading.Event()
        self.failure: Exception | None = None
        self.finished = 0
        self.begun_s: float | None = None
        self.news: queue.SimpleQueue = queue.SimpleQueue()  # (sender, (what, ...)), for the thread that works them off
        self._new: deque[tuple[int, Any]] = deque()  # submitted by a thread, not yet seen by the main thread
        self.open: dict[int, Any] = {}  # handles by the number of their request; the main thread's
        self.bell = Letters(replicas._store, f"{name}/{replicas.replica}")  # to this replica's own reader
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        for work in self.work():
            thread = threading.Thread(target=self._safely, args=(work,), name="asyncbatch-replicas", daemon=True)
            self._threads.append(thread)
            thread.start()

    def join(self) -> None:
        """The threads are over when the run is: one that the interpreter's end finds in the store's own code would
        abort the process."""
        self.over.set()
        self.news.put((self.all.replica, ("over",)))
        with contextlib.suppress(RuntimeError):  # the store is gone
            self.bell.send(self.all.replica, pickle.dumps(("over",)))
        for thread in self._threads:
            thread.join(JOIN_S)

    def work(self) -> list[Callable[[], None]]:
        """What the threads do."""
        raise NotImplementedError

    def stop(self, error: BaseException) -> None:
        """This replica cannot go on: cancel its requests, and tell the others."""
        raise NotImplementedError

    def completions(self, error: Exception | None = None) -> list[Completion]:
        return []

    def submit(self, index: int, request: Any) -> None:
        """From a thread."""
        try:
            self._new.append((index, self.batcher.submit(request)))
        except RequestError as error:
            now = self.all.clock()
            self.news.put((self.all.replica, ("ended", index, Completion([], "error", error, now, None, now))))
        self.wake.set()

    def hand_on(self) -> None:
        """Between two turns: what has ended goes to the threads."""
        while self._new:
            index, handle = self._new.popleft()
            self.open[index] = handle
        for index in [index for index, handle in self.open.items() if handle.completion is not None]:
            self.news.put((self.all.replica, ("ended", index, self.open.pop(index).completion)))

    def cancel(self) -> None:
        """The requests that this replica still has; not where a rank is lost, since the device may wait for it."""
        with contextlib.suppress(Exception):
            self.all.check()
            self.hand_on()
            for handle in self.open.values():
                self.batcher.cancel(handle)
            while self.batcher.turn():
                pass

    def _safely(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        if not self.over.is_set():
            self.failure = self.failure or error
            self.over.set()
        self.wake.set()


class _Dealing(_Run):
    """Rank 0's."""

    def __init__(
        self, replicas: Replicas, batcher: Any, name: str, requests: Iterable, arrivals_s: Sequence[float] | None
    ):
        super().__init__(replicas, batcher, name)
        self._asked, self.start_s = (requests, arrivals_s), self.all.clock()
        self.requests: list[Any] = []
        self.answers: list[Completion | None] = []
        self.offset_s = [0.0] * replicas.replicas  # what each replica's clock shows more than this one
        self.inbox = Letters(replicas._store, f"{name}/0")
        self.outboxes = {one: Letters(replicas._store, f"{name}/{one}") for one in range(1, replicas.replicas)}

    def _prepare(self) -> None:
        requests = list(self._asked[0])
        self.arrivals_s = arrivals_s = _checked(requests, self._asked[1])
        size = self.batcher.shape.max_batch_size
        room = size + max(2, size // 4)
        self.dealer = Dealer([_size(one) for one in requests], arrivals_s, self.all.replicas, room)
        self.requests, self.answers = requests, [None] * len(requests)

    def _meet(self) -> None:
        """Wait until all replicas are there, and compare the clocks. Arrivals count from the end of it."""
        for replica, outbox in self.outboxes.items():
            fastest_s = float("inf")
            for _ in range(PINGS):
                asked_s = self.all.clock()
                outbox.send(0, pickle.dumps(("ping",)))
                its_s, place, answered_s = self._next(None)[2:]
                # (Processes of one machine have one clock: what would be measured is only the way.)
                if answered_s - asked_s < fastest_s and not (place and place == self.all.place):
                    fastest_s = answered_s - asked_s
                    self.offset_s[replica] = its_s - (asked_s + answered_s) / 2
        self._tell_all(("go",))
        self.start_s = self.begun_s = self.all.clock()

    def work(self) -> list[Callable[[], None]]:
        return [self._deal, self._receive] if self.outboxes else [self._deal]

    def stop(self, error: BaseException) -> None:
        self.over.set()
        self._tell_all(("stop", f"{type(error).__name__}: {error}"))
        self.cancel()

    def completions(self, error: Exception | None = None) -> list[Completion]:
        # (From any thread: the copies are made in one step of the interpreter.)
        handles = {index: handle for index, handle in [*list(self.open.items()), *list(self._new)]}
        answers = [
            answer or self._so_far(index, handles.get(index), error) for index, answer in enumerate(self.answers)
        ]
        if error is not None:
            # Nor is the cause what follows from it: the end of the device processes, which torchrun's SIGTERM reaches
            # too, and that this rank then cancels what it has.
            for index, answer in enumerate(answers):
                lost = isinstance(answer.error, DeviceError) and "device process ended" in str(answer.error)
                if lost or answer.finish_reason == "cancelled":
                    answers[index] = dataclasses.replace(answer, finish_reason="error", error=error)
        return answers

    def _so_far(self, index: int, handle: Any, error: Exception | None) -> Completion:
        submitted_s = self.start_s + self.arrivals_s[index]
        if handle is None:
            return Completion([], "error", error, submitted_s, None, self.all.clock())
        if handle.completion is not None:
            return dataclasses.replace(handle.completion, submitted_s=submitted_s)
        return Completion(handle.token_ids, "error", error, submitted_s, handle.first_token_s, self.all.clock())

    def _receive(self) -> None:
        while (letter := self.inbox.receive())[1][0] != "over":
            sender, thing = letter
            self.news.put((sender, (*thing, self.all.clock()) if thing[0] == "pong" else thing))

    def _deal(self) -> None:
        self._prepare()
        with contextlib.suppress(_Over):
            self._meet()
            while self.finished < len(self.requests):
                now_s = self.all.clock() - self.start_s
                while (dealt := self.dealer.deal(now_s)) is not None:
                    self._give(*dealt)
                next_s = self.dealer.next_s
                # (A request that is due and was not dealt waits for room: for an answer.)
                due_s = None if next_s is None or next_s <= now_s else next_s - now_s
                with contextlib.suppress(queue.Empty):
                    sender, _, *answer = self._next(due_s)
                    self._gather(sender, *answer)
            self._tell_all(("end",))
            self.over.set()
            self.wake.set()

    def _next(self, seconds: float | None) -> tuple:
        """(sender, what, ...) of the next news; queue.Empty if there is none for so long."""
        sender, (what, *rest) = self.news.get(timeout=seconds)
        if what == "over":
            raise _Over
        if what == "failed":
            raise self._failed(sender, rest[0])
        return (sender, what, *rest)

    def _give(self, index: int, replica: int) -> None:
        request = self.requests[index]
        if replica != 0:
            try:
                letter = pickle.dumps(("serve", index, request))
            except Exception:  # it cannot travel; what is wrong with it, if anything is, `submit` says
                self.dealer.move(index, 0)
                replica = 0
            else:
                self.outboxes[replica].send(0, letter)
        if replica == 0:
            self.submit(index, request)

    def _gather(self, sender: int, index: int, answer: Completion) -> None:
        offset_s, first_s = self.offset_s[sender], answer.first_token_s
        self.answers[index] = dataclasses.replace(
            answer,
            submitted_s=self.start_s + self.arrivals_s[index],
            first_token_s=None if first_s is None else first_s - offset_s,
            finished_s=answer.finished_s - offset_s,
        )
        self.dealer.ended(index)
        self.finished += 1
        self.wake.set()

    def _failed(self, replica: int, text: str) -> RankError:
        rank = self.all.ranks[replica]
        return RankError(f"rank {rank}, replica {replica}, failed: {text}", rank)

    def _tell_all(self, thing: tuple) -> None:
        for outbox in self.outboxes.values():
            with contextlib.suppress(RuntimeError):  # the store is gone
                outbox.send(0, pickle.dumps(thing))


class _Following(_Run):
    """That of another replica."""

    def __init__(self, replicas: Replicas, batcher: Any, name: str):
        super().__init__(replicas, batcher, name)
        self.inbox = Letters(replicas._store, f"{name}/{replicas.replica}")
        self.outbox = Letters(replicas._store, f"{name}/0")

    def work(self) -> list[Callable[[], None]]:
        return [self._receive, self._post]

    def stop(self, error: BaseException) -> None:
        self.over.set()
        with contextlib.suppress(RuntimeError):  # the store is gone
            self.outbox.send(self.all.replica, pickle.dumps(("failed", f"{type(error).__name__}: {error}")))
        self.cancel()

    def _receive(self) -> None:
        while True:
            _, (what, *rest) = self.inbox.receive()
            if what == "serve":
                self.submit(*rest)
            elif what == "ping":
                pong = ("pong", self.all.clock(), self.all.place)
                self.outbox.send(self.all.replica, pickle.dumps(pong))
            elif what == "go":
                self.begun_s = self.all.clock()
            elif what == "stop":
                raise self._stopped(rest[0])
            else:  # "end", or "over" from this replica itself
                self.over.set()
                self.wake.set()
                return

    def _post(self) -> None:
        while (news := self.news.get())[1][0] != "over":
            sender, (what, *rest) = news
            self.outbox.send(sender, _packed(what, *rest))
            self.finished += 1

    def _stopped(self, text: str) -> RankError:
        return RankError(f"rank {self.all.ranks[0]}, replica 0, ended the run: {text}", self.all.ranks[0])


def _checked(requests: list, arrivals_s: Sequence[float] | None) -> Sequence[float]:
    if arrivals_s is None:
        return [0.0] * len(requests)
    if len(arrivals_s) != len(requests):
        raise ValueError(f"arrivals_s has {len(arrivals_s)} times for {len(requests)} requests: each needs one")
    for moment in arrivals_s:
        if not 0 <= moment < float("inf"):
            raise ValueError(f"arrivals_s has {shown(moment)}: allowed are seconds from 0")
    return arrivals_s


def _size(request: Any) -> int:
    limit = getattr(request, "max_new_tokens", 0)
    return limit if isinstance(limit, int) else 0


def _packed(what: str, index: int, answer: Completion) -> bytes:
    """As a letter. An error that cannot travel goes as its text."""
    try:
        packed = pickle.dumps((what, index, answer))
        if answer.error is not None:
            pickle.loads(packed)
        return packed
    except Exception:
        error = RuntimeError(f"{type(answer.error).__name__}: {answer.error}")
        return pickle.dumps((what, index, dataclasses.replace(answer, error=error)))

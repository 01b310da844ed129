"""What the ranks of a session do together: torchrun has started several processes, and they measure one thing.

All of them go through the same session, with the same arguments. Rank 0 alone speaks and writes, and what depends on
its clock or on its files (how many runs the budget allows, whether to go on) is decided there and shared. A model that
ranks share is served by the batcher of its leader; on the others a thread follows it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..base import BatcherBase
from ..measure.point_recorder import override
from ..ranks.errors import RankError
from ..ranks.neighbour import this_place
from ..ranks.world import World, join
from ..request import Completion, Request
from ..timeline import Timeline
from .console import one_line
from .options import Arguments
from .rank_options import processes
from .rank_times import RankTimes
from .report import OWN
from .workload import NO_REQUEST_SPAN, serve_over_time

Serve = Callable[[], tuple[Timeline, list[Completion]]]

ROUNDS = 16  # readings of the clocks of two machines, of which the closest counts
FAILED = "asyncbatch/profile/failed"
PATIENCE_S, PAUSE_S = 10.0, 0.1


class Alone:
    """One process by itself: there is nobody to ask or to tell."""

    rank, size, tp, tp_rank, replica, replicas = 0, 1, 1, 0, 0, 1
    speaks = leads = True
    several = False

    def share(self, thing: Any) -> Any:
        """Rank 0's thing, on each rank."""
        return thing

    def gather(self, thing: Any) -> list[Any] | None:
        """On rank 0 the things of all ranks, in their order; None on the others."""
        return [thing]

    def serve(
        self,
        batcher: Any,
        requests: Sequence[Request],
        arrivals_s: Sequence[float] | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Serve requests, see `serve_over_time`."""
        return serve_over_time(batcher, requests, arrivals_s, progress)

    def all_of(self, one: bool) -> bool:
        """Whether something is true on all ranks."""
        return bool(self.share(all(self.gather(one) or ())))

    def first_only(self, do: Callable[..., None], *arguments: Any) -> None:
        """Rank 0 does something; an OSError that it raises is raised on all ranks."""
        error = None
        if self.speaks:
            try:
                do(*arguments)
            except OSError as raised:
                error = raised
        error = self.share(error)
        if error is not None:
            raise error

    def run(self, serve: Any, follower: Any, batcher: Any) -> Any:
        """A run of several ranks, see `Together.run`."""
        raise NotImplementedError

    def fail(self, error: BaseException) -> None:
        """This rank cannot go on: end all."""
        raise error

    def failed(self, what: str, error: BaseException) -> None:
        """Something has failed here, of this name. If it fails on all ranks within a while, that is all: rank 0 can say
        why, and the others are silent. Otherwise all ranks end here, with one line that names this one."""

    def leave(self) -> None:
        """This rank is done, as all others are."""

    def interrupted(self) -> None:
        """Ctrl-C has come: from now on no rank waits for another."""

    def on_lost(self, keep: Callable[[Exception], None]) -> None:
        """`keep` is called on rank 0, from another thread, before all ranks end because one is lost."""

    def finished(self, error: Exception) -> list[Completion | None]:
        """Of the newest run the completions that are there, in the order of the requests."""
        return []


ALONE = Alone()


def in_words(ranks: Alone) -> str:
    """What a device's name says of several ranks."""
    if not ranks.several:
        return ""
    shared = f"{ranks.tp} of them share a model" if ranks.tp > 1 else "each with a model of its own"
    times = f", {ranks.replicas} replicas" if ranks.tp > 1 and ranks.replicas > 1 else ""
    return f"; {ranks.size} ranks, {shared}{times}"


class Together(Alone):
    """This process among those that torchrun has started: `world` knows them.

    speaks: rank 0, which prints and writes. leads: the first rank of a replica, which takes its requests."""

    def __init__(self, world: World):
        self.world = world
        self.rank, self.size, self.tp, self.tp_rank = world.rank, world.size, world.tp, world.tp_rank
        self.replica, self.replicas = world.replica, world.replicas
        self.speaks, self.leads, self.several = self.rank == 0, world.leads, True
        self.machine = socket.gethostname()
        self._given: list[Any] = []  # handles of the requests that this replica has of the newest run
        self._replicas: Any = None
        if self.replicas > 1 and self.leads:
            from ..ranks.replicas import Replicas

            leaders = range(0, self.size, self.tp)
            self._replicas = Replicas(world.store, self.replica, self.replicas, leaders, watch=world.watch)
        self.offset_s, self.clock_error_s = self._clock()

    def share(self, thing: Any) -> Any:
        return self.world.share(thing)

    def gather(self, thing: Any) -> list[Any] | None:
        return self.world.gather(thing)

    def _clock(self) -> tuple[float, float | None]:
        """(seconds to add to this rank's times, how far they may then be off rank 0's). A machine has one clock for
        all of its processes. Of another machine, rank 0 reads its own before it asks, and after all have answered: the
        answer was given in between. The closest of several readings counts."""
        clock = this_place()  # machine and its last start: the clock counts from then
        same = bool(clock) and self.share(clock) == clock
        if all(self.share(self.gather(same)) or ()):
            return 0.0, None
        readings = []
        for _ in range(ROUNDS):
            asked_s = time.perf_counter()
            self.share(None)
            of_all = self.gather(time.perf_counter())
            readings.append((asked_s, of_all, time.perf_counter()))
        asked_s, of_all, answered_s = self.share(min(readings, key=lambda one: one[2] - one[0]))
        if same:
            return 0.0, None
        return (asked_s + answered_s) / 2 - of_all[self.rank], (answered_s - asked_s) / 2

    def serve(
        self,
        batcher: Any,
        requests: Sequence[Request],
        arrivals_s: Sequence[float] | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """As `serve_over_time`, on each rank that leads: the replicas share rank 0's requests, and rank 0 gets the
        answers."""
        self._given = []
        if not isinstance(batcher, BatcherBase):
            return serve_over_time(batcher, requests, arrivals_s, progress)
        submit = batcher.submit

        def noted(request: Request) -> Any:
            handle = submit(request)
            self._given.append(handle)
            return handle

        if self._replicas is None:
            with override(batcher, "submit", noted):
                return serve_over_time(batcher, requests, arrivals_s, progress)

        def nothing_to_do(start: float, end: float) -> None:
            batcher.timeline.add(*NO_REQUEST_SPAN, start, end)

        bar = tqdm(total=len(requests), unit=" requests", leave=False, disable=not progress)
        with bar, override(batcher, "submit", noted):
            return self._replicas.serve(
                batcher,
                requests,
                arrivals_s if self.speaks else None,  # rank 0's requests count
                update=lambda ended: bar.update(ended - bar.n),
                idle=nothing_to_do,
            )

    def on_lost(self, keep: Callable[[Exception], None]) -> None:
        if self.speaks:
            self.world.watch.on_lost = keep

    def finished(self, error: Exception) -> list[Completion | None]:
        """On rank 0, from any thread: the newest run's completions that are there."""
        if self._replicas is not None:
            answers = self._replicas.so_far(error)
        else:
            answers = [handle.completion for handle in list(self._given)]
        return [one if one is not None and one.error is None else None for one in answers]

    # ---- a run --------------------------------------------------------------------------------------------------

    def run(self, serve: Serve, follower: Follower | None, batcher: Any
            ) -> tuple[Timeline, list[Completion], tuple[RankTimes, ...]]:  # fmt: skip
        """One run, of which each rank has its part: the leader serves, and the others have followed it.

        Returns this rank's timeline, rank 0's completions, and, on rank 0, what each rank did, on rank 0's clock.
        RankError, on each rank, if the run failed on any."""
        timeline, completions, error = Timeline(), list[Completion](), None
        if follower is None:
            try:
                timeline, completions = serve()
            except Exception as raised:
                error = raised
        told = self.share(self.gather((len(timeline.steps), None if error is None else one_line(error))))
        if error is not None:
            raise error
        for rank, (_, problem) in enumerate(told):
            if problem is not None:
                raise RankError(f"rank {rank}: {problem}")
        if follower is not None:
            timeline = follower.caught_up(told[self.rank - self.tp_rank][0])
        in_collectives = getattr(batcher, "collective_s", None)
        own = RankTimes(
            self.rank,
            self.replica,
            self.tp_rank,
            self.machine,
            timeline,
            None if not in_collectives else dict(in_collectives),
            requests=(len(self._given) or len(completions)) if self.leads else None,
        )
        if self.speaks:
            others = [pickle.loads(zlib.decompress(packed)) for packed in (self.gather(b"") or [])[1:]]
            return timeline, completions, (own, *others)
        travelling = own.moved(self.offset_s, self.clock_error_s).shortened()
        self.gather(zlib.compress(pickle.dumps(travelling), 1))
        return timeline, completions, ()

    def fail(self, error: BaseException) -> None:
        """End all ranks, with one line that names this one, or another if that failed before."""
        self.world.watch.end(error)

    def leave(self) -> None:
        self.world.close()

    def failed(self, what: str, error: BaseException) -> None:
        store, watch = self.world.store.clone(), self.world.watch
        keys, patience_s = [f"{FAILED}/{what}/{rank}" for rank in range(self.size)], PATIENCE_S
        store.set(keys[self.rank], "1")
        while not store.check(keys) and patience_s > 0 and watch.error is None:
            time.sleep(PAUSE_S)
            patience_s -= PAUSE_S
        if not store.check(keys):
            watch.end(error)

    def interrupted(self) -> None:
        """The other ranks have been told, too, or will be ended by torchrun. It tells this one a second time, which
        must not disturb what is being written."""
        if self.speaks:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.world.watch.close()
        if not self.speaks:
            os._exit(130)


@contextlib.contextmanager
def joined(arguments: Arguments) -> Iterator[Alone]:
    """This process among those that torchrun has started; by itself without torchrun."""
    if processes() == 1:
        yield ALONE
        return
    on_cuda = torch.cuda.is_available() and arguments.device != "cpu"
    if arguments.engine and arguments.engine != [OWN]:
        os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")  # as transformers wants it, before NCCL begins
    command = [word for word in arguments.command if word != "--debug"]
    ranks = Together(join(arguments.tp or 1, on_cuda=on_cuda, command_line=command))
    try:
        yield ranks
    except Exception as error:
        ranks.failed("session", error)
        ranks.world.watch.close()
        raise
    ranks.leave()


class Follower(threading.Thread):
    """On a rank that does not lead: serves along with the leader's batcher until that is closed.

    failed: called with an exception that ended it."""

    def __init__(self, batcher: Any, failed: Callable[[BaseException], None]):
        super().__init__(name=f"follow {batcher.mode}", daemon=True)
        self.batcher, self.failed = batcher, failed
        self.start()

    def run(self) -> None:
        try:
            self.batcher.follow()
        except BaseException as error:  # whatever it is, this rank cannot go on
            self.failed(error)

    def caught_up(self, steps: int) -> Timeline:
        """The timeline of the leader's last run, once it has all of its steps."""
        while len(self.batcher.timeline.steps) < steps and self.is_alive():
            time.sleep(1e-3)
        timeline: Timeline = self.batcher.timeline
        return timeline

    def ended(self, kind: Any, error: BaseException | None, where: Any) -> None:
        """Wait until the leader has closed its batcher; not if this rank is being left with an exception."""
        if error is None:
            self.join()

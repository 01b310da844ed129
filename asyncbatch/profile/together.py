"""What the ranks of a session do together: torchrun has started several processes, and they measure one thing.

All of them go through the same session, with the same arguments. Rank 0 alone speaks and writes, and what depends on
its clock or on its files (how many runs the budget allows, whether to go on) is decided there and shared. A model that
ranks share is served by the batcher of its leader; on the others a thread follows it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..ranks.errors import RankError
from ..request import Completion
from ..timeline import Timeline
from .console import one_line
from .options import Arguments
from .rank_options import processes
from .rank_times import RankTimes

Serve = Callable[[], tuple[Timeline, list[Completion]]]

ROUNDS = 16  # readings of the clocks of two machines, of which the closest counts
PATIENT = datetime.timedelta(days=7)
BOOT = Path("/proc/sys/kernel/random/boot_id")


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

    def all_of(self, one: bool) -> bool:
        """Whether something is true on all ranks."""
        return bool(self.share(all(self.gather(one) or ())))

    def run(self, serve: Any, follower: Any, batcher: Any) -> Any:
        """A run of several ranks, see `Together.run`."""
        raise NotImplementedError

    def fail(self, error: BaseException) -> None:
        """This rank cannot go on: end all."""
        raise error

    def leave(self) -> None:
        """This rank is done, as all others are."""

    def interrupted(self) -> None:
        """Ctrl-C has come: from now on no rank waits for another."""


ALONE = Alone()


def in_words(ranks: Alone) -> str:
    """What a device's name says of several ranks."""
    if not ranks.several:
        return ""
    shared = f"{ranks.tp} of them share a model" if ranks.tp > 1 else "each with a model of its own"
    times = f", {ranks.replicas} replicas" if ranks.tp > 1 and ranks.replicas > 1 else ""
    return f"; {ranks.size} ranks, {shared}{times}"


class Together(Alone):
    """This process among those that torchrun has started. ranks: those of `ranks.group.join`.

    speaks: rank 0, which prints and writes. leads: the first rank of a replica, which takes its requests."""

    def __init__(self, ranks: Any):
        self.ranks = ranks
        self.rank, self.size, self.tp, self.tp_rank = ranks.rank, ranks.size, ranks.tp, ranks.tp_rank
        self.replica, self.replicas = ranks.replica, ranks.replicas
        self.speaks, self.leads = self.rank == 0, self.tp_rank == 0
        self.machine = socket.gethostname()
        self.offset_s, self.clock_error_s = self._clock()

    def share(self, thing: Any) -> Any:
        return self.ranks.share(thing)

    def gather(self, thing: Any) -> list[Any] | None:
        return self.ranks.gather(thing)

    def _clock(self) -> tuple[float, float | None]:
        """(seconds to add to this rank's times, how far they may then be off rank 0's). A machine has one clock for
        all of its processes. Of another machine, rank 0 reads its own before it asks, and after all have answered: the
        answer was given in between. The closest of several readings counts."""
        clock = _name_of_the_clock()
        same = self.share(clock) == clock
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

    # ---- a run --------------------------------------------------------------------------------------------------

    def run(self, serve: Serve, follower: Follower | None, batcher: Any
            ) -> tuple[Timeline, list[Completion], tuple[RankTimes, ...]]:  # fmt: skip
        """One run, of which each rank has its part: the leader serves, and the others have followed it.

        Returns this rank's timeline, rank 0's completions, and, on rank 0, what each rank did, on rank 0's clock.
        RankError, on each rank, if the run failed on any."""
        timeline, completions, error = Timeline(), [], None
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
            requests=len(completions) if self.leads else None,
        )
        ranks = tuple(self.gather(own.moved(self.offset_s, self.clock_error_s)) or ())
        if ranks:  # what rank 0 has, and not a copy: it may still be added to
            ranks = (replace(ranks[0], timeline=timeline), *ranks[1:])
        return timeline, completions, ranks

    def fail(self, error: BaseException) -> None:
        """End this process, and with it all ranks, with one line that names it."""
        os.write(2, f"asyncbatch.profile: rank {self.rank} ({self.machine}): {one_line(error)}\n".encode())
        os._exit(2)

    def leave(self) -> None:
        self.ranks.leave()

    def interrupted(self) -> None:
        """The other ranks have been told, too, or will be ended by torchrun. It tells this one a second time, which
        must not disturb what is being written."""
        if not self.speaks:
            os._exit(130)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def joined(arguments: Arguments) -> Iterator[Alone]:
    """This process among those that torchrun has started; by itself without torchrun."""
    if processes() == 1:
        yield ALONE
        return
    on_cuda = torch.cuda.is_available() and arguments.device != "cpu"
    ranks = Together(Joined(arguments.tp or 1, on_cuda))
    yield ranks
    ranks.leave()


def _name_of_the_clock() -> str:
    """The same on processes whose `time.perf_counter` is the same clock: those of one start of one machine."""
    try:
        return BOOT.read_text().strip()
    except OSError:
        return f"{platform.node()} {os.name}"


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


# ---- from torchrun's environment ------------------------------------------------------------------------------------


class Joined:
    """The ranks that torchrun has started, connected by torch.distributed."""

    def __init__(self, tp: int, on_cuda: bool):
        if on_cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
        self.rank, self.size, self.tp = dist.get_rank(), dist.get_world_size(), tp
        self.replica, self.tp_rank, self.replicas = self.rank // tp, self.rank % tp, self.size // tp
        self._control = dist.new_group(backend="gloo", timeout=PATIENT)

    def share(self, thing: Any) -> Any:
        things = [thing]
        dist.broadcast_object_list(things, src=0, group=self._control, device=torch.device("cpu"))
        return things[0]

    def gather(self, thing: Any) -> list[Any] | None:
        things = [None] * self.size if self.rank == 0 else None
        dist.gather_object(thing, things, dst=0, group=self._control)
        return things

    def leave(self) -> None:
        dist.destroy_process_group()

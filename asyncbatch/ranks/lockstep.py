"""What ranks agree about, once a step: what came in, and that they still do the same.

Before each step the leader sends a message and the others receive one, by an asynchronous broadcast of gloo on the
hosts. What message k says is done before step k+1, by all ranks. So the message travels while a step is computed, and
nobody waits for it. A message is a header of fixed size, and, seldom, a list of entries (a new request, ...) after it.
"""

from __future__ import annotations

import pickle
import time
import zlib
from array import array
from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from ..scheduler import BatchPlan
from .errors import RankError
from .group import Connection
from .watch import Watch

HEADER = 3  # int64: the step's number, the digest, how many bytes of entries follow
MOST_UNDER_WAY = 64  # messages of the leader


class Lockstep:
    """The messages of one batcher. connection: the ranks; all of them make their `Lockstep` at the same time. watch:
    tells of ranks that are lost.

    digest: of all that was planned and sampled so far; the same on all ranks, or something is wrong."""

    def __init__(self, connection: Connection, watch: Watch):
        self.connection, self.watch, self.leads = connection, watch, connection.rank == 0
        self._group = connection.group_of_next_batcher()
        self.steps, self.digest = 0, 0
        self._agreed: list[Any] = []  # the leader's: entries that were sent and are not done yet
        self._before = 0  # the digest when the newest message was sent or asked for
        self._under_way: deque[tuple[Any, torch.Tensor]] = deque()

    def exchange(self, entries: Sequence[Any]) -> list[Any]:
        """Called before each step. The leader gives what came in. Returns what is to be done now: what the leader gave
        the last time. RankError where this rank has not done the same as the leader."""
        if self.leads:
            done, self._agreed = self._agreed, list(entries)
            self._send(pickle.dumps(self._agreed) if self._agreed else b"")
        else:
            done = self._receive()
        self.steps += 1
        self.watch.progress = self.steps
        self._before = self.digest
        return done

    def note_plan(self, plan: BatchPlan) -> None:
        numbers = chain.from_iterable((row.state.number, row.position, row.num_tokens) for row in plan.rows)
        self.digest = zlib.crc32(array("q", (plan.step, plan.tokens, *numbers)).tobytes(), self.digest)

    def note_tokens(self, token_ids: Any) -> None:
        """token_ids: int32 of NumPy, one a row."""
        self.digest = zlib.crc32(token_ids.tobytes(), self.digest)

    # ---- inside -----------------------------------------------------------------------------------------

    def _broadcast(self, tensor: torch.Tensor) -> Any:
        return self._group.broadcast(tensor, 0)

    def _send(self, payload: bytes) -> None:
        header = torch.tensor([self.steps, self.digest, len(payload)])
        self._under_way.append((self._broadcast(header), header))
        if payload:
            content = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            self._under_way.append((self._broadcast(content), content))
        while self._under_way and (len(self._under_way) > MOST_UNDER_WAY or self._under_way[0][0].is_completed()):
            self._wait(self._under_way.popleft()[0])

    def _receive(self) -> list[Any]:
        """The entries of the message before; the next one is asked for."""
        entries = []
        if self._under_way:
            work, header = self._under_way.popleft()
            self._wait(work)
            step, digest, size = header.tolist()
            self._check(step, digest)
            if size:
                content = torch.empty(size, dtype=torch.uint8)
                self._wait(self._broadcast(content))
                entries = pickle.loads(content.numpy().tobytes())
        header = torch.zeros(HEADER, dtype=torch.int64)
        self._under_way.append((self._broadcast(header), header))
        return entries

    def _check(self, step: int, digest: int) -> None:
        if (step, digest) != (self.steps - 1, self._before):
            connection = self.connection
            raise RankError(
                f"{connection.name()} and {connection.name(0)} are no longer the same: before "
                f"step {self.steps - 1} one of them had planned other rows, or sampled other tokens, than the other "
                f"(digests {self._before:08x} and {digest:08x}; the leader was at step {step})"
            )

    def _wait(self, work: Any) -> None:
        """Until a message has come or gone. RankError once a rank is lost."""
        pause, self.watch.doing = 20e-6, "waiting for the leader"
        while not work.is_completed():
            self.watch.check()
            time.sleep(pause)
            pause = min(2 * pause, 2e-3)
        work.wait()
        self.watch.doing = ""

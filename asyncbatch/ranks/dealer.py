"""Which replica serves a request: the one with the fewest requests that have not ended.

Dealt, and not taken: if each replica took the next request whenever it has room, the first one to begin would take all
that fit into its batch, and the others would have nothing to do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class Dealer:
    """sizes: of each request, the most tokens that it generates. arrivals_s: from when on it may be dealt.
    room: how many requests a replica may have at once.

    loads: how many each replica has now. where: of each request that was dealt, its replica."""

    def __init__(self, sizes: Sequence[int], arrivals_s: Sequence[float], replicas: int, room: int):
        self._sizes, self._arrivals_s, self._room = sizes, arrivals_s, room
        self._waiting = deque(sorted(range(len(sizes)), key=lambda index: arrivals_s[index]))
        self.loads, self._tokens = [0] * replicas, [0] * replicas
        self.where: dict[int, int] = {}

    @property
    def next_s(self) -> float | None:
        """When the next request arrives; None if all have been dealt."""
        return self._arrivals_s[self._waiting[0]] if self._waiting else None

    def deal(self, now_s: float) -> tuple[int, int] | None:
        """(request, replica), in the order of arrival; None if no request is due, or no replica has room.

        Among replicas that have equally many requests it is the one whose requests have fewer tokens to generate."""
        if not self._waiting or self._arrivals_s[self._waiting[0]] > now_s:
            return None
        replica = min(range(len(self.loads)), key=lambda one: (self.loads[one], self._tokens[one], one))
        if self.loads[replica] >= self._room:
            return None
        index = self._waiting.popleft()
        self._count(index, replica, 1)
        self.where[index] = replica
        return index, replica

    def move(self, index: int, replica: int) -> None:
        """Give a request that was just dealt to another replica."""
        self._count(index, self.where[index], -1)
        self._count(index, replica, 1)
        self.where[index] = replica

    def ended(self, index: int) -> None:
        self._count(index, self.where[index], -1)

    def _count(self, index: int, replica: int, by: int) -> None:
        self.loads[replica] += by
        self._tokens[replica] += by * self._sizes[index]

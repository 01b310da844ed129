"""Notebook 01: continuous batching on a toy device, where a step costs what we say, and the loop that is the exercise.

The exercise is checked against this loop, and this loop by the tests against the package's own scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

from ..request import finish_reason
from ..scheduler import fit_budget
from ..timeline import Timeline

HOST_MS = {"plan": 0.5, "fill": 0.4, "launch": 0.3, "commit": 0.6}
DEVICE_MS = {"copy_in": 0.1, "step": 6.0, "copy_out": 0.1}
STOP, WORD = 2, 7  # tokens of the toy device: its stop token, and every other one that it writes


class Asked:
    """A request of notebook 01, and what has been written for it.

    number: which request it is. prompt: the tokens of its prompt. max_new_tokens, stop_token_ids: as of a `Request`.
    token_ids: written so far. writes: the toy device writes a stop token as token number `writes` (from 1)."""

    def __init__(
        self,
        number: int,
        prompt: Sequence[int],
        max_new_tokens: int,
        stop_token_ids: Sequence[int] = (STOP,),
        writes: int | None = None,
    ):
        self.number, self.prompt, self.max_new_tokens = number, list(prompt), max_new_tokens
        self.stop_token_ids, self.writes = tuple(stop_token_ids), writes
        self.token_ids: list[int] = []

    def __repr__(self) -> str:
        return f"<request {self.number}: {len(self.token_ids)} of at most {self.max_new_tokens} tokens>"


def asked(lengths: Iterable[int], prompt: int = 3) -> list[Asked]:
    """Requests with prompts of so many tokens. Request number i may write `lengths[i]` tokens."""
    return [Asked(number, [1] * prompt, length) for number, length in enumerate(lengths)]


class ToyDevice:
    """A device that computes nothing, and notes who was in each step and what the host and the device spend on it.

    batches: for each step, the numbers of its requests. timeline: of host and device, which take turns.
    ms: milliseconds of the parts, in place of those in HOST_MS and DEVICE_MS. KeyError for another part."""

    def __init__(self, **ms: float):
        if unknown := sorted(ms.keys() - HOST_MS.keys() - DEVICE_MS.keys()):
            known = ", ".join((*HOST_MS, *DEVICE_MS))
            raise KeyError(f"the toy device has no part {', '.join(unknown)}; it has {known}")
        self.ms = HOST_MS | DEVICE_MS | ms
        self.batches: list[list[int]] = []
        self.timeline, self.now = Timeline("sync", clock="virtual"), 0.0

    def compute(self, batch: Sequence[Asked]) -> None:
        """One step: each request of the batch gets its next token."""
        step, kind = len(self.batches), "decode" if all(one.token_ids for one in batch) else "prefill"
        self.batches.append([one.number for one in batch])
        for part in ("plan", "fill", "launch"):
            self._spend("host", part, step)
        begin = self.now
        for lane, part in (("H2D", "copy_in"), ("compute", "step"), ("D2H", "copy_out")):
            self._spend(lane, part, step)
        self.timeline.add("host", "wait", step, begin, self.now)
        for one in batch:
            one.token_ids.append(STOP if len(one.token_ids) + 1 == one.writes else WORD)
        self._spend("host", "commit", step)
        self.timeline.add_step(step, kind, len(batch), 0)

    def _spend(self, lane: str, part: str, step: int) -> None:
        begin, self.now = self.now, self.now + self.ms[part] / 1000
        self.timeline.add(lane, part, step, begin, self.now)

    def grid(self, rows: int) -> list[list[int | None]]:
        """Who was in which row in each step: a request stays in its row, None is an empty place. A row more for each
        request that is one too many."""
        grid: list[list[int | None]] = [[] for _ in range(rows)]
        row_of: dict[int, int] = {}
        for step, batch in enumerate(self.batches):
            row_of = {number: row for number, row in row_of.items() if number in batch}
            for number in batch:
                row_of.setdefault(number, next(row for row in count() if row not in row_of.values()))
            grid += [[None] * step for _ in range(max(row_of.values(), default=0) + 1 - len(grid))]
            there = {row: number for number, row in row_of.items()}
            for row, places in enumerate(grid):
                places.append(there.get(row))
        return grid


def continuous_batch(waiting: Sequence[Any], rows: int, budget: int, compute: Callable[[list[Any]], Any]) -> None:
    """Serve the requests: in each step those who fit join, and who is done leaves."""
    waiting, running = list(waiting), []
    while waiting or running:
        chunks = [len(request.prompt) for request in waiting]
        joining = fit_budget(chunks, rows - len(running), budget)
        running += waiting[:joining]
        waiting = waiting[joining:]
        compute(running)
        running = [
            request
            for request in running
            if finish_reason(request.token_ids, request.max_new_tokens, request.stop_token_ids) is None
        ]

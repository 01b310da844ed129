"""The all-reduces of a step on the virtual clock, and the error of ranks that do not agree on it.

`plan_digest` says in eight digits what a rank is about to compute. Ranks whose digests differ must not add anything up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..scheduler import BatchPlan, StepKind
from .virtual import is_time


class AllReduce(NamedTuple):
    """What a rank brings to an all-reduce. sequence: how many it has done before, which is all that NCCL goes by.
    step: the step's number, kind: its `StepKind`. number, of: which it is of how many in the step, from 1. shape:
    (tokens, width) of the tensor. digest: `plan_digest` of the step. requests: the numbers of the requests in it."""

    rank: int
    sequence: int
    step: int
    kind: str
    number: int
    of: int
    shape: tuple[int, int]
    digest: str
    requests: tuple[int, ...]

    def __str__(self) -> str:
        tokens, width = self.shape
        return (
            f"rank {self.rank} is at all-reduce {self.sequence}: number {self.number} of {self.of} of its step "
            f"{self.step} ({self.kind}), {tokens} x {width} values, requests {list(self.requests)}, "
            f"plan {self.digest}"
        )


class Exchange(NamedTuple):
    """An all-reduce that was done. steps, arrived: the step of each rank, and when it arrived (seconds), by rank.
    began, ended: for all ranks the same."""

    sequence: int
    steps: tuple[int, ...]
    arrived: tuple[float, ...]
    began: float
    ended: float


class DisagreementError(RuntimeError):
    """The ranks do not agree on the next step, and would hang for ever, or compute wrong tokens without a word.

    hangs: whether it is a hang; else the sizes fit, and it is the tokens. wanted: what each rank is at, by rank; None
    for one that is at no all-reduce. ranks: those that want something else than most do."""

    def __init__(self, wanted: Sequence[AllReduce | None], hangs: bool, why: str, last: Sequence[str] = ()):
        self.wanted, self.hangs = tuple(wanted), hangs
        wishes = [None if one is None else one[2:] for one in wanted]
        usual = max(filter(None, wishes), key=wishes.count, default=None)  # (of equals, that of the first rank)
        self.ranks = [rank for rank, wish in enumerate(wishes) if wish is None or wish != usual]
        told = [
            str(one) if one is not None else f"rank {rank} launches no more steps: {last[rank]}"
            for rank, one in enumerate(wanted)
        ]
        what = "a deadlock" if hangs else "silent corruption"
        super().__init__("\n".join([f"the ranks disagree: {what}", *told, why, MEND]))


MEND = "Apply what comes in (a request, a cancellation) before the same step on every rank."
NEVER = "An all-reduce ends when every rank is in it. On GPUs these ranks would wait for ever, without an error."
OTHER_SIZES = (
    "The sizes differ, now or later in the step. GPUs match all-reduces by their order alone: they would hang, or add "
    "up what does not belong together."
)
WRONG_SUMS = (
    "The sizes fit, so GPUs would go on: parts of different batches are added up, and the tokens are wrong, without an "
    "error."
)


def plan_digest(plan: BatchPlan) -> str:
    """Eight hexadecimal digits that two ranks have in common if they plan the same step: its number, its size, and of
    each row the request, the place, the number of tokens, the carry-over, whether it samples, the newest token that the
    host has seen, and, where the host knows them, the input tokens, the length limit and how it samples."""
    rows = []
    for row in plan.rows:
        state, known = row.state, None
        if row.carry is None:  # else the token is on the device, and the row that sampled it was compared
            known = state.known_tokens(row.position, row.num_tokens), state.max_tokens, state.request.sampling
        rows.append((state.number, *row[1:], known, state.generated[-1:]))
    text = repr((plan.step, plan.num_decode, plan.tokens, rows))
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


@dataclass(frozen=True)
class AllReduces:
    """The all-reduces of a step. count: of each forward pass (a step that decodes and prefills has two); they cut the
    step's own time into parts of equal length, one before each and one after the last. seconds: of one, from the moment
    when the last rank has arrived; a number, or a function of the shape (tokens, width). width: numbers for each token.

    ValueError for anything else than a whole number and seconds from 0."""

    count: int = 2
    seconds: float | Callable[[tuple[int, int]], float] = 0.1e-3
    width: int = 64

    def __post_init__(self) -> None:
        for name, value, least in (("count", self.count, 0), ("width", self.width, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"AllReduces: {name} is {value!r}, allowed are whole numbers from {least}")
        if not callable(self.seconds) and not is_time(self.seconds):
            raise ValueError(f"AllReduces: seconds is {self.seconds!r}, allowed are seconds from 0, or a function")

    def of(self, kind: Any) -> list[tuple[str, tuple[int, int]]]:
        """The (forward pass, shape) of each all-reduce of a step, in order; none for what is no step."""
        if not isinstance(kind, StepKind):
            return []
        sizes = {"decode": [("decode", kind.rows)], "prefill": [("prefill", kind.tokens)]}
        passes = sizes.get(kind.passes) or sizes["decode"] + sizes["prefill"]
        return [(name, (tokens, self.width)) for name, tokens in passes for _ in range(self.count)]

    def took(self, shape: tuple[int, int]) -> float:
        seconds = self.seconds(shape) if callable(self.seconds) else self.seconds
        if not is_time(seconds):
            raise ValueError(f"AllReduces: seconds gave {seconds!r} for {shape}, allowed are seconds from 0")
        return float(seconds)

"""Notebook 08: tensor parallelism on the virtual clock. Two ranks, a slow host, and what they must agree on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ..devices.all_reduces import AllReduces, DisagreementError
from ..devices.virtual import Costs
from ..models.toy import toy_llama
from ..ordering.ranks import News, RankServing, Rule, may_apply
from ..ordering.toy import toy_tokens
from ..pictures.ranks import CollectiveSpan, plot_ranks
from ..pictures.timelines import TimelineFigure
from ..request import Request

__all__ = ["News", "Served", "draw", "measured", "may_apply", "serve", "try_rule"]

MS = 1e-3
STEP_MS = 6.0  # of one device
ALL_REDUCES = AllReduces(count=2, seconds=0.2 * MS)  # two stand for the 65 of a model of 32 layers
HOST_PARTS = (0.4, 0.3, 0.1, 0.2)  # of the host's work: plan, fill, launch, commit
PROMPTS, NEW = ([3, 1, 4, 1, 5], [9, 2, 6]), 24


@lru_cache(maxsize=1)
def _model() -> Any:
    return toy_llama()


def _costs(size: int, host_ms: float | Sequence[float]) -> list[Costs]:
    of_ranks = [host_ms] * size if isinstance(host_ms, int | float) else list(host_ms)
    if len(of_ranks) != size:
        raise ValueError(f"host_ms is {host_ms!r}: for {size} ranks it takes one number, or one a rank")
    made = []
    for host in of_ranks:
        plan, fill, launch, commit = (share * host * MS for share in HOST_PARTS)
        step_s = STEP_MS * MS / size
        made.append(Costs(plan=plan, fill=fill, launch=launch, commit=commit, step=step_s, copy_in=0, copy_out=0))
    return made


class Served:
    """What became of two requests that the ranks served. timelines: one a rank. collectives: of each rank, when it was
    at an all-reduce. step_ms: from the end of a step to the end of the next. idle, waits: of each rank, the shares of
    the time (0 to 1) that its device was idle, and that it waited in all-reduces for other ranks. ahead: for how many
    steps the host that launches first was ahead of the others, at most, from step 4 on. tokens: of each rank."""

    def __init__(self, serving: RankServing):
        self.mode, self.size, self.timelines = serving.mode, serving.size, serving.timelines
        ranks = range(self.size)
        exchanges = serving.ranks.exchanges
        self.collectives = [
            [CollectiveSpan(one.steps[rank], one.arrived[rank], one.began, one.ended) for one in exchanges]
            for rank in ranks
        ]
        self.tokens = [[list(handle.token_ids) for handle in host.handles] for host in serving.hosts]
        ends = self.timelines[0].lane("compute")[3]
        first, last = 4, len(ends) - 1  # the steady state, in which every step is a decode step
        long = float(ends[last] - ends[first])
        self.step_ms = long / (last - first) / MS
        steps = [timeline.lane("compute")[2:] for timeline in self.timelines]
        waits = [np.array([(one.arrived, one.began) for one in each]).reshape(-1, 2).T for each in self.collectives]
        inside = (ends[first], ends[last])
        self.idle = [max(0.0, 1 - _within(starts, stops, *inside) / long) for starts, stops in steps]
        self.waits = [_within(starts, stops, *inside) / long for starts, stops in waits]
        launches = [sorted(end for _, name, _, _, end in one.spans if name == "launch") for one in self.timelines]
        self.ahead = max(
            sum(at < moment for at in mine) - number
            for theirs in launches
            for mine in launches
            for number, moment in list(enumerate(theirs))[first:]
        )

    def __str__(self) -> str:
        words = "1 rank" if self.size == 1 else f"{self.size} ranks"
        idle, waits = (" and ".join(f"{each:.1%}" for each in shares) for shares in (self.idle, self.waits))
        text = f"{words}, {self.mode}: {self.step_ms:.2f} ms a step, idle {idle}"
        return text + (f", waits in all-reduces {waits}" if self.size > 1 else "")


def _within(starts: np.ndarray, ends: np.ndarray, low: float, high: float) -> float:
    """Seconds of the spans between two moments."""
    return float(np.sum(np.clip(ends, low, high) - np.clip(starts, low, high)))


def serve(mode: str, size: int = 2, host_ms: float | Sequence[float] = 2.0) -> Served:
    """Let `size` ranks serve two requests. mode: "sync" or "async". host_ms: the host's work for a step, of every rank
    or one a rank. A step is 6 ms on one device, divided among the ranks, and two all-reduces of 0.2 ms."""
    serving = RankServing(size, mode, _costs(size, host_ms), ALL_REDUCES, model=_model())
    serving.serve([Request(list(prompt), NEW, stop_token_ids=()) for prompt in PROMPTS])
    return Served(serving)


def draw(mode: str, size: int = 2, host_ms: float | Sequence[float] = 2.0) -> TimelineFigure:
    """The lanes of each rank, host and compute, as `serve` has them."""
    served = serve(mode, size, host_ms)
    return plot_ranks(served.timelines, served.collectives, title=f"{mode}, host work {_ms(host_ms)} a step")


def _ms(host_ms: float | Sequence[float]) -> str:
    return " and ".join(f"{each:g} ms" for each in ([host_ms] if isinstance(host_ms, int | float) else host_ms))


# ---- what comes in while the ranks serve -----------------------------------------------------------------------------


class Agreed:
    """What came of a rule (see `may_apply`). applied: of each rank, the step before which it applied what came in, None
    if it never did. error: of ranks that disagree, the checker's words. sent: the step that rank 0 was planning when
    it came in. right: how many answers are complete on both ranks, with the tokens of a model without ranks."""

    def __init__(self, rule: Rule, when_ms: float = 13.0, message_ms: float = 0.5, slow: bool = False,
                 cancel: bool = False):  # fmt: skip
        host_ms = (2.0, 4.0) if slow else (2.0, 2.0)
        serving = RankServing(2, "async", _costs(2, host_ms), ALL_REDUCES, message_s=message_ms * MS, rule=rule,
                              model=_model())  # fmt: skip
        come: Request | int = 0 if cancel else Request([2, 7, 1, 8], 6, stop_token_ids=())
        self.what = "the cancellation" if cancel else "the new request"
        requests = [Request(list(prompt), 12, stop_token_ids=()) for prompt in PROMPTS]
        self.error, self.hangs, self.right = "", False, 0
        try:
            answers = serving.serve(requests, [(when_ms * MS, come)])
            wanted = [toy_tokens(one) for one in (*requests, come) if isinstance(one, Request)]
            for number, tokens in enumerate(wanted):
                found = [each[number] for each in answers if number < len(each)]
                self.right += bool(found) and all(one is not None and one.token_ids == tokens for one in found)
        except DisagreementError as error:
            self.error, self.hangs = str(error), error.hangs
        self.sent = next((one.sent for message in serving.messages for one in message.news), -1)
        self.applied = [host.applied.get(0) for host in serving.hosts]

    @property
    def _key(self) -> tuple:
        return self.error == "", *([] if self.error else self.applied)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Agreed) and self._key == other._key

    def __repr__(self) -> str:
        if self.error:
            steps = [f"rank {rank} before step {step}" if step is not None else f"rank {rank} not yet"
                     for rank, step in enumerate(self.applied)]  # fmt: skip
            return f"{'a deadlock' if self.hangs else 'silent corruption'} ({', '.join(steps)})"
        if self.applied[0] is None:
            return f"{self.what} on no rank"
        return f"{self.what} on both ranks before step {self.applied[0]}"


def try_rule(rule: Rule, when_ms: float = 13.0) -> str:
    """Serve on two ranks, with a request that comes in after `when_ms`, and tell what came of the rule: where the ranks
    agree, or the checker's words."""
    agreed = Agreed(rule, when_ms)
    return agreed.error or f"sent for step {agreed.sent}, applied: {agreed!r}; {agreed.right} of 3 answers are right"


# ---- on GPUs ---------------------------------------------------------------------------------------------------------

# (GPUs, a decode step on the device in ms, idle share of the synchronous and the asynchronous loop in per cent, tokens
# a second of the asynchronous one). The 8B shape on H200, 2026-11-28: docs/performance.md has the commands.
MEASURED = (
    ("one", 5.60, 6.30, 0.05, 5688),
    ("two share it", 4.20, 9.69, 0.07, 7711),
    ("two replicas", 5.71, 7.90, 0.05, 11104),
)


def measured() -> str:
    """What was measured on one GPU and on two, as a table."""
    lines = ["GPUs            a step     idle, sync   idle, async   tokens/s, async"]
    lines += [
        f"{gpus:<12}  {step:>5.2f} ms  {sync:>11.2f} %  {late:>10.2f} %  {tokens:>16,}"
        for gpus, step, sync, late, tokens in MEASURED
    ]
    return "\n".join(lines)

"""Faults of ranks: what makes one of them plan another step than the others, and how that is found.

Each is put into one rank of several that serve the toy model on the virtual clock (`ranks.py`). With the checker every
one of them is a `DisagreementError` before a wrong sum is made. Without it they do what they would do on GPUs: hang, or
give wrong tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..devices.all_reduces import AllReduces, DisagreementError
from ..devices.virtual import Costs
from ..models.toy import VOCABULARY, toy_llama
from ..request import Request, SamplingParams
from ..streams import launch_step
from .faults import replace_part
from .ranks import News, RankServing, may_apply
from .toy import toy_tokens

MS = 1e-3


class RankFault(NamedTuple):
    """name: the fault in a few words. symptom: what comes of it. apply: puts it into ranks that have not yet served."""

    name: str
    symptom: str
    apply: Callable[[RankServing], None]


def _rule(rank: int, kind: str, rule: Callable[[News, int], bool]) -> Callable[[RankServing], None]:
    """One rank has another rule for requests, or for cancellations."""

    def apply(serving: RankServing) -> None:
        def other(news: News, planning: int) -> bool:
            of_kind = (news.request is None) == (kind == "cancel")
            return rule(news, planning) if of_kind else may_apply(news, planning)

        serving.hosts[rank].rule = other

    return apply


def _at_once(news: News, planning: int) -> bool:
    return planning >= news.sent


def _later(news: News, planning: int) -> bool:
    return planning >= news.sent + 2


def other_order(serving: RankServing) -> None:
    host = serving.hosts[-1]

    def take() -> None:
        before = len(host.pending)
        type(host)._take(host)
        host.pending[before:] = host.pending[before:][::-1]

    host._take = take  # type: ignore[method-assign]


def a_stop_of_its_own(serving: RankServing) -> None:
    scheduler = serving.hosts[-1].batcher.scheduler
    commit = scheduler.commit

    def damaged(plan, token_ids):
        result = commit(plan, token_ids)
        for state, _ in result.new:
            if state.number == 0 and len(state.generated) == 4 and scheduler.finish(state, "stop"):
                result.ended.append(state)
        return result

    scheduler.commit = damaged  # type: ignore[method-assign]


def another_limit(serving: RankServing) -> None:
    serving.hosts[-1].batcher.scheduler.max_batch_size -= 1


def a_step_twice(serving: RankServing) -> None:
    def launch(self, slot) -> None:
        launch_step(self.device.streams, slot)
        if slot.step == 4:
            launch_step(self.device.streams, slot)

    replace_part(serving.hosts[-1].batcher, "launch", launch)


def another_seed(serving: RankServing) -> None:
    host = serving.hosts[-1]

    def submit(request: Request) -> None:
        sampling = replace(request.sampling, seed=request.sampling.seed + 1)
        type(host).submit(host, replace(request, sampling=sampling))

    host.submit = submit  # type: ignore[method-assign]


def another_token(serving: RankServing) -> None:
    """As by other rounding: one rank samples another token, which the next step takes from its own device."""
    program: Any = serving.hosts[-1].device.program
    step, steps = program._step, iter(range(1_000_000))

    def damaged(slot, kind) -> None:
        step(slot, kind)
        if next(steps) == 3:
            program.outputs[slot, 0] = (program.outputs[slot, 0] + 1) % VOCABULARY

    program._step = damaged


RANK_FAULTS = (
    RankFault("a cancellation is applied a step early", "one rank has a row less, and other rows in its place",
              _rule(0, "cancel", _at_once)),
    RankFault("a cancellation is applied a step late", "one rank has a row more for a step",
              _rule(-1, "cancel", _later)),
    RankFault("a cancellation does not arrive", "one rank goes on with a request that is gone",
              _rule(-1, "cancel", lambda news, planning: False)),
    RankFault("a request is applied a step early", "one rank prefills while the others decode",
              _rule(0, "request", _at_once)),
    RankFault("a request is applied a step late", "the others prefill while one rank decodes",
              _rule(-1, "request", _later)),
    RankFault("a request does not arrive", "one rank never prefills what the others do",
              _rule(-1, "request", lambda news, planning: False)),
    RankFault("two requests change places", "two requests have each other's rows on one rank", other_order),
    RankFault("one rank sees a stop of its own", "a request goes on without one rank", a_stop_of_its_own),
    RankFault("one rank has another limit", "a request waits on one rank and runs on the others", another_limit),
    RankFault("one rank launches a step twice", "its later all-reduces meet those of other steps", a_step_twice),
    RankFault("one rank has another seed", "it samples other tokens, and goes on from them", another_seed),
    RankFault("one rank samples another token", "its next step begins with it", another_token),
)  # fmt: skip


class RankFinding(NamedTuple):
    """How a fault showed in one run. by: "hang", "corruption" (both by the checker, or a hang that it took no checker
    to find), "tokens", or "" if all was well. detail: what was seen."""

    by: str
    detail: str


def rank_trial(fault: RankFault | None, seed: int, check: bool = True, size: int = 2, mode: str = "async",
               model: Any = None) -> RankFinding:  # fmt: skip
    """Serve the toy model on `size` ranks with a fault, or with none (None), and say how it showed.

    seed: of the requests and times. check: whether the checker watches."""
    draw = np.random.default_rng(seed)
    prompt = lambda length: draw.integers(1, VOCABULARY, length).tolist()  # noqa: E731
    sampled = SamplingParams(temperature=1.0, seed=seed)
    requests = [Request(prompt(int(draw.integers(2, 14))), 16, s, ()) for s in (SamplingParams(), sampled)]
    length = int(draw.integers(2, 7))  # of both, so that they fit into one step
    come = [Request(prompt(length), 8, SamplingParams(), ()) for _ in range(2)]
    costs = []
    for _ in range(size):
        plan, fill, launch, commit = draw.uniform(0.1, 0.6, 4).tolist()
        host = {"plan": plan * MS, "fill": fill * MS, "launch": launch * MS, "commit": commit * MS}
        costs.append(Costs(**host, copy_in=0.05 * MS, step=2 * MS, copy_out=0.05 * MS))
    serving = RankServing(size, mode, costs, AllReduces(2, 0.1 * MS), check, message_s=0.3 * MS, model=model)
    if fault is not None:
        fault.apply(serving)
    when = float(draw.uniform(6, 9)) * MS
    try:
        served = serving.serve(requests, [(when, come[0]), (when, come[1]), (when + 14 * MS, 0)])
    except DisagreementError as error:
        return RankFinding("hang" if error.hangs else "corruption", str(error))
    for rank, completions in enumerate(served):
        expected = [toy_tokens(request) for request in (*requests, *come)]
        for number, completion in enumerate(completions):
            found = [] if completion is None else completion.token_ids
            cancelled = completion is not None and completion.finish_reason == "cancelled"
            if found != expected[number][: len(found) if cancelled else None]:
                return RankFinding("tokens", f"rank {rank}, request {number}: {found}, expected {expected[number]}")
        if len(completions) != len(expected):
            return RankFinding("tokens", f"rank {rank} served {len(completions)} of {len(expected)} requests")
    return RankFinding("", "all tokens are right")


def rank_fault_table(seeds: int) -> tuple[str, bool]:
    """All faults of ranks as a Markdown table, and whether the checker found each with every one of the seeds 0 to
    seeds - 1 (and nothing was found where there is no fault)."""
    lines = ["| fault of one rank | what comes of it | checker | without it: hangs | wrong tokens |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    complete, model = True, toy_llama()
    for fault in (*RANK_FAULTS, None):
        watched = [rank_trial(fault, seed, model=model).by for seed in range(seeds)]
        unwatched = [rank_trial(fault, seed, check=False, model=model).by for seed in range(seeds)]
        found = sum(map(bool, watched))
        complete &= found == (seeds if fault is not None else 0)
        counts = (found, unwatched.count("hang"), unwatched.count("tokens"))
        name, symptom = (fault.name, fault.symptom) if fault is not None else ("(no fault)", "")
        lines.append("| " + " | ".join([name, symptom, *(f"{count} of {seeds}" for count in counts)]) + " |")
    return "\n".join(lines), complete

"""The loop of notebook 01, `continuous_batch`: tried on a toy device, where it cannot hang."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...pictures.picture import Picture
from ..batching import Asked, ToyDevice, continuous_batch
from ..idle import draw_batches
from ..learned import Endless, limited
from ..parts import Case, Exercise

MOST_STEPS = 60  # of a run; the longest right one has a dozen


class Asks(tuple[tuple[int, int, int], ...]):
    """What some requests ask for, each: tokens of its prompt, tokens until its stop token comes, tokens allowed."""

    def __format__(self, spec: str) -> str:
        """As a message has it: "3 + 2, 3 + 1 (stop)"."""
        return ", ".join(f"{a} + {min(b, most)}{' (stop)' * (b < most)}" for a, b, most in self)


class Served:
    """What a loop did with some requests. batches: who was in each step. fault: what it did that no loop may do, in
    words. error: the exception that ended it."""

    def __init__(self, loop: Callable[..., Any], rows: int, budget: int, asks: Asks):
        self.rows, self.budget = rows, budget
        self.requests = [Asked(i, [1] * prompt, most, writes=writes) for i, (prompt, writes, most) in enumerate(asks)]
        self.device, self.fault, self.error = ToyDevice(), "", None
        try:
            returned = limited(loop)(list(self.requests), rows, budget, self._compute)
            if returned is ... and not self.device.batches:
                raise NotImplementedError
        except NotImplementedError:
            raise
        except (Exception, Endless) as error:
            self.error = error
        self.batches = [sorted(batch) for batch in self.device.batches]

    def _compute(self, batch: Any) -> None:
        batch, step = list(batch), len(self.device.batches)
        self.fault = self.fault or self._wrong_with(batch, step)
        if step == MOST_STEPS:
            raise Endless(f"it was stopped after {MOST_STEPS} steps")
        self.device.compute(batch)

    def _wrong_with(self, batch: Sequence[Asked], step: int) -> str:
        """What is wrong with a step, in words; "" for nothing."""
        numbers = [one.number for one in batch]
        for one in batch:
            if numbers.count(one.number) > 1:
                return f"Step {step} has request {one.number} twice."
            if done := _done(one):
                return f"Request {one.number} is done ({done}), and step {step} computes it once more: let it leave."
        if len(batch) > self.rows:
            return f"Step {step} has {len(batch)} requests, and there are {self.rows} rows."
        prompts = [len(one.prompt) for one in batch if not one.token_ids]
        if sum(prompts) > self.budget:
            return (
                f"The prompts of step {step} have {sum(prompts)} tokens, more than the budget of {self.budget}: ask "
                "`fit_budget` how many may join."
            )
        return ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Served) and (self.batches, self.error is None) == (other.batches, other.error is None)

    def __repr__(self) -> str:
        steps = [" ".join(map(str, batch)) or "nobody" for batch in self.batches]
        shown = " | ".join(steps[:6] + ["..."] * (len(steps) > 6))
        ending = "" if self.error is None else f", then {type(self.error).__name__}"
        return f"[{shown}], {len(steps)} step{'s' * (len(steps) != 1)}{ending}"


def _done(one: Asked) -> str | None:
    if one.token_ids and one.token_ids[-1] in one.stop_token_ids:
        return "stop"
    return "length" if len(one.token_ids) >= one.max_new_tokens else None


def _explain(args: tuple[Any, ...], got: Any, want: Served) -> str | None:
    if not isinstance(got, Served):
        return None
    if isinstance(got.error, Endless) and not got.batches:
        return f"Your loop never calls `compute` and does not end: {got.error}."
    if isinstance(got.error, Endless) and set(got.batches[-1]) == {*range(len(got.requests))}:
        return "Nobody ever leaves, so your loop does not end: after each step, keep those who have no finish reason."
    if got.fault:
        return got.fault
    if isinstance(got.error, Endless):
        return f"Your loop does not end: {got.error}. Go on only while anybody waits or runs."
    if got.error is not None:
        return f"Your loop stopped with {type(got.error).__name__}: {got.error}"
    for step, right in enumerate(want.batches):
        mine = got.batches[step] if step < len(got.batches) else []
        if late := [number for number in right if number not in mine]:
            return _explain_missing(got, want, step, mine, late)
        if early := [number for number in mine if number not in right]:
            return f"Step {step} has request {early[0]}, which came later than others: first come, first served."
    return None


def _explain_missing(got: Served, want: Served, step: int, mine: Sequence[int], late: Sequence[int]) -> str:
    who = late[0]
    if step >= len(got.batches):
        return f"Your loop ends before request {who} is done. Go on while anybody waits or runs."
    if step and who in want.batches[step - 1]:
        return f"Request {who} is not done before step {step}, and has left. It goes on until it has a finish reason."
    free = got.rows - len(mine)
    if not free:
        return f"Request {who} came before request {mine[-1]}, and step {step} has the later one: first come first."
    rows = "a row is" if free == 1 else f"{free} rows are"
    return (
        f"In step {step} {rows} empty, and request {who} waits though it fits: it can join as soon as a row is free, "
        "in every step."
    )


def _draw(args: tuple[Any, ...], got: Served, want: Served) -> Picture:
    grids = {"your loop": got.device.grid(got.rows)}
    if got != want:
        grids["the package's"] = want.device.grid(want.rows)
    return draw_batches(grids)


FULL = [(3, 99, length) for length in (3, 9, 2, 5, 8, 2, 4, 3)]
# fmt: off
EXERCISES = {
    "continuous_batch": Exercise(
        continuous_batch, "With {0} rows, a budget of {1} and requests of {2} tokens (prompt + new)", "computes",
        (
            Case((2, 64, Asks([(3, 99, 2), (3, 99, 1)])), "Both requests fit. Request 1 is done after one step."),
            Case((2, 64, Asks([(3, 99, 3), (3, 99, 1), (3, 99, 2)])), "Request 1 leaves, request 2 takes its row."),
            Case((4, 64, Asks(FULL)), "Whoever is done leaves at once, and the next one joins in the step after."),
            Case((4, 64, Asks([(3, 2, 9), (3, 99, 4), (3, 9, 9)])), "A stop token ends a request before its limit."),
            Case((4, 8, Asks([(5, 99, 3), (4, 99, 3), (2, 99, 1), (8, 99, 2)])), "Rows are free, but the prompts "
                 "of a step may have 8 tokens in all: the others join later."),
        ),
        (
            "Two lists, `waiting` and `running`. Each round: who joins, `compute(running)`, who leaves. And the end?",
            "`n = fit_budget([len(r.prompt) for r in waiting], rows - len(running), budget)`: move the first `n`. "
            "After `compute`, keep those whose `finish_reason(...)` is None. Go on `while waiting or running`.",
        ),
        Served, _explain, _draw,
    ),
}
# fmt: on

"""Exercises of notebook 05: `fully_launched`, `step` and `host_buffers`. A step is tried on the virtual clock, where it
cannot hang: it is stopped after so many turns, calls or lines."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from ...batcher import AsyncBatcher
from ...devices.buffers import host_buffers
from ...ordering.races import RaceError
from ...ordering.toy import toy_tokens
from ...pictures.picture import Picture
from ...scheduler import RunState
from ...slot import StepShape
from ..blocks import letter
from ..learned import Endless, YourBatcher, limited
from ..loop import request, toy_batcher
from ..parts import Case, Exercise
from ..rounds import draw_rounds

MOST_CALLS = 2000  # of plan, fill, launch, wait and commit in one run; the longest right one has a hundred
PARTS = ("plan", "fill", "launch", "wait", "commit")


# ---- exercise 1: known without the token -----------------------------------------------------------------------------


def _asked(function: Callable[..., Any], prompt: int, new: int, placed: int, generated: int) -> Any:
    """What the function says of a request: `placed` tokens have their place, `generated` of the new ones have come."""
    tokens = list(range(generated))
    state = SimpleNamespace(num_prompt=prompt, max_tokens=prompt + new, placed=placed, generated=tokens)
    got = function(state)
    return bool(got) if isinstance(got, bool | int) else got


# ---- exercise 2: the step --------------------------------------------------------------------------------------------


class Rounds:
    """What a learner's step did with some requests on the virtual clock.

    turns: for each call of the step, the parts that it called, as (name, step). returned: what each call returned.
    got: the tokens of each request. left: steps that were still in flight when the loop ended. total_ms: until the last
    token was committed. error: the exception that ended it, or None."""

    def __init__(self, step: Callable[[Any], Any], num_slots: int, requests: Sequence[Any]):
        self.turns: list[list[tuple[str, int | None]]] = []
        self.returned: list[Any] = []
        self.error: BaseException | None = None
        self.stays: int | None = None  # a step that was committed and left in `in_flight`
        self.num_slots, calls = num_slots, 0
        batcher = toy_batcher(YourBatcher, step=self._watch(step), num_slots=num_slots, check_races=True)
        self.timeline = batcher.timeline

        def noted(name: str, part: Callable[..., Any], given: tuple) -> Any:
            nonlocal calls
            calls += 1
            if calls > MOST_CALLS:
                raise Endless(f"it was stopped after {MOST_CALLS} calls of {', '.join(PARTS)}")
            number = getattr(given[0], "step", None) if given else None
            self.turns[-1].append((name, number))
            result = part(*given)
            if name == "plan":
                self.turns[-1][-1] = name, getattr(result, "step", None)
            return result

        for name in PARTS:
            part = getattr(batcher, name)
            setattr(batcher, name, lambda *given, name=name, part=part: noted(name, part, given))
        handles = [batcher.submit(each) for each in requests]
        try:
            for _ in range(60):
                if not batcher.turn() or (self.returned and not self.returned[-1]):
                    break
        except (Exception, Endless) as error:
            self.error = error
        ends = [handle.completion for handle in handles]
        self.got = [end.token_ids if end is not None and end.finish_reason != "cancelled" else None for end in ends]
        self.left = [slot.step for slot in batcher.in_flight]
        self.right = self.got == [toy_tokens(each) for each in requests]
        self.total_ms = round(1e3 * max([span.end for span in self.timeline.spans], default=0.0), 6)
        batcher.close()

    def _watch(self, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
        careful = limited(step)

        def watched(batcher: Any) -> Any:
            self.turns.append([])
            returned = careful(batcher)
            if returned is ...:
                raise NotImplementedError
            self.returned.append(returned)
            committed = [step for turn in self.turns for name, step in turn if name == "commit"]
            if self.stays is None:
                self.stays = next((slot.step for slot in batcher.in_flight if slot.step in committed), None)
            # (A batcher gives up if nothing was done: only while nobody waits may it hear that.)
            return bool(returned) or bool(batcher._handles)

        return watched

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rounds) and self._key == other._key

    @property
    def _key(self) -> tuple:
        return self.right, self.error is None, bool(self.left), self.total_ms

    def __repr__(self) -> str:
        told = []
        for turn in self.turns[:3]:
            words = [name if step is None else f"{name} {step}" for name, step in turn[:6]]
            told.append(", ".join(words + ["..."] * (len(turn) > 6)) or "nothing")
        return f"[{' | '.join(told + ['...'] * (len(self.turns) > 3))}] and {self._end}"

    @property
    def _end(self) -> str:
        if isinstance(self.error, Endless):
            return "no end"
        if self.error is not None:
            return f"stopped with {type(self.error).__name__}"
        if not self.right:
            missing = [letter(number) for number, tokens in enumerate(self.got) if tokens is None]
            return f"no end of {' '.join(missing)}" if missing else "wrong tokens"
        return f"all tokens right after {self.total_ms:g} ms"


def _rounds(function: Callable[..., Any], num_slots: int, what: str) -> Rounds | Any:
    requests = [request([1, 2, 3], 4)]
    if what != "one request of 4 tokens":
        requests = [request([1, 2, 3], 6, stop_after=3), request([4, 5], 7), request([9], 5)]
    made = Rounds(function, num_slots, requests)
    if isinstance(made.error, NotImplementedError):
        raise made.error
    return made


def _explain_rounds(args: tuple[Any, ...], got: Any, want: Any) -> str | None:
    if not isinstance(got, Rounds):
        return None
    done = [call for turn in got.turns for call in turn]
    if isinstance(got.error, Endless):
        if got.turns[-1] in ([], [("plan", None)]):
            return (
                "When nothing could be planned and nothing was in flight, your step returned True, so the loop went on "
                "turning. Return True only if a step was launched or committed."
            )
        return f"Your step never came back: {got.error}. One call of `step` launches and commits at most one step each."
    if _newest_first(done):
        return (
            "You commit the newest step first. The oldest one is done first, and its slot is needed first: "
            "`self.in_flight.popleft()`, not `pop()`."
        )
    if got.stays is not None:
        return (
            f"Step {got.stays} is committed and still stands in `self.in_flight`. Take it out when you commit it: "
            "`popleft()`."
        )
    if got.error is not None:
        return _explain_error(got)
    busy = any(name in ("launch", "commit") for name, _ in got.turns[-1])
    if None in got.got and busy and not got.returned[-1]:
        return (
            f"Turn {len(got.returned) - 1} did something and returned {got.returned[-1]!r}, which means that there is "
            "nothing more to do, so the batcher stopped. Return True whenever you have launched or committed a step."
        )
    if got.left:
        steps = " and ".join(map(str, got.left))
        return (
            f"When there was nothing left to plan, step {steps} was still in flight, and nobody committed it: its "
            "tokens are lost. Drain: while `self.in_flight` holds something, wait for the oldest and commit it."
        )
    return _explain_order(got, want, done)


def _newest_first(done: Sequence[tuple[str, int | None]]) -> bool:
    """Whether a step was committed while an older one was in flight."""
    launched: set[int] = set()
    for name, step in done:
        if name == "launch" and step is not None:
            launched.add(step)
        elif name == "commit" and step is not None:
            launched.discard(step)
            if any(older < step for older in launched):
                return True
    return False


def _explain_error(got: Rounds) -> str:
    error = got.error
    held = re.search(r"slot (\d+)(?: still holds|'s host inputs)", str(error))
    if held and got.turns[-1][-1][0] == "fill":
        return (
            f"You fill slot {held[1]} again while it holds a step that is not committed yet. When as many steps are in "
            "flight as there are slots (`len(self.slots)`), wait for the oldest and commit it."
        )
    if isinstance(error, RaceError):
        return (
            "You commit a step before its output ids have surely arrived, so the host may read the tokens of another "
            "step. Call `self.wait(slot)` first: it is the only place where the host waits."
        )
    if re.match(r"slot \d+ holds no step", str(error)):
        return "You commit the same step twice: take a slot out of `self.in_flight` when you commit it."
    if isinstance(error, IndexError):
        return "You take a slot out of `self.in_flight` when there is none. Ask first whether it holds any."
    if isinstance(error, AttributeError) and "NoneType" in str(error):
        return (
            "`self.plan()` returned None: nothing can be planned before another step is committed. Then there is "
            "nothing to fill or launch, but steps may still be in flight."
        )
    return f"{type(error).__name__}: {error}."


def _explain_order(got: Rounds, want: Rounds, done: Sequence[tuple[str, int | None]]) -> str | None:
    if not got.right:
        return "Tokens went to the wrong place. Commit each slot once, after its wait, the oldest first."
    launched = max((len(_in_flight(done[:end])) for end in range(len(done) + 1)), default=0)
    if launched < got.num_slots:
        step = next(number for name, number in done if name == "wait")
        return (
            f"The tokens are right, but at most {launched} of {got.num_slots} slots were in use. You wait for "
            f"step {step} before step {launched + (step or 0)} is launched; so the device idles while the host plans."
        )
    late = got.total_ms - want.total_ms
    return (
        f"The tokens are right, but the run takes {late:g} ms longer than it needs to: the device waits for the host."
    )


def _in_flight(done: Sequence[tuple[str, int | None]]) -> set[int | None]:
    return {step for name, step in done if name == "launch"} - {step for name, step in done if name == "wait"}


def _rounds_picture(args: tuple[Any, ...], got: Rounds, want: Rounds) -> Picture:
    runs = {"your step": got.timeline} if got == want else {"your step": got.timeline, "the package's": want.timeline}
    return draw_rounds({title: timeline for title, timeline in runs.items() if timeline.spans}, args[0])


# ---- exercise 3: the buffers -----------------------------------------------------------------------------------------


class Buffers:
    """The buffers that a function makes: their sizes and kinds, and which of them share memory."""

    def __init__(self, pairs: Any, shape: StepShape):
        self.shape, self.pairs = shape, [tuple(pair) for pair in pairs]
        flat = [tensor for pair in self.pairs for tensor in pair]
        self.kinds = [[(str(tensor.dtype).removeprefix("torch."), tensor.numel()) for tensor in p] for p in self.pairs]
        places = [(tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()) for tensor in flat]
        self.shared = [
            (i, j)
            for j, (low, high) in enumerate(places)
            for i, (a, b) in enumerate(places[:j])
            if low < b and a < high
        ]
        self.clean = all(not tensor.any() for tensor in flat)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Buffers) and self._key == other._key

    @property
    def _key(self) -> tuple:
        return self.kinds, self.shared, self.clean

    def __repr__(self) -> str:
        pairs = [" and ".join(f"{dtype} [{size}]" for dtype, size in pair) for pair in self.kinds]
        same = ", in memory of their own" if not self.shared else ", some in the same memory"
        return f"{len(pairs)} pair{'s' * (len(pairs) != 1)} ({pairs[0] if pairs else 'nothing'}{same})"


def _buffers(function: Callable[..., Any], num_slots: int, rows: int) -> Any:
    shape = StepShape(rows, num_slots, block_size=4, num_blocks=8, max_length=16, prefill_sizes=(8,))
    made = function(shape, False)
    return made if made is ... or made is None else Buffers(made, shape)


def _explain_buffers(args: tuple[Any, ...], got: Any, want: Any) -> str | None:
    if not isinstance(got, Buffers):
        return "Return a list with a pair of tensors for each slot: (inputs, output ids)."
    if len(got.pairs) != len(want.pairs):
        return f"There are {args[0]} slots, and each needs a pair of its own."
    if got.kinds != want.kinds:
        (mine, right) = next((a, b) for a, b in zip(got.kinds, want.kinds, strict=True) if a != b)
        return (
            f"The pair is {mine}, the program on the device wants {right}: int32, `shape.num_inputs` inputs and "
            "`shape.max_batch_size` output ids."
        )
    if got.shared:
        first, second = got.shared[0]
        what = ("inputs", "output ids")
        return (
            f"The {what[first % 2]} of slot {first // 2} and the {what[second % 2]} of slot {second // 2} are the same "
            "memory. When the host fills one slot, it rewrites what the other's copy has not brought over yet. "
            "`[x] * n` does not make n buffers: it names one of them n times."
        )
    return "A new buffer holds zeros: rows that are padding must name block 0."


_BOTH = "three requests, of which A stops early"
# fmt: off
EXERCISES = {
    "fully_launched": Exercise(
        RunState.fully_launched.fget,  # type: ignore[attr-defined]
        "For a prompt of {0} tokens, {1} new ones allowed, {2} placed, and {3} new ones committed,", "says",
        (
            Case((3, 4, 3, 0), "Token 3 has no place yet, and the steps for it and two more are still to be launched."),
            Case((3, 4, 5, 2), "One more step is to come: it places token 5 and samples token 6, the last one."),
            Case((3, 4, 5, 3), "Token 5 has come, but it has no place yet: the step that takes it in is not launched."),
            Case((3, 4, 6, 2), "The step that places token 5 samples token 6, the last of 7. It needs no place: nobody "
                               "attends to it. That the host does not know tokens 5 and 6 yet does not matter."),
            Case((5, 1, 5, 0), "The prompt's own step samples the only new token."),
            Case((3, 4, 0, 3), "It was preempted: all of its tokens have to be placed again."),
        ),
        (
            "The step that gives token number p its place samples token number p + 1. Which one samples the last?",
            "All but the last of `state.max_tokens` tokens need a place. Compare `state.placed` with that.",
        ),
        _asked,
    ),
    "step": Exercise(
        AsyncBatcher.step, "With num_slots={0} and {1},", "did", (
            Case((2, "one request of 4 tokens"), "Plan, fill and launch step N+1 first; then wait for step N."),
            Case((3, _BOTH), "With three slots, three steps can be in flight: use `len(self.slots)`, not 2."),
            Case((1, _BOTH), "With one slot the step must be committed before the next one can be filled."),
            Case((2, _BOTH), "The same with requests that stop early and one that joins."),
        ),
        (
            "Plan, fill and launch as before, and put the slot at the end of `self.in_flight`. Only then ask whether "
            "you have to wait, and for which slot.",
            "Wait if `len(self.in_flight) == len(self.slots)`, or if something is in flight and `plan` is None: "
            "`popleft`, `wait`, `commit`, `return True`. Otherwise return whether there was a plan.",
        ),
        _rounds, _explain_rounds, _rounds_picture,
    ),
    "host_buffers": Exercise(
        host_buffers, "For {0} slots of {1} rows", "makes", (
            Case((2, 4), "Each slot needs inputs and output ids of its own."),
            Case((3, 5), "Take the numbers from `shape`."),
        ),
        (
            "A list of pairs, one for each of `shape.num_slots`. How often is `torch.zeros` called?",
            "In a comprehension it is called anew for each slot: `[(torch.zeros(shape.num_inputs, dtype=torch.int32), "
            "torch.zeros(shape.max_batch_size, dtype=torch.int32)) for _ in range(shape.num_slots)]`.",
        ),
        _buffers, _explain_buffers,
    ),
}
# fmt: on

"""Notebook 05: the rounds of a loop told turn by turn, and puzzles in which one line of a loop is wrong.

The exercises are in `exercises/loop.py`, the batcher that a learner's parts go into in `learned.py`.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from matplotlib.patches import Rectangle

from ..batcher import SyncBatcher
from ..devices.virtual import Costs
from ..models.toy import VOCABULARY, toy_llama
from ..ordering.races import Access, resource_name
from ..ordering.toy import toy_tokens, use_toy_model
from ..pictures.picture import COLORS, TEXT, Picture, figure
from ..request import Request, SamplingParams
from ..scheduler import Committed, StepKind
from ..timeline import Timeline
from . import small
from .blocks import letter
from .learned import MOST_TURNS, Endless, YourBatcher
from .rounds import COSTS, draw_rounds
from .serving import serve

__all__ = ["Committed", "YourBatcher", "draw_rounds", "middle", "request", "serve", "story", "synchronous", "trial"]


def toy_batcher(batcher: Any, **options: Any) -> Any:
    """A batcher of the class `batcher` on the virtual clock that serves the toy model: its next token is a checksum of
    all tokens before it. options: of the batcher, in place of those that are set here."""
    options = {"clock": COSTS, "max_batch_size": 2, "block_size": 4, "max_length": 64, "prefill_tokens": 16, **options}
    server = batcher(toy_llama(), step_s=0.0, **options)
    use_toy_model(server)
    if isinstance(server, YourBatcher):
        device: Any = server.device
        server.use_buffers(getattr(device, "device", device).program)
    return server


# ---- a loop, turn by turn --------------------------------------------------------------------------------------------


class Story(NamedTuple):
    """What became of some requests. turns: what the host did in each turn of the loop, in words. completions, timeline:
    as of the batcher."""

    turns: list[str]
    completions: list[Any]
    timeline: Timeline

    def __str__(self) -> str:
        lines = [f"turn {number}: {words}" for number, words in enumerate(self.turns)]
        for number, completion in enumerate(self.completions):
            tokens = " ".join(map(str, completion.token_ids))
            lines.append(f"{letter(number)}: {tokens} [{completion.finish_reason}]")
        wasted = self.timeline.summary().wasted_tokens
        return "\n".join([*lines, f"{wasted} wasted token{'' if wasted == 1 else 's'}"])


def request(prompt: Sequence[int], new: int, stop_after: int | None = None) -> Request:
    """A request for the toy model. stop_after: its stop token is the one that the toy model writes as number
    `stop_after` (from 1), so it ends there."""
    free = Request(list(prompt), max_new_tokens=new, stop_token_ids=())
    stop = () if stop_after is None else toy_tokens(free)[stop_after - 1 : stop_after]
    return Request(list(prompt), max_new_tokens=new, stop_token_ids=tuple(stop))


def synchronous(requests: Sequence[Request]) -> Timeline:
    """The timeline of the package's synchronous loop, serving the requests on the virtual clock."""
    with toy_batcher(SyncBatcher) as batcher:
        batcher.run(requests)
    return batcher.timeline


def story(
    requests: Sequence[Request],
    step: Callable[[Any], bool] | None = None,
    num_slots: int = 2,
    late: Mapping[int, Request] | None = None,
    cancel: Mapping[int, int] | None = None,
    last: Callable[[Any], bool] | None = None,
    **options: Any,
) -> Story:
    """Serve requests on the virtual clock, and tell what the host did in each turn of the loop.

    step: the learner's; None is the package's asynchronous one. late: for a turn, the request that is submitted before
    it. cancel: for a turn, the number (0 is A) of the request that is cancelled before it. last: called with each
    request that was planned; those for which it says True get a star. options: of the batcher."""
    batcher = toy_batcher(YourBatcher, step=step, num_slots=num_slots, most_turns=MOST_TURNS, **options)
    late, cancel = dict(late or {}), dict(cancel or {})
    with batcher:
        noted = _note_parts(batcher, last)
        handles = [batcher.submit(each) for each in requests]
        turns: list[str] = []
        more = True
        while more:
            words = []
            if len(turns) in late:
                handles.append(batcher.submit(late[len(turns)]))
                words.append(f"{letter(len(handles) - 1)} is submitted")
            if len(turns) in cancel:
                batcher.cancel(handles[cancel[len(turns)]])
                words.append(f"{letter(cancel[len(turns)])} is cancelled")
            noted.clear()
            # (`turn` drains by itself once nobody waits any more: it is a turn like the others here.)
            more = bool(batcher._handles) or bool(batcher._inbox)
            batcher._take_inbox()
            more = batcher.step() or more
            if more or words:
                turns.append(", ".join(words + noted))
        timeline = batcher.timeline
    return Story(turns, [handle.completion for handle in handles], timeline)


def _note_parts(batcher: Any, last: Callable[[Any], bool] | None) -> list[str]:
    """Let a batcher note each part of a step, with what came of it. Returns the list that it writes to."""
    noted: list[str] = []
    scheduler = batcher.scheduler
    plan, commit, preempt = scheduler.plan, scheduler.commit, scheduler._preempt

    def noted_plan() -> Any:
        made = plan()
        rows = [row.state for row in made.rows] if made else []
        names = " ".join(letter(state.number) + "*" * bool(last and last(state)) for state in rows)
        noted.append(f"plan {made.step} ({names})" if made else "nothing to plan")
        return made

    def noted_preempt(state: Any) -> None:
        noted.append(f"{letter(state.number)} is preempted")
        preempt(state)

    def noted_commit(made: Any, token_ids: Sequence[int]) -> Any:
        result = commit(made, token_ids)
        ends = [f"{letter(state.number)} ends ({state.finish_reason})" for state in result.ended]
        wasted = [f"{result.wasted} wasted"] if result.wasted else []
        noted.append(" ".join([f"commit {made.step}", *(f"- {each}" for each in ends + wasted)]))
        return result

    scheduler.plan, scheduler.commit, scheduler._preempt = noted_plan, noted_commit, noted_preempt
    for name in ("launch", "wait"):
        _note_part(batcher, name, noted)
    return noted


def _note_part(batcher: Any, name: str, noted: list[str]) -> None:
    part = getattr(batcher, name)

    def noted_part(slot: Any) -> None:
        noted.append(f"{name} {slot.step}")
        part(slot)

    setattr(batcher, name, noted_part)


# ---- a real model ----------------------------------------------------------------------------------------------------


def middle(timeline: Timeline, steps: int = 3) -> tuple[float, float]:
    """A window (seconds) of some decode steps in the middle of a run."""
    _, _, starts, ends = timeline.lane("compute")
    first = max(1, len(starts) // 2 - steps // 2)
    last = min(len(ends) - 1, first + steps - 1)
    return float(ends[first - 1] - timeline.origin), float(ends[last] - timeline.origin)


# ---- find the missing line -------------------------------------------------------------------------------------------

# Copies are slow and the device is slower than the host: so a missing wait can be seen in most of the puzzles.
SLOW_COPIES = Costs(plan=0.1e-3, fill=0.1e-3, launch=0.05e-3, commit=0.1e-3, copy_in=0.8e-3, step=3e-3, copy_out=0.8e-3)
LENGTHS = ((37, 7), (5, 12), (9, 11), (3, 10), (12, 12), (4, 9), (6, 12), (2, 11))  # tokens of the prompt, and new ones


def puzzle_requests() -> list[Request]:
    """Eight requests: A's prompt is cut into chunks, C and F sample, D and G stop early. The pool is too small for all
    that run, so some are preempted."""
    requests = []
    for number, (size, new) in enumerate(LENGTHS):
        prompt = [(7 * number + 3 * i) % VOCABULARY for i in range(size)]
        sampling = SamplingParams(temperature=1.0, seed=number) if number in (2, 5) else SamplingParams()
        plain = Request(prompt, new, sampling, stop_token_ids=())
        stop = toy_tokens(plain)[3:4] if number in (3, 6) else ()
        requests.append(Request(prompt, new, sampling, stop_token_ids=tuple(stop)))
    return requests


class Trial(small.Small):
    """What came of a loop with some parts replaced. right: whether tokens, order and blocks are as they should be."""

    right: bool

    def __repr__(self) -> str:
        return f"<Trial: {self.title}>"


def trial(**parts: Any) -> Trial:
    """Serve eight requests with the asynchronous loop and these parts (of `YourBatcher`) in place of its own, twice: as
    it is, for the tokens and the blocks of the KV cache, and watched by the race checker."""
    requests = puzzle_requests()
    plain = _run(requests, parts)
    watched = _run(requests, parts, check_races=True)
    want = [toy_tokens(request) for request in requests]
    got = [[] if completion is None else completion.token_ids for completion in plain.completions]
    wrong = [letter(number) for number, (a, b) in enumerate(zip(got, want, strict=True)) if a != b]
    tokens = f"wrong in {' '.join(wrong)}" if wrong else "right in all requests"
    race = watched.races[0] if watched.races else None
    checker = "nothing"
    if race is not None:
        second, first = (_spoken(access) for access in (race.second, race.first))
        what = resource_name(race.resource)
        checker = f"{second} {race.second.kind} {what}, {first} {race.first.kind} it too, and nothing orders them"
    if plain.error:
        tokens += f"; the loop stopped with {plain.error}"
    drawn = _draw_trial(got, want, tokens, checker, plain.blocks)
    picture = Trial(drawn.figure, f"tokens: {tokens}. Race checker: {checker}. Blocks: {plain.blocks}", drawn.axes)
    picture.right = not wrong and race is None and plain.blocks == "right" and not plain.error
    return picture


def _spoken(access: Access) -> str:
    """An access in few words, as "copy_in 3 on H2D"."""
    name = "step" if isinstance(access.name, StepKind) else access.name
    return f"{name} {access.step} on {access.lane}"


def _run(requests: Sequence[Request], parts: Mapping[str, Any], check_races: bool = False) -> Any:
    batcher = toy_batcher(
        YourBatcher, clock=SLOW_COPIES, max_batch_size=3, num_blocks=12, check_races=check_races,
        most_turns=MOST_TURNS, **parts,
    )  # fmt: skip
    if check_races:
        batcher.device.checker.collect = True
    handles = [batcher.submit(request) for request in requests]
    batcher.cancel(batcher.submit(Request([1, 2, 3], max_new_tokens=5)))  # cancelled while it waits: it has no blocks
    error = ""
    try:
        while batcher.turn():
            pass
    except Endless as endless:
        error = str(endless)
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    kv, races = batcher.kv, list(getattr(batcher.device, "races", ()))
    blocks = "right"
    if not error and (kv.num_free != kv.num_blocks or len(set(kv.free)) != kv.num_free):
        blocks = f"wrong: {kv.num_free} blocks lie on kv.free, {len(set(kv.free))} different ones, of {kv.num_blocks}"
    completions = [handle.completion for handle in handles]
    batcher.close()
    return SimpleNamespace(completions=completions, races=races, blocks=blocks, error=error)


def _draw_trial(got: Sequence, want: Sequence, tokens: str, checker: str, blocks: str) -> Picture:
    longest = max(map(len, [*got, *want]))
    picture = figure(9.5, 0.21 * len(want) + 0.8)
    axes: Any = picture.axes
    for row, (mine, right) in enumerate(zip(got, want, strict=True)):
        axes.text(-0.15, row + 0.5, string.ascii_uppercase[row], ha="right", va="center", fontsize=9, fontweight="bold")
        for place in range(max(len(mine), len(right))):
            token = mine[place] if place < len(mine) else None
            good = place < len(right) and token == right[place]
            look = {"facecolor": COLORS["sky"], "edgecolor": "white", "linewidth": 0.8}
            if not good:  # no hatch: it would make the file five times as large
                look = {"facecolor": "white", "edgecolor": COLORS["vermillion"], "linewidth": 1.6, "linestyle": "--"}
            axes.add_patch(Rectangle((place + 0.02, row + 0.08), 0.92, 0.84, **look))
            words = "none" if token is None else str(token)
            weight = "normal" if good else "bold"
            axes.text(place + 0.48, row + 0.5, words, fontsize=7.5, ha="center", va="center", fontweight=weight)
    axes.set(xlim=(-0.3, longest + 0.1), ylim=(len(want), 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    lines = [f"tokens: {tokens}", f"race checker: {checker}", f"blocks of the KV cache: {blocks}"]
    for number, line in enumerate(lines):
        good = line.endswith(("right in all requests", "checker: nothing", "cache: right"))
        axes.annotate(line[:140], (0, 1), (0, 6 + 13 * (2 - number)), xycoords="axes fraction", fontsize=8.5,
                      textcoords="offset points", color=TEXT if good else COLORS["vermillion"],
                      fontweight="normal" if good else "bold", parse_math=False)  # fmt: skip
    return picture

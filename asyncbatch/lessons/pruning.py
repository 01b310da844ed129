"""Notebook 03: requests that a small server serves on the virtual clock, filmed; and a block that is handed on while a
step is in flight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.patches import Rectangle

from ..batcher import AsyncBatcher, SyncBatcher
from ..devices.checked import CheckedDevice, CheckedStream
from ..devices.virtual import Costs, VirtualStream
from ..kv_cache import NOBODY, KVCache
from ..models.toy import toy_llama
from ..ordering import trials
from ..ordering.faults import FAULTS, launching
from ..ordering.races import RaceError
from ..ordering.toy import toy_tokens, use_toy_model
from ..pictures.picture import Picture, figure
from ..request import Request
from .blocks import FREE, RED, Film, color, letter, watch

HANDOVER_MS = (-6.5, 8.0)  # the part of each run that `draw_handover` shows

# ---- runs ------------------------------------------------------------------------------------------------------------


def film(
    work: Sequence[tuple[int, int]], num_blocks: int, prune: Callable[[KVCache, int], int] = KVCache.prune
) -> Film:
    """What the KV cache sees while requests are served in three rows, in blocks of 4 tokens.

    work: for each request the tokens of its prompt, and how many new ones it gets. prune: as of `watch`."""
    requests = [Request(list(range(size)), new, stop_token_ids=()) for size, new in work]
    with toy_server(SyncBatcher, max_batch_size=3, num_blocks=num_blocks) as batcher:
        return watch(batcher, requests, prune)


class Handover(NamedTuple):
    """A run in which B gets the block of A. film: of the run. right: whether all tokens are right. races: what the race
    checker found. wasted: how many tokens were computed after A's end."""

    film: Film
    right: bool
    races: list[RaceError]
    wasted: int

    def __repr__(self) -> str:
        resources: list[Any] = [race.resource for race in self.races]
        hurt = sorted(number for kind, number in resources if kind == "KV block")
        tokens = "right" if self.right else "WRONG"
        return f"tokens {tokens}, races on blocks {hurt or 'none'}, wasted tokens {self.wasted}"


def handover(
    prompt_ms: float,
    slots: int = 2,
    damage: Callable[[Any], None] | None = None,
    prune: Callable[[KVCache, int], int] = KVCache.prune,
) -> Handover:
    """Let the asynchronous loop serve A and B in one row, so that B gets A's row and blocks. A stops by itself.

    prompt_ms: how long the device takes for B's prompt; a decode step takes 3 ms. damage: called with the batcher
    before it starts. prune: as of `watch`."""
    free = Request([5, 6, 7], max_new_tokens=20, stop_token_ids=())
    a = Request([5, 6, 7], max_new_tokens=20, stop_token_ids=tuple(toy_tokens(free)[3:4]))  # its 4th token is a stop
    b = Request(list(range(10, 18)), max_new_tokens=4, stop_token_ids=())
    costs = Costs(step=lambda work: 1e-3 * (prompt_ms if work.kind == "prefill" else 3))
    options = {"clock": costs, "check_races": True, "max_batch_size": 1, "num_blocks": 6, "num_slots": slots}
    with toy_server(AsyncBatcher, **options) as batcher:
        if damage is not None:
            damage(batcher)
        seen = watch(batcher, [a, b], prune)
        right = [completion.token_ids for completion in seen.completions] == [toy_tokens(each) for each in (a, b)]
        return Handover(seen, right, list(batcher.device.races), seen.timeline.summary().wasted_tokens)


def faults_of_blocks() -> str:
    """The planted faults that have to do with blocks: what each does, and what finds it when it is tried."""
    of_blocks = [fault for fault in FAULTS if "block" in fault.name]
    return "\n".join(f"{each.name}: {each.symptom}. Found by: {trials.trial(each, seed=0).by}" for each in of_blocks)


# ---- a block handed on while a step is in flight ---------------------------------------------------------------------


def toy_server(batcher: Any, **options: Any) -> Any:
    """A batcher of the class `batcher` on the virtual clock, with blocks of 4 tokens. It serves the toy model of
    `asyncbatch.ordering.toy`: the next token is a checksum of all tokens before it, read through the block table.
    options: of the batcher, in place of those that are set here."""
    options = {"clock": Costs(), "prefill_tokens": 32, "max_length": 40, "block_size": 4, **options}
    server = batcher(toy_llama(), step_s=0.0, **options)
    use_toy_model(server)
    return server


def give_prompts_a_stream(batcher: Any) -> None:
    """Damage a batcher on the virtual clock: steps that only compute prompts run on a second compute stream, beside the
    others. Later steps wait for them, but they wait only for their inputs. Races are collected, not raised."""
    device = batcher.device
    checked = isinstance(device, CheckedDevice)
    second: Any = VirtualStream(device.device if checked else device, 1)
    second.name = "second"
    if checked:
        device.checker.add_lane(second.name)
        device.checker.collect = True
        second = CheckedStream(device, second)

    def edit(calls: dict[str, Callable[[], Any]], slot: Any, batcher: Any) -> None:
        if slot.plan.passes == "prefill":
            _, compute, d2h = device.streams
            calls["wait inputs_ready"] = lambda: second.wait_event(slot.inputs_ready)
            calls["step"] = lambda: second.launch(slot.command, slot.index)
            calls["record step_done"] = lambda: second.record_event(slot.step_done)
            calls["wait step_done"] = lambda: [stream.wait_event(slot.step_done) for stream in (compute, d2h)]

    launching(edit)(batcher)


class Write(NamedTuple):
    """A step that writes into a block: for which request (owner), what (words), and when (start, end, in ms). wasted:
    whether the request had already ended. beside: whether it runs on a second stream."""

    step: int
    owner: int
    words: str
    start: float
    end: float
    wasted: bool
    beside: bool


def writes_of(film: Film, block: int) -> list[Write]:
    """The steps of a film that wrote `block`, in order of their starts."""
    pruned_in = {owner: frame.step for frame in film.frames for owner in frame.pool.pruned}
    prefill = {step.step for step in film.timeline.steps if step.kind == "prefill"}
    _, steps, starts, ends = film.timeline.lane("compute")
    two_streams = bool((starts[1:] < ends[:-1]).any())
    writes = []
    for step, start, end in zip(steps.tolist(), 1e3 * starts, 1e3 * ends, strict=True):
        for owner, position, blocks in film.writes[step]:
            if block in blocks:
                wasted = step > pruned_in.get(owner, step)
                words = f"{letter(owner)}'s prompt" if step in prefill else f"{letter(owner)}'s token {position}"
                words += ", wasted" if wasted else ""
                writes.append(Write(step, owner, words, start, end, wasted, two_streams and step in prefill))
    return writes


def draw_handover(runs: Mapping[str, Handover], block: int) -> Picture:
    """What the host says of one block, and which steps write into it on the device, around the moment when its first
    owner is pruned (time 0). A step is hatched if its token is wasted: its request has been pruned meanwhile."""
    all_writes = {title: writes_of(run.film, block) for title, run in runs.items()}
    tall = {title: 2.6 + 0.85 * any(write.beside for write in writes) for title, writes in all_writes.items()}
    picture = figure(10, 0.7 + 0.52 * sum(tall.values()))
    axes: Any = picture.axes
    axes.set(xlim=HANDOVER_MS, ylim=(sum(tall.values()) - 0.3, 0))
    top, ticks, captions = 0.0, {}, []
    for title, writes in all_writes.items():
        changes = [(1e3 * when, owner) for when, changed, owner in runs[title].film.changes if changed == block]
        pruned = next(when for when, owner in changes if owner == NOBODY)
        axes.text(HANDOVER_MS[0], top + 0.22, title, fontsize=10, fontweight="bold", va="center", parse_math=False)
        axes.text(0, top + 0.42, f"{letter(changes[0][1])} is pruned", fontsize=8.5, ha="center", va="center")
        axes.plot([0, 0], [top + 0.55, top + tall[title] - 0.4], ":", color="black", lw=1.2)
        ticks |= {top + 1: f"host: block {block} is of", top + 1.85: "compute stream writes"}
        ends = [when for when, _ in changes[1:]] + [pruned + HANDOVER_MS[1]]
        for (when, owner), end in zip(changes, ends, strict=True):
            _bar(axes, top + 0.7, when - pruned, end - pruned, owner, "" if owner == NOBODY else letter(owner))
        for write in writes:
            y = top + (2.4 if write.beside else 1.55)
            words = f"step {write.step}\n{write.words}"
            _bar(axes, y, write.start - pruned, write.end - pruned, write.owner, words, write.wasted)
            ticks |= {y + 0.3: "second stream writes"} if write.beside else {}
        last = max((w for w in writes if w.end - pruned < HANDOVER_MS[1]), key=lambda write: write.end)
        words, tint = f"in block {block} stays:\n{last.words}", RED if last.wasted else "black"
        axes.text(HANDOVER_MS[1] - 0.1, top + 1.85, words, fontsize=8.5, ha="right", va="center", color=tint)
        story = ", ".join(f"{write.words} (step {write.step})" for write in writes)
        captions.append(f"{title}: {story}; in the end {last.words}")
        top += tall[title]
    axes.set_xlabel("virtual time, ms, from the moment of pruning", size=8.5)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(labelsize=8.5, length=0)
    axes.spines[:].set_visible(False)
    picture.title = "; ".join(captions)
    return picture


def _bar(axes: Any, y: float, start: float, end: float, owner: int, words: str, wasted: bool = False) -> None:
    start, end = max(start, HANDOVER_MS[0]), min(end, HANDOVER_MS[1])
    if start >= end:
        return
    look = {"facecolor": color(owner), "edgecolor": "white", "hatch": "xxx" if wasted else "", "lw": 1}
    axes.add_patch(Rectangle((start, y), end - start, 0.6, **(FREE if owner == NOBODY else look)))
    if words:
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
        axes.text((start + end) / 2, y + 0.3, words, fontsize=7.5, ha="center", va="center", bbox=paper)

"""Notebook 03: what a KV cache saves, costs and wastes, and a block that is handed on while a step is in flight.

The pool of blocks and its film are in `blocks.py`, the exercises in `exercises/cache.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.collections import PatchCollection
from matplotlib.patches import Patch, Rectangle

from ..devices.checked import CheckedDevice, CheckedStream
from ..devices.virtual import Costs, VirtualStream
from ..kv_cache import NOBODY
from ..models.toy import toy_llama
from ..ordering.faults import launching
from ..ordering.toy import use_toy_model
from ..pictures.picture import COLORS, TEXT, Picture, figure
from .blocks import FREE, RED, Film, color, letter

EMPTY = {"facecolor": "#FBE9DF", "edgecolor": RED, "hatch": "////", "lw": 0.4}  # places that are reserved in vain
HANDOVER_MS = (-6.5, 8.0)  # the part of each run that `draw_handover` shows

# ---- what a cache saves, costs and wastes ----------------------------------------------------------------------------


def draw_work(num_prompt: int, num_new: int) -> Picture:
    """Which tokens go through the model in each step, without a cache and with one."""
    picture = figure(9, 0.9 + 0.25 * num_new)
    picture.figure.clear()
    panels: Any = picture.figure.subplots(1, 2, sharey=True)
    looks = (
        {"facecolor": COLORS["blue"], "edgecolor": "white", "lw": 1},
        {"facecolor": "white", "edgecolor": COLORS["sky"], "hatch": "///", "lw": 0.5},
    )
    captions = []
    for axes, cached in zip(panels, (False, True), strict=True):
        boxes: tuple[list[Rectangle], list[Rectangle]] = [], []  # computed, read
        for step in range(num_new):
            for token in range(num_prompt + step):
                is_read = cached and step > 0 and token < num_prompt + step - 1
                boxes[is_read].append(Rectangle((token, step), 1, 1))
        for patches, look in zip(boxes, looks, strict=True):
            axes.add_collection(PatchCollection(patches, **look))
        computed, read = map(len, boxes)
        captions.append(
            f"with a cache: {computed} computed, {read} read" if cached else f"without: {computed} computed"
        )
        axes.set_title(captions[-1], loc="left", fontsize=10, color=TEXT)
        tokens, steps = range(num_prompt + num_new - 1), range(num_new)
        axes.set(xlim=(0, len(tokens)), ylim=(num_new, 0))
        axes.set_xticks([token + 0.5 for token in tokens], tokens)
        axes.set_yticks([step + 0.5 for step in steps], steps)
        axes.set_xlabel("token of the text", size=9)
        axes.tick_params(labelsize=8, length=0)
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("step", size=9)
    words = ("goes through the model", "its keys and values are read from the cache")
    handles = [Patch(label=word, **look) for word, look in zip(words, looks, strict=True)]
    picture.figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    picture.title = "; ".join(captions)
    return picture


def draw_bytes(bars: Mapping[str, tuple[float, float]]) -> Picture:
    """One bar for each label: (bytes of weights, bytes of keys and values)."""
    picture = figure(8, 0.55 + 0.75 * len(bars))
    axes: Any = picture.axes
    longest = max(map(sum, bars.values()))
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}
    for number, (label, sizes) in enumerate(bars.items()):
        axes.text(0, number - 0.36, label, fontsize=9, fontweight="bold", va="center", parse_math=False)
        for start, size, tint, hatch, word in (
            (0, sizes[0], COLORS["sky"], "", "weights"),
            (sizes[0], sizes[1], COLORS["orange"], "///", "keys and values"),
        ):
            axes.barh(number, size, 0.4, start, color=tint, edgecolor="white", hatch=hatch)
            inside = size > 0.2 * longest
            x = start + (size / 2 if inside else size + 0.01 * longest)
            words = f"{word}: {size / 1e9:.1f} GB"
            axes.text(x, number, words, fontsize=8.5, ha="center" if inside else "left", va="center", bbox=paper)
    axes.set(xlim=(0, 1.1 * longest), ylim=(len(bars) - 0.65, -0.6), yticks=[])
    axes.set_xlabel("GB", size=9)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e9:g}")
    axes.spines["left"].set_visible(False)
    picture.title = "; ".join(f"{label}: {w / 1e9:.1f} + {kv / 1e9:.1f} GB" for label, (w, kv) in bars.items())
    return picture


def draw_waste(lengths: Sequence[int], reserved: Mapping[str, Sequence[int]]) -> Picture:
    """One panel for each way to lay out a cache, side by side: the tokens of each request, and its empty places.

    lengths: how many tokens each request has. reserved: for each way, how many places each request has."""
    picture = figure(10, 1.2 + 0.17 * len(lengths))
    picture.figure.clear()
    panels: Any = picture.figure.subplots(1, len(reserved), sharey=True)
    captions = []
    for axes, (title, places) in zip(panels, reserved.items(), strict=True):
        rest = [place - length for place, length in zip(places, lengths, strict=True)]
        axes.barh(range(len(lengths)), lengths, 0.8, color=COLORS["blue"])
        axes.barh(range(len(lengths)), rest, 0.8, lengths, **EMPTY)
        counts = f"{sum(places):,} places, {sum(lengths) / sum(places):.0%} used"
        captions.append(f"{title}: {counts}")
        axes.set_title(f"{title}\n{counts}", loc="left", fontsize=9.5, color=TEXT)
        axes.set(xlim=(0, 1.02 * max(map(max, reserved.values()))), ylim=(len(lengths) - 0.4, -0.6), yticks=[])
        axes.set_xlabel("places", size=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_ylabel("requests", size=9)
    looks = (Patch(facecolor=COLORS["blue"], label="holds a token"), Patch(label="reserved, and empty", **EMPTY))
    picture.figure.legend(handles=looks, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    picture.title = "; ".join(captions)
    return picture


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


def draw_handover(films: Mapping[str, Film], block: int) -> Picture:
    """What the books say of one block, and which steps write into it on the device, around the moment when its first
    owner is pruned (time 0). A step is hatched if its token is wasted: its request has been pruned meanwhile."""
    all_writes = {title: writes_of(film, block) for title, film in films.items()}
    tall = {title: 2.6 + 0.85 * any(write.beside for write in writes) for title, writes in all_writes.items()}
    picture = figure(10, 0.7 + 0.52 * sum(tall.values()))
    axes: Any = picture.axes
    axes.set(xlim=HANDOVER_MS, ylim=(sum(tall.values()) - 0.3, 0))
    top, ticks, captions = 0.0, {}, []
    for title, writes in all_writes.items():
        changes = [(1e3 * when, owner) for when, changed, owner in films[title].changes if changed == block]
        pruned = next(when for when, owner in changes if owner == NOBODY)
        axes.text(HANDOVER_MS[0], top + 0.22, title, fontsize=10, fontweight="bold", va="center", parse_math=False)
        axes.text(0, top + 0.42, f"{letter(changes[0][1])} is pruned", fontsize=8.5, ha="center", va="center")
        axes.plot([0, 0], [top + 0.55, top + tall[title] - 0.4], ":", color="black", lw=1.2)
        ticks |= {top + 1: f"the books: block {block} is of", top + 1.85: "compute stream writes"}
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

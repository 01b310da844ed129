"""Notebook 03: what a KV cache saves, costs and wastes. The notebook takes all that it needs from here.

The pool of blocks and its film are in `blocks.py`, the runs in `pruning.py`, the exercises in `exercises/cache.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from matplotlib.collections import PatchCollection
from matplotlib.patches import Patch, Rectangle

from ..batcher import SyncBatcher
from ..devices.virtual import Costs
from ..measure.recording import Recording
from ..ordering.toy import program_of
from ..pictures.picture import COLORS, TEXT, Picture, figure
from ..request import Request
from .blocks import RED, BlockMap, draw_pool
from .pruning import draw_handover, faults_of_blocks, film, give_prompts_a_stream, handover

__all__ = [
    "BlockMap",
    "draw_bytes",
    "draw_handover",
    "draw_pool",
    "draw_waste",
    "draw_work",
    "faults_of_blocks",
    "film",
    "give_prompts_a_stream",
    "handover",
    "keys_in_blocks",
    "keys_of",
    "recorded_8b",
]
CONVERSATIONS = (1630, 914, 702, 533, 455, 380, 291, 240, 187, 122, 84, 39)  # tokens: a few are long, most are short
EMPTY = {"facecolor": "#FBE9DF", "edgecolor": RED, "hatch": "////", "lw": 0.4}  # places that are reserved in vain

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


# ---- a model's own keys, and a recorded GPU --------------------------------------------------------------------------


def keys_of(kept: Any) -> torch.Tensor:
    """The keys of the last layer in a cache of transformers with one text in it: [tokens, heads, head_size]."""
    return kept.layers[-1].keys[0].transpose(0, 1)


def keys_in_blocks(model: Any, prompts: Sequence[Sequence[int]], num_new: int, block_size: int) -> Any:
    """Serve the prompts side by side, and stop in the middle, when the first has `num_new` new tokens.

    Returns these tokens; the block tables, a row for each prompt; and the keys of the last layer, all places of the
    pool in one row: [places, heads, head_size]."""
    options = {"max_batch_size": len(prompts), "max_length": 64, "block_size": block_size}
    with SyncBatcher(model, clock=Costs(), **options) as batcher:
        streams = [batcher.stream(Request(list(each), max_new_tokens=30, stop_token_ids=())) for each in prompts]
        tokens = [next(streams[0]) for _ in range(num_new)]
        tables = batcher.kv.tables(range(len(prompts)))
        keys = program_of(batcher).model.model.layers[-1].self_attn.paged_pools[0]
        return tokens, tables, keys.transpose(1, 2).flatten(0, 1).clone()


def recorded_8b() -> tuple[int, Callable[[int], float]]:
    """Of the 8B model that was recorded on an H200 with 32 rows: the bytes of its weights, and a function that says how
    many ms a decode step took, for so many tokens in all rows together."""
    recording = Recording.load("h200-llama-8b")
    times = recording.step_times(batch_size=32)
    return recording.models["random:llama-8b"]["weight_bytes"], lambda tokens: 1e3 * times("decode", tokens)

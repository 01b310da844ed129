"""Notebook 03: what a KV cache saves, costs and wastes, a block handed on while a step is in flight, and the exercises.

The pool of blocks and its film are in `blocks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.collections import PatchCollection
from matplotlib.patches import Patch, Rectangle

from .. import kv_cache
from ..devices.virtual import Costs, VirtualStream
from ..kv_cache import NOBODY, KVCache
from ..measure import bandwidth as floor
from ..models.toy import toy_llama
from ..ordering import races
from ..ordering.faults import launching
from ..ordering.toy import use_toy_model
from ..pictures.picture import COLORS, TEXT, Picture, figure
from .blocks import FREE, RED, Film, Pool, color, letter, listed, pool_picture
from .parts import Case, Exercise

EMPTY = {"facecolor": "#FBE9DF", "edgecolor": RED, "hatch": "////", "lw": 0.4}  # places reserved for nothing
HANDOVER_MS = (-6.5, 8.0)  # what `draw_handover` shows of each run

# ---- what a cache saves, costs and wastes ----------------------------------------------------------------------------


def draw_work(num_prompt: int, num_new: int) -> Picture:
    """Which tokens go through the model in which step, without a cache and with one."""
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
    """Bars of (bytes of weights, bytes of keys and values), each with its label above it."""
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
    """Panels side by side, one for each way to lay out a cache: of each request its tokens, and its empty places."""
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
    """Damage a batcher on the virtual clock: steps that only compute prompts go to a second compute stream, beside the
    others. Steps after them wait for them; they wait for nothing but their inputs. Races are collected, not raised."""
    device = batcher.device
    checked = isinstance(device, races.CheckedDevice)
    second: Any = VirtualStream(device.device if checked else device, 1)
    second.name = "second"
    if checked:
        device.checker.add_lane(second.name)
        device.checker.collect = True
        second = races.CheckedStream(device, second)

    def edit(calls: dict[str, Callable[[], Any]], slot: Any, batcher: Any) -> None:
        if slot.plan.passes == "prefill":
            _, compute, d2h = device.streams
            calls["wait inputs_ready"] = lambda: second.wait_event(slot.inputs_ready)
            calls["step"] = lambda: second.launch(slot.command, slot.index)
            calls["record step_done"] = lambda: second.record_event(slot.step_done)
            calls["wait step_done"] = lambda: [stream.wait_event(slot.step_done) for stream in (compute, d2h)]

    launching(edit)(batcher)


class Write(NamedTuple):
    """A step on the device that writes a block: for which request, what, and when (ms). beside: on a second stream."""

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
    found = []
    for step, start, end in zip(steps.tolist(), 1e3 * starts, 1e3 * ends, strict=True):
        for owner, position, blocks in film.writes[step]:
            if block in blocks:
                wasted = step > pruned_in.get(owner, step)
                words = f"{letter(owner)}'s prompt" if step in prefill else f"{letter(owner)}'s token {position}"
                words += ", wasted" if wasted else ""
                found.append(Write(step, owner, words, start, end, wasted, two_streams and step in prefill))
    return found


def draw_handover(films: Mapping[str, Film], block: int) -> Picture:
    """What the books said of one block, and which steps wrote it on the device, about the time when its first owner was
    pruned: time 0. A step that computes for a request pruned meanwhile is hatched: its token is wasted."""
    writes = {title: writes_of(film, block) for title, film in films.items()}
    tall = {title: 2.6 + 0.85 * any(write.beside for write in found) for title, found in writes.items()}
    picture = figure(10, 0.7 + 0.52 * sum(tall.values()))
    axes: Any = picture.axes
    axes.set(xlim=HANDOVER_MS, ylim=(sum(tall.values()) - 0.3, 0))
    top, ticks, captions = 0.0, {}, []
    for title, found in writes.items():
        changes = [(1e3 * when, owner) for when, changed, owner in films[title].changes if changed == block]
        pruned = next(when for when, owner in changes if owner == NOBODY)
        axes.text(HANDOVER_MS[0], top + 0.22, title, fontsize=10, fontweight="bold", va="center", parse_math=False)
        axes.text(0, top + 0.42, f"{letter(changes[0][1])} is pruned", fontsize=8.5, ha="center", va="center")
        axes.plot([0, 0], [top + 0.55, top + tall[title] - 0.4], ":", color="black", lw=1.2)
        ticks |= {top + 1: f"the books: block {block} is of", top + 1.85: "compute stream writes"}
        ends = [when for when, _ in changes[1:]] + [pruned + HANDOVER_MS[1]]
        for (when, owner), end in zip(changes, ends, strict=True):
            _bar(axes, top + 0.7, when - pruned, end - pruned, owner, "" if owner == NOBODY else letter(owner))
        for write in found:
            y = top + (2.4 if write.beside else 1.55)
            words = f"step {write.step}\n{write.words}"
            _bar(axes, y, write.start - pruned, write.end - pruned, write.owner, words, write.wasted)
            ticks |= {y + 0.3: "second stream writes"} if write.beside else {}
        last = max((w for w in found if w.end - pruned < HANDOVER_MS[1]), key=lambda write: write.end)
        words, tint = f"in block {block} stays:\n{last.words}", RED if last.wasted else "black"
        axes.text(HANDOVER_MS[1] - 0.1, top + 1.85, words, fontsize=8.5, ha="right", va="center", color=tint)
        told = ", ".join(f"{write.words} (step {write.step})" for write in found)
        captions.append(f"{title}: {told}; in the end {last.words}")
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


# ---- exercise 2: the place of a token --------------------------------------------------------------------------------

# Rows 0, 1 and 2 are requests A, B and C; below, how many tokens each has.
TABLES = np.array([[1, 2, 5, 7], [3, 4, 0, 0], [6, 8, 9, 0]])
LENGTHS = (14, 6, 11)


def _plain_place(function: Callable[..., Any], *args: Any) -> Any:
    """The learner's answer, with plain numbers instead of NumPy's, which read badly."""
    got = function(*args)
    if isinstance(got, tuple | list):
        return tuple(int(part) if isinstance(part, np.integer) else part for part in got)
    return int(got) if isinstance(got, np.integer) else got


def _place_pool(tables: np.ndarray, size: int) -> Pool:
    held = {row: [block for block in table if block] for row, table in enumerate(tables.tolist())}
    return Pool(11, size, held, dict(enumerate(LENGTHS)))


def _explain_place(args: tuple[Any, ...], got: Any, want: Any) -> str | None:
    """What the learner's index hits, in the learner's terms."""
    tables, row, position, size = args
    who, entry, block, offset = letter(row), position // size, want // size, want % size
    if got == (block, offset):
        return "Both parts are right. Make one number of them: every block before this one has room for as many tokens."
    if not isinstance(got, int):
        return "A place is one whole number: it counts along the pool, block after block."
    hit = got // size
    if got == position:
        return (
            f"You took the token's number as its place, as if {who} lay in one piece at the pool's start. That is in "
            f"block {hit}. The table says where: its entry {entry} is block {block}."
        )
    if got == block:
        return f"That is the block. A place counts tokens: block {block} begins at place {block * size}."
    if got == block * size:
        return (
            f"Block {block} is right, but that is its first place. What is left over when {position} is cut by {size}?"
        )
    if hit == block:
        return f"Block {block} is right; the place in it is the remainder, {position} % {size} = {offset}."
    pool = _place_pool(tables, size)
    hurt = next((owner for owner, table in pool.tables.items() if owner != row and hit in table), None)
    sends = f"Your index sends token {position} of request {who} to place {got}, in block {hit}."
    if hurt is not None:
        token = list(pool.tables[hurt]).index(hit) * size + got % size
        return (
            f"{sends} That block belongs to request {letter(hurt)}, whose token {token} lies there; {who} sits in row "
            f"{row}, and entry {entry} of its table is block {block}."
        )
    whose = "belongs to nobody: only padding is written there" if hit == 0 else f"is not the one: it is block {block}"
    return f"{sends} That block {whose}."


def _place_picture(args: tuple[Any, ...], got: Any, want: Any) -> Picture:
    tables, row, position, size = args
    marks = [(want, "black", "right")]
    if isinstance(got, int):
        marks = [(want, "black", "yours, right")] if got == want else [*marks, (got, RED, "yours")]
    return pool_picture(_place_pool(tables, size), f"where token {position} of request {letter(row)} goes", marks)


# ---- exercise 3: prune -----------------------------------------------------------------------------------------------

A, B = 0, 1


class Books(NamedTuple):
    """What a `prune` left behind: what it returned each time, the free blocks, the tables, and each block's owner.
    tokens, pruned: for the picture, as in a `Pool`."""

    returned: list[Any]
    free: list[Any]
    tables: dict[int, list[int]]
    owner_of: list[int]
    tokens: dict[int, int]
    pruned: dict[int, list[int]]

    def __repr__(self) -> str:
        told = [f"free {listed(self.free)}"]
        told += [f"{letter(owner)} has {listed(table)}" for owner, table in self.tables.items() if table]
        told.append(f"owner_of names {listed(dict.fromkeys(letter(o) for o in self.owner_of if o != NOBODY))}")
        return f"[{' | '.join(told)} | returned {listed(self.returned)}]"


def _run_books(prune: Callable[[KVCache, int], Any], _: str, work: Sequence[tuple[str, int, int]]) -> Any:
    """Let requests grow and be pruned, the latter by the learner's function, and give the `Books`."""
    kv, returned = KVCache(num_blocks=8, block_size=4, max_blocks_per_owner=4, max_owners=4), []
    tokens: dict[int, int] = {}
    pruned: dict[int, list[int]] = {}
    for what, owner, count in work:
        if what == "grow":
            kv.allocate(owner, count)
            tokens[owner] = count
            continue
        table = kv.table(owner)
        returned.append(prune(kv, owner))
        if returned[-1] is ...:
            return ...  # an untouched stub
        pruned |= {owner: table} if table else {}
    free = sorted(kv.free) if all(map(_is_block, kv.free)) else kv.free
    tables = {owner: kv.table(owner) for owner in tokens}
    return Books(returned, free, tables, kv.owner_of.tolist(), tokens, pruned)


def _is_block(thing: Any) -> bool:
    return isinstance(thing, int | np.integer)


def _explain_books(args: tuple[Any, ...], got: Any, want: Any) -> str | None:
    """The first thing that is wrong in the books, and what it would do to a server."""
    if not isinstance(got, Books):
        return None
    if not all(map(_is_block, got.free)):
        return "`kv.free` is a list of block numbers, and now something else lies on it: `extend` adds them one by one."
    held = {block: owner for owner, table in got.tables.items() for block in table}
    twice = [block for block in got.free if got.free.count(block) > 1]
    both = [block for block in held if block in got.free]
    lost = [block for block in range(1, 9) if block not in held and block not in got.free]
    if twice:
        return f"Block {twice[0]} lies on `kv.free` twice: the next two requests would both get it and write into it."
    if both:
        owner = letter(held[both[0]])
        if held[both[0]] not in got.pruned:
            return (
                f"You gave block {both[0]} back, which {owner} still uses. A request's blocks need not stand side by "
                "side: give back those in its table, and no others."
            )
        return (
            f"Block {both[0]} is free, and {owner}'s table still lists it. Prune {owner} again (a request can finish "
            "and be cancelled in one step), and two requests get the same block."
        )
    if lost:
        return (
            f"Block {lost[0]} is lost: it is in no table and not on `kv.free`, so nobody can have it again. Read the "
            "table before you drop it, and give back every block in it."
        )
    wrong = [block for block in range(1, 9) if got.owner_of[block] != want.owner_of[block]]
    if wrong:
        return (
            f"`kv.owner_of[{wrong[0]}]` still names {letter(got.owner_of[wrong[0]])}, though the block is free. All "
            "books must say the same: set it to NOBODY."
        )
    if got.returned != want.returned:
        return "The books are right. Return how many blocks went back: 0 for an owner that has none."
    return None


def _books_picture(args: tuple[Any, ...], got: Any, want: Any) -> Picture:
    pool = Pool(8, 4, got.tables, got.tokens, pruned=got.pruned, free=got.free)
    return pool_picture(pool, "the pool after your prune")


# fmt: off
EXERCISES = {
    "kv_bytes": Exercise(
        floor.kv_bytes, "With layers={0}, kv_heads={1}, head_size={2}, number_bytes={3}", "says",
        (
            Case((1, 1, 64, 4), "One layer, one head: a key of 64 numbers and a value of 64 numbers, 4 bytes each.", (
                (256, "You count the keys only. Each token leaves a key and a value."),
                (128, "That is how many numbers there are. Each takes 4 bytes."),
                (64, "That is one key, in numbers. Each token leaves a key and a value, of 4 bytes a number."),
                (4096, "Right in bits: a byte is 8 of them."),
            )),
            Case((30, 1, 64, 4), "Every layer has keys and values of its own: 30 layers keep 30 times as much.", (
                (512, "You count one layer. Each of the 30 has keys and values of its own."),
            )),
            Case((30, 3, 64, 4), "Each of the 3 key-value heads keeps a key and a value of its own.", (
                (15360, "You count one head. Each of the 3 key-value heads keeps a key and a value of its own."),
            )),
            Case((32, 8, 128, 2), "This model's numbers have 2 bytes (bfloat16).", (
                (262144, "That is with 4 bytes a number. This model's numbers have 2: use `number_bytes`."),
            )),
        ),
        (
            "How many numbers does one head of one layer keep for a token? It keeps two things.",
            "A key and a value are `2 * head_size` numbers. Multiply by heads, layers, and bytes of a number.",
        ),
    ),
    "place": Exercise(
        kv_cache.place, "For token {2} of the request in row {1}, with blocks of {3} tokens,", "says",
        (
            Case((TABLES, 0, 2, 4), "Entry 2 // 4 = 0 of row 0's table is block 1, which begins at place 4."),
            Case((TABLES, 0, 9, 4), "Entry 9 // 4 = 2 of row 0's table is block 5, which begins at place 20."),
            Case((TABLES, 1, 4, 4), "Tokens 0 to 3 fill the first block; token 4 is the first in the next, block 4."),
            Case((TABLES, 2, 10, 4), "Entry 10 // 4 = 2 of row 2's table is block 9, which begins at place 36."),
            Case((TABLES, 1, 13, 8), "With blocks of 8, entry 13 // 8 = 1 is block 4, which begins at place 32."),
        ),
        (
            "First the entry of the table: how many full blocks are before this token? `position // block_size`.",
            "`tables[row, entry]` is the block. It begins at `block * block_size`, and the token lies "
            "`position % block_size` places further on.",
        ),
        answer=_plain_place, explain=_explain_place, picture=_place_picture,
    ),
    "prune": Exercise(
        KVCache.prune, "When {0},", "left this:",
        (
            Case(("A has 2 blocks, B has 2, and B is pruned", (("grow", A, 8), ("grow", B, 5), ("prune", B, 0))),
                 "B's blocks must be free, nobody's, and out of B's table; A's stay as they are."),
            Case(("A has 2 blocks, B has none, and B is pruned", (("grow", A, 8), ("prune", B, 0))),
                 "A request can be cancelled while it waits. It has no table to drop: return 0 and touch nothing."),
            Case(("B is pruned twice", (("grow", A, 8), ("grow", B, 5), ("prune", B, 0), ("prune", B, 0))),
                 "The second time there is nothing left to give: return 0 and touch nothing."),
            Case(("A and B grew in turns, and A is pruned",
                  (("grow", A, 4), ("grow", B, 4), ("grow", A, 8), ("grow", B, 8), ("prune", A, 0))),
                 "A's table is 1, 3 and B's is 2, 4: give back what A's table lists."),
        ),
        (
            "Read the table first, while it is there. If it is empty, there is nothing to do.",
            "`kv.owner_of[blocks] = NOBODY`, `kv.free.extend(blocks)` and `kv.drop_table(owner)`, if there are blocks; "
            "and in any case `return len(blocks)`.",
        ),
        answer=_run_books, explain=_explain_books, picture=_books_picture,
    ),
}
# fmt: on

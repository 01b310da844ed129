"""Notebook 03: the pool of KV blocks as a picture, and as a film over the steps of a batcher.

`draw_pool` shows one moment. `watch` lets a batcher serve requests and notes what the books of its KV cache do, and a
`BlockMap` shows that frame by frame.
"""

from __future__ import annotations

import html
import io
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from ..kv_cache import NOBODY, KVCache, blocks_for
from ..pictures.picture import COLORS, TEXT, Picture, figure
from ..request import Request
from .idle import REQUEST_COLORS
from .parts import slider, with_widget

RED, GREY = COLORS["vermillion"], "#555555"
FREE = {"facecolor": "#F4F4F4", "edgecolor": "#C8C8C8", "hatch": "////", "lw": 0}  # a block without an owner
DARK = {COLORS[color] for color in ("blue", "green", "vermillion")}  # text on these is white
COLUMNS = 6  # blocks side by side
LIVE_WIDTH, LIVE_DPI = 8.4, 110  # of a frame that follows a slider: inches, and pixels per inch


def letter(owner: int) -> str:
    """The name of request number `owner` in pictures: A, B, ..., and from 26 on its number."""
    return chr(ord("A") + owner) if 0 <= owner < 26 else f"#{owner}"


def color(owner: int) -> str:
    """The colour of request number `owner`."""
    return COLORS[REQUEST_COLORS[owner % len(REQUEST_COLORS)]]


def ink(owner: int) -> str:
    """The colour of text that stands on the colour of `owner`."""
    return "white" if color(owner) in DARK else "black"


def listed(items: Iterable[Any]) -> str:
    """The items as text, with commas between them; "none" if there are none."""
    return ", ".join(map(str, items)) or "none"


# ---- the pool at one moment ------------------------------------------------------------------------------------------


class Pool(NamedTuple):
    """What the books say at one moment.

    tables: the blocks of each owner. tokens: how many tokens of each owner are in the pool. taken, pruned: the blocks
    that each owner got, and gave back, since the moment before. free: the free blocks; None if these are all blocks
    that are in no table, as they should be.
    """

    num_blocks: int
    block_size: int
    tables: Mapping[int, Sequence[int]]
    tokens: Mapping[int, int]
    taken: Mapping[int, Sequence[int]] = {}
    pruned: Mapping[int, Sequence[int]] = {}
    free: Sequence[int] | None = None


def draw_pool(kv: KVCache, tokens: Mapping[int, int]) -> Picture:
    """The pool of a cache, each place with the number of its token. tokens: how many of them each owner has."""
    tables = {owner: kv.table(owner) for owner in tokens}
    held = ", ".join(f"{letter(owner)} has {' '.join(map(str, table))}" for owner, table in tables.items())
    return pool_picture(Pool(kv.num_blocks, kv.block_size, tables, tokens), "", name=f"blocks: {held}")


def pool_picture(
    pool: Pool, title: str, marks: Sequence[tuple[int, str, str]] = (), name: str | None = None
) -> Picture:
    """A pool as a picture of its own. marks: places to point at, as (place, colour, word). name: the picture's text;
    None takes the title."""
    picture = figure(8, 0.55 + 0.2 * bool(title) + 0.72 * blocks_for(pool.num_blocks + 1, COLUMNS), title)
    axes: Any = picture.axes
    _draw_blocks(axes, pool, numbers=True)
    _draw_tables(axes, pool)
    for place, tint, word in marks:
        block, offset = divmod(place, pool.block_size)
        if 0 <= block <= pool.num_blocks:
            x, y = _corner(block)
            x += (offset + 0.5) / pool.block_size
            axes.plot(x, y + 0.71, "o", markersize=17, fillstyle="none", color=tint, markeredgewidth=2.2)
            axes.text(x, y + 1.13, word, color=tint, fontsize=8, ha="center", va="center", fontweight="bold")
    picture.title = name or title
    return picture


def _corner(block: int) -> tuple[float, float]:
    return block % COLUMNS * 1.12, block // COLUMNS * 1.3


def _draw_blocks(axes: Any, pool: Pool, numbers: bool = False) -> None:
    """Every block, block 0 included, as a box of places with its number and its owner's letter above. All boxes that
    look alike are drawn in one call: one by one takes four times as long."""
    owners = {block: owner for owner, table in pool.tables.items() for block in table}
    full: dict[int, list[Rectangle]] = {}
    empty, free = [], []
    for block in range(pool.num_blocks + 1):
        x, y = _corner(block)
        axes.text(x, y + 0.2, str(block), fontsize=7, color=GREY, va="center")
        _draw_heading(axes, pool, block, owners.get(block))
        if block not in owners:
            free.append(Rectangle((x, y + 0.42), 1, 0.58))
            continue
        owner, wide = owners[block], 1 / pool.block_size
        first = list(pool.tables[owner]).index(block) * pool.block_size
        for place in range(pool.block_size):
            box = Rectangle((x + place * wide, y + 0.42), wide, 0.58)
            if first + place >= pool.tokens.get(owner, 0):
                empty.append(box)
                continue
            full.setdefault(owner, []).append(box)
            if numbers:
                middle = x + (place + 0.5) * wide, y + 0.72
                axes.text(*middle, str(first + place), fontsize=7, ha="center", va="center", color=ink(owner), zorder=4)
    for owner, boxes in full.items():
        axes.add_collection(PatchCollection(boxes, facecolor=color(owner), edgecolor="white", lw=0.8))
    axes.add_collection(PatchCollection(empty, facecolor="white", edgecolor="#999999", lw=0.6))
    axes.add_collection(PatchCollection(free, **FREE))
    rows = blocks_for(pool.num_blocks + 1, COLUMNS)
    axes.set(xlim=(-0.05, COLUMNS * 1.12 + 2.6), ylim=(rows * 1.3 - 0.1, -0.05))
    axes.set_axis_off()


def _draw_heading(axes: Any, pool: Pool, block: int, owner: int | None) -> None:
    """Whose block it is or was. A block that has just been handed out or given back gets a rim."""
    x, y = _corner(block)
    was = next((owner for owner, blocks in pool.pruned.items() if block in blocks), None)
    new = any(block in blocks for blocks in pool.taken.values())
    wrong = pool.free is not None and block > 0 and (block in pool.free) == (owner is not None)
    rim = None
    if owner is not None:
        word, rim = letter(owner) + (" + free!" if wrong else " new" if new else ""), "black" if new else None
    elif wrong:
        word = "lost!"
    elif was is not None:
        word, rim = f"was {letter(was)}", RED
    else:
        word = "" if block else "padding"
    look = {"fontweight": "normal", "fontsize": 7, "color": GREY}
    if owner is not None:
        look = {"fontweight": "bold", "fontsize": 9 if len(word) < 4 else 7.5, "color": "black"}
    if wrong or rim == RED:
        look["color"] = RED
    axes.text(x + 1, y + 0.2, word, ha="right", va="center", **look)
    if rim is not None:
        style = {"edgecolor": rim, "lw": 2, "ls": "--" if rim == RED else "-"}
        axes.add_patch(Rectangle((x, y + 0.42), 1, 0.58, fill=False, zorder=3, **style))


def _draw_tables(axes: Any, pool: Pool, waiting: Sequence[int] = ()) -> None:
    x = COLUMNS * 1.12 + 0.1
    axes.text(x, 0.2, "block tables", fontsize=7.5, color=GREY, va="center")
    lines = [f"{letter(owner)}: {' '.join(map(str, table))}" for owner, table in pool.tables.items() if table]
    lines += [f"waiting: {' '.join(map(letter, waiting))}"] if waiting else []
    for number, line in enumerate(lines, 1):
        axes.text(x, 0.25 + 0.37 * number, line, fontsize=8, va="center", family="DejaVu Sans Mono")


# ---- the film --------------------------------------------------------------------------------------------------------


class Refused(NamedTuple):
    """A request that had to wait: `owner` needed `need` blocks. `free` blocks were free, but `kept` of these are kept
    for running requests that grow."""

    owner: int
    need: int
    free: int
    kept: int


class Frame(NamedTuple):
    """The books after the commit of `step`.

    joined: requests that joined the batch since the frame before. refused: requests that had a row but too few blocks.
    waiting: all requests that wait.
    """

    step: int
    pool: Pool
    joined: tuple[int, ...]
    refused: tuple[Refused, ...]
    waiting: tuple[int, ...]

    @property
    def words(self) -> str:
        """What happened since the frame before."""
        sentences = []
        for owner, blocks in self.pool.taken.items():
            sentences.append(f"{letter(owner)} {'joins' if owner in self.joined else 'grows'}: {_counted(blocks)}.")
        for owner, need, free, kept in self.refused:
            are = f"{free} {'is' if free == 1 else 'are'} free"
            are += f", {kept} of them kept so that others can grow" if kept else ""
            sentences.append(f"{letter(owner)} has to wait: it needs {need}, {are}.")
        for owner, blocks in self.pool.pruned.items():
            are = "is" if len(blocks) == 1 else "are"
            sentences.append(f"{letter(owner)} finished and was pruned: {_counted(blocks)} {are} free again.")
        return " ".join(sentences) or "Every request writes into a block that it has."


def _counted(blocks: Sequence[int]) -> str:
    return f"block{'s' if len(blocks) > 1 else ''} {listed(blocks)}"


class Film(NamedTuple):
    """A run as its KV cache saw it.

    frames: one for each commit. changes: each change of a block's owner, as (seconds, block, new owner or NOBODY).
    writes: for each step, (owner, position, blocks that it writes) of its rows. timeline, completions: of the batcher.
    num_free: how many blocks are free at the end.
    """

    frames: list[Frame]
    changes: list[tuple[float, int, int]]
    writes: dict[int, list[tuple[int, int, list[int]]]]
    timeline: Any
    completions: list[Any]
    num_free: int


def watch(batcher: Any, requests: Sequence[Request], prune: Callable[[KVCache, int], int] = KVCache.prune) -> Film:
    """Let a new batcher serve the requests, and note what its scheduler and its books do. prune: called in place of
    `KVCache.prune`."""
    kv, scheduler = batcher.kv, batcher.scheduler
    film = Film([], [], {}, None, [], 0)
    placed: dict[int, Any] = {}  # the RunState of each owner
    taken: dict[int, list[int]] = {}
    pruned: dict[int, list[int]] = {}
    joined: list[int] = []
    refused: list[Refused] = []
    allocate, plan, commit = kv.allocate, scheduler.plan, scheduler.commit

    def changed(blocks: Sequence[int], owner: int) -> None:
        film.changes.extend((batcher.device.now(), block, owner) for block in blocks)

    def watched_allocate(owner: int, num_tokens: int, keep_free: int = 0) -> bool:
        before = kv.table(owner)
        fits = allocate(owner, num_tokens, keep_free)
        new = kv.table(owner)[len(before) :]
        if new:
            taken[owner] = taken.get(owner, []) + new
            joined.extend([] if before else [owner])
            changed(new, owner)
        elif not fits:
            need = blocks_for(num_tokens, kv.block_size) - len(before)
            refused.append(Refused(owner, need, kv.num_free, keep_free))
        return fits

    def watched_prune(owner: int) -> int:
        blocks = kv.table(owner)
        count = prune(kv, owner)
        if blocks:
            pruned[owner] = blocks
            changed(blocks, NOBODY)
        return count

    def watched_plan() -> Any:
        step = plan()
        for state, position, num_tokens, *_ in () if step is None else step.rows:
            placed[state.number] = state
            entries = slice(position // kv.block_size, blocks_for(position + num_tokens, kv.block_size))
            film.writes.setdefault(step.step, []).append((state.number, position, kv.table(state.number)[entries]))
        return step

    def watched_commit(step: Any, token_ids: Sequence[int]) -> Any:
        result = commit(step, token_ids)
        tables = {number: kv.table(number) for number in placed if kv.table(number)}
        tokens = {number: placed[number].placed for number in tables}
        pool = Pool(kv.num_blocks, kv.block_size, tables, tokens, dict(taken), dict(pruned))
        waiting = tuple(state.number for state in scheduler.waiting)
        film.frames.append(Frame(step.step, pool, tuple(joined), tuple(refused), waiting))
        for noted in (taken, pruned, joined, refused):
            noted.clear()  # type: ignore[attr-defined]
        return result

    for owner, watched in ((kv, watched_allocate), (kv, watched_prune), (scheduler, watched_plan),
                           (scheduler, watched_commit)):  # fmt: skip
        setattr(owner, watched.__name__.removeprefix("watched_"), watched)
    completions = batcher.run(requests)
    return film._replace(timeline=batcher.timeline, completions=completions, num_free=kv.num_free)


class BlockMap(Picture):
    """The blocks of the pool over the steps of a film. A notebook shows it frame by frame, with a slider, a box to type
    into and a play button. A still picture shows the frames after the steps in `strip`. Below are all steps."""

    def __init__(self, film: Film, strip: Sequence[int]):
        pool = film.frames[0].pool
        self.frames = film.frames
        self.number = 0  # of the frame shown
        self._drawn: dict[int, bytes] = {}
        shown = [number for number, frame in enumerate(film.frames) if frame.step in strip]
        title = f"{len(film.frames)} steps, {pool.num_blocks} blocks of {pool.block_size} tokens"
        super().__init__(self._draw_strip(shown), title)

    @property
    def words(self) -> str:
        """What happened in the frame that is shown."""
        frame = self.frames[self.number]
        return f"After step {frame.step}: {frame.words}"

    # ---- the static picture ------------------------------------------------------------------------------------

    def _draw_strip(self, numbers: Sequence[int]) -> Figure:
        wide, tall = 10.0, 1.5 * blocks_for(len(numbers), 2) + 2.75
        fig = Figure((wide, tall), facecolor="white")
        for place, number in enumerate(numbers):
            left, top = 0.1 + 5 * (place % 2), tall - 0.1 - 1.5 * (place // 2)
            heading = {"x": left / wide, "va": "top", "color": TEXT}
            fig.text(y=top / tall, s=f"after step {self.frames[number].step}", size=9, weight="bold", **heading)
            fig.text(y=(top - 0.17) / tall, s=textwrap.fill(self.frames[number].words, 82), size=7.5, **heading)
            self._draw_frame(fig.add_axes((left / wide, (top - 1.42) / tall, 4.8 / wide, 0.97 / tall)), number)
        axes: Any = fig.add_axes((0.5 / wide, 0.72 / tall, 9.3 / wide, 1.75 / tall))
        self._draw_overview(axes)
        for number in numbers:
            axes.text(number + 0.5, -0.15, "shown", fontsize=6.5, ha="center", va="bottom", color=TEXT)
        _legend(fig)
        return fig

    def _draw_frame(self, axes: Any, number: int) -> None:
        frame = self.frames[number]
        _draw_blocks(axes, frame.pool)
        _draw_tables(axes, frame.pool, frame.waiting)

    def _draw_overview(self, axes: Any) -> None:
        """Blocks from top to bottom, steps from left to right. A letter marks where a block gets a new owner. A block
        is its owner's in the step in which it is pruned, too: that step still writes into it."""
        num_blocks = self.frames[0].pool.num_blocks
        boxes: dict[int, list[Rectangle]] = {NOBODY: []}
        before: dict[int, int] = {}
        for number, frame in enumerate(self.frames):
            held = [*frame.pool.tables.items(), *frame.pool.pruned.items()]
            owners = {block: owner for owner, table in held for block in table}
            for block in range(1, num_blocks + 1):
                owner = owners.get(block, NOBODY)
                boxes.setdefault(owner, []).append(Rectangle((number, block - 1), 1, 1))
                if owner not in (NOBODY, before.get(block)):
                    look = {"fontsize": 7.5, "fontweight": "bold", "color": ink(owner), "zorder": 4}
                    axes.text(number + 0.5, block - 0.48, letter(owner), ha="center", va="center", **look)
            before = owners
        for owner, patches in boxes.items():
            look = FREE if owner == NOBODY else {"facecolor": color(owner), "edgecolor": "white", "lw": 0.8}
            axes.add_collection(PatchCollection(patches, **look))
        axes.set(xlim=(0, len(self.frames)), ylim=(num_blocks, 0))
        axes.set_xticks([n + 0.5 for n in range(len(self.frames))], [str(frame.step) for frame in self.frames])
        axes.set_yticks([block - 0.5 for block in range(1, num_blocks + 1)], range(1, num_blocks + 1))
        axes.set_xlabel("step", size=8)
        axes.set_ylabel("block", size=8)
        axes.tick_params(labelsize=7, length=0)
        axes.spines[:].set_visible(False)

    # ---- the moving one ----------------------------------------------------------------------------------------

    @cached_property
    def _below(self) -> tuple[np.ndarray, Any]:
        """The part that is the same in all frames, drawn once: its pixels, uint8 [height, width, 4], and its axes."""
        fig = Figure((LIVE_WIDTH, 2.8), facecolor="white", dpi=LIVE_DPI)
        axes = fig.add_axes((0.06, 0.3, 0.92, 0.66))
        self._draw_overview(axes)
        _legend(fig)
        return _pixels(fig), axes

    @cached_property
    def _above(self) -> tuple[Figure, Any]:
        fig = Figure((LIVE_WIDTH, 2.2), facecolor="white", dpi=LIVE_DPI)
        return fig, fig.add_axes((0.02, 0.02, 0.96, 0.96))

    def frame_png(self, number: int) -> bytes:
        """Frame `number` as the bytes of a PNG file. Each frame is drawn only once."""
        if number not in self._drawn:
            fig, axes = self._above
            for artist in [*axes.texts, *axes.patches, *axes.collections]:
                artist.remove()
            self._draw_frame(axes, number)
            below, overview = self._below
            corners = overview.transData.transform([(number, 0), (number + 1, self.frames[0].pool.num_blocks)])
            (left, top), (right, bottom) = np.rint(corners).astype(int)
            column = slice(len(below) - top, len(below) - bottom), slice(left, right)
            framed = below.copy()
            framed[column[0].start - 3 : column[0].stop + 3, left - 3 : right + 3] = 0, 0, 0, 255
            framed[column] = below[column]
            file = io.BytesIO()
            Image.fromarray(np.vstack([_pixels(fig), framed])).save(file, "png", compress_level=1)
            self._drawn[number] = file.getvalue()
        return self._drawn[number]

    @cached_property
    def widget(self) -> Any:
        """A play button, a slider with a box to type into, a line that says what happened, and the frame."""
        import ipywidgets

        size = ipywidgets.Layout(width=f"{LIVE_WIDTH * LIVE_DPI:.0f}px", max_width="100%")
        image = ipywidgets.Image(value=self.frame_png(0), format="png", layout=size)
        words = ipywidgets.HTML(value=self._status())

        def moved(number: float) -> None:
            self.number = int(number)
            image.value, words.value = self.frame_png(self.number), self._status()

        last = len(self.frames) - 1
        control = slider("step", 0, 0, last, moved, step=1)
        play = ipywidgets.Play(min=0, max=last, interval=900, show_repeat=False)
        ipywidgets.link((play, "value"), (control.children[0], "value"))
        return ipywidgets.VBox([ipywidgets.HBox([play, control]), words, image])

    def _status(self) -> str:
        return f'<span role="status">{html.escape(self.words)}</span>'  # a screen reader says it when it changes

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return with_widget(self, super()._repr_mimebundle_())


def _pixels(fig: Figure) -> np.ndarray:
    """A figure as uint8 [height, width, 4]."""
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def _legend(fig: Figure) -> None:
    looks = (
        Patch(facecolor=color(0), edgecolor="white", label="a token (each request has a letter)"),
        Patch(facecolor="white", edgecolor="#999999", label="empty place"),
        Patch(facecolor="white", edgecolor="black", lw=2, label="new"),
        Patch(facecolor="white", edgecolor=RED, ls="--", lw=2, label="pruned in this step"),
        Patch(**FREE, label="free"),
    )
    fig.legend(handles=looks, loc="lower center", ncols=len(looks), frameon=False, fontsize=7.5, labelcolor=TEXT)

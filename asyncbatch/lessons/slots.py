"""Notebook 04: slots and carry-over as pictures, four puzzles, and what slots cost and whom they save from what.

The exercises are in `exercises/slots.py`, the lab of the first section in `lab.py`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from ..batcher import AsyncBatcher
from ..models.toy import toy_llama
from ..ordering.explore import Outcomes, explore
from ..ordering.races import HOST, RaceChecker
from ..pictures.picture import COLORS, Picture, figure
from .lab import Lab
from .rounds import COSTS, SLOT_COLORS, draw_rounds

__all__ = ["draw_carry", "draw_designs", "draw_rounds", "draw_slot_bytes", "draw_turns", "puzzle", "server", "watched"]
WRONG = {"facecolor": "#FBE9DF", "edgecolor": COLORS["vermillion"], "hatch": "////"}
FROM_HOST = "#DDDDDD"

# ---- pictures --------------------------------------------------------------------------------------------------------


def draw_turns(slot_of: Callable[[int, int], int], num_slots: int, num_steps: int = 6) -> Picture:
    """Which slot each step uses, and when: the host fills it while the device computes the step before, the device
    computes, the host commits. A step that is filled into a slot that still holds another one is marked."""
    picture = figure(10, 0.62 * num_slots + 1.1)
    axes: Any = picture.axes
    clashes: list[str] = []
    held: dict[int, tuple[float, int]] = {}  # by slot: until when, and by which step
    crowded = any(slot_of(step, num_slots) == slot_of(step + 1, num_slots) for step in range(num_steps))
    for step in range(num_steps):
        slot = slot_of(step, num_slots)
        until, holder = held.get(slot, (0.0, -1))
        clash = step + 0.4 < until
        # (Where steps follow each other in one slot they stand in two rows, or they would hide each other.)
        top, tall = (slot + 0.08 + 0.42 * (step % 2), 0.4) if crowded else (slot + 0.08, 0.84)
        for start, end, part in ((0.4, 0.95, "fill"), (1.0, 2.0, "compute"), (2.0, 2.38, "commit")):
            color = COLORS[SLOT_COLORS[slot % len(SLOT_COLORS)]]
            alpha = 1 if part == "compute" else 0.55
            look = WRONG if clash else {"facecolor": color, "edgecolor": "white", "alpha": alpha}
            axes.add_patch(Rectangle((step + start, top), end - start, tall, **look))
            words = f"{part} {step}" if part != "commit" else f"c {step}" if crowded else f"commit\n{step}"
            axes.text(step + (start + end) / 2, top + tall / 2, words, fontsize=7.5, ha="center", va="center")
        if clash:
            clashes.append(f"step {step} is filled into slot {slot}, which holds step {holder}")
        held[slot] = (step + 2.38, step)
    axes.set(xlim=(0.2, num_steps + 1.5), ylim=(num_slots, 0))
    axes.set_yticks([slot + 0.5 for slot in range(num_slots)], [f"slot {slot}" for slot in range(num_slots)])
    axes.set_xlabel("time, in steps of the device", fontsize=9)
    axes.tick_params(labelsize=9, length=0)
    picture.title = f"{num_steps} steps in {num_slots} slots: {'; '.join(clashes) or 'no slot is filled too early'}"
    return picture


def draw_carry(
    carry: Sequence[int], outputs: Sequence[int], ids: Sequence[int], got: Any = None, want: Any = None, batch: int = 3
) -> Picture:
    """Where each row's input token comes from: an output of a step before, or the host. Arrows follow `carry`.

    got: the input tokens, as a learner's function gives them; those that are not as in `want` are marked."""
    carry, outputs, ids = ([int(each) for each in part] for part in (carry, outputs, ids))
    got = got.tolist() if isinstance(got, torch.Tensor) else got
    want = got if want is None else want
    picture = figure(9, 2.9)
    axes: Any = picture.axes
    wide = max(len(outputs), len(carry) + 2)
    left = (len(outputs) - len(carry)) / 2
    for index, token in enumerate(outputs):
        slot = index // batch
        _box(axes, index, 0.55, str(token), COLORS[SLOT_COLORS[slot % len(SLOT_COLORS)]])
        axes.text(index + 0.45, 0.42, str(index), fontsize=8, ha="center", va="bottom")
    names = [f"output ids of slot {slot}" for slot in range(-(-len(outputs) // batch))]
    for slot, name in enumerate(names):
        axes.text(slot * batch + 0.05, 0.1, name, fontsize=9, ha="left", va="center", fontweight="bold")
    axes.text(-0.2, 3.2, "ids, from the host", fontsize=9, ha="right", va="center")
    axes.text(-0.2, 2.12, "input ids", fontsize=9, ha="right", va="center", fontweight="bold")
    axes.text(-0.2, 2.5, "carry", fontsize=8, ha="right", va="center")
    for row, index in enumerate(carry):
        x = left + row
        _box(axes, x, 2.98, str(ids[row]), FROM_HOST)
        good = not isinstance(got, list) or row >= len(got) or got[row] == want[row]
        shown = "?" if not isinstance(got, list) or row >= len(got) else str(got[row])
        color = FROM_HOST if index < 0 else COLORS[SLOT_COLORS[index // batch % len(SLOT_COLORS)]]
        _box(axes, x, 1.9, shown, color, None if good else WRONG)
        axes.text(x + 0.45, 2.5, str(index), fontsize=8, ha="center", va="center")
        start, end = ((x + 0.45, 2.96), (x + 0.45, 2.62)) if index < 0 else ((index + 0.45, 1.02), (x + 0.45, 1.88))
        arrow = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, linewidth=1.3, color="black", zorder=5)
        axes.add_artist(arrow)
    axes.set(xlim=(-1.6, wide + 0.2), ylim=(3.5, -0.1), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    computed = got if isinstance(got, list) else "not computed"
    picture.title = f"carry {carry} of outputs {outputs}, ids {ids}: input ids {computed}"
    return picture


def _box(axes: Any, x: float, y: float, words: str, color: str, look: dict | None = None) -> None:
    axes.add_patch(Rectangle((x, y), 0.9, 0.46, **(look or {"facecolor": color, "edgecolor": "white"})))
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.9} if look else None
    axes.text(x + 0.45, y + 0.23, words, fontsize=9.5, ha="center", va="center", bbox=paper)


def draw_designs() -> Picture:
    """Where the sampled token waits for the next step, in three designs."""
    picture = figure(10, 2.3)
    axes: Any = picture.axes
    designs = (
        ("the other slot's outputs", ["51", "52", "53"], "one place a row", "index: slot, row of that step"),
        (
            "a token pool",
            ["11 12 51 _", "21 52 _ _", "31 32 33 53"],
            "all tokens of each request",
            "index: request, position",
        ),
        ("a map of requests", ["A: 51", "B: 52", "C: 53"], "one place a request", "index: request"),
    )
    for number, (title, rows, size, index) in enumerate(designs):
        x = 3.4 * number
        axes.text(x, 0.2, title, fontsize=10, fontweight="bold", va="center")
        for row, words in enumerate(rows):
            color = COLORS["sky"] if number == 0 else COLORS["yellow"] if number == 1 else COLORS["orange"]
            axes.add_patch(Rectangle((x, 0.5 + 0.45 * row), 1.6, 0.42, facecolor=color, edgecolor="white"))
            axes.text(x + 0.8, 0.71 + 0.45 * row, words, fontsize=9, ha="center", va="center")
        axes.text(x, 2.05, f"{size}\n{index}", fontsize=8.5, va="center")
    axes.set(xlim=(-0.1, 10.2), ylim=(2.35, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    picture.title = "; ".join(title for title, *_ in designs)
    return picture


def draw_slot_bytes(server: Any, kv_bytes: int) -> Picture:
    """What the slots of a batcher take on one side, by part, beside the keys and values of one token.

    kv_bytes: of one token of the served model."""
    shape = server.shape
    parts: dict[str, int] = {"block tables": 0, "prompt tokens": 0, "rows": 0}
    for name, part in shape.fields(server.slots[0].inputs).items():
        which = "block tables" if name == "tables" else "prompt tokens" if name.startswith("prefill_") else "rows"
        which = "rows" if name in ("prefill_start", "prefill_count") else which
        parts[which] += part.nbytes
    parts["output ids"] = server.slots[0].output_ids.nbytes
    picture = figure(9, 0.5 * (shape.num_slots + 1) + 0.9)
    axes: Any = picture.axes
    looks = (("sky", ""), ("orange", "///"), ("green", ""), ("vermillion", "..."))
    for number in range(shape.num_slots):
        left = 0.0
        for (_, size), (color, hatch) in zip(parts.items(), looks, strict=True):
            axes.barh(number, size / 1024, 0.6, left, color=COLORS[color], hatch=hatch, edgecolor="white")
            left += size / 1024
        axes.text(left + 1, number, f"{left:.0f} KiB", va="center", fontsize=9)
    axes.barh(shape.num_slots, kv_bytes / 1024, 0.6, color="#999999", edgecolor="white")
    axes.text(kv_bytes / 1024 + 1, shape.num_slots, f"{kv_bytes / 1024:.0f} KiB", va="center", fontsize=9)
    names = [f"slot {number}" for number in range(shape.num_slots)] + ["keys and values\nof one token (8B)"]
    axes.set_yticks(range(shape.num_slots + 1), names)
    axes.set(ylim=(shape.num_slots + 0.6, -0.6), xlim=(0, 1.15 * max(sum(parts.values()), kv_bytes) / 1024))
    axes.set_xlabel("KiB on the host; the device has as much again", fontsize=9)
    handles = [
        Patch(facecolor=COLORS[c], hatch=h, edgecolor="white", label=n) for n, (c, h) in zip(parts, looks, strict=True)
    ]
    picture.figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    picture.title = f"{shape.num_slots} slots of {sum(parts.values()):,} bytes: " + ", ".join(
        f"{name} {size:,}" for name, size in parts.items()
    )
    return picture


# ---- puzzles ---------------------------------------------------------------------------------------------------------


class Puzzle(NamedTuple):
    """A fault to be mended. found: the wrong tokens as they were found, and what that looks like. right: the tokens as
    they should be. hint: what to say about any other answer."""

    found: list[int]
    symptom: str
    right: list[int]
    hint: str


PUZZLES = {
    "moved": Puzzle(
        [51, 52, 17], "B goes on with 51, which is A's, and C with B's 52. A has stopped, and the others moved up.",
        [52, 53, 17], "B's token lies where B sat in step 0: in row 1 of slot 0.",
    ),
    "wrong slot": Puzzle(
        [41, 42, 43], "All three requests go on with tokens of step 0, and repeat themselves.",
        [61, 62, 63], "Step 2 is filled into slot 0, but its input tokens come from step 1, and that one used slot 1.",
    ),
    "placeholder": Puzzle(
        [61, 0, 63], "B goes on with token 0, which nobody wrote. B was left out of a step and came back.",
        [61, 58, 63], "Nothing is carried for B: its last step is committed, so the host knows its token, 58, and must "
        "write that in place of the 0 which once stood for it.",
    ),
    "throw-away": Puzzle(
        [11, 12, 13, 14, 99, 16], "D's fifth prompt token, 15, has become 99: the prompt is not the user's any more.",
        [11, 12, 13, 14, 15, 16], "A chunk in the middle of a prompt samples a token too, and nobody wants it. Send it "
        "to a place that is nobody's: the last column, -1, where `samples` is False.",
    ),
}  # fmt: skip


def puzzle(name: str, answer: Any, carry: Any = None, outputs: Any = None, ids: Any = None) -> Picture:
    """Print whether a learner's answer mends the fault `name`, or before anything is changed, how the fault shows; and
    draw it. carry, outputs, ids: what the answer was made of; without them it is a row of a token pool."""
    found, symptom, right, hint = PUZZLES[name]
    got = answer.flatten().tolist() if isinstance(answer, torch.Tensor) else answer
    got = got[: len(right)] if isinstance(got, list) else got
    if got == right:
        text = f"{name}: mended. {right}"
    elif got == found:
        text = f"{name}: {found}, and {right} would be right.\nHow it was found: {symptom}"
    else:
        text = f"{name}: not yet.\nYou gave: {got!r}.\nExpected: {right!r}.\nWhy: {hint}"
    print("\n".join(textwrap.fill(line, 88) for line in text.splitlines()))
    if carry is not None:
        return draw_carry(carry, outputs, ids, got, right)
    return _draw_row(answer.flatten().tolist() if isinstance(answer, torch.Tensor) else [], right)


def _draw_row(got: Sequence[int], right: Sequence[int]) -> Picture:
    picture = figure(9, 1.0)
    axes: Any = picture.axes
    axes.text(-0.2, 0.33, "D's row of the pool", fontsize=9, ha="right", va="center", fontweight="bold")
    for place, token in enumerate(got):
        good = place >= len(right) or token == right[place]
        color = COLORS["yellow"] if place < len(right) else FROM_HOST
        _box(axes, place, 0.1, str(token), color, None if good else WRONG)
        axes.text(place + 0.45, 0.72, str(place), fontsize=8, ha="center", va="center")
    axes.set(xlim=(-2.2, max(len(right), len(got)) + 0.2), ylim=(0.85, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    picture.title = f"D's row of the pool: {list(got)}"
    return picture


# ---- slots that clash, what they cost, and what nobody sees ----------------------------------------------------------


def clash(launch_step: Callable[[Any, Any], Any]) -> list[int]:
    """What the host reads in the lab for batches 7 and 8, if both are filled into slot 0, one right after the other."""
    lab = Lab("virtual", num_slots=1)
    for number in (7, 8):
        lab.fill(lab.slots[0], number)
        launch_step(lab.streams, lab.slots[0])
    lab.slots[0].outputs_ready.synchronize()
    return [lab.read(lab.slots[0]) for _ in (7, 8)]


def server(**options: Any) -> AsyncBatcher:
    """An asynchronous batcher whose slots have the sizes that `options` ask for. Its device computes nothing."""
    longest = options.get("max_length", 64)
    return AsyncBatcher(toy_llama(max_positions=longest), clock=COSTS, step_s=0.0, **{"prefill_tokens": 256, **options})


def two_graphs(num_streams: int) -> Outcomes:
    """Two steps, each a graph that keeps what it computes in between in the same scratch memory; on one compute stream,
    or on two. Every order that is possible."""

    def program(p: Any) -> None:
        p.cells.update({"result 0": 0, "result 1": 0, "scratch": 0})
        streams = [p.stream("compute"), p.stream("second")][:num_streams]
        for step in (0, 1):
            lane, number = streams[step % num_streams], 10 * (step + 1)
            lane.do(f"write {step}", lambda cells, n=number: cells.update(scratch=n), writes="scratch")
            lane.do(f"read {step}", lambda cells, s=step: cells.update({f"result {s}": cells["scratch"]}),
                    reads="scratch", writes=f"result {step}")  # fmt: skip

    return explore(program)


def watched(first: str, second: str) -> str:
    """What the race checker says of a host that fills a buffer while the copy of another step still reads one.

    first, second: what the two buffers are called. The checker knows names, not addresses."""
    checker = RaceChecker(["H2D"], collect=True)
    checker.access(HOST, "fill", 0, writes=[first])
    checker.access("H2D", "copy_in", 0, reads=[first])
    checker.access(HOST, "fill", 1, writes=[second])
    found = checker.races
    return (
        f"{found[0].second} {found[0].second.kind} {second}, {found[0].first} reads it: a race" if found else "no race"
    )

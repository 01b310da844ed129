"""Notebook 02: orders of a launch, reading without waiting, what was measured on a GPU, and who finds a missing wait.

The lab is in `lab.py`, its orders and pictures in `lab_orders.py` and `lab_pictures.py`, the exercises in
`exercises/streams.py`.
"""

from __future__ import annotations

import ctypes
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from matplotlib.patches import Rectangle

from .. import streams
from ..devices.virtual import Costs
from ..measure import timing
from ..models.toy import toy_llama
from ..ordering import explore, races
from ..ordering.faults import FAULTS
from ..ordering.races import RaceChecker
from ..ordering.trials import trial
from ..pictures import plot
from ..pictures.picture import COLORS, Picture, figure
from .lab import Lab, serve_without_waiting, spend_on_gpu
from .lab import serve as serve_batches
from .lab_orders import program
from .lab_pictures import draw
from .learned import YourBatcher
from .live import Sliders
from .serving import serve

__all__ = [
    "RECORDED_COPIES",
    "RECORDED_DEFAULT_STREAM",
    "RECORDED_ON",
    "Luck",
    "RaceChecker",
    "draw",
    "draw_clock",
    "draw_copies",
    "draw_default_stream",
    "measure_copies",
    "measure_default_stream",
    "orders",
    "plot",
    "serve",
    "server",
    "use",
    "watched",
    "who_finds",
]

# ---- orders, and the real batcher ------------------------------------------------------------------------------------


def orders(
    launch: Callable[[Any, Any], Any], numbers: Sequence[int] = (7,), num_slots: int = 1, waits: bool = True
) -> explore.Outcomes:
    """What can come of a launch, over all orders that its streams and events allow. One batch for each number.

    waits: whether the host waits before it reads."""
    return explore.explore(program(launch, numbers, num_slots, serve_batches if waits else serve_without_waiting))


def server(launch: Callable[[Any, Any], Any], check_races: bool = False) -> YourBatcher:
    """The package's asynchronous batcher with the smallest model that there is, on the virtual clock, where a step
    takes 3 ms and a copy 0.1. `launch(streams, slot)` launches its steps."""
    return YourBatcher(toy_llama(), launch_step=launch, clock=Costs(), check_races=check_races)


def watched(launch: Callable[[Any, Any], Any], requests: Sequence[Any]) -> str:
    """What the race checker says of `server(launch)` serving the requests: "no race", or the first one, in words."""
    batcher = server(launch, check_races=True)
    try:
        batcher.run(requests)
    except races.RaceError as race:
        return textwrap.fill(str(race), 88)
    finally:
        batcher.close()
    return "no race"


# ---- right by luck ---------------------------------------------------------------------------------------------------


class Luck(Sliders):
    """Four batches that are read without waiting. In a notebook, two sliders set the host's other work after each
    launch and the length of a step. These two decide whether what is read is right."""

    numbers, right = (7, 8, 9, 10), (42, 48, 54, 60)
    controls = (("host_ms", "host, ms", 0.0, 100.0, 1.0), ("step_ms", "step, ms", 1.0, 100.0, 1.0))

    def __init__(self, host_ms: float, step_ms: float) -> None:
        self.host_ms, self.step_ms = host_ms, step_ms
        self._update()

    def _update(self) -> None:
        lab = Lab("virtual", 4, {"step": self.step_ms})
        self.read = serve_without_waiting(lab, streams.launch_step, self.numbers, self.host_ms)
        name = f"host busy for {self.host_ms:g} ms, a step takes {self.step_ms:g} ms"
        picture = draw({name: lab}, self.right)
        super().__init__(picture.figure, f"{name}: read {self.read}", picture.axes)


# ---- what was measured on a GPU --------------------------------------------------------------------------------------

# This project measured these in 2026-11, on one NVIDIA H100 with torch 2.11.0+cu130. `measure_copies` and
# `measure_default_stream` measure the same on the reader's GPU.
RECORDED_ON = "recorded on an NVIDIA H100, torch 2.11, 2026-11"


class CopyTime(NamedTuple):
    """A copy of 256 MiB. host_ms: milliseconds until the call returned. done_ms: until the copy was done; None if that
    was not noted."""

    name: str
    host_ms: float
    done_ms: float | None = None


# (Pageable memory the other way is left out: the host waits there too, but for 238 ms on one GPU and 16 on another.)
RECORDED_COPIES = (
    CopyTime("pinned, host to device", 0.02, 4.9),
    CopyTime("pinned, device to host", 0.09),
    CopyTime("pageable, host to device", 12.0),
)
# For (here, there): whether work here waits for work that was launched there earlier.
RECORDED_DEFAULT_STREAM = {
    ("default stream", "torch.cuda.Stream()"): False,
    ("torch.cuda.Stream()", "default stream"): False,
    ("default stream", "cudaStreamCreate"): True,
    ("cudaStreamCreate", "default stream"): True,
}
# PyTorch's own checker, TORCH_CUDA_SANITIZER=1, reports a missing wait between two streams that use the same device
# tensor. It sees neither host buffers nor what happens in the replay of a graph. Which of these faults can it find?
SANITIZER = {
    "a step does not wait for its inputs": "yes, outside of graphs",
    "the copy out does not wait for the step": "yes, outside of graphs",
    "the host does not wait for the output": "no, host memory",
    "one host buffer for all slots": "no, host memory",
}


def measure_copies(mib: int = 256) -> tuple[CopyTime, ...]:
    """The same copies as in `RECORDED_COPIES`, measured on this machine's GPU. All have non_blocking=True."""
    there = torch.zeros(mib << 20, dtype=torch.uint8, device="cuda")
    copies = []
    for name in (copy.name for copy in RECORDED_COPIES):
        here = torch.zeros(mib << 20, dtype=torch.uint8, pin_memory=name.startswith("pinned"))
        target, source = (there, here) if name.endswith("host to device") else (here, there)
        copy = partial(target.copy_, source, non_blocking=True)
        back_s, done_s = timing.time_work(copy, torch.cuda.synchronize)
        copies.append(CopyTime(name, 1e3 * back_s, 1e3 * done_s))
    return tuple(copies)


def measure_default_stream() -> dict[tuple[str, str], bool]:
    """The same as `RECORDED_DEFAULT_STREAM`, measured on this machine's GPU: long work there, then short work here, and
    a look whether the short work is done while the long work still runs."""
    handle = ctypes.c_void_p()
    torch.cuda.check_error(torch.cuda.cudart().cudaStreamCreate(ctypes.addressof(handle)))
    kinds = {
        "default stream": torch.cuda.default_stream(),
        "torch.cuda.Stream()": torch.cuda.Stream(),
        "cudaStreamCreate": torch.cuda.ExternalStream(handle.value),  # type: ignore[arg-type]
    }
    spend, small = spend_on_gpu(), torch.zeros(1, device="cuda")

    def waits(here: torch.cuda.Stream, there: torch.cuda.Stream) -> bool:
        torch.cuda.synchronize()
        with torch.cuda.stream(there):
            spend(100.0)
        with torch.cuda.stream(here):
            small.add_(1)
            done = here.record_event()
        time.sleep(0.02)
        early = done.query()
        torch.cuda.synchronize()
        return not early

    waits(*[kinds["torch.cuda.Stream()"]] * 2)  # the first launch loads the kernel, which can wait for the device
    return {pair: waits(*(kinds[name] for name in pair)) for pair in RECORDED_DEFAULT_STREAM}


def draw_copies(copies: Sequence[CopyTime], where: str) -> Picture:
    """How long it took until the host was back from each call, on a logarithmic axis."""
    picture = figure(8, 2.6, f"256 MiB, non_blocking=True: when is the host back?\n{where}")
    picture.title = f"{len(copies)} copies: when is the host back?"
    axes: Any = picture.axes
    for row, (_, host_ms, done_ms) in enumerate(copies):
        blocked = host_ms > 1
        look = {"color": COLORS["vermillion"], "hatch": "///"} if blocked else {"color": COLORS["sky"]}
        axes.barh(row, host_ms - 0.005, left=0.005, height=0.6, edgecolor="white", **look)
        after = f"{host_ms:.2g} ms" if host_ms < 10 else f"{host_ms:.0f} ms"
        axes.text(
            1.15 * host_ms,
            row,
            f"after {after}: the host waited" if blocked else f"after {after}",
            va="center",
            fontsize=9,
        )
        if done_ms is not None and done_ms > 2 * host_ms:
            axes.plot([done_ms], [row], "D", color="black", markersize=5)
            axes.text(1.2 * done_ms, row, f"the copy is done: {done_ms:.2g} ms", va="center", fontsize=9)
    axes.set(xscale="log", xlim=(0.005, 500), yticks=range(len(copies)), ylim=(len(copies) - 0.4, -0.6))
    axes.set_yticklabels([copy.name for copy in copies], fontsize=9)
    axes.set_xticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
    axes.minorticks_off()
    axes.set_xlabel("milliseconds until the call returned, logarithmic", fontsize=9)
    return picture


def draw_default_stream(measured: Mapping[tuple[str, str], bool], where: str) -> Picture:
    """Long work on a stream, then short work on the default stream: what one often reads, and what was measured.

    measured: as `RECORDED_DEFAULT_STREAM`. where: on which machine."""
    picture = figure(8, 2.9, "Long work on a stream, then short work on the default stream")
    axes: Any = picture.axes
    panels = [("often written", "any stream", True)]
    panels += [(where, there, waits) for (here, there), waits in measured.items() if here == "default stream"]
    for number, (source, there, waits) in enumerate(panels):
        top = 3.1 * number
        axes.text(0, top + 0.5, source, fontsize=9, fontweight="bold", va="center", parse_math=False)
        for row, (name, start, length, color) in enumerate(
            ((there, 1.0, 6.0, "blue"), ("default stream", 7.0 if waits else 1.4, 1.4, "orange"))
        ):
            y = top + 0.95 + row
            axes.text(-0.1, y + 0.45, name, fontsize=9, ha="right", va="center", parse_math=False)
            axes.axhline(y + 0.45, color="#DDDDDD", linewidth=0.6, zorder=0)
            axes.add_patch(Rectangle((start, y), length, 0.9, facecolor=COLORS[color], edgecolor="white"))
            ink = "white" if color == "blue" else "black"
            axes.text(
                start + length / 2,
                y + 0.45,
                "long" if row == 0 else "short",
                color=ink,
                ha="center",
                va="center",
                fontsize=8,
            )
        axes.text(8.7, top + 1.9, "it waits" if waits else "it does NOT wait", va="center", fontsize=9)
    axes.set(xlim=(0, 10.5), ylim=(3.1 * len(panels), 0), yticks=[], xticks=[])
    axes.set_xlabel("time, not to scale", fontsize=9)
    axes.spines[["left"]].set_visible(False)
    return picture


def who_finds(seeds: int = 5) -> dict[str, tuple[int, int]]:
    """Put each fault of `SANITIZER` into the asynchronous batcher, in `seeds` runs, and print who finds it. Returns for
    each fault the number of runs with wrong tokens, and the number in which the race checker found it."""
    model, counts = toy_llama(), {}
    print(f"{'found in how many of ' + str(seeds) + ' runs':40} by tokens  by checker  by the sanitizer")
    for fault in FAULTS:
        if fault.name in SANITIZER:
            tokens = sum(bool(trial(fault, seed, check_races=False, model=model).by) for seed in range(seeds))
            checker = sum(trial(fault, seed, model=model).by == "checker" for seed in range(seeds))
            counts[fault.name] = tokens, checker
            print(f"{fault.name:40} {tokens:9}  {checker:10}  {SANITIZER[fault.name]}")
    return counts


def use(lane: str, number: int, kind: str) -> races.Use:
    """Operation `number` of a lane, which "reads" or "writes"."""
    return races.Use(races.Access(lane, f"operation {number}", None, kind), number)


def draw_clock(
    clock: Mapping[str, int], kind: str, earlier: Sequence[races.Use], racing: Sequence[races.Use], who: str = ""
) -> Picture:
    """A vector clock as a line across the lanes: what is left of it is surely done.

    clock: for each lane, how many operations are surely done. kind: what the new operation does, "reads" or "writes".
    earlier: the operations that used the same resource before. racing: those of them that are marked as races. who:
    whose opinion that is, if it need not be true."""
    longest = max([*clock.values(), *(use.number for use in earlier)]) + 1
    picture = figure(8, 0.36 * len(clock) + 0.9, f"The new operation {kind}. What surely comes before it?")
    axes: Any = picture.axes
    for row, (lane, count) in enumerate(clock.items()):
        axes.text(0.75, row + 0.5, lane, ha="right", va="center", fontsize=9)
        for number in range(1, longest + 1):
            done = number <= count
            use = next((use for use in earlier if (use.lane, use.number) == (lane, number)), None)
            face = COLORS["sky"] if done else "white"
            line = {"edgecolor": "#888888", "linewidth": 0.8, "linestyle": "-" if done else ":"}
            axes.add_patch(Rectangle((number, row + 0.1), 0.92, 0.8, facecolor=face, **line))
            text = str(number) if use is None else f"{number} {use.kind}"
            axes.text(
                number + 0.46,
                row + 0.5,
                text,
                ha="center",
                va="center",
                fontsize=8,
                fontweight="bold" if use else "normal",
            )
            if use is not None and use in racing:
                edge = {"edgecolor": COLORS["vermillion"], "linewidth": 2.5, "fill": False}
                axes.add_patch(Rectangle((number, row + 0.1), 0.92, 0.8, zorder=4, **edge))
                axes.text(longest + 1.1, row + 0.5, f"{who}race with {lane} {number}", va="center", fontsize=9)
        axes.plot([count + 0.96] * 2, [row, row + 1], color="black", linewidth=2.5)
    axes.set(xlim=(0.9, longest + 2.8), ylim=(len(clock), 0), yticks=[], xticks=[])
    axes.set_xlabel("operations of each lane; left of the black line: surely done", fontsize=9)
    axes.spines[:].set_visible(False)
    return picture

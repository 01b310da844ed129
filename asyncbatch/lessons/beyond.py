"""Notebook 08: transformers' own asynchronous batching, and a trace of it to read like a detective.

The grammar's strategies are in `automaton.py`, the capstone in `scoreboard.py`, the exercises in `exercises/beyond.py`.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.patches import Patch, Rectangle

from ..measure.recording import Recording
from ..measure.steps import steps_of
from ..models.load import load_model
from ..models.toy import toy_llama
from ..pictures.picture import COLORS, TEXT, Picture, figure
from ..profile.peers.batcher import TransformersBatcher
from ..profile.traces.events import COPY, D2H, H2D, KERNEL, MEMSET, RUNTIME
from ..profile.traces.files import read_events
from ..profile.traces.read import read_trace
from ..profile.traces.report import TraceReport
from ..request import Request

__all__ = ["draw", "events", "gaps", "recorded", "report", "serve", "short", "steps", "trace_says", "under_way"]

# ---- transformers, on this machine and recorded ----------------------------------------------------------------------

PROMPTS, NEW = ([1, 2, 3], [4, 5], [6], [7, 8]), 32


def serve(config: Any, device: str) -> str:
    """Let transformers serve four short requests as its `ContinuousBatchingConfig` says, and tell what came of it: how
    it ended on a CPU, how idle the device was on CUDA. An error of transformers is told in its own words."""
    if device == "cuda":
        return _on_cuda("sync" if config.use_async_batching is False else "async")
    from transformers import GenerationConfig

    page = "page_size" if hasattr(config, "page_size") else "block_size"  # (as it was called until 5.19)
    small = replace(config, num_blocks=16, max_batch_tokens=32, **{page: 16})  # by default the cache takes what is free
    options = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    try:
        answers = toy_llama().generate_batch(
            [list(prompt) for prompt in PROMPTS],
            generation_config=options,
            continuous_batching_config=small,
            progress_bar=False,
        )
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return f"served {len(answers)} requests, {sum(len(one.generated_tokens) for one in answers.values())} tokens"


@lru_cache(maxsize=1)
def _small_model() -> Any:
    return load_model("random:llama-0.6b", device="cuda")[0]


def _on_cuda(mode: str, attention: str = "auto") -> str:
    requests = [Request(list(prompt), NEW, stop_token_ids=()) for prompt in PROMPTS]
    options: dict[str, Any] = {"max_batch_size": len(PROMPTS), "max_length": 64, "attention": attention}
    with TransformersBatcher(_small_model(), mode=mode, **options) as batcher:
        batcher.run(requests)  # warms up
        done = batcher.run(requests)
        summary = batcher.timeline.summary()
        tokens = sum(len(one.token_ids) for one in done)
        return f"served {len(done)} requests, {tokens} tokens; device idle {summary.idle:.1%}\n{batcher.setting}"


class RecordedRun(NamedTuple):
    """A recorded run of transformers 5.24 on an H200. host_ms, device_ms: what a decode step took, medians. idle: the
    share of the decode steps' time in which the device waited. wasted: tokens that were computed for nothing."""

    shape: str
    rows: int
    mode: str
    host_ms: float
    device_ms: float
    idle: float
    wasted: int

    def __str__(self) -> str:
        what = f"{self.shape:>4}, {self.rows} rows, {self.mode}"
        return (
            f"{what}: host {self.host_ms:.2f} ms, device {self.device_ms:.2f} ms, idle {self.idle:.1%}, "
            f"wasted {self.wasted}"
        )


def recorded(shape: str, rows: int, mode: str) -> RecordedRun:
    """A recorded run of transformers. shape: "0.6b", "1b" or "8b". rows: 1, 8, 32 or 128. mode: "sync" or "async".
    ValueError for anything else."""
    run = _transformers_runs().get((shape, rows, mode))
    if run is None:
        known = ", ".join(f"{size} with {count} rows" for size, count, kind in _transformers_runs() if kind == "sync")
        raise ValueError(f"{shape}, {rows} rows, {mode!r} was not recorded; sync and async there are {known}")
    steps = steps_of(run)
    decode, totals = steps.kind == "decode", steps.totals()
    host, device = (1e-3 * float(np.median(each[decode])) for each in (steps.host_us, steps.device_us))
    return RecordedRun(shape, rows, mode, host, device, totals["idle"], totals["wasted_tokens"])


@lru_cache(maxsize=1)
def _transformers_runs() -> dict[tuple[str, int, str], dict[str, Any]]:
    runs = [run for name in Recording.names() if "sweep" in name for run in Recording.load(name).runs]
    return {
        (run["model"].removeprefix("random:llama-"), run["batch_size"], run["mode"]): run
        for run in runs
        if run["engine"] == "transformers"
    }


# ---- a trace of it ---------------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """One event of a profiler's trace. kind: "call" (of CUDA, by the host), "kernel", "memset", "copy in", "copy out"
    or "copy" (within the device). start, end: microseconds from the first event. launch: the number that a call and
    all that it launched have in common."""

    kind: str
    name: str
    start: float
    end: float
    launch: int

    @property
    def long(self) -> float:
        """Microseconds from start to end."""
        return self.end - self.start


KINDS = {KERNEL: "kernel", MEMSET: "memset", COPY: "copy", H2D: "copy in", D2H: "copy out", RUNTIME: "call"}


def trace_file(name: str) -> Path:
    """The file of a recorded trace: "transformers-async" or "transformers-sync". Each is a run of 4 requests of 16
    prompt and 10 new tokens on an H200; the file says where it is from. ValueError for another name."""
    folder = Path(str(importlib.resources.files(__package__))) / "traces"
    names = sorted(file.name.removesuffix(".json.gz") for file in folder.glob("*.json.gz"))
    if name not in names:
        raise ValueError(f"there is no trace {name!r}; allowed: {', '.join(names)}")
    return folder / f"{name}.json.gz"


@lru_cache(maxsize=2)
def _read(name: str) -> tuple[Event, ...]:
    device, _, runtime, _, names = read_events(trace_file(name), progress=False).columns()
    origin = int(min(device["start"].min(), runtime["start"].min()))
    found = []
    for columns in (device, runtime):
        kinds = columns.get("kind", np.full(len(columns["start"]), RUNTIME))
        for kind, name_of, start, end, launch in zip(
            kinds, columns["name"], columns["start"], columns["end"], columns["correlation"], strict=True
        ):
            times = (1e-3 * (int(start) - origin), 1e-3 * (int(end) - origin))
            found.append(Event(KINDS[int(kind)], names[name_of], *times, int(launch)))
    return tuple(sorted(found, key=lambda event: (event.start, event.end)))


def events(name: str) -> list[Event]:
    """The events of a recorded trace (see `trace_file`), in the order in which they began."""
    return list(_read(name))


WORDS = {
    "indexSelect": "embedding", "index_elementwise": "gather", "CompareEq": "compare", "direct_copy": "convert",
    "MulFunctor": "multiply", "_add<": "add", "reduce_kernel": "reduce",
}  # fmt: skip


def short(event: Event) -> str:
    """What an event is, in a word: of a kernel of PyTorch its operation, else its name without types and namespaces."""
    if event.kind not in ("kernel", "call"):
        return event.kind
    plain = re.sub(r"<.*|\(.*", "", re.sub(r"^void |at::native::|\(anonymous namespace\)::", "", event.name))
    return next((word for part, word in WORDS.items() if part in event.name), plain)


def under_way(launches: Sequence[Event], copies: Sequence[Event]) -> list[int]:
    """For each launch, how many steps are under way when it begins, itself included: launched, and their tokens not
    yet on the host."""
    return [
        number - sum(copy.end <= launch.start for copy in copies) for number, launch in enumerate(launches, start=1)
    ]


def steps(found: Sequence[Event]) -> list[tuple[float, float]]:
    """For each graph that the host launched, when the first and the last of its kernels ran: (start, end)."""
    numbers = [event.launch for event in found if event.name == "cudaGraphLaunch"]
    ran: dict[int, list[Event]] = {number: [] for number in numbers}
    for event in found:
        if event.kind != "call" and event.launch in ran:
            ran[event.launch].append(event)
    return [(each[0].start, max(event.end for event in each)) for each in ran.values()]


def gaps(steps: Sequence[tuple[float, float]]) -> list[float]:
    """How long the device waited before each step but the first. steps: (start, end) of each, in order."""
    return [later[0] - earlier[1] for earlier, later in zip(steps, steps[1:], strict=False)]


@lru_cache(maxsize=2)
def report(name: str) -> TraceReport:
    """The report of `python -m asyncbatch.profile --trace FILE` on a recorded trace."""
    return read_trace(trace_file(name))


def trace_says(name: str) -> str:
    """The first screen of that report."""
    return str(report(name)).split("\n\ndevice ")[0]


# ---- a picture of it -------------------------------------------------------------------------------------------------

LANES = ("host", "H2D", "compute", "D2H")
WAIT = ("wait", "")
SHOWN = {"cudaGraphLaunch": ("launch", "orange"), "cudaEventSynchronize": WAIT, "cudaStreamSynchronize": WAIT}


def draw(name: str, first: int = 4, count: int = 3) -> Picture:
    """`count` steps of a recorded trace from number `first` on: what the host called, copies, and each step as one
    block. ValueError for steps that are not there."""
    found = events(name)
    times = steps(found)
    if not (first >= 1 and count >= 1 and first + count <= len(times)):
        raise ValueError(f"steps {first} to {first + count - 1}: the trace has 0 to {len(times) - 1}, draw some from 1")
    low, high = times[first - 1][1] - 900, times[first + count - 1][1] + 150
    picture = figure(10, 2.5)
    axes: Any = picture.axes
    numbers = [event.launch for event in found if event.name == "cudaGraphLaunch"]
    for number, (start, end) in enumerate(times):
        color = COLORS["sky" if number % 2 == 0 else "green"]  # without an edge: a gap of 8 us must not look wider
        _box(axes, 2, start, end, (low, high), color, f"step {number}")
    for event in found:
        if event.kind in ("copy in", "copy out"):
            row = 1 if event.kind == "copy in" else 3
            _box(
                axes, row, event.start, max(event.end, event.start + 0.003 * (high - low)), (low, high), COLORS["black"]
            )
        elif event.kind == "call" and (event.name in SHOWN or event.long > 5):
            word, color = SHOWN.get(event.name, ("", "yellow"))
            if word == "launch":
                word = f"launch {numbers.index(event.launch)}"
            _box(axes, 0, event.start, event.end, (low, high), COLORS[color] if color else "#EEEEEE", word)
    axes.set(xlim=(low, high), ylim=(4, 0), xlabel="microseconds since the trace began")
    axes.set_yticks([row + 0.5 for row in range(4)], LANES)
    looks = {"host launches": COLORS["orange"], "host waits": "#EEEEEE", "other calls": COLORS["yellow"]}
    looks |= {"copy": COLORS["black"], "even step": COLORS["sky"], "odd step": COLORS["green"]}
    patches = [Patch(facecolor=color, label=label) for label, color in looks.items()]
    picture.figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=8)
    picture.title = f"{name}: steps {first} to {first + count - 1} of {len(times)}"
    return picture


def _box(
    axes: Any, row: int, start: float, end: float, window: tuple[float, float], color: str, word: str = ""
) -> None:
    start, end = max(start, window[0]), min(end, window[1])
    if end <= start:
        return
    axes.add_patch(Rectangle((start, row + 0.08), end - start, 0.84, facecolor=color, linewidth=0))
    if word and end - start > 0.007 * len(word) * (window[1] - window[0]):
        axes.text((start + end) / 2, row + 0.5, word, ha="center", va="center", fontsize=8.5, color=TEXT)

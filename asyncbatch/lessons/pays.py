"""Notebook 07: when the asynchronous loop pays. Both loops on the virtual clock, pairs of runs on this machine, pauses
of the host, and other ways to win the same. (Pictures: `pays_pictures.py`. Exercises: `exercises/pays.py`.)"""

from __future__ import annotations

import functools
import gc
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ..batcher import AsyncBatcher, SyncBatcher
from ..devices.virtual import Costs
from ..measure.percentile import median_lies_within, p99
from ..measure.point_recorder import override
from ..measure.recording import Recording
from ..measure.simulate import SimulatedRun, StepCost, simulate
from ..measure.steps import steps_from
from ..models.toy import toy_llama
from ..ordering.toy import toy_tokens
from ..profile.pairs import Pairs
from ..profile.report import Comparison
from ..profile.verdict import gain_line, trust
from ..request import Request
from ..timeline import Timeline
from .learned import YourBatcher
from .loop import request, toy_batcher
from .measuring import RecordedRun, recorded_gaps, recorded_runs

# ---- both loops on the virtual clock: exact --------------------------------------------------------------------------


def costs(host_ms: float, device_ms: float) -> Costs:
    """A host that needs `host_ms` for a step, a quarter for each of its four parts, and copies that take no time."""
    part = 1e-3 * host_ms / 4
    return Costs(part, part, part, part, copy_in=0.0, step=1e-3 * device_ms, copy_out=0.0)


def _loop(slots: int | None, **options: Any) -> Any:
    return (
        toy_batcher(SyncBatcher, **options) if slots is None else toy_batcher(AsyncBatcher, num_slots=slots, **options)
    )


def exact(host_ms: float, device_ms: float, requests: Sequence[Request], slots: int | None = None) -> Timeline:
    """Serve requests of the toy model, one row at a time, on the virtual clock. slots: of the asynchronous loop; None
    is the synchronous one."""
    with _loop(slots, clock=costs(host_ms, device_ms), max_batch_size=1, max_length=128) as batcher:
        batcher.run(list(requests))
    return batcher.timeline


def step_ms(host_ms: float, device_ms: float, slots: int | None = None) -> float:
    """Milliseconds from the end of one step to the end of the next, in the steady state. slots: as of `exact`."""
    part = host_ms / 4
    return Way(part, part, part, part, device=device_ms, slots=slots or 1).period_ms


def answer(tokens: int, spare: int = 8) -> Request:
    """A request whose answer has so many tokens and ends at a stop token, with room for `spare` more."""
    for first in range(200):
        free = Request([first, 1, 2], max_new_tokens=tokens, stop_token_ids=())
        *others, last = toy_tokens(free)
        if last not in others:
            return request([first, 1, 2], tokens + spare, stop_after=tokens)
    raise ValueError(f"no prompt of the toy model has an answer of {tokens} tokens whose last token is new")


def served_gain(host_ms: float, device_ms: float, tokens: int, slots: int = 2) -> float:
    """How many times as fast the asynchronous loop serves one answer of `tokens` tokens after another, measured on the
    virtual clock once it is under way."""

    def each(slots: int | None) -> float:
        walls = [exact(host_ms, device_ms, [answer(tokens)] * count, slots).summary().wall_s for count in (2, 6)]
        return (walls[1] - walls[0]) / 4

    return each(None) / each(slots)


def first_token_waits(
    host_ms: float, device_ms: float, slots: int | None = None, moments: int = 20
) -> tuple[list[float], list[float]]:
    """(arrivals, waits), milliseconds: requests arrive at moments that are spread evenly over a step's period, counted
    from the start of a step on the device; each waits for its first token. slots: as of `exact`.

    One request is served all the time, and the others come to it in one run, three steps apart."""
    long = request([1, 2, 3], new=24)
    timeline = exact(host_ms, device_ms, [long], slots)
    begin, period = float(1e3 * timeline.lane("compute")[2][8]), step_ms(host_ms, device_ms, slots)
    arrivals = [period * (number + 0.5) / moments for number in range(moments)]
    to_come = [1e-3 * (begin + 3 * number * period + each) for number, each in enumerate(arrivals)]
    with _loop(slots, clock=costs(host_ms, device_ms), max_batch_size=4, max_length=256) as batcher:
        batcher.submit(replace(long, max_new_tokens=3 * moments + 24))
        handles: list[Any] = []
        while len(handles) < moments or handles[-1].first_token_s is None:
            batcher.turn()
            while len(handles) < moments and batcher.device.now() >= to_come[len(handles)]:
                handles.append(batcher.submit(request([4, 5], new=1)))
    return arrivals, [1e3 * (handle.first_token_s - came) for handle, came in zip(handles, to_come, strict=True)]


# ---- pairs of runs on this machine -----------------------------------------------------------------------------------


def gain_of(run: RecordedRun, step_time: Callable[[float, float, int], float]) -> float:
    """How many times as fast the asynchronous loop is by the learner's `step_time`, which gets the host's and the
    device's milliseconds of a recorded synchronous run."""
    return step_time(run.host_ms, run.device_ms, 1) / step_time(run.host_ms, run.device_ms, 2)


class Race(NamedTuple):
    """Pairs of a synchronous and an asynchronous run of the same requests, and whether their tokens were the same."""

    pairs: Pairs
    same_tokens: bool = True

    def __str__(self) -> str:
        only = Comparison(pairs=self.pairs.speedups, device_ratios=self.pairs.device_ratios)  # type: ignore[arg-type]
        lines = ["Disturbed, run me again."] if self.pairs.void else []
        lines += [gain_line(None, only) or ""] * (not self.pairs.void)
        lines += trust(None, only, self.same_tokens, over_time=False)
        return "\n".join(textwrap.fill(line, 88) for line in lines)


def race(model: Any, requests: Sequence[Request], step: Any = None, count: int = 6, **options: Any) -> Race:
    """Serve the requests `count` times with both loops, in turns, after a warm-up. step: the learner's asynchronous
    one. options: of both batchers."""
    runs: dict[Any, list[Timeline]] = {}
    tokens: list[list[list[int]]] = []
    with SyncBatcher(model, **options) as sync, YourBatcher(model, step=step, **options) as other:
        for batcher in (sync, other):
            batcher.run([replace(each, max_new_tokens=2) for each in requests])
        for number in range(count):
            for batcher in (sync, other) if number % 2 else (other, sync):  # neither always has the warmer machine
                tokens.append([completion.token_ids for completion in batcher.run(list(requests))])
                runs.setdefault(batcher, []).append(batcher.timeline)
        pairs = Pairs.of(runs[sync], runs[other])
    return Race(pairs, all(each == tokens[0] for each in tokens))


RECORDED = {
    "8B, 32 rows": ("h200-sweep-8b", "random:llama-8b", 32),
    "1B, 128 rows": ("h200-sweep-1b", "random:llama-1b", 128),
}


def race_beside(name: str, step: Any = None, count: int = 6, host_work_ms: float = 0.0, new: int = 32) -> Race:
    """As `race`, beside a device that takes the recorded step times of an H200: `name` is a key of `RECORDED`.

    host_work_ms: makes each plan so much longer."""
    if name not in RECORDED:
        raise ValueError(f"there is no {name!r}; allowed: {', '.join(map(repr, RECORDED))}")
    recording, model, rows = RECORDED[name]
    loaded = Recording.load(recording)
    options = {"max_batch_size": rows, "max_length": 16 + new, "step_s": loaded.step_times(rows, model)}
    requests = [Request([1] * 16, max_new_tokens=new, stop_token_ids=())] * rows
    stand_in = loaded.stand_in_model(model)
    return race(stand_in, requests, step, count, host_work_s=1e-3 * host_work_ms, **options)


def judge(speedups: Sequence[float], device_ratios: Sequence[float] | None = None) -> Race:
    """What pairs of runs with these ratios say. device_ratios: of each pair, how many times as long equal steps took
    the device in its second run; without them, as long."""
    ratios = [1.0] * len(speedups) if device_ratios is None else device_ratios
    return Race(Pairs(tuple(speedups), tuple(ratios)))


def sure(count: int) -> float:
    """How sure it is that the true median lies between the smallest and the largest of `count` ratios, from 2 to 5 of
    them; of more, within the interval that the script gives."""
    within = median_lies_within(range(count))
    if within is None:
        raise ValueError(f"{count} pairs have no interval: allowed are whole numbers from 2")
    return within[2]


# ---- pauses ----------------------------------------------------------------------------------------------------------


def recorded_periods() -> np.ndarray:
    """Milliseconds of each decode period (a gap and its step) of the recorded run with the longest gap: an 8B model on
    an H200, one row, synchronous. float64 [511]."""
    gaps_ms, device_ms = recorded_gaps()
    return gaps_ms + device_ms


def three_numbers(periods_ms: Sequence[float]) -> str:
    """Median, 99th percentile and longest of some periods, in words."""
    return f"median {np.median(periods_ms):.2f} ms, p99 {p99(periods_ms):.2f} ms, longest {max(periods_ms):.1f} ms"


PAUSED, STEPS = 20, 60  # in the commit of which step the host pauses, and of how many


def paused_run(pause_ms: float, host_ms: float, device_ms: float, slots: int) -> SimulatedRun:
    """A run (its times are milliseconds) in which the host pauses once, as on the virtual clock. slots: 1 is the
    synchronous loop."""
    cost = StepCost(before=0.75 * host_ms, copy_in=0.0, step=device_ms, copy_out=0.0, commit=0.25 * host_ms)
    paused = cost._replace(commit=cost.commit + pause_ms)
    return simulate([paused if step == PAUSED else cost for step in range(STEPS)], slots)


def pause_costs(pause_ms: float, host_ms: float, device_ms: float, slots: int) -> float:
    """How many milliseconds longer a run takes for one pause of the host."""
    long, short = (paused_run(pause, host_ms, device_ms, slots).total_s for pause in (pause_ms, 0.0))
    return long - short


@functools.cache
def _stand_in() -> Any:
    """One model for all servers: so they share one device process, which takes seconds to start."""
    return toy_llama()


@dataclass
class Served:
    """A run of `Server`. periods_ms: each decode step and the gap before it. collections: (generation, milliseconds) of
    each garbage collection while it served."""

    periods_ms: list[float]
    collections: list[tuple[int, float]]

    def __str__(self) -> str:
        longest = max((ms for _, ms in self.collections), default=0.0)
        gone = f"{len(self.collections)} collections, the longest {longest:.1f} ms"
        return f"{three_numbers(self.periods_ms)}; {gone}"


@dataclass
class Server:
    """A host that holds `objects` young Python objects, as after loading, and makes `notes` more in each step, beside a
    timed device. Called, it serves `steps` steps in the asynchronous loop, and says how long each took."""

    objects: int
    steps: int = 200
    device_ms: float = 4.0
    notes: int = 1000
    _held: list[Any] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self._batcher = AsyncBatcher(_stand_in(), max_batch_size=4, max_length=256, step_s=1e-3 * self.device_ms)
        self._serve(2)
        enabled = gc.isenabled()
        gc.disable()  # so that all of them are still young
        self._held.append([[number] for number in range(self.objects)])
        if enabled:
            gc.enable()

    def __call__(self) -> Served:
        collections: list[tuple[int, float]] = []
        start = 0.0

        def noted(phase: str, about: dict[str, int]) -> None:
            nonlocal start
            if phase == "start":
                start = time.perf_counter()
            else:
                collections.append((about["generation"], 1e3 * (time.perf_counter() - start)))

        gc.callbacks.append(noted)
        try:
            self._serve(self.steps)
        finally:
            gc.callbacks.remove(noted)
            self._batcher.close()
            self._held.clear()
        steps = steps_from(self._batcher.timeline)
        periods = 1e-3 * (steps.gap_us + steps.device_us)[steps.kind == "decode"]
        return Served(periods.tolist(), collections)

    def _serve(self, new: int) -> None:
        commit = self._batcher.commit

        def noting(slot: Any) -> None:
            commit(slot)
            self._held.append([[slot.step, number] for number in range(self.notes)])

        with override(self._batcher, "commit", noting):
            self._batcher.run([Request([1, 2, 3], max_new_tokens=new, stop_token_ids=())] * 4)


# ---- other ways to win the same --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A server: milliseconds of the host's four parts and of the device's step, rows of a step, and steps of the device
    for each plan. slots: 1 is the synchronous loop. Followed as on the virtual clock, without copies."""

    plan: float = 1.0
    fill: float = 1.0
    launch: float = 1.0
    commit: float = 1.0
    device: float = 6.0
    rows: int = 32
    steps: int = 1
    slots: int = 1

    @property
    def period_ms(self) -> float:
        """Milliseconds from plan to plan, in the steady state. (With many slots and a host that is hardly longer than
        the device that takes hundreds of steps to come.)"""
        before = self.plan + self.fill + self.launch
        run = simulate([StepCost(before, 0.0, self.steps * self.device, 0.0, self.commit)] * 600, self.slots)
        last = 599 - self.slots  # those after it do not wait for a later plan
        return float(run.ends[last] - run.ends[last - 1])

    @property
    def idle(self) -> float:
        """The share of time in which the device idles, from 0 to 1."""
        return 1 - self.steps * self.device / self.period_ms

    @property
    def tokens_per_s(self) -> float:
        return 1e3 * self.rows * self.steps / self.period_ms

    @property
    def wasted(self) -> int:
        """The most tokens that a row wastes at a stop token."""
        return self.slots * self.steps - 1


# ---- equal tokens ----------------------------------------------------------------------------------------------------


def add_up(numbers: Sequence[float]) -> float:
    """The sum of the numbers in float32, added one after the other in this order."""
    total = np.float32(0)
    for number in numbers:
        total = np.float32(total + np.float32(number))
    return float(total)


def recorded_step_ms() -> dict[int, float]:
    """By rows, the median milliseconds of a decode step of the 8B model on the recorded H200 (short texts)."""
    runs = recorded_runs()
    return {
        run.rows: run.device_ms
        for run in sorted(runs, key=lambda run: run.rows)
        if (run.engine, run.model) == ("asyncbatch", "8B") and run.label.endswith("short texts")
    }


def padding_costs(used: int, padded_to: int) -> float:
    """How many times as long a step of `padded_to` rows took there as one of `used` rows."""
    step_of = recorded_step_ms()
    for rows in (used, padded_to):
        if rows not in step_of:
            raise ValueError(f"no step of {rows} rows was recorded; allowed: {', '.join(map(str, step_of))}")
    return step_of[padded_to] / step_of[used]

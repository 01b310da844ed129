"""From measurements to a report: the numbers of each run, what explains them, and what to do about them.

Nothing is measured here. The floor of a step or a run is the time that the memory bandwidth alone asks for (see
`measure/bandwidth.py`); numbers that need it are None where there is no GPU, or where the steps do not say how much
context they read.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from operator import attrgetter
from typing import Any

import numpy as np

from ..measure.bandwidth import requests_floor, run_floor_s, step_floor_s
from ..measure.law import idle_share
from ..measure.points import LANE, MEANING, NO_REQUEST
from ..measure.recording import Recording
from ..measure.steps import Steps, steps_from, steps_of
from ..timeline import Timeline, busy_curve
from .machine import machine_name, versions
from .measurement import Measurement
from .report import (
    OWN,
    SCHEMA,
    SERVED,
    Comparison,
    ContextSteps,
    Failure,
    Floor,
    Gpu,
    ModelFacts,
    RecordedRun,
    Report,
    RequestFloor,
    Run,
    workload_key,
)
from .settings import Settings
from .workload import latency

OVER_TIME = "Requests arrive over time, so no total time is predicted: compare the latencies of the two loops."
WORTH_SAYING = 0.01  # a latency point that would give back less is not worth eliminating
LOOPS = {"sync": "synchronous", "async": "asynchronous"}


@dataclass(frozen=True)
class Place:
    """Where the measurements were made: device, GPU, its copy bandwidth, and the models that were on it, by name.
    recording: the one whose device was emulated. matmul: operations a second of the GPU's matrix products."""

    device: str
    gpu: Gpu | None = None
    bandwidth: float | None = None
    models: Mapping[str, ModelFacts] = field(default_factory=dict)
    recording: Recording | None = None
    matmul: float | None = None


# ---- the report ---------------------------------------------------------------------------------------------------


def make_report(
    settings: Settings, measurements: Sequence[Measurement], place: Place, failed: Sequence[Failure] = ()
) -> tuple[Report, list[Timeline]]:
    """The report, and the timeline of each of its runs, in the same order."""
    runs = tuple(run_of(one, place) for one in measurements)
    compared = tuple(comparison(group) for group in by_workload(runs))
    same = same_tokens(measurements)
    recording, conditions = place.recording, settings.conditions
    only = compared[0] if len(compared) == 1 else None
    first, verdict = conclusion(runs, only, conditions.over_time)
    report = Report(
        schema=SCHEMA,
        model=settings.model,
        device=place.device,
        emulated=recording.name if recording else None,
        preset=settings.preset,
        same_tokens=same.pop(OWN, True),
        peers_same_tokens=same,
        runs=runs,
        failed=tuple(failed),
        recorded=recorded_runs(recording, runs, even=not conditions.uneven) if recording else (),
        comparisons=compared,
        async_speedup=only.async_speedup if only else None,
        law_idle=only.law_idle if only else None,
        workload=conditions,
        gpu=place.gpu,
        copy_bandwidth_bytes_per_s=place.bandwidth,
        models=dict(place.models),
        versions=versions(),
        machine=machine_name(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=settings.command_line,
        first=first,
        verdict=verdict,
        matmul_flops_per_s=place.matmul,
    )
    return report, [one.typical for one in measurements]


def run_of(one: Measurement, place: Place) -> Run:
    """The typical run of a measurement, with everything that the report has about it."""
    timeline, completions = one.typical_run
    summary = timeline.summary().as_dict()
    floor = None
    if place.bandwidth is not None:
        facts = place.models.get(one.workload.model)
        floor = floor_numbers(steps_from(timeline), summary["wall_s"], facts, place.bandwidth)
    why = one.explanation
    return Run(
        engine=one.engine,
        mode=one.mode,
        **summary,
        device_ms_per_step=device_ms(timeline),
        model=one.workload.model,
        batch_size=one.workload.batch_size,
        requests=one.workload.requests,
        prompt_tokens=one.sizes.longest_prompt,
        new_tokens=one.sizes.new_tokens,
        setting=one.setting,
        prefill_tokens=one.prefill_tokens,
        floor=floor,
        latency=latency(completions),
        wall_s_of_each_run=tuple(each.summary().wall_s for each, _ in one.runs),
        interrupted=one.interrupted,
        overhead=one.overhead,
        kineto=one.kineto,
        points=why.points,
        gaps=why.gaps,
        what_if=why.what_if,
        # Where requests arrive over time, the arrivals decide how long a run takes, and not the loop.
        prediction=why.prediction if one.workload.arrivals == "all" else None,
        workload=one.workload.name,
        longest_gap_ms=longest_gap_ms(timeline),
        request_floor=request_floor(one, summary["wall_s"], place),
    )


def by_workload(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs in groups of one workload."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(workload_key(run), []).append(run)
    return list(groups.values())


def same_tokens(measurements: Iterable[Measurement]) -> dict[str, bool]:
    """For each engine whether all of its runs on one workload gave the same tokens."""
    tokens: dict[tuple[str, Any], list[Any]] = {}
    for one in measurements:
        workload = one.workload.name, one.workload.model, one.workload.batch_size
        tokens.setdefault((one.engine, workload), []).extend(one.tokens)
    same: dict[str, bool] = {}
    for (engine, _), of_runs in tokens.items():
        same[engine] = same.get(engine, True) and all(other == of_runs[0] for other in of_runs[1:])
    return same


def comparison(runs: Sequence[Run]) -> Comparison:
    """This package's two loops among the runs on one workload."""
    own = {run.mode: run for run in runs if run.engine == OWN and not run.interrupted}
    sync, law = own.get("sync"), None
    if sync and sync.device_ms_per_step is not None and sync.host_ms_per_step is not None:
        law = idle_share(sync.host_ms_per_step, sync.device_ms_per_step)
    speedup = statistics.median(speedups(own["sync"], own["async"])) if len(own) == 2 else None
    return Comparison(runs[0].model, runs[0].batch_size, speedup, law, runs[0].workload)


def speedups(sync: Run, other: Run) -> list[float]:
    """Synchronous over asynchronous wall time of each repeat."""
    pairs = zip(sync.wall_s_of_each_run, other.wall_s_of_each_run, strict=False)  # one that failed half way has fewer
    return [sync_s / async_s for sync_s, async_s in pairs]


# ---- numbers of a run ---------------------------------------------------------------------------------------------


def device_ms(timeline: Timeline) -> float | None:
    """Median time of a decode step on the device, in milliseconds. ValueError if the timeline has dropped steps."""
    timeline.check_whole("the median time of a step")
    decode = {step.step for step in timeline.steps if step.kind == "decode"}
    times = [1e3 * (s.end - s.start) for s in timeline.spans if s.lane == "compute" and s.step in decode]
    return statistics.median(times) if times else None


def longest_gap_ms(timeline: Timeline) -> float | None:
    """The longest time that the device was idle between two steps of any kind, in milliseconds; None with fewer than
    two steps. Time in which there was no request to serve is taken off."""
    _, _, starts, ends = timeline.lane("compute")
    if len(starts) < 2:
        return None
    begins, stops = np.maximum.accumulate(ends)[:-1], starts[1:]
    names, _, starts, ends = timeline.lane(LANE)
    nothing = np.array(names, object) == NO_REQUEST
    times, asked_nothing = busy_curve(starts[nothing], ends[nothing])
    gaps = (
        stops - begins - np.maximum(np.interp(stops, times, asked_nothing) - np.interp(begins, times, asked_nothing), 0)
    )
    return 1e3 * max(float(gaps.max()), 0.0)


def request_floor(one: Measurement, wall_s: float, place: Place) -> RequestFloor | None:
    """A run beside the least time of its requests. None without a GPU, and where not all requests were there from the
    beginning and answered with at least one token."""
    facts, served = place.models.get(one.workload.model), one.served
    if facts is None or facts.flops_per_token is None or place.bandwidth is None or place.matmul is None:
        return None
    if one.workload.arrivals != "all" or not served or min(new for _, new in served) < 1:
        return None
    least = requests_floor(
        facts.weight_bytes,
        facts.kv_bytes_per_token,
        facts.flops_per_token,
        served,
        one.workload.batch_size,
        place.bandwidth,
        place.matmul,
    )
    return RequestFloor(least.total_s, wall_s / least.total_s, *least)


def floor_numbers(steps: Steps, wall_s: float, model: ModelFacts | None, bandwidth: float) -> Floor:
    """A run beside its floor; all None where the steps do not say their context.

    first_context, last_context: medians over an eighth of the decode steps with the most rows, at most 32 of them:
    those with the smallest and those with the largest context. kv_bytes_per_s: the keys and values by which these two
    differ / the time by which they differ; only where the context grew at least eightfold."""
    decode = steps.kind == "decode"
    if model is None or not decode.any() or not steps.context[decode].all():
        return Floor()
    weights, kv = model.weight_bytes, model.kv_bytes_per_token
    floor_s = run_floor_s(weights, kv, steps.context.tolist(), bandwidth)
    rows = int(steps.rows[decode].max())
    full = np.flatnonzero(decode & (steps.rows == rows))
    full = full[np.argsort(steps.context[full], kind="stable")]
    count = max(1, min(32, len(full) // 8))

    def at(part: np.ndarray) -> ContextSteps:
        context = float(np.median(steps.context[part]))
        ms = 1e-3 * float(np.median(steps.device_us[part]))
        floor_ms = 1e3 * step_floor_s(weights, kv, context, bandwidth)
        return ContextSteps(rows, context, ms, floor_ms, ms / floor_ms)

    first, last, rate = at(full[:count]), at(full[-count:]), None
    assert first.ms is not None
    assert last.ms is not None
    if last.context >= 8 * first.context and last.ms > first.ms:
        rate = 1e3 * (last.context - first.context) * kv / (last.ms - first.ms)
    return Floor(floor_s, wall_s / floor_s, first, last, rate)


def recorded_runs(recording: Recording, runs: Iterable[Run], even: bool = True) -> tuple[RecordedRun, ...]:
    """For each emulated run what the recording says of the same model, batch size and mode.

    If the emulated run is the beginning of the recorded one, only that many steps of it are counted, and `setting`
    says so. It can be that only if its requests are `even`: all of one length, and there at the beginning."""
    rows = []
    for run in runs:
        for recorded in recording.runs:
            if all(recorded[key] == getattr(run, key) for key in ("engine", "mode", "model", "batch_size")):
                rows.append(_recorded_run(recording, recorded, run, even))
                break
    return tuple(rows)


def _recorded_run(recording: Recording, recorded: dict[str, Any], run: Run, even: bool) -> RecordedRun:
    steps, setting = steps_of(recorded), "the whole run"
    begins_so = all(recorded[key] == getattr(run, key) for key in ("requests", "prompt_tokens", "prefill_tokens"))
    if even and begins_so and run.steps is not None and run.steps < len(steps.kind):
        steps, setting = steps.first(run.steps), f"the first {run.steps} steps"
    totals, decode = steps.totals(), steps.kind == "decode"
    facts = ModelFacts.from_json(recording.models[recorded["model"]])
    return RecordedRun(
        **{key: recorded[key] for key in (*SERVED, "engine", "mode", "prefill_tokens")},
        **totals,
        setting=setting,
        device_ms_per_step=1e-3 * float(np.median(steps.device_us[decode])) if decode.any() else None,
        floor=floor_numbers(steps, totals["wall_s"], facts, recording.data["copy_bandwidth_bytes_per_s"]),
    )


# ---- in words -----------------------------------------------------------------------------------------------------


def conclusion(runs: Sequence[Run], only: Comparison | None, over_time: bool) -> tuple[str | None, str | None]:
    """(first, verdict): what to eliminate first, and what asynchronous batching brings. None with several workloads."""
    first = first_line(runs) if only else None
    if over_time:
        return first and f"{first} (As if there were always requests waiting.)", OVER_TIME
    return first, verdict_line(runs, only.async_speedup) if only else None


def first_line(runs: Sequence[Run]) -> str | None:
    """What to eliminate first: the host's latency point that would give most back, of this package's synchronous run,
    else of the first run. None where no step was measured."""
    for run in sorted(runs, key=lambda run: (run.engine != OWN, run.mode != "sync")):
        loop, saves = LOOPS[str(run.mode)], attrgetter(f"{run.mode}_saves")
        entirely = [one for one in run.what_if if one.where == "host" and one.factor == 0.0]
        if not entirely:
            continue
        best = max(entirely, key=saves)
        median = next(point.median_ms for point in run.points if point.name == best.point)
        what = f"{best.point} ({MEANING.get(best.point, best.point)}), {median or 0:.3f} ms of each step"
        if saves(best) < WORTH_SAYING:
            return (
                f"Eliminate this first: nothing on the host. The largest, {what}, would give back {saves(best):.1%} of "
                f"the {loop} run."
            )
        other = "" if run.mode == "async" else f", the asynchronous one {max(best.async_saves or 0.0, 0):.1%}"
        return f"Eliminate this first: {what}. Without it the {loop} run takes {saves(best):.1%} less time{other}."
    return None


def verdict_line(runs: Sequence[Run], speedup: float | None) -> str | None:
    """What asynchronous batching brings here: predicted from the synchronous run, and measured (`speedup`). None
    without a synchronous run."""
    guess = next((run.prediction for run in runs if run.prediction), None)
    if guess is None or guess.host_ms is None or guess.device_ms is None:
        return None
    beside = f"{guess.host_ms:.3f} ms of host work and copies beside {guess.device_ms:.3f} ms on the device"
    numbers = f"predicted {guess.gain:.3f}x" + ("" if speedup is None else f", measured {speedup:.3f}x")
    if not guess.helps:
        return f"Asynchronous batching gains less than 2 % here ({numbers}): each step has only {beside}."
    if guess.host_ms > guess.device_ms:
        return f"Asynchronous batching: {numbers}. The host is the slower one ({beside}), so the device still waits."
    return f"Asynchronous batching: {numbers}. It hides the host's part of each step ({beside})."

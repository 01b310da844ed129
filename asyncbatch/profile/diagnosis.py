"""From measurements to a report: the numbers of each run, what explains them, and what to do about them.

Nothing is measured here. Numbers that need a floor (`floors.py`) are None where there is no GPU, or where the steps do
not say how much context they read.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import numpy as np

from ..measure.law import idle_share
from ..measure.points import LANE, NO_REQUEST
from ..measure.recording import Recording
from ..measure.steps import steps_of
from ..timeline import Timeline, busy_curve, device_activity
from .floors import floor_numbers, request_floor, run_floor
from .machine import machine_name, versions
from .measurement import Measurement
from .pairs import Pairs
from .place import Place
from .rank_times import RankTimes, leaders, mean_of, rank_runs, replicas, slowest_of, without_waiting
from .rank_words import waits_line
from .report import (
    OWN,
    SCHEMA,
    SERVED,
    Comparison,
    Failure,
    ModelFacts,
    RecordedRun,
    Report,
    Run,
    workload_key,
)
from .settings import Settings
from .verdict import OVER_TIME, first_line, gain_line, idle_line, judged, trust, why_line
from .workload import latency

MEANS = ("wall_s", "device_active", "idle", "host_ms_per_step")  # of a summary, where two runs are in the middle


# ---- the report ---------------------------------------------------------------------------------------------------


def make_report(
    settings: Settings, measurements: Sequence[Measurement], place: Place, failed: Sequence[Failure] = ()
) -> tuple[Report, list[Timeline]]:
    """The report, and the timeline of each of its runs, in the same order."""
    runs = tuple(run_of(one, place) for one in measurements)
    compared = tuple(comparison(group, measurements) for group in by_workload(runs))
    same = same_tokens(measurements)
    recording, conditions = place.recording, settings.conditions
    if conditions.repeats is None:  # it followed from the budget
        conditions = replace(conditions, repeats=max((len(one.runs) for one in measurements), default=0))
    only = compared[0] if len(compared) == 1 else None
    same_own = same.pop(OWN, True)
    report = Report(
        schema=SCHEMA,
        model=settings.model,
        device=place.device,
        emulated=recording.name if recording else None,
        preset=settings.preset,
        same_tokens=same_own,
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
        **(conclusion(runs, only, same_own, conditions.over_time) if only else {}),
        matmul_flops_per_s=place.matmul,
    )
    return report, [one.typical for one in measurements]


def run_of(one: Measurement, place: Place) -> Run:
    """The typical run of a measurement, with everything that the report has about it."""
    timeline, completions = one.typical_run
    ranks = one.ranks_of(timeline)
    each = [rank.timeline for rank in ranks] or [timeline]
    first = [rank.timeline for rank in leaders(ranks)] or [timeline]
    summary = middle_summary(one)
    why = one.explanation
    return Run(
        engine=one.engine,
        mode=one.mode,
        **summary,
        device_ms_per_step=mean_of([device_ms(of) for run, _ in one.middle for of in timelines_of(one, run)]),
        model=one.workload.model,
        batch_size=one.workload.batch_size,
        requests=one.workload.requests,
        prompt_tokens=one.sizes.longest_prompt,
        new_tokens=one.sizes.new_tokens,
        setting=one.setting,
        prefill_tokens=one.prefill_tokens,
        floor=run_floor(one, summary["wall_s"], first, place),
        latency=latency(completions),
        wall_s_of_each_run=tuple(run.summary().wall_s for run, _ in one.runs),
        interrupted=one.interrupted,
        overhead=one.overhead,
        kineto=one.kineto,
        points=why.points,
        gaps=why.gaps,
        what_if=why.what_if,
        # Where requests arrive over time, the arrivals decide how long a run takes, and not the loop.
        prediction=why.prediction if one.workload.arrivals == "all" else None,
        workload=one.workload.name,
        longest_gap_ms=max([gap for of in each if (gap := longest_gap_ms(of)) is not None], default=None),
        request_floor=request_floor(one, summary["wall_s"], place),
        measured_steps=sum(map(measured_steps, first)),
        idle_all_steps=mean_of([idle_all_steps(of) for of in each]),
        **of_ranks([one.ranks_of(run) for run, _ in one.middle], one.profiled),
    )


def of_ranks(middle: Sequence[Sequence[RankTimes]], profiled: Sequence[RankTimes]) -> dict[str, Any]:
    """What a run says of its ranks; nothing of one rank. middle: those of the runs in the middle. profiled: those of
    one more run, in which collectives were seen by their kernels."""
    if not (ranks := middle[-1]):
        return {}
    timed = profiled if any(one.collective_s is None for one in ranks) else ()
    each = [slowest_of(timed or ranks, replica) for replica in range(len(replicas(ranks)))]
    return {"ranks": rank_runs(middle, timed), "slowest": tuple(one for one in each if one is not None)}


def timelines_of(one: Measurement, run: Timeline) -> list[Timeline]:
    """The timeline of each rank of the run that has this one."""
    return [rank.timeline for rank in one.ranks_of(run)] or [run]


def middle_summary(one: Measurement) -> dict[str, Any]:
    """The summary of the run in the middle; of two, the means of their times and shares."""
    each = one.middle_summaries
    made = {**each[-1], **{key: mean_of([of[key] for of in each]) for key in MEANS}}
    made["tokens_per_s"] = made["tokens"] / made["wall_s"] if made["wall_s"] else 0.0
    return made


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
        tokens.setdefault((one.engine, workload_of(one)), []).extend(one.tokens)
    same: dict[str, bool] = {}
    for (engine, _), of_runs in tokens.items():
        same[engine] = same.get(engine, True) and all(other == of_runs[0] for other in of_runs[1:])
    return same


def comparison(runs: Sequence[Run], measurements: Sequence[Measurement] = ()) -> Comparison:
    """This package's two loops among the runs on one workload. measurements: theirs, and others."""
    own = {run.mode: run for run in runs if run.engine == OWN and not run.interrupted}
    sync, law = own.get("sync"), None
    if sync and sync.device_ms_per_step is not None and sync.host_ms_per_step is not None:
        law = idle_share(sync.host_ms_per_step, sync.device_ms_per_step)
    of = {one.mode: one for one in measurements
          if one.engine == OWN and not one.interrupted and workload_of(one) == workload_key(runs[0])}  # fmt: skip
    pairs = Pairs()
    if len(own) == len(of) == 2:
        pairs = Pairs.of(*(
            [without_waiting(run, of[mode].ranks_of(run)) for run, _ in of[mode].runs] for mode in ("sync", "async")
        ))  # fmt: skip
    low_high = pairs.interval
    return Comparison(
        runs[0].model,
        runs[0].batch_size,
        pairs.speedup,
        low_high[:2] if low_high else None,
        low_high[2] if low_high else None,
        pairs.speedups,
        None if None in pairs.device_ratios else pairs.device_ratios,  # type: ignore[arg-type]
        law,
        runs[0].workload,
    )


def workload_of(one: Measurement) -> tuple[str | None, str | None, int | None]:
    """As `workload_key` of its run."""
    return one.workload.name, one.workload.model, one.workload.batch_size


# ---- numbers of a run ---------------------------------------------------------------------------------------------


def device_ms(timeline: Timeline) -> float | None:
    """Median time of a decode step on the device, in milliseconds. ValueError if the timeline has dropped steps."""
    timeline.check_whole("the median time of a step")
    decode = {step.step for step in timeline.steps if step.kind == "decode"}
    times = [1e3 * (s.end - s.start) for s in timeline.spans if s.lane == "compute" and s.step in decode]
    return statistics.median(times) if times else None


def measured_steps(timeline: Timeline) -> int:
    """How many decode steps active and idle are of: those that come after another step."""
    decode = [step.step for step in timeline.steps if step.kind == "decode"]
    return int(np.isin(timeline.lane("compute")[1][1:], decode).sum())


def idle_all_steps(timeline: Timeline) -> float | None:
    """The idle share over all steps but the first; None with fewer than two."""
    active_s, period_s = device_activity(*timeline.lane("compute")[2:])
    return max(1 - active_s / period_s, 0.0) if period_s > 0 else None


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
    longest = recorded["prompt_tokens"] + recorded["new_tokens"]
    begins_so = all(recorded[key] == getattr(run, key) for key in ("requests", "prompt_tokens", "prefill_tokens"))
    if even and begins_so and run.steps is not None and run.steps < len(steps.kind):
        steps, setting, longest = steps.first(run.steps), f"the first {run.steps} steps", run.longest
    totals, decode = steps.totals(), steps.kind == "decode"
    facts = ModelFacts.from_json(recording.models[recorded["model"]])
    return RecordedRun(
        **{key: recorded[key] for key in (*SERVED, "engine", "mode", "prefill_tokens")},
        **totals,
        setting=setting,
        device_ms_per_step=1e-3 * float(np.median(steps.device_us[decode])) if decode.any() else None,
        floor=floor_numbers(steps, totals["wall_s"], facts, recording.data["copy_bandwidth_bytes_per_s"], longest),
    )


# ---- in words -----------------------------------------------------------------------------------------------------


def conclusion(runs: Sequence[Run], only: Comparison, same_tokens: bool, over_time: bool) -> dict[str, Any]:
    """The report's first sentences, by their names in it."""
    run = judged(runs)
    if run is None:
        return {}
    first = first_line(run)
    if over_time and first:
        first = f"{first} (As if there were always requests waiting.)"
    return {
        "idleness": idle_line(run),
        "causes": why_line(run),
        "waits": waits_line(run),
        "first": first,
        "verdict": OVER_TIME if over_time else gain_line(run, only),
        "trust": trust(run, only, same_tokens, over_time),
    }

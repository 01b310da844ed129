"""Made-up runs of several ranks, whose every time is known, and the report on them."""

from __future__ import annotations

from dataclasses import replace

from asyncbatch.profile.diagnosis import make_report
from asyncbatch.profile.measurement import Measurement
from asyncbatch.profile.options import parse_arguments
from asyncbatch.profile.place import Place
from asyncbatch.profile.rank_times import RankTimes
from asyncbatch.profile.settings import settle
from asyncbatch.profile.workload import Sizes
from asyncbatch.timeline import Timeline


def made_run(
    label: str, begins_ms: float, ends_ms: float = 10.0, steps: int = 41, at_s: float = 100.0, tokens: int = 2
):
    """A run of steps of `ends_ms` each: the host prepares the step until `begins_ms`, and then the device computes. The
    first one is a prefill step."""
    made, end = Timeline(label, "host"), at_s
    for step in range(steps):
        now = end
        begin, end = now + 1e-3 * begins_ms, now + 1e-3 * ends_ms
        made.add("host", "plan", step, now, begin)
        made.add("host", "launch", step, begin, begin)
        made.add("compute", "step", step, begin, end)
        made.add("host", "wait", step, begin, end)
        made.add("host", "commit", step, end, end)
        made.add_step(step, "decode" if step else "prefill", tokens, 0, 2, 2 * (step + 1))
    return made


def in_each_step(timeline: Timeline, ms: float) -> dict[int, float]:
    return {step.step: 1e-3 * ms for step in timeline.steps}


def shared_model(mode: str, begins_ms=(2.0, 3.0), collectives_ms=(4.0, 1.0), **how) -> tuple[RankTimes, ...]:
    """One run of ranks that share a model. collectives_ms: of each step, by rank; None where nobody timed them."""
    found = []
    for rank, begin_ms in enumerate(begins_ms):
        timeline = made_run(mode, begin_ms, **how)
        spent = None if collectives_ms is None else in_each_step(timeline, collectives_ms[rank])
        found.append(RankTimes(rank, 0, rank, "here", timeline, spent, requests=None if rank else 4))
    return tuple(found)


def measured_by(runs, mode: str, profiled=(), completions=(), **workload) -> Measurement:
    """The measurement of these runs, each a list of ranks."""
    settings = settle(parse_arguments([]))
    made = Measurement(
        replace(settings.workloads[0], **workload), Sizes(1, 10, 11), "asyncbatch", mode,
        runs=[(ranks[0].timeline, list(completions)) for ranks in runs],
    )  # fmt: skip
    made.ranks, made.profiled = [tuple(ranks) for ranks in runs], tuple(profiled)
    return made


def report_on(*measurements: Measurement, tp: int = 2, replicas: int = 1, place: Place | None = None):
    settings = settle(parse_arguments([]))
    settings = replace(settings, conditions=replace(settings.conditions, tp=tp, replicas=replicas))
    return make_report(settings, list(measurements), place or Place("none"))[0]

"""What a report says of the ranks of a run, in sentences and as a table: for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .rank_records import BY_KERNELS, BY_LENGTH, IN_COLLECTIVES, RankRun, Slowest
from .report import Run

NOTHING = 0.01  # a share of a step that is not worth a rank's name
UNEVEN = 0.05  # a share of the run for which a replica has nothing more to do
HEAD = ("rank", "replica", "idle", "host a step", "device a step", "in collectives", "waiting", "requests",
        "wall time")  # fmt: skip
TITLE = "ranks; in collectives and waiting are shares of a decode step on the device"
SEEN = {
    IN_COLLECTIVES: "",
    BY_KERNELS: " (by the kernels of one more run, under torch.profiler)",
    BY_LENGTH: " (by when the ranks began a step; --kineto on CUDA tells the rest)",
}


def waits_line(run: Run) -> str | None:
    """How the ranks wait for each other, and the replicas for their last one. None for one rank."""
    if not run.ranks or len(run.ranks) < 2:
        return None
    found = [*_in_collectives(run.slowest or ()), *_replicas(run.ranks)]
    return " ".join(found) or None


def _in_collectives(slowest: Sequence[Slowest]) -> Iterator[str]:
    known = [one for one in slowest if one.share is not None]
    if not known:
        return
    worst = max(known, key=lambda one: one.share or 0.0)
    where = f" of replica {worst.replica}" if len(slowest) > 1 else ""
    seen, waiting = SEEN.get(str(worst.seen_in), ""), f"{worst.waiting_ms_per_step or 0.0:.3f} ms"
    if (worst.share or 0.0) < NOTHING:
        words = f"No rank keeps the others waiting: {worst.share:.1%} of their decode steps, {waiting} each"
    else:
        words = (
            f"The slowest is rank {worst.rank}: for it the other ranks{where} wait {worst.share:.1%} of their decode "
            f"steps, {waiting} each"
        )
    if worst.transfer_ms_per_step is not None:
        words += f"; the collectives of a step take {worst.transfer_ms_per_step:.3f} ms without that"
    yield f"{words}{seen}."


def _replicas(ranks: Sequence[RankRun]) -> Iterator[str]:
    first = [one for one in ranks if one.tp_rank == 0 and one.requests is not None]
    if len(first) < 2:
        return
    dealt = ", ".join(str(one.requests) for one in first)
    words = f"{len(first)} replicas answered {dealt} requests"
    most, least = (pick((one.wall_s or 0.0) for one in first) for pick in (max, min))
    if most > 0 and 1 - least / most > UNEVEN:
        words += f"; the first to be done had nothing to do for the last {1 - least / most:.0%} of the run"
    yield words + "."


def rows(ranks: Sequence[RankRun]) -> list[list[str]]:
    """A line for each rank, in the columns of `HEAD`. What is not known is "-"."""
    return [[_name(one, ranks), str(one.replica), *_numbers(one)] for one in ranks]


def _name(one: RankRun, ranks: Sequence[RankRun]) -> str:
    several = len({other.machine for other in ranks}) > 1
    return f"{one.rank} ({one.machine})" if several else str(one.rank)


def _numbers(one: RankRun) -> Iterator[str]:
    for value, form in (
        (one.idle, "{:.2%}"),
        (one.host_ms_per_step, "{:.3f} ms"),
        (one.device_ms_per_step, "{:.3f} ms"),
        (one.in_collectives, "{:.1%}"),
        (one.waiting, "{:.1%}"),
        (one.requests, "{}"),
        (one.wall_s, "{:.3f} s"),
    ):
        yield "-" if value is None else form.format(value)


def clock_note(ranks: Sequence[RankRun]) -> str | None:
    """What has to be said of ranks whose clock is not rank 0's. None where all read one clock."""
    off = [one for one in ranks if one.clock_error_s is not None]
    if not off:
        return None
    who = ", ".join(str(one.rank) for one in off)
    error_ms = 1e3 * max(one.clock_error_s or 0.0 for one in off)
    return (
        f"Rank{'s' if len(off) > 1 else ''} {who} read another clock than rank 0, on another machine: in the timeline "
        f"their times are put on rank 0's, to within {error_ms:.3f} ms. No other figure compares times of two clocks."
    )

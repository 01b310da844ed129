"""Is one report worse than another, by more than a threshold? For `--compare OLD NEW --threshold 5%`, and its exit
status.

Figures of each pair of runs: throughput (tokens per second), idle (share of the time in which the device was idle) and
host (host work per step). Throughput and host work are worse by a share of the old value; an idle share is worse by the
points that it rose, since a share of almost nothing says nothing. Reports that measured different things are not
judged: the comparison is void.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .report import Run

NO_WORSE, WORSE, VOID = 0, 3, 4  # exit statuses
# The place in a run, the words, how the value is written, by what it is multiplied first, and whether more is better.
FIGURES = {
    "throughput": ("tokens_per_s", "throughput", "{:.1f} tokens/s", 1, True),
    "idle": ("idle", "device idle", "{:.2f} %", 100, False),
    "host": ("host_ms_per_step", "host work per step", "{:.3f} ms", 1, False),
}


@dataclass(frozen=True)
class Judged:
    """One figure of one pair of runs. worse_by: a share, of idle a difference of shares; below 0 it is better."""

    run: str
    figure: str
    a: float
    b: float
    worse_by: float
    worse: bool
    overlap: bool

    def __str__(self) -> str:
        _, words, form, factor, _ = FIGURES[self.figure]
        old, new = form.format(factor * self.a), form.format(factor * self.b)
        unit = "points" if self.figure == "idle" else "%"
        text = f"{self.run}: {words} {old}, now {new}: {100 * self.worse_by:.2f} {unit} worse"
        return text + (" (but the times of their runs overlap: more --repeats would tell)" if self.overlap else "")


@dataclass(frozen=True)
class Verdict:
    """Exit status, and why: the reasons for which the comparison is void, and every figure that was judged."""

    threshold: float
    void: tuple[str, ...]
    judged: tuple[Judged, ...]

    @property
    def status(self) -> int:
        if self.void:
            return VOID
        return WORSE if any(one.worse for one in self.judged) else NO_WORSE

    def __str__(self) -> str:
        limit = f"{100 * self.threshold:g} %"
        if self.void:
            return "\n".join(["VOID: the two reports cannot be judged", *(f"  {reason}" for reason in self.void)])
        worse = [one for one in self.judged if one.worse]
        if worse:
            head = f"WORSE by more than {limit}: {len(worse)} of {len(self.judged)} figures"
            return "\n".join([head, *(f"  {one}" for one in worse)])
        return f"No worse by more than {limit}: {len(self.judged)} figures"

    def to_json(self) -> dict[str, Any]:
        status = {NO_WORSE: "no worse", WORSE: "worse", VOID: "void"}[self.status]
        names = ("run", "figure", "a", "b", "worse_by", "worse")
        figures = [{name: getattr(one, name) for name in names} for one in self.judged]
        for one in figures:  # of nothing no share can be said
            one["worse_by"] = one["worse_by"] if math.isfinite(one["worse_by"]) else None
        return {"status": status, "threshold": self.threshold, "void": list(self.void), "figures": figures}


def judge(
    pairs: Iterable[tuple[str, Run, Run]], void: Sequence[str], threshold: float, figures: Sequence[str] = (*FIGURES,)
) -> Verdict:
    """The verdict on pairs of runs: (name, old, new). void: reasons for which they cannot be judged, so far."""
    reasons, judged = list(void), []
    for name, a, b in pairs:
        for figure in figures:
            key, words, *_ = FIGURES[figure]
            old, new = getattr(a, key, None), getattr(b, key, None)
            if old is None and new is None:
                continue
            if old is None or new is None:
                reasons.append(f"{name}: {'A' if old is None else 'B'} has no {words}")
                continue
            worse_by = _worse_by(figure, old, new)
            # A hair, so that exactly the threshold is not beyond it in binary numbers.
            worse = worse_by > threshold + 1e-9
            judged.append(Judged(name, figure, old, new, worse_by, worse, figure == "throughput" and _overlap(a, b)))
    if not judged and not reasons:
        reasons.append(f"no run of both has {', '.join(FIGURES[figure][1] for figure in figures)}")
    return Verdict(threshold, tuple(reasons), tuple(judged))


def _worse_by(figure: str, old: float, new: float) -> float:
    if figure == "idle":
        return new - old
    if old == new:
        return 0.0
    if FIGURES[figure][4]:
        return 1 - new / old if old else -math.inf
    return new / old - 1 if old else math.inf


def _overlap(a: Run, b: Run) -> bool:
    """Whether both have several runs, and their wall times overlap."""
    walls = a.wall_s_of_each_run, b.wall_s_of_each_run
    if min(map(len, walls)) < 2:
        return False
    return min(walls[0]) <= max(walls[1]) and min(walls[1]) <= max(walls[0])

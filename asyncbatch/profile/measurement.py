"""What was measured of one engine in one mode on one workload: the timeline and the completions of each of its runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..request import Completion
from ..timeline import Timeline
from .explanation import Explanation
from .rank_times import RankTimes, summary_of
from .report import Kineto, Overhead
from .workload import Sizes, Workload


@dataclass
class Measurement:
    """One engine in one mode on one workload, and its runs so far.

    prompts, limits: the length of each request's prompt, and its limit of new tokens. slots: of the asynchronous
    batcher, also where this is a synchronous one. setting, prefill_tokens: what the batcher says of itself.
    runs: the timeline of each run, on several ranks that of rank 0, and its completions. ranks: for each run what each
    rank did, of several; nothing of one. profiled: the ranks of the run under torch.profiler.
    interrupted: its only run was ended by Ctrl-C, or by the loss of a rank: times and steps of what ran, and no
    completions."""

    workload: Workload
    sizes: Sizes
    engine: str
    mode: str
    slots: int = 2
    prompts: tuple[int, ...] = ()
    limits: tuple[int, ...] = ()
    setting: str | None = None
    prefill_tokens: int | str | None = None
    runs: list[tuple[Timeline, list[Completion]]] = field(default_factory=list)
    ranks: list[tuple[RankTimes, ...]] = field(default_factory=list)
    profiled: tuple[RankTimes, ...] = ()
    overhead: Overhead | None = None
    kineto: Kineto | None = None
    interrupted: bool = False
    _walls: dict[Timeline, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def _wall_s(self, timeline: Timeline) -> float:
        """Of a run that is over: asked for many times a report, and found by looking at all of its spans."""
        if timeline not in self._walls:
            self._walls[timeline] = timeline.summary().wall_s
        return self._walls[timeline]

    @property
    def middle(self) -> list[tuple[Timeline, list[Completion]]]:
        """The run of median wall time; of an even number of runs the two in the middle, the faster one first."""
        by_wall = sorted(self.runs, key=lambda run: self._wall_s(run[0]))
        return by_wall[(len(by_wall) - 1) // 2 : len(by_wall) // 2 + 1]

    @property
    def typical_run(self) -> tuple[Timeline, list[Completion]]:
        """The run that is drawn and explained: of two in the middle, the slower one."""
        return self.middle[-1]

    @property
    def typical(self) -> Timeline:
        return self.typical_run[0]

    def ranks_of(self, timeline: Timeline) -> tuple[RankTimes, ...]:
        """What each rank did in the run with this timeline; nothing of one rank."""
        each = zip(self.runs, self.ranks, strict=False)
        return next((ranks for (own, _), ranks in each if own is timeline), ())

    @property
    def middle_summaries(self) -> list[dict[str, Any]]:
        """Of each run in the middle the `Summary`, as a dict, of all ranks together."""
        return [summary_of(timeline, self.ranks_of(timeline)) for timeline, _ in self.middle]

    @cached_property
    def explanation(self) -> Explanation:
        """Of the typical run, made once: a preset writes its report again after each workload."""
        return Explanation.of(self.typical, self.mode, self.slots, self.early_stops, len(self.prompts))

    @property
    def early_stops(self) -> int:
        """How many requests of the typical run ended before their length limit."""
        limits = zip(self.typical_run[1], self.limits, strict=False)
        return sum(len(completion.token_ids) < limit for completion, limit in limits)

    @property
    def served(self) -> list[tuple[int, int]]:
        """(prompt tokens, new tokens) of each request of the typical run; nothing for an interrupted run."""
        completions = self.typical_run[1]
        return [(prompt, len(one.token_ids)) for prompt, one in zip(self.prompts, completions, strict=False)]

    @property
    def tokens(self) -> list[list[list[int]]]:
        """The tokens of each completion of each run; nothing for an interrupted run."""
        if self.interrupted:
            return []
        return [[list(completion.token_ids) for completion in completions] for _, completions in self.runs]

"""Which annotations of a trace are steps. An annotation is a name that a program gave to a stretch of its time;
engines, layers, data loaders and whole runs have them, in one another."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .events import Columns, Names

# What vLLM ("execute_context_2(128)_generation_6(6)") and SGLang ("step[DECODE bs=8]") wrap around each step.
OF_AN_ENGINE = re.compile(r"^(execute_(?!diffusion)|step\[)")
OF_THE_PROFILER = re.compile(r"^ProfilerStep")
MOST_GROUPS, MOST_JOINED = 100, 20
COVERED = 0.9  # of the work: annotations that hold less are no steps


class Group(NamedTuple):
    """Annotations of one pattern of names, or of several: starts and ends, in order, that do not overlap."""

    patterns: tuple[str, ...]
    starts: np.ndarray
    ends: np.ndarray


class Chosen(NamedTuple):
    """`step`: for each piece of work the number of its annotation, -1 where it is in none. `number`: annotations with
    work in them."""

    patterns: tuple[str, ...]
    step: np.ndarray
    number: int


def pattern_of(name: str) -> str:
    """The name with # in place of its numbers: the same for all occurrences of an annotation."""
    return re.sub(r"#?\d+", "#", name)


def groups_of(annotations: Columns, names: list[str], thread: int | None = None) -> list[Group]:
    """A group for each pattern of names whose annotations never overlap themselves: on one thread, or on all of them
    taken as one. At most the hundred that cover most time are given."""
    count = len(annotations["name"])
    rows = np.arange(count) if thread is None else np.flatnonzero(annotations["thread"] == thread)
    starts, ends, numbers = (annotations[key][rows] for key in ("start", "end", "name"))
    order = np.lexsort((ends, starts))
    starts, ends, numbers = starts[order], ends[order], numbers[order]
    patterns, pattern_numbers = Names(), np.zeros(len(names), np.int64)
    for number in np.unique(numbers).tolist():
        pattern_numbers[number] = patterns[pattern_of(names[number])]
    groups, of_row = [], pattern_numbers[numbers]
    for pattern, number in patterns.items():
        begins, stops = starts[of_row == number], ends[of_row == number]
        if (begins[1:] >= stops[:-1]).all():
            groups.append(Group((pattern,), begins, stops))
    return sorted(groups, key=lambda group: (-(group.ends - group.starts).sum(), group.patterns))[:MOST_GROUPS]


def choose(groups: Sequence[Group], times: np.ndarray, length: np.ndarray, copies: int) -> Chosen | None:
    """The annotations that are steps; None if none are.

    times, length: when each piece of work was launched (or ran), and how long it ran. copies: how many steps there are
    by the copies of results. The first of these that holds the work:

    1. what engines are known to wrap around a step, however often it occurs;
    2. ProfilerStep;
    3. where at most one result was copied out, an annotation that occurs once;
    4. annotations about as many as the copies of results. (Fewer are around whole runs, more are parts of steps.)"""
    ranked: list[tuple[tuple, Chosen]] = []
    for group in _engine_steps(groups) or _families(groups):
        index = np.searchsorted(group.starts, times, "right") - 1
        inside = (index >= 0) & (times <= group.ends[np.maximum(index, 0)])
        if length[inside].sum() < COVERED * length.sum():
            continue
        count = len(np.unique(index[inside]))
        far = abs(math.log(count / copies)) if copies and count else 0.0
        rank = _rank(group, count, copies, far)
        if rank is not None:
            key = (rank, far, len(group.patterns), count, group.patterns)
            ranked.append((key, Chosen(group.patterns, np.where(inside, index, -1), count)))
    return min(ranked, key=lambda one: one[0])[1] if ranked else None


def _rank(group: Group, count: int, copies: int, far: float) -> int | None:
    """Which of the four rules of `choose` takes the group; None if none does."""
    if not count:
        return None
    if all(OF_AN_ENGINE.search(pattern) for pattern in group.patterns):
        return 1
    if all(OF_THE_PROFILER.search(pattern) for pattern in group.patterns):
        return 2
    if count == 1:
        return 3 if copies <= 1 else None
    most = 2 if len(group.patterns) == 1 else 1.5
    return 4 if far <= math.log(most) else None


def _engine_steps(groups: Sequence[Group]) -> list[Group]:
    """All annotations that engines are known to wrap around their steps, as one group: of those in one another the
    outer ones. Nothing where there are none, or where they overlap in another way."""
    known = [group for group in groups if OF_AN_ENGINE.search(group.patterns[0])]
    if not known:
        return []
    starts = np.concatenate([group.starts for group in known])
    ends = np.concatenate([group.ends for group in known])
    of = np.concatenate([np.full(len(group.starts), at) for at, group in enumerate(known)])
    order = np.lexsort((-ends, starts))
    starts, ends, of = starts[order], ends[order], of[order]
    outer = np.r_[True, ends[1:] > np.maximum.accumulate(ends)[:-1]]
    starts, ends, of = starts[outer], ends[outer], of[outer]
    if (starts[1:] < ends[:-1]).any():
        return []
    return [Group(tuple(sorted(known[at].patterns[0] for at in np.unique(of).tolist())), starts, ends)]


def _families(groups: Sequence[Group]) -> Iterator[Group]:
    """Each group by itself; then those that can be kinds of one thing (prefill and decode) together: they never
    overlap, and they do not just follow each other in turn, as parts of a step would."""
    yield from groups
    seen = set()
    for first in groups[:MOST_JOINED]:
        family = [first]
        for other in groups[:MOST_JOINED]:
            if other is not first and all(_can_be_kinds(other, one) for one in family):
                family.append(other)
        patterns = tuple(sorted(one.patterns[0] for one in family))
        if len(family) > 1 and patterns not in seen:
            seen.add(patterns)
            starts = np.concatenate([one.starts for one in family])
            order = np.argsort(starts, kind="stable")
            yield Group(patterns, starts[order], np.concatenate([one.ends for one in family])[order])


def _can_be_kinds(one: Group, other: Group) -> bool:
    starts, ends = np.concatenate([one.starts, other.starts]), np.concatenate([one.ends, other.ends])
    order = np.argsort(starts, kind="stable")
    if not (starts[order][1:] >= ends[order][:-1]).all():
        return False
    of_one = order < len(one.starts)
    in_turn = len(one.starts) == len(other.starts) > 1 and bool((of_one[1:] != of_one[:-1]).all())
    return not in_turn

"""The kernels of one kind of step, as traces of torch.profiler tell of them, and the table of what they are for.

`tools/step_kernels.py` makes the traces: of several replays of a step's graph, whose kernels have names and times but
nothing that says what they compute, and of the same step without its graph, with each operator and its sizes.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from asyncbatch.measure.text import table_lines
from asyncbatch.profile.traces.events import (
    ANNOTATION,
    CATEGORIES,
    COPY,
    GRAPH_LAUNCH,
    KERNEL,
    OP,
    RUNTIME,
    nanoseconds,
)
from asyncbatch.timeline import union

PARTS = ("carry-over", "model", "sampling")  # of a step, between the moments that its runner marks
MARK = "step_kernels "  # how the profiler's trace names them
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}  # where the two factors begin
PRODUCT_NAMES = re.compile(r"nvjet|gemm|gemv|cutlass|cublas|splitk", re.IGNORECASE)
ATTENTION = "asyncbatch::paged_attention"
OWN_KERNELS = {"_decode": "attention, decode rows", "_prefill": "attention, chunks", "_store": "attention, chunks"}
ITEM_BYTES = {"c10::BFloat16": 2, "c10::Half": 2, "float": 4, "double": 8, "c10::Float8_e4m3fn": 1}


class Product(NamedTuple):
    """A matrix product: rows x inputs times inputs x outputs, `batch` of them, of numbers of so many bytes (0: not
    known)."""

    rows: int
    inputs: int
    outputs: int
    item_bytes: int
    batch: int = 1

    def __str__(self) -> str:
        of = f"{self.batch} x " if self.batch > 1 else ""
        return f"product {of}[{self.rows}, {self.inputs}] x [{self.inputs}, {self.outputs}]"

    def floor_us(self, bandwidth: float, rate: float) -> float | None:
        """The least time for one: to read the second factor, or to do the arithmetic."""
        if not self.item_bytes:
            return None
        numbers = self.batch * self.inputs * self.outputs
        return 1e6 * max(numbers * self.item_bytes / bandwidth, 2 * self.rows * numbers / rate)


class Origin(NamedTuple):
    """Where a kernel was launched: in which part of the step, by which operator that matters here ("" for another), and
    the product that this computes."""

    part: str
    operator: str = ""
    product: Product | None = None
    call: int = -1  # which call of the operator: one may launch several kernels


class Ran(NamedTuple):
    """One kernel, copy or memset on the device. Whole nanoseconds; `launch`: what the host's call of it is called by
    (its correlation): all kernels of a replay have that of the graph's launch."""

    name: str
    start: int
    end: int
    launch: int
    is_kernel: bool = True


def ran_on_device(trace: dict[str, Any]) -> list[Ran]:
    """All that ran on the device, in order of its start. trace: Chrome trace JSON of torch.profiler."""
    found = []
    for event in trace["traceEvents"]:
        kind = CATEGORIES.get(str(event.get("cat")).lower())
        if event.get("ph") == "X" and kind is not None and kind <= COPY:
            start = nanoseconds(event["ts"])
            launch = int(event.get("args", {}).get("correlation", 0))
            found.append(Ran(event["name"], start, start + nanoseconds(event["dur"]), launch, kind == KERNEL))
    return sorted(found, key=lambda one: (one.start, one.end))


def replays(trace: dict[str, Any]) -> tuple[list[list[Ran]], int]:
    """(what ran in each replay of a graph, how many replays were left out): those of which something was lost. All
    replays are of the same graph, so what most of them have is whole. ValueError if fewer than half are whole."""
    launches = {
        int(event["args"]["correlation"]): deque[Ran]()
        for event in trace["traceEvents"]
        if CATEGORIES.get(str(event.get("cat")).lower()) == RUNTIME and GRAPH_LAUNCH.match(event["name"])
    }
    for one in ran_on_device(trace):
        if one.launch in launches:
            launches[one.launch].append(one)
    if not launches:
        raise ValueError("the profiler saw no launch of a graph")
    contents = {launch: tuple(sorted(one.name for one in all_of_it)) for launch, all_of_it in launches.items()}
    most = max(Counter(contents.values()).items(), key=lambda item: (item[1], len(item[0])))[0]
    whole = [list(launches[launch]) for launch, names in contents.items() if names == most and names]
    if 2 * len(whole) < len(launches):
        raise ValueError(f"the profiler lost kernels: {len(whole)} of {len(launches)} replays have the same ones")
    return whole, len(launches) - len(whole)


def product_of(event: dict[str, Any]) -> Product | None:
    """The product that an operator's event tells of, if it is one and its sizes were noted."""
    first, args = PRODUCTS.get(event["name"]), event.get("args", {})
    sizes, types = args.get("Input Dims", ()), args.get("Input type", ())
    if first is None or len(sizes) < first + 2:
        return None
    a, b = sizes[first], sizes[first + 1]
    if len(a) not in (2, 3) or len(a) != len(b):
        return None
    item_bytes = ITEM_BYTES.get(types[first + 1], 0) if len(types) > first + 1 else 0
    return Product(a[-2], a[-1], b[-1], item_bytes, a[0] if len(a) == 3 else 1)


def origins(trace: dict[str, Any]) -> list[tuple[Ran, Origin]]:
    """What ran on the device, in order, and where it was launched: within which mark and which operator."""
    calls, around = {}, []
    for event in trace["traceEvents"]:
        kind = CATEGORIES.get(str(event.get("cat")).lower())
        if event.get("ph") != "X":
            continue
        if kind == RUNTIME:
            calls[int(event.get("args", {}).get("correlation", 0))] = nanoseconds(event["ts"])
        elif kind in (ANNOTATION, OP) and (event["name"].startswith(MARK) or event["name"] in (ATTENTION, *PRODUCTS)):
            begin = nanoseconds(event["ts"])
            around.append((begin, begin + nanoseconds(event["dur"]), event))
    around.sort(key=lambda one: (one[0], -one[1]))  # outer events before inner ones
    return [(one, _origin(calls.get(one.launch), around)) for one in ran_on_device(trace)]


def _origin(moment: int | None, around: Iterable[tuple[int, int, dict[str, Any]]]) -> Origin:
    origin = Origin("")
    for begin, end, event in around:
        if moment is None or not begin <= moment < end:
            continue
        if event["name"].startswith(MARK):
            origin = origin._replace(part=event["name"].removeprefix(MARK))
        else:
            origin = origin._replace(operator=event["name"], call=begin, product=product_of(event))
    return origin


def matched(replay: Sequence[Ran], eager: Sequence[tuple[Ran, Origin]]) -> list[Origin | None]:
    """The origin of each kernel of a replay: that of the same one, first, second, ..., of its name in the step without
    its graph. None for all kernels of a name of which the two have different numbers."""
    by_name: dict[str, deque[Origin]] = defaultdict(deque)
    for one, origin in eager:
        by_name[one.name].append(origin)
    counts = Counter(one.name for one in replay)
    same = {name for name, count in counts.items() if len(by_name[name]) == count}
    return [by_name[one.name].popleft() if one.name in same else None for one in replay]


# ---- the table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """What is for the same purpose, in one step: how many kernels or copies, their microseconds, those of their floor
    (None where there is none)."""

    name: str
    count: int
    us: float
    floor_us: float | None = None


@dataclass(frozen=True)
class StepTable:
    """One kind of step, on average over its replays, in microseconds; the groups that take longest come first.

    kernels_us: the sum over the groups; where kernels run at the same time, more than `busy_us`, in which anything ran.
    gaps, gaps_us, longest_gap_us: stretches within a step in which nothing ran. step_us: from the first kernel's start
    to the last one's end, busy_us + gaps_us; shortest_us and longest_us of all replays.
    unmatched: the names of those kernels of a step that were told by nothing else."""

    groups: tuple[Group, ...]
    kernels_us: float
    busy_us: float
    gaps: float
    gaps_us: float
    longest_gap_us: float
    step_us: float
    shortest_us: float
    longest_us: float
    replays: int
    left_out: int
    unmatched: tuple[str, ...]


def is_copy(one: Ran) -> bool:
    """A copy or a memset: also one that the driver does by a kernel of its own, as it does small ones of a graph."""
    return not one.is_kernel or one.name.startswith(("memcpy", "memset"))


def group_of(one: Ran, origin: Origin | None) -> str:
    """What a kernel is for, by where it was launched, or, where that is not known, by its name."""
    known = origin or Origin("")
    if one.name.startswith("nccl"):
        return "collectives"
    if is_copy(one):
        return "copies"
    if known.product:
        return str(known.product)
    if one.name in OWN_KERNELS or known.operator == ATTENTION:
        return OWN_KERNELS.get(one.name, "attention, other")
    if known.part in (PARTS[0], PARTS[2]):
        return known.part
    if PRODUCT_NAMES.search(one.name):
        return f"product by {one.name[:60]}"
    if origin is None and "argmax" in one.name.lower():
        return PARTS[2]
    if one.name.startswith("triton_"):
        return "norms, rotary embedding, activations, additions (Inductor)"
    return "other kernels"


def step_table(
    whole: Sequence[Sequence[Ran]],
    left_out: int,
    eager: Sequence[tuple[Ran, Origin]],
    bandwidth: float,
    rate: float,
    attention_bytes: float = 0.0,
) -> StepTable:
    """The table of a step's replays. eager: the same step without its graph. bandwidth, rate: bytes and operations a
    second. attention_bytes: the keys and values that its decode rows attend to."""
    us: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    calls: dict[str, dict[int, float | None]] = defaultdict(dict)
    gaps, busy_ns, spans = [], 0, []
    for replay in whole:
        known = matched(replay, eager)
        for one, origin in zip(replay, known, strict=True):
            name = group_of(one, origin)
            us[name] += 1e-3 * (one.end - one.start)
            counts[name] += 1
            if origin and origin.product:
                calls[name][origin.call] = origin.product.floor_us(bandwidth, rate)
        starts, ends = union(np.array([one.start for one in replay]), np.array([one.end for one in replay]))
        gaps += (starts[1:] - ends[:-1]).tolist()
        busy_ns += int((ends - starts).sum())
        spans.append(1e-3 * int(ends[-1] - starts[0]))
    number = len(whole)
    floors: dict[str, float] = {}
    for name, each in calls.items():
        known_us = [value for value in each.values() if value is not None]
        if len(known_us) == len(each):
            floors[name] = sum(known_us)
    if attention_bytes:
        floors[OWN_KERNELS["_decode"]] = 1e6 * attention_bytes / bandwidth
    groups = [Group(name, counts[name] // number, us[name] / number, floors.get(name)) for name in us]
    return StepTable(
        groups=tuple(sorted(groups, key=lambda group: -group.us)),
        kernels_us=sum(us.values()) / number,
        busy_us=1e-3 * busy_ns / number,
        gaps=len(gaps) / number,
        gaps_us=1e-3 * sum(gaps) / number,
        longest_gap_us=1e-3 * max(gaps, default=0),
        step_us=sum(spans) / number,
        shortest_us=min(spans),
        longest_us=max(spans),
        replays=number,
        left_out=left_out,
        unmatched=tuple(
            one.name
            for one, each in zip(whole[0], matched(whole[0], eager), strict=True)
            if one.is_kernel and each is None and not is_copy(one)
        ),
    )


def table_text(table: StepTable, events_us: float | None = None) -> str:
    """The table as text. events_us: the step by events around it, without a profiler."""
    rows = [("what", "a step", "us", "share", "its floor", "over it")]
    for group in table.groups:
        floor = ("", "") if not group.floor_us else (f"{group.floor_us:.1f}", f"{group.us / group.floor_us:.2f}x")
        rows.append((group.name, str(group.count), f"{group.us:.1f}", f"{group.us / table.kernels_us:.1%}", *floor))
    total = sum(group.count for group in table.groups)
    floors = sum(group.floor_us or 0.0 for group in table.groups)
    rows.append(("all of them", str(total), f"{table.kernels_us:.1f}", "100.0%", f"{floors:.1f}", ""))
    rows.append(("gaps between them", f"{table.gaps:.0f}", f"{table.gaps_us:.1f}", "", "", ""))
    rows.append(("the step, first kernel to last", "", f"{table.step_us:.1f}", "", "", ""))
    if events_us is not None:
        rows.append(("the step, by events around it, without profiler", "", f"{events_us:.1f}", "", "", ""))
    lines = table_lines(rows, align="<>")
    lines.append(f"mean of {table.replays} replays, {table.shortest_us:.1f} to {table.longest_us:.1f} us each; "
                 f"longest gap {table.longest_gap_us:.1f} us")  # fmt: skip
    if table.kernels_us > table.busy_us + 0.05:
        lines.append(f"some ran at the same time: something ran for {table.busy_us:.1f} us")
    if table.left_out:
        lines.append(f"{table.left_out} replays are left out: the profiler lost kernels of them")
    if table.unmatched:
        names = ", ".join(sorted({name[:60] for name in table.unmatched}))
        lines.append(f"{len(table.unmatched)} ran otherwise without the graph, and are told by their names: {names}")
    return "\n".join(lines)

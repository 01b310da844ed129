"""What a report is: all that the profiling script says, as frozen dataclasses that read and write JSON.

`Report.to_json()` is what stands in report.json. `Report.from_json(data)` takes such a file's content, also that of
older versions. docs/report.md says what each field means; the names here are the names there.

Times are seconds, but milliseconds in names with `ms`; shares are from 0 to 1. None stands for what was not measured,
or what the file of an older version does not have. `diagnosis.py` makes reports, `text.py` and `page.py` show them.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from .conditions import Conditions, Gpu, ModelFacts
from .old_reports import of_today
from .rank_records import RankRun, Slowest
from .record import AnyRecord, Record

SCHEMA = 5
OWN = "asyncbatch"  # the name of this package among the engines
VOID = "Void"  # with it a sentence begins that has to be read before all numbers


# ---- the parts of a run -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PointTimes(Record):
    """A latency point: its times in the decode steps, and its share of the time of its side, `where`."""

    name: str = ""
    where: str = ""
    median_ms: float | None = None
    p99_ms: float | None = None
    total_s: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class IdleGap(Record):
    """The device idle before decode step `step`: since when, for how long, and why for most of it."""

    step: int | None = None
    at_s: float = 0.0
    ms: float = 0.0
    cause: str = ""


@dataclass(frozen=True)
class IdleTime(Record):
    """All idle time before decode steps, in seconds; `by` cause it adds up to `idle_s`. all_idle_s, all_by: the same
    before all steps, prefill and mixed ones too."""

    LATER = ("all_idle_s", "all_by")

    idle_s: float = 0.0
    by: dict[str, float] = field(default_factory=dict)
    longest: tuple[IdleGap, ...] = ()
    all_idle_s: float | None = None
    all_by: dict[str, float] | None = None


@dataclass(frozen=True)
class WhatIf(Record):
    """Both loops' time if the latency point took `factor` (0 or a half) of its time, and the share which that saves."""

    point: str = ""
    where: str = ""
    factor: float | None = None
    sync_s: float | None = None
    async_s: float | None = None
    sync_saves: float | None = None
    async_saves: float | None = None


@dataclass(frozen=True)
class Prediction(Record):
    """Both loops simulated from a synchronous run. Of one step, in the median: host_ms, the host's work; between_ms,
    what lies between two steps, copies and waking up too; device_ms, the step on the device. slots: of the
    asynchronous loop; early_stops: requests that ended before their length limit, each of which costs it tokens."""

    LATER = ("host_ms", "slots", "early_stops")

    sync_s: float | None = None
    async_s: float | None = None
    gain: float | None = None
    helps: bool | None = None
    host_ms: float | None = None
    between_ms: float | None = None
    device_ms: float | None = None
    slots: int | None = None
    early_stops: int | None = None
    text: str | None = None


@dataclass(frozen=True)
class MedianAndP99(Record):
    """Of one of the `Latency` times over the requests, in milliseconds."""

    median: float | None = None
    p99: float | None = None


@dataclass(frozen=True)
class Latency(Record):
    """What those who wait for the tokens notice."""

    first_token_ms: MedianAndP99 = MedianAndP99()
    per_token_ms: MedianAndP99 = MedianAndP99()
    end_to_end_ms: MedianAndP99 = MedianAndP99()


@dataclass(frozen=True)
class ContextSteps(Record):
    """Decode steps of about one context: medians of their time on the device, beside what the bandwidth allows.
    context: tokens of a row, the mean over the rows."""

    rows: int = 1
    context: float = 0.0
    ms: float | None = None
    floor_ms: float | None = None
    over_floor: float | None = None


@dataclass(frozen=True)
class Floor(Record):
    """A run beside its floor, the time that the memory bandwidth alone asks for."""

    floor_s: float | None = None
    time_over_floor: float | None = None
    first_context: ContextSteps | None = None
    last_context: ContextSteps | None = None
    kv_bytes_per_s: float | None = None


@dataclass(frozen=True)
class RequestFloor(Record):
    """A run beside the least time that its requests need (see `measure.bandwidth.requests_floor`). collectives_s: the
    part of it that is sums between ranks; None where the model is not shared."""

    LATER = ("collectives_s",)

    floor_s: float | None = None
    time_over_floor: float | None = None
    decode_steps: int | None = None
    decode_s: float | None = None
    prompts_s: float | None = None
    collectives_s: float | None = None


@dataclass(frozen=True)
class Overhead(Record):
    """What measuring costs: a share of a step, where that lies with 95 % confidence, and the share of each pair."""

    share: float | None = None
    interval: tuple[float, ...] | None = None
    ms_per_step: float | None = None
    pairs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Kineto(Record):
    """One run measured by two methods: torch.profiler, and the events around each step."""

    busy: float | None = None
    step_active: float | None = None
    event_active: float | None = None
    differs: bool | None = None
    kernels: int | None = None
    note: str | None = None


# ---- runs ---------------------------------------------------------------------------------------------------------

SUMMARY = ("wall_s", "tokens", "tokens_per_s", "steps", "decode_steps", "device_active", "idle", "host_ms_per_step",
           "wasted_tokens")  # fmt: skip
SERVED = ("model", "batch_size", "requests", "prompt_tokens", "new_tokens")


@dataclass(frozen=True)
class Totals(Record):
    """What is known of any run, measured here or read from a recording.

    host_ms_per_step and device_ms_per_step are medians over the decode steps, device_active and idle shares of them.
    prompt_tokens and new_tokens are the largest of the requests. floor: None where there is no GPU."""

    ORDER: ClassVar[tuple[str, ...]] = ()  # of the keys in JSON; there the floor's fields stand among the run's own

    engine: str | None = None
    mode: str | None = None
    wall_s: float | None = None
    tokens: int | None = None
    tokens_per_s: float | None = None
    steps: int | None = None
    decode_steps: int | None = None
    device_active: float | None = None
    idle: float | None = None
    host_ms_per_step: float | None = None
    wasted_tokens: int | None = None
    device_ms_per_step: float | None = None
    model: str | None = None
    batch_size: int | None = None
    requests: int | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    setting: str | None = None
    prefill_tokens: int | str | None = None
    floor: Floor | None = None

    @classmethod
    def from_json(cls: type[AnyRecord], data: dict[str, Any]) -> AnyRecord:
        has_floor = any(one.name in data for one in fields(Floor))
        return super().from_json({**data, "floor": data if has_floor else None})

    def to_json(self) -> dict[str, Any]:
        made = self.json_of(self.ORDER)
        return made | (made.pop("floor") or {})

    @property
    def longest(self) -> int:
        """Tokens that no request is longer than."""
        return (self.prompt_tokens or 0) + (self.new_tokens or 0)

    @property
    def floor_s(self) -> float | None:
        return self.floor.floor_s if self.floor else None

    @property
    def time_over_floor(self) -> float | None:
        return self.floor.time_over_floor if self.floor else None

    @property
    def first_context(self) -> ContextSteps | None:
        return self.floor.first_context if self.floor else None

    @property
    def last_context(self) -> ContextSteps | None:
        return self.floor.last_context if self.floor else None


@dataclass(frozen=True)
class RecordedRun(Totals):
    """What the session that made a recording measured itself; `setting` says how much of it is counted."""

    ORDER = (*SERVED, "engine", "mode", "prefill_tokens", *SUMMARY, "setting", "device_ms_per_step", "floor")


@dataclass(frozen=True)
class Run(Totals):
    """The runs of one engine in one mode on one workload: the one of median wall time; of an even number of runs the
    figures are the means of the two in the middle, and points, gaps, what-if and prediction are of the slower of these.

    Of several ranks, tokens and steps are those of all replicas together, shares and times of a step the means over the
    ranks; points, gaps, what-if and prediction are rank 0's. `ranks`: each by itself. `slowest`: of each replica whose
    model is shared, the rank that the others wait for.

    measured_steps: how many decode steps active and idle are of. idle_all_steps: idle over all steps but the first.
    interrupted: it was ended by Ctrl-C, so its numbers are about what ran until then. workload: its name, in a preset
    whose workloads have one. longest_gap_ms: the longest that the device was idle between two steps of any kind."""

    ORDER = ("engine", "mode", *SUMMARY, "device_ms_per_step", "latency", "wall_s_of_each_run", *SERVED, "setting",
             "prefill_tokens", "interrupted", "overhead", "kineto", "points", "gaps", "what_if", "prediction",
             "workload", "longest_gap_ms", "request_floor", "measured_steps", "idle_all_steps", "ranks", "slowest",
             "floor")  # fmt: skip
    LATER = ("workload", "longest_gap_ms", "request_floor", "measured_steps", "idle_all_steps", "ranks", "slowest")

    latency: Latency | None = None
    wall_s_of_each_run: tuple[float, ...] = ()
    interrupted: bool = False
    overhead: Overhead | None = None
    kineto: Kineto | None = None
    points: tuple[PointTimes, ...] = ()
    gaps: IdleTime | None = None
    what_if: tuple[WhatIf, ...] = ()
    prediction: Prediction | None = None
    workload: str | None = None
    longest_gap_ms: float | None = None
    request_floor: RequestFloor | None = None
    measured_steps: int | None = None
    idle_all_steps: float | None = None
    ranks: tuple[RankRun, ...] | None = None
    slowest: tuple[Slowest, ...] | None = None

    @property
    def replicas(self) -> int:
        return len({one.replica for one in self.ranks or ()}) or 1

    @property
    def explained_wall_s(self) -> float | None:
        """Wall time of the one run that points and gaps are of: the whole of which their seconds are shares. It is the
        slower of two in the middle, of which wall_s is the mean; until version 4 wall_s was that run's own."""
        each = self.wall_s_of_each_run
        return self.wall_s if not each or self.wall_s in each else statistics.median_high(each)

    @property
    def request_floor_s(self) -> float | None:
        return self.request_floor.floor_s if self.request_floor else None

    @property
    def time_over_request_floor(self) -> float | None:
        return self.request_floor.time_over_floor if self.request_floor else None


@dataclass(frozen=True)
class Comparison(Record):
    """This package's two loops on one workload.

    async_speedup: synchronous over asynchronous wall time, the median over the pairs of runs that count; None where
    that is void. interval: where that median lies, with the share `confidence`. pairs: the ratio of each pair.
    device_ratios: for each pair how much longer equal steps took the device in the asynchronous run; None where there
    were none to compare.
    law_idle: the idle share of the synchronous device by the law host / (host + device)."""

    LATER = ("workload", "interval", "confidence", "pairs", "device_ratios")

    model: str | None = None
    batch_size: int | None = None
    async_speedup: float | None = None
    interval: tuple[float, ...] | None = None
    confidence: float | None = None
    pairs: tuple[float, ...] | None = None
    device_ratios: tuple[float, ...] | None = None
    law_idle: float | None = None
    workload: str | None = None


@dataclass(frozen=True)
class Failure(Record):
    """An engine that could not be measured in a mode, and why, in one line."""

    LATER = ("workload",)

    engine: str = ""
    mode: str = ""
    model: str | None = None
    batch_size: int | None = None
    error: str = ""
    workload: str | None = None


def workload_key(one: Run | Comparison | Failure) -> tuple[str | None, str | None, int | None]:
    """What tells the workloads of a report apart."""
    return one.workload, one.model, one.batch_size


def workload_words(one: Run | Comparison | Failure) -> str:
    """What its workload is called where there are several."""
    return one.workload or f"{one.model}, batch {one.batch_size}"


# ---- the whole ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report(Record):
    """All that a session of the profiling script says.

    same_tokens: whether all runs of this package on one workload gave the same tokens; peers_same_tokens: the same of
    each other engine. Only where there is one workload: async_speedup, law_idle, and the first sentences. idleness: how
    idle the device is; causes: why; waits: how ranks wait for each other, where there are several; first: what to
    eliminate first; verdict: what asynchronous batching brings; trust: what speaks against it."""

    LATER = ("matmul_flops_per_s", "idleness", "causes", "waits", "trust")

    schema: int | None = None
    model: str | None = None
    device: str | None = None
    emulated: str | None = None
    preset: str | None = None
    same_tokens: bool | None = None
    peers_same_tokens: dict[str, bool] = field(default_factory=dict)
    runs: tuple[Run, ...] = ()
    failed: tuple[Failure, ...] = ()
    recorded: tuple[RecordedRun, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    async_speedup: float | None = None
    law_idle: float | None = None
    workload: Conditions = Conditions()
    gpu: Gpu | None = None
    copy_bandwidth_bytes_per_s: float | None = None
    models: dict[str, ModelFacts] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    machine: str | None = None
    date: str | None = None
    command: str | None = None
    idleness: str | None = None
    causes: str | None = None
    first: str | None = None
    verdict: str | None = None
    trust: tuple[str, ...] | None = None
    matmul_flops_per_s: float | None = None
    waits: str | None = None

    @classmethod
    def from_json(cls: type[AnyRecord], data: dict[str, Any]) -> AnyRecord:
        return super().from_json(of_today(data))

    @property
    def sentences(self) -> list[str]:
        """What is to be read first, in order: first of all, what makes the measurement void."""
        trust = list(self.trust or ())
        void = [one for one in trust if one.startswith(VOID)]
        found = (*void, self.idleness, self.causes, self.waits, self.first, self.verdict, *trust[len(void) :])
        return [one for one in found if one]

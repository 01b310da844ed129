"""Recordings: what was measured on real GPUs, as small JSON files, and a timed device made from them.

    recording = Recording.load("h200-llama-8b")           # Recording.names() says which ones are shipped
    recording.step_s(batch_size=32, context=32 * 4096, kind="decode")     # seconds on that GPU
    SyncBatcher(recording.stand_in_model(), step_s=recording.step_times(32), max_batch_size=32)

A recording is one session of `python -m asyncbatch.profile --record NAME --out DIR` on one GPU: what ran where, and of
each run every step's time on the device, idle gap before it, host work, rows, context and tokens. Times are rounded to
whole microseconds once; everything in `totals` is computed from the rounded steps, so `check` can demand that they
agree exactly, and a SHA-256 of the whole shows that nobody edited the file.

Numbers that are constant or rise evenly for long stretches (rows, context, ...) are packed: [first, increment, count].
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..devices.timed import StepTimes
from ..devices.virtual import HOST_PHASES, Costs
from ..timeline import Timeline, device_activity

SCHEMA = 1
BINS = 64  # points of the curve of device time against context: many enough to follow it, few enough for smooth medians
KINDS = ("decode", "prefill")
PACKED = ("rows", "context", "tokens", "wasted")
KEYS = {
    "recording": (
        "schema", "name", "gpu", "versions", "machine", "command", "date", "copy_bandwidth_bytes_per_s", "models",
        "runs", "failed", "sha256",
    ),
    "gpu": ("name", "memory_gib", "driver", "compute_capability"),
    "versions": ("python", "torch", "transformers", "triton", "cuda"),
    "model": ("dtype", "weight_bytes", "kv_bytes_per_token", "vocab_size", "max_positions"),
    "run": (
        "engine", "mode", "setting", "model", "batch_size", "requests", "prompt_tokens", "new_tokens",
        "prefill_tokens", "wall_s_of_each_run", "totals", "phase_us", "steps",
    ),
    "totals": (
        "wall_s", "tokens", "tokens_per_s", "steps", "decode_steps", "device_active", "idle", "host_ms_per_step",
        "wasted_tokens",
    ),
    "steps": ("before_us", "after_us", "device_us", "gap_us", "host_us", "kind", *PACKED),
}  # fmt: skip
# Not every engine or machine has these: stated as null.
MAY_BE_NULL = ("triton", "prefill_tokens", "setting", "device_active", "idle", "host_ms_per_step")


def pack(values: Sequence[int]) -> list[list[int]]:
    """Integers as arithmetic runs [first, increment, count]; a run of one has increment 0."""
    runs: list[list[int]] = []
    for value in map(int, values):
        if runs:
            first, increment, count = runs[-1]
            if count == 1:
                runs[-1] = [first, value - first, 2]
                continue
            if value == first + increment * count:
                runs[-1][2] += 1
                continue
        runs.append([value, 0, 1])
    return runs


def unpack(runs: Sequence[Sequence[int]]) -> list[int]:
    """The integers that `pack` was given. ValueError for anything else."""
    values: list[int] = []
    for run in runs:
        if len(run) != 3 or any(type(part) is not int for part in run) or run[2] < 1:
            raise ValueError(f"{run!r} is no arithmetic run [first, increment, count] of whole numbers, count from 1")
        first, increment, count = run
        values.extend([first + increment * place for place in range(count)])
    return values


class Steps(NamedTuple):
    """The steps of one run, in order; every array has one element a step.

    device_us, gap_us: int64 microseconds on the device, and idle before it (0 for the first). Device times are those of
    CUDA events, so a gap can come out slightly negative. host_us: float64, host work that is not waiting; nan where
    none was recorded. kind: "decode" or "prefill" (any prefill row). rows, context, tokens, wasted: int64; context
    counts, over all rows, the tokens that the row's last query attends to.
    before_us, after_us: from the run's beginning to the first step on the device, and from the last one to the end.
    """

    before_us: int
    after_us: int
    device_us: np.ndarray
    gap_us: np.ndarray
    host_us: np.ndarray
    kind: np.ndarray
    rows: np.ndarray
    context: np.ndarray
    tokens: np.ndarray
    wasted: np.ndarray

    def first(self, count: int) -> Steps:
        """The run as it would be with its first `count` steps only."""
        return Steps(self.before_us, self.after_us, *(array[:count] for array in self[2:]))

    def totals(self) -> dict[str, Any]:
        """The same numbers as `Timeline.summary().as_dict()`, from the rounded times."""
        ends = np.cumsum(self.gap_us + self.device_us)
        decode = self.kind == "decode"
        active_us, period_us = device_activity(ends - self.device_us, ends, decode)
        wall_s = round(1e-6 * (self.before_us + int(ends[-1] if len(ends) else 0) + self.after_us), 6)
        tokens = int(self.tokens.sum())
        active = min(1.0, active_us / period_us) if period_us > 0 else None
        host = self.host_us[decode & ~np.isnan(self.host_us)]
        return {
            "wall_s": wall_s,
            "tokens": tokens,
            "tokens_per_s": tokens / wall_s if wall_s > 0 else 0.0,
            "steps": len(ends),
            "decode_steps": int(decode.sum()),
            "device_active": active,
            "idle": None if active is None else 1.0 - active,
            "host_ms_per_step": 1e-3 * float(np.median(host)) if len(host) else None,
            "wasted_tokens": int(self.wasted.sum()),
        }


def steps_of(run: dict[str, Any]) -> Steps:
    """The unpacked steps of one of a recording's `runs`. ValueError if they do not fit together."""
    stored = run["steps"]
    device, gap = (np.array(stored[key], np.int64) for key in ("device_us", "gap_us"))
    host = np.array([math.nan if value is None else value for value in stored["host_us"]], float)
    kinds = np.array([kind for kind, count in stored["kind"] for _ in range(count)], object)
    numbers = [np.array(unpack(stored[key]), np.int64) for key in PACKED]
    arrays = dict(zip(Steps._fields[2:], (device, gap, host, kinds, *numbers), strict=True))
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"the lists of a run's steps differ in length: {lengths}")
    return Steps(stored["before_us"], stored["after_us"], device, gap, host, kinds, *numbers)


def steps_from(timeline: Timeline) -> Steps:
    """The steps of a measured timeline, rounded to whole microseconds.

    ValueError if a step has no time on the device (it failed), or the timeline has no step at all."""
    _, numbers, starts, ends = timeline.lane("compute")
    known = {step.step: step for step in timeline.steps}
    if not known or sorted(known) != sorted(numbers.tolist()):
        raise ValueError(
            f"the timeline {timeline.label!r} has {len(known)} steps and {len(numbers)} of them on the device: "
            "only a run whose every step was measured can be recorded"
        )
    # The moments are rounded, not the differences: so the sum of all parts is the wall time to the microsecond.
    starts, ends = (np.rint(1e6 * (times - timeline.origin)).astype(np.int64) for times in (starts, ends))
    last = round(1e6 * (max(span.end for span in timeline.spans) - timeline.origin))
    host: dict[int, float] = {}
    for span in timeline.spans:
        if span.lane == "host" and span.name != "wait":
            host[span.step] = host.get(span.step, 0.0) + span.end - span.start
    steps = [known[number] for number in numbers.tolist()]
    return Steps(
        int(starts[0]),
        int(last - ends[-1]),
        ends - starts,
        np.r_[0, starts[1:] - ends[:-1]],
        np.array([round(1e6 * host[step.step]) if step.step in host else math.nan for step in steps], float),
        np.array([step.kind for step in steps], object),
        *(np.array([getattr(step, key) for step in steps], np.int64) for key in PACKED),
    )


def phase_medians_us(timeline: Timeline) -> dict[str, float]:
    """Microseconds of each host span name ("plan", "wait", ...), median over the decode steps that have it."""
    decode = {step.step for step in timeline.steps if step.kind == "decode"}
    times: dict[str, dict[int, float]] = {}
    for span in timeline.spans:
        if span.lane == "host" and span.step in decode:
            of_name = times.setdefault(span.name, {})
            of_name[span.step] = of_name.get(span.step, 0.0) + span.end - span.start
    return {name: round(1e6 * statistics.median(of_name.values()), 1) for name, of_name in times.items()}


class Recording:
    """One recorded session. `data` is the JSON file's content: `KEYS` says what is in it.

    `runs` holds a dict for each engine, mode, model and batch size (`steps_of(run)` unpacks its steps), `failed` says
    of the others why they are missing. `models[name]` has dtype, weight_bytes, kv_bytes_per_token, vocab_size and
    max_positions.
    """

    def __init__(self, data: dict[str, Any]):
        self.data = data

    def __repr__(self) -> str:
        return f"Recording({self.name!r}, {self.gpu['name']}, {len(self.runs)} runs)"

    @property
    def name(self) -> str:
        return self.data["name"]

    @property
    def gpu(self) -> dict[str, Any]:
        return self.data["gpu"]

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        return self.data["models"]

    @property
    def runs(self) -> list[dict[str, Any]]:
        return self.data["runs"]

    # ---- files -------------------------------------------------------------------------------------------------

    @staticmethod
    def names() -> list[str]:
        """The recordings that come with the package."""
        folder = importlib.resources.files(__package__) / "recordings"
        if not folder.is_dir():
            return []
        return sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recording:
        """A shipped recording by its name, or a file. ValueError if there is none, or it does not pass `check`."""
        if str(name_or_path) in cls.names():
            folder = importlib.resources.files(__package__) / "recordings"
            text = (folder / f"{name_or_path}.json").read_text(encoding="utf-8")
        elif Path(name_or_path).is_file():
            text = Path(name_or_path).read_text(encoding="utf-8", errors="replace")
        else:
            known = ", ".join(cls.names()) or "none is shipped"
            raise ValueError(f"there is no recording {str(name_or_path)!r}; allowed: {known}, or the path of a file")
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{name_or_path} is no recording: not JSON ({error})") from None
        recording = cls(data)
        recording.check()
        return recording

    def save(self, path: str | Path) -> None:
        """Write it as JSON, a line for each run. ValueError if it does not pass `check`."""
        self.check()
        lines = []
        for key, value in self.data.items():
            if key == "runs":
                text = "[\n" + ",\n".join("  " + _compact(run) for run in value) + "\n ]"
            else:
                text = json.dumps(value, allow_nan=False)
            lines.append(f" {json.dumps(key)}: {text}")
        Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    @classmethod
    def from_runs(cls, name: str, report: dict[str, Any], timelines: Sequence[Timeline]) -> Recording:
        """The recording of a session: `report` as `asyncbatch.profile` makes it on CUDA, and the timeline of each of
        its runs, in the same order. ValueError if a run has steps that were not measured."""
        runs = []
        for row, timeline in zip(report["runs"], timelines, strict=True):
            steps = steps_from(timeline)
            run = {key: row[key] for key in KEYS["run"] if key not in ("totals", "phase_us", "steps")}
            run["wall_s_of_each_run"] = [round(wall_s, 6) for wall_s in run["wall_s_of_each_run"]]
            kinds: list[list[Any]] = []
            for kind in steps.kind.tolist():
                if kinds and kinds[-1][0] == kind:
                    kinds[-1][1] += 1
                else:
                    kinds.append([kind, 1])
            stored: dict[str, Any] = {"before_us": steps.before_us, "after_us": steps.after_us}
            stored |= {"device_us": steps.device_us.tolist(), "gap_us": steps.gap_us.tolist()}
            stored["host_us"] = [None if value != value else int(value) for value in steps.host_us.tolist()]
            stored["kind"] = kinds
            stored |= {key: pack(getattr(steps, key).tolist()) for key in PACKED}
            runs.append({**run, "totals": steps.totals(), "phase_us": phase_medians_us(timeline), "steps": stored})
        data = {"schema": SCHEMA, "name": name}
        data |= {key: report[key] for key in KEYS["recording"][2:] if key not in ("runs", "failed", "sha256")}
        data |= {"failed": list(report.get("failed", [])), "runs": runs}
        data = json.loads(_compact(data))  # plain JSON values only, as after loading
        recording = cls({**data, "sha256": _digest(data)})
        recording.check()
        return recording

    # ---- honesty -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """ValueError that names what is missing, or which total does not follow from the steps of its run."""
        data = self.data
        if not isinstance(data, dict):
            raise ValueError(f"a recording is a JSON object, not a {type(data).__name__}")
        label = f"recording {data.get('name')!r}"
        _demand(label, data, "recording")
        if data["schema"] != SCHEMA:
            raise ValueError(f"{label}: schema is {data['schema']!r}, this version reads {SCHEMA}")
        for part in ("gpu", "versions"):
            _demand(f"{label}, {part}", data[part], part)
        for name, model in data["models"].items():
            _demand(f"{label}, model {name}", model, "model")
        if not data["runs"]:
            raise ValueError(f"{label}: there is no run in it")
        for run in data["runs"]:
            where = f"{label}, {' '.join(str(run.get(key)) for key in ('model', 'batch_size', 'engine', 'mode'))}"
            _demand(where, run, "run")
            if run["model"] not in data["models"]:
                raise ValueError(f"{where}: its model is not among the models {sorted(data['models'])}")
            self._check_run(where, run)
        if data["sha256"] != _digest({key: value for key, value in data.items() if key != "sha256"}):
            raise ValueError(f"{label}: it is not what was written (its sha256 differs): recordings are not edited")

    @staticmethod
    def _check_run(where: str, run: dict[str, Any]) -> None:
        _demand(f"{where}, totals", run["totals"], "totals")
        _demand(f"{where}, steps", run["steps"], "steps")
        try:
            steps = steps_of(run)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from None
        if set(steps.kind.tolist()) - set(KINDS):
            raise ValueError(f"{where}: kinds of steps are {sorted(set(steps.kind))}, allowed are {', '.join(KINDS)}")
        if not len(steps.kind) or steps.gap_us[0] != 0:
            raise ValueError(f"{where}: there is no step, or a gap before the first one")
        for key, value in steps.totals().items():
            stated = run["totals"][key]
            same = value == stated if None in (value, stated) else math.isclose(value, stated, rel_tol=1e-9)
            if not same:
                raise ValueError(f"{where}: {key} is stated as {stated}, and its steps give {value}")
        walls = sorted(run["wall_s_of_each_run"])
        if not walls or abs(walls[(len(walls) - 1) // 2] - run["totals"]["wall_s"]) > 2e-6:
            raise ValueError(
                f"{where}: wall_s {run['totals']['wall_s']} is not the median of wall_s_of_each_run {walls}"
            )

    # ---- the timed device --------------------------------------------------------------------------------------

    def main_run(self, model: str | None = None) -> dict[str, Any]:
        """The run of this package's asynchronous batcher with the widest range of contexts, of `model` or of all.
        ValueError if there is none."""
        runs = self._own_runs(model)
        return max(runs, key=lambda run: (lambda context: context.max() - context.min())(steps_of(run).context))

    def _own_runs(self, model: str | None) -> list[dict[str, Any]]:
        runs = [run for run in self.runs if (run["engine"], run["mode"]) == ("asyncbatch", "async")]
        found = [run for run in runs if model in (None, run["model"])]
        if not found:
            have = ", ".join(dict.fromkeys(run["model"] for run in runs)) or "none"
            raise ValueError(
                f"{self.name} has no asynchronous run of {model or 'this package'}; recorded models: {have}"
            )
        return found

    def step_times(self, batch_size: int, model: str | None = None) -> StepTimes:
        """How long a step of `batch_size` rows took on the recorded GPU, for every context up to the largest recorded.

        The curve of device time against context is that of `main_run(model)`, in medians; for another batch size it is
        moved up or down to what that batch size took at its smallest context (linear between recorded batch sizes;
        a smaller batch than the smallest recorded takes as long as that). Any prefill step takes their median.
        The largest context is that of the recorded workload, if its steps came within 5 % of it.
        ValueError for a batch size beyond the largest recorded, or a model that was not recorded."""
        main = self.main_run(model)
        runs = {run["batch_size"]: run for run in self._own_runs(main["model"])}
        runs[main["batch_size"]] = main
        batches = sorted(runs)
        if not isinstance(batch_size, int) or not 1 <= batch_size <= batches[-1]:
            raise ValueError(
                f"batch size {batch_size!r}: {self.name} was recorded with {main['model']} at batch sizes "
                f"{', '.join(map(str, batches))}; allowed are 1 to {batches[-1]}"
            )
        curves = {batch: _curve(steps_of(run)) for batch, run in runs.items()}
        contexts, seconds = curves[main["batch_size"]]
        smallest = np.interp(batch_size, batches, [curves[batch][0][0] for batch in batches])
        base = np.interp(batch_size, batches, [curves[batch][1][0] for batch in batches])
        moved = seconds + base - np.interp(smallest, contexts, seconds)
        steps = steps_of(main)
        prefill = steps.device_us[steps.kind == "prefill"]
        if not len(prefill):
            raise ValueError(f"{self.name} has no prefill step of {main['model']}: it cannot time a whole run")
        prefill_s = 1e-6 * float(np.median(prefill))
        # Requests join one after another, so no step had all of them at their longest. A machine on which they join in
        # another order may come a little closer to that, and is not refused for it.
        most = int(steps.context.max())
        longest = min(main["requests"], main["batch_size"]) * (main["prompt_tokens"] + main["new_tokens"] - 1)
        most = max(most, min(longest, int(1.05 * most)))
        return StepTimes(self.name, contexts, np.maximum(moved, 0.0), prefill_s, most)

    def costs(self, batch_size: int, model: str | None = None) -> Costs:
        """The times of this GPU and its host for the virtual clock: steps by context, as `step_times` gives them, and
        the medians of the asynchronous loop's host parts at the nearest recorded batch size. The copies were not timed:
        0 here, and `dataclasses.replace` gives them others.
        ValueError for a batch size or model that was not recorded, and, when a batcher launches it, for a step with
        more context than was recorded."""
        times, main = self.step_times(batch_size, model), self.main_run(model)
        runs = [main, *(run for run in self.runs if all(run[k] == main[k] for k in ("engine", "mode", "model")))]
        phases = min(runs, key=lambda run: abs(run["batch_size"] - batch_size))["phase_us"]
        host = {phase: 1e-6 * phases[phase] for phase in HOST_PHASES}
        return Costs(**host, copy_in=0.0, step=lambda work: times(work.kind, work.context), copy_out=0.0)

    def step_s(self, batch_size: int, context: int, kind: str = "decode", model: str | None = None) -> float:
        """Seconds of one step on the recorded GPU. context: tokens over all its rows. ValueError beyond what was
        recorded; `step_times` says how it is found."""
        return self.step_times(batch_size, model)(kind, context)

    def stand_in_model(self, model: str | None = None):
        """A tiny Llama of a few MB with the vocabulary and the positions of a recorded model, random weights: what a
        batcher on the timed device holds instead of the real one, since nothing is computed with it."""
        from ..models.toy import toy_llama

        facts = self.models[self.main_run(model)["model"]]
        return toy_llama(facts["vocab_size"], max_positions=facts["max_positions"], tied=True)


def _curve(steps: Steps) -> tuple[np.ndarray, np.ndarray]:
    """(contexts, seconds) of the full decode steps in at most `BINS` medians, contexts rising."""
    decode = steps.kind == "decode"
    if not decode.any():
        raise ValueError("a run without a decode step says nothing about their times")
    full = np.flatnonzero(decode & (steps.rows == steps.rows[decode].max()))
    order = full[np.argsort(steps.context[full], kind="stable")]
    parts = np.array_split(order, min(BINS, len(order)))
    contexts = np.array([np.median(steps.context[part]) for part in parts])
    seconds = 1e-6 * np.array([np.median(steps.device_us[part]) for part in parts])
    contexts, first = np.unique(contexts, return_index=True)  # a context that fills several bins
    return contexts, seconds[first]


def _demand(where: str, found: Any, part: str) -> None:
    missing = [key for key in KEYS[part] if not isinstance(found, dict) or key not in found]
    missing += [key for key in KEYS[part] if key not in missing and found[key] is None and key not in MAY_BE_NULL]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing")


def _compact(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _digest(data: dict[str, Any]) -> str:
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

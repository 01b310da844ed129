"""What the profiling script says: the report as a dict, its table, and what the numbers mean.

`asyncbatch.profile` measures; nothing here does. The floor of a step or run is what the memory bandwidth allows (see
`floor.py`); the numbers that need it are null where there is no GPU, or where the steps do not say their context.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from ..measure.attribution import attribute
from ..measure.bandwidth import run_floor_s, step_floor_s
from ..measure.points import MEANING, points_of
from ..measure.recording import Recording
from ..measure.simulate import costs_of, predict, what_if
from ..measure.steps import Steps, steps_from, steps_of
from ..request import Completion
from ..timeline import Timeline, idle_share, overlap_gain
from .workload import latency, uneven

SCHEMA = 3
OVER_TIME = "Requests arrive over time, so no total time is predicted: compare the latencies of the two loops."
WORTH_SAYING = 0.01  # a latency point that would give back less is not worth eliminating
OWN = "asyncbatch"
NOT_MEASURED = "not measured"
WORKLOAD = ("model", "batch_size", "requests", "prompt_tokens", "new_tokens")


@dataclass
class Measured:
    """One engine in one mode on one workload: the timeline and the completions of each of its runs."""

    workload: argparse.Namespace
    engine: str
    mode: str
    setting: str | None = None
    prefill_tokens: int | None = None
    runs: list[tuple[Timeline, list[Completion]]] = field(default_factory=list)
    overhead: dict[str, Any] | None = None
    kineto: dict[str, Any] | None = None
    interrupted: bool = False  # its one run was ended by Ctrl-C: times and steps of what ran, and no completions

    @cached_property
    def diagnosis(self) -> dict[str, Any]:
        """`diagnosis` of the typical run, made once: a preset writes its report anew after each workload."""
        return diagnosis(self.typical, self.mode, self.workload.slots)

    @property
    def typical_run(self) -> tuple[Timeline, list[Completion]]:
        """The run of median wall time, the lower one of two."""
        by_wall = sorted(self.runs, key=lambda run: run[0].summary().wall_s)
        return by_wall[(len(by_wall) - 1) // 2]

    @property
    def typical(self) -> Timeline:
        return self.typical_run[0]

    @property
    def tokens(self) -> list[list[list[int]]]:
        if self.interrupted:
            return []
        return [[list(completion.token_ids) for completion in completions] for _, completions in self.runs]


def versions() -> dict[str, str | None]:
    """Of Python, the packages that matter, and the CUDA that torch was built for; None for what is not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "transformers", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {**found, "cuda": torch.version.cuda}


def report(
    options: argparse.Namespace,
    measured: Sequence[Measured],
    device: str,
    *,
    failed: Sequence[dict[str, Any]] = (),
    gpu: dict[str, Any] | None = None,
    bandwidth: float | None = None,
    models: dict[str, dict[str, Any]] | None = None,
    recording: Recording | None = None,
) -> tuple[dict[str, Any], list[Timeline]]:
    """The report as a dict, and the timelines of its runs.

    `runs`: for each workload, engine and mode the run of median wall time, with `wall_s_of_each_run`. Times are
    seconds, but milliseconds in keys with `ms` (host_ms_per_step and device_ms_per_step are medians over the decode
    steps); device_active and idle are shares of the decode steps (see `Timeline`). These four are null where nothing
    could be measured. On CUDA also floor_s of the run, time_over_floor, and for the decode steps of most rows at the
    smallest and the largest context `first_context` and `last_context` (see `floor_numbers`). `latency` has
    first_token_ms, per_token_ms and end_to_end_ms, each as median and p99 over the requests (see `workload.latency`).
    prompt_tokens and new_tokens of a run are the largest of its requests; in `workload` they are as asked for, so a
    distribution is text, beside `arrivals` ("all" or "poisson:RATE"), `prompts` (a file, or null) and prompts_sha256.
    `failed`: what could not be measured, with `error`. `recorded`: when a recording is emulated, what it says itself.
    `comparisons`: one for each workload, of this package's two modes: `async_speedup` is the median over the repeats of
    sync wall time / async wall time, null without one of them; `law_idle` is host / (host + device) from the sync run's
    own medians, what its idle share should be. The same two stand at the top level when there is one workload.
    Of each run also `points`, `gaps`, `what_if` and `prediction` (see `diagnosis`), `interrupted`, and, if measured,
    `overhead` and `kineto`. `first` says what to eliminate first, `verdict` what asynchronous batching brings.
    `same_tokens` is about this package's runs, `peers_same_tokens` about each other engine's own.
    """
    models = models or {}
    rows = []
    for one in measured:
        timeline, workload = one.typical, one.workload
        row = {"engine": one.engine, "mode": one.mode, **timeline.summary().as_dict()}
        row["device_ms_per_step"] = device_ms(timeline)
        row["latency"] = latency(one.typical_run[1])
        row["wall_s_of_each_run"] = [timeline.summary().wall_s for timeline, _ in one.runs]
        row |= {key: getattr(workload, key) for key in WORKLOAD}
        row |= {"setting": one.setting, "prefill_tokens": one.prefill_tokens}
        row |= {"prompt_tokens": getattr(workload, "longest_prompt", workload.prompt_tokens)}
        row |= {"interrupted": one.interrupted, "overhead": one.overhead, "kineto": one.kineto}
        row |= one.diagnosis
        if workload.arrivals != "all":
            row["prediction"] = None  # the arrivals, not the loop, decide how long the run takes
        if bandwidth is not None:
            row |= floor_numbers(steps_from(timeline), row["wall_s"], models.get(workload.model), bandwidth)
        rows.append(row)
    compared = [comparison(group) for group in by_workload(rows)]
    of_engine: dict[str, list[bool]] = {}
    for group in by_workload([{"one": one, **vars(one.workload)} for one in measured]):
        for engine in dict.fromkeys(item["one"].engine for item in group):
            tokens = [given for item in group if item["one"].engine == engine for given in item["one"].tokens]
            of_engine.setdefault(engine, []).append(all(other == tokens[0] for other in tokens[1:]))
    same = {engine: all(each) for engine, each in of_engine.items()}
    names = ("batch_size", "requests", "prompt_tokens", "new_tokens", "seed", "repeats", "slots", "host_work_ms",
             "step_ms", "arrivals", "prompts", "prompts_sha256")  # fmt: skip
    only = compared[0] if len(compared) == 1 else {}
    result = {
        "schema": SCHEMA,
        "model": options.model,
        "device": device,
        "emulated": recording.name if recording else None,
        "preset": options.preset,
        "same_tokens": same.pop(OWN, True),
        "peers_same_tokens": same,
        "runs": rows,
        "failed": list(failed),
        "recorded": recorded_rows(recording, rows, even=not uneven(options)) if recording else [],
        "comparisons": compared,
        "async_speedup": only.get("async_speedup"),
        "law_idle": only.get("law_idle"),
        "workload": {name: getattr(options, name) for name in names},
        "gpu": gpu,
        "copy_bandwidth_bytes_per_s": bandwidth,
        "models": models,
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "asyncbatch.profile", *options.given]),
        "first": first_line(rows) if len(compared) == 1 else None,
        "verdict": verdict(rows, only.get("async_speedup")) if len(compared) == 1 else None,
    }
    if options.arrivals != "all":
        result["verdict"] = OVER_TIME
        result["first"] = result["first"] and f"{result['first']} (As if there were always requests waiting.)"
    result["targets"] = targets(result) if options.preset else []
    return result, [one.typical for one in measured]


def diagnosis(timeline: Timeline, mode: str, slots: int) -> dict[str, Any]:
    """Where the time of a run went and what would change it.

    points: each latency point (`points.MEANING`) with median_ms and p99_ms of the decode steps, total_s, and its share
    of its side, host or device. gaps: idle_s before decode steps, `by` point (adds up to idle_s), and the `longest`
    gaps, with their step, at_s from the run's start, ms, and cause. what_if: `simulate.what_if`. prediction: of the
    asynchronous loop from a synchronous run; null for another run."""
    idle = attribute(timeline)
    origin = timeline.origin
    longest = [
        {"step": gap.step, "at_s": gap.start - origin, "ms": 1e3 * gap.seconds, "cause": gap.cause}
        for gap in idle.longest()
    ]
    gaps = {"idle_s": idle.idle_s, "by": idle.by, "longest": longest}
    points = [
        {key: None if value != value else value for key, value in asdict(point).items()}
        for point in points_of(timeline)
    ]
    of_run = 1 if mode == "sync" else slots
    results = [one._asdict() for one in what_if(timeline, of_run, max(slots, 2))]
    told = None
    if mode == "sync" and (costs := costs_of(timeline)):
        early = sum(step.wasted for step in timeline.steps)
        guess = predict(costs, max(slots, 2), early)
        told = {
            "sync_s": guess.sync.total_s, "async_s": guess.asynchronous.total_s, "gain": guess.gain,
            "helps": guess.helps, "host_ms": 1e3 * guess.host_s, "device_ms": 1e3 * guess.device_s,
            "text": str(guess).splitlines()[-1],
        }  # fmt: skip
    return {"points": points, "gaps": gaps, "what_if": results, "prediction": told}


def first_line(rows: Sequence[dict[str, Any]]) -> str | None:
    """What to eliminate first: the host's latency point that would give most back, of this package's synchronous run,
    else of the first run. None where no step was measured."""
    of_mode = sorted(rows, key=lambda row: (row["engine"] != OWN, row["mode"] != "sync"))
    for row in of_mode:
        saves, words = f"{row['mode']}_saves", {"sync": "synchronous", "async": "asynchronous"}[row["mode"]]
        wholly = [one for one in row["what_if"] if one["where"] == "host" and one["factor"] == 0.0]
        if not wholly:
            continue
        best = max(wholly, key=lambda one: one[saves])
        median = next(point["median_ms"] for point in row["points"] if point["name"] == best["point"])
        what = f"{best['point']} ({MEANING.get(best['point'], best['point'])}), {median or 0:.3f} ms of each step"
        if best[saves] < WORTH_SAYING:
            return (
                f"Eliminate this first: nothing on the host. The largest, {what}, would give back {best[saves]:.1%} of "
                f"the {words} run."
            )
        other = "" if row["mode"] == "async" else f", the asynchronous one {max(best['async_saves'], 0):.1%}"
        return f"Eliminate this first: {what}. Without it the {words} run takes {best[saves]:.1%} less time{other}."
    return None


def verdict(rows: Sequence[dict[str, Any]], measured: float | None) -> str | None:
    """What asynchronous batching brings here: predicted from the synchronous run, and measured. None without one."""
    told = next((row["prediction"] for row in rows if row["prediction"]), None)
    if told is None:
        return None
    beside = f"{told['host_ms']:.3f} ms of host work and copies beside {told['device_ms']:.3f} ms on the device"
    numbers = f"predicted {told['gain']:.3f}x" + ("" if measured is None else f", measured {measured:.3f}x")
    if not told["helps"]:
        return f"Asynchronous batching gains less than 2 % here ({numbers}): each step has only {beside}."
    if told["host_ms"] > told["device_ms"]:
        return f"Asynchronous batching: {numbers}. The host is the slower one ({beside}), so the device still waits."
    return f"Asynchronous batching: {numbers}. It hides the host's part of each step ({beside})."


def by_workload(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["batch_size"]), []).append(row)
    return list(groups.values())


def comparison(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """This package's two modes on one workload, see `report`."""
    own = {row["mode"]: row for row in rows if row["engine"] == OWN and not row["interrupted"]}
    sync, law = own.get("sync"), None
    if sync and sync["device_ms_per_step"] is not None and sync["host_ms_per_step"] is not None:
        law = idle_share(sync["host_ms_per_step"], sync["device_ms_per_step"])
    speedup = statistics.median(pairs(own)) if len(own) == 2 else None
    return {"model": rows[0]["model"], "batch_size": rows[0]["batch_size"], "async_speedup": speedup, "law_idle": law}


def pairs(rows: dict[str, dict[str, Any]]) -> list[float]:
    """Sync wall time / async wall time of each repeat."""
    each = (rows[mode]["wall_s_of_each_run"] for mode in ("sync", "async"))
    return [sync / other for sync, other in zip(*each, strict=False)]  # one that failed half way has fewer


def device_ms(timeline: Timeline) -> float | None:
    """Median time of a decode step on the device, in milliseconds."""
    decode = {step.step for step in timeline.steps if step.kind == "decode"}
    times = [1e3 * (s.end - s.start) for s in timeline.spans if s.lane == "compute" and s.step in decode]
    return statistics.median(times) if times else None


def floor_numbers(
    steps: Steps, wall_s: float, model: dict[str, Any] | None, bandwidth: float
) -> dict[str, float | dict[str, float] | None]:
    """floor_s, time_over_floor, and first_context and last_context: medians over an eighth, at most 32, of the decode
    steps with the most rows, those with the smallest and those with the largest context. Each has rows, context (tokens
    of all rows), ms, floor_ms and over_floor. kv_bytes_per_s: the keys and values by which the two differ / the time by
    which they differ, where the context grew at least eightfold. Null where the steps do not say their context."""
    numbers: dict[str, Any] = dict.fromkeys(
        ("floor_s", "time_over_floor", "first_context", "last_context", "kv_bytes_per_s")
    )
    decode = steps.kind == "decode"
    if model is None or not decode.any() or not steps.context[decode].all():
        return numbers
    weights, kv = model["weight_bytes"], model["kv_bytes_per_token"]
    numbers["floor_s"] = run_floor_s(weights, kv, steps.context.tolist(), bandwidth)
    numbers["time_over_floor"] = wall_s / numbers["floor_s"]
    rows = int(steps.rows[decode].max())
    full = np.flatnonzero(decode & (steps.rows == rows))
    full = full[np.argsort(steps.context[full], kind="stable")]
    count = max(1, min(32, len(full) // 8))
    for name, part in (("first_context", full[:count]), ("last_context", full[-count:])):
        context = float(np.median(steps.context[part]))
        ms = 1e-3 * float(np.median(steps.device_us[part]))
        floor_ms = 1e3 * step_floor_s(weights, kv, context, bandwidth)
        numbers[name] = {"rows": rows, "context": context, "ms": ms, "floor_ms": floor_ms, "over_floor": ms / floor_ms}
    first, last = numbers["first_context"], numbers["last_context"]
    if last["context"] >= 8 * first["context"] and last["ms"] > first["ms"]:
        grown = (last["context"] - first["context"]) * kv
        numbers["kv_bytes_per_s"] = 1e3 * grown / (last["ms"] - first["ms"])
    return numbers


def recorded_rows(recording: Recording, rows: Sequence[dict[str, Any]], even: bool = True) -> list[dict[str, Any]]:
    """For each emulated run what the recording says of the same model, batch size and mode. Where the emulated run is
    the beginning of the recorded one, only that many steps of it are counted (`setting` says so). It is not, unless
    its requests are `even`: all of one length, and there at the beginning."""
    found = []
    for row in rows:
        for run in recording.runs:
            if any(run[key] != row[key] for key in ("engine", "mode", "model", "batch_size")):
                continue
            steps, setting = steps_of(run), "the whole run"
            begins_so = all(run[key] == row[key] for key in ("requests", "prompt_tokens", "prefill_tokens"))
            if even and begins_so and row["steps"] < len(steps.kind):
                steps, setting = steps.first(row["steps"]), f"the first {row['steps']} steps"
            made = {key: run[key] for key in (*WORKLOAD, "engine", "mode", "prefill_tokens")}
            made |= {**steps.totals(), "setting": setting}
            decode = steps.kind == "decode"
            made["device_ms_per_step"] = 1e-3 * float(np.median(steps.device_us[decode])) if decode.any() else None
            bandwidth = recording.data["copy_bandwidth_bytes_per_s"]
            made |= floor_numbers(steps, made["wall_s"], recording.models[run["model"]], bandwidth)
            found.append(made)
            break
    return found


# ---- what was to be reached ---------------------------------------------------------------------------------------


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The speed to reach, for the presets: what, value, reach (both as text), and reached: true, false, or null where
    this session cannot tell."""
    said: list[dict[str, Any]] = []

    def add(what: str, reach: str, value: float | None, reached: bool | None, form: str) -> None:
        text = NOT_MEASURED if value is None else form.format(value)
        said.append({"what": what, "reach": reach, "value": text, "reached": None if value is None else reached})

    def find(engine: str, mode: str, model: str) -> dict[str, Any] | None:
        of_model = (row for row in result["runs"] if row["model"] == model and row["batch_size"] == 32)
        return next((row for row in of_model if (row["engine"], row["mode"]) == (engine, mode)), None)

    own = find(OWN, "async", "random:llama-8b")
    if own and result["preset"] == "headline":
        wall, whole = own["wall_s"], (own["requests"], own["new_tokens"]) == (32, 8192)
        add("total, async", "75 s or less (H200)", wall, wall <= 75 if whole else None, "{:.1f} s")
        add("total, async, over its floor", "1.21x (75 / 62)", own["time_over_floor"],
            (own["time_over_floor"] or 9) <= 75 / 62 if whole else None, "{:.3f}x")  # fmt: skip
        peers = [row["wall_s"] for row in result["runs"] if row["engine"] != OWN]
        ratio = min(peers) / wall if peers else None
        add("faster than the fastest peer", "above 1x", ratio, (ratio or 0) > 1, "{:.3f}x")
    if own:
        active = own["device_active"]
        add("device active, async", "99.9 %", active and 100 * active, (active or 0) >= 0.999, "{:.2f} %")
        for name, short, most in (("first_context", 64, 1.35), ("last_context", 8192, 1.12)):
            point = own[name] or {"over_floor": None, "context": 0, "rows": 1}
            near = point["context"] / point["rows"]
            fits = near <= 128 if name == "first_context" else near >= 0.9 * short
            add(f"decode step over its floor, context {near:.0f}", f"{most}x (at {short})", point["over_floor"],
                (point["over_floor"] or 9) <= most if fits else None, "{:.3f}x")  # fmt: skip
        sync = find(OWN, "sync", "random:llama-8b")
        host = [row["host_ms_per_step"] for row in (own, sync) if row and row["host_ms_per_step"] is not None]
        add("host work per step, batch 32", "0.5 ms", max(host, default=None), max(host, default=9) <= 0.5, "{:.3f} ms")
        rate, copy = own["kv_bytes_per_s"], result["copy_bandwidth_bytes_per_s"]
        share = 100 * rate / copy if rate and copy else None
        add("attention's reads, of the copy bandwidth", "85 %", share, (share or 0) >= 85, "{:.1f} %")
    for one in result["comparisons"]:
        if (one["model"], one["batch_size"]) == ("random:llama-0.6b", 32):
            speedup, law = one["async_speedup"], one["law_idle"]
            bound = None if law is None else overlap_gain(law, 1 - law)
            forbidden = bound is not None and bound < 1.3
            reached = None if forbidden and (speedup or 0) < 1.3 else (speedup or 0) >= 1.3
            reach = f"1.3x (law: {bound:.2f}x)" if bound else "1.3x"
            add("0.6B at batch 32, async / sync", reach, speedup, reached, "{:.3f}x")
    return said


# ---- as text ------------------------------------------------------------------------------------------------------

ROWS = (
    ("wall time", "wall_s", "{:.3f} s", 1),
    ("tokens", "tokens", "{}", 1),
    ("tokens per second", "tokens_per_s", "{:.1f}", 1),
    ("device active", "device_active", "{:.1f} %", 100),
    ("device idle", "idle", "{:.1f} %", 100),
    ("host work per step", "host_ms_per_step", "{:.3f} ms", 1),
    ("device per step", "device_ms_per_step", "{:.3f} ms", 1),
    ("steps", "steps", "{}", 1),
    ("wasted tokens", "wasted_tokens", "{}", 1),
)
FLOOR_ROWS = (
    ("floor of the run", "floor_s", "{:.3f} s", 1),
    ("time over floor", "time_over_floor", "{:.3f}x", 1),
)
LATENCY_ROWS = (("first token", "first_token_ms"), ("per token", "per_token_ms"), ("end to end", "end_to_end_ms"))
POINT_ROWS = (
    ("device per step", "ms", "{:.3f} ms"),
    ("floor of a step", "floor_ms", "{:.3f} ms"),
    ("step over floor", "over_floor", "{:.3f}x"),
)


def table(result: dict[str, Any]) -> str:
    """The report as text: one column for each run, or one line for each if there are several workloads."""
    lines = [line for line in (result["first"], result["verdict"]) if line]
    lines += [*([""] if lines else []), f"model: {result['model']}", f"device: {result['device']}"]
    if result["copy_bandwidth_bytes_per_s"]:
        lines.append(f"copy bandwidth, read plus write: {result['copy_bandwidth_bytes_per_s'] / 1e12:.3f} TB/s")
    lines.append("")
    own = {row["mode"]: row for row in result["runs"] if row["engine"] == OWN}
    if len(result["comparisons"]) > 1:
        lines += lines_of_workloads(result)
    elif result["runs"]:
        lines += columns(result)
    lines += notes(result)
    lines.append("")
    if len(result["comparisons"]) == 1:
        lines += conclusions(result, own)
    elif not result["same_tokens"]:
        lines.append("The tokens differ: that is a fault, and the comparison is void.")
    if result["targets"]:
        lines += ["", f"{'speed to reach':44}{'reach':>22}{'measured':>16}"]
        words = {True: "reached", False: "NOT REACHED", None: "no claim: another length, or the law forbids it"}
        for one in result["targets"]:
            word = "" if one["value"] == NOT_MEASURED else words[one["reached"]]
            lines.append(f"{one['what']:44}{one['reach']:>22}{one['value']:>16}  {word}".rstrip())
    return "\n".join(lines)


def columns(result: dict[str, Any]) -> list[str]:
    title = {id(row): row["engine"] if not result["emulated"] else "emulated" for row in result["runs"]}
    title |= {id(row): "recorded" for row in result["recorded"]}
    runs = [*result["runs"], *result["recorded"]]

    def line(label: str, cells) -> str:
        return f"{label:20}" + "".join(f"{cell:>14}" for cell in cells)

    def filled(label: str, values, spec: str) -> str:
        return line(label, ("-" if value is None else spec.format(value) for value in values))

    lines = [line("", (title[id(run)] for run in runs))] if len(set(title.values())) > 1 or result["emulated"] else []
    lines.append(line("", (run["mode"] for run in runs)))
    floors = any(run.get("floor_s") is not None for run in runs)
    for label, key, spec, factor in (*ROWS, *(FLOOR_ROWS if floors else ())):
        spec = spec.replace(".1f} %", ".2f} %") if floors else spec  # on a GPU the hundredths count: 99.97 is not 99.99
        values = [run.get(key) for run in runs]
        lines.append(filled(label, [None if value is None else value * factor for value in values], spec))
    for label, key in LATENCY_ROWS if result["workload"]["arrivals"] != "all" else ():
        for part in ("median", "p99"):
            values = [run["latency"][key][part] if "latency" in run else None for run in runs]
            lines.append(filled(f"{label}, {part}", values, "{:.1f} ms"))
    for key, name in (("first_context", "smallest"), ("last_context", "largest")) if floors else ():
        points = [run.get(key) for run in runs]
        lines.append(filled(f"{name} context/row", [p and p["context"] / p["rows"] for p in points], "{:.0f}"))
        lines += [filled(f"  {label}", [p and p[part] for p in points], spec) for label, part, spec in POINT_ROWS]
    if result["async_speedup"] is not None:
        lines.append(f"{'async / sync speed':34}{result['async_speedup']:>13.3f}x")
    own = sum(run["engine"] == OWN for run in result["runs"])
    if own:
        lines.append(f"{'same tokens':20}" + ("yes" if result["same_tokens"] else "NO").rjust(14 * own))
    return lines


def lines_of_workloads(result: dict[str, Any]) -> list[str]:
    head = ("batch", "engine", "mode", "tokens/s", "active %", "host ms", "device ms", "over floor", "async/sync")
    widths = (7, 14, 7, 11, 10, 9, 11, 12, 12)
    lines = [f"{'model':18}" + "".join(f"{name:>{width}}" for name, width in zip(head, widths, strict=True))]
    speedups = {(one["model"], one["batch_size"]): one["async_speedup"] for one in result["comparisons"]}
    for row in result["runs"]:
        speedup = speedups[row["model"], row["batch_size"]] if (row["engine"], row["mode"]) == (OWN, "async") else None
        active, over = row["device_active"], row.get("time_over_floor")
        cells = [row["batch_size"], row["engine"], row["mode"], f"{row['tokens_per_s']:.1f}"]
        cells += ["-" if active is None else f"{100 * active:.2f}"]
        for value in (row["host_ms_per_step"], row["device_ms_per_step"]):
            cells.append("-" if value is None else f"{value:.3f}")
        cells += ["-" if value is None else f"{value:.3f}x" for value in (over, speedup)]
        lines.append(f"{row['model']:18}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    return lines


def cost_in_words(overhead: dict[str, Any]) -> str:
    """What measuring costs, from `overhead` of a run; "-" for a number that is not there."""

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:+.2f} %"

    interval, ms = overhead.get("interval"), overhead.get("ms_per_step")
    within = f" (95 % sure: {percent(interval[0])} to {percent(interval[1])})" if interval else ""
    return f"{percent(overhead.get('share'))} of a step{within}, {'-' if ms is None else f'{ms:+.4f}'} ms"


def notes(result: dict[str, Any]) -> list[str]:
    """Settings of other engines, what failed, what is recorded: whatever must be said beside the numbers."""
    said = []
    several = len(result["comparisons"]) > 1
    for row in result["runs"]:
        if row["engine"] != OWN and row["setting"] is not None:
            said.append(f"{_who(row, False)}: {row['setting']}")
    said = list(dict.fromkeys(said))
    for row in result["runs"]:
        if row["interrupted"]:
            said.append(f"{_who(row, several)} was ended by Ctrl-C: the numbers are about what ran until then")
        if row["overhead"]:
            said.append(f"{_who(row, several)}: measuring costs {cost_in_words(row['overhead'])}")
        if row["kineto"]:
            numbers = f"kernel busy {row['kineto']['busy']:.2%}, event-timed active {row['kineto']['event_active']:.2%}"
            said.append(f"{_who(row, several)}, under torch.profiler: {numbers} ({row['kineto']['note']})")
    said += [f"{_who(row, several)} was not measured: {row['error']}" for row in result["failed"]]
    said += [f"{engine}: sync and async gave different tokens" for engine, same in result["peers_same_tokens"].items()
             if not same]  # fmt: skip
    if result["workload"]["arrivals"] != "all":
        arrivals = result["workload"]["arrivals"]
        said.append(f"requests arrive over time ({arrivals}): that bounds wall time and tokens per second, so the")
        said.append("latencies, in milliseconds from a request's arrival, are what to compare.")
    if result["emulated"]:
        counted = ", ".join(dict.fromkeys(row["setting"] for row in result["recorded"])) or "no run of this batch size"
        said.append(f"emulated: the device's times come from the recording {result['emulated']}, the host's work is")
        said.append(f"this machine's. recorded: what that session itself measured ({counted}).")
    return ["", *said] if said else []


def _who(row: dict[str, Any], several: bool) -> str:
    where = f"{row['model']}, batch {row['batch_size']}: " if several else ""
    return f"{where}{row['engine']} {row['mode']}"


def conclusions(result: dict[str, Any], runs: dict[str, dict[str, Any]]) -> list[str]:
    """What the numbers say, in sentences. `runs`: those of this package, by mode."""
    said = [] if result["same_tokens"] else ["The tokens differ: that is a fault, and the comparison is void."]
    if result["async_speedup"] is not None:
        each, saved = pairs(runs), 1 - 1 / result["async_speedup"]
        compared = f"{abs(saved):.1%} {'less' if saved > 0 else 'more'} time than"
        if min(each) <= 1 <= max(each):
            compared = "about the same time as"
        spread = f"pairs of runs: {min(each):.3f}x to {max(each):.3f}x"
        said.append(f"Asynchronous took {compared} synchronous ({spread}).")
    if all(run["idle"] is None for run in result["runs"]):
        said.append("No decode step came after another step, so active and idle could not be measured.")
    elif result["law_idle"] is not None:
        law = result["law_idle"]
        said.append(f"By the law idle = host / (host + device) the synchronous device is idle for {law:.1%} of a step;")
        if law <= 0.5:
            said.append("waking up and copies add to it, host work after the launch takes from it.")
            said.append("Asynchronous batching can save about that much.")
        else:
            said.append(f"the host is the slower one, so asynchronous batching can save about {1 - law:.1%}.")
        if law < 0.02:
            said.append("So little is idle because a step takes long beside the host's work. To see more, try")
            said.append("--host-work-ms 30 for a busier host, or --step-ms 10 for a faster device.")
    return said

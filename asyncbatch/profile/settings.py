"""What a session of the profiling script measures: `settle` turns `Arguments`, the options as they were typed, into
`Settings`, with every default filled in and a `Workload` for each model and batch size, or says what does not go
together."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..measure.recording import Recording
from .options import IN_MEMORY, Arguments, flag
from .presets import OF_NAMED, PRESETS, SHORT, Served, has_names, served_by
from .prompts import PromptFile
from .report import OWN, Conditions
from .workload import Workload

DEFAULTS: dict[str, Any] = dict(
    model="smollm2", engine=[OWN], batch_size=8, requests=16, prompt_tokens=None, new_tokens=64, prefill_tokens=None,
    compile=False,
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a session measures, and how. processes: what torchrun was told of them; None without it.

    model: the models of all workloads, with commas. conditions: what the report says of the workloads. engines, modes:
    each engine serves each workload in each mode. prefill_tokens: as in reports, None for the batcher's own default.
    dtype, device: of the model, None for `load_model`'s own choice. host_work_ms: burnt in every step. step_ms: of a
    timed device. repeats: runs of each mode; None for as many as `budget_s` seconds allow. peer_limit_s: another engine
    is left out if it would take longer. preset, record: names. out: the folder for what is written."""

    model: str
    workloads: tuple[Workload, ...]
    conditions: Conditions
    engines: tuple[str, ...]
    modes: tuple[str, ...]
    slots: int
    prefill_tokens: int | str | None
    compile: bool
    dtype: str | None
    device: str | None
    host_work_ms: float
    step_ms: float | None
    repeats: int | None
    budget_s: int
    peer_limit_s: int
    kineto: bool
    overhead: bool
    preset: str | None
    record: str | None
    out: Path | None
    command: tuple[str, ...]
    processes: tuple[str, ...] | None = None

    @property
    def command_line(self) -> str:
        """What makes this report again."""
        if self.command[:1] == (IN_MEMORY,):
            return f"asyncbatch.profile_model(model, tokenizer, requests, {', '.join(self.command[1:])})"
        starts = ["python"] if self.processes is None else ["torchrun", *self.processes]
        return shlex.join([*starts, "-m", "asyncbatch.profile", *self.command])


def settle(arguments: Arguments, recording: Recording | None = None) -> Settings:
    """The settings of a session. `recording`: the one that is emulated.

    ValueError for options that do not go together, or that need a GPU where there is none."""
    preset: dict[str, Any] = dict(PRESETS.get(arguments.preset or "", {}))
    refuse_beside_names(arguments, preset)
    each = served_by(preset, arguments.only) if preset else None
    preset.pop("workloads", None)
    defaults = {**DEFAULTS, **preset} if recording is None else emulated_defaults(arguments, recording)
    if arguments.prompts is not None:
        defaults["prompt_tokens"] = None
    complete = replace(arguments, **{key: value for key, value in defaults.items() if getattr(arguments, key) is None})
    refuse(complete)
    file = None
    if complete.prompts is not None:
        file = PromptFile.read(complete.prompts, complete.skip_bad_lines)
        complete = replace(complete, requests=arguments.requests or len(file.lines))
    if each is None:
        workload = replace(_workload(complete, file), once=file is not None and arguments.requests is None)
        return _settings(complete, _conditions(complete, file), [workload])
    # In a preset, batch size and requests are each workload's own, unless they were asked for.
    workloads = dict.fromkeys(_workload_of_preset(complete, arguments, one, file) for one in each)
    models = ", ".join(dict.fromkeys(workload.model for workload in workloads))
    complete = replace(complete, model=models, batch_size=arguments.batch_size, requests=arguments.requests)
    if has_names(PRESETS[str(arguments.preset)]):
        complete = replace(complete, prompt_tokens=None, new_tokens=None)
    return _settings(complete, _conditions(complete, file), list(workloads))


def in_memory(settings: Settings, count: int, sha256: str, prompts: PromptFile | None) -> Settings:
    """The settings of a session that serves `count` requests that are in memory, each once. prompts: those that are to
    become its requests, if they are none yet; sha256: tells them from others."""
    changes: dict[str, Any] = {"requests": count, "prompt_tokens": None}
    workloads = tuple(replace(one, prompt_file=prompts, once=True, **changes) for one in settings.workloads)
    conditions = replace(settings.conditions, prompts=IN_MEMORY, prompts_sha256=sha256, **changes)
    return replace(settings, workloads=workloads, conditions=conditions)


def _workload_of_preset(complete: Arguments, typed: Arguments, one: Served, file: PromptFile | None) -> Workload:
    size = typed.batch_size or one.batch_size
    own = replace(complete, model=typed.model or one.model, batch_size=size)
    own = replace(own, requests=typed.requests or one.requests or size)
    lengths: dict[str, Any] = {"prompt_tokens": one.prompt_tokens, "new_tokens": one.new_tokens}
    own = replace(own, **{key: value for key, value in lengths.items() if value is not None})
    return replace(_workload(own, file), name=one.name)


def _workload(complete: Arguments, file: PromptFile | None) -> Workload:
    """The workload of arguments that have no default left open."""
    names = ("model", "batch_size", "requests", "new_tokens", "prompt_tokens", "arrivals", "seed")
    return Workload(**{name: getattr(complete, name) for name in names}, prompt_file=file)


def _conditions(complete: Arguments, file: PromptFile | None = None) -> Conditions:
    later = ("prompts_sha256", "skipped_lines", "tp", "replicas")  # known when the file is read, the ranks are joined
    names = (one.name for one in fields(Conditions) if one.name not in later)
    same = {name: getattr(complete, name) for name in names}
    if complete.repeats is not None:
        same["budget_s"] = None
    return Conditions(**same, prompts_sha256=file.sha256 if file else None)


def _settings(complete: Arguments, conditions: Conditions, workloads: Sequence[Workload]) -> Settings:
    beside = {"workloads", "conditions", "engines", "modes", "processes"}
    same = {one.name: getattr(complete, one.name) for one in fields(Settings) if one.name not in beside}
    engines, modes = tuple(complete.engine or ()), tuple(complete.mode)
    return Settings(**same, workloads=tuple(workloads), conditions=conditions, engines=engines, modes=modes)


def emulated_defaults(arguments: Arguments, recording: Recording) -> dict[str, Any]:
    """The workload of the recording's run with the largest batch, or, if there is one, of its run with the batch size
    that was asked for. ValueError for a model that is not in the recording."""
    run = recording.main_run(arguments.model)
    same = (r for r in recording.runs if (r["engine"], r["mode"], r["model"]) == (OWN, "async", run["model"]))
    run = next((other for other in same if other["batch_size"] == arguments.batch_size), run)
    defaults = {key: run[key] for key in ("model", "batch_size", "requests", "prompt_tokens", "new_tokens")}
    if arguments.batch_size is not None and run["requests"] == run["batch_size"]:
        defaults["requests"] = arguments.batch_size
    return {**DEFAULTS, **defaults, "prefill_tokens": run["prefill_tokens"]}


def refuse(arguments: Arguments) -> None:
    """ValueError for options that do not go together, or that need a GPU where there is none."""
    timed = [name for name in ("emulate", "step_ms") if getattr(arguments, name) is not None]
    not_together = [(a, b) for a in timed for b in ("preset", "record") if getattr(arguments, b)]
    not_together += [("emulate", "step_ms")] if len(timed) == 2 else []
    if arguments.prompts is not None and arguments.prompt_tokens is not None:
        not_together.append(("prompts", "prompt_tokens"))
    if arguments.skip_bad_lines and arguments.prompts is None:
        raise ValueError("--skip-bad-lines is about the lines of --prompts FILE: it cannot be had without it")
    others = [engine for engine in arguments.engine or () if engine != OWN]
    ours = [name for name in timed if others] + (["host_work_ms"] if others and arguments.host_work_ms else [])
    not_together += [("emulate", one) for one in ("device", "dtype") if arguments.emulate and getattr(arguments, one)]
    if arguments.device not in (None, "cpu") and arguments.step_ms is not None:
        not_together.append(("step_ms", "device"))  # a timed device is a process of the CPU
    for a, b in not_together:
        raise ValueError(f"{flag(a)} and {flag(b)} were given: only one of them can be had at a time")
    for name in ours:
        raise ValueError(f"{flag(name)} is for asyncbatch's own batchers: it cannot be had with --engine {others[0]}")
    uneven = _conditions(arguments).uneven
    for a in ("preset", "record"):
        for b in uneven if getattr(arguments, a) else ():
            raise ValueError(
                f"{flag(a)} is for requests of one length that are all there at the beginning: "
                f"{flag(b)} {getattr(arguments, b)} cannot be had with it"
            )
    if arguments.record and arguments.out is None:
        name = arguments.record
        raise ValueError(f"--record {name} needs --out DIR, the folder to write {name}.json into")
    has_gpu = torch.cuda.is_available() and arguments.device != "cpu"
    if arguments.kineto and (timed or not has_gpu):
        raise ValueError("--kineto asks a GPU's own profiler, and there is no CUDA GPU in this run")
    for name in ("preset", "record"):
        value = getattr(arguments, name)
        if value and not has_gpu:
            names = ", ".join(Recording.names()) or "NAME"
            none = f"torch {torch.__version__} sees none here" if arguments.device is None else "--device is cpu"
            raise ValueError(f"--{name} {value} needs a CUDA GPU, and {none}; --emulate {names} shows a recorded one")


def refuse_beside_names(arguments: Arguments, preset: dict[str, Any]) -> None:
    """ValueError for options that cannot be had with a preset whose workloads have names, or without one."""
    named = bool(preset) and has_names(preset)
    if arguments.only is not None and not named:
        raise ValueError("--only takes some of the workloads of --preset workloads: it cannot be had without it")
    for name in OF_NAMED if named else ():
        if name in arguments.changed:
            given = f"{flag(name)} {getattr(arguments, name)}"
            raise ValueError(
                f"--preset {arguments.preset} has workloads of its own: {given} cannot be had with it "
                f"(--only takes some of them: {', '.join(SHORT)})"
            )
    if named and arguments.record:
        raise ValueError(
            f"--record is for requests of one length: record --preset headline or sweep, and not {arguments.preset}"
        )

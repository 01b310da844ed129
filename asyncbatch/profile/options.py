"""The command line of the profiling script: its options, their defaults, the presets, and what does not go together.

`parse_arguments` reads the command line into `Arguments`, the options as they were typed. `settle` turns these into the
`Settings` of a session: every default filled in, and a `Workload` for each model and batch size.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..measure.recording import Recording
from ..models.load import ALLOWED
from .draws import Arrivals, Lengths
from .presets import ENGINES, OF_NAMED, PRESETS, SHORT, Served, has_names, served_by
from .prompts import PromptFile
from .report import OWN, Conditions
from .workload import Workload

MODES = ("sync", "async")
DEFAULTS: dict[str, Any] = dict(
    model="smollm2", engine=[OWN], batch_size=8, requests=16, prompt_tokens=None, new_tokens=64, repeats=3,
    prefill_tokens=None, compile=False,
)  # fmt: skip
EPILOG = """examples:
  python -m asyncbatch.profile --out out
      the embedded model on a chat's questions, sync against async; table, report.json, picture and trace
  python -m asyncbatch.profile --model random:llama-1b --prompt-tokens 512 --new-tokens 256 --batch-size 32 --compile
      on a GPU: a shape with random weights, nothing to download, and every request runs to its last token
  python -m asyncbatch.profile --model ./my-model --prompts prompts.jsonl --arrivals poisson:5 --out a
      your model and prompts, arriving over time as from users: look at the latencies
  python -m asyncbatch.profile --emulate h200-llama-8b --new-tokens lognormal:200:0.7
      no GPU: steps take what they took on a recorded one, the host's work is this machine's
  python -m asyncbatch.profile --compare a/report.json b/report.json
      two reports side by side, with ratios

Exit status: 0, 1 if the two gave different tokens, 2 if something could not be done."""


@dataclass(frozen=True)
class Arguments:
    """The options as they were typed; None for one that was not, and whose default depends on others (see `settle`).

    changed: names of the options that do not have their default. command: the command line itself."""

    model: str | None
    prompts: str | None
    requests: int | None
    prompt_tokens: int | str | None
    new_tokens: int | str | None
    arrivals: str
    seed: int
    engine: list[str] | None
    mode: list[str]
    batch_size: int | None
    slots: int
    prefill_tokens: int | str | None
    compile: bool | None
    host_work_ms: float
    step_ms: float | None
    emulate: str | None
    repeats: int | None
    preset: str | None
    only: list[str] | None
    peer_limit_s: int
    kineto: bool
    overhead: bool
    trace: list[Path] | None
    compare: list[str] | None
    out: Path | None
    record: str | None
    json: bool
    debug: bool
    changed: tuple[str, ...]
    command: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """What a session measures, and how.

    model: the models of all workloads, with commas. conditions: what the report says of the workloads. engines, modes:
    each engine serves each workload in each mode. prefill_tokens: as in reports, None for the
    batcher's own default. host_work_ms: burnt in every step. step_ms: of a timed device. peer_limit_s: another engine
    is left out if it would take longer. preset, record: names. out: the folder for what is written."""

    model: str
    workloads: tuple[Workload, ...]
    conditions: Conditions
    engines: tuple[str, ...]
    modes: tuple[str, ...]
    slots: int
    prefill_tokens: int | str | None
    compile: bool
    host_work_ms: float
    step_ms: float | None
    repeats: int
    peer_limit_s: int
    kineto: bool
    overhead: bool
    preset: str | None
    record: str | None
    out: Path | None
    command: tuple[str, ...]


# ---- the command line ---------------------------------------------------------------------------------------------


def whole(lowest: int, highest: int = 10**9):
    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if lowest <= int(text) <= highest:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} was given; allowed are whole numbers from {lowest} to {highest}")

    return parse


def milliseconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 60_000:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} was given; allowed are milliseconds from 0 to 60000")


def sizes(text: str) -> int | str:
    """A number, or several as a text with commas, rising."""
    numbers = sorted({whole(1, 65536)(part) for part in text.split(",")})
    return numbers[0] if len(numbers) == 1 else ",".join(map(str, numbers))


def some_of(allowed: Sequence[str]):
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        if set(names) - set(allowed) or len(set(names)) != len(names):
            each = ", ".join(allowed)
            raise argparse.ArgumentTypeError(f"{text!r} was given; allowed are {each}, or {','.join(allowed)}")
        return [name for name in allowed if name in names]

    return parse


def lengths(text: str) -> int | str:
    """A number, or the text of a distribution in its shortest form."""
    drawn = _parsed(Lengths.parse, text)
    return drawn.lowest if drawn.fixed else str(drawn)


def arrivals(text: str) -> str:
    return str(_parsed(Arrivals.parse, text))


def _parsed(parse, text: str):
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def file_name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} was given; allowed are small letters, digits, '-', '.' and '_'")
    return text


def parse_arguments(arguments: Sequence[str] | None = None) -> Arguments:
    """The options of a command line (None: of this process). A bad one ends the process, as argparse does it."""
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    changed = tuple(name for name, value in options.items() if value != parser.get_default(name))
    others = [name for name in changed if name not in ("compare", "json", "debug")]
    if options["compare"] and others:
        parser.error(f"--compare measures nothing: {flag(others[0])} cannot be had with it")
    command = tuple(sys.argv[1:] if arguments is None else arguments)
    return Arguments(**options, changed=changed, command=command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asyncbatch.profile",
        usage="python -m asyncbatch.profile [options]",
        description="Serve the same requests with both batchers, in turns, and say how idle the device was.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_workload(parser.add_argument_group("workload").add_argument)
    _add_engine(parser.add_argument_group("engine and loop").add_argument)
    _add_device(parser.add_argument_group("device").add_argument)
    _add_measurements(parser.add_argument_group("what to measure").add_argument)
    _add_output(parser.add_argument_group("output").add_argument)
    return parser


def _add_workload(add: Callable[..., Any]) -> None:
    add("--model", help=f"one of {ALLOWED} (default smollm2)".replace('"', ""))
    add("--prompts", metavar="FILE", help="serve the lines of FILE: .txt has a prompt a line, .jsonl an object a line "
        'with "prompt", "messages" or "token_ids", and perhaps "max_new_tokens"')  # fmt: skip
    add("--requests", type=whole(1), metavar="N", help="requests in all (default 16, or the lines of --prompts once)")
    add("--prompt-tokens", type=lengths, metavar="N", help="random prompts of N tokens: 64, or drawn for each request "
        "from 16-128 (uniform) or lognormal:64:0.5 (median, sigma; rounded, at least 1, and cut so that prompt and new "
        "tokens fit the model) (default: short questions)")  # fmt: skip
    add("--new-tokens", type=lengths, metavar="N", help="the most tokens to generate (default 64). Drawn as above, "
        "each request gets its own number, and is not ended by a stop token before it")  # fmt: skip
    add("--arrivals", type=arrivals, default="all", metavar="WHEN", help="all (default: at the beginning), or "
        "poisson:RATE, requests per second")  # fmt: skip
    add("--seed", type=whole(0), default=0, metavar="N", help="of all that is random: prompts, lengths, arrivals, "
        "weights (default 0)")  # fmt: skip


def _add_engine(add: Callable[..., Any]) -> None:
    add("--engine", type=some_of(ENGINES), metavar="ENGINES", help="asyncbatch (default), transformers, or both")
    add("--mode", type=some_of(MODES), default=[*MODES], metavar="MODES", help="sync,async (default), or one of them")
    add("--batch-size", type=whole(1, 4096), metavar="N", help="the most requests in one step (default 8)")
    add("--slots", type=whole(1, 64), default=2, metavar="N", help="slots of the asynchronous batcher (default 2)")
    add("--prefill-tokens", type=sizes, metavar="N", help="prompt tokens computed in one step: a number, or sizes with "
        "commas, of which each chunk of a prompt gets one that fits it")  # fmt: skip
    add("--compile", action=argparse.BooleanOptionalAction, help="compile the step (default: in presets only)")


def _add_device(add: Callable[..., Any]) -> None:
    add("--host-work-ms", type=milliseconds, default=0.0, metavar="MS", help="burn Python for MS in every step")
    add("--step-ms", type=milliseconds, metavar="MS", help="a timed device: a step takes MS and computes nothing")
    add("--emulate", metavar="NAME", help="a timed device: steps take what this recording's GPU took")


def _add_measurements(add: Callable[..., Any]) -> None:
    add("--repeats", type=whole(1), metavar="N", help="runs of each mode, in turns (default 3)")
    add("--preset", choices=[*PRESETS], help="a set of workloads for a GPU, with both engines")
    add("--only", type=some_of(SHORT), metavar="NAMES", help=f"of --preset workloads these: {', '.join(SHORT)}")
    add("--peer-limit-s", type=whole(1), default=600, metavar="S", help="leave out a peer that would take longer")
    add("--kineto", action="store_true", help="run once more under torch.profiler: kernel-level busy time (CUDA)")
    add("--overhead", action="store_true", help="measure what measuring costs: the same steps with and without it")
    add("--trace", type=Path, nargs="+", metavar="FILE", help="measure nothing: report on a torch.profiler trace of "
        "any engine; on several, or a folder of them, for the ranks of one job")  # fmt: skip
    add("--compare", nargs=2, metavar=("A.json", "B.json"), help="measure nothing: put two report.json files side by "
        "side, with a warning for each thing that makes them hard to compare")  # fmt: skip


def _add_output(add: Callable[..., Any]) -> None:
    add("--out", type=Path, metavar="DIR", help="write report.html, report.json, timeline.png and trace.json there")
    add("--record", type=file_name, metavar="NAME", help="write the recording DIR/NAME.json (GPU, with --out DIR)")
    add("--json", action="store_true", help="print the report as JSON instead of the table")
    add("--debug", action="store_true", help="show the traceback of an error")


# ---- from arguments to settings -----------------------------------------------------------------------------------


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
        file = PromptFile.read(complete.prompts)
        complete = replace(complete, requests=arguments.requests or len(file.lines))
    if each is None:
        return _settings(complete, _conditions(complete, file), [_workload(complete, file)])
    # In a preset, batch size and requests are each workload's own, unless they were asked for.
    workloads = dict.fromkeys(_workload_of_preset(complete, arguments, one, file) for one in each)
    models = ", ".join(dict.fromkeys(workload.model for workload in workloads))
    complete = replace(complete, model=models, batch_size=arguments.batch_size, requests=arguments.requests)
    if has_names(PRESETS[str(arguments.preset)]):
        complete = replace(complete, prompt_tokens=None, new_tokens=None)
    return _settings(complete, _conditions(complete, file), list(workloads))


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
    names = (one.name for one in fields(Conditions) if one.name != "prompts_sha256")
    return Conditions(**{name: getattr(complete, name) for name in names}, prompts_sha256=file.sha256 if file else None)


def _settings(complete: Arguments, conditions: Conditions, workloads: Sequence[Workload]) -> Settings:
    beside = {"workloads", "conditions", "engines", "modes"}
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
    return {**DEFAULTS, **defaults, "prefill_tokens": run["prefill_tokens"], "repeats": 1}


def refuse(arguments: Arguments) -> None:
    """ValueError for options that do not go together, or that need a GPU where there is none."""
    timed = [name for name in ("emulate", "step_ms") if getattr(arguments, name) is not None]
    not_together = [(a, b) for a in timed for b in ("preset", "record") if getattr(arguments, b)]
    not_together += [("emulate", "step_ms")] if len(timed) == 2 else []
    if arguments.prompts is not None and arguments.prompt_tokens is not None:
        not_together.append(("prompts", "prompt_tokens"))
    others = [engine for engine in arguments.engine or () if engine != OWN]
    ours = [name for name in timed if others] + (["host_work_ms"] if others and arguments.host_work_ms else [])
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
    if arguments.kineto and (timed or not torch.cuda.is_available()):
        raise ValueError("--kineto asks a GPU's own profiler, and there is no CUDA GPU in this run")
    for name in ("preset", "record"):
        value = getattr(arguments, name)
        if value and not torch.cuda.is_available():
            names = ", ".join(Recording.names()) or "NAME"
            raise ValueError(
                f"--{name} {value} needs a CUDA GPU, and torch {torch.__version__} sees none here; "
                f"--emulate {names} shows a recorded one"
            )


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


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")

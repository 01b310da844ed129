"""The command line of the profiling script: `parse_arguments` reads it into `Arguments`, the options as they were
typed; `settings.settle` makes of these what a session measures."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..models.load import ALLOWED
from .draws import Arrivals, Lengths
from .machine import version_line
from .presets import ENGINES, PRESETS, SHORT
from .threshold import FIGURES

MODES = ("sync", "async")
DTYPES = ("float32", "bfloat16", "float16")
BUDGET_S = 60
FEWEST, MOST = 2, 9  # runs of each mode in a budget: one pair is no conclusion, and from 9 on the extremes are left out
IN_MEMORY = "in memory"  # what is served, and by what, where no command line says it
EPILOG = """examples:
  python -m asyncbatch.profile --out out
      the embedded model on a chat's questions, sync against async; table, report.json, picture and trace
  python -m asyncbatch.profile --model random:llama-1b --prompt-tokens 512 --new-tokens 256 --batch-size 32 --compile
      on a GPU: a shape with random weights, nothing to download, and every request runs to its last token
  python -m asyncbatch.profile --model ./my-model --prompts prompts.jsonl --arrivals poisson:5 --out a
      your model and prompts, arriving over time as from users: look at the latencies
  python -m asyncbatch.profile --emulate h200-llama-8b --new-tokens lognormal:200:0.7
      no GPU: steps take what they took on a recorded one, the host's work is this machine's
  torchrun --nproc-per-node 2 -m asyncbatch.profile --tp 2 --model random:llama-8b --batch-size 32 --compile
      two GPUs that share a model; without --tp 2: two that have it whole, and share the requests
  python -m asyncbatch.profile --compare a/report.json b/report.json
      two reports side by side, with ratios

Exit status: 0; 1 if the two gave different tokens or --out cannot be written; 2 if something else could not be done.
With --compare and --threshold: 0 if B is no worse than A by more, 3 if it is, 4 if that cannot be said (void: other
machine, model or workload, an interrupted run, different tokens), 2 for files and options that are not allowed."""


@dataclass(frozen=True)
class Arguments:
    """The options as they were typed; None for one that was not, and whose default depends on others (see `settle`).

    changed: names of the options that do not have their default. command: the command line itself."""

    model: str | None
    prompts: str | None
    skip_bad_lines: bool
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
    dtype: str | None
    device: str | None
    host_work_ms: float
    step_ms: float | None
    emulate: str | None
    tp: int | None
    repeats: int | None
    budget_s: int
    preset: str | None
    only: list[str] | None
    peer_limit_s: int
    kineto: bool
    overhead: bool
    trace: list[Path] | None
    compare: list[str] | None
    threshold: float | None
    figures: list[str]
    out: Path | None
    record: str | None
    json: bool
    debug: bool
    changed: tuple[str, ...]
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


def percentage(text: str) -> float:
    """The share that a text such as "5%" means."""
    if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,6})?%", text):
        raise argparse.ArgumentTypeError(f"{text!r} was given; allowed is a number with its sign, such as 5% or 2.5%")
    return float(text[:-1]) / 100


def sizes(text: str) -> int | str:
    """A number, or several as a text with commas, rising."""
    numbers = sorted({whole(1, 65536)(part) for part in text.split(",")})
    return numbers[0] if len(numbers) == 1 else ",".join(map(str, numbers))


def each_of(sizes: int | str) -> list[int]:
    """The numbers that `sizes` made one value of, which reports and recordings keep."""
    return [int(size) for size in str(sizes).split(",")]


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


def device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} was given; allowed are cpu, cuda and cuda:N, the GPU of number N")
    return text


def file_name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} was given; allowed are small letters, digits, '-', '.' and '_'")
    return text


def parse_arguments(arguments: Sequence[str] | None = None) -> Arguments:
    """The options of a command line (None: of this process). A bad one ends the process, as argparse does it."""
    parser = _parser()
    return _arguments(parser, tuple(sys.argv[1:] if arguments is None else arguments))


def arguments_of(options: dict[str, Any]) -> Arguments:
    """The same from values of Python, by the names of the options; None is the default. ValueError for a bad one."""
    parser, words = _parser(), []
    for name, value in options.items():
        if isinstance(value, (list, tuple)):
            value = ",".join(map(str, value))
        if value is not None and value is not False:
            words.append(flag(name) if value is True else f"{flag(name)}={value}")

    def error(message: str):
        raise ValueError(message)

    parser.error = error  # type: ignore[method-assign]
    made = _arguments(parser, tuple(words))
    return replace(made, command=(IN_MEMORY, *(f"{name}={options[name]!r}" for name in made.changed)))


def _arguments(parser: argparse.ArgumentParser, command: tuple[str, ...]) -> Arguments:
    options = vars(parser.parse_args(command))
    changed = tuple(name for name, value in options.items() if value != parser.get_default(name))
    judged = [name for name in ("threshold", "figures") if name in changed]
    if judged and not options["compare"] or judged == ["figures"]:
        with_ = "--compare A.json B.json" + ("" if "threshold" in judged else " --threshold P%")
        parser.error(f"{flag(judged[0])} cannot be had without {with_}")
    others = [name for name in changed if name not in ("compare", "json", "debug", *judged)]
    if options["compare"] and others:
        parser.error(f"--compare measures nothing: {flag(others[0])} cannot be had with it")
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
        "with prompt, messages, token_ids or conversations, and perhaps max_tokens, or a line of OpenAI's batches; "
        ".json has a list of such objects")  # fmt: skip
    add("--skip-bad-lines", action="store_true", help="of --prompts: leave out lines that cannot be served, and say "
        "which; without this one of them ends the run")  # fmt: skip
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
    add("--device", type=device, metavar="DEVICE", help="where the model runs: cpu, cuda or cuda:N (default: a GPU if "
        "there is one)")  # fmt: skip
    add("--dtype", choices=DTYPES, help="of the model's weights (default: bfloat16 on a GPU that has it, else float16; "
        "float32 on the CPU)")  # fmt: skip
    add("--host-work-ms", type=milliseconds, default=0.0, metavar="MS", help="burn Python for MS in every step")
    add("--step-ms", type=milliseconds, metavar="MS", help="a timed device: a step takes MS and computes nothing")
    add("--emulate", metavar="NAME", help="a timed device: steps take what this recording's GPU took")
    add(
        "--tp",
        type=whole(1, 4096),
        metavar="N",
        help="under torchrun: N processes share the model, each with a part of "
        "every weight; those beyond the first N are replicas, which share the requests (default 1: replicas only)",
    )


def _add_measurements(add: Callable[..., Any]) -> None:
    add(
        "--budget-s",
        type=whole(1),
        default=BUDGET_S,
        metavar="S",
        help="as many runs of each mode, in turns, as take "
        f"S seconds, judged by the first ones: {FEWEST} to {MOST} (default {BUDGET_S}; what a preset says goes before)",
    )
    add("--repeats", type=whole(1), metavar="N", help="runs of each mode, however long they take")
    add("--preset", choices=[*PRESETS], help="a set of workloads for a GPU, with both engines")
    add("--only", type=some_of(SHORT), metavar="NAMES", help=f"of --preset workloads these: {', '.join(SHORT)}")
    add("--peer-limit-s", type=whole(1), default=600, metavar="S", help="leave out a peer that would take longer")
    add("--kineto", action="store_true", help="run once more under torch.profiler: kernel-level busy time (CUDA)")
    add("--overhead", action="store_true", help="measure what measuring costs: the same steps with and without it")
    add("--trace", type=Path, nargs="+", metavar="FILE", help="measure nothing: report on a torch.profiler trace of "
        "any engine; on several, or a folder of them, for the ranks of one job")  # fmt: skip
    add("--compare", nargs=2, metavar=("A.json", "B.json"), help="measure nothing: put two report.json files side by "
        "side, with a warning for each thing that makes them hard to compare")  # fmt: skip
    add("--threshold", type=percentage, metavar="P%", help="with --compare, for CI: is B worse than A by more than "
        "P %%? The exit status says it, see below")  # fmt: skip
    add("--figures", type=some_of(tuple(FIGURES)), default=[*FIGURES], metavar="NAMES", help="of --threshold: "
        f"{', '.join(FIGURES)} (default: all). Idle is judged by the points that it rose")  # fmt: skip


def _add_output(add: Callable[..., Any]) -> None:
    add("--out", type=Path, metavar="DIR", help="write report.html, report.json, timeline.png and trace.json there")
    add("--record", type=file_name, metavar="NAME", help="write the recording DIR/NAME.json (GPU, with --out DIR)")
    add("--json", action="store_true", help="print the report as JSON instead of the table")
    add("--version", action="version", version=version_line(), help="print the versions of what matters, and end")
    add("--debug", action="store_true", help="show the traceback of an error")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")

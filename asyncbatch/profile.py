"""The profiling script: how idle is the device, and what does asynchronous batching bring?

    python -m asyncbatch.profile --model smollm2 --batch-size 8 --out out

It serves the same requests with both batchers, in turns and several times, checks that the tokens are the same, and
prints a table. `--json` prints the same as JSON (`report` says what is in it), `--out` writes report.json, timeline.png
and trace.json. Every number is measured here and now; each row of the table is the run of median wall time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from .base import BatcherBase
from .batcher import AsyncBatcher, SyncBatcher
from .models import ModelError, load_model
from .request import Completion, Request, RequestError
from .streams import DeviceError
from .timeline import Timeline, idle_share, save_trace

BATCHERS: dict[str, type[BatcherBase]] = {"sync": SyncBatcher, "async": AsyncBatcher}
SCHEMA = 1
TOPICS = (
    "the sea", "a library", "rain", "old trains", "bread", "a lost key", "the moon", "two cats", "music", "winter",
    "a lighthouse", "gravity", "a market", "prime numbers", "the desert", "a letter",
)  # fmt: skip


def whole(lowest: int):
    def parse(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"is {text!r}: allowed are whole numbers from {lowest}")
        return int(text)

    return parse


def milliseconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1e6:
            return float(text)
    raise argparse.ArgumentTypeError(f"is {text!r}: allowed are milliseconds from 0")


def modes(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not names or set(names) - set(BATCHERS) or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"is {text!r}: allowed are sync, async, or both with a comma between them")
    return names


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m asyncbatch.profile", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2 (default), random:tiny, random:llama-1b, a path, or a hub id")
    add("--mode", type=modes, default=["sync", "async"], metavar="MODES", help="sync,async (default) or one of them")
    add("--batch-size", type=whole(1), default=8, metavar="N", help="requests in one step (default 8)")
    add("--requests", type=whole(1), default=16, metavar="N", help="requests in all (default 16)")
    add("--prompt-tokens", type=whole(1), metavar="N", help="random prompts of N tokens (default: short questions)")
    add("--new-tokens", type=whole(1), default=64, metavar="N", help="the most tokens to generate (default 64)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of random prompts and random weights (default 0)")
    add("--repeats", type=whole(1), default=3, metavar="N", help="runs of each mode, in turns (default 3)")
    add("--slots", type=whole(1), default=2, metavar="N", help="slots of the asynchronous batcher (default 2)")
    add("--host-work-ms", type=milliseconds, default=0.0, metavar="MS", help="burn Python for so long in every step")
    add("--step-ms", type=milliseconds, metavar="MS", help="a timed device: waits so long a step, computes nothing")
    add("--out", type=Path, metavar="DIR", help="write report.json, timeline.png and trace.json there")
    add("--json", action="store_true", help="print the report as JSON")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(arguments)


def make_requests(options: argparse.Namespace, vocab_size: int, tokenizer) -> list[Request]:
    """Random prompts of a fixed length that run to the length limit, or, for a chat model, questions that the model may
    also end by itself."""
    if options.prompt_tokens is None and getattr(tokenizer, "chat_template", None):
        chats = [[{"role": "user", "content": f"Tell me about {topic}."}] for topic in TOPICS]
        prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
        return [Request(prompts[n % len(prompts)], options.new_tokens) for n in range(options.requests)]
    generator = np.random.default_rng(options.seed)
    ids = generator.integers(0, vocab_size, (options.requests, options.prompt_tokens or 16))
    return [Request(prompt.tolist(), options.new_tokens, stop_token_ids=()) for prompt in ids]


def measure(options: argparse.Namespace, model, tokenizer) -> tuple[dict[str, Any], list[Timeline]]:
    """Run the modes in turns. Returns the report and the timelines of its rows."""
    vocab_size = model.config.get_text_config().vocab_size
    requests = make_requests(options, vocab_size, tokenizer)
    longest = max(len(request.token_ids) for request in requests) + options.new_tokens
    runs: dict[str, list[tuple[Timeline, list[Completion]]]] = {mode: [] for mode in options.mode}
    with contextlib.ExitStack() as stack:
        batchers = {
            mode: stack.enter_context(
                BATCHERS[mode](
                    model,
                    max_batch_size=options.batch_size,
                    max_length=longest,
                    num_slots=options.slots if mode == "async" else 1,
                    host_work_s=1e-3 * options.host_work_ms,
                    step_s=None if options.step_ms is None else 1e-3 * options.step_ms,
                )
            )
            for mode in options.mode
        }
        for mode, batcher in batchers.items():
            tell(f"{mode}: warm-up")
            batcher.run(
                [Request(request.token_ids, 2, stop_token_ids=()) for request in requests[: options.batch_size]]
            )
        for repeat in range(options.repeats):
            # Every second time the other way round, so that neither mode always runs on the warmer machine.
            for mode in options.mode[:: -1 if repeat % 2 else 1]:
                completions = batchers[mode].run(requests, progress=sys.stderr.isatty())
                timeline = batchers[mode].timeline
                runs[mode].append((timeline, completions))
                tell(f"{mode}: run {repeat + 1} of {options.repeats}: {timeline.summary().wall_s:.2f} s")
        device = batchers[options.mode[0]].device.clock
    for completion in (c for mode in options.mode for _, completions in runs[mode] for c in completions):
        if completion.error is not None:
            raise completion.error
    return report(options, runs, device_name(model, device, options))


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def device_name(model, clock: str, options: argparse.Namespace) -> str:
    import torch

    if options.step_ms is not None:
        return f"timed device: {options.step_ms:g} ms a step, nothing computed"
    if clock == "cuda":
        return torch.cuda.get_device_name(next(model.parameters()).device)
    threads = max(1, (os.cpu_count() or 2) - 1)
    return f"cpu, a worker process with {threads} thread{'s'[: threads > 1]}"


def report(options, runs: dict[str, list[tuple[Timeline, list[Completion]]]], device: str):
    """The report as a dict, and the timelines of its runs.

    `runs`: for each mode the run of median wall time, with `wall_s_of_each_run`. Times are seconds, host_ms_per_step
    milliseconds (median over the decode steps); device_active and idle are shares of the decode steps (see `Timeline`).
    `async_speedup`: the median over the repeats of sync wall time / async wall time, or null for one mode.
    `law_idle`: host / (host + device) from the sync run's own medians, what its idle share should be.
    """
    import torch
    import transformers

    tokens = [[c.token_ids for c in completions] for of_mode in runs.values() for _, completions in of_mode]
    rows, timelines = [], []
    for mode, of_mode in runs.items():
        by_wall = sorted((timeline for timeline, _ in of_mode), key=lambda timeline: timeline.summary().wall_s)
        timelines.append(by_wall[(len(by_wall) - 1) // 2])
        row = {"engine": "asyncbatch", "mode": mode, **timelines[-1].summary().as_dict()}
        row["device_ms_per_step"] = device_ms(timelines[-1])
        row["wall_s_of_each_run"] = [timeline.summary().wall_s for timeline, _ in of_mode]
        rows.append(row)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "model": options.model,
        "device": device,
        "same_tokens": all(other == tokens[0] for other in tokens),
        "runs": rows,
        "async_speedup": None,
        "law_idle": None,
    }
    if len(rows) == 2:
        walls = {row["mode"]: row["wall_s_of_each_run"] for row in rows}
        result["async_speedup"] = statistics.median(np.divide(walls["sync"], walls["async"]).tolist())
        sync = next(row for row in rows if row["mode"] == "sync")
        if sync["device_ms_per_step"] is not None:
            result["law_idle"] = idle_share(sync["host_ms_per_step"], sync["device_ms_per_step"])
    names = ("batch_size", "requests", "prompt_tokens", "new_tokens", "seed", "repeats", "slots", "host_work_ms")
    result["workload"] = {name: getattr(options, name) for name in (*names, "step_ms")}
    result["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    result["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    result["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    result["command"] = "python -m asyncbatch.profile " + " ".join(options.given)
    return result, timelines


def device_ms(timeline: Timeline) -> float | None:
    """Median time of a decode step on the device, in milliseconds."""
    decode = {step.step for step in timeline.steps if step.kind == "decode"}
    times = [1e3 * (s.end - s.start) for s in timeline.spans if s.lane == "compute" and s.step in decode]
    return statistics.median(times) if times else None


def table(result: dict[str, Any]) -> str:
    """The report as text, one column for each mode."""

    def number(value, spec: str, factor: float = 1.0) -> str:
        missing = value is None or value != value
        return "-" if missing else format(value * factor, spec)

    rows = [
        ("wall time", "wall_s", ".2f", 1, "s"),
        ("tokens", "tokens", "d", 1, ""),
        ("tokens per second", "tokens_per_s", ".1f", 1, ""),
        ("device active", "device_active", ".2f", 100, "%"),
        ("device idle", "idle", ".2f", 100, "%"),
        ("host work a step", "host_ms_per_step", ".3f", 1, "ms"),
        ("device step", "device_ms_per_step", ".3f", 1, "ms"),
        ("steps", "steps", "d", 1, ""),
        ("wasted tokens", "wasted_tokens", "d", 1, ""),
    ]
    runs = result["runs"]
    lines = [f"model {result['model']}, device {result['device']}", ""]
    lines.append(f"{'':20}" + "".join(f"{run['mode']:>14}" for run in runs))
    for label, key, spec, factor, unit in rows:
        cells = (f"{number(run[key], spec, factor)} {unit}".rstrip() for run in runs)
        lines.append(f"{label:20}" + "".join(f"{cell:>14}" for cell in cells))
    lines.append(f"{'same tokens':20}{'yes' if result['same_tokens'] else 'NO: this is a fault':>14}")
    if result["async_speedup"] is not None:
        lines += ["", conclusion(result)]
    return "\n".join(lines)


def conclusion(result: dict[str, Any]) -> str:
    """What the numbers mean, in two sentences."""
    speedup = result["async_speedup"]
    saved = 1 - 1 / speedup
    less = "less" if saved >= 0 else "more"
    text = f"async / sync throughput: {speedup:.3f}x (median of pairs), {abs(saved):.1%} {less} time."
    if result["law_idle"] is not None:
        text += (
            f"\nThe law idle = host / (host + device) gives {result['law_idle']:.1%} for the synchronous loop:"
            " that is what asynchronous batching can win back."
        )
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.out is not None:  # before anything is measured: a folder that cannot be written loses the results
            options.out.mkdir(parents=True, exist_ok=True)
        model, tokenizer = load_model(options.model, seed=options.seed)
        result, timelines = measure(options, model, tokenizer)
        if options.out is not None:
            write(options.out, result, timelines)
    except (ModelError, RequestError, DeviceError, ValueError, OSError) as error:
        if options.debug:
            raise
        print(f"asyncbatch.profile: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("asyncbatch.profile: interrupted", file=sys.stderr)
        return 130
    print(json.dumps(result, indent=1) if options.json else table(result))
    return 0 if result["same_tokens"] else 1


def write(folder: Path, result: dict[str, Any], timelines: list[Timeline]) -> None:
    from .plot import plot

    (folder / "report.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(*timelines, title=f"{result['model']} on {result['device']}").savefig(folder / "timeline.png")
    save_trace(folder / "trace.json", timelines)


if __name__ == "__main__":
    sys.exit(main())

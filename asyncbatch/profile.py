"""The profiling script: how idle is the device, and what does asynchronous batching bring?

    python -m asyncbatch.profile --model smollm2 --batch-size 8 --out out

It serves the same requests with both batchers, in turns and several times, checks that the tokens are the same, and
prints a table. `--json` prints the same as JSON (`report` says what is in it), `--out` writes report.json, timeline.png
and trace.json. Every number is measured here and now; each column of the table is the run of median wall time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .base import BatcherBase
from .batcher import AsyncBatcher, SyncBatcher
from .models import ALLOWED, load_model
from .request import Completion, Request
from .streams import DeviceError, device_threads
from .timeline import Timeline, idle_share, save_trace

BATCHERS: dict[str, type[BatcherBase]] = {"sync": SyncBatcher, "async": AsyncBatcher}
SCHEMA = 1
TOPICS = (
    "the sea", "a library", "rain", "old trains", "bread", "a lost key", "the moon", "two cats", "music", "winter",
    "a lighthouse", "gravity", "a market", "prime numbers", "the desert", "a letter",
)  # fmt: skip


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


def modes(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if set(names) - set(BATCHERS) or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"{text!r} was given; allowed are sync, async, or sync,async")
    return [name for name in BATCHERS if name in names]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="asyncbatch.profile",
        usage="python -m asyncbatch.profile [options]",
        description="Serve the same requests with both batchers, in turns, and say how idle the device was.",
        epilog="Exit status: 0, 1 if the two gave different tokens, 2 if something could not be done.",
    )
    add = parser.add_argument
    add("--model", default="smollm2", help=f"one of {ALLOWED} (default smollm2)".replace('"', ""))
    add("--mode", type=modes, default=[*BATCHERS], metavar="MODES", help="sync,async (default), or one of them")
    add("--batch-size", type=whole(1, 4096), default=8, metavar="N", help="the most requests in one step (default 8)")
    add("--requests", type=whole(1), default=16, metavar="N", help="requests in all (default 16)")
    add("--prompt-tokens", type=whole(1), metavar="N", help="random prompts of N tokens (default: short questions)")
    add("--new-tokens", type=whole(1), default=64, metavar="N", help="the most tokens to generate (default 64)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of random prompts and random weights (default 0)")
    add("--repeats", type=whole(1), default=3, metavar="N", help="runs of each mode, in turns (default 3)")
    add("--slots", type=whole(1, 64), default=2, metavar="N", help="slots of the asynchronous batcher (default 2)")
    add("--host-work-ms", type=milliseconds, default=0.0, metavar="MS", help="burn Python for MS in every step")
    add("--step-ms", type=milliseconds, metavar="MS", help="a timed device: a step takes MS and computes nothing")
    add("--out", type=Path, metavar="DIR", help="write report.json, timeline.png and trace.json there")
    add("--json", action="store_true", help="print the report as JSON instead of the table")
    add("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    options.given = list(sys.argv[1:] if arguments is None else arguments)
    return options


def make_requests(options: argparse.Namespace, model, tokenizer) -> list[Request]:
    """Random prompts of a fixed length that run to the length limit, or, for a chat model, questions that the model may
    also end by itself. ValueError if they are too long for the model."""
    config = model.config.get_text_config()
    if options.prompt_tokens is None and getattr(tokenizer, "chat_template", None):
        chats = [[{"role": "user", "content": f"Tell me about {topic}."}] for topic in TOPICS]
        prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
        length, stop = max(map(len, prompts)), None
    else:
        prompts, length, stop = [], options.prompt_tokens or 16, ()
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and length + options.new_tokens > most:
        raise ValueError(f"prompts of {length} tokens and {options.new_tokens} new ones: {options.model} allows {most}")
    if not prompts:
        generator = np.random.default_rng(options.seed)
        prompts = generator.integers(0, config.vocab_size, (options.requests, length)).tolist()
    cycle = itertools.islice(itertools.cycle(prompts), options.requests)
    return [Request(prompt, options.new_tokens, stop_token_ids=stop) for prompt in cycle]


def measure(options: argparse.Namespace, model, tokenizer) -> tuple[dict[str, Any], list[Timeline]]:
    """Run the modes in turns. Returns the report and the timelines of its runs."""
    requests = make_requests(options, model, tokenizer)
    common: dict[str, Any] = {
        "max_batch_size": options.batch_size,
        "max_length": max(len(request.token_ids) for request in requests) + options.new_tokens,
        "host_work_s": 1e-3 * options.host_work_ms,
        "step_s": None if options.step_ms is None else 1e-3 * options.step_ms,
    }
    runs: dict[str, list[tuple[Timeline, list[Completion]]]] = {mode: [] for mode in options.mode}
    with contextlib.ExitStack() as stack:
        batchers = {}
        for mode in options.mode:
            slots = options.slots if mode == "async" else 1
            batchers[mode] = stack.enter_context(BATCHERS[mode](model, num_slots=slots, **common))
        few = [Request(r.token_ids, min(2, r.max_new_tokens)) for r in requests[: options.batch_size]]
        for mode, batcher in batchers.items():
            tell(f"{mode}: warm-up")
            serve(batcher, few)
        for repeat in range(options.repeats):
            # Every second time the other way round, so that neither mode always runs on the warmer machine.
            for mode in options.mode[:: -1 if repeat % 2 else 1]:
                runs[mode].append(serve(batchers[mode], requests, progress=sys.stderr.isatty()))
                tell(f"{mode}: run {repeat + 1} of {options.repeats}: {runs[mode][-1][0].summary().wall_s:.2f} s")
    return report(options, runs, device_name(model, options))


def serve(batcher: BatcherBase, requests: list[Request], progress: bool = False) -> tuple[Timeline, list[Completion]]:
    completions = batcher.run(requests, progress)
    for completion in completions:
        if completion.error is not None:
            raise completion.error
    return batcher.timeline, completions


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def device_name(model, options: argparse.Namespace) -> str:
    where = next(model.parameters()).device
    if options.step_ms is not None:
        return f"timed: {options.step_ms:g} ms a step, nothing computed"
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    threads = device_threads()
    return f"cpu: a worker process, {threads} thread{'s' if threads > 1 else ''}"


def report(options, runs: dict[str, list[tuple[Timeline, list[Completion]]]], device: str):
    """The report as a dict, and the timelines of its runs.

    `runs`: for each mode the run of median wall time, with `wall_s_of_each_run`. Times are seconds, but milliseconds
    in host_ms_per_step and device_ms_per_step (medians over the decode steps); device_active and idle are shares of the
    decode steps (see `Timeline`). These four are null where nothing could be measured.
    `async_speedup`: the median over the repeats of sync wall time / async wall time; null without one of them.
    `law_idle`: host / (host + device) from the sync run's own medians, what its idle share should be.
    """
    tokens = [[c.token_ids for c in completions] for of_mode in runs.values() for _, completions in of_mode]
    rows: dict[str, dict[str, Any]] = {}
    timelines = []
    for mode, of_mode in runs.items():
        by_wall = sorted((timeline for timeline, _ in of_mode), key=lambda timeline: timeline.summary().wall_s)
        timelines.append(by_wall[(len(by_wall) - 1) // 2])
        rows[mode] = {"engine": "asyncbatch", "mode": mode, **timelines[-1].summary().as_dict()}
        rows[mode]["device_ms_per_step"] = device_ms(timelines[-1])
        rows[mode]["wall_s_of_each_run"] = [timeline.summary().wall_s for timeline, _ in of_mode]
    sync, law = rows.get("sync"), None
    if sync and sync["device_ms_per_step"] is not None:
        law = idle_share(sync["host_ms_per_step"], sync["device_ms_per_step"])
    names = ("batch_size", "requests", "prompt_tokens", "new_tokens", "seed", "repeats", "slots", "host_work_ms")
    return {
        "schema": SCHEMA,
        "model": options.model,
        "device": device,
        "same_tokens": all(other == tokens[0] for other in tokens),
        "runs": list(rows.values()),
        "async_speedup": statistics.median(pairs(rows)) if len(rows) == 2 else None,
        "law_idle": law,
        "workload": {name: getattr(options, name) for name in (*names, "step_ms")},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
        },
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "asyncbatch.profile", *options.given]),
    }, timelines


def pairs(rows: dict[str, dict[str, Any]]) -> list[float]:
    """Sync wall time / async wall time of each repeat."""
    each = (rows[mode]["wall_s_of_each_run"] for mode in ("sync", "async"))
    return [sync / other for sync, other in zip(*each, strict=True)]


def device_ms(timeline: Timeline) -> float | None:
    """Median time of a decode step on the device, in milliseconds."""
    decode = {step.step for step in timeline.steps if step.kind == "decode"}
    times = [1e3 * (s.end - s.start) for s in timeline.spans if s.lane == "compute" and s.step in decode]
    return statistics.median(times) if times else None


def table(result: dict[str, Any]) -> str:
    """The report as text, one column for each mode, and what it means."""
    rows = (
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
    runs = {run["mode"]: run for run in result["runs"]}
    lines = [f"model: {result['model']}", f"device: {result['device']}", ""]
    lines.append(f"{'':20}" + "".join(f"{mode:>14}" for mode in runs))
    for label, key, spec, factor in rows:
        cells = ("-" if run[key] is None else spec.format(run[key] * factor) for run in runs.values())
        lines.append(f"{label:20}" + "".join(f"{cell:>14}" for cell in cells))
    if result["async_speedup"] is not None:
        lines.append(f"{'async / sync speed':34}{result['async_speedup']:>13.3f}x")
    lines.append(f"{'same tokens':20}" + ("yes" if result["same_tokens"] else "NO").rjust(14 * len(runs)))
    return "\n".join([*lines, "", *conclusions(result, runs)])


def conclusions(result: dict[str, Any], runs: dict[str, dict[str, Any]]) -> list[str]:
    """What the numbers say, in sentences."""
    said = [] if result["same_tokens"] else ["The tokens differ: that is a fault, and the comparison is void."]
    if result["async_speedup"] is not None:
        each, saved = pairs(runs), 1 - 1 / result["async_speedup"]
        compared = f"{abs(saved):.1%} {'less' if saved > 0 else 'more'} time than"
        if min(each) <= 1 <= max(each):
            compared = "about the same time as"
        spread = f"pairs of runs: {min(each):.3f}x to {max(each):.3f}x"
        said.append(f"Asynchronous took {compared} synchronous ({spread}).")
    if all(run["idle"] is None for run in runs.values()):
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


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        if options.out is not None:  # before anything is measured: otherwise the results would be lost
            options.out.mkdir(parents=True, exist_ok=True)
            if not os.access(options.out, os.W_OK):
                raise PermissionError(f"--out {options.out}: this folder cannot be written to")
        where = None if options.step_ms is None else "cpu"  # a timed device is the worker process, also beside a GPU
        model, tokenizer = load_model(options.model, seed=options.seed, device=where)
        result, timelines = measure(options, model, tokenizer)
        print(json.dumps(result, indent=1) if options.json else table(result))
        if options.out is not None:
            write(options.out, result, timelines)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        if options.debug:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if isinstance(error, DeviceError):  # between them is the device's traceback
            lines = [" ".join(dict.fromkeys([lines[0], lines[-1]]))]
        tell("asyncbatch.profile: " + "\n".join(lines))
        return 2
    except KeyboardInterrupt:
        tell("asyncbatch.profile: interrupted")
        return 130
    return 0 if result["same_tokens"] else 1


def write(folder: Path, result: dict[str, Any], timelines: list[Timeline]) -> None:
    from .plot import plot  # matplotlib is needed for pictures only

    (folder / "report.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(*timelines, title=f"{result['model']} on {result['device']}").savefig(folder / "timeline.png")
    save_trace(folder / "trace.json", timelines)


if __name__ == "__main__":
    sys.exit(main())

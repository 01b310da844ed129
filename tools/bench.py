"""Measure the package itself and print each figure beside its target. Asserts nothing: a busy machine is no fault.

    python tools/bench.py        or: make bench (about five minutes on 2 cores)

1. Host work per step at batch 32 beside a device that takes no time: the loop's own cost, and the block tables' part.
2. Overlap on the embedded model with 20 ms of added host work a step: the asynchronous wall time, over the longer of
   the device's time alone (its steps in a synchronous run without added work) and the host's time alone (its spans but
   "wait" in a synchronous run with added work).
3. The asynchronous loop's own price: its wall time over the synchronous one's, on the embedded model as it is.
4. The time to import asyncbatch when torch and transformers are there already.

All are medians over rounds; what is compared with each other runs in turns, in an order that alternates.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict

import numpy as np

from asyncbatch import AsyncBatcher, Request, SyncBatcher, Timeline, load_model

ROUNDS = 5
OVERLAP_ROUNDS = 9  # single rounds scatter by several per cent on 2 cores
PAIRS = 15
HOST_WORK_S = 0.020
IMPORT = """
import time, torch, transformers
start = time.perf_counter()
import asyncbatch
print(time.perf_counter() - start)
"""


def requests(model, count: int, new_tokens: int) -> list[Request]:
    """Random prompts of 16 tokens, each answered up to its length limit."""
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (count, 16)).tolist()
    return [Request(prompt, new_tokens, stop_token_ids=()) for prompt in prompts]


def host_ms(timeline: Timeline) -> dict[str, float]:
    """Median milliseconds of a decode step by host phase, and "total" of all but waiting."""
    decode = {step.step for step in timeline.steps if step.kind == "decode"}
    phases: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for span in timeline.spans:
        if span.lane == "host" and span.name != "wait" and span.step in decode:
            for phase in (span.name, "total"):
                phases[phase][span.step] += 1e3 * (span.end - span.start)
    return {phase: statistics.median(times.values()) for phase, times in phases.items()}


def host_s(timeline: Timeline) -> float:
    return sum(span.end - span.start for span in timeline.spans if span.lane == "host" and span.name != "wait")


def device_s(timeline: Timeline) -> float:
    return sum(span.end - span.start for span in timeline.spans if span.lane == "compute")


def wall_s(timeline: Timeline) -> float:
    return timeline.summary().wall_s


def show(figure: str, value: float, unit: str, target: str = "", spread: str = "") -> None:
    print(f"  {figure:44}{value:>9.3f} {unit:3}{'  target ' + target if target else '':22}{spread}", flush=True)


def between(values: list[float]) -> str:
    return f"({min(values):.3f} to {max(values):.3f})"


def block_table_s(batcher) -> list[float]:
    """From now on the first element counts the seconds in the calls that keep the blocks' books."""
    spent = [0.0]

    def timed(method):
        def call(*arguments, **options):
            start = time.perf_counter()
            result = method(*arguments, **options)
            spent[0] += time.perf_counter() - start
            return result

        return call

    for name in ("allocate", "prune", "tables"):
        setattr(batcher.kv, name, timed(getattr(batcher.kv, name)))
    return spent


def bench_host_work() -> None:
    print("Host work per step, batch 32, a device that takes no time (random:tiny, 256 tokens each)")
    model, _ = load_model("random:tiny")
    workload = requests(model, count=32, new_tokens=256)
    for kind in (SyncBatcher, AsyncBatcher):
        with kind(model, max_batch_size=32, step_s=0.0) as batcher:
            batcher.run(workload)
            rounds = []
            for _ in range(ROUNDS):
                batcher.run(workload)
                rounds.append(host_ms(batcher.timeline))
            # In runs of their own: two looks at the clock for each call would count as host work above.
            spent, steps = block_table_s(batcher), 0
            for _ in range(ROUNDS):
                batcher.run(workload)
                steps += len(batcher.timeline.steps)
        totals = [each["total"] for each in rounds]
        show(f"{kind.mode}: total", statistics.median(totals), "ms", "1.0 at most", between(totals))
        for phase in ("plan", "fill", "launch", "commit"):
            show(f"{kind.mode}: {phase}", statistics.median(each[phase] for each in rounds), "ms")
        show(f"{kind.mode}: of it block tables and pruning (mean)", 1e3 * spent[0] / steps, "ms", "0.1 at most")


def in_turns(batchers: dict, workload: list[Request], rounds: int) -> dict:
    """The timelines of each batcher, which run one after the other, every second round the other way round."""
    timelines: dict = {key: [] for key in batchers}
    for number in range(rounds):
        for key in list(batchers)[:: -1 if number % 2 else 1]:
            batchers[key].run(workload)
            timelines[key].append(batchers[key].timeline)
    return timelines


def bench_overlap() -> None:
    print(f"Overlap on the embedded model, batch 8, 48 tokens each, {OVERLAP_ROUNDS} rounds")
    model, _ = load_model()
    with contextlib.ExitStack() as stack:
        loops = {
            name: stack.enter_context(kind(model, host_work_s=work, max_length=64))
            for name, kind, work in (
                ("sync", SyncBatcher, 0.0),
                ("async", AsyncBatcher, 0.0),
                ("busy sync", SyncBatcher, HOST_WORK_S),
                ("busy async", AsyncBatcher, HOST_WORK_S),
            )
        }
        in_turns(loops, requests(model, count=8, new_tokens=4), rounds=1)
        measured = {name: batcher for name, batcher in loops.items() if name != "async"}
        timelines = in_turns(measured, requests(model, count=8, new_tokens=48), OVERLAP_ROUNDS)
        device, host = [device_s(t) for t in timelines["sync"]], [host_s(t) for t in timelines["busy sync"]]
        longer = [max(pair) for pair in zip(device, host, strict=True)]
        show("device alone", statistics.median(device), "s", "", between(device))
        show("host alone, with 20 ms a step", statistics.median(host), "s", "", between(host))
        for mode, target in (("sync", ""), ("async", "1.05 at most")):
            ratios = [wall_s(t) / alone for t, alone in zip(timelines["busy " + mode], longer, strict=True)]
            show(f"{mode} with 20 ms / the longer of the two", statistics.median(ratios), "x", target, between(ratios))

        # Short and many: the difference to be seen is smaller than what the machine does from second to second.
        print(f"No added host work, 16 tokens each, {PAIRS} pairs")
        plain = {name: loops[name] for name in ("sync", "async")}
        timelines = in_turns(plain, requests(model, count=8, new_tokens=16), PAIRS)
        ratios = [wall_s(a) / wall_s(s) for s, a in zip(timelines["sync"], timelines["async"], strict=True)]
        show("async / sync without added work", statistics.median(ratios), "x", "1.02 at most", between(ratios))


def bench_import() -> None:
    print("Import")
    times = []
    for _ in range(ROUNDS):
        done = subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True)
        times.append(float(done.stdout))
    show("asyncbatch beyond torch and transformers", statistics.median(times), "s", "2.0 at most", between(times))


if __name__ == "__main__":
    if hasattr(os, "getloadavg"):
        print(f"{os.cpu_count()} cores, load before this began: {os.getloadavg()[0]:.2f} (should be near 0)")
    bench_host_work()
    bench_overlap()
    bench_import()

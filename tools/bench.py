"""Measure the package itself and print each figure beside its target. Asserts nothing: a busy machine is no fault.

    python tools/bench.py        or: make bench (about five minutes on 2 cores)
    python tools/bench.py --host-work
    python tools/bench.py --measuring
    python tools/bench.py --page
    python tools/bench.py --targets out/report.json

With --targets nothing is measured. It prints the speed that this package is to reach on a GPU, beside the numbers in a
preset's report (`python -m asyncbatch.profile --preset headline --out out`). With --host-work, --measuring or --page
only number 1, 2 or 6 of the following is measured (`tools/host_work.py` compares the first with an earlier commit).
Without any of them:

1. Host work per step at 1 to 256 rows beside a device that takes no time: the loop's own cost, and the block tables'
   part. Where there is a GPU, the same beside it too, on which a step of the tiny model takes a moment only.
2. What measuring costs the host between two steps of the synchronous loop, where the device waits for it: from the end
   of a wait to the launch of the next step, with nothing measured, with the timeline, and with latency points too. The
   device and its events are stand-ins (tests/support/cuda_stand_in.py), whose calls take less than CUDA's; what the
   caches held is overwritten in each wait, as it is while a real step takes its milliseconds.
3. Overlap on the embedded model with 20 ms of added host work a step: the asynchronous wall time, over the longer of
   the device's time alone (its steps in a synchronous run without added work) and the host's time alone (its spans but
   "wait" in a synchronous run with added work).
4. The asynchronous loop's own price: its wall time over the synchronous one's, on the embedded model as it is.
5. The time to import asyncbatch when torch and transformers are there already.
6. How long the page of a report with 20,000 spans takes to draw its timeline again, at several zooms, in a headless
   Chromium: the script, and then the pixels (`getImageData` waits for them). Not without selenium and Chromium.

All are medians over rounds; what is compared with each other runs in turns, in an order that alternates.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from asyncbatch import AsyncBatcher, Request, SyncBatcher, Timeline, load_model
from asyncbatch.measure import record_points
from asyncbatch.measure.law import overlap_gain
from asyncbatch.measure.text import table_line
from asyncbatch.profile.compare import load
from asyncbatch.profile.page import write_page
from asyncbatch.profile.report import OWN, Comparison, ContextSteps, Report, Run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.host_work import ROWS, host_ms, requests

ROUNDS = 5
ROWS_IN_PHASES = (32, 256)  # of a step whose host work is told by phase; it is measured at ROWS
OVERLAP_ROUNDS = 9  # single rounds scatter by several per cent on 2 cores
PAIRS = 15
HOST_WORK_S = 0.020
IMPORT = """
import time, torch, transformers
start = time.perf_counter()
import asyncbatch
print(time.perf_counter() - start)
"""


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
    """A list of one number, which from now on counts the seconds that the batcher spends in the calls that hand out
    blocks, take them back and make block tables."""
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


def bench_host_work(rows: Sequence[int] = ROWS, rounds: int = ROUNDS, new_tokens: int = 256) -> None:
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        model, _ = load_model("random:tiny", device=device)
        # On a GPU the graphs' launches are measured too; the timed device is the worker process, wherever a GPU is.
        options: dict[str, Any] = {"max_length": 16 + new_tokens} | ({"step_s": 0.0} if device == "cpu" else {})
        what = "a device that takes no time" if device == "cpu" else torch.cuda.get_device_name()
        print(f"Host work per step, beside {what} (random:tiny, {new_tokens} tokens each, median of {rounds} runs)")
        for count in rows:
            for kind in (SyncBatcher, AsyncBatcher):
                with kind(model, max_batch_size=count, **options) as batcher:
                    show_host_work(batcher, requests(model, count, new_tokens), rounds)


def show_host_work(batcher, workload: list[Request], rounds: int) -> None:
    """Print the host work per step of a workload that fills the batch: the total, and for some sizes the phases."""
    count, what = len(workload), f"{batcher.mode}, {len(workload)} rows"
    batcher.run(workload)
    measured = []
    for _ in range(rounds):
        batcher.run(workload)
        measured.append(host_ms(batcher.timeline))
    totals = [each["total"] for each in measured]
    # At 32 rows there is a target for the host's work, at the others there is none.
    show(f"{what}: total", statistics.median(totals), "ms", "1.0 at most" if count == 32 else "", between(totals))
    if count not in ROWS_IN_PHASES:
        return
    for phase in ("plan", "fill", "launch", "commit"):
        show(f"{what}: {phase}", statistics.median(each[phase] for each in measured), "ms")
    # In runs of their own: two looks at the clock for each call would count as host work above.
    spent, steps = block_table_s(batcher), 0
    for _ in range(rounds):
        batcher.run(workload)
        steps += len(batcher.timeline.steps)
    part = f"{what}: block tables, pruning (mean)"
    show(part, 1e3 * spent[0] / steps, "ms", "0.1 at most" if count == 32 else "")


MEASURED = ("nothing", "timeline", "timeline and points")
CACHE_BYTES = 2**25


def bench_measuring(rounds: int = ROUNDS, rows: int = 32, new_tokens: int = 256) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from support.cuda_stand_in import stand_in

    print(
        f"The host's work between two synchronous steps, by what is measured ({rows} rows, stand-in, {rounds} rounds)"
    )
    model, _ = load_model("random:tiny")
    workload = requests(model, rows, new_tokens)
    one, other = np.zeros((2, CACHE_BYTES), np.uint8)
    with stand_in(real=True) as gpu, contextlib.ExitStack() as stack:
        gpu.between = lambda: np.copyto(one, other)
        options: dict[str, Any] = {"max_batch_size": rows, "max_length": 16 + new_tokens, "num_slots": 2}
        batchers = {}
        for what in MEASURED:
            options |= {"timeline": what != "nothing", "parts": what == MEASURED[2]}
            batchers[what] = stack.enter_context(SyncBatcher(model, **options))
        found: dict[str, list[float]] = {what: [] for what in MEASURED}
        for number in range(rounds + 1):  # the first is a warm-up
            for what in MEASURED[:: -1 if number % 2 else 1]:
                gpu.host_s.clear()
                with record_points(batchers[what]) if what == MEASURED[2] else contextlib.nullcontext():
                    batchers[what].run(workload)
                if number:
                    found[what].append(1e6 * statistics.median(gpu.host_s[1:]))
    for what, times in found.items():
        ratios = [with_ / without for with_, without in zip(times, found["nothing"], strict=True)]
        more = f"{statistics.median(ratios):.3f}x of nothing {between(ratios)}"
        show(what, statistics.median(times), "us", "", more)


def in_turns(batchers: dict, workload: list[Request], rounds: int) -> dict:
    """The timelines of each batcher. They run one after the other, and in every second round in the reverse order."""
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


# ---- the page ------------------------------------------------------------------------------------------------------

PAGE_SPANS, ZOOMS = 20_000, (1, 2, 5, 20, 100, 1000)
REDRAW = """
const [shares, rounds, done] = arguments, canvas = document.querySelector("#timeline-view canvas[tabindex]");
const end = Number(document.querySelector("button[data-from='0']").dataset.to), found = shares.map(() => []);
const frame = () => new Promise(requestAnimationFrame);
(async () => {
  for (let round = 0; round < rounds; round++) {
    for (const [place, share] of shares.entries()) {
      const from = end * (0.3 + 0.01 * round) * (1 - share);
      canvas.dispatchEvent(new CustomEvent("show-time", { detail: [from, from + end * share] }));
      await frame();
      const drawn = performance.now();
      canvas.getContext("2d").getImageData(0, 0, 1, 1);
      found[place].push([Number(canvas.dataset.drawMs), performance.now() - drawn]);
    }
  }
  done(found);
})();
"""


def uneven_run(label: str, steps: int) -> Timeline:
    """A run of five spans a step, whose gaps and steps are drawn at random."""
    timeline, now, generator = Timeline(label, "virtual"), 0.0, np.random.default_rng(0)
    for step, (idle, busy) in enumerate(generator.exponential((1e-3, 5e-3), (steps, 2)).tolist()):
        timeline.add("host", "plan", step, now, now + idle)
        timeline.add("H2D", "copy_in", step, now + idle / 2, now + idle)
        timeline.add("compute", "step", step, now + idle, now + idle + busy)
        timeline.add("host", "wait", step, now + idle, now + idle + busy)
        timeline.add("D2H", "copy_out", step, now + idle + busy, now + idle + busy + 1e-4)
        timeline.add_step(step, "prefill" if step % 10 == 0 else "decode", 8, 0)
        now = now + idle + busy  # in this order: the next plan begins at the very number at which this wait ends
    return timeline


def bench_page() -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from support.browser import CHROMEDRIVER, CHROMIUM, browse, wait

    print(f"Page of a report with {PAGE_SPANS:,} spans, {CHROMIUM}: one redraw, script and pixels")
    if not (CHROMIUM and CHROMEDRIVER and find_spec("selenium")):
        print("  not measured: it needs selenium, chromium and chromedriver")
        return
    with tempfile.TemporaryDirectory() as folder:
        runs = [uneven_run(label, PAGE_SPANS // 10) for label in ("sync", "async")]
        write_page(Path(folder) / "page.html", Report(), runs)
        with browse(Path(folder) / "chromium") as driver:
            driver.get((Path(folder) / "page.html").as_uri())
            wait(driver, "return document.querySelector('#timeline-view canvas')?.dataset.drawMs > 0", "the timeline")
            driver.set_script_timeout(300)
            found = driver.execute_async_script(REDRAW, [1 / zoom for zoom in ZOOMS], 2 * ROUNDS)
    for zoom, times in zip(ZOOMS, found, strict=True):
        both, script = [sum(one) for one in times], statistics.median(one[0] for one in times)
        what = "the whole run" if zoom == 1 else f"1 / {zoom} of it"
        show(f"{what} (script {script:.1f} ms)", statistics.median(both), "ms", "50 at most", between(both))


# ---- what a preset is to reach on a GPU ---------------------------------------------------------------------------

NOT_MEASURED = "not measured"
WORDS = {True: "reached", False: "NOT REACHED", None: "no claim: another length, or the law forbids it"}
MOST_OVER_FLOOR = (("first_context", 64, 1.35), ("last_context", 8192, 1.12))  # at a context of so many tokens a row


class Target(NamedTuple):
    """A speed to reach: what, how much, what was measured, and whether that reaches it; None where that cannot be
    said."""

    what: str
    reach: str
    value: str
    reached: bool | None


def target(what: str, reach: str, value: float | None, reached: bool | None, form: str) -> Target:
    if value is None:
        return Target(what, reach, NOT_MEASURED, None)
    return Target(what, reach, form.format(value), reached)


def targets(report: Report) -> list[Target]:
    """Each speed that the report of a preset says something about."""

    def of_8b(engine: str, mode: str) -> Run | None:
        key = engine, mode, "random:llama-8b", 32
        return next((run for run in report.runs if (run.engine, run.mode, run.model, run.batch_size) == key), None)

    own, sync = of_8b(OWN, "async"), of_8b(OWN, "sync")
    rows: list[Target] = []
    if own and report.preset == "headline":
        rows += targets_of_headline(report, own)
    if own:
        rows += targets_of_steps(report, own, sync)
    for one in report.comparisons:
        if (one.model, one.batch_size) == ("random:llama-0.6b", 32):
            rows.append(target_of_small_model(one))
    return rows


def targets_of_headline(report: Report, own: Run) -> Iterator[Target]:
    """The whole run's time; no claim about a shortened one."""
    whole, wall, over = (own.requests, own.new_tokens) == (32, 8192), own.wall_s, own.time_over_floor
    yield target("total, async", "75 s or less (H200)", wall, (wall or 0) <= 75 if whole else None, "{:.1f} s")
    reached = (over or 9) <= 75 / 62 if whole else None
    yield target("total, async, over its floor", "1.21x (75 / 62)", over, reached, "{:.3f}x")
    peers = [run.wall_s for run in report.runs if run.engine != OWN and run.wall_s]
    ratio = min(peers) / wall if peers and wall else None
    yield target("faster than the fastest peer", "above 1x", ratio, (ratio or 0) > 1, "{:.3f}x")


def targets_of_steps(report: Report, own: Run, sync: Run | None) -> Iterator[Target]:
    """Of the 8B shape at batch 32: how idle the device is, and how near a step is to its floor."""
    active = own.device_active
    share = None if active is None else 100 * active
    yield target("device active, async", "99.9 %", share, (active or 0) >= 0.999, "{:.2f} %")
    for name, short, most in MOST_OVER_FLOOR:
        steps: ContextSteps = getattr(own, name) or ContextSteps()
        near = steps.context
        fits = near <= 128 if name == "first_context" else near >= 0.9 * short
        reached = (steps.over_floor or 9) <= most if fits else None
        what = f"decode step over its floor, context {near:.0f}"
        yield target(what, f"{most}x (at {short})", steps.over_floor, reached, "{:.3f}x")
    host = [run.host_ms_per_step for run in (own, sync) if run and run.host_ms_per_step is not None]
    slower = max(host, default=None)
    yield target("host work per step, batch 32", "0.5 ms", slower, max(host, default=9) <= 0.5, "{:.3f} ms")
    rate, copy = own.floor and own.floor.kv_bytes_per_s, report.copy_bandwidth_bytes_per_s
    read = 100 * rate / copy if rate and copy else None
    yield target("attention's reads, of the copy bandwidth", "85 %", read, (read or 0) >= 85, "{:.1f} %")


def target_of_small_model(one: Comparison) -> Target:
    """Of the 0.6B shape at batch 32: no claim where the law does not allow the speed-up."""
    law, speedup = one.law_idle, one.async_speedup
    bound = None if law is None else overlap_gain(law, 1 - law)
    forbidden = bound is not None and bound < 1.3
    reached = None if forbidden and (speedup or 0) < 1.3 else (speedup or 0) >= 1.3
    reach = f"1.3x (law: {bound:.2f}x)" if bound else "1.3x"
    return target("0.6B at batch 32, async / sync", reach, speedup, reached, "{:.3f}x")


def targets_table(rows: Sequence[Target]) -> str:
    """The targets as text, a line each."""
    if not rows:
        return "no target is about this report: they are about the presets headline and sweep"
    lines = [("speed to reach", "reach", "measured"), *((*row[:3], _word(row)) for row in rows)]
    return "\n".join(table_line(line, (44, 22, 16, 0), "<>><") for line in lines)


def _word(row: Target) -> str:
    return "" if row.value == NOT_MEASURED else f"  {WORDS[row.reached]}"


# ---- the command line ---------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the package itself, beside its targets.")
    parser.add_argument("--targets", metavar="REPORT.json", help="measure nothing: judge the report of a preset")
    parser.add_argument("--host-work", action="store_true", help="measure only the host's work per step, not the rest")
    parser.add_argument("--measuring", action="store_true", help="measure only what measuring costs the host")
    parser.add_argument("--page", action="store_true", help="measure only how fast a page draws its timeline again")
    options = parser.parse_args(arguments)
    if options.targets is not None:
        try:
            report = load(options.targets, "--targets")
        except ValueError as error:
            print(f"bench.py: {error}", file=sys.stderr)
            return 2
        print(targets_table(targets(report)))
        return 0
    if hasattr(os, "getloadavg"):
        print(f"{os.cpu_count()} cores, load before this began: {os.getloadavg()[0]:.2f} (should be near 0)")
    for alone, measure in ((options.page, bench_page), (options.measuring, bench_measuring)):
        if alone:
            measure()
            return 0
    bench_host_work()
    if options.host_work:
        return 0
    bench_measuring()
    bench_overlap()
    bench_import()
    bench_page()
    return 0


if __name__ == "__main__":
    sys.exit(main())

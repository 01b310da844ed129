"""What the loops themselves cost the host: milliseconds a step, now and at an earlier commit, in turns.

    python tools/host_work.py 8f14dee
    python tools/host_work.py HEAD~20 --rows 32 256 --rounds 30

The batchers of both codes are open at the same time, each in a process of its own, beside a device that takes no time.
They take turns, one run of some steps each, so that whatever else the machine does meets both alike. Of each run two
figures are taken: the median of its decode steps, and the step that a tenth of them are quicker than, which a busy
machine has disturbed least. Printed are their medians over the rounds, and the median of the ratios of two runs that
followed each other; in brackets the range in which half of these ratios lie: that is how noisy it was. With HEAD in
place of an earlier commit the ratio would be 1 on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
ROWS, ROUNDS, NEW_TOKENS = (1, 8, 32, 128, 256), 31, 64


def requests(model: Any, count: int, new_tokens: int) -> list[Any]:
    """Random prompts of 16 tokens; each request runs to its length limit."""
    from asyncbatch import Request

    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (count, 16)).tolist()
    return [Request(prompt, new_tokens, stop_token_ids=()) for prompt in prompts]


def by_step(timeline: Any) -> dict[str, list[float]]:
    """Milliseconds of each decode step by host phase, and "total" of all but waiting."""
    decode = {step.step for step in timeline.steps if step.kind == "decode"}
    phases: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for span in timeline.spans:
        if span.lane == "host" and span.name != "wait" and span.step in decode:
            for phase in (span.name, "total"):
                phases[phase][span.step] += 1e3 * (span.end - span.start)
    return {phase: list(times.values()) for phase, times in phases.items()}


def host_ms(timeline: Any) -> dict[str, float]:
    """Median milliseconds of a decode step by host phase, and "total" of all but waiting."""
    return {phase: statistics.median(times) for phase, times in by_step(timeline).items()}


def median_and_tenth(timeline: Any) -> tuple[float, float]:
    """Milliseconds of a decode step: the median, and the step that a tenth of all are quicker than."""
    return tuple(np.quantile(by_step(timeline)["total"], (0.5, 0.1)).tolist())


def serve() -> None:
    """In the process of one code: for each line, a number of rows, a run in each mode, and its `median_and_tenth`."""
    import asyncbatch

    model, _ = asyncbatch.load_model("random:tiny")
    rows, batchers = 0, []
    for line in sys.stdin:
        if rows != int(line):
            for batcher in batchers:
                batcher.close()
            rows = int(line)
            options: dict[str, Any] = dict(max_batch_size=rows, max_length=16 + NEW_TOKENS, step_s=0.0)
            batchers = [kind(model, **options) for kind in (asyncbatch.SyncBatcher, asyncbatch.AsyncBatcher)]
            for batcher in batchers:
                batcher.run(requests(model, rows, NEW_TOKENS))
        found = {}
        for batcher in batchers:
            batcher.run(requests(model, rows, NEW_TOKENS))
            found[batcher.mode] = median_and_tenth(batcher.timeline)
        print(json.dumps(found), flush=True)
    for batcher in batchers:
        batcher.close()


class Code:
    """The process of one code. `folder` holds its package."""

    def __init__(self, folder: Path):
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, __file__, "--serve"], env=environment, text=True,
                                        cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    def run(self, rows: int) -> dict[str, list[float]]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{rows}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def unpack(commit: str, folder: Path) -> None:
    """Put the package as it was at a commit into a folder. ValueError for what git does not know."""
    packed = subprocess.run(["git", "archive", commit, "asyncbatch"], cwd=ROOT, capture_output=True, check=False)
    if packed.returncode:
        raise ValueError(f"{commit}: {packed.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)


def compared(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float, tuple[float, float]]:
    """(median before, median after, median of the pairs' ratios after / before, the middle half of these ratios)."""
    ratios = [new / old for old, new in zip(before, after, strict=True)]
    low, high = np.quantile(ratios, (0.25, 0.75)).tolist()
    return statistics.median(before), statistics.median(after), statistics.median(ratios), (low, high)


def compare(commit: str, rows: Sequence[int], rounds: int) -> None:
    print(f"{os.cpu_count()} cores, load before this began: {os.getloadavg()[0]:.1f} (should be near 0)")
    print(f"host ms a decode step, at {commit} and now, {rounds} runs of each in turns")
    print("| rows | loop | before | now | now / before | quickest tenth before | now | now / before |")
    print("| ---: | --- | ---: | ---: | --- | ---: | ---: | --- |")
    with tempfile.TemporaryDirectory() as name:
        unpack(commit, Path(name))
        old, new = Code(Path(name)), Code(ROOT)
        for count in rows:
            pairs = []
            for turn in range(rounds + 1):
                first, second = (old, new) if turn % 2 else (new, old)
                one, other = first.run(count), second.run(count)
                pairs.append((one, other) if turn % 2 else (other, one))
            for mode in ("sync", "async"):
                cells = []
                for figure in (0, 1):
                    sides = [[pair[side][mode][figure] for pair in pairs[1:]] for side in (0, 1)]
                    before, after, ratio, (low, high) = compared(*sides)
                    cells += [f"{before:.3f}", f"{after:.3f}", f"{ratio:.2f}x ({low:.2f} to {high:.2f})"]
                print(f"| {count} | {mode} | {' | '.join(cells)} |", flush=True)
        old.close()
        new.close()
    print(f"load at the end: {os.getloadavg()[0]:.1f}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="what git calls the earlier code")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"runs of each code ({ROUNDS})")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve()
        return 0
    if options.commit is None or min(*options.rows, options.rounds) < 1:
        parser.error("a commit is needed; rows and rounds are whole numbers from 1")
    try:
        compare(options.commit, options.rows, options.rounds)
    except ValueError as error:
        print(f"host_work.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

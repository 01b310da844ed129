"""What another schedule would bring on a GPU: long prompts and mixed lengths, simulated, and measured in pairs.

    python tools/schedules.py                                    simulate every policy, on any machine, in seconds
    python tools/schedules.py --measure today,beside             measure two of them on a GPU, in turns, in one call
    python tools/schedules.py --measure today,sizes --only mixed

The scheduler is the real one, two steps ahead as in the asynchronous loop, and the requests are those of `--preset
workloads`. Only a step's time is made up, by `StepCosts`, since there the device is never idle: the time of a run is
the sum of its steps'. A step's two passes are added up, as they run today. The numbers were measured on an H200 with
the 8B shape and 32 rows; where each is from stands beside it, and two of them were chosen so that today's policy takes
what it was measured to take (docs/performance.md). What differs by less than the 5 % that two openings of the same
options differ by, only `--measure` can tell.

Policies, each with today's sizes and budget unless it says more:

today     what a batcher does by default on CUDA
budget    8192 prompt tokens from one decode row of a request to its next; nolimit: as many as there are
sizes     384 and 768 prompt tokens are sizes of a step too; by128: every multiple of 128 up to 2048
beside    the two passes of a mixed step on two streams of the device. How much of the shorter one that hides, only a
          GPU can say: half (beside) or all of it (hidden)
both      sizes and beside; most: by128 and hidden
longest   requests in the order of their lengths, longest first: not what was asked for, since the first to come is
          served first, but it says how much of the time is the order's
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from asyncbatch import AsyncBatcher, Request, load_model
from asyncbatch.config import PREFILL_SIZES
from asyncbatch.devices.cuda.runner import CudaRunner
from asyncbatch.kv_cache import KVCache, blocks_for
from asyncbatch.measure.percentile import p99
from asyncbatch.measure.text import table_lines
from asyncbatch.profile.presets import PRESETS, served_by
from asyncbatch.profile.workload import Workload, latency, make_requests, most_context
from asyncbatch.sampling import sample
from asyncbatch.scheduler import BatchPlan, RunState, Scheduler, StepKind

BLOCK, SLOTS = 16, 2
MEASURED_S = {"long": 5.15, "mixed": 13.43}  # async, docs/performance.md, 2026-11-27


@dataclass(frozen=True)
class StepCosts:
    """Milliseconds of a step's passes (8B shape, 32 rows, H200, compiled).

    decode_ms, token_ms: a decode step, and each token that its rows attend to: the line through 4.65 ms at context 33
        and 8.92 at 4096 (docs/performance.md).
    uneven: how much of the time goes by the longest row where rows are uneven: 0 if it goes by the sum, 1 if all rows
        took as long as the longest. Chosen; a step of lengths like the mixed workload's then takes 5.7 to 6.0 ms where
        5.84 were measured (`kernels.least_split`).
    chunk_ms: a prefill pass by its size, measured on empty chunks by a script that is not kept.
    loaded: how much longer it takes with real numbers in it, at which a GPU has to slow down. Chosen.
    pair_ms: attention, for each token of a chunk and each key that it sees: 389 us a layer for a chunk of 2048 after
        2048 others, as it was before it took 282 (docs/performance.md)."""

    decode_ms: float = 4.615
    token_ms: float = 3.284e-5
    uneven: float = 0.1
    chunk_ms: dict[int, float] = field(default_factory=lambda: {128: 4.75, 256: 6.8, 512: 11.7, 1024: 20.3, 2048: 40.4})
    loaded: float = 1.15
    pair_ms: float = 0.389 * 32 / (2048 * (2048 + 1024))

    def of(self, plan: BatchPlan) -> tuple[float, float]:
        """(decode pass, prefill pass) of a step, in milliseconds; 0 for one that it has not."""
        decode = prefill = 0.0
        if plan.num_decode:
            lengths = [row.position + 1 for row in plan.rows[: plan.num_decode]]
            longest = max(lengths) * len(lengths)
            decode = self.decode_ms + self.token_ms * (sum(lengths) + self.uneven * (longest - sum(lengths)))
        if plan.tokens:
            pairs = sum(row.num_tokens * (row.position + row.num_tokens / 2) for row in plan.rows[plan.num_decode :])
            empty = float(np.interp(plan.tokens, list(self.chunk_ms), list(self.chunk_ms.values())))
            prefill = self.loaded * empty + self.pair_ms * pairs
        return decode, prefill


class Policy(NamedTuple):
    """sizes, budget: as of `Scheduler`. hidden: which share of a mixed step's shorter pass takes no time. beside: run
    the passes on two streams where it is measured. longest_first: see above."""

    sizes: tuple[int, ...] = PREFILL_SIZES
    budget: int = PREFILL_SIZES[-1]
    hidden: float = 0.0
    beside: bool = False
    longest_first: bool = False


FINER, BY_128 = (256, 384, 512, 768, 1024, 2048), tuple(range(128, 2049, 128))
POLICIES = {
    "today": Policy(),
    "budget": Policy(budget=8192),
    "nolimit": Policy(budget=10**9),
    "sizes": Policy(FINER),
    "by128": Policy(BY_128),
    "beside": Policy(hidden=0.5, beside=True),
    "hidden": Policy(hidden=1.0, beside=True),
    "both": Policy(FINER, hidden=0.5, beside=True),
    "most": Policy(BY_128, hidden=1.0, beside=True),
    "longest": Policy(longest_first=True),
}
MEASURABLE = [name for name, policy in POLICIES.items() if policy.budget == PREFILL_SIZES[-1]]


# ---- simulated -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Simulated:
    """What a policy takes, in seconds. first_s: each request's first token, in the order of the requests. pause_s: the
    longest time between two tokens of a request. passes: steps by what they run; padded: prompt tokens computed,
    padding included, for each one that was asked."""

    total_s: float
    first_s: list[float]
    pause_s: float
    decode_s: float
    prefill_s: float
    passes: Counter[str]
    padded: float


def simulate(requests: Iterable[Request], policy: Policy, costs: StepCosts | None = None, rows: int = 32) -> Simulated:
    """Serve the requests with a policy, all of them there at the beginning, each up to its length limit."""
    costs, requests = costs or StepCosts(), list(requests)
    if policy.longest_first:
        requests.sort(key=lambda request: -request.max_new_tokens)
    longest = max(len(request.token_ids) + request.max_new_tokens for request in requests)
    per_row = blocks_for(longest, BLOCK)
    kv = KVCache(rows * per_row, BLOCK, per_row, rows * (SLOTS + 1))
    scheduler = Scheduler(kv, rows, policy.sizes, policy.budget)
    for number, request in enumerate(requests):
        scheduler.add(RunState(number, request, frozenset()))
    now_ms, in_flight, first, newest = 0.0, deque[BatchPlan](), dict[int, float](), dict[int, float]()
    pause_ms, sums, passes, computed, asked = 0.0, [0.0, 0.0], Counter[str](), 0, 0
    while True:
        plan = scheduler.plan()
        if plan is not None:
            in_flight.append(plan)
        if not in_flight:
            break
        if plan is not None and len(in_flight) < SLOTS:
            continue
        done = in_flight.popleft()
        both = costs.of(done)
        now_ms += sum(both) - policy.hidden * min(both)
        sums = [before + more for before, more in zip(sums, both, strict=True)]
        passes[done.passes] += 1
        computed += done.tokens
        asked += sum(row.num_tokens for row in done.rows[done.num_decode :])
        for state, _ in scheduler.commit(done, [0] * len(done.rows)).new:
            first.setdefault(state.number, now_ms)
            pause_ms = max(pause_ms, now_ms - newest.get(state.number, now_ms))
            newest[state.number] = now_ms
    first_s = [1e-3 * first[number] for number in range(len(requests))]
    return Simulated(1e-3 * now_ms, first_s, 1e-3 * pause_ms, 1e-3 * sums[0], 1e-3 * sums[1], passes, computed / asked)


def workload_of(name: str) -> Workload:
    (served,) = served_by(PRESETS["workloads"], [name])
    lengths: Any = served.requests, served.new_tokens, served.prompt_tokens
    return Workload(served.model, served.batch_size, *lengths)


def requests_of(name: str) -> list[Request]:
    """The requests of a workload of `--preset workloads`, without its model: their lengths are the same."""
    model, _ = load_model("random:tiny")
    model.config.max_position_embeddings = 131072
    return make_requests(workload_of(name), model, None)


def simulated_table(names: Sequence[str]) -> str:
    head = ("workload", "policy", "total s", "first token ms", "its p99", "longest pause ms", "decode s", "prefill s",
            "padded", "decode", "mixed", "prefill")  # fmt: skip
    rows: list[Sequence[str]] = [head]
    for name in names:
        requests = requests_of(name)
        for label, policy in POLICIES.items():
            one = simulate(requests, policy)
            first = 1e3 * statistics.median(one.first_s), 1e3 * p99(one.first_s)
            times = (f"{one.total_s:.2f}", *(f"{ms:.0f}" for ms in (*first, 1e3 * one.pause_s)))
            more = f"{one.decode_s:.2f}", f"{one.prefill_s:.2f}", f"{one.padded:.2f}x"
            counts = (str(one.passes[passes]) for passes in ("decode", "mixed", "prefill"))
            rows.append((name, label, *times, *more, *counts))
    lines = table_lines(rows, align="<<>")
    measured = ", ".join(f"{name} {MEASURED_S[name]} s" for name in names)
    return "\n".join([*lines, f"measured with today's policy: {measured}"])


# ---- measured ------------------------------------------------------------------------------------------------------


class Beside(CudaRunner):
    """A runner whose mixed steps have their two passes on two streams. They share nothing: other rows, other blocks of
    the pool (but block 0, which nobody reads), a workspace of cuBLAS for each stream. So the tokens are the same."""

    def _step(self, slot: int, kind: StepKind) -> None:
        if kind.passes != "mixed":
            super()._step(slot, kind)
            return
        if not hasattr(self, "side"):
            self.side = torch.cuda.Stream(self.device)
        fields, main = self.shape.fields(self.inputs[slot], kind), torch.cuda.current_stream()
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            decoded = self._decode(fields, *self.decode_inputs(fields))
        after_chunks = self._prefill(fields)
        main.wait_stream(self.side)
        logits = torch.where(fields["decodes"].bool()[:, None], decoded, after_chunks)
        self.outputs[slot, : kind.rows] = sample(logits, fields) if kind.sampled else self.greedy(logits)


class BesideBatcher(AsyncBatcher):
    runner = Beside


def measure(names: Sequence[str], labels: Sequence[str], repeats: int, shape: str = "random:llama-8b") -> None:
    """Open a batcher for each policy beside the others, and serve each workload with them in turns."""
    model, _ = load_model(shape, device="cuda")
    print(f"{shape}: {torch.cuda.get_device_name()}, torch {torch.__version__}, {repeats} turns", flush=True)
    workloads = {name: make_requests(workload_of(name), model, None) for name in names}
    longest = max(len(one.token_ids) + one.max_new_tokens for requests in workloads.values() for one in requests)
    tokens = max(most_context(requests, 32) for requests in workloads.values())
    options: dict[str, Any] = dict(compile=True, max_batch_size=32, max_length=longest, block_size=BLOCK,
                                   num_blocks=blocks_for(tokens, BLOCK) + 64)  # fmt: skip
    with contextlib.ExitStack() as stack:
        batchers = {}
        for label in labels:
            start, policy = time.perf_counter(), POLICIES[label]
            kind = BesideBatcher if policy.beside else AsyncBatcher
            batchers[label] = stack.enter_context(kind(model, prefill_tokens=policy.sizes, **options))
            print(f"{label}: opened in {time.perf_counter() - start:.0f} s", flush=True)
        rows: list[Sequence[str]] = [
            ("workload", "policy", "total s", "each", "over the first", "first token ms", "its p99", "same tokens")
        ]
        for name, requests in workloads.items():
            rows += _in_turns(name, batchers, requests, repeats)
    print("\n".join(table_lines(rows, align="<<>")))


def _in_turns(name: str, batchers: dict[str, Any], requests: list[Request], repeats: int) -> list[tuple[str, ...]]:
    """A row for each batcher. They take turns, in every second one in the reverse order."""
    walls: dict[str, list[float]] = {label: [] for label in batchers}
    firsts, tokens = {}, {}
    for batcher in batchers.values():  # what runs for the first time takes longer
        batcher.run([Request(one.token_ids, 2, stop_token_ids=()) for one in requests[:32]])
    for turn in range(repeats):
        for label in list(batchers)[:: -1 if turn % 2 else 1]:
            answers = batchers[label].run(requests)
            walls[label].append(batchers[label].timeline.summary().wall_s)
            firsts[label], tokens[label] = latency(answers).first_token_ms, [one.token_ids for one in answers]
    rows: list[tuple[str, ...]] = []
    base = next(iter(batchers))
    for label, seconds in walls.items():
        ratios = [own / other for own, other in zip(seconds, walls[base], strict=True)]
        first, each = firsts[label], " ".join(f"{one:.2f}" for one in seconds)
        rows.append((name, label, f"{statistics.median(seconds):.2f}", each, f"{statistics.median(ratios):.3f}x",
                     f"{first.median:.0f}", f"{first.p99:.0f}", str(tokens[label] == tokens[base])))  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(MEASURED_S), help="one of the workloads")
    parser.add_argument("--measure", metavar="A,B", help=f"on a GPU: two or more of {', '.join(MEASURABLE)}")
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="turns of each policy (2)")
    options = parser.parse_args(arguments)
    names = [options.only] if options.only else list(MEASURED_S)
    if options.measure is None:
        print(simulated_table(names))
        return 0
    labels = options.measure.split(",")
    if wrong := [label for label in labels if label not in MEASURABLE]:
        parser.error(f"--measure {options.measure}: {wrong[0]!r} is none of {', '.join(MEASURABLE)}")
    if not torch.cuda.is_available():
        print("schedules.py: torch sees no CUDA device: without --measure the policies are simulated", file=sys.stderr)
        return 2
    measure(names, labels, options.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())

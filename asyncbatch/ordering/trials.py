"""Trials: put each fault into the asynchronous loop, run it, and see how the fault shows.

    python -m asyncbatch.faults              # a table: each fault, and how it is found
    python -m asyncbatch.faults --explain    # and for each, in two sentences, what happens

A trial runs on the virtual clock, where times are chosen and every run is the same. A fault must be found in one of
three ways: the race checker proves that an order is missing, whatever the times are; or the tokens are wrong; or the
books of the KV cache are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..batcher import AsyncBatcher
from ..devices.virtual import Costs
from ..models.toy import VOCABULARY, toy_llama
from ..request import Request, SamplingParams
from .faults import FAULTS, Fault
from .races import RaceError
from .rank_faults import RANK_FAULTS, rank_fault_table, rank_trial
from .toy import toy_tokens, use_toy_model


def workload(seed: int) -> list[Request]:
    """9 to 13 requests of different lengths, more than fit into the batch. Some sample, some stop early."""
    generator = np.random.default_rng(seed)
    requests = []
    for number in range(int(generator.integers(9, 14))):
        # The first prompts are cut into pieces. While no other request runs, such a piece is a step without output.
        length = int(generator.integers(33, 40) if number < 2 else generator.integers(1, 30))
        prompt = generator.integers(1, VOCABULARY, length).tolist()
        sampling = SamplingParams(temperature=1.0, seed=number) if number % 3 == 1 else SamplingParams()
        plain = Request(prompt, int(generator.integers(6, 14)), sampling, stop_token_ids=())
        stop = toy_tokens(plain)[int(generator.integers(2, 5))]
        requests.append(Request(prompt, plain.max_new_tokens, sampling, stop_token_ids=(stop,) if number % 2 else ()))
    return requests


def costs_for(seed: int) -> Costs:
    """Times (seconds) at which a missing wait shows: copies take long, and the device is slower than the host."""
    generator = np.random.default_rng(seed)
    scale = lambda low, high: float(generator.uniform(low, high)) * 1e-3  # noqa: E731
    return Costs(
        plan=scale(0.05, 0.2), fill=scale(0.05, 0.2), launch=scale(0.01, 0.1), commit=scale(0.05, 0.2),
        copy_in=scale(0.5, 1.0), step=scale(2.0, 4.0), copy_out=scale(0.5, 1.0),
    )  # fmt: skip


class Finding(NamedTuple):
    """How a fault was found in one run. by: "checker", "tokens", "books" or "error", or "" if all was well.
    detail: what was seen."""

    by: str
    detail: str


def trial(fault: Fault | None, seed: int, check_races: bool = True, slots: int = 2, model=None) -> Finding:
    """Run the asynchronous batcher with a fault, or with none (None), and say whether and how it was found.

    seed: of the requests and times. check_races: whether the race checker watches. slots: steps that can be in flight.
    model: None makes a new one; a caller with many trials makes one `toy_llama()` for all of them.
    """
    requests = workload(seed)
    batcher = AsyncBatcher(
        toy_llama() if model is None else model, clock=costs_for(seed), step_s=0.0, check_races=check_races,
        max_batch_size=4, num_slots=slots, block_size=4, num_blocks=30, max_length=64, prefill_tokens=16,
    )  # fmt: skip
    with batcher:
        use_toy_model(batcher)
        if fault is not None:
            fault.apply(batcher)
        try:
            completions = batcher.run(requests)
        except RaceError as race:
            return Finding("checker", str(race))
        except (AssertionError, RuntimeError, ValueError, IndexError, KeyError) as error:
            return Finding("error", f"{type(error).__name__}: {error}")
        for number, (request, completion) in enumerate(zip(requests, completions, strict=True)):
            expected = toy_tokens(request)
            if completion.error is not None:
                return Finding("error", str(completion.error))
            if completion.token_ids != expected:
                return Finding("tokens", f"request {number}: {completion.token_ids}, expected {expected}")
        free = batcher.kv.num_free
        if free != batcher.kv.num_blocks or len(set(batcher.kv.free)) != free:
            return Finding("books", f"{free} of {batcher.kv.num_blocks} blocks are free at the end")
    return Finding("", "all tokens are right")


def fault_table(seeds: int) -> tuple[str, bool]:
    """All faults as a Markdown table, and whether every fault was found with every one of the seeds 0 to seeds - 1 (and
    nothing was found where there is no fault)."""
    lines, complete, model = [], True, toy_llama()
    lines.append("| fault | what comes of it | checker | tokens, books | kind seen in |")
    lines.append("| --- | --- | --- | --- | --- |")
    for fault in FAULTS:
        watched = [trial(fault, seed, model=model).by for seed in range(seeds)]
        unwatched = [trial(fault, seed, check_races=False, model=model).by for seed in range(seeds)]
        complete &= all(a or b for a, b in zip(watched, unwatched, strict=True))
        by_checker, by_tokens = watched.count("checker"), sum(map(bool, unwatched))
        cells = (fault.name, fault.symptom, f"{by_checker} of {seeds}", f"{by_tokens} of {seeds}", fault.seen_in)
        lines.append("| " + " | ".join(cells) + " |")
    clean = [trial(None, seed, model=model).by for seed in range(seeds)]
    lines.append(f"| (no fault) | | {clean.count('checker')} of {seeds} | {sum(map(bool, clean))} of {seeds} | |")
    return "\n".join(lines), complete and not any(clean)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="asyncbatch.faults", description="Put faults into the asynchronous loop.")
    parser.add_argument("--seeds", type=int, default=10, help="runs of each fault (default 10)")
    parser.add_argument("--explain", action="store_true", help="say of each what happens")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: allowed are whole numbers from 1")
    text, complete = fault_table(options.seeds)
    of_ranks, all_found = rank_fault_table(options.seeds)
    complete &= all_found
    print(f"{text}\n\n{of_ranks}")
    if options.explain:
        for fault in FAULTS:
            print(f"\n{fault.name}\n  {fault.explain()}\n  For example: {trial(fault, 0).detail}")
        for one in RANK_FAULTS:
            print(f"\n{one.name}\n  So {one.symptom}.\n  For example: {rank_trial(one, 0).detail}")
    print("\nEvery fault was found in every run." if complete else "\nNOT every fault was found in every run.")
    return 0 if complete else 1

"""The batchers under stress: whatever arrives, stops, is cancelled or preempted, every request gets its own tokens.

On the virtual clock with the toy model of `ordering/toy.py`, which reads its whole context through the block tables,
and with
the race checker on: a run takes milliseconds, so there are many."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from asyncbatch import AsyncBatcher, Request, SyncBatcher
from asyncbatch.devices.virtual import Costs
from asyncbatch.models.toy import toy_llama
from asyncbatch.ordering.toy import toy_tokens, use_toy_model
from asyncbatch.ordering.trials import workload

MODEL = toy_llama()
SIZES = dict(max_batch_size=4, block_size=4, max_length=64, prefill_tokens=16)


def make(batcher_class, slots, **options):
    batcher = batcher_class(MODEL, clock=Costs(), step_s=0.0, num_slots=slots, **{**SIZES, **options})
    use_toy_model(batcher)
    return batcher


def early_stops(requests):
    return sum(len(toy_tokens(request)) < request.max_new_tokens for request in requests)


@pytest.mark.parametrize("part", range(10))
def test_random_workloads_give_each_request_the_tokens_that_it_gets_alone(part):
    """500 workloads: arrivals while others run, stops, sampling, preemption under a tiny pool, 1 to 4 slots."""
    for seed in range(50 * part, 50 * (part + 1)):
        generator = np.random.default_rng(seed)
        requests = workload(seed)
        slots = int(generator.integers(1, 5))
        batcher_class = AsyncBatcher if slots > 1 or seed % 2 else SyncBatcher
        options = dict(num_blocks=int(generator.integers(16, 40)), check_races=True)
        with make(batcher_class, slots, **options) as batcher:
            handles = []
            while len(handles) < len(requests) or any(handle.completion is None for handle in handles):
                if len(handles) < len(requests) and (generator.random() < 0.4 or not batcher._handles):
                    handles.append(batcher.submit(requests[len(handles)]))
                batcher._turn()
            batcher._drain()
            for request, handle in zip(requests, handles, strict=True):
                assert handle.completion.token_ids == toy_tokens(request), seed
            summary = batcher.timeline.summary()
            assert summary.tokens == sum(len(toy_tokens(request)) for request in requests)
            # A length limit is known ahead and wastes nothing; a stop is found at most slots - 1 steps late.
            assert summary.wasted_tokens <= (slots - 1) * early_stops(requests)
            assert batcher.kv.num_free == batcher.kv.num_blocks


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_request_that_is_cancelled_at_any_moment_keeps_a_prefix_and_disturbs_nobody(slots):
    for seed in range(60):
        generator = np.random.default_rng(seed)
        requests = workload(seed)
        with make(AsyncBatcher, slots, num_blocks=24, check_races=True) as batcher:
            handles = [batcher.submit(request) for request in requests]
            doomed = set(generator.choice(len(requests), 4, replace=False).tolist())
            waiting = {index: int(generator.integers(0, 25)) for index in doomed}
            turn = 0
            while any(handle.completion is None for handle in handles):
                for index in [index for index, when in waiting.items() if when <= turn]:
                    before = handles[index].completion
                    del waiting[index]
                    assert batcher.cancel(handles[index]) == (before is None)
                    assert not batcher.cancel(handles[index])  # the second time there is nothing left to cancel
                batcher._turn()
                turn += 1
            for index, (request, handle) in enumerate(zip(requests, handles, strict=True)):
                expected, given = toy_tokens(request), handle.completion.token_ids
                if handle.completion.finish_reason == "cancelled":
                    assert index in doomed
                    assert given == expected[: len(given)]
                else:
                    assert given == expected
            batcher._drain()
            assert batcher.kv.num_free == batcher.kv.num_blocks


def test_a_reader_that_stops_reading_cancels_its_request_only():
    requests = workload(3)
    with make(AsyncBatcher, 2) as batcher:
        handle = batcher.submit(requests[0])
        stream = batcher.stream(requests[1])
        assert [next(stream), next(stream)] == toy_tokens(requests[1])[:2]
        stream.close()
        assert handle.result().token_ids == toy_tokens(requests[0])
        batcher._drain()
        assert batcher.kv.num_free == batcher.kv.num_blocks


@pytest.mark.parametrize("error", [ValueError("from the list of requests"), KeyboardInterrupt()])
def test_an_exception_in_the_callers_own_code_leaves_a_usable_batcher(error):
    requests = workload(5)

    def breaking():
        yield requests[0]
        raise error

    with make(AsyncBatcher, 2) as batcher:
        with pytest.raises(type(error)):
            batcher.run(breaking())
        assert batcher.kv.num_free == batcher.kv.num_blocks
        assert [c.token_ids for c in batcher.run(requests)] == [toy_tokens(request) for request in requests]


def test_ten_thousand_requests_leave_no_memory_and_no_block_behind():
    """In waves through `run`, which begins a new timeline each time; traced memory after a warm-up must not grow."""
    generator = np.random.default_rng(0)

    def wave():
        prompts = generator.integers(1, 250, (500, 3)).tolist()
        requests = [Request(prompt, int(generator.integers(1, 4)), stop_token_ids=()) for prompt in prompts]
        return [len(c.token_ids) for c in batcher.run(requests)] == [request.max_new_tokens for request in requests]

    with make(AsyncBatcher, 2, max_batch_size=32) as batcher:
        assert wave()
        tracemalloc.start()
        assert wave()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(18):
            assert wave()
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert batcher.kv.num_free == batcher.kv.num_blocks
        assert not batcher._handles
    # One wave's timeline is alive at each of the two moments (about 1 MB); 9,000 requests kept would be far more.
    assert after - before < 500_000

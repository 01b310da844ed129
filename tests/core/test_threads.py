"""Several threads around one batcher, and several batchers at once: each caller is answered, at once and rightly."""

from __future__ import annotations

import gc
import sys
import threading
import time

import pytest
from support.gpt2 import tiny_gpt2
from support.serving import alone
from support.tiny import tiny_model

from asyncbatch import AsyncBatcher, Request, SyncBatcher
from asyncbatch.devices.virtual import Costs
from asyncbatch.models import check_model
from asyncbatch.models.toy import toy_llama
from asyncbatch.ordering.toy import use_toy_model

OPTIONS = {"max_batch_size": 3, "block_size": 4, "prefill_tokens": 8, "max_length": 256}
LONG = Request([3, 1, 4], 200, stop_token_ids=())
SHORT = Request([1, 5], 3, stop_token_ids=())
WAIT_S = 60  # for what never takes so long


def in_threads(*works):
    """What each of the works returned or raised, all begun together."""
    results, start = [None] * len(works), threading.Barrier(len(works))

    def call(number, work):
        start.wait()
        try:
            results[number] = work()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=call, args=(number, work)) for number, work in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    return results


def test_models_are_probed_in_threads_at_the_same_time():
    models = [tiny_gpt2(), tiny_model(), toy_llama(), tiny_gpt2(1)]
    for _ in range(5):
        assert in_threads(*(lambda model=model: check_model(model) for model in models)) == [None] * 4


def test_batchers_are_opened_in_threads_at_the_same_time_and_main_stays_what_it_is():
    main = sys.modules["__main__"]
    models = [tiny_gpt2(n) for n in range(3)]

    def serve(model):
        with AsyncBatcher(model, max_batch_size=2, max_length=32) as batcher:
            return batcher.run([Request([1, 2], 5, stop_token_ids=())])[0].token_ids

    works = [lambda model=model: serve(model) for model in (*models, models[0])]
    first = in_threads(*works)
    assert first == [serve(model) for model in (*models, models[0])]
    assert sys.modules["__main__"] is main


@pytest.mark.parametrize("kind", [SyncBatcher, AsyncBatcher])
def test_close_answers_those_who_wait_with_cancelled(kind):
    batcher = kind(tiny_model(), **OPTIONS | {"max_batch_size": 4}, step_s=0.02)  # 4 s for all of LONG
    handle, started = batcher.submit(LONG), threading.Event()

    def stream():
        tokens = []
        for token in batcher.stream(LONG):
            tokens.append(token)
            started.set()
        return tokens

    def close():
        assert started.wait(WAIT_S)
        while len(batcher._handles) < 4:  # until all have submitted theirs
            time.sleep(0.001)
        batcher.close()

    result, completions, tokens, closed = in_threads(handle.result, lambda: batcher.run([LONG, LONG]), stream, close)
    assert closed is None
    assert result.finish_reason == "cancelled"
    assert [completion.finish_reason for completion in completions] == ["cancelled"] * 2
    assert 0 < len(tokens) < 200


def test_whoever_turns_the_loop_another_learns_of_its_end_before_the_next_turn():
    """The thread that turns stands still, with the batcher's lock, until the one whose request has ended was told."""
    with SyncBatcher(tiny_model(), **OPTIONS, step_s=0.0) as batcher:
        long, short, told = batcher.submit(LONG), batcher.submit(SHORT), threading.Event()
        turn = batcher._turn

        def turn_and_stand_still():
            if short.completion is not None:
                assert told.wait(WAIT_S)
            turn()

        batcher._turn = turn_and_stand_still

        def wait():
            completion = short.result()
            told.set()
            return completion

        first, second = in_threads(long.result, wait)
    assert (len(first.token_ids), len(second.token_ids)) == (200, 3)


def test_requests_from_many_threads_get_the_tokens_that_they_get_alone():
    requests = [Request([n + 1, 7], 5 + n, stop_token_ids=()) for n in range(8)]
    expected = [alone(request).token_ids for request in requests]
    with AsyncBatcher(tiny_model(), **OPTIONS) as batcher:
        works = [lambda r=r: batcher.submit(r).result().token_ids for r in requests[:3]]
        works += [lambda r=r: list(batcher.stream(r)) for r in requests[3:6]]
        works += [lambda: [c.token_ids for c in batcher.run(requests[6:])]]
        results = in_threads(*works)
    assert [*results[:6], *results[6]] == expected


def test_an_abandoned_stream_that_the_garbage_collector_finds_anywhere_takes_no_lock():
    """On the virtual clock, with the batcher's door held by one thread and the clock's lock by another."""
    batcher = AsyncBatcher(toy_llama(), clock=Costs(), max_batch_size=2, max_length=32, block_size=4)
    use_toy_model(batcher)
    with batcher:
        held, collected = threading.Event(), threading.Event()
        streams = [batcher.stream(Request([1, 2], 9))]
        handle = streams[0]._handle

        def hold_the_door():
            with batcher._door, batcher._lock:
                held.set()
                return collected.wait(WAIT_S)

        def collect():
            assert held.wait(WAIT_S)
            with batcher.device._lock:
                streams.clear()
                gc.collect()
            collected.set()

        assert in_threads(hold_the_door, collect) == [True, None]
        batcher.turn()
        assert handle.completion.finish_reason == "cancelled"

"""Nothing is lost: every token that a step samples was wanted, wasted, or is one that was known already."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.clocks import kinds
from support.scheduling import endless_tokens, requests_of, serve, served

from asyncbatch import AsyncBatcher, Request, SyncBatcher
from asyncbatch.devices.virtual import Costs
from asyncbatch.kv_cache import KVCache
from asyncbatch.models.toy import toy_llama
from asyncbatch.ordering.toy import toy_tokens, use_toy_model
from asyncbatch.request import NO_TOKEN, RequestError
from asyncbatch.scheduler import RunState, Scheduler

MANY = settings(max_examples=100, deadline=None)
MODEL = toy_llama()


def wanted(request):
    """The tokens of a request, up to its first stop token."""
    tokens = endless_tokens(request, request.max_new_tokens)
    stops = [place for place, token in enumerate(tokens) if token in request.stop_token_ids]
    return tokens[: stops[0] + 1] if stops else tokens


@MANY
@given(served(cancels=True))
def test_each_sampled_token_is_new_or_wasted_or_was_known(run):
    """Counted by itself: what was sampled for whom, and how far each request had come by then."""
    have, ended = Counter(), set()
    for turn in run.turns:
        ended |= {*turn.cancelled}
        if turn.committed is None:
            continue
        plan, result = turn.committed
        new, wasted, over = [], 0, []
        for row in plan.rows:
            number, request = row.state.number, row.state.request
            place = row.position + row.num_tokens - len(request.token_ids)
            if place < 0:
                continue  # in the middle of the prompt: nothing was sampled
            if number in ended:
                wasted += 1
            elif place == have[number]:
                have[number] += 1
                new.append((number, endless_tokens(request, place + 1)[-1]))
                if have[number] == len(wanted(request)):
                    over.append(number)
        ended |= {*over}
        assert [(state.number, token) for state, token in result.new] == new
        assert [state.number for state in result.ended] == over
        assert result.wasted == wasted
    for state in run.states:
        assert state.generated == wanted(state.request)[: have[state.number]]
        stopped = state.generated[-1:] and state.generated[-1] in state.request.stop_token_ids
        assert state.finish_reason in ("cancelled", "stop" if stopped else "length")


@MANY
@given(requests_of(), st.integers(1, 4), st.integers(1, 4))
def test_with_blocks_for_all_sampled_is_wanted_plus_wasted(requests, depth, batch):
    """Nobody is preempted then. A request that stops early wastes a token in each step that was launched meanwhile, and
    one that reaches its limit none."""
    run = serve(requests, depth, batch=batch)
    sampled = sum(row.samples for _, _, row in run.rows)
    results = [turn.committed[1] for turn in run.turns if turn.committed]
    wasted = sum(result.wasted for result in results)
    assert sampled == sum(len(wanted(request)) for request in requests) + wasted
    late = sum(min(depth - 1, r.max_new_tokens - len(wanted(r))) for r in requests)
    assert wasted <= late
    assert depth > 1 or wasted == 0
    if len(requests) <= batch:  # all in every step, from the same one on: nothing else delays them
        alone = [serve([request], depth) for request in requests]
        assert all(
            sum(turn.committed[1].wasted for turn in one.turns if turn.committed)
            == min(depth - 1, request.max_new_tokens - len(wanted(request)))
            for one, request in zip(alone, requests, strict=True)
        )


@settings(max_examples=25, deadline=None)
@given(kinds, requests_of(), st.integers(0, 6))
def test_both_loops_note_on_the_timeline_what_their_steps_sampled(kind, requests, spare):
    """The number of tokens that the device sampled is read from its own inputs: a decode row, or the last piece of a
    prompt. Those that were computed again after a preemption count once."""
    loop, slots = kind
    stopping = [
        Request(r.token_ids, r.max_new_tokens, stop_token_ids=toy_tokens(r)[n % 5 : n % 5 + 1])
        for n, r in enumerate(requests)
    ]
    blocks = sum(-(-(len(r.token_ids) + r.max_new_tokens) // 4) for r in requests)  # room for all
    options = dict(max_batch_size=3, block_size=4, max_length=64, prefill_tokens=8, num_blocks=blocks + spare)
    sampled = Counter()
    with loop(MODEL, clock=Costs(), step_s=0.0, num_slots=slots, **options) as batcher:
        use_toy_model(batcher)
        program = batcher.device.program
        run = program.run

        def counting(command, slot):
            if command not in ("copy_in", "copy_out"):
                for row in batcher.slots[slot].plan.rows:
                    sampled[batcher.slots[slot].step] += row.position + row.num_tokens >= len(row.state.prompt)
            run(command, slot)

        program.run = counting
        completions = batcher.run(stopping)
        steps = {step.step: step for step in batcher.timeline.steps}
    assert [c.token_ids for c in completions] == [toy_tokens(request) for request in stopping]
    assert {number: step.tokens + step.wasted for number, step in steps.items()} == dict(sampled)
    summary = batcher.timeline.summary()
    assert summary.tokens == sum(len(c.token_ids) for c in completions)
    assert summary.wasted_tokens == sum(sampled.values()) - summary.tokens
    assert slots > 1 or summary.wasted_tokens == 0


@pytest.mark.parametrize(("loop", "slots", "wasted"), [(SyncBatcher, 1, 0), (AsyncBatcher, 2, 1), (AsyncBatcher, 3, 2)])
def test_one_request_that_stops_early_wastes_a_token_for_each_further_slot(loop, slots, wasted):
    plain = Request([1, 2, 3], 20, stop_token_ids=())
    stop = toy_tokens(plain)[4]
    with loop(MODEL, clock=Costs(), step_s=0.0, num_slots=slots, max_batch_size=2, block_size=4, max_length=64) as one:
        use_toy_model(one)
        one.run([Request([1, 2, 3], 20, stop_token_ids=[stop])])
        assert one.timeline.summary().wasted_tokens == wasted
        one.run([plain])
        assert one.timeline.summary().wasted_tokens == 0, "a length limit is known ahead"


# ---- how a request ends ----------------------------------------------------------------------------------------------


def state_of(generated, stops_on_text=None, limit=9):
    state = RunState(0, Request([1, 2], limit, stop_token_ids=()), frozenset([7]), stops_on_text)
    state.generated.extend(generated)
    return state


def test_a_request_ends_at_a_stop_token_a_stop_string_its_limit_or_an_error():
    assert state_of([5]).end(5) == (None, None)
    assert state_of([5, 7]).end(7) == ("stop", None)
    assert state_of([5] * 9).end(5) == ("length", None)
    assert state_of([5], lambda state: state.generated == [5]).end(5) == ("stop", None)
    assert state_of([5], lambda state: False).end(5) == (None, None)
    assert state_of([5] * 9, lambda state: True).end(5) == ("stop", None)
    assert state_of([5] * 9, lambda state: False).end(5) == ("length", None)


def test_a_stop_token_is_enough_the_text_is_not_looked_at():
    def fails(state):
        raise AssertionError

    assert state_of([7], fails).end(7) == ("stop", None)


def test_a_request_whose_text_or_logits_cannot_be_judged_ends_with_that_error():
    def fails(state):
        raise RequestError("no text")

    reason, error = state_of([5], fails).end(5)
    assert (reason, str(error), error.__traceback__) == ("error", "no text", None)
    reason, error = state_of([5, 5]).end(-1)
    assert reason == "error"
    assert isinstance(error, FloatingPointError)
    assert "after 4 tokens" in str(error)


def test_what_is_no_token_is_not_given_to_anybody():
    kv = KVCache(4, 4, 4, 4)
    scheduler = Scheduler(kv, 2, (8,))
    for number in range(2):
        scheduler.add(RunState(number, Request([1, 2, 3], 5, stop_token_ids=()), frozenset()))
    plan = scheduler.plan()
    first, second = (row.state for row in plan.rows)
    new, ended, wasted = scheduler.commit(plan, [NO_TOKEN, 7])
    assert (new, ended, wasted) == ([(second, 7)], [first], 0)
    assert (first.generated, first.finish_reason, second.generated) == ([], "error", [7])
    assert scheduler.running == [second]

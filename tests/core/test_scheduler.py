"""The scheduler against a device made of one function: the next token is a hash of all tokens before it.

So a lost, doubled or misplaced token changes everything after it. `depth` steps are in flight; a row's input is taken
from the host or from the outputs of the step that the plan names, exactly as the device does.
"""

from __future__ import annotations

import zlib
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbatch import Request
from asyncbatch.kv_cache import KVCache, blocks_for
from asyncbatch.scheduler import RunState, Scheduler, fit_budget, next_chunk

BLOCK = 4


def next_token(tokens) -> int:
    return zlib.crc32(bytes(tokens)) % 50


def alone(request: Request) -> list[int]:
    tokens = list(request.token_ids)
    while len(tokens) < len(request.token_ids) + request.max_new_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in request.stop_token_ids:
            break
    return tokens[len(request.token_ids) :]


class Device:
    """Keeps the contents of every block, as a device would, and so sees a write to somebody else's block."""

    def __init__(self, kv):
        self.kv, self.cache, self.outputs = kv, {}, {}

    def step(self, plan, tables, known) -> None:
        outputs = []
        for index, row in enumerate(plan.rows):
            table, tokens = tables[index], known[index]
            if row.carry is not None:
                step, source = row.carry
                tokens = [self.outputs[step][source]]
            for place, token in enumerate(tokens, row.position):
                self.cache[table[place // BLOCK], place % BLOCK] = token
            history = [self.cache[table[p // BLOCK], p % BLOCK] for p in range(row.position + row.num_tokens)]
            outputs.append(next_token(history))
        self.outputs[plan.step] = outputs


def check_work(plan, sizes) -> None:
    """Decode rows come first, of one token each, then chunks that fit into the step's size, each the next one of its
    prompt, cut as it would be if the request were alone."""
    decode, chunks = plan.rows[: plan.num_decode], plan.rows[plan.num_decode :]
    assert all(row.num_tokens == 1 and row.position >= row.state.num_prompt for row in decode)
    assert plan.passes == ("mixed" if decode and chunks else "decode" if decode else "prefill")
    assert plan.tokens in sizes if chunks else plan.tokens == 0
    assert sum(row.num_tokens for row in chunks) <= plan.tokens
    for row in chunks:
        assert (row.position, row.num_tokens, plan.tokens) in chunks_alone(row.state.num_prompt, sizes)


def chunks_alone(num_prompt: int, sizes) -> list[tuple[int, int, int]]:
    """(position, tokens, size) of each chunk of a prompt."""
    position, chunks = 0, []
    while position < num_prompt:
        chunks.append((position, *next_chunk(num_prompt - position, sizes)))
        position += chunks[-1][1]
    return chunks


def serve(requests, depth, *, batch, pool, prefill=(8,), budget=0, cancel=None, arrivals=None):
    kv = KVCache(pool, BLOCK, max_blocks_per_owner=40, max_owners=batch * (depth + 1))
    scheduler, device = Scheduler(kv, batch, prefill, budget), Device(kv)
    prefilled = 0  # prompt tokens, padding included, since somebody who can decode did
    states = [RunState(i, request, frozenset(request.stop_token_ids)) for i, request in enumerate(requests)]
    arrivals = arrivals or [0] * len(states)
    in_flight, wasted, turn = deque(), 0, 0
    while not all(state.finish_reason for state in states):
        for state, when in zip(states, arrivals, strict=True):
            if when == turn:
                scheduler.add(state)
        for index, when in (cancel or {}).items():
            if when == turn and arrivals[index] <= turn:
                scheduler.finish(states[index], "cancelled")
        able = [(s, s.num_preemptions) for s in scheduler.running if s.num_prompt <= s.placed < s.max_tokens - 1]
        plan = scheduler.plan()
        if plan is not None:
            assert 0 < len(plan.rows) <= batch
            assert len({row.state.number for row in plan.rows}) == len(plan.rows)
            check_work(plan, prefill)
            prefilled += plan.tokens
            decoding = [s for s, before in able if s.num_preemptions == before]  # they were not preempted just now
            assert prefilled <= max(budget, *prefill) or not decoding, "those who decode waited longer than promised"
            prefilled = prefilled if decoding and not plan.num_decode else 0
            known = [row.state.known_tokens(row.position, row.num_tokens) for row in plan.rows]
            device.step(plan, [kv.table(row.state.number) for row in plan.rows], known)
            in_flight.append(plan)
        if in_flight and (len(in_flight) == depth or plan is None):
            done = in_flight.popleft()
            for row, token in zip(done.rows, device.outputs[done.step], strict=True):
                if row.samples and not row.state.finish_reason:
                    assert token == next_token(row.state.prompt + row.state.generated) or row.state.num_preemptions
            wasted += scheduler.commit(done, device.outputs[done.step]).wasted
        elif plan is None and turn > max(arrivals):
            assert all(state.finish_reason for state in states), "a deadlock"
        turn += 1
        assert turn < 5000
    while in_flight:
        done = in_flight.popleft()
        wasted += scheduler.commit(done, device.outputs[done.step]).wasted
    assert kv.num_free == pool
    assert scheduler.plan() is None
    return states, wasted


requests = st.lists(
    st.builds(
        Request,
        st.lists(st.integers(0, 49), min_size=1, max_size=25),
        max_new_tokens=st.integers(1, 20),
        stop_token_ids=st.sets(st.integers(0, 49), max_size=4),
    ),
    min_size=1,
    max_size=8,
)


prefill_sizes = st.sets(st.integers(1, 20), min_size=1, max_size=4).map(sorted)


@given(st.integers(1, 200), prefill_sizes)
def test_chunks_cover_a_prompt_and_cost_less_than_a_third_more(num_prompt, sizes):
    chunks = chunks_alone(num_prompt, sizes)
    assert sum(tokens for _, tokens, _ in chunks) == num_prompt
    assert all(0 < tokens <= size and size in sizes for _, tokens, size in chunks)
    # A step is filled, or to three quarters, or it is the smallest one for what is left.
    assert all(tokens == size or 4 * tokens >= 3 * size or size == sizes[0] for _, tokens, size in chunks)
    # As few steps as possible of the largest size.
    assert [size for _, _, size in chunks[: num_prompt // sizes[-1]]] == [sizes[-1]] * (num_prompt // sizes[-1])


@settings(max_examples=300, deadline=None)
@given(requests, st.integers(1, 4), st.integers(1, 5), st.integers(0, 12), prefill_sizes, st.data())
def test_every_request_gets_the_tokens_that_it_gets_alone(requests, depth, batch, spare, prefill, data):
    """Any order of arrival, batch size, chunks, number of steps in flight, and a pool down to the smallest allowed."""
    budget = data.draw(st.integers(0, 30))
    pool = max(blocks_for(len(r.token_ids) + r.max_new_tokens, BLOCK) for r in requests) + spare
    arrivals = data.draw(st.lists(st.integers(0, 15), min_size=len(requests), max_size=len(requests)))
    states, wasted = serve(requests, depth, batch=batch, pool=pool, prefill=prefill, budget=budget, arrivals=arrivals)
    assert [state.generated for state in states] == [alone(request) for request in requests]
    early = sum(state.finish_reason == "stop" for state in states)
    assert wasted <= early * (depth - 1)  # a length limit is known ahead and wastes nothing


@settings(max_examples=150, deadline=None)
@given(requests, st.integers(1, 3), st.integers(1, 5), st.integers(0, 6), st.data())
def test_cancelling_at_any_moment_harms_nobody_else(requests, depth, batch, spare, data):
    pool = max(blocks_for(len(r.token_ids) + r.max_new_tokens, BLOCK) for r in requests) + spare
    cancel = data.draw(st.dictionaries(st.integers(0, len(requests) - 1), st.integers(0, 30), max_size=4))
    sizes, budget = data.draw(prefill_sizes), data.draw(st.integers(0, 40))
    states, _ = serve(requests, depth, batch=batch, pool=pool, prefill=sizes, budget=budget, cancel=cancel)
    for state, request in zip(states, requests, strict=True):
        expected = alone(request)
        assert state.generated == expected[: len(state.generated)]
        assert state.finish_reason == "cancelled" or state.generated == expected
        assert state.finish_reason != "cancelled" or state.number in cancel


def test_a_full_pool_preempts_the_newest_request_and_computes_it_again():
    two = [Request([1] * 8, 12, stop_token_ids=()), Request([2] * 8, 12, stop_token_ids=())]
    states, wasted = serve(two, 2, batch=2, pool=7, prefill=(16,))
    assert [state.num_preemptions for state in states] == [0, 1]
    assert wasted == 0


def test_finishing_twice_gives_blocks_back_once():
    kv = KVCache(4, BLOCK, 4, 4)
    scheduler = Scheduler(kv, 2, (8,))
    state = RunState(0, Request([1, 2, 3], 5, stop_token_ids=()), frozenset())
    scheduler.add(state)
    scheduler.plan()
    assert scheduler.finish(state, "cancelled")
    assert not scheduler.finish(state, "stop")
    assert kv.num_free == 4
    assert state.finish_reason == "cancelled"


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(0, 6), st.integers(0, 30))
def test_fit_budget_takes_the_longest_prefix_that_fits(sizes, free_rows, budget):
    n = fit_budget(sizes, free_rows, budget)
    assert n <= free_rows
    assert sum(sizes[:n]) <= budget
    assert n == len(sizes) or n == free_rows or sum(sizes[: n + 1]) > budget


@pytest.mark.parametrize(("prompt", "chunks"), [(8, [8]), (9, [8, 1]), (20, [8, 8, 4])])
def test_a_prompt_is_cut_at_the_same_places_whoever_else_is_there(prompt, chunks):
    for others in (0, 3):
        kv = KVCache(100, BLOCK, 40, 12)
        scheduler = Scheduler(kv, 4, (8,))
        for number in range(others):
            scheduler.add(RunState(number, Request([1] * 3, 9, stop_token_ids=()), frozenset()))
        scheduler.add(RunState(9, Request([2] * prompt, 2, stop_token_ids=()), frozenset()))
        seen = []
        for _ in range(10):
            plan = scheduler.plan()
            if plan is None:
                break
            seen += [row.num_tokens for row in plan.rows if row.state.number == 9 and row.position < prompt]
            scheduler.commit(plan, [0] * len(plan.rows))
        assert seen == chunks

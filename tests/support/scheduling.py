"""A scheduler served turn by turn, without any device: what it planned and committed is written down for a test."""

from __future__ import annotations

import zlib
from collections import deque
from typing import NamedTuple

from hypothesis import strategies as st

from asyncbatch import Request
from asyncbatch.kv_cache import KVCache, blocks_for
from asyncbatch.scheduler import BatchPlan, Committed, Row, RunState, Scheduler

BLOCK = 4


def endless_tokens(request: Request, count: int) -> list[int]:
    """The first `count` tokens that a request would get if nothing ended it: each is a checksum of all before it."""
    tokens = list(request.token_ids)
    for _ in range(count):
        tokens.append(zlib.crc32(bytes(tokens)) % 50)
    return tokens[len(request.token_ids) :]


class Books(NamedTuple):
    """What the scheduler held at one moment, by request number: who runs and who waits, in its own order, the blocks of
    each, the tokens that the host knew of each, and how many blocks were free."""

    running: list[int]
    waiting: list[int]
    blocks: dict[int, list[int]]
    known: dict[int, int]
    free: int


class Turn(NamedTuple):
    """One turn of a loop: the books before and after its plan, the plan (None if there was nothing), the cancelled
    before it, and after it what was committed: the plan of that step and its result."""

    before: Books
    plan: BatchPlan | None
    after: Books
    cancelled: list[int]
    committed: tuple[BatchPlan, Committed] | None


class Served(NamedTuple):
    states: list[RunState]
    turns: list[Turn]
    pool: int
    batch: int
    prefill: int

    @property
    def rows(self) -> list[tuple[int, int, Row]]:
        """(step, place in it, row) of all rows, in the order of their launch."""
        plans = [turn.plan for turn in self.turns if turn.plan]
        return [(plan.step, index, row) for plan in plans for index, row in enumerate(plan.rows)]


def books(scheduler: Scheduler, states: list[RunState]) -> Books:
    kv = scheduler.kv
    return Books(
        [state.number for state in scheduler.running],
        [state.number for state in scheduler.waiting],
        {state.number: kv.table(state.number) for state in states},
        {state.number: state.num_known for state in states},
        kv.num_free,
    )


def serve(
    requests, depth: int, *, batch=4, pool=None, prefill=8, budget=0, arrivals=None, cancel=None, watch=None
) -> Served:
    """Serve the requests with `depth` steps in flight (1 is the synchronous loop). prefill: the size of a step's
    prefill, or several; budget: as the scheduler's. arrivals: the turn in which each one comes, all at once unless
    told. cancel: request number -> turn. watch: called with each plan and the blocks' books when the plan has been
    made."""
    enough = sum(blocks_for(len(r.token_ids) + r.max_new_tokens, BLOCK) for r in requests)
    kv = KVCache(enough if pool is None else pool, BLOCK, 40, batch * (depth + 1))
    scheduler = Scheduler(kv, batch, [prefill] if isinstance(prefill, int) else prefill, budget)
    states = [RunState(i, request, frozenset(request.stop_token_ids or ())) for i, request in enumerate(requests)]
    tokens = [endless_tokens(request, request.max_new_tokens) for request in requests]
    arrivals, turns, in_flight = arrivals or [0] * len(states), [], deque()
    while in_flight or not all(state.finish_reason for state in states):
        now, cancelled = len(turns), []
        for state in states:
            if arrivals[state.number] == now:
                scheduler.add(state)
            if (cancel or {}).get(state.number) == now >= arrivals[state.number] and scheduler.finish(
                state, "cancelled"
            ):
                cancelled.append(state.number)
        before = books(scheduler, states)
        plan = scheduler.plan()
        after, committed = books(scheduler, states), None
        if plan is not None:
            in_flight.append(plan)
            if watch is not None:
                watch(plan, kv)
        if in_flight and (len(in_flight) == depth or plan is None):
            done = in_flight.popleft()
            committed = done, scheduler.commit(done, [token_of(row, tokens) for row in done.rows])
        turns.append(Turn(before, plan, after, cancelled, committed))
        assert now < 2000, "a deadlock"
    return Served(states, turns, kv.num_blocks, batch, prefill)


def token_of(row: Row, tokens: list[list[int]]) -> int:
    """What the device samples for a row: a chunk in the middle of a prompt gives some number that is no token."""
    place = row.position + row.num_tokens - row.state.num_prompt
    return tokens[row.state.number][place] if place >= 0 else 12345


def requests_of(stops=True):
    return st.lists(
        st.builds(
            Request,
            st.lists(st.integers(0, 49), min_size=1, max_size=20),
            max_new_tokens=st.integers(1, 16),
            stop_token_ids=st.sets(st.integers(0, 49), max_size=6) if stops else st.just(()),
        ),
        min_size=1,
        max_size=8,
    )


@st.composite
def served(draw, stops=True, cancels=False) -> Served:
    """Any requests served in any loop, in a pool down to the smallest one allowed."""
    requests = draw(requests_of(stops))
    least = max(blocks_for(len(r.token_ids) + r.max_new_tokens, BLOCK) for r in requests)
    size = len(requests)
    options = {"batch": draw(st.integers(1, 5)), "prefill": draw(st.integers(1, 12))}
    options["pool"] = least + draw(st.integers(0, 12))
    options["arrivals"] = draw(st.lists(st.sampled_from([0, 0, 1, 3, 9]), min_size=size, max_size=size))
    if cancels:
        options["cancel"] = draw(st.dictionaries(st.integers(0, size - 1), st.integers(0, 30), max_size=4))
    return serve(requests, draw(st.integers(1, 4)), **options)

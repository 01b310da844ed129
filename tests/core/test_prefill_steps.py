"""Which chunks of prompts are in which step: the scheduler beside a replay that was written from its rules alone."""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from support.scheduling import BLOCK, serve

from asyncbatch import Request
from asyncbatch.kv_cache import blocks_for
from asyncbatch.scheduler import Scheduler

SIZES = st.sets(st.integers(1, 16), min_size=1, max_size=4).map(sorted)
LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=9)


def chunk(left: int, sizes: list[int]) -> tuple[int, int]:
    """(tokens, size): a prompt of which so many tokens are left fills the smallest step that holds them, if at least
    three quarters of it; else the largest step that it can fill whole; and if there is none, that smallest one."""
    holds = [size for size in sizes if size >= left] or sizes[-1:]
    if left / holds[0] >= 0.75:
        return min(left, holds[0]), holds[0]
    filled = [size for size in sizes if size <= left] or holds[:1]
    return min(left, filled[-1]), filled[-1]


class Replay:
    """The steps of requests that end at their limits only, with blocks for all. `plan` gives (decoding, chunks, size):
    the numbers of those that decode; (number, position, tokens) of each chunk; and the size of the step's prefill."""

    def __init__(self, lengths, batch: int, sizes: list[int], budget: int):
        self.batch, self.sizes, self.budget = batch, sizes, max(budget, sizes[-1])
        self.prompt = [prompt for prompt, _ in lengths]
        self.last = [prompt + new - 1 for prompt, new in lengths]  # so many tokens of each get a place
        self.placed = [0] * len(lengths)
        self.begun: list[int] = []
        self.waiting: list[int] = []
        self.left = self.budget  # prompt tokens until the next decode rows

    def plan(self):
        working = [n for n in self.begun if self.placed[n] < self.last[n]]
        decoding = [n for n in working if self.placed[n] >= self.prompt[n]]
        in_prefill = [n for n in working if self.placed[n] < self.prompt[n]]
        coming = in_prefill + self.waiting[: self.batch - len(working)]
        cut = {n: chunk(self.prompt[n] - self.placed[n], self.sizes) for n in coming}
        first = self.together(coming, cut, self.batch)
        if 0 < first < len(coming) and cut[coming[0]][1] + cut[coming[first]][1] <= self.left:
            size = cut[coming[0]][1]  # two steps fit before somebody must decode: the first one has chunks only
            self.left -= size
            return [], self.begin(coming[:first], cut), size
        if not decoding:
            self.left = self.budget
        count = self.together(coming, cut, self.batch - len(decoding))
        self.left = self.budget
        for n in decoding:
            self.placed[n] += 1
        return decoding, self.begin(coming[:count], cut), cut[coming[0]][1] if count else 0

    def together(self, coming, cut, rows: int) -> int:
        """How many of them share a step: those of one size that follow each other, as long as they fit."""
        count, tokens = 0, 0
        for n in coming:
            size = cut[coming[0]][1]
            tokens += cut[n][0]
            if cut[n][1] != size or tokens > size or size > self.left or count == rows:
                break
            count += 1
        return count

    def begin(self, numbers, cut):
        rows = [(n, self.placed[n], cut[n][0]) for n in numbers]
        for n in numbers:
            self.placed[n] += cut[n][0]
            if n in self.waiting:
                self.waiting.remove(n)
                self.begun.append(n)
        return rows


@settings(max_examples=400, deadline=None)
@given(LENGTHS, st.integers(1, 3), st.integers(1, 5), SIZES, st.integers(0, 60), st.data())
def test_each_step_has_the_rows_that_the_rules_say(lengths, depth, batch, sizes, budget, data):
    arrivals = data.draw(st.lists(st.sampled_from([0, 0, 2, 5]), min_size=len(lengths), max_size=len(lengths)))
    requests = [Request([1] * prompt, new, stop_token_ids=()) for prompt, new in lengths]
    run = serve(requests, depth, batch=batch, prefill=sizes, budget=budget, arrivals=arrivals)
    replay = Replay(lengths, batch, sizes, budget)
    for now, turn in enumerate(run.turns):
        replay.waiting += [n for n, arrived in enumerate(arrivals) if arrived == now]
        decoding, chunks, size = replay.plan()
        if turn.plan is None:
            assert not decoding
            assert not chunks
            continue
        count, rows = turn.plan.num_decode, turn.plan.rows
        assert [row.state.number for row in rows[:count]] == decoding
        assert [(row.state.number, row.position, row.num_tokens) for row in rows[count:]] == chunks
        assert turn.plan.tokens == size


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 3), st.integers(1, 5), SIZES, st.integers(0, 60))
def test_between_two_decode_rows_of_a_request_come_no_more_prompt_tokens_than_the_budget(
    lengths, depth, batch, sizes, budget
):
    requests = [Request([1] * prompt, new, stop_token_ids=()) for prompt, new in lengths]
    run = serve(requests, depth, batch=batch, prefill=sizes, budget=budget)
    plans = [turn.plan for turn in run.turns if turn.plan]
    for number, state in enumerate(run.states):
        # Its last chunk gives the first of its tokens, each decode row another one.
        steps = [step for step, _, row in run.rows if row.state.number == number and row.samples]
        for before, after in pairwise(steps):
            between = [plan.tokens for plan in plans[before + 1 : after]]
            assert sum(between) <= max(budget, sizes[-1]), state


@settings(max_examples=300, deadline=None)
@given(LENGTHS, st.integers(1, 3), st.integers(2, 5), st.integers(0, 9), st.integers(1, 6))
def test_after_a_step_that_decodes_the_budget_is_whole_also_where_the_pool_had_no_room(
    lengths, depth, batch, spare, size
):
    requests = [Request([1] * prompt, new, stop_token_ids=()) for prompt, new in lengths]
    pool = max(blocks_for(prompt + new, BLOCK) for prompt, new in lengths) + spare
    plan, left = Scheduler.plan, []

    def noted(scheduler):
        made = plan(scheduler)
        left.append((made, scheduler.prefill_left))
        return made

    with mock.patch.object(Scheduler, "plan", noted):
        serve(requests, depth, batch=batch, pool=pool, prefill=size, budget=6 * size)
    assert {tokens for made, tokens in left if made and made.num_decode} <= {6 * size}


def test_who_does_not_fit_into_the_pool_is_not_overtaken_by_a_smaller_one():
    """Eight blocks: the first takes two and may grow, the second needs six, and the third would fit."""
    requests = [Request([1] * prompt, 8, stop_token_ids=()) for prompt in (8, 24, 2)]
    run = serve(requests, 1, batch=3, pool=8, prefill=40)
    assert run.turns[0].after.running == [0]
    assert run.turns[0].after.waiting == [1, 2]


def test_what_only_waits_for_its_last_result_gives_its_blocks_and_stands_before_the_others():
    """Three blocks. The second is launched to its end in the first step; when the first one needs a third block, that
    step is still under way."""
    requests = [Request([1] * 4, 8, stop_token_ids=()), Request([2] * 4, 1, stop_token_ids=())]
    run = serve(requests, 8, batch=2, pool=3, prefill=8)
    (moved,) = [turn for turn in run.turns if turn.after.running[:2] == [1, 0] and turn.before.running[:2] == [0, 1]]
    assert moved.after.blocks[1] == []
    assert [state.num_preemptions for state in run.states] == [0, 0]
    assert len([row for _, _, row in run.rows if row.state.number == 1]) == 1

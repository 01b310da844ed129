"""Who comes first: requests join, wait, are preempted and end in the order in which they came, and nobody overtakes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from support.scheduling import BLOCK, serve, served

from asyncbatch import Request, SamplingParams
from asyncbatch.kv_cache import blocks_for

MANY = settings(max_examples=100, deadline=None)


def arrival_order(run):
    """Request number -> its place in the line: those who wait or run at the first turn come in the order of numbers."""
    seen = []
    for turn in run.turns:
        seen += sorted({*turn.before.running, *turn.before.waiting} - {*seen})
    return {number: place for place, number in enumerate(seen)}


def limit(state):
    """How many tokens of a request have a place in the cache when its last one is sampled."""
    return state.num_prompt + state.request.max_new_tokens - 1


def launched_before_each_turn(run):
    """For each turn, request number -> how many of its tokens were placed since it was last admitted, before its
    plan."""
    placed, found = {}, []
    for turn in run.turns:
        found.append({number: placed.get(number, 0) for number in turn.before.running})
        for row in turn.plan.rows if turn.plan else ():
            placed[row.state.number] = row.position + row.num_tokens
        for number in turn.after.waiting:
            placed[number] = 0
    return found


@MANY
@given(served(cancels=True))
def test_whoever_waits_came_later_than_all_who_run_but_those_with_nothing_left_to_launch(run):
    """So a preempted request keeps its place at the front of the line, and a newcomer overtakes nobody."""
    order = arrival_order(run)
    for turn, placed in zip(run.turns, launched_before_each_turn(run), strict=True):
        waiting = [order[number] for number in turn.after.waiting]
        assert waiting == sorted(waiting)
        running = [n for n in turn.after.running if placed.get(n, 0) < limit(run.states[n])]
        assert [order[n] for n in running] == sorted(order[n] for n in running)
        assert all(order[number] < waiting[0] for number in running if waiting)


@MANY
@given(st.integers(2, 7), st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), st.data())
def test_requests_of_equal_length_end_in_the_order_in_which_they_came(count, prompt, new, depth, batch, data):
    pool = blocks_for(prompt + new, BLOCK) + data.draw(st.integers(0, 5))
    arrivals = sorted(data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)))
    requests = [Request([n] * prompt, new, stop_token_ids=()) for n in range(count)]
    run = serve(requests, depth, batch=batch, pool=pool, prefill=6, arrivals=arrivals)
    ended = [state.number for turn in run.turns if turn.committed for state in turn.committed[1].ended]
    assert ended == list(range(count))
    first_tokens = [state.number for turn in run.turns if turn.committed for state, _ in turn.committed[1].new]
    assert list(dict.fromkeys(first_tokens)) == list(range(count))


@MANY
@given(served(cancels=True))
def test_what_is_launched_to_its_limit_only_waits_and_is_not_computed_again(run):
    done = set()
    for _, _, row in run.rows:
        number = row.state.number
        assert number not in done, "nothing was left to launch"
        if row.position + row.num_tokens >= limit(row.state):
            done.add(number)


@MANY
@given(served(cancels=True))
def test_a_request_is_computed_from_its_beginning_once_and_again_after_each_preemption(run):
    """Unless it ends while it waits: cancelled, or by a token that was still under way when it was preempted."""
    begun = [row.state.number for _, _, row in run.rows if row.position == 0]
    waits = dict.fromkeys(range(len(run.states)), True)
    for turn in run.turns:
        waits |= dict.fromkeys(turn.after.waiting, True) | dict.fromkeys(turn.after.running, False)
    for state in run.states:
        assert begun.count(state.number) == state.num_preemptions + (not waits[state.number])
    reached = {}
    for _, _, row in run.rows:  # its pieces follow each other
        assert row.position in (0, reached.get(row.state.number))
        reached[row.state.number] = row.position + row.num_tokens


@MANY
@given(served(cancels=True))
def test_blocks_are_as_many_as_the_running_ones_need_and_each_has_one_owner(run):
    """A request is admitted with blocks for all tokens that it has, and gets another when one is full."""
    admitted = {}
    for turn, placed in zip(run.turns, launched_before_each_turn(run), strict=True):
        held = [block for blocks in turn.after.blocks.values() for block in blocks]
        assert len(held) == len(set(held)) == run.pool - turn.after.free
        rows = {row.state.number: row for row in (turn.plan.rows if turn.plan else ())}
        for number, blocks in turn.after.blocks.items():
            end = placed.get(number, 0)
            if number in rows:
                end = rows[number].position + rows[number].num_tokens
                if rows[number].position == 0:
                    admitted[number] = turn.after.known[number]
            if number not in turn.after.running:
                assert not blocks, "who waits or has ended holds nothing"
            elif blocks or placed[number] < limit(run.states[number]):
                assert len(blocks) == blocks_for(max(admitted[number], end), BLOCK)
    assert all(not blocks for blocks in run.turns[-1].after.blocks.values()) or run.turns[-1].committed


@MANY
@given(served())
def test_with_room_for_all_nobody_is_preempted_and_without_it_the_newest_is(run):
    order = arrival_order(run)
    preempted = 0
    for turn in run.turns:
        gone = {*turn.before.running} - {*turn.after.running}
        assert gone <= {*turn.after.waiting}
        preempted += len(gone)
        stays = [order[n] for n in turn.after.running if n in turn.before.running]
        if gone and turn.plan:
            decoding = [order[row.state.number] for row in turn.plan.rows[: turn.plan.num_decode]]
            assert max(decoding, default=-1) < min(order[number] for number in gone)
            assert stays
    # Somebody who was preempted may have been admitted again in the same turn.
    assert preempted <= sum(state.num_preemptions for state in run.states)
    needs = sum(blocks_for(limit(state), BLOCK) for state in run.states)
    if needs + len(run.states) <= run.pool:
        assert not any(state.num_preemptions for state in run.states)


def may_grow(run, number, placed, blocks):
    state = run.states[number]
    return placed.get(number, 0) < limit(state) and len(blocks) * BLOCK < limit(state)


@MANY
@given(served())
def test_a_newcomer_leaves_a_block_for_everybody_who_may_still_grow(run):
    for turn, placed in zip(run.turns, launched_before_each_turn(run), strict=True):
        new = [n for n in turn.after.running if n not in turn.before.running]
        if new:
            others = turn.after.running[: turn.after.running.index(new[-1])]
            growing = [n for n in others if may_grow(run, n, placed, turn.after.blocks[n])]
            assert turn.after.free >= len(growing)


@MANY
@given(served())
def test_the_first_in_line_waits_only_for_a_row_for_tokens_of_the_step_or_for_blocks(run):
    """And whoever runs has a row in each step, unless the next piece of its prompt does not fit beside the others."""
    for turn, placed in zip(run.turns, launched_before_each_turn(run), strict=True):
        rows = turn.plan.rows if turn.plan else []
        taken = sum(row.num_tokens for row in rows[turn.plan.num_decode :]) if turn.plan else 0
        budget = run.prefill
        launching = [n for n in turn.after.running if placed.get(n, 0) < limit(run.states[n])]
        in_rows = {row.state.number for row in rows}
        unserved = [n for n in launching if n not in in_rows]
        for number in unserved:
            assert placed.get(number, 0) < run.states[number].num_prompt, "a decode row is in every step"
            assert len(rows) == run.batch or taken + piece(run, number, placed) > budget
        if turn.after.waiting and not unserved:
            first = turn.after.waiting[0]
            state = run.states[first]
            growing = [n for n in turn.after.running if may_grow(run, n, placed, turn.after.blocks[n])]
            short = blocks_for(turn.after.known[first], BLOCK) > turn.after.free - len(growing)
            full = len(rows) == run.batch or len(launching) >= run.batch
            assert short or full or taken + min(budget, state.num_prompt) > budget


def piece(run, number, placed):
    return min(run.prefill, run.states[number].num_prompt - placed.get(number, 0))


@MANY
@given(served(cancels=True))
def test_a_row_takes_from_the_device_the_token_that_the_host_does_not_know_and_no_other(run):
    newest = {}
    for turn in run.turns:
        if turn.plan is None:
            continue
        rows, decoding = turn.plan.rows, turn.plan.num_decode
        assert len({row.state.number for row in rows}) == len(rows) <= run.batch
        for index, row in enumerate(rows):
            number, prompt = row.state.number, row.state.num_prompt
            assert (row.position >= prompt) == (index < decoding)
            known = row.position < turn.before.known[number]
            assert row.carry == (None if known else newest[number])
            assert row.samples == (row.position + row.num_tokens >= prompt)
            assert row.num_tokens == 1 if index < decoding else row.position + row.num_tokens <= prompt
        newest |= {row.state.number: (turn.plan.step, index) for index, row in enumerate(rows)}
    steps = [turn.plan.step for turn in run.turns if turn.plan]
    assert steps == list(range(len(steps)))


@MANY
@given(served(cancels=True))
def test_a_plan_says_what_its_rows_are(run):
    for plan in [turn.plan for turn in run.turns if turn.plan]:
        kinds = {"decode" if row.position >= row.state.num_prompt else "prefill" for row in plan.rows}
        assert plan.passes == ("mixed" if len(kinds) == 2 else kinds.pop())
        assert plan.work == ("decode" if plan.passes == "decode" else "prefill")
        assert plan.context == sum(row.position + row.num_tokens for row in plan.rows)
        assert plan.tokens == (0 if plan.passes == "decode" else run.prefill)
        assert plan.kind(9) == (plan.passes, False, 9, plan.tokens)


def test_a_plan_samples_if_any_of_its_rows_does():
    for warm in range(3):
        requests = [
            Request([1], 2, SamplingParams(temperature=0.5 if n == warm else 0.0), stop_token_ids=()) for n in range(3)
        ]
        plan = serve(requests, 1).turns[0].plan
        assert plan.kind(4).sampled

"""What a slot holds after `fill`: the plan, row by row, and nothing of any step before it."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scheduling import BLOCK, serve

from asyncbatch import Request, SamplingParams
from asyncbatch.devices.buffers import host_buffers
from asyncbatch.kv_cache import blocks_for
from asyncbatch.sampling import uniforms
from asyncbatch.slot import Slot, StepShape


class NoDevice:
    """Its events are their own names."""

    def event(self, name, slot):
        return name, slot


def fresh(index, shape):
    return Slot(index, shape, host_buffers(shape, on_cuda=False)[index], NoDevice())


REQUESTS = st.lists(
    st.builds(
        Request,
        st.lists(st.integers(0, 49), min_size=1, max_size=14),
        max_new_tokens=st.integers(1, 9),
        sampling=st.one_of(
            st.just(SamplingParams()),
            st.builds(
                SamplingParams,
                temperature=st.sampled_from([0.5, 2.0]),
                top_k=st.integers(0, 5),
                top_p=st.sampled_from([0.25, 1.0]),
                seed=st.integers(0, 2**63 - 1),
            ),
        ),
        stop_token_ids=st.just(()),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=60, deadline=None)
@given(REQUESTS, st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(0, 5), st.data())
def test_a_slot_holds_its_plan_row_by_row_and_nothing_else(requests, depth, batch, prefill, spare, data):
    smaller = tuple(sorted(data.draw(st.sets(st.integers(1, batch)))))
    pool = max(blocks_for(len(r.token_ids) + r.max_new_tokens, BLOCK) for r in requests) + spare
    shape = StepShape(batch, depth, BLOCK, pool, 4 * 40, (prefill,), smaller)
    slots = [fresh(index, shape) for index in range(depth)]

    def watch(plan, kv):
        slot = slots[plan.step % depth]
        slot.plan = None  # its last step has been committed
        slot.fill(plan, kv)
        unused = fresh(slot.index, shape)
        unused.fill(plan, kv)
        assert slot.inputs.tolist() == unused.inputs.tolist(), "something of an earlier step is left"
        assert (slot.plan, slot.step) == (plan, plan.step)
        assert slot.command == plan.kind(min(s for s in (*smaller, batch) if s >= len(plan.rows)))
        told = {name: part.tolist() for name, part in slot.fields.items()}
        assert told == in_plain_python(plan, kv, shape)

    serve(requests, depth, batch=batch, pool=pool, prefill=prefill, watch=watch)


def in_plain_python(plan, kv, shape):
    """All fields of a step, from what `StepShape.fields` says of them."""
    batch = shape.max_batch_size
    empty = dict.fromkeys(("input_id", "position", "decodes", "prefill_start", "prefill_count", "top_k"), 0)
    empty |= dict.fromkeys(("temperature", "top_p", "uniform"), 0.0)
    rows, prefill = [], []
    sampled = any(row.state.request.sampling.temperature > 0 for row in plan.rows)
    for index, row in enumerate(plan.rows):
        request, end = row.state.request, row.position + row.num_tokens
        known = [*request.token_ids, *row.state.generated]
        of = {**empty, "carry": -1, "position": row.position}
        if row.carry is not None:
            step, source = row.carry
            of["carry"] = step % shape.num_slots * batch + source
        if index < plan.num_decode:
            of |= {"decodes": 1, "input_id": known[row.position] if row.carry is None else 0}
        else:
            of |= {"prefill_start": len(prefill), "prefill_count": row.num_tokens}
            prefill += [(known[place], place, index) for place in range(row.position, end)]
        if sampled:
            params = request.sampling
            number = uniforms(np.array([params.seed], np.uint64), np.array([end]))[0]
            of |= {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}
            of["uniform"] = float(number)
        table = kv.table(row.state.number)
        rows.append({**of, "tables": table + [0] * (shape.max_blocks - len(table))})
    rows += [{**empty, "carry": -1, "tables": [0] * shape.max_blocks}] * (batch - len(rows))
    expected = {name: [row[name] for row in rows] for name in rows[0]}
    prefill += [(0, 0, 0)] * (shape.prefill_tokens - len(prefill))
    columns = zip(*prefill, strict=True)
    return expected | dict(zip(("prefill_id", "prefill_position", "prefill_row"), map(list, columns), strict=True))


def test_a_slot_begins_empty_with_three_events_of_its_own():
    shape = StepShape(2, 2, 4, 9, 16, (8,))
    slot = fresh(1, shape)
    events = slot.inputs_ready, slot.step_done, slot.outputs_ready
    assert events == (("inputs_ready", 1), ("step_done", 1), ("outputs_ready", 1))
    assert (slot.index, slot.plan, slot.command) == (1, None, None)
    assert slot.step < 0, "no step has this number"
    assert slot.output_ids.tolist() == [0, 0]


def test_a_slot_writes_into_the_buffers_that_it_was_given():
    shape = StepShape(2, 1, 4, 9, 16, (8,))
    inputs, outputs = host_buffers(shape, on_cuda=False)[0]
    slot = Slot(0, shape, (inputs, outputs), NoDevice())
    slot.fields["tables"][1, 3] = 77
    slot.output_ids[1] = 5
    assert inputs.tolist()[-1] == 77
    assert outputs.tolist() == [0, 5]


def test_kinds_come_with_the_largest_size_first_and_each_pass_greedy_and_sampled():
    kinds = StepShape(8, 1, 4, 9, 16, (8, 32), (2, 4)).kinds
    assert [kind.rows for kind in kinds] == [8] * 10 + [4] * 10 + [2] * 10
    works = [("mixed", 32), ("prefill", 32), ("mixed", 8), ("prefill", 8), ("decode", 0)]
    for start in (0, 10, 20):
        assert [(kind.passes, kind.tokens, kind.sampled) for kind in kinds[start : start + 10]] == [
            (*work, sampled) for work in works for sampled in (False, True)
        ]

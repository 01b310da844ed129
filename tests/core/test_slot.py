"""A slot's buffer: every field has its own place on both sides, and a plan is written where the device looks for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncbatch import Request, SamplingParams
from asyncbatch.devices.buffers import host_buffers
from asyncbatch.kv_cache import KVCache
from asyncbatch.sampling import uniforms
from asyncbatch.scheduler import RunState, Scheduler, StepKind
from asyncbatch.slot import FLOAT_FIELDS, PREFILL_FIELDS, Slot, StepShape

SHAPE = StepShape(max_batch_size=4, num_slots=2, block_size=4, num_blocks=20, max_length=32, prefill_sizes=(8,))


class NoDevice:
    def event(self, name, slot):
        return None


@given(st.lists(st.integers(1, 9), min_size=5, max_size=5), st.sets(st.integers(1, 9), min_size=1).map(sorted))
def test_fields_do_not_overlap_and_are_the_same_for_host_and_device(sizes, prefill):
    shape = StepShape(*sizes, tuple(prefill))
    buffer = np.zeros(shape.num_inputs, np.int32)
    device = torch.from_numpy(buffer)
    total = 0
    for number, (name, part) in enumerate(shape.fields(buffer).items(), 1):
        assert not part.any(), f"{name} lies over another field"
        part[...] = number
        other = shape.fields(device)[name]
        assert other.shape == part.shape
        assert other.numpy().dtype == part.dtype == (np.float32 if name in FLOAT_FIELDS else np.int32)
        assert (other == number).all()
        total += part.size
    assert total == shape.num_inputs


@pytest.fixture
def parts():
    kv = KVCache(SHAPE.num_blocks, SHAPE.block_size, SHAPE.max_blocks, 12)
    scheduler = Scheduler(kv, SHAPE.max_batch_size, SHAPE.prefill_sizes)
    slots = [Slot(index, SHAPE, pair, NoDevice()) for index, pair in enumerate(host_buffers(SHAPE, on_cuda=False))]
    return kv, scheduler, slots


def test_a_plan_is_written_where_the_device_looks_for_it(parts):
    kv, scheduler, slots = parts
    sampling = SamplingParams(temperature=0.5, top_k=3, top_p=0.8, seed=11)
    states = [
        RunState(0, Request([7, 8, 9], 5, stop_token_ids=()), frozenset()),
        RunState(1, Request([1, 2, 3, 4, 5], 5, sampling, stop_token_ids=()), frozenset()),
        RunState(2, Request([6] * 10, 5, stop_token_ids=()), frozenset()),
    ]
    for state in states:
        scheduler.add(state)

    slots[0].fill(scheduler.plan(), kv)  # the two short prompts, 3 + 5 tokens
    fields = slots[0].fields
    assert slots[0].command == StepKind("prefill", True, 4, 8)
    assert fields["prefill_id"].tolist() == [7, 8, 9, 1, 2, 3, 4, 5]
    assert fields["prefill_position"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert fields["prefill_row"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert fields["prefill_start"].tolist() == [0, 3, 0, 0]
    assert fields["prefill_count"].tolist() == [3, 5, 0, 0]
    assert fields["decodes"].tolist() == [0, 0, 0, 0]
    # The sampled token of row 1 will be token number 5 of its request.
    assert fields["uniform"][1] == uniforms(np.array([11], np.uint64), np.array([5]))[0]
    assert (fields["temperature"][1], fields["top_k"][1], fields["top_p"][1]) == (0.5, 3, np.float32(0.8))

    slots[1].fill(scheduler.plan(), kv)  # both decode, and the long prompt's first chunk; step 0 is still in flight
    fields = slots[1].fields
    assert slots[1].command == StepKind("mixed", True, 4, 8)
    assert fields["decodes"].tolist() == [1, 1, 0, 0]
    assert fields["carry"].tolist() == [0, 1, -1, -1]  # rows 0 and 1 of slot 0
    assert fields["position"].tolist() == [3, 5, 0, 0]
    assert fields["prefill_count"].tolist() == [0, 0, 8, 0]
    assert fields["uniform"][1] == uniforms(np.array([11], np.uint64), np.array([6]))[0]
    assert fields["tables"][2, :3].tolist() == kv.table(2)
    assert not fields["tables"][3].any()

    scheduler.commit(slots[0].plan, [50, 51])
    slots[0].plan = None
    slots[0].fill(scheduler.plan(), kv)  # step 2: tokens of step 1 are carried from slot 1, nothing is left of step 0
    fields = slots[0].fields
    assert fields["carry"].tolist() == [4, 5, -1, -1]
    assert fields["prefill_id"].tolist() == [6, 6, 0, 0, 0, 0, 0, 0]
    assert fields["position"].tolist() == [4, 6, 8, 0]


def test_a_token_that_the_host_knows_is_not_carried(parts):
    kv, scheduler, slots = parts
    scheduler.add(RunState(0, Request([7, 8, 9], 5, stop_token_ids=()), frozenset()))
    plan = scheduler.plan()
    scheduler.commit(plan, [50])
    slots[1].fill(scheduler.plan(), kv)
    assert slots[1].command == StepKind("decode", False, 4)
    assert slots[1].fields["carry"].tolist() == [-1] * 4
    assert slots[1].fields["input_id"].tolist() == [50, 0, 0, 0]


def test_a_slot_that_still_holds_a_step_is_not_filled_again(parts):
    kv, scheduler, slots = parts
    scheduler.add(RunState(0, Request([7, 8, 9], 5, stop_token_ids=()), frozenset()))
    slots[0].fill(scheduler.plan(), kv)
    with pytest.raises(AssertionError, match="slot 0 still holds step 0"):
        slots[0].fill(scheduler.plan(), kv)


@given(st.sets(st.integers(1, 40)), st.integers(1, 40), st.data())
def test_a_step_has_the_smallest_size_that_holds_its_rows(sizes, most, data):
    shape = StepShape(most, 1, 4, 9, 16, (4, 8), tuple(sorted(size for size in sizes if size <= most)))
    count = data.draw(st.integers(1, most))
    rows = shape.rows_for(count)
    allowed = {*shape.batch_sizes, most}
    assert rows == min(size for size in allowed if size >= count)
    assert {kind.rows for kind in shape.kinds} == allowed
    assert (
        len(shape.kinds) == len(set(shape.kinds)) == 2 * (1 + 2 * 2) * len(allowed)
    )  # greedy or not; decode, or one of two sizes with or without decode rows


@given(st.integers(1, 9), st.sampled_from([0, 3, 8]))
def test_a_smaller_step_sees_the_first_rows_and_the_first_prompt_tokens_only(rows, tokens):
    shape = StepShape(9, 1, 4, 9, 16, (3, 8), (rows,))
    buffer = np.arange(shape.num_inputs, dtype=np.int32)
    whole, part = shape.fields(buffer), shape.fields(buffer, StepKind("any", False, rows, tokens))
    for name, values in whole.items():
        expected = values[: tokens if name in PREFILL_FIELDS else rows]
        assert np.array_equal(part[name].view(np.int32), expected.view(np.int32)), name

"""What a step does on the device: the model's own tokens, and keys and values where the books say and nowhere else."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import tiny_model

from asyncbatch import Request, SamplingParams
from asyncbatch.attention import NAME
from asyncbatch.devices.buffers import host_buffers
from asyncbatch.kv_cache import KVCache, blocks_for
from asyncbatch.models.toy import toy_llama
from asyncbatch.runner import Runner
from asyncbatch.sampling import uniforms
from asyncbatch.scheduler import RunState, Scheduler, StepKind
from asyncbatch.slot import Slot, StepShape

SHAPE = StepShape(4, 2, block_size=4, num_blocks=30, max_length=32, prefill_sizes=(8,), batch_sizes=(2,))


class NoDevice:
    def event(self, name, slot):
        return None


@functools.cache
def a_runner() -> Runner:
    return Runner(tiny_model(), shape=SHAPE, host=host_buffers(SHAPE, on_cuda=False))


def pools_of(runner):
    """Keys and values of all layers: [2 * layers, num_blocks + 1, kv_heads, block_size, head_dim]."""
    layers = [module for module in runner.model.modules() if hasattr(module, "paged_pools")]
    assert len(layers) == runner.model.config.num_hidden_layers
    return [pool for layer in layers for pool in layer.paged_pools]


@functools.cache
def next_logits(tokens: tuple[int, ...]) -> torch.Tensor:
    """The model's own logits after these tokens, without any cache."""
    with torch.inference_mode():
        return tiny_model().eval()(torch.tensor([tokens])).logits[0, -1]


def serve(requests, depth, watch=lambda plan, kv: None):
    """The tokens of each request, with `depth` steps launched before the first is committed; each step runs at once.
    `watch` gives back what is called when the step has run."""
    runner = a_runner()
    kv = KVCache(SHAPE.num_blocks, SHAPE.block_size, SHAPE.max_blocks, 3 * SHAPE.max_batch_size)
    scheduler = Scheduler(kv, SHAPE.max_batch_size, SHAPE.prefill_sizes)
    slots = [Slot(index, SHAPE, pair, NoDevice()) for index, pair in enumerate(runner.host)]
    states = [RunState(i, request, frozenset()) for i, request in enumerate(requests)]
    for state in states:
        scheduler.add(state)
    in_flight = []
    while not all(state.finish_reason for state in states):
        plan = scheduler.plan()
        if plan is not None:
            slot = slots[plan.step % 2]
            slot.fill(plan, kv)
            after = watch(plan, kv)
            with torch.inference_mode():
                for command in ("copy_in", slot.command, "copy_out"):
                    runner.run(command, slot.index)
            if after:
                after()
            in_flight.append(slot)
        if len(in_flight) == depth or plan is None:
            slot = in_flight.pop(0)
            scheduler.commit(slot.plan, slot.output_ids.tolist())
            slot.plan = None
    return [state.generated for state in states]


LENGTHS = st.lists(st.tuples(st.integers(1, 13), st.integers(1, 7)), min_size=1, max_size=6)


@settings(max_examples=8, deadline=None)
@given(LENGTHS, st.integers(1, 2), st.integers(0, 9))
def test_steps_give_the_tokens_of_the_model_and_write_only_where_their_rows_are(lengths, depth, first):
    """Prompts in pieces, decode and mixed steps, rows and tokens of padding. What was never written is not a number, so
    who reads it has no token. Padding may write into block 0, which belongs to nobody."""
    runner = a_runner()
    for pool in pools_of(runner):
        pool.fill_(torch.nan)

    def watch(plan, kv):
        before = [pool.clone() for pool in pools_of(runner)]
        written = torch.zeros(SHAPE.num_blocks + 1, SHAPE.block_size, dtype=torch.bool)
        for row in plan.rows:
            for place in range(row.position, row.position + row.num_tokens):
                written[kv.table(row.state.number)[place // 4], place % 4] = True

        def after():
            for old, new in zip(before, pools_of(runner), strict=True):
                same = torch.nan_to_num(old, 12345.0) == torch.nan_to_num(new, 12345.0)
                changed = ~same.all(dim=3).all(dim=1)
                changed[0] = False
                assert (changed <= written).all(), "a key or value of nobody's, or of somebody else's, was written"
                assert new.transpose(1, 2)[written].isfinite().all()

        return after

    requests = [
        Request([(first + 7 * n + 3 * i) % 97 for i in range(prompt)], new, stop_token_ids=())
        for n, (prompt, new) in enumerate(lengths)
    ]
    for request, tokens in zip(requests, serve(requests, depth, watch), strict=True):
        context = list(request.token_ids)
        for token in tokens:
            logits = next_logits(tuple(context))
            assert logits[token] > logits.max() - 1e-4
            context.append(token)
        assert len(tokens) == request.max_new_tokens


@settings(max_examples=5, deadline=None)
@given(LENGTHS, st.integers(1, 2))
def test_a_sampled_row_takes_the_token_that_its_random_number_points_at(lengths, depth):
    requests = [
        Request([(5 * n + i) % 97 for i in range(prompt)], new, SamplingParams(1.0, seed=n), stop_token_ids=())
        for n, (prompt, new) in enumerate(lengths)
    ]
    for request, tokens in zip(requests, serve(requests, depth), strict=True):
        context = list(request.token_ids)
        for token in tokens:
            shares = next_logits(tuple(context)).double().softmax(-1)
            order = shares.argsort(descending=True, stable=True)
            number = uniforms(np.array([request.sampling.seed], np.uint64), np.array([len(context)]))[0]
            end = shares[order].cumsum(-1)[order.tolist().index(token)]
            assert end - shares[token] - 1e-4 <= number <= end + 1e-4
            context.append(token)


ROW = st.tuples(
    st.integers(-1, 7), st.integers(0, 96), st.integers(0, 1), st.integers(0, 31), st.lists(st.integers(0, 30))
)


@settings(deadline=None)
@given(st.lists(ROW, min_size=1, max_size=4), st.lists(st.integers(-1, 96), min_size=8, max_size=8))
def test_a_decode_row_reads_its_own_output_of_a_step_before_and_padding_stays_in_block_0(rows, outputs):
    """The first row of the first slot too; and what was no token there is read as token 0, so that nothing fails."""
    runner = a_runner()
    runner.outputs.copy_(torch.tensor(outputs).view(2, 4))
    tables = [(table + [0] * 8)[:8] for *_, table in rows]
    fields = dict(zip(("carry", "input_id", "decodes", "position"), map(list, zip(*rows, strict=True)), strict=False))
    told = {name: torch.tensor(values, dtype=torch.int32) for name, values in fields.items()}
    ids, positions, places = runner.decode_inputs({**told, "tables": torch.tensor(tables, dtype=torch.int32)})
    for i, (carry, known, live, position, _) in enumerate(rows):
        assert ids[i] == (known if carry < 0 else max(outputs[carry], 0))
        assert positions[i] == (position if live else 0)
        assert places[i] == (tables[i][position // 4] * 4 + position % 4 if live else 0)


def test_copies_bring_the_slots_own_inputs_in_and_its_own_outputs_out():
    runner = a_runner()
    for slot in (0, 1):
        runner.host[slot][0].fill_(10 + slot)
        runner.host[slot][1].fill_(0)
        runner.inputs[slot].fill_(0)
    runner.outputs[0], runner.outputs[1] = 20, 21
    runner.run("copy_in", 1)
    assert [each.unique().tolist() for each in runner.inputs] == [[0], [11]]
    runner.run("copy_out", 0)
    assert [each[1].unique().tolist() for each in runner.host] == [[20], [0]]
    with pytest.raises(ValueError, match="command 'copy': a runner knows copy_in, copy_out, mixed/greedy/4/8"):
        runner.run("copy", 0)
    with pytest.raises(ValueError, match="decode/greedy/3"):
        runner.run(StepKind("decode", False, 3), 0)


def test_a_smaller_step_leaves_the_outputs_of_the_other_rows_alone():
    runner = a_runner()
    runner.inputs[0].fill_(0)
    runner.outputs.fill_(-7)
    with torch.inference_mode():
        runner.run(StepKind("decode", False, 2), 0)
    assert runner.outputs[0, 2:].tolist() == [-7, -7]
    assert runner.outputs[1].tolist() == [-7] * 4
    assert (runner.outputs[0, :2] >= -1).all()


def test_the_callers_model_stays_as_it_is_and_its_weights_are_shared():
    model = tiny_model()
    was_training, attention = model.training, model.config._attn_implementation
    try:
        model.train()
        runner = Runner(model, shape=SHAPE, host=host_buffers(SHAPE, on_cuda=False))
        assert model.training
        assert not runner.model.training
        assert runner.model.config._attn_implementation == NAME
        assert model.config._attn_implementation == attention != NAME
        own, callers = dict(runner.model.named_parameters()), dict(model.named_parameters())
        assert {name: p.data_ptr() for name, p in own.items()} == {name: p.data_ptr() for name, p in callers.items()}
        assert not [module for module in model.modules() if hasattr(module, "paged_pools")]
    finally:
        model.train(was_training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pools_are_as_large_as_the_books_say_and_of_the_models_own_type(dtype):
    """One block more than the books have: block 0 belongs to nobody."""
    model = toy_llama(num_kv_heads=1).to(dtype)
    runner = Runner(model, shape=SHAPE, host=host_buffers(SHAPE, on_cuda=False))
    config = model.config
    for pool in pools_of(runner):
        assert pool.dtype == dtype
        assert pool.shape == (SHAPE.num_blocks + 1, 1, SHAPE.block_size, config.head_dim)
    assert len({pool.data_ptr() for pool in pools_of(runner)}) == 2 * config.num_hidden_layers


@pytest.mark.parametrize("kind", SHAPE.kinds, ids=str)
def test_attention_is_told_of_each_pass_in_the_shapes_and_types_that_it_asks_for(kind):
    """Those of `attention.Batch`: on a GPU kernels read these numbers where they lie, so another type is other numbers.
    And it is told of each pass whether that decodes: there, it is another kernel."""
    runner, told = a_runner(), []
    batch_of = runner._batch

    def watched(*args, decode):
        batch = batch_of(*args, decode=decode)
        told.append((decode, batch))
        return batch

    runner._batch = watched
    runner.inputs[0].fill_(0)
    try:
        with torch.inference_mode():
            runner.run(kind, 0)
    finally:
        del runner._batch
    decode, prefill = (True, kind.rows), (False, kind.tokens)
    passes = {"decode": [decode], "prefill": [prefill], "mixed": [decode, prefill]}[kind.passes]
    assert [(decodes, len(batch.places)) for decodes, batch in told] == passes
    for _, batch in told:
        assert (batch.places.dtype, batch.places.dim()) == (torch.int64, 1)
        assert (batch.tables.dtype, tuple(batch.tables.shape)) == (torch.int32, (kind.rows, SHAPE.max_blocks))
        for each in (batch.first, batch.count, batch.position):
            assert (each.dtype, tuple(each.shape)) == (torch.int32, (kind.rows,))


def test_on_a_cpu_attention_gathers_the_blocks_of_a_rows_own_tokens_and_no_others():
    """However many blocks its request has, or its table has room for."""
    runner, told = a_runner(), []
    batch_of = runner._batch

    def watched(*args, **options):
        batch = batch_of(*args, **options)
        told.extend(batch.parts)
        return batch

    def watch(plan, kv):
        told.clear()

        def after():
            ends = [(row.state.number, row.position + row.num_tokens) for row in plan.rows]
            assert sorted((position + count, blocks.tolist()) for _, count, position, blocks in told) == sorted(
                (end, kv.table(number)[: blocks_for(end, SHAPE.block_size)]) for number, end in ends
            )

        return after

    runner._batch = watched
    try:
        serve([Request([7] * length, 6, stop_token_ids=()) for length in (1, 3, 4, 13)], 2, watch)
    finally:
        del runner._batch


def test_no_step_keeps_keys_and_values_anywhere_else():
    runner, kept = a_runner(), []
    hook = runner.model.register_forward_hook(lambda module, given, output: kept.append(output.past_key_values))
    try:
        serve([Request([1, 2, 3] * 4, 3, stop_token_ids=()), Request([5], 3, stop_token_ids=())], depth=2)
    finally:
        hook.remove()
    assert len(kept) >= 4
    assert set(kept) == {None}


def test_four_moments_of_a_step_are_noted_where_somebody_asks_for_them():
    runner = a_runner()
    runner.inputs[1].fill_(0)
    runner.moments = np.zeros((2, 4))
    try:
        for passes, tokens in (("decode", 0), ("prefill", 8), ("mixed", 8)):
            before = runner.moments.max()
            runner.run(StepKind(passes, False, 2, tokens), 1)
            assert not runner.moments[0].any()
            assert before < runner.moments[1, 0]
            assert (np.diff(runner.moments[1]) > 0).all()
    finally:
        runner.moments = None

"""The floor: bytes counted by hand from the shapes, and the law of bandwidth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from asyncbatch.measure import bandwidth as floor
from asyncbatch.models.shapes import SHAPES

sizes = st.floats(1, 1e12)


def llama(dtype=torch.float32, **shape):
    """A Llama of this shape without memory."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**shape)).to(dtype)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_counted_once_and_an_embedding_table_only_as_output_layer(tied, dtype):
    shape = dict(vocab_size=100, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2)  # fmt: skip
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12 + 2 * 8  # queries, keys and values, output, MLP, norms
    by_hand = (3 * layer + 8 + 100 * 8) * dtype.itemsize  # and the last norm, and one table, tied or not
    assert floor.weight_bytes(llama(dtype, tie_word_embeddings=tied, **shape)) == by_hand


def test_the_8b_shape_has_the_numbers_everybody_knows():
    model = llama(torch.bfloat16, **SHAPES["llama-8b"])
    assert floor.weight_bytes(model) == pytest.approx(2 * (8.03e9 - 128256 * 4096), rel=1e-3)
    assert floor.kv_bytes_per_token(model.config, torch.bfloat16) == 128 * 1024


def test_keys_and_values_by_hand():
    config = tiny_model().config  # 2 layers, 2 key-value heads of 8
    assert floor.kv_bytes_per_token(config, torch.float32) == 2 * 2 * 2 * 8 * 4
    assert floor.kv_bytes_per_token(LlamaConfig(head_dim=128, num_hidden_layers=1, num_key_value_heads=3),
                                    torch.float16) == 2 * 3 * 128 * 2  # fmt: skip


@given(sizes, st.floats(0, 1e6), st.floats(0, 1e6), sizes, st.floats(0, 1e6), st.floats(1.001, 10))
def test_more_to_read_takes_longer_and_more_bandwidth_less(weights, kv, context, bandwidth, more, factor):
    step = floor.step_floor_s(weights, kv, context, bandwidth)
    assert step >= weights / bandwidth
    assert floor.step_floor_s(weights, kv, context + more, bandwidth) >= step
    assert floor.step_floor_s(weights, kv + more, context, bandwidth) >= step
    assert floor.step_floor_s(weights * factor, kv, context, bandwidth) > step
    assert floor.step_floor_s(weights, kv, context, bandwidth * factor) == pytest.approx(step / factor)


@given(sizes, sizes, st.lists(st.integers(0, 10**6), max_size=20), sizes)
def test_a_run_is_the_sum_of_its_steps(weights, kv, contexts, bandwidth):
    expected = (len(contexts) * weights + sum(contexts) * kv) / bandwidth
    assert floor.run_floor_s(weights, kv, contexts, bandwidth) == pytest.approx(expected)


@given(st.integers(2**26, 2**40))
def test_the_buffers_fit_into_what_is_free(free):
    size = floor.buffer_bytes(free)
    assert 2**24 <= size <= floor.BUFFER_BYTES
    assert 2 * size <= free / 2
    assert size % 2**20 == 0


def test_what_cannot_be_measured_is_refused_with_what_was_given():
    with pytest.raises(ValueError, match="CUDA device, and cpu was given"):
        floor.copy_bandwidth("cpu")
    with pytest.raises(ValueError, match="10 MiB are free"):
        floor.buffer_bytes(10 * 2**20)
    for bandwidth in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="bandwidth is"):
            floor.step_floor_s(1, 1, 1, bandwidth)


@pytest.mark.cuda
def test_the_bandwidth_is_a_gpus_and_its_memory_is_given_back():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    assert 1e11 < floor.copy_bandwidth("cuda") < 1e14
    assert torch.cuda.memory_reserved() == before

"""The floor: bytes counted by hand from the shapes, and the law of bandwidth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from asyncbatch.measure import bandwidth as floor
from asyncbatch.measure.recording import Recording
from asyncbatch.measure.steps import steps_of
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


# ---- the floor of requests ------------------------------------------------------------------------------------------


def test_the_floor_of_requests_by_hand():
    """Two rows, bandwidth 1 byte a second, 1 operation a second: rows end after 3 + 4 = 7 and 1 + 2 = 3 steps."""
    requests = [(10, 4), (20, 2), (5, 3), (1, 5)]
    # steps by row: [3, 1] -> the third joins the second row [3, 3], the fourth the first row [7, 3].
    context = (11 + 12 + 13) + 21 + (6 + 7) + (2 + 3 + 4 + 5)
    least = floor.requests_floor(1000, 2, 50, requests, 2, 1, 1)
    assert least == (7, 7 * 1000 + 2 * context, 36 * 50)
    assert least.total_s == 7000 + 2 * 84 + 1800
    assert floor.requests_floor(1000, 2, 50, requests, 2, 10, 1) == (7, 716.8, 1800)
    assert floor.requests_floor(1000, 2, 1, requests, 2, 1, 1).prompts_s == 1000, "the weights are read at least once"
    assert floor.requests_floor(1000, 2, 50, requests, 99, 1, 1).decode_steps == 4, "all at once: the longest one's"
    assert floor.requests_floor(1000, 2, 50, requests, 1, 1, 1).decode_steps == 3 + 1 + 2 + 4, "one after the other"
    assert floor.requests_floor(1000, 2, 50, [(3, 1)], 1, 1, 1) == (0, 0, 1000), "the prompt gives the first token"


def test_requests_of_one_length_have_the_floor_of_their_steps():
    """As `run_floor_s` counts the headline, whose 32 rows decode 8191 steps side by side."""
    weights, kv, bandwidth, rows = 2 * (8030261248 - 128256 * 4096), 131072, 4.22e12, 32
    least = floor.requests_floor(weights, kv, 14e9, [(16, 8192)] * 32, rows, bandwidth, 7e14)
    contexts = [rows * (16 + place) for place in range(1, 8192)]
    assert least.decode_steps == len(contexts)
    assert least.decode_s == pytest.approx(floor.run_floor_s(weights, kv, contexts, bandwidth), rel=1e-12)
    assert least.prompts_s == pytest.approx(512 * 14e9 / 7e14)
    assert least.total_s == pytest.approx(62.6, abs=0.05)
    twice = floor.requests_floor(weights, kv, 14e9, [(16, 8192)] * 64, rows, bandwidth, 7e14)
    assert twice.decode_s == pytest.approx(2 * least.decode_s)


def test_the_recorded_headline_has_the_same_floor_by_its_steps_and_by_its_requests():
    recording = Recording.load("h200-llama-8b")
    bandwidth = recording.data["copy_bandwidth_bytes_per_s"]
    for run in recording.runs:
        facts = recording.models[run["model"]]
        sizes = facts["weight_bytes"], facts["kv_bytes_per_token"]
        by_steps = floor.run_floor_s(*sizes, steps_of(run).context.tolist(), bandwidth)
        requests = [(run["prompt_tokens"], run["new_tokens"])] * run["requests"]
        by_requests = floor.requests_floor(*sizes, 13.96e9, requests, run["batch_size"], bandwidth, 7e14)
        assert by_requests.total_s == pytest.approx(by_steps, rel=2e-4)


lengths = st.lists(st.tuples(st.integers(1, 200), st.integers(1, 50)), min_size=1, max_size=30)


@given(lengths, st.integers(1, 12), st.integers(0, 3))
def test_the_floor_is_that_of_continuous_batching_followed_step_by_step(requests, rows, weights):
    waiting, running, steps, read = list(requests), [], 0, 0
    while waiting or running:
        while waiting and len(running) < rows:
            prompt, new = waiting.pop(0)
            if new > 1:
                running.append([prompt + 1, new - 1])
        if running:
            steps += 1
            read += sum(context for context, _ in running)
            running = [[context + 1, left - 1] for context, left in running if left > 1]
    least = floor.requests_floor(weights, 1, 1, requests, rows, 1, 1)
    assert least.decode_steps == steps
    assert least.decode_s == steps * weights + read
    assert steps >= max(max(new - 1 for _, new in requests), sum(new - 1 for _, new in requests) / rows)


def test_operations_of_a_prompt_token_by_hand():
    shape = dict(vocab_size=100, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2)  # fmt: skip
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12  # queries, keys and values, output, MLP
    for tied in (True, False):
        assert floor.flops_per_token(llama(tie_word_embeddings=tied, **shape)) == 2 * 3 * layer
    assert floor.flops_per_token(llama(torch.bfloat16, **SHAPES["llama-8b"])) == pytest.approx(13.96e9, rel=1e-3)


def test_a_floor_needs_rates_rows_and_requests():
    for name, arguments in (("rows", (0, 1, 1)), ("bandwidth", (1, -1.0, 1)), ("matmul", (1, 1, float("nan")))):
        with pytest.raises(ValueError, match=f"{name}.* is "):
            floor.requests_floor(1, 1, 1, [(1, 1)], *arguments)
    for requests in ([], [(1, 0)], [(0, 1)]):
        with pytest.raises(ValueError, match="no least time"):
            floor.requests_floor(1, 1, 1, requests, 1, 1, 1)
    with pytest.raises(ValueError, match="CUDA device, and cpu was given"):
        floor.matmul_rate("cpu")


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


@pytest.mark.cuda
def test_the_rate_of_matrix_products_is_a_gpus():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    assert 1e12 < floor.matmul_rate("cuda", torch.float16) < 1e16
    assert torch.cuda.memory_reserved() <= before + 2**26  # the library keeps a workspace

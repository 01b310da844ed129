"""With one to four threads, a row's bits do not depend on where it stands: steps are padded to numbers of rows for
which that holds, and a request gets the tokens beside others that it gets alone."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support.changed_models import Quantized
from support.gpt2 import tiny_gpt2
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from asyncbatch import AsyncBatcher, Request, SamplingParams, SyncBatcher
from asyncbatch.devices import padding
from asyncbatch.devices.padding import padding_for, products_of
from asyncbatch.devices.virtual import Costs


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wide_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50_000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


WIDE = wide_model()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_products_of_the_chosen_numbers_of_rows_keep_a_row_at_every_place(count):
    """Against products in which the row stands at each place in turn, among other rows each time."""
    generator = torch.Generator().manual_seed(7)
    with threads(count), torch.inference_mode():
        chosen = padding_for(list(products_of(WIDE)), range(1, 13))
        for rows, padded in chosen.items():
            assert padded >= rows
            for product in products_of(WIDE):
                row = torch.randn(product.weight.shape[1], generator=generator)
                results = []
                for place in range(padded):
                    batch = torch.randn(1, padded, len(row), generator=generator)
                    batch[0, place] = row
                    results.append(product(batch)[0, place])
                assert all(torch.equal(result, results[0]) for result in results), (rows, padded, product)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [SyncBatcher, AsyncBatcher])
def test_a_request_gets_the_tokens_beside_four_others_that_it_gets_alone(kind, count):
    """Seeds with which the last of five requests gets another token beside the others, with two threads and unpadded,
    on the machine where they were looked for (of 1,060 seeds these three)."""
    options = {"clock": Costs(), "max_batch_size": 5, "block_size": 4, "max_length": 16, "prefill_tokens": 10}
    with threads(count), kind(WIDE, **options) as batcher:
        for last in (79, 644, 964):
            requests = [
                Request([n + 1, 2 * n + 1], 4, SamplingParams(temperature=1.0, seed=last - 4 + n), stop_token_ids=())
                for n in range(5)
            ]
            together = [completion.token_ids for completion in batcher.run(requests)]
            assert [batcher.run([request])[0].token_ids for request in requests] == together
            assert [c.token_ids for c in batcher.run(requests[::-1])] == together[::-1]


def test_a_step_is_padded_where_a_product_does_not_keep_its_rows_and_gives_the_same(monkeypatch):
    model = tiny_gpt2()
    options = {"clock": Costs(), "max_batch_size": 3, "block_size": 4, "max_length": 32, "prefill_tokens": 8}
    requests = [Request([n + 1, 2, 3], 8, stop_token_ids=()) for n in range(4)]
    with AsyncBatcher(model, **options) as batcher:
        expected = [completion.token_ids for completion in batcher.run(requests)]
    monkeypatch.setattr(padding, "keeps_rows", lambda product, rows: rows % 5 == 0)
    with AsyncBatcher(model, **options) as batcher:
        assert batcher.device.program.padding == {3: 5, 8: 10}
        assert [completion.token_ids for completion in batcher.run(requests)] == expected


def test_the_output_layer_is_not_tried_with_prompt_tokens_and_nothing_is_tried_twice(monkeypatch):
    model, tried = tiny_gpt2(), []
    monkeypatch.setattr(padding, "_known", {})
    monkeypatch.setattr(padding, "_keeps_rows", lambda product, rows: (tried.append((product, rows)), True)[1])
    options = {"clock": Costs(), "max_batch_size": 3, "block_size": 4, "max_length": 32, "prefill_tokens": 8}
    for _ in range(2):
        AsyncBatcher(model, **options).close()
    sizes = [(tuple(product.weight.shape), rows) for product, rows in tried]
    assert len(sizes) == len(set(sizes))
    assert {rows for shape, rows in sizes if shape == (97, 32)} == {3}
    assert {rows for shape, rows in sizes if shape == (32, 96)} == {3, 8}


def test_one_product_of_each_size_is_tried():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4), nn.Embedding(5, 4), nn.LayerNorm(4))
    assert [tuple(product.weight.shape) for product in products_of(model)] == [(8, 4), (4, 8)]


def test_the_worker_says_what_it_chose():
    with SyncBatcher(tiny_gpt2(), max_batch_size=3, block_size=4, max_length=32, prefill_tokens=8) as batcher:
        assert set(batcher.device.padding) == {3, 8}


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
def test_quantized_products_are_tried_with_rows_of_the_type_of_their_scales(scales):
    layer = Quantized(torch.nn.Linear(16, 8, bias=False).to(scales))
    seen = []
    layer.register_forward_pre_hook(lambda module, rows: seen.append(rows[0].dtype))
    (product,) = products_of(torch.nn.Sequential(layer))
    assert padding_for([product], [1, 3]).keys() == {1, 3}
    assert set(seen) == {scales}

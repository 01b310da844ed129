"""Sliding windows, softcap, sinks, and keys and values of different sizes on CUDA: `python -m pytest -m cuda`."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from asyncbatch import AsyncBatcher, Request, SyncBatcher
from tools.served import generated, served, tiny_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPTIONS = dict(clock=None, prefill_tokens=16)


@pytest.mark.parametrize("batcher", [SyncBatcher, AsyncBatcher])
@pytest.mark.parametrize(
    ("kind", "compile"),
    [
        ("mistral", False), ("mistral", True), ("gemma2", False), ("gemma2", True), ("gemma3_text", False),
        ("gemma4_text", False), ("deepseek_v3", False), ("gpt_oss", False), ("granite_swa", True),
    ],
)  # fmt: skip
def test_a_model_gives_the_tokens_of_generate(kind, compile, batcher):
    """In float32, against `generate` on the CPU."""
    dense = {"first_k_dense_replace": 4} if kind == "deepseek_v3" else {}  # experts are not captured as a graph
    model = tiny_model(kind, **dense)
    expected = generated(model)
    assert served(copy.deepcopy(model).cuda(), batcher, compile=compile, **OPTIONS) == expected


def sliding_model(window: int | None) -> MistralForCausalLM:
    """Heads of 128 in bfloat16. Contexts are much longer than the window, which is not a whole number of tiles."""
    config = MistralConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=8192, initializer_range=0.1,
        sliding_window=window, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return MistralForCausalLM(config).cuda().to(torch.bfloat16).eval().requires_grad_(False)


@pytest.mark.parametrize("compile", [False, True])
def test_rows_are_bitwise_the_same_alone_and_together_in_both_loops(compile):
    generator = torch.Generator().manual_seed(1)
    requests = [
        Request(torch.randint(4096, (length,), generator=generator).tolist(), 40, stop_token_ids=())
        for length in (3, 700, 1500, 3000, 1023, 1024)
    ]
    options = dict(max_batch_size=6, max_length=4096, prefill_tokens=512, compile=compile)
    model = sliding_model(1000)
    with SyncBatcher(model, **options) as batcher:
        alone = [batcher.run([request])[0].token_ids for request in requests]
    for loop in (SyncBatcher, AsyncBatcher):
        with loop(model, **options) as batcher:
            together = batcher.run(requests)
        assert [answer.error for answer in together] == [None] * len(requests)
        assert [answer.token_ids for answer in together] == alone
    with SyncBatcher(sliding_model(None), **options) as batcher:
        full = [answer.token_ids for answer in batcher.run(requests)]
    assert full[0] == alone[0]  # shorter than the window
    assert full[3] != alone[3]

"""A model that computes a step in milliseconds. It is made once, so that all tests share its device process."""

from __future__ import annotations

import functools

from transformers import LlamaForCausalLM

from asyncbatch.models.toy import toy_llama


@functools.lru_cache
def tiny_model(device: str = "cpu") -> LlamaForCausalLM:
    """Random weights wide enough apart that greedy tokens vary and depend on every token before them."""
    model = toy_llama(
        97,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        spread=0.4,
    )
    return model.to(device)

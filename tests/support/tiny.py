"""A model of milliseconds for the tests, made once: its device process is then shared by all of them."""

from __future__ import annotations

import functools

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@functools.lru_cache
def tiny_model(device: str = "cpu") -> LlamaForCausalLM:
    """Random weights wide enough apart that greedy tokens vary and depend on every token before them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.4,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False).to(device)

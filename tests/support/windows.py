"""A model with a sliding window."""

from __future__ import annotations

import torch
from transformers import MistralConfig, MistralForCausalLM


def sliding_mistral(window: int, seed: int = 0) -> MistralForCausalLM:
    """A Mistral of milliseconds with random weights wide enough apart that tokens vary and depend on the window."""
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.4, sliding_window=window,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = MistralForCausalLM(config)
    return model.eval().requires_grad_(False)

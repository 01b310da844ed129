"""The smallest Llamas, with random weights: for tests, and for devices that compute nothing with their model."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 251  # tokens of the smallest toy, 0 to 250


def toy_llama(
    vocab_size: int = VOCABULARY,
    *,
    max_positions: int = 256,
    hidden_size: int = 8,
    intermediate_size: int = 8,
    num_layers: int = 1,
    num_heads: int = 1,
    num_kv_heads: int = 1,
    spread: float = 0.02,
    tied: bool = False,
    seed: int = 0,
) -> Any:
    """A `transformers.LlamaForCausalLM` that computes a step in milliseconds: float32, on the CPU, in eval mode and
    without gradients. It has no special tokens, so only its length ends a text.

    The defaults give a model that is good for one thing: a batcher needs one, even where nothing is computed with it.
    Tests whose tokens matter ask for larger sizes.

    spread: the standard deviation of the weights. Wide weights (0.4) give tokens that vary and depend on every token
        before them.
    tied: whether the output layer shares the weights of the input embeddings.
    seed: the same seed and sizes give the same weights. The caller's own random numbers are left alone.
    """
    from transformers import LlamaConfig, LlamaForCausalLM  # slow to import

    config = LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=max_positions,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        initializer_range=spread,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.eval().requires_grad_(False)

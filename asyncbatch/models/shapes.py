"""Shapes: the sizes of well-known models, filled with random weights.

A device needs as long for random weights as for trained ones, so times can be measured without a download.
"""

from __future__ import annotations

from typing import Any

import torch

from .messages import ModelError

# Sizes only. The 0.6B shape is Qwen3-0.6B's. The 8B shape has Llama-3.1's 131072 positions, so that long runs fit.
_LLAMA3: dict[str, Any] = dict(vocab_size=128256, max_position_embeddings=131072, num_attention_heads=32)
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=1024),
    "llama-0.6b": dict(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                       num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
                       tie_word_embeddings=True),
    "llama-1b": dict(_LLAMA3, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_key_value_heads=8,
                     tie_word_embeddings=True),
    "llama-8b": dict(_LLAMA3, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8),
}  # fmt: skip


def random_model(name: str, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """The Llama of the shape `name` ("random:tiny", ...) with random weights. ModelError for an unknown shape.

    The same seed, device and dtype give the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape = SHAPES.get(name.removeprefix("random:"))
    if shape is None:
        raise ModelError(f"{name!r} is not a shape; allowed: {', '.join(f'random:{s}' for s in SHAPES)}")
    config = LlamaConfig(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=None,
                         rope_parameters={"rope_type": "default", "rope_theta": 500000.0})  # fmt: skip
    with torch.device("meta"):  # takes no memory: 8B weights are then made only once, in the right place and dtype
        model = LlamaForCausalLM(config).to(dtype)
    model.to_empty(device=device).requires_grad_(False).eval()
    with torch.device(device):
        model.model.rotary_emb = LlamaRotaryEmbedding(config)  # computed, not random; stays float32
    model.tie_weights()
    random = torch.Generator(device).manual_seed(seed)
    for key, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
        else:  # layers much stronger than embeddings: the next token depends on the whole context and does not repeat
            weight.normal_(0.0, 0.02 if "embed_tokens" in key else 2 * weight.shape[1] ** -0.5, generator=random)
    return model

"""Attention written out, for models that ask for more than torch's scaled dot product attention does."""

from __future__ import annotations

import torch


def written_out(query, key, value, mask, scale: float, softcap: float, sinks) -> torch.Tensor:
    """query [1, kv_heads, group * count, size], key [1, kv_heads, tokens, size], value [1, kv_heads, tokens,
    value_size]; returns [1, kv_heads, group * count, value_size].

    mask: bool [group * count, tokens], what is seen; None: all is. softcap, sinks: as for `attention.attend_on_cpu`.
    """
    scores = query @ key.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        of_heads = sinks.view(1, query.shape[1], -1, 1)
        count = query.shape[2] // of_heads.shape[2]
        scores = torch.cat([scores, of_heads.repeat_interleave(count, 2).to(scores.dtype)], 3)
    weights = torch.softmax(scores, 3, dtype=torch.float32)
    return weights[..., : key.shape[2]].to(value.dtype) @ value

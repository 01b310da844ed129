"""From logits to a token, the same in any order of the steps.

The random number of a token depends on the request's seed and the token's position, and on nothing else (`uniforms`):
no state could run ahead or fall behind when steps are repeated, reordered or thrown away.
"""

from __future__ import annotations

import numpy as np
import torch

from .request import NO_TOKEN


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One random number in [0, 1) for each (seed, position) pair: float32, the shape of the inputs.

    A counter-based generator: the finalizer of SplitMix64 (Steele et al. 2014) over both numbers."""
    with np.errstate(over="ignore"):
        x = seeds.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = x ^ ((positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD1B54A32D192ED03))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token of each row, int32 [B], from logits [B, vocabulary]; the first of several equal ones.
    NO_TOKEN for a row with nan or +inf in it, or with nothing but -inf.

    In two rounds. In one round, a GPU reads each row with a single program, which took 29 us of a step of 5 ms."""
    parts = next(parts for parts in (64, 32, 16, 8, 4, 2, 1) if logits.shape[1] % parts == 0)
    tops, where = logits.view(len(logits), parts, -1).max(-1)
    part = tops.argmax(-1, keepdim=True)
    token = part * (logits.shape[1] // parts) + where.gather(1, part)
    # The largest logit is nan if any is. (Some may be -inf: those tokens are forbidden.)
    return torch.where(tops.gather(1, part).isfinite(), token, NO_TOKEN)[:, 0].to(torch.int32)


def sample(logits: torch.Tensor, fields) -> torch.Tensor:
    """The next token of each row, int32 [B], from logits [B, vocabulary] and each row's sampling fields.

    One uniform number a row picks from the cumulated probabilities of the tokens that top_k and top_p leave, most
    likely first (the inverse of their distribution function). A row with temperature 0 takes the most likely token.
    NO_TOKEN as in `greedy`. Sums are float64: those of float32 pass 1 long before the last of 100,000 tokens.
    """
    temperature, top_k, top_p = fields["temperature"], fields["top_k"], fields["top_p"]
    scaled = logits.float() / torch.where(temperature > 0, temperature, 1.0)[:, None]
    probabilities, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    before = probabilities.cumsum(-1, dtype=torch.float64) - probabilities
    kept = (rank < top_k[:, None]) | (top_k[:, None] == 0)
    kept &= (before < top_p[:, None]) | (top_p[:, None] >= 1)
    total = torch.where(kept, probabilities, 0).cumsum(-1, dtype=torch.float64)
    # The first token whose cumulated probability exceeds the number. Rounding can leave none: then the last one kept.
    pick = (total <= fields["uniform"][:, None] * total[:, -1:]).sum(-1)
    # (A row of padding keeps none at all.)
    pick = torch.minimum(pick, kept.sum(-1) - 1).clamp(min=0)
    sampled = order.gather(1, pick[:, None])[:, 0]
    most_likely = greedy(logits)
    return torch.where((temperature > 0) & (most_likely >= 0), sampled.to(torch.int32), most_likely)

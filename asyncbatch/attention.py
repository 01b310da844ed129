"""Paged attention for an unmodified transformers model.

transformers lets any function take the place of a model's attention (`AttentionInterface`) and hands it whatever extra
argument `model(...)` was called with. So the model stays as it is: each layer calls `paged_attention`, which writes the
new keys and values into the layer's pool and attends through the block tables of the `Batch` that the runner passed.

The tokens of a forward pass lie in rows, one row a request: row r has `count[r]` of them, from number `first[r]` on,
and the first of them is the request's token number `position[r]`. A decode step has one token a row, a chunk of a
prompt is a row of many. There are two ways to the same result. On a CPU, one row after the other: gather the row's own
blocks, then scaled dot product attention, in shapes that depend on this request only. On CUDA, the Triton kernels of
`devices/cuda/kernels.py`, which read the pool in place and whose results do not depend on the other rows either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from .models.written_out import written_out

NAME = "asyncbatch_paged"


@dataclass
class Batch:
    """What attention needs to know of one forward pass over N tokens in rows, for all layers.

    places: int64 [N], where in a pool (block * block_size + place in it) each token's key and value go.
    tables: int32 [rows, max_blocks]. first, count, position: int32 [rows], see above.
    attend: the device's way, called as attend(batch, query, key, value, keys, values, scale, window, softcap, sinks);
        see `attend_on_cpu`.
    parts: on a CPU, the same as (first, count, position, the row's blocks int64 [n]) for each row that has tokens.
    splits, arrived: on CUDA, for a decode step (see `kernels.decode`); 0 and None for chunks of prompts.
    """

    places: torch.Tensor
    tables: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor
    position: torch.Tensor
    attend: Callable[..., torch.Tensor]
    parts: list[tuple[int, int, int, torch.Tensor]] | None = None
    splits: int = 0
    arrived: torch.Tensor | None = None


def paged_attention(
    module, query, key, value, attention_mask, *, paged: Batch, scaling=None, softcap=None, s_aux=None, **_
):
    """The function registered with transformers. query: [rows, heads, length, key_size] with rows * length = N tokens,
    key the same with kv_heads, value [rows, kv_heads, length, value_size]. Returns ([rows, length, heads, value_size],
    None).

    `module.paged_pools` are the layer's keys and values, [num_blocks + 1, kv_heads, block_size, key_size or
    value_size]. `module.paged_window`: how many tokens a token sees, itself included; 0: all up to itself."""
    rows, heads, length, size = query.shape
    query, key, value = (x.transpose(1, 2).reshape(rows * length, -1, x.shape[3]) for x in (query, key, value))
    scale = size**-0.5 if scaling is None else scaling
    how = scale, module.paged_window, float(softcap or 0), s_aux
    return paged.attend(paged, query, key, value, *module.paged_pools, *how).view(rows, length, heads, -1), None


def register() -> None:
    """Make `paged_attention` known to transformers, under NAME."""
    from transformers import AttentionInterface  # takes more than a second: not when asyncbatch is imported

    AttentionInterface.register(NAME, paged_attention)


def attend_on_cpu(batch: Batch, query, key, value, keys, values, scale, window, softcap, sinks) -> torch.Tensor:
    """Store the new keys and values in the pool and attend, one row after the other. query: [N, heads, key_size], key
    [N, kv_heads, key_size], value [N, kv_heads, value_size]. Returns [N, heads, value_size]; zeros for padding.

    softcap: scores are bent to lie between -softcap and softcap; 0: they are not. sinks: for each head a score that
    takes its share of the softmax and has no value, [heads], or None."""
    (heads, dim), (kv_heads, size) = query.shape[1:], keys.shape[1:3]
    block, place = batch.places // size, batch.places % size
    keys[block, :, place], values[block, :, place] = key, value
    output = query.new_zeros(len(query), heads, values.shape[3])
    for first, count, position, blocks in batch.parts or ():
        length = position + count
        start = max(position + 1 - window, 0) if window else 0  # before it, no token of this row looks
        own, there = blocks[start // size :], slice(start % size, length - start // size * size)
        k, v = (x[own].transpose(0, 1).reshape(1, kv_heads, -1, x.shape[3])[:, :, there] for x in (keys, values))
        # The query heads that share a key-value head become its query rows: [1, kv_heads, group * count, dim].
        q = query[first : first + count].view(count, kv_heads, heads // kv_heads, dim)
        q = q.permute(1, 2, 0, 3).reshape(1, kv_heads, -1, dim)
        mask = None
        if count > 1:  # a token of the chunk does not see those after it, nor those before its window
            mask = torch.ones(count, length - start, dtype=torch.bool).tril(position - start)
            mask = (mask.triu(position + 1 - window - start) if window else mask).repeat(heads // kv_heads, 1)
        if softcap or sinks is not None:
            out = written_out(q, k, v, mask, scale, softcap, sinks)
        else:
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        out = out.view(kv_heads, heads // kv_heads, count, -1).permute(2, 0, 1, 3)
        output[first : first + count] = out.reshape(count, heads, -1)
    return output

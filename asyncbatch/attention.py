"""Paged attention for an unmodified transformers model.

transformers lets any function take the place of a model's attention (`AttentionInterface`) and hands it whatever extra
argument `model(...)` was called with. So the model stays as it is: each layer calls `paged_attention`, which writes the
new keys and values into the layer's pool and attends through the block tables of the `Batch` that the runner passed.

Two ways to the same result. On a CPU, one row after the other: gather the row's own blocks, then scaled dot product
attention, in shapes that depend on this request only. On CUDA, all rows at once at the full length of the table,
masked: always the same shapes, so also independent of the other rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "asyncbatch_paged"


@dataclass
class Batch:
    """What attention needs to know of one forward pass over N tokens, for all layers.

    keys, values: the pools, a tensor [num_blocks + 1, block_size, kv_heads, head_dim] for each layer.
    places: int64 [N], where in a pool (block * block_size + place in it) each token's key and value go.
    parts: on a CPU, for each row (first token, number of tokens, the row's position, its blocks int64 [n]).
    tables, positions: on CUDA, int64 [N, max_blocks] and [N], each token's block table and place.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    places: torch.Tensor
    parts: list[tuple[int, int, int, torch.Tensor]] | None = None
    tables: torch.Tensor | None = None
    positions: torch.Tensor | None = None


def paged_attention(module, query, key, value, attention_mask, *, paged: Batch, scaling=None, **_):
    """The function registered with transformers. query: [rows, heads, length, head_dim] with rows * length = N tokens,
    key and value the same with kv_heads. Returns ([rows, length, heads, head_dim], None)."""
    rows, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    query, key, value = (x.transpose(1, 2).reshape(rows * length, -1, dim) for x in (query, key, value))
    keys, values = paged.keys[module.layer_idx], paged.values[module.layer_idx]
    keys.view(-1, kv_heads, dim).index_copy_(0, paged.places, key)
    values.view(-1, kv_heads, dim).index_copy_(0, paged.places, value)
    if paged.parts is not None:
        output = _attend_one_by_one(query, keys, values, paged.parts, scaling)
    else:
        output = _attend_together(query, keys, values, paged.tables, paged.positions, scaling)
    return output.view(rows, length, heads, dim), None


def register() -> None:
    """Make `paged_attention` known to transformers, under NAME."""
    from transformers import AttentionInterface  # takes more than a second: not when asyncbatch is imported

    AttentionInterface.register(NAME, paged_attention)


def _attend_one_by_one(query, keys, values, parts, scaling):
    """query [N, heads, dim]. Tokens that are in no part (padding) get zeros."""
    output = torch.zeros_like(query)
    heads, dim, kv_heads = query.shape[1], query.shape[2], keys.shape[2]
    for first, count, position, blocks in parts:
        length = position + count
        k = keys[blocks].view(-1, kv_heads, dim)[:length].transpose(0, 1)[None]
        v = values[blocks].view(-1, kv_heads, dim)[:length].transpose(0, 1)[None]
        # The query heads that share a key-value head become its query rows: [1, kv_heads, group * count, dim].
        q = query[first : first + count].view(count, kv_heads, heads // kv_heads, dim)
        q = q.permute(1, 2, 0, 3).reshape(1, kv_heads, -1, dim)
        mask = None
        if count > 1:  # a token of the chunk does not see those after it
            mask = torch.ones(count, length, dtype=torch.bool).tril(position).repeat(heads // kv_heads, 1)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        out = out.view(kv_heads, heads // kv_heads, count, dim).permute(2, 0, 1, 3)
        output[first : first + count] = out.reshape(count, heads, dim)
    return output


def _attend_together(query, keys, values, tables, positions, scaling):
    """query [N, heads, dim], each token with a table of its own."""
    tokens, heads, dim = query.shape
    kv_heads = keys.shape[2]
    k = keys[tables].view(tokens, -1, kv_heads, dim).transpose(1, 2)
    v = values[tables].view(tokens, -1, kv_heads, dim).transpose(1, 2)
    seen = torch.arange(k.shape[2], device=k.device)[None] <= positions[:, None]
    q = query.view(tokens, kv_heads, heads // kv_heads, dim)
    output = scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None], scale=scaling)
    return output.reshape(tokens, heads, dim)  # its layout depends on the kernel that torch has chosen

"""What the tests of transformers' continuous batching share: small settings, and references in plain torch."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from asyncbatch import Request

BATCH, PREFILL, MAX_LENGTH, LAYERS = 5, 13, 64, 2  # 3 rows are padded to 4
OPTIONS = dict(max_batch_size=BATCH, max_length=MAX_LENGTH, block_size=8, prefill_tokens=PREFILL)


def generate(model, request: Request) -> list[int]:
    """What plain greedy generation gives, one request at a time."""
    prompt = torch.tensor([list(request.token_ids)], device=model.device)
    mask = torch.ones_like(prompt)
    ids = model.generate(prompt, attention_mask=mask, max_new_tokens=request.max_new_tokens, do_sample=False)
    tokens = ids[0, prompt.shape[1] :].tolist()
    ends = [n for n, token in enumerate(tokens, 1) if token in (request.stop_token_ids or ())]
    return tokens[: ends[0]] if ends else tokens


def reference_prefill(query, keys, values, tables, first, count, position, scale, window=0, softcap=0.0, sinks=None):
    """What `kernels.prefill` does, row after row, in plain torch. What belongs to no row stays nan: it must not be
    used. With a window, and without softcap and sinks."""
    assert not softcap
    assert sinks is None
    output = torch.full_like(query, float("nan"))
    for f, n, p, table in zip(first.tolist(), count.tolist(), position.tolist(), tables.long(), strict=True):
        if n:
            k, v = (pool[table[: p + n]].transpose(0, 1)[None] for pool in (keys, values))
            mask = torch.ones(n, p + n, dtype=torch.bool).tril(p)
            mask = mask.triu(p + 1 - window) if window else mask
            q = query[f : f + n].transpose(0, 1)[None]
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
            output[f : f + n] = out[0].transpose(0, 1)
    return output


def reference_decode(query, key, value, keys, values, tables, live, position, scale, splits, arrived, *asked):
    """What `kernels.decode` does, row after row, in plain torch."""
    size, count = keys.shape[1], (live != 0).int()
    assert torch.equal(live != 0, position >= 0)
    assert len(arrived) >= query.shape[0] * key.shape[1]
    for row in live.nonzero()[:, 0].tolist():
        block, place = tables[row, position[row] // size], position[row] % size
        keys[block, place], values[block, place] = key[row], value[row]
    places = tables[:, :, None].long() * size + torch.arange(size)  # of every token of the row
    first = torch.arange(len(query))
    tokens = (pool.flatten(0, 1) for pool in (keys, values))
    return reference_prefill(query, *tokens, places.flatten(1), first, count, position, scale, *asked)

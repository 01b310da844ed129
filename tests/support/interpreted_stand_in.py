"""The stand-in for flash_attn with the kernels themselves, in Triton's interpreter: TRITON_INTERPRET=1 must be set.

A script of its own (`python -m support.interpreted_stand_in`), because Triton reads that variable when it is imported.
It prints "all equal", or fails."""

from __future__ import annotations

import torch

from asyncbatch import Request
from asyncbatch.devices.cuda import kernels
from asyncbatch.profile.peers.batcher import TransformersBatcher
from asyncbatch.profile.peers.stand_in import StandIn

from .peers import OPTIONS, generate, reference_decode
from .tiny import tiny_model
from .windows import sliding_mistral


def compare_with_the_reference() -> None:
    torch.manual_seed(0)
    rows, heads, kv_heads, dim, size = 4, 6, 2, 12, 8
    caches = [torch.randn(9, size, kv_heads, dim) for _ in "kv"]
    copies = [cache.clone() for cache in caches]
    q, k, v = (torch.randn(rows, 1, n, dim) for n in (heads, kv_heads, kv_heads))
    lengths = torch.tensor([0, 17, 8, -1], dtype=torch.int32)  # the last row is padding
    tables = torch.tensor([[5, -1, -1], [1, 7, 2], [3, 8, -1], [-1, -1, -1]], dtype=torch.int32)
    stand_in = StandIn(rows, kv_heads, q.device)
    output = stand_in.flash_attn_with_kvcache(q, *caches, k, v, lengths, tables)
    expected = reference_decode(
        q[:, 0], k[:, 0], v[:, 0], *copies, tables, lengths + 1, lengths, dim**-0.5, 1, stand_in._arrived
    )
    assert all(torch.equal(a, b) for a, b in zip(caches, copies, strict=True))
    torch.testing.assert_close(output[:3, 0], expected[:3])
    assert output.isfinite().all()
    assert not stand_in._arrived.any()


def compare_long_contexts() -> None:
    """Of a batch so small that its contexts are cut into 64 parts, of which 11 and 2 have anything in them."""
    torch.manual_seed(0)
    heads, kv_heads, dim, size, contexts = 4, 2, 16, 16, (700, 90)
    blocks = [-(-(context + 1) // size) for context in contexts]
    tables = torch.zeros(len(contexts), max(blocks), dtype=torch.int32)
    tables[0, : blocks[0]] = torch.arange(blocks[0]) + 1
    tables[1, : blocks[1]] = torch.arange(blocks[1]) + 1 + blocks[0]
    keys, values = (torch.randn(sum(blocks) + 1, kv_heads, size, dim) for _ in "kv")
    query, key, value = (torch.randn(len(contexts), n, dim) for n in (heads, kv_heads, kv_heads))
    live, places = torch.ones(len(contexts), dtype=torch.int32), torch.tensor(contexts, dtype=torch.int32)
    arrived = torch.zeros(len(contexts) * kv_heads, dtype=torch.int32)
    output = kernels.decode(query, key, value, keys, values, tables, live, places, dim**-0.5, 64, arrived)
    for row, context in enumerate(contexts):
        of_row = [pool[tables[row]].permute(1, 0, 2, 3).flatten(1, 2)[:, : context + 1] for pool in (keys, values)]
        k, v = (each.repeat_interleave(heads // kv_heads, 0) for each in of_row)
        weights = torch.softmax(torch.einsum("hd,htd->ht", query[row], k) * dim**-0.5, -1)
        torch.testing.assert_close(output[row], torch.einsum("ht,htd->hd", weights, v))
    assert not arrived.any()


def serve_with_it(model) -> None:
    requests = [Request([3, 1, 4, 1, 5], 4, stop_token_ids=()), Request([2], 3, stop_token_ids=())]
    with TransformersBatcher(model, mode="sync", attention="stand-in", **OPTIONS) as batcher:
        batcher.manager.batch_processor.model_runner.pad_inputs = True
        assert [c.token_ids for c in batcher.run(requests)] == [generate(batcher.model, r) for r in requests]


if __name__ == "__main__":
    compare_with_the_reference()
    compare_long_contexts()
    serve_with_it(tiny_model())
    serve_with_it(sliding_mistral(window=3))
    print("all equal")

"""Both ways of paged attention against attention written out: each row over its own tokens, wherever they lie."""

from __future__ import annotations

import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbatch.attention import Batch, paged_attention

BLOCK, DIM, KV_HEADS, GROUP, MAX_BLOCKS = 4, 8, 2, 3, 5
HEADS = KV_HEADS * GROUP


def written_out(query, keys, values, scaling):
    """query [heads, dim] over keys, values [tokens, kv_heads, dim], one head at a time, in float64."""
    out = []
    for head in range(HEADS):
        k, v = keys[:, head // GROUP].double(), values[:, head // GROUP].double()
        weights = torch.softmax(k @ query[head].double() * scaling, 0)
        out.append(weights @ v)
    return torch.stack(out)


rows = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(rows, st.integers(0, 2**31), st.booleans(), st.integers(0, 3))
def test_each_row_attends_to_its_own_tokens(rows, seed, one_by_one, padding):
    """rows: (tokens in the cache already, new tokens). Blocks are scattered, and garbage stands everywhere else."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    num_blocks = MAX_BLOCKS * len(rows)
    keys, values = (random(num_blocks + 1, BLOCK, KV_HEADS, DIM) for _ in range(2))
    order = (torch.randperm(num_blocks, generator=generator) + 1).view(len(rows), MAX_BLOCKS)
    total = sum(new for _, new in rows) + padding
    query = random(1, HEADS, total, DIM)
    key, value = (random(1, KV_HEADS, total, DIM) for _ in range(2))

    places, tables, positions, parts, histories, first = [], [], [], [], [], 0
    for row, (cached, new) in enumerate(rows):
        own = order[row]
        history = [(own[p // BLOCK], p % BLOCK) for p in range(cached + new)]
        for index in range(new):
            block, place = history[cached + index]
            places.append(int(block) * BLOCK + place)
            tables.append(own)
            positions.append(cached + index)
            histories.append((first + index, history[: cached + index + 1]))
        parts.append((first, new, cached, own[: -(-(cached + new) // BLOCK)]))
        first += new
    for _ in range(padding):
        places.append(0)
        tables.append(torch.zeros_like(order[0]))
        positions.append(0)
    batch = Batch([keys], [values], torch.tensor(places))
    if one_by_one:
        batch.parts = parts
    else:
        batch.tables, batch.positions = torch.stack(tables), torch.tensor(positions)

    layer = types.SimpleNamespace(layer_idx=0)
    output, weights = paged_attention(layer, query, key, value, None, paged=batch, scaling=0.3)
    assert weights is None
    assert output.shape == (1, total, HEADS, DIM)
    for token, history in histories:
        k = torch.stack([keys[block, place] for block, place in history])
        v = torch.stack([values[block, place] for block, place in history])
        assert torch.equal(k[-1], key[0, :, token])  # the new key was written where the table says
        expected = written_out(query[0, :, token], k, v, 0.3)
        assert torch.allclose(output[0, token].double(), expected, atol=1e-5)


@pytest.mark.parametrize("count", [1, 5])
def test_on_a_cpu_a_row_is_bitwise_the_same_alone_and_among_others(count):
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(20, BLOCK, KV_HEADS, DIM, generator=generator) for _ in range(2))
    query = torch.randn(1, HEADS, 3 * count, DIM, generator=generator)
    key, value = (torch.randn(1, KV_HEADS, 3 * count, DIM, generator=generator) for _ in range(2))
    blocks = [torch.arange(1 + 5 * row, 6 + 5 * row) for row in range(3)]
    position = 3
    places = torch.cat([b[(torch.arange(count) + position) // BLOCK] * BLOCK + (torch.arange(count) + position) % BLOCK
                        for b in blocks])  # fmt: skip
    parts = [(row * count, count, position, blocks[row][: -(-(position + count) // BLOCK)]) for row in range(3)]
    layer = types.SimpleNamespace(layer_idx=0)

    def attend(chosen):
        batch = Batch([keys.clone()], [values.clone()], places, parts=chosen)
        return paged_attention(layer, query, key, value, None, paged=batch, scaling=0.3)[0]

    together = attend(parts)
    for row in range(3):
        alone = attend(parts[row : row + 1])
        assert torch.equal(alone[0, row * count : (row + 1) * count], together[0, row * count : (row + 1) * count])

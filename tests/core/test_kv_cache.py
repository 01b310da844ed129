"""The books of the block pool: nothing is lost, nothing is given out twice."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncbatch.kv_cache import NOBODY, KVCache, blocks_for, place


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_blocks_for_is_just_enough(tokens, block_size):
    blocks = blocks_for(tokens, block_size)
    assert blocks * block_size >= tokens
    assert (blocks - 1) * block_size < tokens or blocks == 0


@given(st.integers(1, 12), st.integers(1, 4), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40)), max_size=60))
def test_every_block_is_free_or_in_exactly_one_table(num_blocks, block_size, operations):
    """Random growing and pruning (0 tokens stands for prune) against a model that only counts."""
    kv = KVCache(num_blocks, block_size, max_blocks_per_owner=40, max_owners=5)
    held = dict.fromkeys(range(5), 0)
    for owner, tokens in operations:
        before = {o: kv.table(o) for o in held}
        if tokens == 0:
            assert kv.prune(owner) == held[owner]
            held[owner] = 0
        else:
            need = max(blocks_for(tokens, block_size), held[owner])
            fits = need - held[owner] <= num_blocks - sum(held.values())
            assert kv.allocate(owner, tokens) == fits
            if fits:
                held[owner] = need
                assert kv.table(owner)[: len(before[owner])] == before[owner]  # a table only grows at its end
            else:
                assert kv.table(owner) == before[owner]  # all or nothing
        tables = {o: kv.table(o) for o in held}
        blocks = [block for table in tables.values() for block in table]
        assert {o: len(table) for o, table in tables.items()} == held
        assert len(set(blocks)) == len(blocks)
        assert all(1 <= block <= num_blocks for block in blocks)
        assert kv.num_free == num_blocks - len(blocks)
        for block in range(1, num_blocks + 1):
            owners = [o for o, table in tables.items() if block in table]
            assert [kv.owner_of[block]] == (owners or [NOBODY])


def test_an_allocation_can_be_told_to_leave_blocks_free():
    kv = KVCache(num_blocks=4, block_size=2, max_blocks_per_owner=4, max_owners=2)
    assert not kv.allocate(1, 6, keep_free=2)
    assert kv.num_free == 4
    assert kv.allocate(1, 4, keep_free=2)
    assert kv.allocate(1, 4, keep_free=4)  # nothing more is needed


def test_tables_of_a_batch_come_as_one_array_that_ends_in_zeros():
    kv = KVCache(num_blocks=6, block_size=2, max_blocks_per_owner=3, max_owners=3)
    kv.allocate(7, 5)
    kv.allocate(3, 1)
    tables = kv.tables([3, 7])
    assert tables.dtype == np.int32
    assert tables.tolist() == [[*kv.table(3), 0, 0], kv.table(7)]
    kv.prune(7)
    kv.allocate(9, 1)
    assert kv.tables([9]).tolist() == [[*kv.table(9), 0, 0]]  # nothing of the pruned owner is left in its row


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 7), st.randoms(use_true_random=False))
def test_every_token_has_a_place_of_its_own_in_a_block_of_its_owner(lengths, block_size, random):
    """However the tables grew into each other; and one line serves a number, NumPy and torch."""
    kv = KVCache(200, block_size, max_blocks_per_owner=40, max_owners=len(lengths))
    grown = [(owner, upto) for owner, length in enumerate(lengths) for upto in range(1, length + 1)]
    random.shuffle(grown)
    for owner, upto in grown:
        assert kv.allocate(owner, upto)
    tables = kv.tables(list(range(len(lengths))))
    rows = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.concatenate([np.arange(length) for length in lengths])
    places = place(tables, rows, positions, block_size)
    assert len(set(places.tolist())) == len(places)
    assert (kv.owner_of[places // block_size] == rows).all()
    assert (places % block_size == positions % block_size).all()
    one_by_one = [place(tables, row, position, block_size) for row, position in zip(rows, positions, strict=True)]
    assert one_by_one == places.tolist()
    on_device = place(torch.from_numpy(tables), torch.from_numpy(rows), torch.from_numpy(positions), block_size)
    assert on_device.dtype == torch.int64
    assert on_device.tolist() == places.tolist()


def test_a_table_that_was_given_back_is_forgotten_and_giving_back_twice_gives_nothing():
    kv = KVCache(num_blocks=4, block_size=2, max_blocks_per_owner=4, max_owners=2)
    kv.allocate(1, 5)
    before = kv.table(1)
    assert kv.prune(1) == 3
    assert kv.table(1) == []
    assert kv.prune(1) == 0
    assert sorted(kv.free) == [1, 2, 3, 4]
    kv.allocate(0, 6)
    assert kv.table(0) == before  # the block given back last is handed out first

"""The KV cache as the host sees it: which block of the pool belongs to which request.

Attention reads the keys and values of all earlier tokens of a request. They are kept on the device, in a pool of blocks
with room for `block_size` tokens each. The *block table* of a request lists its blocks in order, and `place` says where
in the pool a token is (Kwon et al. 2023, "PagedAttention"). `KVCache` only keeps the books, in NumPy on the host: the
keys and values themselves never leave the device.

`allocate` adds blocks to a table, and `prune` gives back all blocks of a finished request. Block 0 belongs to nobody:
the rows of a batch that are only padding write there.
"""

from __future__ import annotations

import numpy as np

NOBODY = -1


def blocks_for(num_tokens: int, block_size: int) -> int:
    """How many blocks `num_tokens` tokens need: `num_tokens / block_size`, rounded up."""
    return -(-num_tokens // block_size)


def kv_bytes(layers: int, kv_heads: int, head_size: int, number_bytes: int) -> int:
    """Bytes of the keys and values of one token. In each layer, each key-value head keeps a key and a value. Each of
    these is `head_size` numbers of `number_bytes` bytes."""
    return 2 * layers * kv_heads * head_size * number_bytes


def place(tables, row, position, block_size: int):
    """The place in the pool, counted in tokens, of token number `position` of the request in row `row`.

    tables: one block table in each row. NumPy arrays or torch tensors; for arrays of rows and positions, an array."""
    return tables[row, position // block_size] * block_size + position % block_size


class KVCache:
    """The books of a pool of `num_blocks` blocks, numbered from 1. Owners are ints from 0 on, such as request numbers.
    Every block is either free or in the table of exactly one owner.

    owner_of: int64 [num_blocks + 1], the owner of each block, or NOBODY.
    free: the free blocks, as a stack: the block that was given back last is handed out first.
    """

    def __init__(self, num_blocks: int, block_size: int, max_blocks_per_owner: int, max_owners: int):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.owner_of = np.full(num_blocks + 1, NOBODY, np.int64)
        self.free = list(range(num_blocks, 0, -1))
        # The tables are the rows of one array. So NumPy gathers those of a batch at once, without a loop in Python.
        self._tables = np.zeros((max_owners, max_blocks_per_owner), np.int32)
        self._free_rows = list(range(max_owners - 1, -1, -1))
        self._row: dict[int, int] = {}
        self._used: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return len(self.free)

    def allocate(self, owner: int, num_tokens: int, keep_free: int = 0) -> bool:
        """Add blocks to the owner's table until it has room for `num_tokens` tokens, and return True.

        All or nothing: if fewer than `keep_free` blocks would stay free, none is added, and the result is False."""
        used = self._used.get(owner, 0)
        need = blocks_for(num_tokens, self.block_size) - used
        return need <= 0 or self._grow(owner, used, need, keep_free)

    def _grow(self, owner: int, used: int, need: int, keep_free: int) -> bool:
        """Hand out `need` blocks to an owner that has `used`. (Apart from `allocate`: most tokens need no block.)"""
        if need > len(self.free) - keep_free:
            return False
        if owner not in self._row:
            self._row[owner] = self._free_rows.pop()
        blocks = self.free[-need:][::-1]
        del self.free[-need:]
        self._tables[self._row[owner], used : used + need] = blocks
        self.owner_of[blocks] = owner
        self._used[owner] = used + need
        return True

    def prune(self, owner: int) -> int:
        """Give back all blocks of `owner`, and return how many there were: 0 for an owner without blocks.

        A block may have a new owner at once, even while a step that writes into it is still in flight. The new owner's
        step comes later on the same compute stream, and so do its writes.
        """
        blocks = self.table(owner)
        if blocks:
            self.owner_of[blocks] = NOBODY
            self.free.extend(reversed(blocks))  # so that the next owner gets them in the order of this table
            self.drop_table(owner)
        return len(blocks)

    def drop_table(self, owner: int) -> None:
        """Forget the owner's table. Only `prune` may call this: it gives back the blocks. KeyError without a table."""
        row = self._row.pop(owner)
        self._tables[row, : self._used.pop(owner)] = 0
        self._free_rows.append(row)

    def table(self, owner: int) -> list[int]:
        """The owner's blocks, in the order of its tokens; [] if it has none."""
        return self._tables[self._row[owner], : self._used[owner]].tolist() if owner in self._row else []

    def room(self, owner: int) -> int:
        """How many tokens the owner's blocks hold."""
        return self._used.get(owner, 0) * self.block_size

    def tables(self, owners: list[int]) -> np.ndarray:
        """The tables of several owners: int32 [len(owners), max_blocks_per_owner], with 0 after the end of each."""
        return self._tables[[self._row[owner] for owner in owners]]

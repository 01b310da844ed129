"""The KV cache, seen from the host: which block of the pool belongs to whom.

Attention reads the keys and values of every earlier token of a request. They lie on the device in a pool of blocks of
`block_size` tokens. A request's *block table* lists its blocks in order, and `place` says where in the pool a token is
(Kwon et al. 2023, "PagedAttention"). `KVCache` only keeps the books, in NumPy on the host: the keys and values
themselves never leave the device.

`allocate` grows a table, `prune` gives all blocks of a finished request back. Block 0 belongs to nobody: rows of a
batch that are only padding write there.
"""

from __future__ import annotations

import numpy as np

NOBODY = -1


def blocks_for(num_tokens: int, block_size: int) -> int:
    """How many blocks `num_tokens` tokens need: the quotient, rounded up."""
    return -(-num_tokens // block_size)


def kv_bytes(layers: int, kv_heads: int, head_size: int, number_bytes: int) -> int:
    """Bytes of the keys and values of one token: in each layer, each key-value head keeps a key and a value of
    `head_size` numbers of `number_bytes` bytes."""
    return 2 * layers * kv_heads * head_size * number_bytes


def place(tables, row, position, block_size: int):
    """Where in the pool token number `position` of the request in row `row` lies: its block times `block_size`, and on
    from there. `tables` has a block table in each row. NumPy or torch; arrays of rows and positions give an array."""
    return tables[row, position // block_size] * block_size + position % block_size


class KVCache:
    """Books of a pool of `num_blocks` blocks (numbered from 1) for owners that are any ints from 0, such as request
    numbers. Every block is either free or in exactly one owner's table.

    owner_of: int64 [num_blocks + 1], the owner of each block or NOBODY. free: the free blocks, a stack: the block given
    back last is handed out first."""

    def __init__(self, num_blocks: int, block_size: int, max_blocks_per_owner: int, max_owners: int):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.owner_of = np.full(num_blocks + 1, NOBODY, np.int64)
        self.free = list(range(num_blocks, 0, -1))
        # Tables are rows of one array, so that a batch's tables are one NumPy gather and not a Python loop.
        self._tables = np.zeros((max_owners, max_blocks_per_owner), np.int32)
        self._free_rows = list(range(max_owners - 1, -1, -1))
        self._row: dict[int, int] = {}
        self._used: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return len(self.free)

    def allocate(self, owner: int, num_tokens: int, keep_free: int = 0) -> bool:
        """Grow the owner's table until it holds `num_tokens` tokens. All or nothing: False if the pool has too few
        free blocks to do that and keep `keep_free` of them, and then nothing has changed."""
        used = self._used.get(owner, 0)
        need = blocks_for(num_tokens, self.block_size) - used
        return need <= 0 or self._grow(owner, used, need, keep_free)

    def _grow(self, owner: int, used: int, need: int, keep_free: int) -> bool:
        """Hand out `need` blocks to an owner that has `used`. (By itself, since most tokens need no new block.)"""
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
        """Give all blocks of `owner` back and return how many. An owner without blocks has nothing to give: 0.

        A block may be handed on at once, even while a step that still writes it is in flight: the next owner's step
        comes after that one on the same compute stream, so its writes come later too.
        """
        blocks = self.table(owner)
        if blocks:
            self.owner_of[blocks] = NOBODY
            self.free.extend(reversed(blocks))  # the next owner gets them in the order of the table
            self.drop_table(owner)
        return len(blocks)

    def drop_table(self, owner: int) -> None:
        """Forget the owner's table. Only `prune` does that, which sees to the blocks in it."""
        row = self._row.pop(owner)
        self._tables[row, : self._used.pop(owner)] = 0
        self._free_rows.append(row)

    def table(self, owner: int) -> list[int]:
        """The owner's blocks, in order of the tokens."""
        return self._tables[self._row[owner], : self._used[owner]].tolist() if owner in self._row else []

    def tables(self, owners: list[int]) -> np.ndarray:
        """The tables of several owners: int32 [len(owners), max_blocks_per_owner], 0 beyond each one's end."""
        return self._tables[[self._row[owner] for owner in owners]]

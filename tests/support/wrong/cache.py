"""Notebook 03: wrong answers to its exercises, as learners write them, and words that only the right message has."""

from __future__ import annotations

from asyncbatch.kv_cache import NOBODY, KVCache


def keys_only(layers, kv_heads, head_size, number_bytes):
    return layers * kv_heads * head_size * number_bytes


def one_layer(layers, kv_heads, head_size, number_bytes):
    return 2 * kv_heads * head_size * number_bytes


def one_head(layers, kv_heads, head_size, number_bytes):
    return 2 * layers * head_size * number_bytes


def always_four_bytes(layers, kv_heads, head_size, number_bytes):
    return 2 * layers * kv_heads * head_size * 4


def numbers_not_bytes(layers, kv_heads, head_size, number_bytes):
    return 2 * layers * kv_heads * head_size


def in_bits(layers, kv_heads, head_size, number_bytes):
    return 16 * layers * kv_heads * head_size * number_bytes


def in_one_piece(tables, row, position, block_size):
    return position


def entry_for_block(tables, row, position, block_size):
    return position // block_size * block_size + position % block_size + 0 * row


def block_alone(tables, row, position, block_size):
    return int(tables[row, position // block_size])


def first_of_block(tables, row, position, block_size):
    return tables[row, position // block_size] * block_size


def counts_from_one(tables, row, position, block_size):
    return tables[row, position // block_size] * block_size + position % block_size - 1


def always_row_0(tables, row, position, block_size):
    return tables[0, position // block_size] * block_size + position % block_size


def rows_and_entries_swapped(tables, row, position, block_size):
    return tables.T[position // block_size, max(row - 1, 0)] * block_size + position % block_size


def blocks_of_four(tables, row, position, block_size):
    return tables[row, position // 4] * 4 + position % 4


def as_pair(tables, row, position, block_size):
    return tables[row, position // block_size], position % block_size


def divided(tables, row, position, block_size):
    return tables[row, position / block_size] * block_size


def in_words(tables, row, position, block_size):
    return f"block {tables[row, position // block_size]}"


def returns_nothing(kv, owner):
    KVCache.prune(kv, owner)


def keeps_the_table(kv, owner):
    table = kv.table(owner)
    kv.owner_of[table] = NOBODY
    kv.free.extend(table)
    return len(table)


def keeps_the_owner(kv, owner):
    table = kv.table(owner)
    kv.free.extend(table)
    if table:
        kv.drop_table(owner)
    return len(table)


def frees_nothing(kv, owner):
    table = kv.table(owner)
    kv.owner_of[table] = NOBODY
    if table:
        kv.drop_table(owner)
    return len(table)


def drops_first(kv, owner):
    if kv.table(owner):
        kv.drop_table(owner)
    kv.free.extend(kv.table(owner))
    return len(kv.table(owner))


def appends_the_list(kv, owner):
    table = kv.table(owner)
    kv.owner_of[table] = NOBODY
    kv.free.append(table)
    kv.drop_table(owner)
    return len(table)


def frees_each_too_often(kv, owner):
    table = kv.table(owner)
    for _ in table:
        kv.free.extend(table)
    kv.owner_of[table] = NOBODY
    kv.drop_table(owner)
    return len(table)


def without_looking(kv, owner):
    table = kv.table(owner)
    kv.owner_of[table] = NOBODY
    kv.free.extend(table)
    kv.drop_table(owner)  # raises for an owner without a table
    return len(table)


def side_by_side(kv, owner):
    table = kv.table(owner)
    if not table:
        return 0
    neighbours = range(table[0], table[0] + len(table))
    kv.owner_of[list(neighbours)] = NOBODY
    kv.free.extend(neighbours)
    kv.drop_table(owner)
    return len(table)


WRONG = {
    "kv_bytes": {
        keys_only: "You count the keys only",
        one_layer: "You count one layer",
        one_head: "You count one head",
        always_four_bytes: "That is with 4 bytes a number",
        numbers_not_bytes: "how many numbers",
        in_bits: "Right in bits",
    },
    "place": {
        in_one_piece: "as if A lay in one piece at the pool's start. That is in block 0. The table says where: its "
        "entry 0 is block 1",
        block_alone: "block 1 begins at place 4",
        first_of_block: "that is its first place",
        counts_from_one: "2 % 4 = 2",
        always_row_0: "Your index sends token 4 of request B to place 8, in block 2. That block belongs to request A, "
        "whose token 4 lies there; B sits in row 1",
        rows_and_entries_swapped: "Your index sends token 4 of request B",
        blocks_of_four: "token 13 of request B to place 1, in block 0. That block belongs to nobody",
        as_pair: "Both parts are right",
        in_words: "one whole number",
        divided: "begins at place 4",
    },
    "prune": {
        returns_nothing: "Return how many blocks went back",
        keeps_the_table: "Block 3 is free, and B's table still lists it",
        keeps_the_owner: "`kv.owner_of[3]` still names B",
        frees_nothing: "Block 3 is lost",
        drops_first: "Read the table before you drop it",
        appends_the_list: "`extend` adds them one by one",
        frees_each_too_often: "Block 3 lies on `kv.free` twice",
        without_looking: "A request can be cancelled while it waits",
        side_by_side: "You gave block 2 back, which B still uses",
    },
}

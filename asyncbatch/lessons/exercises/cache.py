"""Exercises of notebook 03: `kv_bytes`, `place` and `prune`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ... import kv_cache
from ...kv_cache import NOBODY, KVCache
from ...pictures.picture import Picture
from ..blocks import RED, Pool, letter, listed, pool_picture
from ..parts import Case, Exercise

# ---- exercise 2: the place of a token --------------------------------------------------------------------------------

# Rows 0, 1 and 2 are requests A, B and C; below, how many tokens each has.
TABLES = np.array([[1, 2, 5, 7], [3, 4, 0, 0], [6, 8, 9, 0]])
LENGTHS = (14, 6, 11)


def _plain_place(function: Callable[..., Any], *args: Any) -> Any:
    """The learner's answer in plain numbers: those of NumPy are hard to read."""
    got = function(*args)
    if isinstance(got, tuple | list):
        return tuple(int(part) if isinstance(part, np.integer) else part for part in got)
    return int(got) if isinstance(got, np.integer) else got


def _place_pool(tables: np.ndarray, size: int) -> Pool:
    held = {row: [block for block in table if block] for row, table in enumerate(tables.tolist())}
    return Pool(11, size, held, dict(enumerate(LENGTHS)))


def _explain_place(args: tuple[Any, ...], got: Any, want: Any) -> str | None:
    """What the learner's index leads to, in the learner's terms."""
    tables, row, position, size = args
    who, entry, block, offset = letter(row), position // size, want // size, want % size
    if got == (block, offset):
        return "Both parts are right. Make one number of them: every block before this one has room for as many tokens."
    if not isinstance(got, int):
        return "A place is one whole number: it counts along the pool, block after block."
    hit = got // size
    if got == position:
        return (
            f"You took the token's number as its place, as if {who} lay in one piece at the pool's start. That is in "
            f"block {hit}. The table says where: its entry {entry} is block {block}."
        )
    if got == block:
        return f"That is the block. A place counts tokens: block {block} begins at place {block * size}."
    if got == block * size:
        return f"Block {block} is right, but that is its first place. Add the remainder of {position} / {size}."
    if hit == block:
        return f"Block {block} is right; the place in it is the remainder, {position} % {size} = {offset}."
    pool = _place_pool(tables, size)
    hurt = next((owner for owner, table in pool.tables.items() if owner != row and hit in table), None)
    sends = f"Your index sends token {position} of request {who} to place {got}, in block {hit}."
    if hurt is not None:
        token = list(pool.tables[hurt]).index(hit) * size + got % size
        return (
            f"{sends} That block belongs to request {letter(hurt)}, whose token {token} lies there; {who} sits in row "
            f"{row}, and entry {entry} of its table is block {block}."
        )
    whose = "belongs to nobody: only padding is written there" if hit == 0 else f"is not the one: it is block {block}"
    return f"{sends} That block {whose}."


def _place_picture(args: tuple[Any, ...], got: Any, want: Any) -> Picture:
    tables, row, position, size = args
    marks = [(want, "black", "right")]
    if isinstance(got, int):
        marks = [(want, "black", "yours, right")] if got == want else [*marks, (got, RED, "yours")]
    return pool_picture(_place_pool(tables, size), f"where token {position} of request {letter(row)} goes", marks)


# ---- exercise 3: prune -----------------------------------------------------------------------------------------------

A, B = 0, 1


class Books(NamedTuple):
    """The books after some calls of `prune`: what each call returned, the free blocks, the tables, and the owner of
    each block. tokens, pruned: for the picture, as in a `Pool`."""

    returned: list[Any]
    free: list[Any]
    tables: dict[int, list[int]]
    owner_of: list[int]
    tokens: dict[int, int]
    pruned: dict[int, list[int]]

    def __repr__(self) -> str:
        parts = [f"free {listed(self.free)}"]
        parts += [f"{letter(owner)} has {listed(table)}" for owner, table in self.tables.items() if table]
        parts.append(f"owner_of names {listed(dict.fromkeys(letter(o) for o in self.owner_of if o != NOBODY))}")
        return f"[{' | '.join(parts)} | returned {listed(self.returned)}]"


def _run_books(prune: Callable[[KVCache, int], Any], _: str, work: Sequence[tuple[str, int, int]]) -> Any:
    """Let requests grow, and prune some with the learner's function. Returns the `Books`, or `...` for an untouched
    stub."""
    kv, returned = KVCache(num_blocks=8, block_size=4, max_blocks_per_owner=4, max_owners=4), []
    tokens: dict[int, int] = {}
    pruned: dict[int, list[int]] = {}
    for what, owner, count in work:
        if what == "grow":
            kv.allocate(owner, count)
            tokens[owner] = count
            continue
        table = kv.table(owner)
        returned.append(prune(kv, owner))
        if returned[-1] is ...:
            return ...  # an untouched stub
        pruned |= {owner: table} if table else {}
    free = sorted(kv.free) if all(map(_is_block, kv.free)) else kv.free
    tables = {owner: kv.table(owner) for owner in tokens}
    return Books(returned, free, tables, kv.owner_of.tolist(), tokens, pruned)


def _is_block(thing: Any) -> bool:
    return isinstance(thing, int | np.integer)


def _explain_books(args: tuple[Any, ...], got: Any, want: Any) -> str | None:
    """The first thing that is wrong in the books, and what that would do to a server."""
    if not isinstance(got, Books):
        return None
    if not all(map(_is_block, got.free)):
        return "`kv.free` is a list of block numbers, and now something else lies on it: `extend` adds them one by one."
    held = {block: owner for owner, table in got.tables.items() for block in table}
    twice = [block for block in got.free if got.free.count(block) > 1]
    both = [block for block in held if block in got.free]
    lost = [block for block in range(1, 9) if block not in held and block not in got.free]
    if twice:
        return f"Block {twice[0]} lies on `kv.free` twice: the next two requests would both get it and write into it."
    if both:
        owner = letter(held[both[0]])
        if held[both[0]] not in got.pruned:
            return (
                f"You gave block {both[0]} back, which {owner} still uses. A request's blocks need not stand side by "
                "side: give back those in its table, and no others."
            )
        return (
            f"Block {both[0]} is free, and {owner}'s table still lists it. Prune {owner} again (a request can finish "
            "and be cancelled in one step), and two requests get the same block."
        )
    if lost:
        return (
            f"Block {lost[0]} is lost: it is in no table and not on `kv.free`, so nobody can have it again. Read the "
            "table before you drop it, and give back every block in it."
        )
    wrong = [block for block in range(1, 9) if got.owner_of[block] != want.owner_of[block]]
    if wrong:
        return (
            f"`kv.owner_of[{wrong[0]}]` still names {letter(got.owner_of[wrong[0]])}, though the block is free. It, "
            "the table and `kv.free` must agree: set it to NOBODY."
        )
    if got.returned != want.returned:
        return "The books are right. Return how many blocks went back: 0 for an owner that has none."
    return None


def _books_picture(args: tuple[Any, ...], got: Any, want: Any) -> Picture:
    pool = Pool(8, 4, got.tables, got.tokens, pruned=got.pruned, free=got.free)
    return pool_picture(pool, "the pool after your prune")


# fmt: off
EXERCISES = {
    "kv_bytes": Exercise(
        kv_cache.kv_bytes, "With layers={0}, kv_heads={1}, head_size={2}, number_bytes={3}", "says",
        (
            Case((1, 1, 64, 4), "One layer, one head: a key of 64 numbers and a value of 64 numbers, 4 bytes each.", (
                (256, "You count the keys only. Each token leaves a key and a value."),
                (128, "That is how many numbers there are. Each takes 4 bytes."),
                (64, "That is one key, in numbers. Each token leaves a key and a value, of 4 bytes a number."),
                (4096, "Right in bits: a byte is 8 of them."),
            )),
            Case((30, 1, 64, 4), "Every layer has keys and values of its own: 30 layers keep 30 times as much.", (
                (512, "You count one layer. Each of the 30 has keys and values of its own."),
            )),
            Case((30, 3, 64, 4), "Each of the 3 key-value heads keeps a key and a value of its own.", (
                (15360, "You count one head. Each of the 3 key-value heads keeps a key and a value of its own."),
            )),
            Case((32, 8, 128, 2), "This model's numbers have 2 bytes (bfloat16).", (
                (262144, "That is with 4 bytes a number. This model's numbers have 2: use `number_bytes`."),
            )),
        ),
        (
            "How many numbers does one head of one layer keep for a token? It keeps two things.",
            "A key and a value are `2 * head_size` numbers. Multiply by heads, layers, and bytes of a number.",
        ),
    ),
    "place": Exercise(
        kv_cache.place, "For token {2} of the request in row {1}, with blocks of {3} tokens,", "says",
        (
            Case((TABLES, 0, 2, 4), "Entry 2 // 4 = 0 of row 0's table is block 1, which begins at place 4."),
            Case((TABLES, 0, 9, 4), "Entry 9 // 4 = 2 of row 0's table is block 5, which begins at place 20."),
            Case((TABLES, 1, 4, 4), "Tokens 0 to 3 fill the first block; token 4 is the first in the next, block 4."),
            Case((TABLES, 2, 10, 4), "Entry 10 // 4 = 2 of row 2's table is block 9, which begins at place 36."),
            Case((TABLES, 1, 13, 8), "With blocks of 8, entry 13 // 8 = 1 is block 4, which begins at place 32."),
        ),
        (
            "First the entry of the table: how many full blocks are before this token? `position // block_size`.",
            "`tables[row, entry]` is the block. It begins at `block * block_size`, and the token lies "
            "`position % block_size` places further on.",
        ),
        answer=_plain_place, explain=_explain_place, picture=_place_picture,
    ),
    "prune": Exercise(
        KVCache.prune, "When {0},", "left this:",
        (
            Case(("A has 2 blocks, B has 2, and B is pruned", (("grow", A, 8), ("grow", B, 5), ("prune", B, 0))),
                 "B's blocks must be free, nobody's, and out of B's table; A's stay as they are."),
            Case(("A has 2 blocks, B has none, and B is pruned", (("grow", A, 8), ("prune", B, 0))),
                 "A request can be cancelled while it waits. It has no table to drop: return 0 and touch nothing."),
            Case(("B is pruned twice", (("grow", A, 8), ("grow", B, 5), ("prune", B, 0), ("prune", B, 0))),
                 "The second time there is nothing left to give: return 0 and touch nothing."),
            Case(("A and B grew in turns, and A is pruned",
                  (("grow", A, 4), ("grow", B, 4), ("grow", A, 8), ("grow", B, 8), ("prune", A, 0))),
                 "A's table is 1, 3 and B's is 2, 4: give back what A's table lists."),
        ),
        (
            "Read the table first, while it is there. If it is empty, there is nothing to do.",
            "`kv.owner_of[blocks] = NOBODY`, `kv.free.extend(blocks)` and `kv.drop_table(owner)`, if there are blocks; "
            "and in any case `return len(blocks)`.",
        ),
        answer=_run_books, explain=_explain_books, picture=_books_picture,
    ),
}
# fmt: on

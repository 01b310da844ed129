"""The pool gets what was asked for, or what fits, and what does not fit is refused with the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbatch.devices.cuda.memory import GIB, Memory, plan_blocks

MEMORIES = st.builds(
    Memory, st.just("a GPU"), st.just(80 * GIB), st.integers(0, 80 * GIB), st.integers(0, 8 * GIB)
)  # fmt: skip


@given(MEMORIES, st.integers(1, 10**6), st.integers(1, 10**4), st.integers(2**10, 2**24), st.booleans())
def test_a_planned_pool_fits_and_a_refused_one_does_not(memory, wanted, least, block_bytes, asked):
    wanted = max(wanted, least)
    needed = wanted if asked else least
    if (needed + 1) * block_bytes > memory.left:
        with pytest.raises(MemoryError, match=f"{needed}.*80.0 GiB"):
            plan_blocks(wanted, least, asked, block_bytes, memory)
        return
    blocks = plan_blocks(wanted, least, asked, block_bytes, memory)
    assert (blocks + 1) * block_bytes <= memory.left < memory.free - memory.step
    assert blocks == wanted if asked else least <= blocks <= wanted
    assert blocks == wanted or (blocks + 2) * block_bytes > memory.left  # nothing usable is left lying


def test_the_refusal_says_what_there_is_and_what_to_do():
    memory = Memory("a T4", 16 * GIB, 4 * GIB, GIB)
    with pytest.raises(MemoryError, match=r"num_blocks is 5000: they take 4.9 GiB \(1.00 MiB a block\)") as caught:
        plan_blocks(5000, 10, True, 2**20, memory)
    assert "12.0" in str(caught.value)
    assert "2.7 GiB are left" in str(caught.value)
    assert "at most 2743 blocks" in str(caught.value)
    with pytest.raises(MemoryError, match="Take a smaller max_length"):
        plan_blocks(5000, 3000, False, 2**20, memory)

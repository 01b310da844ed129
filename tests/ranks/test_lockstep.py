"""What comes in at the leader is done by all ranks before the same step, and ranks that differ are found. Real gloo,
one thread a rank."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbatch.ranks.collectives import PATIENCE
from asyncbatch.ranks.errors import RankError
from asyncbatch.ranks.lockstep import MOST_UNDER_WAY, Lockstep


def on_ranks(size, work):
    """What `work` returned, or raised, for each rank's `Lockstep`."""
    store = dist.HashStore()

    def one(rank):
        group = dist.ProcessGroupGloo(store, rank, size, PATIENCE)
        names = {None: f"rank {rank}", 0: "rank 0"}
        connection = SimpleNamespace(rank=rank, group_of_next_batcher=lambda: group, name=lambda who=None: names[who])
        patience = iter(range(10_000))  # of 2 ms each: what never comes fails the test, and does not stop it
        watch = SimpleNamespace(check=lambda: next(patience), progress=0, doing="")
        try:
            return work(Lockstep(connection, watch), rank)
        except RankError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


@settings(max_examples=15)
@given(
    st.lists(st.lists(st.one_of(st.integers(), st.binary(max_size=3000)), max_size=3), min_size=1, max_size=12),
    st.sampled_from([2, 3]),
)
def test_entries_are_done_one_step_later_by_all(given, size):
    def work(lockstep, rank):
        done = [lockstep.exchange(entries if rank == 0 else ["nobody asks a follower"]) for entries in given]
        return [*done, lockstep.exchange([])]

    assert on_ranks(size, work) == [[[], *given]] * size


def test_a_leader_goes_ahead_of_its_followers_and_no_further_than_the_messages_allow():
    def work(lockstep, rank):
        steps = 3 * MOST_UNDER_WAY
        for step in range(steps):
            lockstep.note_tokens(np.array([step], np.int32))
            lockstep.exchange([step] if step % 7 == 0 else [])
        return lockstep.digest, lockstep.watch.progress

    leader, follower = on_ranks(2, work)
    assert leader == follower == (leader[0], 3 * MOST_UNDER_WAY)


def row(number, position=3):
    return SimpleNamespace(state=SimpleNamespace(number=number), position=position, num_tokens=1)


@pytest.mark.parametrize(
    ("of_leader", "of_follower"),
    [
        (lambda it: it.note_tokens(np.array([5, 6], np.int32)), lambda it: it.note_tokens(np.array([5, 7], np.int32))),
        (
            lambda it: it.note_plan(SimpleNamespace(step=4, tokens=0, rows=[row(1), row(2)])),
            lambda it: it.note_plan(SimpleNamespace(step=4, tokens=0, rows=[row(2), row(1)])),
        ),
        (lambda it: it.note_plan(SimpleNamespace(step=4, tokens=0, rows=[row(1)])), lambda it: None),
    ],
)
def test_a_rank_that_differs_is_found_before_the_next_step_but_one(of_leader, of_follower):
    reached = []

    def work(lockstep, rank):
        for step in range(3 if rank == 0 else 5):  # as many messages as the other one reads
            lockstep.exchange([])
            if rank == 1:
                reached.append(step)
            if step == 1:
                (of_follower if rank == 1 else of_leader)(lockstep)
        return "all the same"

    leader, follower = on_ranks(2, work)
    assert leader == "all the same"
    assert isinstance(follower, RankError)
    assert "rank 1 and rank 0 are no longer the same" in str(follower)
    assert reached == [0, 1, 2]  # the message of step 2 is looked at before step 3

"""A rank that dies, hangs or fails ends all ranks: real processes, real signals. Each test asserts the one message
(rank and cause), the exit codes, what was kept, and that nobody is left.

No test fails because a machine is busy: who may judge is chosen so that only the planted fault can be found."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from support.rank_processes import LIMIT_S, LONG_S, Group, check_end, server

pytestmark = pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="asks /proc for processes")


@pytest.fixture
def group(tmp_path):
    made: list[Group] = []

    def make(faults, timeouts=None, **more) -> Group:
        made.append(Group(tmp_path, faults, timeouts or [LONG_S] * len(faults), **more))
        return made[-1]

    yield make
    for one in made:
        one.clean_up()


@pytest.mark.parametrize("others", ["wait", "blocked"])
def test_a_killed_rank(group, others):
    ranks = group([others, "wait", others], child=False, options={"grace_s": 0.5})
    ranks.ready()
    ranks.ranks[1].kill()
    assert ranks.ended() == [1, -signal.SIGKILL, 1]
    text = check_end(ranks, "rank 1 (host-1, pid 4001) is gone", by=0, alive=[0, 2])
    assert "without a word" in text
    assert ranks.kept(1) == []


def test_rank_0_is_killed_and_another_tells(group):
    ranks = group(["wait", "wait"], child=False)
    ranks.ready()
    ranks.ranks[0].kill()
    assert ranks.ended() == [-signal.SIGKILL, 1]
    check_end(ranks, "rank 0 (host-0, pid 4000) is gone", by=1, alive=[1])


def test_a_rank_that_ends_without_a_word_is_not_one_that_leaves(group):
    ranks = group(["wait", "exit"], child=False)
    assert ranks.ended() == [1, 0]
    check_end(ranks, "rank 1 (host-1, pid 4001) is gone", by=0, alive=[0])


def test_a_stopped_rank_is_gone_after_the_time_out_and_is_not_left_behind(group):
    ranks = group(["blocked", "wait"], [4.0, LONG_S], child=False, options={"grace_s": 0.5})
    ranks.ready()
    os.kill(ranks.ranks[1].pid, signal.SIGSTOP)
    assert ranks.ended() == [1, -signal.SIGKILL]
    text = check_end(ranks, "rank 1 (host-1, pid 4001) is gone: no sign of life for 4 s", by=0, alive=[0])
    assert "is stopped (SIGSTOP); before, it was serving, step 3: waiting for the device" in text


@pytest.mark.parametrize(
    ("fault", "cause"), [("raise", "ValueError: planted in step 3"), ("memory", "MemoryError: no 3 GB are left")]
)
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_fails_says_so_itself(group, fault, cause, culprit):
    faults = ["blocked", "blocked"]
    faults[culprit] = fault
    ranks = group(faults, options={"grace_s": 0.5})
    assert ranks.ended() == [1, 1]
    text = check_end(ranks, f"rank {culprit} (host-{culprit}, pid 400{culprit}) failed: {cause}", 0, alive=[0, 1])
    assert text.endswith(cause)
    assert "Traceback" in ranks.texts()[culprit]
    assert "Traceback" not in ranks.texts()[1 - culprit]


def test_what_follows_from_the_end_of_a_rank_is_not_the_cause(group):
    """Both others see a closed connection first."""
    ranks = group(["closed", "closed", "wait"], child=False)
    ranks.ready()
    ranks.ranks[2].kill()
    assert ranks.ended() == [1, 1, -signal.SIGKILL]
    check_end(ranks, "rank 2 (host-2, pid 4002) is gone", by=0, alive=[0, 1])


def test_a_closed_connection_without_another_cause_is_told_after_the_time_out(group):
    ranks = group(["blocked", "closed"], [LONG_S, 8.0], options={"grace_s": 0.5}, allowance_s=LONG_S)
    assert ranks.ended() == [1, 1]
    check_end(ranks, "rank 1 (host-1, pid 4001) failed: RuntimeError: [gloo", by=0, alive=[0, 1])


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_whose_heart_beats_and_that_does_nothing_hangs(group, culprit):
    """The other one waits in a lock too, as in a collective that nobody answers."""
    faults = ["blocked", "blocked"]
    faults[culprit] = "stuck"
    # Only progress has a short allowance, the same for both: hearts may be late by LONG_S.
    ranks = group(faults, options={"grace_s": 0.5}, allowance_s=4.0)
    assert ranks.ended() == [1, 1]
    text = check_end(ranks, f"rank {culprit} (host-{culprit}, pid 400{culprit}) hangs: no progress for 4 s", 0, [0, 1])
    assert f"rank {1 - culprit}: serving, step 3: waiting for the device since" in text


def test_sigterm_ends_all_and_names_who_was_told(group):
    ranks = group(["blocked", "blocked"], options={"grace_s": 0.5})
    ranks.ready()
    ranks.ranks[1].terminate()
    assert ranks.ended() == [1, 1]
    check_end(ranks, "rank 1 (host-1, pid 4001) was told to end (SIGTERM)", by=0, alive=[0, 1])


def test_sigterm_after_a_kill_names_the_one_that_was_killed(group):
    """As torchrun's agent does it."""
    ranks = group(["blocked", "wait", "blocked"], child=False, options={"grace_s": 0.5})
    ranks.ready()
    ranks.ranks[1].kill()
    ranks.ranks[1].join()
    for rank in (0, 2):
        ranks.ranks[rank].terminate()
    assert ranks.ended() == [1, -signal.SIGKILL, 1]
    check_end(ranks, "rank 1 (host-1, pid 4001) is gone", by=0, alive=[0, 2])


def host(pipe) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    time.sleep(600)


@pytest.fixture
def agent():
    """A process that hosts the store, as torchrun's agent does."""
    here, there = server().Pipe()
    process = server().Process(target=host, args=(there,), daemon=True)
    process.start()
    yield process, here.recv()
    process.kill()
    process.join()


def connected(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=LIMIT_S))


GONE = "the store that connects the ranks is gone"


@pytest.mark.parametrize(
    ("sign", "timeouts", "told"),
    [
        (signal.SIGKILL, [LONG_S, LONG_S], GONE),
        # (Rank 1 finds it out, and rank 0, which would not for long, is told by it and tells the user.)
        (signal.SIGSTOP, [LONG_S, 6.0], "the store that connects the ranks has not answered for 6 s"),
    ],
)
def test_the_store_is_gone_or_silent(group, agent, sign, timeouts, told):
    process, port = agent
    ranks = group(["blocked", "blocked"], timeouts, port=port, options={"grace_s": 0.5}, allowance_s=LONG_S)
    ranks.ready(connected(port))
    os.kill(process.pid, sign)
    assert ranks.ended() == [1, 1]
    check_end(ranks, told, by=0, alive=[0, 1])


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_the_store_is_gone_and_a_rank_is_slow(group, agent, slow):
    """It finds out when the others have told and ended. It is not for it to tell again, nor to call them lost."""
    process, port = agent
    ranks = group(["blocked"] * 3, port=port, child=False, options={"grace_s": 0.5})
    ranks.ready(connected(port))
    ranks.stop(slow)
    process.kill()
    for other in {0, 1, 2} - {slow}:
        ranks.ranks[other].join(LIMIT_S)
    os.kill(ranks.ranks[slow].pid, signal.SIGCONT)
    assert ranks.ended() == [1, 1, 1]
    check_end(ranks, GONE, by=0 if slow else 1, alive=[0, 1, 2])


def test_the_rank_that_hosts_the_store_has_ended_when_a_slow_one_looks(group):
    """The store ends with rank 0: what that one has said is known all the same, and is the cause."""
    ranks = group(["when", "blocked"], host=0, child=False, options={"grace_s": 0.5})
    store = connected(ranks.port())
    ranks.ready(store)
    ranks.stop(1)
    store.add("raise", 1)
    ranks.ranks[0].join(LIMIT_S)
    os.kill(ranks.ranks[1].pid, signal.SIGCONT)
    assert ranks.ended() == [1, 1]
    check_end(ranks, "rank 0 (host-0, pid 4000) failed: ValueError: planted when asked to", by=0, alive=[0, 1])


def test_a_rank_that_runs_and_does_not_tell_is_not_waited_for_until_the_agent_kills(group):
    """It is the lowest one, its process is there, and none of its threads gets to anything."""
    ranks = group(["frozen", "when"], child=False)
    ranks.ready()
    end = time.monotonic() + LIMIT_S
    while not ((ranks.folder / "frozen").exists() and (ranks.folder / "frozen").read_bytes()):
        assert time.monotonic() < end, ranks.texts()
        time.sleep(0.02)
    ranks.store.add("raise", 1)
    ranks.ranks[1].join(LIMIT_S)
    assert ranks.ranks[1].exitcode == 1
    os.kill(ranks.ranks[0].pid, signal.SIGTERM)
    assert ranks.ended() == [1, 1]
    check_end(ranks, "rank 1 (host-1, pid 4001) failed: ValueError: planted when asked to", by=1, alive=[0, 1])


@pytest.mark.parametrize("first", [0, 1, 2])
def test_ranks_leave_in_any_order(group, first):
    """The first one leaves; the others go on until they are asked to leave as well."""
    faults = ["until"] * 3
    faults[first] = "leave"
    ranks = group(faults)
    ranks.ready()
    ranks.ranks[first].join(LIMIT_S)
    assert ranks.ranks[first].exitcode == 0
    count = ranks.store.add("turns", 0)
    while ranks.store.add("turns", 0) < count + 100:  # those that are left have looked at each other
        time.sleep(0.02)
    ranks.store.add("leave", 1)
    assert ranks.ended() == [0, 0, 0]
    assert ranks.messages() == []
    assert [ranks.kept(rank) for rank in range(3)] == [[], [], []]

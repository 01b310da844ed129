"""Replicas and their watch on real ranks, with torchrun's agent and the real batcher on a CPU."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from support.rank_replicas import FAULTY, OPTIONS, REQUESTS, main
from support.tiny import tiny_model
from support.workers import forked_ranks

from asyncbatch import SyncBatcher
from asyncbatch.ranks.errors import RankError
from asyncbatch.ranks.launch import on_ranks
from asyncbatch.ranks.neighbour import ENDED, Neighbour

pytestmark = pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="asks /proc for processes")


def run(folder: Path, fault: str) -> tuple[RankError | None, list[str], list]:
    """(how the run failed, what each rank wrote to standard error, rank 0's answers). Fails if a process of it is left:
    a rank's own, or the one that computes for it."""
    error = None
    with forked_ranks():
        try:
            on_ranks(2, main, folder, fault)
        except RankError as raised:
            error = raised
    texts = [(folder / f"stderr-{rank}").read_text(encoding="utf-8") for rank in (0, 1)]
    processes = [
        Neighbour(int(pid), begun)
        for rank in (0, 1)
        for pid, begun in map(str.split, (folder / f"processes-{rank}").read_text().splitlines())
    ]
    assert len(set(processes)) == 4
    end = time.monotonic() + 240
    while any(process.state() != ENDED for process in processes) and time.monotonic() < end:
        time.sleep(0.1)
    assert [process.state() for process in processes] == [ENDED] * len(processes), texts
    answers = folder / "answers.json"
    assert answers.exists(), texts
    return error, texts, json.loads(answers.read_text(encoding="utf-8"))


def tokens() -> list[list[int]]:
    """Those of one process."""
    with SyncBatcher(tiny_model(), **OPTIONS) as batcher:
        return [list(answer.token_ids) for answer in batcher.run(REQUESTS)]


def test_two_replicas_give_the_tokens_of_one_process_in_the_order_given(tmp_path):
    """First the synchronous batcher's, then the asynchronous one's."""
    error, texts, answers = run(tmp_path, "serve")
    assert error is None, texts
    assert answers == 2 * [["length", one, "None"] for one in tokens()]
    assert not any("asyncbatch: " in text for text in texts)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("kill", "is gone: its process has ended without a word"),
        ("raise", "failed: MemoryError: planted in a step"),
    ],
)
def test_a_lost_rank_ends_the_run_with_one_message_and_what_is_finished_is_kept(fault, cause, tmp_path):
    failed, texts, answers = run(tmp_path, fault)
    assert failed is not None
    (message,) = [line for text in texts for line in text.splitlines() if line.startswith("asyncbatch: ")]
    assert message.startswith(f"asyncbatch: rank {FAULTY} (here, pid ")
    assert cause in message
    finished = [(index, one) for index, (reason, one, _) in enumerate(answers) if reason == "length"]
    assert len(finished) > 0
    expected = tokens()
    assert all(one == expected[index] for index, one in finished if index < len(expected))
    assert {reason for reason, _, _ in answers} == {"length", "error"}
    lost = [error for reason, _, error in answers if reason == "error"]
    assert lost
    assert {f"asyncbatch: {error}. All ranks end." for error in lost} == {message}

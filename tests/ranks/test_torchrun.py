"""Replicas and their watch under `torchrun`, with the real batcher on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.rank_processes import LIMIT_S
from support.rank_replicas import FAULTY, OPTIONS, REQUESTS
from support.tiny import tiny_model

from asyncbatch import SyncBatcher

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "rank_replicas.py"
pytestmark = pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="asks /proc for processes")


def torchrun(folder: Path, fault: str) -> tuple[int, str, list]:
    """(exit code, what was printed, what rank 0 wrote). Fails if a process of the run is left."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(SCRIPT), str(folder), fault]
    mark = {"ASYNCBATCH_TEST_RUN": str(folder)}  # what belongs to this run is known by it: workers inherit it
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, **mark, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=2 * LIMIT_S)
    end = time.monotonic() + 30
    while left_behind(folder) and time.monotonic() < end:
        time.sleep(0.1)
    assert left_behind(folder) == [], ran.stderr
    answers = folder / "answers.json"
    assert answers.exists(), ran.stderr
    return ran.returncode, ran.stderr, json.loads(answers.read_text(encoding="utf-8"))


def left_behind(folder: Path) -> list[str]:
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"ASYNCBATCH_TEST_RUN={folder}".encode() in environment.read_bytes().split(b"\0"):
                found.append(environment.parent.name)
        except OSError:
            continue
    return found


def tokens() -> list[list[int]]:
    """Those of one process."""
    with SyncBatcher(tiny_model(), **OPTIONS) as batcher:
        return [list(answer.token_ids) for answer in batcher.run(REQUESTS)]


def test_two_replicas_give_the_tokens_of_one_process_in_the_order_given(tmp_path):
    """First the synchronous batcher's, then the asynchronous one's."""
    code, text, answers = torchrun(tmp_path, "serve")
    assert code == 0, text
    assert answers == 2 * [["length", one, "None"] for one in tokens()]
    assert "asyncbatch: " not in text


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("kill", "is gone: its process has ended without a word"),
        ("raise", "failed: MemoryError: planted in a step"),
    ],
)
def test_a_lost_rank_ends_the_run_with_one_message_and_what_is_finished_is_kept(fault, cause, tmp_path):
    code, text, answers = torchrun(tmp_path, fault)
    assert code != 0
    (message,) = [line for line in text.splitlines() if line.startswith("asyncbatch: ")]
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

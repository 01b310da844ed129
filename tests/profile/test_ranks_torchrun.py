"""The profiling script with real ranks: torchrun, two processes on the CPU, gloo between them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.workers import forked_ranks

from asyncbatch.profile import __main__ as script
from asyncbatch.ranks.errors import RankError
from asyncbatch.ranks.launch import on_ranks
from asyncbatch.ranks.serving import OnRanks
from asyncbatch.timeline import load_trace

pytest.importorskip("transformers.distributed")
ROOT = Path(__file__).parents[2]
PATIENCE = 900  # seconds, for a minute's work
TINY = ("--model", "random:tiny", "--batch-size", "3", "--tp", "2")


@contextlib.contextmanager
def torchrun(*arguments, **options):
    """The profiling script on two ranks, as a process group that ends with the block."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)  # or transformers' attention would be an interpreted kernel
    process = subprocess.Popen(
        [*command, "-m", "asyncbatch.profile", *arguments], env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_two_ranks_measure_one_thing_and_one_of_them_says_it(tmp_path):
    arguments = (*TINY, "--requests", "5", "--new-tokens", "12", "--repeats", "2",
                 "--engine", "asyncbatch,transformers",
                 "--mode", "sync,async", "--json", "--out", str(tmp_path))  # fmt: skip
    with torchrun(*arguments) as process:
        out, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, error
    report = json.loads(out)  # once, and nothing else
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["same_tokens"] is True
    assert (report["workload"]["tp"], report["workload"]["replicas"], report["workload"]["repeats"]) == (2, 1, 2)
    assert report["command"].startswith("torchrun --nproc-per-node 2 -m asyncbatch.profile --model random:tiny")
    assert "2 ranks, 2 of them share a model" in report["device"]
    runs = {(run["engine"], run["mode"]): run for run in report["runs"]}
    assert list(runs) == [("asyncbatch", "sync"), ("asyncbatch", "async"), ("transformers", "sync")]
    assert [one["mode"] for one in report["failed"]] == ["async"], "transformers' asynchronous batching needs CUDA"
    for key, run in runs.items():
        assert run["tokens"] == 5 * 12
        zero, one = run["ranks"]
        assert [zero["rank"], one["rank"], zero["requests"], one["requests"]] == [0, 1, 5, None]
        assert zero["steps"] == one["steps"] == run["steps"]
        assert run["idle"] == pytest.approx((zero["idle"] + one["idle"]) / 2)
        assert all(rank["clock_error_s"] is None for rank in run["ranks"]), "one machine has one clock"
        (slowest,) = run["slowest"]
        if key[0] == "asyncbatch":
            # Each rank's time in collectives is the exchange, the same for both, and its own waiting.
            parts = [rank["collectives_s"] - rank["waiting_s"] for rank in run["ranks"]]
            assert parts[0] == pytest.approx(parts[1])
            assert all(0 < rank["in_collectives"] <= 1 for rank in run["ranks"])
            assert slowest["rank"] == min(run["ranks"], key=lambda rank: rank["waiting_s"])["rank"]
            assert slowest["seen_in"] == "collectives"
        else:
            assert slowest["seen_in"] == "step lengths"
    timelines = load_trace(tmp_path / "trace.json")
    labels = [f"{run}, rank {rank}" for run in ("sync", "async", "transformers sync") for rank in (0, 1)]
    assert [timeline.label for timeline in timelines] == labels
    # The ranks of a run go through the same steps, at the same time: each step overlaps with itself.
    for zero, one in zip(timelines[0:4:2], timelines[1:4:2], strict=True):
        assert zero.steps == one.steps
        (_, _, starts, ends), (_, _, other_starts, other_ends) = zero.lane("compute"), one.lane("compute")
        assert (starts < other_ends).all()
        assert (other_starts < ends).all()
    assert (tmp_path / "report.html").stat().st_size > 50_000
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    told = [line for line in error.splitlines() if "warm-up" in line]
    assert len(told) == 3, "one rank speaks"


def profile(folder: Path, arguments: tuple[str, ...], told: str) -> None:
    """The profiling script as one of the ranks, on the CPU; what it writes goes to files in the folder. Rank 1 is
    killed in the 60th step after rank 0 has told this on standard error."""
    rank = os.environ["RANK"]
    for name, number in (("stdout", 1), ("stderr", 2)):
        with (folder / f"{name}-{rank}").open("w") as file:
            os.dup2(file.fileno(), number)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    if rank == "1":
        step, steps = OnRanks.step, iter(range(60))

        def mortal(batcher: OnRanks) -> bool:
            lines = (folder / "stderr-0").read_text().splitlines()
            if any(line.startswith(told) for line in lines) and next(steps, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(batcher)

        OnRanks.step = mortal
    script.main([*arguments, "--device", "cpu"])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks /proc for processes")
def test_a_rank_that_is_killed_ends_the_run_and_what_is_finished_is_written(tmp_path):
    """(torchrun's agent in this process; its ranks are forked.)"""
    arguments = (*TINY, "--requests", "20", "--new-tokens", "4-40", "--repeats", "1", "--out", str(tmp_path))
    with forked_ranks(), pytest.raises(RankError):
        on_ranks(2, profile, tmp_path, arguments, "async: run 1")
    victim = (tmp_path / "pid-1").read_text()
    out = (tmp_path / "stdout-0").read_text()
    assert (tmp_path / "stdout-1").read_text() == ""
    lines = [line for rank in (0, 1) for line in (tmp_path / f"stderr-{rank}").read_text().splitlines()]
    messages = [line for line in lines if "All ranks end" in line]
    assert len(messages) == 1, lines
    assert messages[0].startswith("asyncbatch: rank 1 (")
    assert f"pid {victim}" in messages[0]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["runs"][0]["mode"], report["runs"][0]["tokens"] > 0) == ("sync", True), "it was complete"
    assert len(report["runs"][0]["ranks"]) == 2
    (failed,) = report["failed"]
    assert failed["mode"] == "async"
    assert failed["error"] in messages[0]
    assert failed["error"] in out
    kept = json.loads((tmp_path / "completions.json").read_text())
    assert kept["mode"] == "async"
    assert all(4 <= len(one["token_ids"]) <= 40 and one["finish_reason"] == "length" for one in kept["finished"])
    numbers = [one["request"] for one in kept["finished"]]
    assert numbers == sorted(set(numbers))
    assert 0 < len(numbers) < 20

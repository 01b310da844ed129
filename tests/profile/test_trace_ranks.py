"""Several ranks in one call: a line for each, then the slowest. Nothing of one is mixed with a time of another."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from support.make_trace import US, Trace
from support.reports import call_script

from asyncbatch.profile.traces.events import TraceError
from asyncbatch.profile.traces.ranks import Ranks, trace_files
from asyncbatch.profile.traces.read import read_trace


@pytest.fixture
def call(capsys):
    """Run the script in this process: (exit status, standard output, standard error)."""
    return functools.partial(call_script, capsys)


def rank(number: int, folder: Path, own_us: int, collective_us: int, period_us: int = 1000, origin: int = 0) -> Path:
    """The trace of a rank, 25 steps of it: its own work, then an all-reduce. Its clock begins at `origin`."""
    trace = Trace()
    trace.origin += origin
    for begin in range(0, 25 * period_us * US, period_us * US):
        launch = trace.call("cudaGraphLaunch", begin, 5 * US)
        trace.kernel("gemm", begin + 10 * US, own_us * US, launch, device=number)
        trace.kernel(
            "ncclDevKernel_AllReduce_Sum_bf16", begin + (10 + own_us) * US, collective_us * US, launch, device=number
        )
        trace.call("cudaStreamSynchronize", begin + 6 * US, (own_us + collective_us + 6) * US)
    text = trace.text().replace('{"schemaVersion": 1', f'{{"distributedInfo": {{"rank": {number}, "world_size": 4}}', 1)
    path = folder / f"worker-{9 - number}.json"
    path.write_text(text)
    return path


def test_of_ranks_that_wait_for_each_other_the_slowest_waits_least(tmp_path, call):
    files = [rank(number, tmp_path, 700 - wait, 100 + wait, origin=number * 10**12)
             for number, wait in enumerate([50, 300, 0, 120])]  # fmt: skip
    ranks = Ranks.read(files[::-1])
    assert [report.rank for report in ranks.reports] == [0, 1, 2, 3]
    slowest, why = ranks.slowest
    assert slowest.rank == 2
    assert "it spends least of it in collectives" in why
    assert [round(1e6 * report.collectives_s) for report in ranks.reports] == [25 * 150, 25 * 400, 25 * 100, 25 * 220]
    by_step = ranks.reports[1].collectives_in_steps_s
    assert len(by_step) == len(ranks.reports[1].steps) == 25
    assert [round(1e6 * seconds) for seconds in by_step] == [400] * 25
    status, out, error = call("--trace", *files)
    assert (status, error) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["rank", "0", "1", "2", "3"]
    assert lines[1].split() == ["0", "25", "1.00", "ms", "20.00", "%", "80.00", "%", "15.12", "%", "worker-9.json"]
    assert lines[6].startswith("The slowest is rank 2: the steps of all take the same time (1.00 ms)")
    # Each line and the report below are what the file alone gives.
    assert str(read_trace(files[2])) in out
    for path, report in zip(files, ranks.reports, strict=True):
        assert read_trace(path).as_dict() == report.as_dict()


def test_of_ranks_with_steps_of_other_lengths_the_one_with_the_longest_is_the_slowest(tmp_path, call):
    files = [rank(0, tmp_path, 300, 100), rank(1, tmp_path, 500, 10, period_us=1500)]
    status, out, _ = call("--trace", *files, "--json")
    data = json.loads(out)
    assert (status, data["slowest"], data["failed"]) == (0, 1, [])
    assert data["ranks"] == [read_trace(path).as_dict() for path in files]
    assert "its steps take 1.50 ms, those of the fastest 1.00 ms" in str(Ranks.read(files))


def test_a_rank_whose_events_are_missing_has_no_figure_and_is_not_compared(tmp_path):
    files = [rank(number, tmp_path, 500, 100) for number in range(3)]
    files[1].write_text(files[1].read_text().replace('"cat": "kernel"', '"cat": "lost"', 6))
    ranks = Ranks.read(files)
    row = str(ranks).splitlines()[2].split()
    assert row[:2] == ["1", "-"]
    assert "events missing" in " ".join(row)
    assert ranks.slowest[0].rank != 1


def test_a_folder_is_all_traces_in_it_and_what_else_it_holds_is_only_said(tmp_path, call):
    files = [rank(number, tmp_path, 500, 100) for number in range(2)]
    (tmp_path / "config.json").write_text('{"model": "x"}')
    (tmp_path / "notes.txt").write_text("mine")
    assert trace_files([tmp_path, files[0]]) == sorted([*files, tmp_path / "config.json"])
    status, out, error = call("--trace", tmp_path, "--out", tmp_path / "out")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["rank", "0", "1"]
    assert error.count("\n") == 1
    assert "config.json holds no events: it is an object with the keys 'model'" in error
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    each = ["report.html", "report.json", "trace-timeline.png"]
    assert names == sorted(["report.json", *(f"rank-{number}/{name}" for number in (0, 1) for name in each)])
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [report["rank"] for report in written["ranks"]] == [0, 1]


def test_a_named_file_that_is_no_trace_fails_and_the_others_are_still_told(tmp_path, call):
    good, bad = rank(0, tmp_path, 500, 100), tmp_path / "bad.json"
    bad.write_text("[]")
    status, out, error = call("--trace", good, bad)
    assert status == 2
    assert out == f"{read_trace(good)}\n"
    assert error == f"asyncbatch.profile: {bad} holds no events: it is a list of nothing; expected a Chrome trace: a " \
        "list of events, or an object with traceEvents\n"  # fmt: skip
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(TraceError, match=r"is a folder without a file named \*\.json or \*\.json\.gz"):
        trace_files([empty])
    with pytest.raises(TraceError, match=r"bad\.json holds no events.*; .*none\.json cannot be read"):
        Ranks.read([bad, tmp_path / "none.json"])

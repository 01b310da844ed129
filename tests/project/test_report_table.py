"""`tools/report_table.py` prints the table of workloads from reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from asyncbatch.profile.report import Conditions, Failure, Gpu, Latency, MedianAndP99, Report, RequestFloor, Run
from tools import report_table

ROOT = Path(__file__).parents[2]


def run(workload: str, engine: str, mode: str, wall_s: float) -> Run:
    latency = Latency(first_token_ms=MedianAndP99(812.4, 2011.6))
    least = RequestFloor(4.05, wall_s / 4.05, 254, 1.44, 2.61)
    return Run(engine=engine, mode=mode, wall_s=wall_s, tokens=8192, tokens_per_s=8192 / wall_s, idle=0.0004,
               host_ms_per_step=0.3, device_ms_per_step=6.0, wasted_tokens=0, model="random:llama-8b", batch_size=32,
               workload=workload, latency=latency, request_floor=least, longest_gap_ms=1.234,
               wall_s_of_each_run=(wall_s, wall_s), setting="as it is" if engine != "asyncbatch" else None)  # fmt: skip


def report(*runs: Run, **more) -> Report:
    facts = dict(
        schema=4,
        model="random:llama-8b",
        device="NVIDIA H200",
        machine="Linux",
        date="2026-11-26T10:00:00+00:00",
        gpu=Gpu("NVIDIA H200", 139.8, "580.1", "9.0"),
        versions={"torch": "2.11.0", "transformers": "5.24.0"},
        copy_bandwidth_bytes_per_s=4.22e12,
        matmul_flops_per_s=7.1e14,
        workload=Conditions(),
        same_tokens=True,
        runs=runs,
    )
    return Report(**facts | more)


LONG = (run("long prompts", "asyncbatch", "async", 7.96), run("long prompts", "transformers", "async", 7.29))
MIXED = (run("mixed", "asyncbatch", "async", 13.8), run("mixed", "transformers", "async", 21.7))


def printed(capsys, tmp_path, *reports: Report) -> tuple[int, list[str], str]:
    paths = [tmp_path / f"{place}.json" for place in range(len(reports))]
    for path, one in zip(paths, reports, strict=True):
        path.write_text(json.dumps(one.to_json()))
    status = report_table.main(list(map(str, paths)))
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err


def test_the_table_of_several_calls_has_a_line_for_each_run_and_marks_a_faster_peer(capsys, tmp_path):
    status, lines, _ = printed(capsys, tmp_path, report(*LONG), report(*MIXED))
    assert status == 0
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:6]]
    assert {len(row) for row in table} == {12}
    assert table[1] == ["---"] * 3 + ["---:"] * 8 + ["---"]
    assert table[2] == ["long prompts", "asyncbatch", "async", "7.96", "1029", "0.04", "1.23", "812", "2012", "4.05",
                        "1.97x", ""]  # fmt: skip
    assert table[3][3:5] + table[3][-1:] == ["7.29", "1124", "wall time (1.092x)"]
    assert table[5][-1] == ""
    assert lines[7:] == [
        "long prompts: transformers async is faster than asyncbatch async in wall time (1.092x).",
        "asyncbatch: all runs of a workload gave the same tokens.",
        *(f"*{name}: NVIDIA H200, copy 4.22 TB/s, matrix products 710 TFLOP/s, torch 2.11.0, transformers 5.24.0, "
          "driver 580.1, the median of 2 runs, 2026-11-26.*" for name in ("long prompts", "mixed")),
        "*as it is.*",
    ]  # fmt: skip


def test_what_voids_the_numbers_or_is_missing_is_said(capsys, tmp_path):
    failed = Failure("transformers", "sync", "random:llama-8b", 32, "no memory", "mixed")
    bad = report(*MIXED, same_tokens=False, peers_same_tokens={"transformers": False}, failed=(failed,))
    text = "\n".join(printed(capsys, tmp_path, bad)[1])
    assert "The tokens differ: that is a fault" in text
    assert "transformers: sync and async gave different tokens." in text
    assert "mixed: transformers sync was not measured: no memory" in text
    assert "the same tokens" not in text
    assert "Nowhere is another engine faster" in text


def test_what_cannot_be_one_table_is_refused_in_one_line(capsys, tmp_path):
    again = report(*(replace(one, wall_s=7.0) for one in LONG))
    for reports, said in (
        ((report(*LONG), again), "long prompts, random:llama-8b, 32, asyncbatch, async stands in two of the reports"),
        ((report(),), "there is no run in it"),
    ):
        status, lines, error = printed(capsys, tmp_path, *reports)
        assert (status, lines) == (2, [])
        assert error == f"report_table.py: {said}\n"
    assert report_table.main([str(tmp_path / "none.json")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_it_is_said_how_the_table_is_made():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "python -m asyncbatch.profile --preset workloads --repeats 2 --out out\n" in text
    assert "python tools/report_table.py out/report.json\n" in text

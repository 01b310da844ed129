"""`python -m asyncbatch.profile --trace`, and the report as text, as a dict and as a picture."""

from __future__ import annotations

import functools
import io
import json

import pytest
from support.make_trace import engine
from support.reports import call_script
from support.traces import read

from asyncbatch.pictures import plot
from asyncbatch.profile import cli
from asyncbatch.profile.traces.events import TraceError
from asyncbatch.profile.traces.read import read_trace


@pytest.fixture
def call(capsys):
    """Run the script in this process: (exit status, standard output, standard error)."""
    return functools.partial(call_script, capsys)


def test_the_script_prints_the_report_as_a_table_or_as_json(call, tmp_path):
    path = engine(prefill_at=4, sampling=True, graphs=False).save(tmp_path / "run.pt.trace.json.gz")
    status, table, error = call("--trace", path)
    assert (status, error) == (0, "")
    report = read_trace(path)
    assert table == f"{report}\n"
    for part in (
        "run.pt.trace.json.gz",
        "0 (NVIDIA H100 80GB HBM3)",
        "7, one of 3",
        f"step active     {100 * report.step_active:.2f} %, idle",
        "idle between steps: ",
        "cudaStreamSynchronize (waiting)",
        "scheduler.py(88): plan",
        "more",
        "before step",
    ):
        assert part in table
    assert max(map(len, table.splitlines())) < 140
    status, out, error = call("--trace", path, "--json")
    assert (status, error) == (0, "")
    assert json.loads(out) == report.as_dict()


def test_the_report_as_a_dict(tmp_path):
    data = read(engine("async", steps=30), tmp_path).as_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["schema"] == 2
    assert data["steps"]["count"] == 30
    assert data["steps"]["ms_median"] == pytest.approx(0.327)
    assert data["graph_launches"] == {"calls": 30, "kernels": 240}
    for idle in data["idle"].values():
        assert sum(idle["by_cause"].values()) == pytest.approx(idle["s"])
    assert len(data["longest_gaps"]) == 20
    longest = [round(gap["ms"], 6) for gap in data["longest_gaps"]]
    assert longest == sorted(longest, reverse=True)


def test_out_has_the_report_and_a_picture(call, tmp_path):
    path = engine().save(tmp_path / "trace.json")
    status, _, error = call("--trace", path, "--out", tmp_path / "new" / "out")
    assert (status, error) == (0, "")
    assert json.loads((tmp_path / "new" / "out" / "report.json").read_text()) == read_trace(path).as_dict()
    assert (tmp_path / "new" / "out" / "trace-timeline.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in (tmp_path / "new" / "out").iterdir()) == [
        "report.html",
        "report.json",
        "trace-timeline.png",
    ]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model", "random:tiny"], "--model"),
        (["--batch-size", "4", "--seed", "3"], "--batch-size, --seed"),
        (["--mode", "sync"], "--mode"),
        (["--emulate", "h200-llama-8b"], "--emulate"),
        (["--host-work-ms", "3"], "--host-work-ms"),
    ],
)
def test_options_that_measure_are_refused_beside_a_trace(call, tmp_path, options, named):
    path = engine(steps=2).save(tmp_path / "trace.json")
    status, out, error = call("--trace", path, *options)
    assert (status, out) == (2, "")
    assert error.count("\n") == 1
    assert error.endswith(f"it cannot be had with {named}\n")


def test_an_out_that_cannot_be_written_is_refused_before_the_file_is_read(call, tmp_path):
    (tmp_path / "file").write_text("mine")
    status, out, error = call("--trace", tmp_path / "none.json", "--out", tmp_path / "file")
    assert (status, out) == (1, "")
    assert "none.json" not in error
    assert error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_debug_shows_where_it_went_wrong(tmp_path):
    with pytest.raises(TraceError, match="cannot be read"):
        cli.main(["--trace", str(tmp_path / "none.json"), "--debug"])


def test_names_stay_text_in_the_table_and_the_picture(tmp_path):
    trace = engine(steps=3)
    for event in trace.events:
        if event["name"].endswith("commit"):
            event["name"] = "x\n\x1b[31m<b>$_{y}$"
    report = read(trace, tmp_path)
    picture = io.BytesIO()
    plot(report.timeline()).savefig(picture)
    assert all(line.isprintable() for line in str(report).splitlines())

"""The profiling script as its users meet it: the command line, what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from asyncbatch import AsyncBatcher, Timeline, load_model, profile
from asyncbatch.timeline import load_trace

SMALL = ["--batch-size", "3", "--requests", "5", "--new-tokens", "6", "--repeats", "2"]
TINY = ["--model", "random:tiny", *SMALL]


@pytest.fixture(scope="module", autouse=True)
def _one_model():
    """All calls here share one model, and so one device process."""
    tiny = load_model("random:tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            profile, "load_model", lambda name, **kw: tiny if name == "random:tiny" else load_model(name, **kw)
        )
        yield


@pytest.fixture
def call(capsys):
    """Run the script in this process: (exit status, standard output, standard error)."""

    def run(*arguments):
        try:
            status = profile.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse ends so
            status = end.code
        return status, *capsys.readouterr()

    return run


def check_report(report, modes):
    assert report["schema"] == 1
    assert report["same_tokens"] is True
    assert isinstance(report["device"], str)
    assert [run["mode"] for run in report["runs"]] == modes
    for run in report["runs"]:
        assert run["engine"] == "asyncbatch"
        assert all(type(run[key]) is int for key in ("tokens", "steps", "decode_steps", "wasted_tokens"))
        assert run["tokens_per_s"] == pytest.approx(run["tokens"] / run["wall_s"])
        assert run["idle"] == pytest.approx(1 - run["device_active"])
        assert 0 < run["device_active"] <= 1
        assert 0 < run["decode_steps"] <= run["steps"]
        assert run["host_ms_per_step"] > 0
        assert run["device_ms_per_step"] > 0
        assert sorted(run["wall_s_of_each_run"])[0] == run["wall_s"]  # the lower median of two


def test_json_on_standard_output_is_the_report_and_nothing_else():
    command = [sys.executable, "-m", "asyncbatch.profile", *TINY, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    check_report(report, ["sync", "async"])
    assert report["model"] == "random:tiny"
    assert {run["tokens"] for run in report["runs"]} == {5 * 6}
    sync, other = (run["wall_s_of_each_run"] for run in report["runs"])
    assert report["async_speedup"] == pytest.approx((sync[0] / other[0] + sync[1] / other[1]) / 2)
    host, device = report["runs"][0]["host_ms_per_step"], report["runs"][0]["device_ms_per_step"]
    assert report["law_idle"] == pytest.approx(host / (host + device))
    assert report["workload"]["batch_size"] == 3
    assert report["command"].endswith("--repeats 2 --json")
    assert "Traceback" not in done.stderr


def test_out_has_the_same_report_a_picture_and_a_trace_of_both_runs(call, tmp_path):
    status, out, _ = call(*TINY, "--json", "--out", tmp_path / "new" / "folder")
    assert status == 0
    folder = tmp_path / "new" / "folder"
    report = json.loads(out)
    assert json.loads((folder / "report.json").read_text()) == report
    assert (folder / "timeline.png").read_bytes().startswith(b"\x89PNG\r\n")
    timelines = load_trace(folder / "trace.json")
    assert [timeline.label for timeline in timelines] == ["sync", "async"]
    for timeline, run in zip(timelines, report["runs"], strict=True):
        assert {key: run[key] for key in timeline.summary().as_dict()} == timeline.summary().as_dict()


def test_the_table_has_the_numbers_of_the_report(call, tmp_path):
    status, out, error = call(*TINY, "--out", tmp_path)
    assert status == 0
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {line[:20].strip(): line[20:].split() for line in out.splitlines()}
    sync, other = report["runs"]
    host = [f"{run['host_ms_per_step']:.3f}" for run in report["runs"]]
    assert ["sync", "async"] in [line.split() for line in out.splitlines()]
    assert rows["wall time"] == [f"{sync['wall_s']:.3f}", "s", f"{other['wall_s']:.3f}", "s"]
    assert rows["tokens"] == ["30", "30"]
    assert rows["device idle"] == [f"{100 * sync['idle']:.1f}", "%", f"{100 * other['idle']:.1f}", "%"]
    assert rows["host work per step"] == [host[0], "ms", host[1], "ms"]
    assert rows["steps"] == [str(sync["steps"]), str(other["steps"])]
    assert rows["wasted tokens"] == ["0", "0"]
    assert rows["async / sync speed"] == [f"{report['async_speedup']:.3f}x"]
    assert rows["same tokens"] == ["yes"]
    assert f"{report['law_idle']:.1%}" in out
    assert error.count("run 2 of 2") == 2


def test_one_mode_alone(call):
    status, out, _ = call(*TINY, "--mode", "async", "--json")
    report = json.loads(out)
    assert status == 0
    check_report(report, ["async"])
    assert report["async_speedup"] is None
    assert report["law_idle"] is None
    status, out, _ = call(*TINY, "--mode", "async")
    assert status == 0
    assert ["async"] in [line.split() for line in out.splitlines()]
    assert "speed" not in out


def test_runs_without_decode_steps_have_no_idle_share_and_say_so(call):
    arguments = [*TINY, "--new-tokens", "1"]
    report = json.loads(call(*arguments, "--json")[1])
    for run in report["runs"]:
        assert [run[key] for key in ("device_active", "idle", "host_ms_per_step", "device_ms_per_step")] == [None] * 4
        assert run["tokens"] == 5
    assert report["law_idle"] is None
    out = call(*arguments)[1]
    assert "could not be measured" in out
    assert "nan" not in out
    assert "By the law" not in out


def test_added_host_work_is_host_work_and_a_timed_device_says_so(call):
    report = json.loads(call(*TINY, "--host-work-ms", "3", "--step-ms", "0", "--json")[1])
    check_report(report, ["sync", "async"])
    assert all(run["host_ms_per_step"] >= 3 for run in report["runs"])
    assert report["device"].startswith("timed")
    report = json.loads(call(*TINY, "--step-ms", "4", "--mode", "sync", "--json")[1])
    assert report["runs"][0]["device_ms_per_step"] >= 4


def test_where_little_is_idle_it_says_how_to_see_more(call):
    assert "try\n--host-work-ms 30" in call(*TINY, "--step-ms", "200", "--mode", "sync", "--new-tokens", "3")[1]
    busy = call(*TINY, "--step-ms", "40", "--host-work-ms", "15")[1]
    assert "try\n--host-work-ms 30" not in busy
    assert busy.count("can save about") == 1
    assert "the host is the slower one" not in busy
    assert "the host is the slower one" in call(*TINY, "--step-ms", "4", "--host-work-ms", "15")[1]


def test_prompts_are_of_the_length_and_the_seed_given(call, monkeypatch):
    served, prompts = [], []

    class Watched(AsyncBatcher):
        def run(self, requests, *options):
            served.append(requests)
            return super().run(requests, *options)

    monkeypatch.setitem(profile.BATCHERS, "async", Watched)
    for seed in (0, 0, 1):
        assert call(*TINY, "--mode", "async", "--prompt-tokens", "7", "--seed", seed)[0] == 0
        prompts.append([request.token_ids for request in served[-1]])
    assert [len(prompt) for prompt in prompts[0]] == [7] * 5
    assert prompts[0] == prompts[1] != prompts[2]
    assert len({tuple(prompt) for prompt in prompts[0]}) == 5


def test_one_wrong_token_is_noticed(call, monkeypatch, tmp_path):
    class Wrong(AsyncBatcher):
        def commit(self, slot):
            if slot.step == 3:
                slot.output_ids[0] ^= 1
            super().commit(slot)

    monkeypatch.setitem(profile.BATCHERS, "async", Wrong)
    status, out, _ = call(*TINY, "--out", tmp_path)
    assert status == 1
    assert "tokens differ" in out
    assert json.loads((tmp_path / "report.json").read_text())["same_tokens"] is False
    assert call(*TINY, "--mode", "sync")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "random:huge"], "random:huge"),
        (["--model", "./no/such/folder"], "./no/such/folder"),
        (["--mode", "both"], "'both'"),
        (["--mode", ""], "''"),
        (["--mode", "sync,sync"], "'sync,sync'"),
        (["--batch-size", "0"], "--batch-size"),
        (["--batch-size", "100000000"], "--batch-size"),
        (["--requests", "-3"], "'-3'"),
        (["--new-tokens", "nan"], "--new-tokens"),
        (["--repeats", "1.5"], "'1.5'"),
        (["--slots", "0"], "--slots"),
        (["--slots", "1000"], "--slots"),
        (["--seed", "²"], "'²'"),
        (["--host-work-ms", "nan"], "--host-work-ms"),
        (["--host-work-ms", "-1"], "'-1'"),
        (["--step-ms", "inf"], "--step-ms"),
        (["--prompt-tokens", "1020"], "1020"),
        (["--prompt-tokens", "1000000000"], "1024"),
        (["--new-tokens", "2000"], "2000"),
    ],
)
def test_bad_input_is_one_line_that_names_it(call, arguments, named):
    status, out, error = call(*TINY, *arguments)
    assert (status, out) == (2, "")
    lines = [line for line in error.splitlines() if not line.startswith("usage:")]
    assert len(lines) == 1
    assert lines[0].startswith("asyncbatch.profile: ")
    assert named in lines[0]


def test_an_out_that_is_a_file_is_refused_before_anything_is_measured(call, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        status, out, error = call(*TINY, "--out", folder)
        assert (status, out) == (2, "")
        assert error.count("\n") == 1
        assert str(tmp_path / "file") in error
    assert (tmp_path / "file").read_text() == "mine"


def test_results_are_printed_even_if_they_cannot_be_written(call, tmp_path):
    (tmp_path / "report.json").mkdir()
    status, out, error = call(*TINY, "--json", "--out", tmp_path)
    assert status == 2
    assert json.loads(out)["same_tokens"] is True
    assert "report.json" in error.splitlines()[-1]


def test_debug_shows_where_it_went_wrong():
    with pytest.raises(ValueError, match="random:huge"):
        profile.main(["--model", "random:huge", "--debug"])


def test_a_device_that_fails_is_one_line_without_its_traceback(call, monkeypatch):
    class Lost(AsyncBatcher):
        def commit(self, slot):
            self.device.failure = lambda slot: "decode/greedy failed on the device:\nTraceback ...\nMemoryError: full"
            super().commit(slot)

    monkeypatch.setitem(profile.BATCHERS, "async", Lost)
    status, out, error = call(*TINY)
    assert (status, out) == (2, "")
    assert error.splitlines()[-1] == "asyncbatch.profile: decode/greedy failed on the device: MemoryError: full"
    assert "Traceback" not in error


def timeline(mode, host_ms, device_ms, idle_ms):
    """Ten decode steps: `idle_ms` between two of them, `host_ms` of host work in each."""
    made, period = Timeline(mode), device_ms + idle_ms
    for step in range(10):
        start = 1e-3 * step * period
        made.add("host", "plan", step, start, start + 1e-3 * host_ms)
        made.add("compute", "step", step, start, start + 1e-3 * device_ms)
        made.add_step(step, "decode", 1, 0)
    return made


def closing(sync, others):
    options = profile.parse_arguments([])
    runs = {"sync": [(sync, [])] * len(others), "async": [(other, []) for other in others]}
    result, _ = profile.report(options, runs, "none")
    text = profile.table(result)
    return result, text[text.index("same tokens") :]


def test_the_closing_sentences_fit_the_numbers():
    sync = timeline("sync", host_ms=2, device_ms=8, idle_ms=2)
    result, text = closing(sync, [timeline("async", 2, 8, 0)] * 3)
    assert result["law_idle"] == pytest.approx(0.2)
    saved = 1 - result["runs"][1]["wall_s"] / result["runs"][0]["wall_s"]
    assert f"{saved:.1%} less time" in text
    assert "20.0%" in text
    assert result["runs"][1]["idle"] == pytest.approx(0, abs=1e-9)
    assert "more time" in closing(sync, [timeline("async", 2, 8, 3)] * 3)[1]
    # Pairs that do not agree which is faster are no result.
    mixed = [timeline("async", 2, 8, idle) for idle in (1.9, 2.1, 1.8)]
    assert "about the same time" in closing(sync, mixed)[1]
    # A host slower than the device: what can be saved is the device's share, not the host's.
    result, text = closing(timeline("sync", 6, 2, 6), [timeline("async", 6, 2, 4)] * 3)
    assert result["law_idle"] == pytest.approx(0.75)
    assert "can save about 25.0%" in text
    assert not math.isnan(result["async_speedup"])

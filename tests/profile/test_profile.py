"""The profiling script as its users meet it: the command line, what it prints, what it writes, how it fails."""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import subprocess
import sys
import types

import pytest
import torch
from support.presets import pretend_gpu
from support.recordings import MODEL, SESSION, example, made_timeline, recorded, row_of
from support.reports import call_script, measured

from asyncbatch import AsyncBatcher, SyncBatcher, load_model
from asyncbatch.measure.recording import Recording
from asyncbatch.measure.steps import steps_of
from asyncbatch.measure.text import in_seconds
from asyncbatch.models import ModelError
from asyncbatch.profile import cli, turns
from asyncbatch.profile import session as profile
from asyncbatch.profile.floors import floor_numbers
from asyncbatch.profile.options import PRESETS
from asyncbatch.profile.report import Floor, ModelFacts, Report
from asyncbatch.profile.text import table
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
    return functools.partial(call_script, capsys)


def check_report(report, modes):
    assert report["schema"] == 5
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
        assert statistics.median(run["wall_s_of_each_run"]) == pytest.approx(run["wall_s"])


def test_json_on_standard_output_is_the_report_and_nothing_else():
    command = [sys.executable, "-m", "asyncbatch.profile", *TINY, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    check_report(report, ["sync", "async"])
    assert report["model"] == "random:tiny"
    assert {run["tokens"] for run in report["runs"]} == {5 * 6}
    sync, other = (run["wall_s_of_each_run"] for run in report["runs"])
    (comparison,) = report["comparisons"]
    assert comparison["pairs"] == pytest.approx([a / b for a, b in zip(sync, other, strict=True)])
    if report["async_speedup"] is not None:  # nothing disturbed this machine
        assert report["async_speedup"] == pytest.approx(sum(comparison["pairs"]) / 2)
    host, device = report["runs"][0]["host_ms_per_step"], report["runs"][0]["device_ms_per_step"]
    assert report["law_idle"] == pytest.approx(host / (host + device))
    assert report["workload"]["batch_size"] == 3
    assert report["command"].endswith("--repeats 2 --json")
    assert "Traceback" not in done.stderr


def test_out_has_the_same_report_a_picture_and_a_trace_of_both_runs(call, tmp_path):
    status, out, _ = call(*TINY, "--repeats", "1", "--json", "--out", tmp_path / "new" / "folder")
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
    assert rows["wall time"] == [part for run in report["runs"] for part in in_seconds(run["wall_s"]).split()]
    assert rows["tokens"] == ["30", "30"]
    assert rows["device idle"] == [f"{100 * sync['idle']:.1f}", "%", f"{100 * other['idle']:.1f}", "%"]
    assert rows["host work per step"] == [host[0], "ms", host[1], "ms"]
    assert rows["steps"] == [str(sync["steps"]), str(other["steps"])]
    assert rows["wasted tokens"] == ["0", "0"]
    speed = report["async_speedup"]
    assert rows.get("async / sync speed") == (None if speed is None else [f"{speed:.3f}x"])
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


@pytest.mark.parametrize(
    ("law", "little", "longer"), [(0.019, True, False), (0.02, False, False), (0.5, False, False), (0.51, False, True)]
)
def test_where_little_is_idle_it_says_how_to_see_more(law, little, longer):
    text = table(Report.from_json(measured()[0] | {"law_idle": law}))
    assert f"the synchronous device is idle for {law:.1%} of a step" in text
    assert ("try\n--host-work-ms 30" in text) == little
    assert ("the host works longer than the device" in text) == longer


def test_prompts_are_of_the_length_and_the_seed_given(call, monkeypatch):
    served, prompts = [], []

    class Watched(AsyncBatcher):
        def run(self, requests, *options):
            served.append(requests)
            return super().run(requests, *options)

    monkeypatch.setitem(turns.BATCHERS, "async", Watched)
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

    monkeypatch.setitem(turns.BATCHERS, "async", Wrong)
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
        (["--engine", "vllm"], "'vllm'"),
        (["--prefill-tokens", "0"], "--prefill-tokens"),
        (["--preset", "everything"], "'everything'"),
        (["--record", "../mine"], "'../mine'"),
        (["--record", "mine"], "--record mine needs --out DIR"),
        (["--emulate", "nobody"], "no recording 'nobody'"),
        (["--step-ms", "3", "--preset", "headline"], "--step-ms and --preset"),
        (["--step-ms", "3", "--engine", "transformers"], "--step-ms"),
        (["--host-work-ms", "3", "--engine", "asyncbatch,transformers"], "--host-work-ms"),
    ],
)
def test_bad_input_is_one_line_that_names_it(call, arguments, named):
    status, out, error = call(*TINY, *arguments)
    assert (status, out) == (2, "")
    lines = [line for line in error.splitlines() if not line.startswith("usage:")]
    assert len(lines) == 1
    assert lines[0].startswith("asyncbatch.profile: ")
    assert named in lines[0]


def test_debug_shows_where_it_went_wrong():
    with pytest.raises(ValueError, match="random:huge"):
        cli.main(["--model", "random:huge", "--debug"])


def test_a_device_that_fails_is_one_line_without_its_traceback(call, monkeypatch):
    class Lost(AsyncBatcher):
        def commit(self, slot):
            self.device.failure = lambda slot: "decode/greedy failed on the device:\nTraceback ...\nMemoryError: full"
            super().commit(slot)

    monkeypatch.setitem(turns.BATCHERS, "async", Lost)
    status, out, error = call(*TINY)
    assert (status, out) == (2, "")
    assert error.splitlines()[-1] == "asyncbatch.profile: decode/greedy failed on the device: MemoryError: full"
    assert "Traceback" not in error


# ---- emulation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recording_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("recordings") / "made-up.json"
    example().save(path)
    return path


def test_emulation_runs_the_recorded_workload_on_a_timed_device_and_says_so(call, recording_file, tmp_path):
    status, out, _ = call("--emulate", recording_file, "--json", "--out", tmp_path)
    assert status == 0
    report = json.loads(out)
    check_report(report, ["sync", "async"])
    assert report["emulated"] == "made-up"
    assert report["device"].startswith("emulated")
    assert report["model"] == MODEL
    assert [report["workload"][key] for key in ("batch_size", "requests", "prompt_tokens", "new_tokens")] == [
        8,
        8,
        16,
        8,
    ]
    assert {run["prefill_tokens"] for run in report["runs"]} == {48}
    assert [(row["mode"], row["batch_size"]) for row in report["recorded"]] == [("sync", 8), ("async", 8)]
    run = next(run for run in example().runs if (run["mode"], run["batch_size"]) == ("async", 8))
    steps = report["runs"][1]["steps"]
    cut = report["recorded"][1]
    assert cut["setting"] == f"the first {steps} steps"
    assert {key: cut[key] for key in run["totals"]} == steps_of(run).first(steps).totals()
    assert all("emulated made-up" in timeline.clock for timeline in load_trace(tmp_path / "trace.json"))


def test_the_table_of_an_emulation_has_what_was_recorded_beside_it(call, recording_file):
    status, out, _ = call("--emulate", recording_file, "--batch-size", "4", "--new-tokens", "3", "--mode", "async")
    assert status == 0
    assert ["emulated"] in [line.split() for line in out.splitlines()]
    assert "no run of this batch size" in out
    status, out, _ = call("--emulate", recording_file, "--batch-size", "2", "--new-tokens", "3")
    assert status == 0
    assert ["emulated", "emulated", "recorded", "recorded"] in [line.split() for line in out.splitlines()]
    assert ["sync", "async", "sync", "async"] in [line.split() for line in out.splitlines()]
    assert any(line.startswith("device: emulated: A GPU") for line in out.splitlines())


def test_emulation_beyond_the_recording_is_refused_before_it_starts(call, recording_file):
    for arguments, named in (
        (["--new-tokens", "400"], "up to 2752"),
        (["--batch-size", "9"], "batch size 9"),
        (["--model", "random:tiny"], f"recorded models: {MODEL}"),
        (["--step-ms", "3"], "--emulate and --step-ms"),
        (["--preset", "sweep"], "--emulate and --preset"),
        (["--engine", "transformers"], "--emulate is for"),
    ):
        status, out, error = call("--emulate", recording_file, *arguments)
        assert (status, out) == (2, "")
        assert error.count("\n") == 1
        assert named in error


# ---- presets, peers and recordings: a GPU that is not there ---------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without CUDA")
@pytest.mark.parametrize("arguments", [["--preset", "headline"], ["--preset", "sweep"], ["--record", "mine"]])
def test_without_a_gpu_presets_point_to_emulation(call, arguments, tmp_path):
    status, out, error = call(*arguments, "--out", tmp_path / "out")
    assert (status, out) == (2, "")
    assert error.count("\n") == 1
    assert " ".join(arguments) in error
    assert "needs a CUDA GPU" in error
    assert "--emulate" in error
    assert not (tmp_path / "out").exists()


@pytest.fixture
def gpu(monkeypatch):
    return pretend_gpu(monkeypatch)


def test_a_preset_measures_both_engines_one_after_the_other_and_records_them(call, gpu, tmp_path):
    status, out, _ = call("--preset", "headline", "--record", "mine", "--out", tmp_path, "--json")
    report = json.loads(out)
    assert status == 0
    pairs = list(itertools.product(("asyncbatch", "transformers"), ("sync", "async")))
    assert [(run["engine"], run["mode"]) for run in report["runs"]] == pairs
    assert report["workload"]["new_tokens"] == 5
    opened = [entry[1:3] for entry in gpu.log]
    assert opened == [pair for pair in pairs for _ in range(2)], "each is closed before the next one is opened"
    assert [entry[0] for entry in gpu.log] == ["open", "close"] * 4
    assert [entry[3] for entry in gpu.log[::2]] == [True, True, False, False], "compile is our own batchers' option"
    for run in report["runs"]:
        assert run["floor_s"] > 0
        assert run["time_over_floor"] == pytest.approx(run["wall_s"] / run["floor_s"])
        assert run["first_context"]["context"] < run["last_context"]["context"]
        assert run["first_context"]["over_floor"] > 1
    recording = Recording.load(tmp_path / "mine.json")
    assert [(run["engine"], run["mode"]) for run in recording.runs] == pairs
    assert recording.data["command"] == report["command"]
    assert all(run["setting"] == "as it is" for run in recording.runs)
    assert recording.models["random:tiny"]["vocab_size"] == 256
    assert recording.step_s(3, 12) > 0


def test_a_sweep_goes_through_its_workloads_and_options_narrow_it(call, gpu, tmp_path):
    status, out, _ = call("--preset", "sweep", "--json", "--out", tmp_path)
    report = json.loads(out)
    assert status == 0
    workloads = [(one["model"], one["batch_size"]) for one in report["comparisons"]]
    assert workloads == PRESETS["sweep"]["workloads"]
    assert all(one["pairs"][0] > 0 for one in report["comparisons"])
    assert len(report["runs"]) == 16
    assert {(run["batch_size"], run["requests"]) for run in report["runs"]} == {(1, 1), (2, 2)}
    assert set(report["models"]) == {"random:tiny", "random:other"}
    status, out, _ = call("--preset", "sweep", "--model", "random:tiny", "--batch-size", "2", "--mode", "async",
                          "--engine", "asyncbatch", "--new-tokens", "3", "--no-compile", "--json")  # fmt: skip
    report = json.loads(out)
    assert [(run["model"], run["batch_size"], run["mode"]) for run in report["runs"]] == [("random:tiny", 2, "async")]
    assert report["runs"][0]["tokens"] == 2 * 3
    assert gpu.log[-2][3] is False


def test_a_peer_that_fails_says_why_and_the_others_results_stay(call, gpu, tmp_path):
    class Full(gpu.theirs["async"]):
        def run(self, requests, progress=False):
            if requests[0].max_new_tokens == 5 and self.shape.max_batch_size == 2:
                raise torch.OutOfMemoryError("no memory left for 7 blocks")
            return super().run(requests, progress)

    gpu.theirs["async"] = Full
    status, out, _ = call("--preset", "sweep", "--out", tmp_path, "--record", "mine")
    report = json.loads((tmp_path / "report.json").read_text())
    assert status == 0
    assert [(one["model"], one["batch_size"], one["engine"], one["mode"]) for one in report["failed"]] == [
        (model, 2, "transformers", "async") for model in ("random:tiny", "random:other")
    ]
    assert len(report["runs"]) == 14
    assert out.count("was not measured: no memory left for 7 blocks") == 2
    assert len(Recording.load(tmp_path / "mine.json").data["failed"]) == 2
    del gpu.peers.TransformersBatcher
    status, out, _ = call("--preset", "headline")
    assert status == 0
    assert out.count("was not measured: cannot import name") == 2


def test_our_own_failure_in_a_preset_keeps_the_rest_and_is_the_exit_status(call, gpu):
    class Lost(gpu.ours["async"]):
        def run(self, requests, progress=False):
            raise RuntimeError("the device is lost")

    gpu.ours["async"] = Lost
    status, out, _ = call("--preset", "headline", "--json")
    report = json.loads(out)
    assert status == 2
    assert [one["error"] for one in report["failed"]] == ["the device is lost"]
    assert [(run["engine"], run["mode"]) for run in report["runs"]] == [
        ("asyncbatch", "sync"), ("transformers", "sync"), ("transformers", "async"),
    ]  # fmt: skip
    assert report["async_speedup"] is None


def test_a_peer_that_fails_again_when_closed_does_not_stop_the_next_one(call, gpu):
    class Stuck(gpu.theirs["sync"]):
        def close(self):
            super().close()
            raise RuntimeError("it does not answer")

    gpu.theirs["sync"] = Stuck
    status, out, _ = call("--preset", "headline", "--json")
    report = json.loads(out)
    assert status == 0
    assert [(one["engine"], one["mode"], one["error"]) for one in report["failed"]] == [
        ("transformers", "sync", "it does not answer")
    ]
    assert len(report["runs"]) == 4


def test_a_workload_that_cannot_even_begin_does_not_stop_a_sweep(call, gpu, monkeypatch):
    load = profile.load_model

    def no_huge_one(name, **options):
        if name == "random:huge":
            raise ModelError("random:huge is not a shape")
        return load(name, **options)

    wanted = [("random:huge", 1), ("random:tiny", 1)]
    monkeypatch.setattr(profile, "load_model", no_huge_one)
    monkeypatch.setitem(PRESETS, "sweep", {**PRESETS["sweep"], "workloads": wanted})
    status, out, _ = call("--preset", "sweep", "--json")
    report = json.loads(out)
    assert status == 2
    assert [(one["model"], one["mode"]) for one in report["failed"]] == [("random:huge", "sync,async")]
    assert "random:huge" in report["failed"][0]["error"]
    assert {run["model"] for run in report["runs"]} == {"random:tiny"}
    assert len(report["runs"]) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers has an asynchronous mode there")
def test_a_peer_alone_that_cannot_run_here_is_said_and_is_the_exit_status(call, tmp_path):
    status, out, _ = call(*TINY, "--engine", "transformers", "--mode", "async", "--out", tmp_path)
    assert status == 2
    assert "transformers async was not measured: " in out
    assert json.loads((tmp_path / "report.json").read_text())["runs"] == []


def test_an_interrupted_sweep_keeps_what_it_has(call, gpu, tmp_path):
    class Stopped(gpu.ours["sync"]):
        def run(self, requests, progress=False):
            if self.shape.max_batch_size == 2:
                raise KeyboardInterrupt
            return super().run(requests, progress)

    gpu.ours["sync"] = Stopped
    status, out, error = call("--preset", "sweep", "--out", tmp_path, "--record", "mine", "--json")
    assert status == 130
    assert "interrupted; the report is about what ran" in error.splitlines()[-1]
    assert len(json.loads(out)["runs"]) == len(json.loads((tmp_path / "report.json").read_text())["runs"]) == 4
    assert len(Recording.load(tmp_path / "mine.json").runs) == 4


def test_a_peer_that_would_take_too_long_is_left_out(call, gpu):
    arguments = ["--preset", "headline", "--new-tokens", "900", "--mode", "sync"]
    gpu.ours["sync"] = lambda model, **options: SyncBatcher(
        model, **{key: value for key, value in options.items() if key != "compile"} | {"step_s": 0.0}
    )
    gpu.theirs["sync"] = lambda model, **options: SyncBatcher(model, step_s=0.002, **options)
    status, out, _ = call(*arguments, "--peer-limit-s", "1", "--json")
    report = json.loads(out)
    assert status == 0
    assert [run["engine"] for run in report["runs"]] == ["asyncbatch"]
    assert "--peer-limit-s is 1" in report["failed"][0]["error"]


def test_a_peer_is_compared_with_itself_alone(call, gpu):
    class Wrong(gpu.theirs["async"]):
        def commit(self, slot):
            slot.output_ids[0] ^= 1
            super().commit(slot)

    gpu.theirs["async"] = Wrong
    status, out, _ = call("--preset", "headline", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["same_tokens"] is True
    assert report["peers_same_tokens"] == {"transformers": False}
    assert "transformers: sync and async gave different tokens" in call("--preset", "headline")[1]


# ---- numbers that need a GPU, on times that are made up -------------------------------------------------------------


def test_steps_without_a_context_have_no_floor():
    timeline = made_timeline("async", [("decode", 0, 1e-3, 1e-4, 4, 0)] * 5)
    timeline.steps = [step._replace(context=0, rows=0) for step in timeline.steps]
    run = recorded((timeline, row_of(timeline))).runs[0]
    assert floor_numbers(steps_of(run), 1.0, ModelFacts.from_json(SESSION["models"][MODEL]), 4e12) == Floor()


def test_first_and_last_context_are_the_smallest_and_the_largest_in_whatever_order_the_steps_come():
    timeline = made_timeline("async", [("decode", 0, 1e-3 * n, 1e-4, 4, 0) for n in range(1, 17)])
    steps = steps_of(recorded((timeline, row_of(timeline))).runs[0])
    turned = steps._replace(context=steps.context[::-1], device_us=steps.device_us[::-1])
    facts = ModelFacts.from_json(SESSION["models"][MODEL])
    floor, other = (floor_numbers(each, 1.0, facts, 4e12) for each in (steps, turned))
    assert (other.first_context, other.last_context) == (floor.first_context, floor.last_context)
    assert (floor.first_context.context, floor.last_context.context) == (17.5, 31.5)
    assert (floor.first_context.ms, floor.last_context.ms) == pytest.approx((1.5, 15.5))


def test_the_report_says_which_steps_were_padded():
    def words(**device):
        return turns.padding_in_words(types.SimpleNamespace(device=types.SimpleNamespace(**device)))

    assert words() is None
    assert words(padding={4: 4, 64: 64}) is None
    assert words(padding={9: 12, 5: 8, 64: 64}) == (
        "rows or prompt tokens of a step, padded to keep bits the same on this machine: 5 as 8, 9 as 12"
    )

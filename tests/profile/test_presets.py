"""The preset of workloads that have names: what it serves, what it says of pauses, and where a peer is faster."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest
from support.presets import pretend_gpu
from support.reports import REAL, call_script, measured

from asyncbatch import Timeline, load_model
from asyncbatch.measure.bandwidth import requests_floor
from asyncbatch.measure.points import LANE, NO_REQUEST
from asyncbatch.profile import session as profile
from asyncbatch.profile import side_by_side, turns
from asyncbatch.profile.diagnosis import longest_gap_ms
from asyncbatch.profile.options import parse_arguments
from asyncbatch.profile.page import page
from asyncbatch.profile.presets import PRESETS, SHORT, has_names, served_by
from asyncbatch.profile.report import Latency, MedianAndP99, Report, Run
from asyncbatch.profile.settings import settle
from asyncbatch.profile.text import table

NAMES = ["headline", "long prompts", "mixed", "0.6B, 256 rows"]


@pytest.fixture(scope="module", autouse=True)
def _one_model():
    tiny = load_model("random:tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile, "load_model", lambda name, **kw: tiny)
        yield


@pytest.fixture
def call(capsys):
    return functools.partial(call_script, capsys)


@pytest.fixture
def gpu(monkeypatch):
    return pretend_gpu(monkeypatch)


# ---- what is served -------------------------------------------------------------------------------------------------


def test_the_workloads_are_those_of_the_issue(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    settings = settle(parse_arguments(["--preset", "workloads", "--repeats", "2"]))
    rows = [(w.name, w.model, w.batch_size, w.requests, w.prompt_tokens, w.new_tokens) for w in settings.workloads]
    assert rows == [
        ("headline", "random:llama-8b", 32, 32, 16, 8192),
        ("long prompts", "random:llama-8b", 32, 64, 2048, 128),
        ("mixed", "random:llama-8b", 32, 128, "lognormal:512:0.8", "lognormal:256:0.6"),
        ("0.6B, 256 rows", "random:llama-0.6b", 256, 256, 64, 256),
    ]
    assert (settings.engines, settings.modes) == (("asyncbatch", "transformers"), ("sync", "async"))
    assert (settings.repeats, settings.compile) == (2, True)
    assert settings.model == "random:llama-8b, random:llama-0.6b"
    asked = settings.conditions
    assert (asked.batch_size, asked.requests, asked.prompt_tokens, asked.new_tokens) == (None,) * 4
    (headline,) = settle(parse_arguments(["--preset", "headline"])).workloads
    assert replace(settings.workloads[0], name=None) == headline


def test_only_takes_some_of_them_in_their_order(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    settings = settle(parse_arguments(["--preset", "workloads", "--only", "mixed,long", "--mode", "async"]))
    assert [workload.name for workload in settings.workloads] == ["long prompts", "mixed"]
    assert settings.modes == ("async",)
    assert [one.short for one in served_by(PRESETS["workloads"])] == [*SHORT]
    assert [has_names(preset) for preset in PRESETS.values()] == [False, False, True]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "mixed"], "--only takes some of the workloads of --preset workloads"),
        (["--preset", "sweep", "--only", "mixed"], "--only takes some of the workloads of --preset workloads"),
        (["--preset", "workloads", "--only", "short"], "'short' was given; allowed are headline, long, mixed, small"),
        (["--preset", "workloads", "--new-tokens", "9"], "has workloads of its own: --new-tokens 9 cannot be had"),
        (["--preset", "workloads", "--prompt-tokens", "4-9"], "--prompt-tokens 4-9 cannot be had with it"),
        (["--preset", "workloads", "--model", "gpt2"], "(--only takes some of them: headline, long, mixed, small)"),
        (["--preset", "workloads", "--arrivals", "poisson:3"], "--arrivals poisson:3 cannot be had with it"),
        (["--preset", "workloads", "--record", "mine", "--out", "o"], "record --preset headline or sweep"),
        (["--preset", "workloads", "--step-ms", "2"], "--step-ms and --preset were given"),
    ],
)
def test_what_does_not_go_with_it_is_one_line(call, gpu, arguments, said):
    status, out, error = call(*arguments)
    assert (status, out) == (2, "")
    lines = [line for line in error.splitlines() if not line.startswith("usage:")]
    assert len(lines) == 1
    assert said in lines[0]


# ---- measured on tiny models ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(report, what was printed, the page, loaded models) of the whole preset on tiny models, in one call."""
    folder, loaded = tmp_path_factory.mktemp("workloads"), []
    with pytest.MonkeyPatch.context() as patch:
        pretend_gpu(patch)
        load = profile.load_model
        patch.setattr(profile, "load_model", lambda name, **kw: (loaded.append(name), load(name, **kw))[1])
        patch.setattr(turns, "record_points", None)  # calling it would fail
        settings = parse_arguments(["--preset", "workloads", "--out", str(folder)])
        session = profile.Session(settings)
        session.run()
    data = json.loads((folder / "report.json").read_text())
    return data, table(Report.from_json(data)), (folder / "report.html").read_text(), loaded


def test_all_workloads_are_measured_with_both_engines_and_the_model_of_several_is_loaded_once(ran):
    data, _, _, loaded = ran
    assert data["failed"] == []
    assert loaded == ["random:tiny", "random:other"]
    each = [(name, engine, mode) for name in NAMES for engine in ("asyncbatch", "transformers")
            for mode in ("sync", "async")]  # fmt: skip
    assert [(run["workload"], run["engine"], run["mode"]) for run in data["runs"]] == each
    assert [one["workload"] for one in data["comparisons"]] == NAMES
    assert all(one["pairs"][0] > 0 for one in data["comparisons"])
    assert data["same_tokens"] is True
    assert data["peers_same_tokens"] == {"transformers": True}
    mixed = [run for run in data["runs"] if run["workload"] == "mixed"]
    assert {run["tokens"] for run in mixed} == {mixed[0]["tokens"]}
    assert {run["requests"] for run in mixed} == {7}
    assert all(run["longest_gap_ms"] >= 0 for run in data["runs"])
    assert all(run["latency"]["first_token_ms"]["p99"] > 0 for run in data["runs"])


def test_the_floor_of_a_workload_is_that_of_its_requests_whoever_serves_them(ran):
    data, text, html, _ = ran
    facts = data["models"]["random:tiny"]
    assert data["matmul_flops_per_s"] == 7e14
    assert "matrix products: 700 TFLOP/s" in text
    for name in NAMES:
        floors = [run["request_floor"] for run in data["runs"] if run["workload"] == name]
        assert len({one["floor_s"] for one in floors}) == 1
    run = next(run for run in data["runs"] if run["workload"] == "long prompts")
    least = requests_floor(facts["weight_bytes"], facts["kv_bytes_per_token"], facts["flops_per_token"],
                           [(40, 2)] * 5, 3, 4e12, 7e14)  # fmt: skip
    assert run["request_floor"] == {
        "floor_s": least.total_s,
        "time_over_floor": run["wall_s"] / least.total_s,
        "decode_steps": 2,
        "decode_s": least.decode_s,
        "prompts_s": least.prompts_s,
    }
    assert f"{run['wall_s'] / least.total_s:.2f}x" in text
    assert f"{run['wall_s'] / least.total_s:.2f}x" in html


def test_no_latency_point_is_recorded_in_a_preset_on_either_engine(ran, gpu, monkeypatch):
    data, *_ = ran  # `record_points` could not have been called there
    assert {point["name"] for run in data["runs"] for point in run["points"] if point["where"] == "host"} == {
        "schedule", "fill buffers", "step launch", "wait", "commit",
    }  # fmt: skip
    seen = []
    record = turns.record_points
    monkeypatch.setattr(turns, "record_points", lambda batcher: (seen.append(batcher), record(batcher))[1])
    settings = settle(parse_arguments(["--preset", "workloads"]))
    plain = settle(parse_arguments(["--model", "random:tiny", "--batch-size", "2", "--requests", "2", "--repeats", "1",
                                    "--new-tokens", "3"]))  # fmt: skip
    for each in (settings, plain):
        session = profile.Session(parse_arguments([]))
        session.settings = replace(each, workloads=each.workloads[:1])
        session.run()
        assert bool(seen) == (each is plain)


def test_the_terminal_and_the_page_have_a_line_for_each_run(ran):
    data, text, html, _ = ran
    report = Report.from_json(data)
    lines = text.splitlines()
    begin = next(place for place, line in enumerate(lines) if line.startswith("workload"))
    assert len(report.runs) == 16
    for run, line in zip(report.runs, lines[begin + 1 :], strict=False):
        assert line.startswith(run.workload)
        assert f" {run.wall_s:.2f} " in line
        assert f" {run.longest_gap_ms:.2f} " in line
        assert f" {run.latency.first_token_ms.p99:.0f} " in line
    assert "asyncbatch: all runs of a workload gave the same tokens, sync and async." in lines
    for one in report.comparisons:
        assert one.async_speedup is None or f"{one.workload} {one.async_speedup:.3f}x" in text
    assert "Workloads side by side" in html
    assert "0.6B, 256 rows: transformers async" in html


def test_only_one_of_them_has_its_name_too(call, gpu):
    status, out, error = call("--preset", "workloads", "--only", "mixed", "--mode", "async")
    assert status == 0
    assert len([line for line in out.splitlines() if line.startswith("mixed ")]) >= 2
    assert "different" not in out


def test_a_workload_that_fails_is_named(call, gpu):
    class Full(gpu.theirs["async"]):
        def run(self, requests, progress=False):
            if len(requests[0].token_ids) == 40:
                raise RuntimeError("no memory left")
            return super().run(requests, progress)

    gpu.theirs["async"] = Full
    status, out, error = call("--preset", "workloads", "--only", "long,small")
    assert status == 0
    assert "long prompts: transformers async was not measured: no memory left" in out
    assert "long prompts transformers async failed: no memory left" in error


def test_tokens_are_compared_within_each_workload(call, gpu):
    class Wrong(gpu.ours["async"]):
        def commit(self, slot):
            if self.shape.max_batch_size == 4:
                slot.output_ids[0] ^= 1
            super().commit(slot)

    gpu.ours["async"] = Wrong
    status, out, _ = call("--preset", "workloads", "--only", "long,small", "--engine", "asyncbatch")
    assert status == 1
    assert "The tokens differ: that is a fault" in out


# ---- pauses ---------------------------------------------------------------------------------------------------------


def timeline(*steps: tuple[float, float]) -> Timeline:
    made = Timeline("async")
    for step, (start, end) in enumerate(steps):
        made.add("compute", "step", step, start, end)
        made.add_step(step, "prefill" if step % 2 else "decode", 1, 0)
    return made


def test_the_longest_gap_is_between_steps_of_any_kind():
    assert longest_gap_ms(timeline((0, 1), (1.25, 2), (2.5, 3), (3, 4))) == 500
    assert longest_gap_ms(timeline((0, 1), (1, 2))) == 0
    assert longest_gap_ms(timeline((0, 2), (0.5, 1), (2.125, 3))) == 125, "a step inside another one ends no activity"
    assert longest_gap_ms(timeline((0, 1))) is None
    waiting = timeline((0, 1), (2, 3), (3.25, 4))
    waiting.add(LANE, NO_REQUEST, -1, 1.125, 2)
    assert longest_gap_ms(waiting) == 250, "there was nothing to serve"


def test_an_ordinary_report_says_the_longest_gap_too():
    data, timelines = measured(REAL)
    report = Report.from_json(data)
    for run, made in zip(report.runs, timelines, strict=True):
        assert run.longest_gap_ms == longest_gap_ms(made)
    row = next(line for line in table(report).splitlines() if line.startswith("longest gap"))
    assert row.split()[2::2] == [f"{run.longest_gap_ms:.3f}" for run in report.runs]
    assert f"{report.runs[0].longest_gap_ms:.3f} ms" in page(report, [])
    assert "workload" not in data["runs"][0]


# ---- where another engine is faster ---------------------------------------------------------------------------------


def run(engine: str, mode: str, wall_s: float, first: tuple[float, float] | None = None, **more) -> Run:
    latency = Latency(MedianAndP99(*first)) if first else None
    own = dict(model="m", batch_size=8, workload="long prompts", wall_s=wall_s, latency=latency)
    return Run(engine=engine, mode=mode, **own | more)


def test_the_line_of_a_faster_peer_says_so_in_words():
    runs = (
        run("asyncbatch", "sync", 9.0, (100, 200)),
        run("asyncbatch", "async", 8.0, (100, 200)),
        run("transformers", "sync", 9.5, (100, 200)),
        run("transformers", "async", 7.5, (50, 300)),
        run("transformers", "async", 1.0, (1, 1), workload="other"),
    )
    report = Report(runs=runs)
    marks = [line[-1] for line in side_by_side.lines(report)]
    assert marks == ["", "", "", "wall time (1.067x), first token (2.000x)", ""]
    said = (
        "long prompts: transformers async is faster than asyncbatch async in wall time (1.067x), first token (2.000x)."
    )
    assert side_by_side.sentences(report) == [said]
    assert said in table(report)
    assert said in page(report, [])


def test_where_no_peer_is_faster_that_is_said_and_without_peers_nothing():
    own = run("asyncbatch", "async", 8.0, (100, 200))
    slower = run("transformers", "sync", 8.5, (100, 200))
    (sentence,) = side_by_side.sentences(Report(runs=(own, slower)))
    assert sentence.startswith("Nowhere is another engine faster")
    assert side_by_side.sentences(Report(runs=(own,))) == []
    assert side_by_side.faster(replace(slower, wall_s=7.0), (own,)) == [("wall time", 8 / 7)], "beside the other mode"
    assert side_by_side.faster(replace(slower, wall_s=7.0, interrupted=True), (own,)) == []
    assert side_by_side.lines(Report(runs=(run("asyncbatch", "sync", 1.0),)))[0][5:-1] == ["-"] * 6


def test_two_reports_of_named_workloads_are_compared_name_by_name(call, tmp_path, ran):
    data, *_ = ran
    (tmp_path / "a.json").write_text(json.dumps(data))
    status, out, _ = call("--compare", tmp_path / "a.json", tmp_path / "a.json")
    assert status == 0
    assert "asyncbatch sync, random:tiny, batch size 3, long prompts" in out
    assert "longest gap" in out
    assert "only in" not in out
    shorter = {**data, "runs": data["runs"][1:]}
    (tmp_path / "b.json").write_text(json.dumps(shorter))
    out = call("--compare", tmp_path / "a.json", tmp_path / "b.json", "--json")[1]
    assert json.loads(out)["only_in_a"] == [
        {"engine": "asyncbatch", "mode": "sync", "model": "random:tiny", "batch_size": 3, "workload": "headline"}
    ]

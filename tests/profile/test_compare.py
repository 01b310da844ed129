"""Two reports side by side: pairs, ratios, a line for each difference, and files that are no reports."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
from support.comparing import GPU, WORKLOAD, changed, report, row

from asyncbatch import load_model
from asyncbatch.profile import cli, compare, session


@pytest.fixture
def call(capsys, tmp_path):
    """`--compare` on two reports, dicts or file contents: (exit status, standard output, standard error)."""

    def run(a, b, *more):
        paths = []
        for name, content in (("a.json", a), ("b.json", b)):
            content = content if isinstance(content, (bytes, str)) else json.dumps(content)
            (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
            paths.append(str(tmp_path / name))
        try:
            status = cli.main(["--compare", *paths, *more])
        except SystemExit as end:  # argparse ends so
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_a_report_beside_itself_is_the_same_everywhere(call):
    status, out, error = call(report(), report())
    assert (status, error) == (0, "")
    assert "warning" not in out
    assert "only in" not in out
    lines = out.splitlines()
    assert lines[0].startswith("A: ")
    assert lines[0].endswith("a.json: m on cpu; Linux, 2 cores, 2026-11-25T00:00:00+00:00")
    assert [line for line in lines if line.startswith("asyncbatch")] == [
        "asyncbatch sync, m, batch size 8", "asyncbatch async, m, batch size 8",
    ]  # fmt: skip
    ratios = {line.split()[-1] for line in lines if line.endswith("x")}
    assert ratios == {"1.000x"}


def test_each_number_stands_beside_its_partner_with_the_ratio(call):
    faster = row("sync", wall_s=3.0, tokens_per_s=133.3, idle=0.05, host_ms_per_step=None, wasted_tokens=3,
                 wall_s_of_each_run=[3.0, 2.9])  # fmt: skip
    faster["latency"] = {**faster["latency"], "first_token_ms": {"median": 5.0, "p99": 40.0}}
    faster["points"] = [{"name": "forward", "where": "device", "median_ms": 5.0}]
    a, b = report(row(), row("async")), report(row("async"), faster)
    out = call(a, b)[1]
    block = out[out.index("asyncbatch sync") : out.index("asyncbatch async")].splitlines()
    assert block[1].split() == ["A", "B", "B", "/", "A"]
    assert {line[:20].strip(): line[20:].split() for line in block[2:-1]} == {
        "wall time": ["4.000", "s", "3.000", "s", "0.750x"],
        "its runs": ["3.900", "to", "4.100", "s", "2.900", "to", "3.000", "s", "apart"],
        "tokens per second": ["100.0", "133.3", "1.333x"],
        "device idle": ["25.00", "%", "5.00", "%", "0.200x"],
        "host work per step": ["1.500", "ms", "-", "-"],
        "device per step": ["4.500", "ms", "4.500", "ms", "1.000x"],
        "wasted tokens": ["0", "3", "-"],
        "first token, median": ["10.0", "ms", "5.0", "ms", "0.500x"],
        "first token, p99": ["20.0", "ms", "40.0", "ms", "2.000x"],
        "end to end, median": ["10.0", "ms", "10.0", "ms", "1.000x"],
        "end to end, p99": ["20.0", "ms", "20.0", "ms", "1.000x"],
        "device: forward": ["4.000", "ms", "5.000", "ms", "1.250x"],
    }, "of latency points, those that both have"
    found = json.loads(call(a, b, "--json")[1])
    assert [(pair["engine"], pair["mode"]) for pair in found["runs"]] == [
        ("asyncbatch", "sync"),
        ("asyncbatch", "async"),
    ]
    rows = {one["name"]: (one["a"], one["b"], one["ratio"]) for one in found["runs"][0]["rows"]}
    assert rows["wall_s"] == (4.0, 3.0, 0.75)
    assert rows["host_ms_per_step"] == (1.5, None, None)
    assert rows["wasted_tokens"] == (0, 3, None)
    assert rows["latency.first_token_ms.p99"] == (20.0, 40.0, 2.0)
    assert rows["latency.per_token_ms.median"] == (None, None, None)
    assert found["runs"][0]["points"] == [
        {"name": "forward", "where": "device", "a": 4.0, "b": 5.0, "ratio": 1.25},
    ]
    assert found["runs"][0]["wall_s_of_each_run"] == {"a": [3.9, 4.1], "b": [2.9, 3.0]}
    assert set(found) == {"a", "b", "warnings", "runs", "only_in_a", "only_in_b"}


def test_runs_that_differ_less_than_they_vary_are_said_to_overlap(call):
    def its_runs(each_a, each_b):
        out = call(report(row(wall_s_of_each_run=each_a)), report(row(wall_s_of_each_run=each_b)))[1]
        return [line.split()[-1] for line in out.splitlines() if line.startswith("  its runs")]

    assert its_runs([4.0, 4.4], [4.1, 4.2]) == its_runs([4.0, 4.4], [4.4, 4.9]) == ["overlap"]
    assert its_runs([4.0, 4.4], [4.5, 4.9]) == its_runs([4.5, 4.9], [4.0, 4.4]) == ["apart"]
    assert its_runs([4.0], [4.0]) == [], "one run each: the wall time says it all"


def test_runs_without_a_partner_are_named(call):
    a = report(row(), row("sync", "transformers", setting="sdpa"))
    b = report(row(), row("async"), row(model="other"))
    out = call(a, b)[1]
    assert [line for line in out.splitlines() if line.startswith("only in")] == [
        "only in A: transformers sync, m, batch size 8",
        "only in B: asyncbatch async, m, batch size 8",
        "only in B: asyncbatch sync, other, batch size 8",
    ]
    found = json.loads(call(a, b, "--json")[1])
    assert found["only_in_a"] == [{"engine": "transformers", "mode": "sync", "model": "m", "batch_size": 8}]
    assert len(found["only_in_b"]) == 2
    none = call(a, report(row(batch_size=4)))[1]
    assert "no run of A has a partner in B" in none
    assert "no run of A has a partner in B" in call(report(runs=[]), report(runs=[]))[1]


# What is another in B, and the one warning that this makes.
DIFFERENCES = [
    (("schema",), 3, "schema: A has 2, B has 3"),
    (("machine",), "Linux, 8 cores", "machine: A has Linux, 2 cores, B has Linux, 8 cores"),
    (("device",), "H200", "device: A has cpu, B has H200"),
    (("emulated",), "h200-llama-8b", "emulated: A has none, B has h200-llama-8b"),
    (("preset",), "sweep", "preset: A has none, B has sweep"),
    (("versions", "python"), "3.11.0", "version of python: A has 3.12.1, B has 3.11.0"),
    (("versions", "torch"), "2.11.0", "version of torch: A has 2.13.0, B has 2.11.0"),
    (("versions", "transformers"), "5.17.0", "version of transformers: A has 5.23.0, B has 5.17.0"),
    (("versions", "triton"), "3.6.0", "version of triton: A has none, B has 3.6.0"),
    (("versions", "cuda"), "13.0", "version of cuda: A has none, B has 13.0"),
    (("workload", "requests"), 8, "requests: A has 16, B has 8"),
    (("workload", "prompt_tokens"), "16-64", "prompt_tokens: A has 64, B has 16-64"),
    (("workload", "new_tokens"), 64, "new_tokens: A has 32, B has 64"),
    (("workload", "seed"), 1, "seed: A has 0, B has 1"),
    (("workload", "slots"), 3, "slots: A has 2, B has 3"),
    (("workload", "host_work_ms"), 3.0, "host_work_ms: A has 0.0, B has 3.0"),
    (("workload", "step_ms"), 10.0, "step_ms: A has none, B has 10.0"),
    (("workload", "arrivals"), "poisson:5", "arrivals: A has all, B has poisson:5"),
    (("runs", 0, "prefill_tokens"), 256, "prefill_tokens of asyncbatch sync, m, batch size 8: A has 64, B has 256"),
    (("runs", 1, "tokens"), 511, "tokens of asyncbatch async, m, batch size 8: A has 512, B has 511"),
    (("runs", 0, "setting"), "sdpa\nx", "setting of asyncbatch sync, m, batch size 8: A has none, B has sdpa x"),
    (("runs", 1, "interrupted"), True, "interrupted: in B asyncbatch async, m, batch size 8 ended early"),
    (("same_tokens",), False, "tokens: in B sync and async of asyncbatch gave different ones, so its numbers are void"),
    (("peers_same_tokens",), {"transformers": False}, "tokens: in B sync and async of transformers gave different "
     "ones, so its numbers are void"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "said"), DIFFERENCES, ids=[".".join(map(str, d[0])) for d in DIFFERENCES])
def test_whatever_makes_them_hard_to_compare_is_one_warning(call, path, value, said):
    status, out, _ = call(report(), changed(path, value))
    assert status == 0
    assert [line for line in out.splitlines() if line.startswith("warning: ")] == ["warning: " + said]
    assert json.loads(call(report(), changed(path, value), "--json")[1])["warnings"] == [said]


@pytest.mark.parametrize("path", [("workload", "batch_size"), ("workload", "repeats"), ("date",), ("model",)])
def test_what_does_not_matter_is_no_warning(call, path):
    assert "warning" not in call(report(), changed(path, "another"))[1]


def test_warnings_of_gpus_prompts_files_and_several_runs(call):
    def warned(a, b):
        return json.loads(call(a, b, "--json")[1])["warnings"]

    assert warned(report(gpu=GPU), report(gpu={**GPU, "driver": "581.0"})) == ["gpu, driver: A has 580.1, B has 581.0"]
    assert warned(report(), report(gpu=GPU))[0] == "gpu, name: A has none, B has H200"
    of_a, of_b = ({**WORKLOAD, "prompts": f"{name}.txt", "prompts_sha256": sha} for name, sha in (("x", 1), ("y", 2)))
    assert warned(report(workload=of_a), report(workload=of_b)) == [
        "prompts: A has x.txt (sha256 1), B has y.txt (sha256 2)"
    ]
    assert warned(report(workload=of_a), report(workload={**of_b, "prompts_sha256": 1})) == [], "the contents count"
    assert warned(report(), report(workload=of_a)) == ["prompts: A has none, B has x.txt (sha256 1)"]
    many = report(row(prompt_tokens=9), row("async", prompt_tokens=9))
    assert warned(report(), many) == [
        "prompt_tokens of asyncbatch sync, m, batch size 8, and of 1 more: A has 64, B has 9"
    ]
    asked = {**WORKLOAD, "prompt_tokens": 9}
    assert warned(report(), {**many, "workload": asked}) == ["prompt_tokens: A has 64, B has 9"], "once is enough"
    old = copy.deepcopy(report())  # written before there were arrivals, latencies and points
    for key in ("arrivals", "prompts", "prompts_sha256"):
        del old["workload"][key]
    for one in old["runs"]:
        del one["latency"], one["points"]
    assert warned(old, report()) == []


def without(key, of_run=False):
    made = report()
    del (made["runs"][0] if of_run else made)[key]
    return made


EXPECTED = "; expected a report.json that asyncbatch.profile --out wrote"
# A file's content, and what is said of it.
BAD_FILES = {
    "empty": ("", "not JSON (Expecting value: line 1 column 1 (char 0))"),
    "text": ("hello", "not JSON (Expecting value"),
    "half": (json.dumps(report())[:200], "not JSON ("),
    "not UTF-8": (b"\xff\xfe\x00", "not JSON ("),
    "deep": ("[" * 200_000, "not JSON ("),
    "a list": ("[1]", "the report is [1] and no object" + EXPECTED),
    "a number": ("3", "the report is 3 and no object" + EXPECTED),
    "another object": ({"traceEvents": []}, "the report has no schema, model, device, machine, date, gpu, versions, "
                       "workload, same_tokens, runs" + EXPECTED),
    "no versions": (without("versions"), "the report has no versions" + EXPECTED),
    "schema of another kind": (changed(("schema",), "two"), "schema of the report is 'two'" + EXPECTED),
    "runs of another kind": (changed(("runs",), {}), "runs of the report is {}" + EXPECTED),
    "gpu of another kind": (changed(("gpu",), "H200"), "gpu of the report is 'H200'" + EXPECTED),
    "a run of another kind": (changed(("runs", 1), 7), "runs[1] is 7 and no object" + EXPECTED),
    "a run without a mode": (without("mode", True), "runs[0] has no mode" + EXPECTED),
    "a run without times": (without("wall_s", True), "runs[0] has no wall_s" + EXPECTED),
    "a batch size that is text": (changed(("runs", 0, "batch_size"), "8"), "batch_size of runs[0] is '8'" + EXPECTED),
    "a time that is text": (changed(("runs", 0, "wall_s"), "4"), "wall_s of runs[0] is '4', neither a number nor null"),
    "a time that is nan": (changed(("runs", 0, "idle"), float("nan")), "idle of runs[0] is nan, neither a number"),
    "an endless time": (json.dumps(report()).replace("4.5", "1e999", 1), "device_ms_per_step of runs[0] is inf"),
    "a time of digits": (json.dumps(report()).replace("4.5", "9" * 400, 1), "device_ms_per_step of runs[0] is a whole"),
    "a run's times": (changed(("runs", 0, "wall_s_of_each_run"), [1, None, "x"]), "wall_s_of_each_run of runs[0]"),
    "a latency": (changed(("runs", 0, "latency", "first_token_ms", "p99"), []), "latency.first_token_ms.p99 of runs[0] "
                  "is [], neither"),
    "a point of another kind": (changed(("runs", 0, "points", 0), 3), "a point of runs[0] is 3 and no object"),
    "a point without a name": (changed(("runs", 0, "points", 1), {"median_ms": 1}), "a point of runs[0] has no name, "
                               "where"),
    "a point's time": (changed(("runs", 0, "points", 0, "median_ms"), "x"), "median_ms of point schedule of runs[0]"),
    "points of another kind": (changed(("runs", 0, "points"), {"a": 1}), "wall_s_of_each_run or points of runs[0] is "
                               "no list"),
    "the same run twice": (report(row(), row()), "there are two runs of asyncbatch sync, m, batch size 8" + EXPECTED),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("place", [0, 1])
def test_a_file_that_is_no_report_is_one_line(call, tmp_path, name, place):
    content, said = BAD_FILES[name]
    files = [report(), report()]
    files[place] = content
    status, out, error = call(*files)
    assert (status, out) == (2, "")
    assert error.count("\n") == 1
    assert error.startswith(f"asyncbatch.profile: --compare {tmp_path / 'ab'[place]}.json: {said}")


def test_a_list_of_times_with_a_gap_and_reports_that_cannot_be_read(call, tmp_path, capsys):
    for path, said in ((tmp_path / "no.json", "No such file or directory"), (tmp_path, "Is a directory")):
        assert cli.main(["--compare", str(path), str(path)]) == 2
        assert capsys.readouterr().err == f"asyncbatch.profile: --compare {path}: {said}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "random:tiny"], "--compare measures nothing: --model cannot be had with it"),
        (["--arrivals", "poisson:3"], "--compare measures nothing: --arrivals cannot be had with it"),
        (["--out", "o"], "--compare measures nothing: --out cannot be had with it"),
        (["third.json"], "unrecognized arguments: third.json"),
    ],
)
def test_options_of_measuring_are_refused(call, arguments, said):
    status, out, error = call(report(), report(), *arguments)
    assert (status, out) == (2, "")
    assert said in error.splitlines()[-1]


def test_one_file_is_not_enough(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--compare", "a.json"])
    assert end.value.code == 2
    assert "--compare: expected 2 arguments" in capsys.readouterr().err


def test_it_loads_no_model_and_none_of_transformers(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(report()))
    code = (
        "import sys; from asyncbatch.profile import cli, session; session.load_model = None\n"
        f"status = cli.main(['--compare', {str(tmp_path / 'a.json')!r}, {str(tmp_path / 'a.json')!r}])\n"
        "print(status, 'transformers' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stderr == "0 False\n"
    assert done.stdout.startswith("A: ")


def test_two_real_reports(tmp_path, capsys, monkeypatch):
    tiny = load_model("random:tiny")  # one for both: its device process starts once
    monkeypatch.setattr(session, "load_model", lambda name, **options: tiny)
    base = ["--model", "random:tiny", "--requests", "3", "--batch-size", "2", "--repeats", "1", "--prompt-tokens", "4"]
    for name, tokens in (("a", "3"), ("b", "5")):
        assert cli.main([*base, "--new-tokens", tokens, "--out", str(tmp_path / name)]) == 0
    paths = [str(tmp_path / name / "report.json") for name in "ab"]
    capsys.readouterr()
    assert cli.main(["--compare", *paths]) == 0
    out = capsys.readouterr().out
    assert "warning: new_tokens: A has 3, B has 5\n" in out
    assert [line for line in out.splitlines() if line.startswith("asyncbatch ")] == [
        f"asyncbatch {mode}, random:tiny, batch size 2" for mode in ("sync", "async")
    ]
    found = json.loads(compare.run(*paths, as_json=True)[0])
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in "ab"]
    for place, pair in enumerate(found["runs"]):
        wall = {one["name"]: one for one in pair["rows"]}["wall_s"]
        assert [wall["a"], wall["b"]] == [one["runs"][place]["wall_s"] for one in reports]
        assert wall["ratio"] == wall["b"] / wall["a"]

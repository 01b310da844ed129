"""`--compare OLD NEW --threshold 5%`: worse, no worse or void, and the exit status for CI."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.comparing import GPU, WORKLOAD, changed, report, row
from support.reports import call_script

from asyncbatch.profile.report import Run
from asyncbatch.profile.threshold import FIGURES, judge


@pytest.fixture
def judged(capsys, tmp_path):
    """`--compare --threshold` on two reports: (exit status, the lines up to the table, standard error)."""

    def run(a, b, *more, threshold="5%"):
        paths = [tmp_path / "a.json", tmp_path / "b.json"]
        for path, content in zip(paths, (a, b), strict=True):
            path.write_text(json.dumps(content))
        status, out, error = call_script(capsys, "--compare", *paths, "--threshold", threshold, *more)
        return status, out if "--json" in more else out.split("\n\n")[0].splitlines(), error

    return run


def test_equal_reports_are_no_worse(judged):
    assert judged(report(), report()) == (0, ["No worse by more than 5 %: 6 figures"], "")


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"tokens_per_s": 95.0}, 0, ""),
        ({"tokens_per_s": 94.9}, 3, "throughput 100.0 tokens/s, now 94.9 tokens/s: 5.10 % worse"),
        ({"tokens_per_s": 300.0}, 0, ""),
        ({"idle": 0.30}, 0, ""),  # 5 points, though it is 20 % more
        ({"idle": 0.301}, 3, "device idle 25.00 %, now 30.10 %: 5.10 points worse"),
        ({"idle": 0.0}, 0, ""),
        ({"host_ms_per_step": 1.575}, 0, ""),
        ({"host_ms_per_step": 1.58}, 3, "host work per step 1.500 ms, now 1.580 ms: 5.33 % worse"),
    ],
)
def test_a_figure_beyond_the_threshold_is_worse(judged, change, status, said):
    found, lines, error = judged(report(), report(row(), row("async", **change)))
    assert (found, error) == (status, "")
    if status == 0:
        assert lines == ["No worse by more than 5 %: 6 figures"]
    else:
        assert lines[0] == "WORSE by more than 5 %: 1 of 6 figures"
        assert lines[1].startswith(f"  asyncbatch async, m, batch size 8: {said}")
        assert len(lines) == 2


def test_the_threshold_and_the_figures_can_be_chosen(judged):
    worse = report(row(tokens_per_s=90.0, idle=0.35), row("async"))
    assert judged(report(), worse)[1][0] == "WORSE by more than 5 %: 2 of 6 figures"
    assert judged(report(), worse, threshold="12.5%")[:2] == (0, ["No worse by more than 12.5 %: 6 figures"])
    assert judged(report(), worse, "--figures", "host")[:2] == (0, ["No worse by more than 5 %: 2 figures"])
    assert judged(report(), worse, "--figures", "host,idle")[1][0] == "WORSE by more than 5 %: 1 of 4 figures"


def test_runs_whose_times_overlap_are_said_to(judged):
    lines = judged(report(row()), report(row(tokens_per_s=80.0, wall_s_of_each_run=[3.95, 6.0, 5.0])))[1]
    assert lines[1].endswith("20.00 % worse (but the times of their runs overlap: more --repeats would tell)")
    lines = judged(report(row()), report(row(tokens_per_s=80.0, wall_s_of_each_run=[4.95, 6.0, 5.0])))[1]
    assert lines[1].endswith("20.00 % worse")


VOIDS = [
    (changed(("machine",), "Linux, 4 cores"), "machine: A has Linux, 2 cores, B has Linux, 4 cores"),
    (changed(("device",), "H100"), "device: A has cpu, B has H100"),
    (changed(("schema",), 4), "schema: A has 2, B has 4"),
    (changed(("workload", "new_tokens"), 33), "new_tokens: A has 32, B has 33"),
    (changed(("workload", "arrivals"), "poisson:3"), "arrivals: A has all, B has poisson:3"),
    (changed(("workload", "prompts_sha256"), "ab"), "prompts: A has none, B has none (sha256 ab)"),
    (changed(("workload", "dtype"), "float16"), "dtype: A has none, B has float16"),
    (changed(("workload", "skipped_lines"), [3]), "skipped_lines: A has none, B has (3,)"),
    (changed(("runs", 0, "prompt_tokens"), 65), "prompt_tokens of asyncbatch sync, m, batch size 8: A has 64, B has "
     "65"),
    (changed(("same_tokens",), False), "tokens: in B sync and async of asyncbatch gave different ones, so its numbers "
     "are void"),
    (changed(("runs", 1, "interrupted"), True), "interrupted: in B asyncbatch async, m, batch size 8 ended early"),
    (report(row()), "only in A: asyncbatch async, m, batch size 8"),
    (report(row(), row("async"), row(batch_size=9)), "only in B: asyncbatch sync, m, batch size 9"),
    (report(row(), row("async", idle=None)), "asyncbatch async, m, batch size 8: B has no device idle"),
    (report(gpu=GPU), "gpu, name: A has none, B has H200"),
]  # fmt: skip


@pytest.mark.parametrize(("other", "reason"), VOIDS, ids=[reason[:30] for _, reason in VOIDS])
def test_what_cannot_be_compared_is_void_however_bad_the_figures_are(judged, other, reason):
    other = json.loads(json.dumps(other))
    other["runs"][0]["tokens_per_s"] = 1.0
    status, lines, error = judged(report(), other)
    assert (status, error) == (4, "")
    assert lines[0] == "VOID: the two reports cannot be judged"
    assert f"  {reason}" in lines[1:]
    data = json.loads(judged(report(), other, "--json")[1])
    assert data["verdict"]["status"] == "void"
    assert reason in data["verdict"]["void"]


def test_other_models_are_void(judged):
    lines = judged(report(row(model="m")), report(row(model="n")))[1]
    assert lines[1:] == [
        f"  only in {letter}: asyncbatch sync, {model}, batch size 8" for letter, model in ("Am", "Bn")
    ]


@pytest.mark.parametrize(
    "other",
    [
        changed(("versions", "torch"), "3.0"), changed(("workload", "slots"), 3), changed(("runs", 0, "setting"), "x"),
        changed(("runs", 0, "prefill_tokens"), 128), changed(("date",), "later"),
    ],
)  # fmt: skip
def test_what_may_be_just_the_change_is_judged(judged, other):
    assert judged(report(), other)[0] == 0


def test_a_driver_may_be_the_change_too(judged):
    assert judged(report(gpu=GPU), report(gpu={**GPU, "driver": "9"}))[0] == 0
    assert judged(report(workload=WORKLOAD), report())[0] == 0


def test_as_json_the_verdict_comes_first_and_has_every_figure(judged):
    status, out, _ = judged(report(row()), report(row(host_ms_per_step=3.0)), "--json")
    assert status == 3
    data = json.loads(out)
    assert list(data)[:2] == ["verdict", "a"]
    verdict = data["verdict"]
    assert (verdict["status"], verdict["threshold"], verdict["void"]) == ("worse", 0.05, [])
    assert [(one["figure"], one["worse_by"], one["worse"]) for one in verdict["figures"]] == [
        ("throughput", 0, False), ("idle", 0, False), ("host", 1.0, True),
    ]  # fmt: skip
    none = json.loads(judged(report(row(host_ms_per_step=0)), report(row()), "--json")[1])["verdict"]["figures"][2]
    assert (none["worse_by"], none["worse"]) == (None, True)


def test_reports_without_any_of_the_figures_are_void(judged):
    empty = report(row(idle=None))
    assert judged(empty, empty, "--figures", "idle")[:2] == (
        4, ["VOID: the two reports cannot be judged", "  no run of both has device idle"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threshold", "5%"], "--threshold cannot be had without --compare A.json B.json"),
        (
            ["--compare", "a", "b", "--figures", "idle"],
            "--figures cannot be had without --compare A.json B.json --",
        ),
        (["--compare", "a", "b", "--threshold", "5"], "'5' was given; allowed is a number with its sign, such as 5%"),
        (["--compare", "a", "b", "--threshold", "-5%"], "--threshold: expected one argument"),
        (["--compare", "a", "b", "--threshold", "5%", "--figures", "speed"], "allowed are throughput, idle, host"),
        (["--compare", "a", "b", "--threshold", "5%", "--seed", "3"], "--seed cannot be had with it"),
        (["--compare", "a", "b", "--threshold", "5%"], "--compare a: No such file"),
    ],
)
def test_wrong_usage_is_status_two(capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    status, out, error = call_script(capsys, *arguments)
    assert (status, out) == (2, "")
    assert said in error.splitlines()[-1]


def test_the_help_says_every_exit_status(capsys):
    text = " ".join(call_script(capsys, "--help")[1].split())
    for part in (
        "0 if B is no worse than A by more",
        "3 if it is",
        "4 if that cannot be said",
        "2 for files and",
    ):
        assert part in text


positive = st.floats(1e-3, 1e6)


@given(positive, positive, st.floats(0, 2))
def test_better_is_never_worse_and_the_threshold_only_forgives(old, new, threshold):
    a, b = (Run(tokens_per_s=one, idle=min(one, 1.0), host_ms_per_step=one) for one in (old, new))
    verdict = {one.figure: one for one in judge([("", a, b)], [], threshold).judged}
    back = {one.figure: one for one in judge([("", b, a)], [], threshold).judged}
    for figure in FIGURES:
        assert not (verdict[figure].worse and back[figure].worse)
        better = new >= old if figure == "throughput" else new <= old
        assert not (better and verdict[figure].worse)
        exact = judge([("", a, b)], [], math.inf).judged
        assert not any(one.worse for one in exact)

"""How often each loop runs: as often as the budget allows, judged by the first runs, or as often as was asked for."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from support.reports import call_script

from asyncbatch.measure.recording import Recording
from asyncbatch.profile import turns
from asyncbatch.profile.options import parse_arguments
from asyncbatch.profile.presets import PRESETS
from asyncbatch.profile.settings import settle

TINY = ("--model", "random:tiny", "--requests", "2", "--batch-size", "2", "--new-tokens", "4", "--prompt-tokens", "3")


@pytest.mark.parametrize(
    ("budget_s", "round_s", "runs"),
    [(60, 10, 6), (60, 60, 2), (60, 500, 2), (60, 29.9, 2), (60, 20, 3), (60, 19.9, 3), (60, 0.1, 9), (1, 0.0, 9)],
)
def test_how_many_runs_fit(budget_s, round_s, runs):
    assert turns.repeats_within(budget_s, round_s) == runs


def run(capsys, monkeypatch, *arguments, seconds=1.0):
    """The report, and what is said, where running each loop once takes `seconds` by the clock of the turns."""
    ticks = iter(range(1000))
    monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=lambda: seconds * next(ticks)))  # nobody else's clock
    status, out, error = call_script(capsys, *TINY, *arguments)
    assert status == 0
    return out, error


def test_the_first_runs_say_how_many_there_are_and_the_report_says_so(capsys, monkeypatch):
    out, error = run(capsys, monkeypatch, "--budget-s", "4", "--json")
    report = json.loads(out)
    assert [len(one["wall_s_of_each_run"]) for one in report["runs"]] == [4, 4]
    assert (report["workload"]["repeats"], report["workload"]["budget_s"]) == (4, 4)
    assert "4 runs of each: the first took 1.0 s, and --budget-s is 4" in error
    assert "sync: run 1: " in error
    assert "async: run 4 of 4: " in error
    out, _ = run(capsys, monkeypatch, "--budget-s", "1", seconds=50.0)
    assert "2 runs of each mode: the first of each took" in out, "a pair alone is no conclusion"


def test_repeats_overrule_the_budget(capsys, monkeypatch):
    out, error = run(capsys, monkeypatch, "--budget-s", "9", "--repeats", "1", "--json")
    report = json.loads(out)
    assert [len(one["wall_s_of_each_run"]) for one in report["runs"]] == [1, 1]
    assert report["workload"]["repeats"] == 1
    assert "budget_s" not in report["workload"]
    assert "async: run 1 of 1: " in error


def test_a_minute_is_the_default_and_a_preset_says_its_own():
    plain = settle(parse_arguments([]))
    assert (plain.repeats, plain.budget_s, plain.conditions.budget_s) == (None, 60, 60)
    assert settle(parse_arguments(["--emulate", "h200-llama-8b"]), Recording.load("h200-llama-8b")).repeats is None
    assert {preset["repeats"] for preset in PRESETS.values()} == {1}


def test_groups_that_follow_each_other_run_equally_often():
    """On a GPU two engines do not take turns: what the first group settled holds for the others."""
    settings = settle(parse_arguments([*TINY, "--engine", "asyncbatch,transformers"]))
    first = turns.Turns(settings, job=None)
    first._open = {("asyncbatch", "sync"): (None, None)}
    first._where = ""
    first._keep_within_budget(5.0)
    assert first.repeats == 3, "60 s over four times 5 s"
    assert turns.Turns(settings, job=None, repeats=first.repeats).repeats == 3

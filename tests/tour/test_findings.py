"""What the first minute says, from reports whose numbers are known."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from asyncbatch import Timeline
from asyncbatch.measure.recording import Recording
from asyncbatch.measure.text import table_lines
from asyncbatch.profile.report import Comparison, Conditions, Prediction, Report, Run
from asyncbatch.tour import page, screen
from asyncbatch.tour.findings import HEAD, WHAT, WHO, findings, point, verdict_here
from asyncbatch.tour.measuring import Answer, Beside, Here, busier_pair, recorded_pairs
from asyncbatch.tour.screen import WIDEST, _fitting

GUESS = Prediction(gain=1.01, helps=False, device_ms=52.0, between_ms=0.6, host_ms=0.5, slots=2)


def run_of(mode, idle, guess=None):
    return Run(engine="asyncbatch", mode=mode, idle=idle, batch_size=32, model="m", prediction=guess)


def report_of(idle=0.2, left=0.004, gain=1.24, ratios=(1.01,), **more):
    only = Comparison("m", 32, gain, pairs=(1.24,), device_ratios=ratios)
    return Report(
        device="cpu: a worker process, 1 thread", runs=(run_of("sync", idle, GUESS), run_of("async", left)),
        comparisons=(only,), async_speedup=gain, same_tokens=True, workload=Conditions(repeats=3),
        date="2026-11-28T10:00:00+00:00", machine="a machine", command="python -m asyncbatch.profile", **more,
    )  # fmt: skip


def timeline(label):
    made = Timeline(label)
    for number in range(8):
        made.add("host", "plan", number, 10.0 * number, 10.0 * number + 2)
        made.add("compute", "step", number, 10.0 * number + 2, 10.0 * number + 10)
        made.add_step(number, "decode", 1, 0, 1, number + 1)
    return made


def beside(**figures):
    recording = Recording.load("h200-llama-8b")
    report, timelines = report_of(**figures), (timeline("sync"), timeline("async"))
    replayed = (timeline("replayed"),) * 2
    return Beside(report, timelines, recording, recorded_pairs(recording), busier_pair(), replayed)


def here(**figures):
    return Here(report_of(idle=0.01, **figures), (), (Answer("Why <b>?", "Because & so.", 4),))


def test_the_point_is_what_was_measured():
    assert point(beside()) == (
        "Beside an NVIDIA H200 that serves an 8B model, your host leaves it idle for 20 % of the time; overlapping "
        "gives that back: 1.24x as fast."
    )
    assert "gives part of that (all but 12 %) back: 1.10x as fast." in point(beside(left=0.12, gain=1.1))
    assert "gives nothing back here: 0.98x as fast." in point(beside(gain=0.98))


def test_a_machine_that_is_too_busy_says_so_and_shows_what_was_recorded():
    """No figure of a disturbed run is shown, but a recorded pair: by docs/performance.md 14.3 % and 1.170x."""
    found = findings(here(), beside(gain=None, ratios=(1.3, 0.5)))
    assert found.emulated.startswith("This machine is too busy just now")
    assert "(equal steps took up to 2.00x as long): run it again" in found.emulated
    assert found.point == (
        "As it was recorded on an NVIDIA H200 with a 1B model, 128 requests at a time: the host left it idle for 14 % "
        "of the time; overlapping gave that back: 1.17x as fast."
    )
    assert found.rows[0][1:] == ("void", "void", "void")
    assert max(map(len, table_lines([HEAD, *found.rows]))) <= WIDEST, "a line for each"
    assert not re.search(r"20(\.0)? %|1\.24", " ".join([found.point, *found.captions, *sum(found.rows, ())]))
    assert [one.label for one in found.timelines] == ["replayed", "replayed"]
    assert all("as recorded" in caption for caption in found.captions)
    assert "The drawing shows no run of this machine" in found.emulated


def test_the_recorded_pairs_are_those_of_the_recording():
    """By hand from docs/performance.md: 74.4 s and 72.1 s, 115.8 s and 98.6 s."""
    each = {one.engine: one for one in recorded_pairs(Recording.load("h200-llama-8b"))}
    assert each["asyncbatch"].gain == pytest.approx(74.4 / 72.1, abs=2e-3)
    assert each["transformers"].gain == pytest.approx(115.8 / 98.6, abs=2e-3)
    assert [round(100 * idle, 2) for idle in each["transformers"][2:4]] == [14.26, 0.02]
    assert [round(100 * idle, 2) for idle in each["asyncbatch"][2:4]] == [3.18, 0.02]


def test_the_verdict_here_says_why():
    assert verdict_here(here().report) == (
        "On this CPU, with the embedded model of 135M: nothing to gain, because a step takes the device 52.0 ms, and "
        "0.6 ms lie between two steps: 1.01x by prediction."
    )
    pays = replace(GUESS, gain=1.4, helps=True)
    report = replace(here().report, device="NVIDIA T4", runs=(run_of("sync", 0.3, pays), run_of("async", 0.0)))
    assert verdict_here(report).startswith("On this NVIDIA T4, with the embedded model of 135M: it would pay, because")
    unknown = replace(report, runs=(run_of("sync", None), run_of("async", None)))
    assert verdict_here(unknown) == "On this NVIDIA T4: not measured."


def test_without_the_embedded_model_the_rest_is_shown_and_the_page_says_what_is_missing():
    found = findings(None, beside(), "no network")
    assert (found.here, found.answers, found.same_tokens) == (None, (), True)
    assert len(found.rows) == 4
    assert "no network" in page.page(found)


def test_different_tokens_are_a_fault_and_said():
    found = findings(here(), beside())
    assert found.same_tokens
    wrong = findings(replace(here(), report=replace(here().report, same_tokens=False)), beside())
    assert not wrong.same_tokens
    assert "The loops gave other tokens: that is a fault" in page.page(wrong)


def test_the_page_has_what_the_screen_says_and_loads_nothing():
    found = findings(here(), beside())
    text = page.page(found).replace("&#39;", "'").replace("&#34;", '"')
    said = [WHAT, WHO, found.point, found.emulated, found.here, *HEAD[1:]]
    assert [one for one in said if one not in text] == []
    assert [cell for row in found.rows for cell in row if cell not in text] == []
    assert text.index(WHAT) < text.index(WHO) < text.index(found.emulated), "for whom, before anything else"
    assert "Why &lt;b&gt;?" in text
    assert "Because &amp; so." in text
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)


def test_the_terminal_says_what_and_for_whom_before_it_measures(monkeypatch, capsys):
    """And what comes next fits 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(screen, "answers_here", lambda: pytest.fail("measured"))
    with pytest.raises(pytest.fail.Exception):
        screen.show_all()
    before = " ".join(capsys.readouterr().out.split())
    assert before.startswith(f"{WHAT} {WHO} 1 of 3 ")
    screen.end(Path("out/asyncbatch.html"))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_table_that_is_too_wide_has_what_a_row_is_about_on_a_line_of_its_own():
    table = [("", "a", "b"), ("a very long name", "1", "2")]
    assert _fitting(80, table) == ["                  a  b", "a very long name  1  2"]
    assert _fitting(16, table) == ["  a  b", "a very long name", "  1  2"]

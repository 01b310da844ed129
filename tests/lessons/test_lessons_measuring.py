"""Notebook 06: what it says to wrong answers, what it measures, and its pictures. test_teach.py tests the exercises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.wrong import measuring as answers

from asyncbatch import kv_cache
from asyncbatch.lessons import measuring, teach
from asyncbatch.lessons.exercises import measuring as exercises
from asyncbatch.measure import attribution, simulate, timing


def test_messages_name_the_fault(capsys):
    for name, wrong, words in (
        ("time_work", answers.never_waits, "You never wait for the device"),
        ("time_work", answers.forgets_earlier_work, "8 ms of that are somebody else's"),
        ("union", answers.first_to_last, "idle time in the middle as busy: only 10 ms"),
        ("union", answers.as_they_are, "what two intervals share counts twice"),
        ("union", answers.forgets_nested, "lies inside the first"),
        ("tables", answers.without_padding, "Every row must be 4 wide"),
        ("tables", answers.sorted_by_owner, "in the order that was asked for, [1, 0]"),
        ("tables", answers.block_by_block, "still a loop over the blocks"),
    ):
        teach.check(name, wrong)
        assert words in capsys.readouterr().out.replace("\n", " ")


def test_a_right_answer_that_numpy_does_in_another_way_is_right():
    def stacked(self, owners):
        return np.stack([self._tables[self._row[owner]] for owner in owners])

    assert teach.check("tables", stacked) is stacked


def test_instructions_are_counted_and_the_tracer_is_put_back():
    import sys

    def loop(count):
        for _ in range(count):
            pass

    before = sys.gettrace()
    once, again, twice = (exercises.instructions(loop, count) for count in (100, 100, 200))
    assert once == again
    assert 1.8 < twice / once < 2.1
    assert sys.gettrace() is before


def test_the_books_of_the_exercise_are_those_that_the_learner_reads():
    kv = exercises._books({0: (2,), 1: (1, 3, 5), 2: (4,)}, 3)
    assert [kv.table(owner) for owner in (0, 1, 2)] == [[2], [1, 3, 5], [4]]
    assert kv_cache.KVCache.tables(kv, [2, 1]).tolist() == [[4, 0, 0], [1, 3, 5]]


def test_time_work_calls_in_order():
    calls = []
    clock = iter([10.0, 11.0, 30.0])

    def now():
        calls.append("now")
        return next(clock)

    times = timing.time_work(lambda: calls.append("work"), lambda: calls.append("wait"), now)
    assert times == (1.0, 20.0)
    assert calls == ["wait", "now", "work", "now", "wait", "now"]


def test_a_timed_step_comes_back_before_it_is_done():
    with measuring.timed_step("cpu", 30.0) as (launch, synchronize):
        back_s, done_s = timing.time_work(launch, synchronize)
    assert back_s < done_s
    assert done_s >= 0.030


# ---- a coarse look ---------------------------------------------------------------------------------------------------


def test_a_window_of_no_length_sees_the_truth_and_a_long_one_only_kernels():
    starts = np.arange(10) * 10.0
    assert measuring.seen_share(starts, starts + 1, 0) == pytest.approx(0.1)
    assert measuring.seen_share(starts, starts + 1, 4) == pytest.approx(0.5)
    assert measuring.seen_share(starts, starts + 1, 9) == pytest.approx(1.0)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=8), st.integers(0, 12))
def test_seen_share_is_what_windows_one_by_one_see(spans, window):
    lengths = np.array(spans).ravel().cumsum()  # idle, busy, idle, busy, ...
    starts, ends = lengths[::2], lengths[1::2]
    middles = np.arange(starts[0], starts[-1], 0.5) + 0.25
    seen = [any(start < t + window and t < end for start, end in zip(starts, ends, strict=True)) for t in middles]
    assert measuring.seen_share(starts, ends, window) == pytest.approx(np.mean(seen))


def test_the_sliders_move_the_look():
    pytest.importorskip("ipywidgets")
    look = measuring.Look(host_ms=9.0, device_ms=1.0)
    assert look.seen(0) == pytest.approx(0.1)
    host, device, image = look.widget.children
    before = image.value
    host.children[0].value = 1.0
    assert look.seen(0) == pytest.approx(0.5)
    assert look.seen(1) == pytest.approx(1.0)
    assert image.value != before
    assert "the truth: busy for 1 ms of every 2 ms, 50 %" in [t.get_text() for t in look._axes.get_legend().get_texts()]
    device.children[1].value = 3.0
    assert look.seen(0) == pytest.approx(0.75)


# ---- recorded runs and pictures --------------------------------------------------------------------------------------


def test_recorded_runs_have_both_engines_and_follow_the_law_but_for_one():
    runs = measuring.recorded_runs()
    for engine in ("asyncbatch", "transformers"):
        sizes = {(run.model, run.rows) for run in runs if run.engine == engine and "short" in run.label}
        assert sizes == {(model, rows) for model in ("0.6B", "1B", "8B") for rows in (1, 8, 32, 128)}
    assert len({(run.engine, run.label) for run in runs}) == len(runs)
    far = [run for run in runs if abs(run.law - run.idle) > 0.06]
    assert [(run.engine, run.label) for run in far] == [("asyncbatch", "8B, 1 row, older code")]
    assert {run.rows for run in runs if abs(run.saved - run.idle) > 0.02} == {128}
    assert all(run.saved < run.idle + 0.02 for run in runs)
    # Only where its host takes longer than the device does the asynchronous device wait.
    waits = [run for run in runs if run.idle_async > 0.002]
    assert waits == [run for run in runs if run.host_ms_async > run.device_ms]
    assert [(run.engine, run.model, run.rows) for run in waits] == [
        ("transformers", "0.6B", 128), ("transformers", "1B", 128),
    ]  # fmt: skip


def test_pictures_draw_what_they_are_given():
    runs = measuring.recorded_runs()[:3]
    line, circles, twins = (
        each for each in (measuring.draw_law(runs).axes.lines[0], *measuring.draw_law(runs).axes.collections)
    )
    assert all(x == y for x, y in zip(*line.get_data(), strict=True))
    assert np.asarray(circles.get_offsets()) == pytest.approx(100 * np.array([(run.law, run.idle) for run in runs]))
    assert np.asarray(twins.get_offsets()) == pytest.approx(100 * np.array([(run.law, run.idle_async) for run in runs]))
    found = attribution.Attribution(0.02, {"commit": 0.015, "schedule": 0.005}, [], 10)
    bars = measuring.draw_attribution({"before": found, "after": found}, most=1)
    assert [patch.get_width() for patch in bars.axes.patches] == pytest.approx([1.5, 0.5, 1.5, 0.5])
    assert [label.get_text() for label in bars.axes.get_yticklabels()] == ["commit", "all others"] * 2
    what_if = [simulate.WhatIf("commit", "host", factor, 1.0, 1.0, 0.04, -0.001) for factor in (0.0, 0.5)]
    assert [patch.get_width() for patch in measuring.draw_what_if(what_if).axes.patches] == pytest.approx([4.0, 0.0])
    union = measuring.draw_union((0, 3), (5, 8), ((0,), (8,)))
    assert repr(union) == "<Picture: 2 intervals, 1 stretches, 8 ms busy>"
    assert len(union.axes.patches) == 3
    gaps = measuring.draw_gap_lengths([0.3, 0, 322, 0.3])
    assert [text.get_text() for text in gaps.axes.texts] == ["  the longest: 322 ms", "median 0.30 ms"]
    assert measuring.draw_launch(0.03, 20.1).png().startswith(b"\x89PNG")


def test_profile_gives_the_report_and_says_why_it_cannot(capsys):
    report = measuring.profile("--emulate", "h200-llama-8b", "--new-tokens", "4", "--batch-size", "2")
    assert [run.mode for run in report.runs] == ["sync", "async"]
    assert report.same_tokens
    screen = measuring.first_screen(report)
    assert " ".join(screen.split()) == " ".join(" ".join(report.sentences).split())
    assert screen.count("\n") < 25
    assert max(map(len, screen.splitlines())) <= 88
    with pytest.raises(RuntimeError, match="no recording 'h300'"):
        measuring.profile("--emulate", "h300")
    assert capsys.readouterr() == ("", "")

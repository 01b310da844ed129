"""What a report says first, where the numbers are known: how idle, why, what async brings, whether to believe it."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbatch import AsyncBatcher, Request, SyncBatcher, Timeline
from asyncbatch.devices.virtual import Costs
from asyncbatch.measure.percentile import median_lies_within
from asyncbatch.models.toy import toy_llama
from asyncbatch.profile.diagnosis import Place, make_report
from asyncbatch.profile.measurement import Measurement
from asyncbatch.profile.options import parse_arguments
from asyncbatch.profile.page import page
from asyncbatch.profile.pairs import Pairs, device_ratio
from asyncbatch.profile.settings import settle
from asyncbatch.profile.text import table
from asyncbatch.profile.workload import Sizes
from asyncbatch.request import Completion


def run_of(mode, device_ms=10.0, idle_ms=2.0, steps=40, decode=None, slow=1.0):
    """A run whose host works for all of the idle time before each step. decode: how many of the steps are decode steps,
    the last ones; slow: how many times as long the device takes as it should."""
    made, now = Timeline(mode), 0.0
    for step in range(steps):
        begin = now + 1e-3 * idle_ms
        made.add("host", "plan", step, now, begin)
        made.add("host", "launch", step, begin, begin)
        now = begin + 1e-3 * device_ms * slow
        made.add("compute", "step", step, begin, now)
        made.add("host", "wait", step, begin, now)
        made.add("host", "commit", step, now, now)
        made.add_step(step, "decode" if decode is None or step >= steps - decode else "prefill", 1, 0, 1, step + 1)
    return made


def report_of(sync, other, completions=(), limits=()):
    settings = settle(parse_arguments([]))
    (workload,), sizes = settings.workloads, Sizes(longest_prompt=1, new_tokens=10, max_length=11)
    measured = [
        Measurement(
            workload, sizes, "asyncbatch", mode, prompts=(1,) * len(limits), limits=limits,
            runs=[(timeline, list(completions)) for timeline in each],
        )
        for mode, each in (("sync", sync), ("async", other))
        if each
    ]  # fmt: skip
    return make_report(settings, measured, Place("none"))[0]


def test_the_first_sentences_in_their_order_are_the_same_in_the_terminal_and_on_the_page():
    report = report_of([run_of("sync")] * 6, [run_of("async", idle_ms=0.0)] * 6)
    idle, why, first, gain, believe = report.sentences
    assert idle == "The synchronous loop leaves the device idle for 16.7% of the time, measured over 39 of 40 steps."
    assert why == "Why it is idle, by who could mend it: the host's code 100% (schedule 100%)."
    assert first.startswith("Eliminate this first: schedule (")
    assert "the synchronous run takes 16.7% less time, the asynchronous one 0.5%" in first
    # 40 x 12 ms beside 40 x 10; the prediction is of 2 ms at the beginning and 40 x 10.
    assert "1.200x as fast (between 1.200x and 1.200x, 97% sure, 6 pairs of runs)" in gain
    assert f"predicted from the synchronous run: {480 / 402:.3f}x" in gain
    assert "It hides most of the 2.000 ms between two steps of 10.000 ms on the device." in gain
    assert believe.startswith("Nothing speaks against these numbers: equal steps took the device the same time")
    text, shown = table(report), page(report, [])
    for sentence in report.sentences:
        assert sentence in text
        assert sentence.replace("'", "&#39;") in shown.replace("&#x27;", "&#39;")


@pytest.mark.parametrize("slow", [1.6, 1 / 1.6])
def test_a_disturbed_device_makes_the_ratio_void_and_that_is_said_in_its_place(slow):
    """The device takes 1.6 times as long in one run, or 0.6: the ratio of such a pair says nothing about the loops."""
    sync, other = run_of("sync"), run_of("async", idle_ms=0.0, slow=slow)
    report = report_of([sync], [other])
    (comparison,) = report.comparisons
    assert (report.async_speedup, comparison.interval) == (None, None)
    assert comparison.device_ratios == (pytest.approx(slow),)
    assert "not measured, since the runs are void" in report.verdict
    assert report.sentences[0] == report.trust[0]
    assert "up to 1.6" in report.trust[0]
    assert "(in 1 of 1 pairs of runs), so no ratio is given." in report.trust[0]
    assert report.trust[0].startswith("Void: the same steps took the device")
    (measured,) = comparison.pairs
    assert f"{measured:.3f}x" not in " ".join(report.sentences)


def test_a_disturbed_pair_among_others_is_left_out():
    sync, other, slow = run_of("sync"), run_of("async", idle_ms=0.0), run_of("async", idle_ms=0.0, slow=1.6)
    report = report_of([sync] * 3, [other, slow, other])
    assert report.async_speedup == pytest.approx(1.2)
    assert report.trust[0].startswith("Disturbed: ")
    assert "(in 1 of 3 pairs of runs), and those pairs are left out." in report.trust[0]
    assert report.sentences[0] == report.idleness, "the others count"
    assert report_of([sync] * 2, [other, slow]).async_speedup is None, "half of the pairs are not enough"
    # Both slow alike: equal steps took equal time, and the ratio is that of the loops.
    assert report_of([run_of("sync", slow=2)], [slow]).async_speedup is None
    assert report_of([run_of("sync", slow=1.6)], [slow]).async_speedup == pytest.approx(18 / 16)


def test_only_equal_steps_are_compared():
    """An asynchronous run may have other steps; the device's time for those says nothing."""
    a, b = run_of("sync", steps=10), run_of("async", steps=20, slow=1.5)
    assert device_ratio(a, b) == pytest.approx(1.5)
    shifted = Timeline("async")
    for lane, name, step, start, end in a.spans:
        shifted.add(lane, name, step, start, end)
    for step in a.steps:
        shifted.add_step(*step[:4], rows=2, context=step.context)
    assert device_ratio(a, shifted) is None
    assert Pairs.of([a], [shifted]).speedup == 1.0, "what cannot be told does not make it void"
    report = report_of([a] * 6, [shifted] * 6)
    assert report.comparisons[0].device_ratios is None
    assert not [doubt for doubt in report.trust if "equal steps" in doubt], "nor does anything speak for it"


def test_one_pair_is_no_conclusion_and_few_pairs_say_how_sure_they_are():
    sync, other = run_of("sync"), run_of("async", idle_ms=0.0)
    one = report_of([sync], [other])
    assert "1.200x as fast in one pair of runs, which is no conclusion" in one.verdict
    assert "between" not in one.verdict.split(";")[0]
    faster, slower = run_of("async", idle_ms=0.5), run_of("async", idle_ms=3.0)
    mixed = report_of([sync] * 3, [faster, slower, run_of("async", idle_ms=1.9)])
    assert "no difference that these runs could show (1.008x, between 0.923x and 1.143x, 75% sure, 3" in mixed.verdict
    lost = report_of([sync] * 6, [slower] * 6)
    assert "0.923x as fast, so it is slower" in lost.verdict
    assert any("disagree: 1.194x predicted, 0.923x to 0.923x measured" in doubt for doubt in lost.trust)


@pytest.mark.parametrize(
    ("count", "place", "sure"), [(2, 0, 0.5), (3, 0, 0.75), (5, 0, 0.9375), (6, 0, 0.96875), (9, 1, 0.9609375)]
)
def test_where_a_median_lies(count, place, sure):
    """By the sign test: of 9 values, 2 x (1 + 9) of 512 ways leave the median outside the second to the eighth."""
    values = list(range(10, 10 + count))
    assert median_lies_within(values[::-1]) == (values[place], values[-1 - place], pytest.approx(sure))
    assert median_lies_within([1.0]) is None


@given(st.lists(st.floats(0.1, 10), min_size=6, max_size=60))
def test_an_interval_holds_the_median_and_is_sure(values):
    low, high, sure = median_lies_within(values)
    assert low <= statistics.median(values) <= high
    assert 0.95 <= sure < 1


def test_few_steps_are_said_beside_the_number_and_all_steps_are_told_too():
    """9 decode steps of 112: before each of the others the device is idle for longer."""
    made, other = run_of("sync", steps=112, decode=9), Timeline("sync")
    for lane, name, step, start, end in made.spans:
        late = 3e-3 * min(step, 102)
        other.add(lane, name, step, start + late, end + late)
    for step in made.steps:
        other.add_step(*step)
    report = report_of([other], [])
    (run,) = report.runs
    assert (run.measured_steps, run.steps) == (9, 112)
    assert "measured over 9 of 112 steps" in report.idleness
    assert run.idle == pytest.approx(2 / 12)
    assert run.idle_all_steps > run.idle
    assert any(doubt.startswith("Few steps: active and idle are of 9 of 112 steps only") for doubt in report.trust)
    assert run.gaps.all_idle_s > 10 * run.gaps.idle_s
    assert sum(run.gaps.all_by.values()) == pytest.approx(run.gaps.all_idle_s)
    assert not [doubt for doubt in report_of([run_of("sync", steps=21)], []).trust if doubt.startswith("Few steps")]


def test_of_an_even_number_of_runs_the_figures_lie_between_the_two_in_the_middle():
    each = [run_of("sync", idle_ms=idle) for idle in (1, 2, 4, 9)]
    report = report_of(each, [])
    (run,) = report.runs
    assert run.wall_s == pytest.approx((40 * 12 + 40 * 14) / 2e3)
    assert run.idle == pytest.approx((2 / 12 + 4 / 14) / 2)
    assert run.tokens_per_s == pytest.approx(40 / run.wall_s)
    assert sum(run.gaps.by.values()) == pytest.approx(39 * 4e-3), "drawn and explained is the slower one of the two"
    (odd,) = report_of(each[:3], []).runs
    assert odd.wall_s == each[1].summary().wall_s


def test_with_one_slot_nothing_is_predicted_to_be_gained():
    sync = run_of("sync")
    measurement = Measurement(None, None, "asyncbatch", "sync", slots=1, runs=[(sync, [])])
    guess = measurement.explanation.prediction
    assert (guess.slots, guess.gain) == (1, 1.0)


@pytest.mark.parametrize("early", [False, True])
def test_early_stops_cost_the_predicted_loop_the_steps_that_they_cost_the_real_one(early):
    """Two requests that end at the same token: before their limit, the asynchronous loop computes one more step."""
    model, costs = toy_llama(), Costs()
    options = dict(max_batch_size=2, block_size=4, max_length=64, clock=costs, step_s=0.0)
    requests = [Request([3, 5], 9, stop_token_ids=())] * 2
    with SyncBatcher(model, **options) as batcher:
        tokens = batcher.run(requests)[0].token_ids
    if early:
        requests = [replace(one, max_new_tokens=30, stop_token_ids=(tokens[-1],)) for one in requests]
    runs = {}
    for loop in (SyncBatcher, AsyncBatcher):
        with loop(model, **options) as batcher:
            runs[loop.mode] = batcher.run(requests), batcher.timeline
    measurement = Measurement(
        None, None, "asyncbatch", "sync", prompts=(2, 2), limits=tuple(one.max_new_tokens for one in requests)
    )
    completions, timeline = runs["sync"]
    measurement.runs.append((timeline, completions))
    guess = measurement.explanation.prediction
    assert guess.early_stops == (2 if early else 0)
    assert runs["async"][1].summary().wasted_tokens == (2 if early else 0)
    assert guess.async_s == pytest.approx(runs["async"][1].summary().wall_s, rel=0.03 if early else 1e-9)
    assert all(isinstance(one, Completion) for one in completions)

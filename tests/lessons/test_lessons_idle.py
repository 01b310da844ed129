"""Notebooks 00 and 01: wrong answers to their exercises, and their pictures. test_teach.py runs the checks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbatch import timeline
from asyncbatch.lessons import idle
from asyncbatch.lessons.exercises import idle as exercises
from asyncbatch.measure import simulate

SECONDS = st.integers(0, 50)


# Wrong answers as learners write them: at least three for each exercise, each with a fault of its own.
def ratio_to_device(host_s, device_s):
    return host_s / device_s


def share_of_device(host_s, device_s):
    return device_s / (host_s + device_s)


def whole_number(host_s, device_s):
    return host_s // (host_s + device_s)


def percent(host_s, device_s):
    return 100 * host_s / (host_s + device_s)


def time_left(host_s, device_s):
    return max(host_s, device_s) / (host_s + device_s)


def idle_once_more(host_s, device_s):
    return host_s / (host_s + device_s)


def how_much_more(host_s, device_s):
    return (host_s + device_s) / max(host_s, device_s) - 1


def shorter_of_the_two(host_s, device_s):
    return (host_s + device_s) / min(host_s, device_s)


def device_always(host_s, device_s):
    return (host_s + device_s) / device_s


def never_below_two(host_s, device_s):
    return 2 if host_s >= device_s else (host_s + device_s) / device_s


def gaps_of_no_length(starts, ends):
    return [(i, starts[i] - ends[i - 1]) for i in range(1, len(starts))]


def step_before(starts, ends):
    return [(i - 1, starts[i] - ends[i - 1]) for i in range(1, len(starts)) if starts[i] > ends[i - 1]]


def start_to_start(starts, ends):
    return [(i, starts[i] - starts[i - 1]) for i in range(1, len(starts)) if starts[i] > ends[i - 1]]


def before_the_first(starts, ends):
    return [(i, start - end) for i, (start, end) in enumerate(zip(starts, [0, *ends], strict=False)) if start > end]


def only_the_first(starts, ends):
    return next(([(i, starts[i] - ends[i - 1])] for i in range(1, len(starts)) if starts[i] > ends[i - 1]), [])


def only_seconds(starts, ends):
    return [starts[i] - ends[i - 1] for i in range(1, len(starts)) if starts[i] > ends[i - 1]]


def length_first(token_ids, max_new_tokens, stop_token_ids):
    if len(token_ids) >= max_new_tokens:
        return "length"
    return "stop" if token_ids and token_ids[-1] in stop_token_ids else None


def one_too_many(token_ids, max_new_tokens, stop_token_ids):
    if token_ids and token_ids[-1] in stop_token_ids:
        return "stop"
    return "length" if len(token_ids) > max_new_tokens else None


def first_stop_only(token_ids, max_new_tokens, stop_token_ids):
    if token_ids and stop_token_ids and token_ids[-1] == stop_token_ids[0]:
        return "stop"
    return "length" if len(token_ids) >= max_new_tokens else None


def forgets_empty(token_ids, max_new_tokens, stop_token_ids):
    if token_ids[-1] in stop_token_ids:
        return "stop"
    return "length" if len(token_ids) >= max_new_tokens else None


def two_always_stops(token_ids, max_new_tokens, stop_token_ids):
    if token_ids and token_ids[-1] in (*stop_token_ids, 2) or 2 in token_ids:
        return "stop"
    return "length" if len(token_ids) >= max_new_tokens else None


def ignores_rows(chunk_sizes, free_rows, budget):
    count = total = 0
    for chunk in chunk_sizes:
        total += chunk
        if total > budget:
            break
        count += 1
    return count


def ignores_budget(chunk_sizes, free_rows, budget):
    return min(len(chunk_sizes), free_rows)


def strictly_less(chunk_sizes, free_rows, budget):
    count = total = 0
    for chunk in chunk_sizes:
        if count >= free_rows or total + chunk >= budget:
            break
        count, total = count + 1, total + chunk
    return count


def lets_overtake(chunk_sizes, free_rows, budget):
    count = total = 0
    for chunk in chunk_sizes:
        if count < free_rows and total + chunk <= budget:
            count, total = count + 1, total + chunk
    return count


def counts_tokens(chunk_sizes, free_rows, budget):
    return min(sum(chunk_sizes), budget)


def counts_first_step(starts, ends):
    return sum(e - s for s, e in zip(starts, ends, strict=True)), ends[-1] - starts[0]


def period_from_start(starts, ends):
    return sum(e - s for s, e in zip(starts[1:], ends[1:], strict=True)), ends[-1] - starts[0]


def same_length_steps(starts, ends):
    return (ends[0] - starts[0]) * (len(ends) - 1), ends[-1] - ends[0]


def period_from_zero(starts, ends):
    return sum(e - s for s, e in zip(starts[1:], ends[1:], strict=True)), ends[-1] - 6.0


def share_alone(starts, ends):
    return sum(e - s for s, e in zip(starts[1:], ends[1:], strict=True)) / (ends[-1] - ends[0])


WRONG = {
    "idle_share": (ratio_to_device, share_of_device, whole_number, percent),
    "overlap_gain": (
        time_left,
        idle_once_more,
        how_much_more,
        shorter_of_the_two,
        device_always,
        never_below_two,
    ),
    "idle_gaps": (gaps_of_no_length, step_before, start_to_start, before_the_first, only_the_first, only_seconds),
    "finish_reason": (length_first, one_too_many, first_stop_only, forgets_empty, two_always_stops),
    "fit_budget": (ignores_rows, ignores_budget, strictly_less, lets_overtake, counts_tokens),
    "device_activity": (counts_first_step, period_from_start, same_length_steps, period_from_zero, share_alone),
}


def test_draw_batches_counts_wasted_places():
    picture = idle.draw_batches({"a": [[0, 0], [1, None]], "b": [[0], [1]]})
    assert repr(picture) == "<Picture: a: 2 steps, 1 of 4 places wasted; b: 1 steps, 0 of 2 places wasted>"
    drawn = picture.axes.patches
    assert [patch.get_hatch() for patch in drawn].count("///") == 1
    assert len(drawn) == 6


def test_the_sliders_move_the_star_and_say_the_idle_share():
    pytest.importorskip("ipywidgets")
    law = idle.IdleLaw(host_ms=2.0, device_ms=6.0)
    assert law.idle == 0.25
    host, device, image = law.widget.children
    before = image.value
    host.children[0].value = 6.0
    assert law.idle == 0.5
    assert image.value != before
    device.children[1].value = 18.0  # the box beside the slider
    assert device.children[0].value == 18.0
    assert law.idle == 0.25
    assert "host 6 ms, device 18 ms: idle 25 %" in [text.get_text() for text in law.axes.get_legend().get_texts()]
    device.children[1].value = 1e9  # out of bounds: the box takes the nearest value
    assert law.device_ms == 100.0


def test_recorded_servers_follow_the_law():
    for run in idle.RECORDED:
        assert abs(timeline.idle_share(run.host_ms, run.async_ms) - run.idle) < 0.025


def test_the_gain_slider_moves_the_star_and_says_the_gain():
    pytest.importorskip("ipywidgets")
    law = idle.GainLaw({"one": (1.0, 10.0, 1.05)}, host_ms=5.0, device_ms=2.0)
    assert law.gain == pytest.approx(1.4)
    host, device, image = law.widget.children
    before = image.value
    host.children[0].value = 2.0
    assert law.gain == 2.0
    assert image.value != before
    device.children[1].value = 8.0
    assert law.gain == 1.25
    labels = [text.get_text() for text in law.axes.get_legend().get_texts()]
    assert labels == ["A  one", "host 2 ms, device 8 ms: 1.25 times"]


@given(st.lists(st.tuples(SECONDS, st.integers(1, 50)), min_size=1, max_size=8))
def test_gaps_are_what_is_missing_from_the_active_time(waits_and_steps):
    starts, ends = [], []
    for wait, step in waits_and_steps:
        starts.append((ends[-1] if ends else 0) + wait)
        ends.append(starts[-1] + step)
    gaps = timeline.idle_gaps(starts, ends)
    active, period = timeline.device_activity(starts, ends)
    assert sum(seconds for _, seconds in gaps) == period - active
    assert gaps == [(i, wait) for i, (wait, _) in enumerate(waits_and_steps) if i and wait]


@given(st.integers(0, 50), st.integers(1, 50))
def test_the_gain_is_what_the_closed_form_says_and_undoes_the_idle_share(host, device):
    gain = timeline.overlap_gain(host, device)
    cost = simulate.StepCost(before=host, copy_in=0.0, step=device, copy_out=0.0, commit=0.0)
    assert gain == pytest.approx(simulate.async_step_s(cost, slots=1) / simulate.async_step_s(cost, slots=2))
    assert 1 <= gain <= 2
    if host <= device:
        assert gain == pytest.approx(1 / (1 - timeline.idle_share(host, device)))


def words(picture) -> list[str]:
    return [text.get_text() for text in picture.axes.texts if text.get_text()]


def test_pictures_say_what_they_show():
    budget = idle.draw_budget([40, 30, 10], 4, 64, admitted=1)
    assert words(budget) == ["40 joins", "30 waits", "10 waits", "budget 64 tokens, 4 free rows"]
    assert [patch.get_hatch() for patch in budget.axes.patches] == [None, "///", "///"]
    periods = idle.draw_periods([0, 10, 18], [6, 16, 26])
    assert [word for word in words(periods) if "period" in word] == ["period 10, active 6", "period 10, active 8"]
    gaps = idle.draw_gaps([0, 6, 12], [5, 12, 15], [(1, 1.0)])
    assert words(gaps) == ["step 0", "step 1", "step 2", "1"]
    (found,) = [patch for patch in gaps.axes.patches if patch.get_hatch()]
    assert (found.get_x(), found.get_width()) == (5.0, 1.0)
    costs = idle.draw_costs({1: 40.0, 8: 80.0})
    assert [list(line.get_ydata()) for line in costs.axes.lines] == [[40.0, 80.0], [40.0, 10.0]]


@pytest.mark.parametrize(
    ("got", "told"),
    [
        ([1.0], "a list of pairs"),
        ([(1, 0), (2, 2)], "Step 1 starts just when step 0 ends"),
        ([(0, 3), (2, 2)], "Step 0 has no step before it"),
        ([(1, 2)], "Name the step that comes late"),
        ([(2, 7)], "from start to start"),
        ([], "Step 1 ends at 10 and step 2 starts at 12: the device was idle for 2"),
        ([(2, 9)], None),
    ],
)
def test_what_is_wrong_with_gaps_is_told_in_terms_of_the_steps(got, told):
    args = ([0, 5, 12], [5, 10, 15])
    said = exercises.explain_gaps(args, got, timeline.idle_gaps(*args))
    assert said is told is None or told in said

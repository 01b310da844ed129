"""Notebooks 00 and 01: what they compute, and their pictures. test_teach.py tests the exercises."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbatch import AsyncBatcher, SyncBatcher, timeline
from asyncbatch.lessons import idle
from asyncbatch.lessons.exercises import idle as exercises
from asyncbatch.measure import law, simulate

SECONDS = st.integers(0, 50)


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
    assert host.children[1].value == 6.0
    assert law.idle == 0.5
    assert image.value != before
    device.children[1].value = 18.0  # the box beside the slider
    assert device.children[0].value == 18.0
    assert law.idle == 0.25
    assert "host 6 ms, device 18 ms: idle 25 %" in [text.get_text() for text in law.axes.get_legend().get_texts()]
    device.children[1].value = 1e9  # out of bounds: the box takes the nearest value
    assert law.device_ms == 100.0
    device.children[0].value = 12.3456789  # dragged, and three digits are kept
    assert law.device_ms == device.children[1].value == 12.3
    for control, low, high in ((host, 0.1, 20.0), (device, 0.5, 100.0)):
        slide, box = control.children
        for end in (low, high, low):
            box.value = end
            assert slide.value == pytest.approx(end)
            slide.value = high if end == low else low
            assert box.value == pytest.approx(slide.value)
        assert 10**slide.min == pytest.approx(low), "the slider is logarithmic, as the axis is"
        assert 10**slide.max == pytest.approx(high)


def test_recorded_servers_follow_the_law():
    """A synchronous step and its idle share say what an asynchronous step takes, which was measured apart."""
    for run in idle.RECORDED:
        assert law.idle_share(run.host_ms, run.device_ms) == pytest.approx(run.idle)
        assert run.async_ms == pytest.approx(max(run.host_ms, run.device_ms), rel=0.03)


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
def test_the_gain_is_what_the_simulated_loops_have_and_undoes_the_idle_share(host, device):
    gain = law.overlap_gain(host, device)
    cost = simulate.StepCost(before=host, copy_in=0.0, step=device, copy_out=0.0, commit=0.0)
    sync, other = (simulate.simulate([cost] * 9, slots) for slots in (1, 2))
    assert gain == pytest.approx(sync.step_s / other.step_s)
    assert 1 <= gain <= 2
    if host <= device:
        assert gain == pytest.approx(1 / (1 - law.idle_share(host, device)))


@pytest.mark.parametrize("law", [idle.IdleLaw(2, 6), idle.GainLaw({"slow": (1.0, 10.0, 0.9)}, 5, 2)])
def test_a_law_has_units_on_both_axes_shows_every_dot_and_fits_a_small_screen(law):
    axes = law.axes
    assert axes.get_xscale() == "log"
    assert "millisecond" in axes.get_xlabel()
    assert axes.get_ylabel() in ("idle, %", "times as fast")
    (low, high), (left, right) = axes.get_ylim(), axes.get_xlim()
    for line in axes.lines:
        if line.get_marker() in ("o", "*"):
            (x,), (y,) = line.get_data()
            assert left < x < right
            assert low < y < high
    sliders = 2 * 40
    assert law.figure.get_figheight() * law.figure.dpi + sliders < 768 - 250, "JupyterLab's bars take 250 pixels"
    pytest.importorskip("ipywidgets")
    layout = law.widget.children[-1].layout
    assert (layout.width, layout.max_width) == ("800px", "100%"), "not stretched to the width of the page"
    assert layout.align_self == "flex-start"


def test_servers_on_the_exact_clock_take_what_is_said():
    runs = {Batcher: idle.exact(Batcher, host_ms=2.0) for Batcher in (SyncBatcher, AsyncBatcher)}
    assert [round(idle.step_ms(run), 6) for run in runs.values()] == [6.0, 3.8]  # 2 + 3.8 + 0.2, and the device alone
    assert [round(idle.device_ms(run), 6) for run in runs.values()] == [3.8, 3.8]
    starts, ends = idle.steps(runs[SyncBatcher])
    assert len(starts) == len(ends) == 12
    assert [round(starts[i] - ends[i - 1], 6) for i in range(1, 12)] == [2.2] * 11
    host, device, faster = idle.point(*runs.values())
    assert (round(host, 6), round(device, 6)) == (2.0, 3.8)
    assert faster == pytest.approx(12 * 6.0 / (12 * 3.8 + 2.2))


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
    (gap,) = [patch for patch in gaps.axes.patches if patch.get_hatch()]
    assert (gap.get_x(), gap.get_width()) == (5.0, 1.0)
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

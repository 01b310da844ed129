"""Timelines drawn as plain characters: what a column says is what the device and the host did in it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbatch import Timeline
from asyncbatch.tour.drawing import LABEL, STEPS, Stretch, lanes, parts, scale, step_cells, stretches


def run_of(gaps, step=8.0, work=1.0, label="sync"):
    """Decode steps that take `step` seconds each; before each one the device is idle for so long, and the host works
    for `work` of it."""
    made, now = Timeline(label), 0.0
    for number, gap in enumerate(gaps):
        begin = now + gap
        made.add("host", "plan", number, now, now + min(work, gap))
        made.add("host", "wait", number, begin, begin + step)
        made.add("compute", "step", number, begin, begin + step)
        made.add_step(number, "decode", 1, 0, 1, number + 1)
        now = begin + step
    return made


def test_a_stretch_drawn_by_hand():
    """Gaps of 2 s, of which the host works for 1 s; a column is 1 s."""
    host, device = lanes(run_of([2.0] * 4), Stretch(0.0, 30.0), 30)
    assert device.cells == "..[= 0 ==]..[= 1 ==]..[= 2 ==]"
    assert host.cells == "#         #         #         "
    assert parts(device)[:2] == [("..", "idle"), ("[= 0 ==]", "device")]
    assert parts(host)[:2] == [("#", "host"), (" " * 9, "")]
    assert scale(Stretch(0.0, 30.0), 30) == "0" + "30000.0 ms".rjust(29)


def test_a_step_that_began_before_the_stretch_or_ends_after_it_has_no_edge_there():
    _, device = lanes(run_of([2.0] * 4), Stretch(5.0, 15.0), 10)
    assert device.cells == "0 ==]..[= "


@pytest.mark.parametrize(("room", "drawn"), [(0, ""), (1, "="), (2, "[]"), (4, "[==]"), (7, "[= 7 =]"), (5, "[ 7 ]")])
def test_a_step_has_its_number_where_there_is_room(room, drawn):
    assert step_cells(7, room) == drawn


@given(
    st.lists(st.floats(0, 3), min_size=STEPS + 2, max_size=12),
    st.floats(0.2, 9),
    st.integers(20, 150),
)
def test_idle_columns_are_the_idle_time_of_the_stretch(gaps, step, columns):
    """The share of "." is the idle share of what is drawn, but for the rounding of each edge to a column. Counted
    apart from the drawing: the stretch cut with each step."""
    timeline = run_of(gaps, step)
    stretch, other = stretches(timeline, timeline)
    _, device = lanes(timeline, stretch, columns)
    busy, steps = 0.0, 0
    for span in timeline.spans:
        if span.lane == "compute" and span.end > stretch.start and span.start < stretch.end:
            busy += min(span.end, stretch.end) - max(span.start, stretch.start)
            steps += 1
    idle = 1 - busy / (stretch.end - stretch.start)
    assert len(device.cells) == columns
    assert device.cells.count(".") / columns == pytest.approx(idle, abs=(steps + 1) / columns)
    assert other.end - other.start == pytest.approx(stretch.end - stretch.start)


def test_both_stretches_are_as_long_and_begin_with_the_same_step_and_an_odd_one_is_not_drawn():
    """One gap of ten is 50 times as long: what is drawn are four periods as they usually are."""
    gaps = [2.0] * 20
    gaps[9] = 100.0
    sync, other = run_of(gaps), run_of([0.0] * 20, label="async")
    first, second = stretches(sync, other)
    assert first.end - first.start == second.end - second.start == pytest.approx(4 * 10.0)
    drawn = [lanes(timeline, stretch, 80)[1].cells for timeline, stretch in ((sync, first), (other, second))]
    numbers = [[int(word) for word in re.findall(r"\d+", cells)] for cells in drawn]
    assert numbers[0][0] == numbers[1][0]
    assert len(numbers[0]) == 4
    assert len(numbers[1]) == 5, "in the same time the overlapped loop does more"
    assert "." not in drawn[1]


def test_runs_of_few_steps_are_drawn_whole_and_of_none_are_refused():
    few = run_of([1.0, 1.0])
    first, second = stretches(few, few)
    assert (first.start, first.end) == (1.0, 18.0)
    assert second == first
    with pytest.raises(ValueError, match="has no step on the device"):
        stretches(Timeline("empty"), few)
    assert len("device ") <= LABEL

"""Notebook 01: the loop of continuous batching does what the package's scheduler does, and its checks cannot hang."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbatch import Request
from asyncbatch.kv_cache import KVCache
from asyncbatch.lessons import batching, kept, teach
from asyncbatch.lessons.exercises.batching import Asks, Served
from asyncbatch.request import finish_reason
from asyncbatch.scheduler import RunState, Scheduler, fit_budget


def by_the_scheduler(lengths: list[int], rows: int) -> list[list[int]]:
    """Who is in each step of the package's own scheduler, synchronously."""
    blocks = KVCache(num_blocks=len(lengths), block_size=32, max_blocks_per_owner=1, max_owners=len(lengths))
    scheduler = Scheduler(blocks, max_batch_size=rows, prefill_sizes=[64])
    for number, length in enumerate(lengths):
        scheduler.add(RunState(number, Request([1, 2, 3], max_new_tokens=length), frozenset()))
    served = []
    while plan := scheduler.plan():
        scheduler.commit(plan, [7] * len(plan.rows))
        served.append(sorted(row.state.number for row in plan.rows))
    return served


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 6))
def test_the_loop_serves_whom_the_packages_scheduler_serves(lengths, rows):
    device = batching.ToyDevice()
    asked = batching.asked(lengths)
    batching.continuous_batch(asked, rows, 64, device.compute)
    assert [sorted(batch) for batch in device.batches] == by_the_scheduler(lengths, rows)
    assert [len(one.token_ids) for one in asked] == lengths


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8),
       st.integers(1, 4), st.integers(8, 20))  # fmt: skip
def test_the_loop_keeps_to_rows_budget_and_stop_tokens(asks, rows, budget):
    served = Served(batching.continuous_batch, rows, budget, Asks(asks))
    assert (served.fault, served.error) == ("", None)
    assert [len(one.token_ids) for one in served.requests] == [min(writes, most) for _, writes, most in asks]
    joined = [min(step for step, batch in enumerate(served.batches) if number in batch) for number in range(len(asks))]
    assert joined == sorted(joined), "first come, first served"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=10), st.integers(1, 5))
def test_a_grid_has_everybody_once_a_step_in_a_row_that_they_keep(lengths, rows):
    device = batching.ToyDevice()
    batching.continuous_batch(batching.asked(lengths), rows, 64, device.compute)
    grid = device.grid(rows)
    assert len(grid) == rows
    columns = [[number for number in column if number is not None] for column in zip(*grid, strict=True)]
    assert [sorted(column) for column in columns] == [sorted(batch) for batch in device.batches]
    for number, length in enumerate(lengths):
        assert [row.count(number) for row in grid if number in row] == [length]


def test_the_toy_devices_time_is_what_was_said():
    device = batching.ToyDevice(step=1.5)
    batching.continuous_batch(batching.asked([3, 2]), 2, 64, device.compute)
    _, _, starts, ends = device.timeline.lane("compute")
    assert [round(1000 * (end - start), 6) for start, end in zip(starts, ends, strict=True)] == [1.5] * 3
    assert [round(1000 * gap, 6) for gap in starts[1:] - ends[:-1]] == [2.0] * 2  # 1.8 of the host, 0.2 of copies
    assert [step.kind for step in device.timeline.steps] == ["prefill", "decode", "decode"]
    with pytest.raises(KeyError, match="no part fetch; it has plan, fill, launch, commit, copy_in, step, copy_out"):
        batching.ToyDevice(fetch=1.0)


def test_a_loop_with_too_many_rows_is_drawn_all_the_same():
    device = batching.ToyDevice()
    device.compute(batching.asked([5, 5]))
    device.compute(batching.asked([5, 5, 5, 5]))
    assert device.grid(2) == [[0, 0], [1, 1], [None, 2], [None, 3]]


def goes_on_for_ever(waiting, rows, budget, compute):
    while True:
        compute([])


def raises(waiting, rows, budget, compute):
    return waiting[99]


@pytest.mark.parametrize(
    ("loop", "told"),
    [(goes_on_for_ever, "it was stopped after 60 steps"), (raises, "stopped with IndexError: list index out of range")],
)
def test_a_loop_that_does_not_end_or_stops_is_told_so(loop, told, capsys):
    assert teach.check("continuous_batch", loop) is batching.continuous_batch
    assert told in capsys.readouterr().out.replace("\n", " ")


def learners(waiting, rows, budget, compute):
    left, here = list(waiting), []
    while left or here:
        count = fit_budget([len(one.prompt) for one in left], rows - len(here), budget)
        here, left = here + left[:count], left[count:]
        compute(here)
        here = [one for one in here if not finish_reason(one.token_ids, one.max_new_tokens, one.stop_token_ids)]


def test_a_right_loop_is_kept_with_the_two_functions_that_it_uses(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(kept.VARIABLE, str(tmp_path))
    assert teach.check("continuous_batch", learners) is learners
    again = teach.yours("continuous_batch")
    assert "continuous_batch: yours, from" in capsys.readouterr().out
    batches = []

    def compute(batch):
        batches.append([one.number for one in batch])
        for one in batch:
            one.token_ids.append(7)

    again(batching.asked([2, 1, 1]), 2, 64, compute)
    assert batches == [[0, 1], [0, 2]]


def test_a_measurement_that_noise_has_spoiled_is_told_and_goes_on(capsys):
    teach.seen(True)
    assert capsys.readouterr().out == ""
    teach.seen(False)
    assert capsys.readouterr().out.startswith("Disturbed, run me again: ")
    guess = teach.predict("Which?", ["this", "that"])
    guess.reveal("A", "Since.", shown=False)
    told = capsys.readouterr().out
    assert told.startswith("The answer is A: this.\nSince.\nDisturbed, run me again: ")

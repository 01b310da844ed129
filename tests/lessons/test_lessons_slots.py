"""Notebook 04's lesson: wrong answers get the message that helps, pictures show what is wrong in words too, the puzzles
are faults, and what is said of slots, graphs and checkers is so."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.wrong.slots import WRONG

from asyncbatch.lessons import slots, teach
from asyncbatch.lessons.exercises import EXERCISES
from asyncbatch.runner import Runner
from asyncbatch.slot import carry_ids, slot_of
from asyncbatch.streams import launch_step

CASES = [(name, wrong) for name, answers in WRONG.items() for wrong in answers]


@pytest.mark.parametrize(("name", "wrong"), CASES, ids=[wrong.__name__ for _, wrong in CASES])
def test_a_wrong_answer_gets_the_message_that_helps_on_three_lines(name, wrong, capsys):
    assert teach.check(name, wrong) is EXERCISES[name].reference
    out = capsys.readouterr().out
    for beginning in (f"{name}: not yet.\n", "\nYou gave: ", "\nExpected: ", "\nWhy: "):
        assert beginning in "\n" + out
    assert WRONG[name][wrong] in out.replace("\n", " ")


@pytest.mark.parametrize(("name", "wrong"), [case for case in CASES if case[0] == "carry_over"])
def test_pictures_of_wrong_answers_mark_them(name, wrong):
    exercise = EXERCISES[name]
    for args, *_ in exercise.cases:
        got, want = (exercise.answer(each, *args) for each in (wrong, exercise.reference))
        if not isinstance(got, list) or len(got) != len(want):
            continue
        picture = exercise.picture(args, got, want)
        hatched = [patch for patch in picture.axes.patches if patch.get_hatch()]
        assert len(hatched) == sum(a != b for a, b in zip(got, want, strict=True))
        picture.png(dpi=20)


# ---- the package's own functions, against plain loops ---------------------------------------------------------------


@given(st.data())
def test_carry_ids_and_carry_over_bring_the_token_that_was_sampled(data):
    """A hand-made device: a dict of what each (step, row) sampled, of which the slots keep the newest."""
    num_slots, batch = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    newest = data.draw(st.integers(num_slots, 12))
    sampled = {(step, row): 1000 * step + row for step in range(newest) for row in range(batch)}
    outputs = [0] * (num_slots * batch)
    for step in range(newest):
        for row in range(batch):
            outputs[(step - num_slots * (step // num_slots)) * batch + row] = sampled[step, row]
    kept_steps = st.integers(newest - num_slots, newest - 1)
    carries = data.draw(st.lists(st.none() | st.tuples(kept_steps, st.integers(0, batch - 1)), min_size=1, max_size=6))
    ids = data.draw(st.lists(st.integers(0, 99), min_size=len(carries), max_size=len(carries)))
    carry = carry_ids(carries, num_slots, batch)
    got = Runner.carry_over(*(torch.tensor(part, dtype=torch.int32) for part in (carry, outputs, ids)))
    assert got.tolist() == [i if c is None else sampled[c] for c, i in zip(carries, ids, strict=True)]


# ---- puzzles ---------------------------------------------------------------------------------------------------------

OUTPUTS, STEPS = torch.tensor([51, 52, 53, 0, 0, 7]), torch.tensor([41, 42, 43, 61, 62, 63])
TWO = torch.tensor([51, 52, 53, 61, 62, 63])
NOTHING = torch.tensor([0, 0, 0])
GIVEN = {  # name: (as in the notebook, mended), each as (carry, outputs, ids)
    "moved": (
        (torch.tensor([0, 1, -1]), OUTPUTS, torch.tensor([0, 0, 17])),
        (torch.tensor(carry_ids([(0, 1), (0, 2), None], 2, 3)), OUTPUTS, torch.tensor([0, 0, 17])),
    ),
    "wrong slot": (
        (torch.tensor([slot_of(2, 2) * 3 + row for row in range(3)]), STEPS, NOTHING),
        (torch.tensor([slot_of(2 - 1, 2) * 3 + row for row in range(3)]), STEPS, NOTHING),
    ),
    "placeholder": (
        (torch.tensor([3, -1, 5]), TWO, NOTHING),
        (torch.tensor([3, -1, 5]), TWO, torch.tensor([0, 58, 0])),
    ),
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_puzzle_tells_the_symptom_first_then_what_is_wrong_then_that_it_is_mended(name, capsys):
    found, mended = GIVEN[name]
    picture = slots.puzzle(name, Runner.carry_over(*found), *found)
    out = capsys.readouterr().out
    assert "How it was found: " in out
    assert "not yet" not in out
    assert any(patch.get_hatch() for patch in picture.axes.patches)
    picture = slots.puzzle(name, Runner.carry_over(*mended), *mended)
    assert capsys.readouterr().out.startswith(f"{name}: mended.")
    assert not any(patch.get_hatch() for patch in picture.axes.patches)
    slots.puzzle(name, torch.tensor([1, 2, 3]), *found)
    out = capsys.readouterr().out
    for beginning in ("You gave: [1, 2, 3]", "Expected: ", "Why: "):
        assert beginning in out


def test_the_throw_away_token(capsys):
    end, sampled, samples = torch.tensor([4]), torch.tensor([99]), torch.tensor([False])
    for place, word in ((end, "How it was found"), (torch.where(samples, end, -1), "mended"), (end + 1, "not yet")):
        pool = torch.tensor([[11, 12, 13, 14, 15, 16, 0, 0]])
        pool[0, place] = sampled
        picture = slots.puzzle("throw-away", pool)
        assert word in capsys.readouterr().out
        assert any(patch.get_hatch() for patch in picture.axes.patches) == (word != "mended")


# ---- what the notebook says ------------------------------------------------------------------------------------------


def test_batches_in_one_slot_clash():
    assert slots.clash(launch_step) == [48, 48]


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_turns_clash_only_where_a_slot_is_filled_too_early(num_slots):
    title = slots.draw_turns(slot_of, num_slots).title
    assert ("no slot is filled too early" in title) == (num_slots > 1)
    assert "step 1 is filled into slot 0, which holds step 0" in slots.draw_turns(lambda step, n: 0, num_slots).title


def test_the_bytes_are_those_of_the_slots():
    for rows, length, num_slots in ((32, 8192, 2), (4, 64, 3)):
        server = slots.server(max_batch_size=rows, max_length=length, num_slots=num_slots)
        picture = slots.draw_slot_bytes(server, 131_072)
        whole = sum(part.nbytes for part in (server.slots[0].inputs, server.slots[0].output_ids))
        assert picture.title.startswith(f"{num_slots} slots of {whole:,} bytes")
        assert f"block tables {4 * rows * -(-length // 16):,}" in picture.title


def test_graphs_may_share_memory_on_one_stream_only():
    one, two = slots.two_graphs(1), slots.two_graphs(2)
    assert [(outcome.cells["result 0"], outcome.cells["result 1"]) for outcome in one] == [(10, 20)]
    results = {(outcome.cells["result 0"], outcome.cells["result 1"]) for outcome in two}
    assert results == {(10, 20), (20, 20), (10, 10)}


def test_the_checker_believes_names():
    assert slots.watched("slot 0's inputs", "slot 1's inputs") == "no race"
    assert "a race" in slots.watched("inputs", "inputs")


def test_the_designs_are_drawn():
    assert slots.draw_designs().title == "the other slot's outputs; a token pool; a map of requests"

"""Notebook 05's lesson: a learner's step gets the message that helps and cannot hang, parts of a learner's serve the
real loop on every device, turns are told as they happen, and the puzzles are faults that their line mends."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
import torch
from support.wrong.loop import RIGHT_STEPS, WRONG

from asyncbatch import AsyncBatcher, Request
from asyncbatch.batcher import AsyncBatcher as Reference
from asyncbatch.kv_cache import KVCache
from asyncbatch.lessons import learned, loop, teach
from asyncbatch.lessons.exercises import EXERCISES
from asyncbatch.models import load_model
from asyncbatch.ordering.toy import toy_tokens
from asyncbatch.runner import Runner
from asyncbatch.scheduler import RunState
from asyncbatch.streams import launch_step, order

NOTEBOOK = next((Path(__file__).parents[2] / "notebooks").glob("05_*.ipynb"))
CASES = [(name, wrong) for name, answers in WRONG.items() for wrong in answers]


# ---- exercises -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "wrong"), CASES, ids=[wrong.__name__ for _, wrong in CASES])
def test_a_wrong_answer_gets_the_message_that_helps_on_three_lines(name, wrong, capsys):
    assert teach.check(name, wrong) is EXERCISES[name].reference
    out = capsys.readouterr().out
    for beginning in (f"{name}: not yet.\n", "\nYou gave: ", "\nExpected: ", "\nWhy: "):
        assert beginning in "\n" + out
    assert WRONG[name][wrong] in out.replace("\n", " ")


def test_six_wrong_steps_and_more_get_a_message_each():
    assert len(set(WRONG["step"].values())) >= 12


@pytest.mark.parametrize("step", RIGHT_STEPS, ids=lambda step: step.__name__)
def test_a_right_step_in_other_words_is_right(step, capsys):
    assert teach.check("step", step) is step
    assert "right in all 4 cases" in capsys.readouterr().out


def test_a_step_that_swallows_exceptions_ends_all_the_same(capsys):
    def swallows(self):
        while True:
            try:
                self.plan()
            except Exception:
                continue

    teach.check("step", swallows)
    assert "Your step never came back" in capsys.readouterr().out


def test_the_step_is_drawn_with_the_right_one_below_it():
    exercise = EXERCISES["step"]
    args = exercise.cases[0].args
    want = exercise.answer(exercise.reference, *args)
    got = exercise.answer(next(iter(WRONG["step"])), *args)
    titles = [text.get_text() for text in exercise.picture(args, got, want).axes.texts]
    assert "your step" in titles
    assert "the package's" in titles
    assert "the package's" not in [text.get_text() for text in exercise.picture(args, want, want).axes.texts]


def test_what_is_fully_launched_is_asked_of_the_package_itself():
    for (prompt, new, placed, generated), *_ in EXERCISES["fully_launched"].cases:
        state = RunState(0, Request(list(range(prompt)), max_new_tokens=new), frozenset())
        state.placed, state.generated = placed, list(range(generated))
        assert state.fully_launched == (placed >= prompt + new - 1)


# ---- a batcher of the learner's parts --------------------------------------------------------------------------------


def their_launch(lanes, slot):
    """As a learner writes it for the lab, where "step" is the name of every step, with PyTorch's `wait_stream`."""
    h2d, compute, d2h = lanes
    h2d.launch("copy_in", slot.index)
    compute.wait_stream(h2d)
    compute.launch("step", slot.index)
    order(compute, d2h, slot.step_done)
    d2h.launch("copy_out", slot.index)
    d2h.record_event(slot.outputs_ready)


def their_carry_over(carry, outputs, ids):
    return torch.where(carry >= 0, outputs[carry].clamp(min=0), ids)


def their_prune(kv, owner):
    blocks = kv.table(owner)
    for block in blocks:
        kv.owner_of[block] = -1
        kv.free.append(block)
    if blocks:
        kv.drop_table(owner)
    return len(blocks)


THEIRS = {
    "step": RIGHT_STEPS[0], "launch_step": their_launch, "prune": their_prune, "carry_over": their_carry_over
}  # fmt: skip


def test_their_parts_serve_a_real_model_on_a_device_of_its_own():
    """In a worker process: the learner's carry-over travels there as text."""
    model, _ = load_model("random:tiny", device="cpu")
    requests = [Request([n, n + 1, n + 2], max_new_tokens=6 + n) for n in range(1, 5)]
    with AsyncBatcher(model, max_batch_size=3, max_length=64) as batcher:
        want = [done.token_ids for done in batcher.run(requests)]
    with learned.YourBatcher(model, **THEIRS, max_batch_size=3, max_length=64) as batcher:
        assert [done.token_ids for done in batcher.run(requests)] == want
        assert batcher.timeline.label == "yours"
        assert batcher.kv.num_free == batcher.kv.num_blocks


def zeros_only(carry, outputs, ids):
    return ids


def test_a_part_that_is_wrong_shows_so_the_parts_are_really_used():
    model, _ = load_model("random:tiny", device="cpu")
    requests = [Request([n, n + 1, n + 2], max_new_tokens=8) for n in range(1, 4)]
    with AsyncBatcher(model, max_batch_size=3, max_length=64) as batcher:
        want = [done.token_ids for done in batcher.run(requests)]
    with learned.YourBatcher(model, carry_over=zeros_only, max_batch_size=3, max_length=64) as batcher:
        assert [done.token_ids for done in batcher.run(requests)] != want
    calls = []
    with loop.toy_batcher(
        loop.YourBatcher,
        step=lambda self: calls.append("step") or Reference.step(self),
        launch_step=lambda streams, slot: calls.append("launch_step") or launch_step(streams, slot),
        prune=lambda kv, owner: calls.append("prune") or KVCache.prune(kv, owner),
    ) as batcher:
        batcher.run([loop.request([1, 2], 3)])
    assert set(calls) == {"step", "launch_step", "prune"}


def test_the_package_s_own_carry_over_needs_no_other_runner():
    with loop.toy_batcher(loop.YourBatcher, carry_over=Runner.carry_over) as batcher:
        assert batcher.runner is None


def test_limited_stops_a_loop_and_leaves_other_code_alone():
    def long(most):
        return sum(helper(number) for number in range(most))

    helper = torch.nn.functional.relu  # another file: as many lines as it likes

    def forever(_):
        while True:
            pass

    assert learned.limited(lambda x: x + 1)(2) == 3
    with pytest.raises(learned.Endless, match="stopped after 50 lines"):
        learned.limited(forever, most=50)(0)
    assert learned.limited(long)(0) == 0
    import sys

    assert sys.gettrace() is None or "coverage" in sys.modules


# ---- turn by turn ----------------------------------------------------------------------------------------------------


def test_a_story_tells_a_late_stop_and_its_wasted_token():
    a, b = loop.request([1, 2, 3], 6, stop_after=3), loop.request([4, 5], 6)
    told = loop.story([a, b])
    assert told.turns[:5] == [
        "plan 0 (A B), launch 0",
        "plan 1 (A B), launch 1, wait 0, commit 0",
        "plan 2 (A B), launch 2, wait 1, commit 1",
        "plan 3 (A B), launch 3, wait 2, commit 2 - A ends (stop)",
        "plan 4 (B), launch 4, wait 3, commit 3 - 1 wasted",
    ]
    assert [done.token_ids for done in told.completions] == [toy_tokens(a), toy_tokens(b)]
    assert str(told).endswith("\n1 wasted token")


@pytest.mark.parametrize("num_slots", [1, 2, 3, 4])
def test_each_slot_more_wastes_one_token_more_and_a_length_limit_none(num_slots):
    for stop_after, wasted in ((2, num_slots - 1), (None, 0)):
        told = loop.story([loop.request([1, 2, 3], 8, stop_after)], num_slots=num_slots)
        assert told.timeline.summary().wasted_tokens == wasted


def test_who_joins_is_cancelled_or_preempted_is_told():
    a, b, c = loop.request([1, 2, 3], 6), loop.request([4, 5], 5), loop.request([7], 3)
    told = loop.story([a, b], late={2: c}, cancel={3: 0})
    assert told.turns[2].startswith("C is submitted, plan 2 (A B)")
    assert told.turns[3] == "A is cancelled, plan 3 (B C), launch 3, wait 2, commit 2 - 1 wasted"
    assert [done.finish_reason for done in told.completions] == ["cancelled", "length", "length"]
    told = loop.story([loop.request(range(6), 5), loop.request(range(5), 5)], num_blocks=5)
    assert sum("B is preempted" in turn for turn in told.turns) == 1
    want = [toy_tokens(loop.request(range(size), 5)) for size in (6, 5)]
    assert [done.token_ids for done in told.completions] == want


def test_a_loop_that_never_gets_done_is_given_up():
    with pytest.raises(learned.Endless):
        loop.story([loop.request([1], 3)], step=lambda self: True)


def test_rounds_label_every_block_of_the_host_and_mark_idle_time():
    one = [loop.request([1, 2, 3], 5)]
    picture = loop.draw_rounds({"sync": loop.synchronous(one), "async": loop.story(one).timeline})
    words = [text.get_text() for text in picture.axes.texts]
    for part in ("plan", "fill", "launch", "wait", "commit", "step"):
        for step in range(5):
            assert f"{part} {step}" in words or part == "wait", (part, step)
    assert picture.title == "sync: 5 steps; async: 5 steps"
    _, _, starts, ends = loop.synchronous(one).lane("compute")
    assert (1000 * (starts[1:] - ends[:-1])).round(6).tolist() == [5.4] * 4


# ---- find the missing line -------------------------------------------------------------------------------------------

CELLS = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
PUZZLES = {
    match[1]: cell.source for cell in CELLS if (match := re.search(r"^def (\w+_\d)\(", cell.source, re.MULTILINE))
}
MENDED = {  # name: (what stands in the notebook, what belongs there)
    "launch_1": ("    compute.launch(", "    compute.wait_event(slot.inputs_ready)\n    compute.launch("),
    "launch_2": (
        '    d2h.launch("copy_out", slot.index)\n    d2h.wait_event(slot.step_done)',
        '    d2h.wait_event(slot.step_done)\n    d2h.launch("copy_out", slot.index)',
    ),
    "wait_3": ("slot.step_done", "slot.outputs_ready"),
    "wait_4": ("other.inputs_ready", "slot.outputs_ready"),
    "carry_ids_5": ("batch + row ", "batch + carry[1] "),
    "carry_ids_6": ("(carry[0] + 1)", "carry[0]"),
    "prune_7": ("    return len", "    if blocks:\n        kv.drop_table(owner)\n    return len"),
    "commit_8": (
        "        state.generated.append",
        "        if state.finish_reason:\n            wasted += 1\n            continue\n"
        "        state.generated.append",
    ),
    "token_number_9": ("row.state.num_known", "row.position + row.num_tokens"),
}
FOUND = {  # name: (tokens wrong, checker, blocks wrong), as the notebook says
    "launch_1": (False, True, False), "launch_2": (True, True, False), "wait_3": (True, True, False),
    "wait_4": (True, True, False), "carry_ids_5": (True, False, False), "carry_ids_6": (True, False, False),
    "prune_7": (True, False, True), "commit_8": (True, False, False), "token_number_9": (True, False, False),
}  # fmt: skip


def tried(source):
    """Run a puzzle's cell, and return its last line's value."""
    lines = source.strip().splitlines()
    space = {"loop": loop, "torch": torch}
    exec("\n".join(lines[:-1]), space)
    return eval(lines[-1], space)


def test_all_puzzles_are_here():
    assert list(PUZZLES) == list(MENDED) == list(FOUND)


@pytest.mark.parametrize("name", MENDED)
def test_a_puzzle_is_a_fault_found_as_the_notebook_says_and_its_line_mends_it(name):
    wrong = tried(PUZZLES[name])
    assert not wrong.right
    found = ("tokens: wrong" in wrong.title, "Race checker: nothing" not in wrong.title, "Blocks: wrong" in wrong.title)
    assert found == FOUND[name]
    before, after = MENDED[name]
    assert PUZZLES[name].count(before) == 1
    mended = tried(PUZZLES[name].replace(before, after))
    assert mended.right, mended
    assert wrong.png()[:4] == b"\x89PNG"


def test_the_loop_as_it_is_passes_the_trial_and_three_slots_too():
    assert loop.trial().right
    assert loop.trial(step=RIGHT_STEPS[1]).right


def test_a_trial_of_a_loop_that_does_not_end_or_breaks_says_so():
    assert "the loop goes on turning" in loop.trial(step=lambda self: True).title
    assert "stopped with ZeroDivisionError" in loop.trial(wait=lambda batcher, slot: 1 / 0).title


def test_blocks_that_do_not_agree_are_a_fault_though_all_tokens_are_right():
    ended = {}  # by the cache of each run: who has been pruned

    def once_more(kv, owner):
        count = KVCache.prune(kv, owner)
        pruned = ended.setdefault(id(kv), set())
        pruned.add(owner)
        if len(pruned) == 9 and kv.num_free == kv.num_blocks:  # the eight, and the one that was cancelled
            kv.free.append(1)
        return count

    found = loop.trial(prune=once_more)
    assert "tokens: right in all requests" in found.title
    assert "Blocks: wrong: 13 blocks lie on kv.free, 12 different ones, of 12" in found.title
    assert not found.right


def test_one_host_buffer_is_found_by_tokens_only():
    found = loop.trial(host_buffers=next(wrong for wrong in WRONG["host_buffers"] if "input" in wrong.__name__))
    assert "tokens: wrong" in found.title
    assert "Race checker: nothing" in found.title
    assert loop.trial(host_buffers=EXERCISES["host_buffers"].reference).right

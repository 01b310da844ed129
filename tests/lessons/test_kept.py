"""What a learner wrote travels: it is kept as a text that works by itself, checked again, and never in the way."""

from __future__ import annotations

import math
import os
from functools import partial

import pytest
import torch
from support.wrong.cache import frees_nothing

from asyncbatch.kv_cache import NOBODY, KVCache
from asyncbatch.lessons import kept, teach
from asyncbatch.lessons.exercises import EXERCISES
from asyncbatch.streams import launch_step, order

OFFSET = 3


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """A folder of answers, as the one beside a reader's notebooks. It need not be there yet."""
    monkeypatch.setenv(kept.VARIABLE, str(tmp_path / "my-answers"))
    return tmp_path / "my-answers"


def typed(source, name, **space):
    """A function as it is in a notebook: typed into a cell, with the names of other cells around it."""
    import linecache

    file = f"<cell {len(linecache.cache)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    space["__name__"] = "__main__"
    exec(compile(source, file, "exec"), space)
    return space[name]


PRUNE = """
def prune(kv, owner):
    blocks = kv.table(owner)
    if blocks:
        kv.owner_of[blocks] = NOBODY
        kv.free.extend(blocks)
        kv.drop_table(owner)
    return len(blocks)
"""
LAUNCH = """
def launch_step(lanes, slot):
    h2d, compute, d2h = lanes
    h2d.launch("copy_in", slot.index)
    order(h2d, compute, slot.inputs_ready)
    compute.launch("step", slot.index)
    order(compute, d2h, slot.step_done)
    d2h.launch("copy_out", slot.index)
    d2h.record_event(slot.outputs_ready)
"""
ORDER = """
def order(earlier, later, event):
    earlier.record_event(event)
    later.wait_event(event)
"""


def test_a_right_answer_is_kept_and_is_theirs_in_the_next_notebook(answers, capsys):
    prune = typed(PRUNE, "prune", NOBODY=NOBODY)
    assert teach.check("prune", prune) is prune
    assert "It is kept for later notebooks, in my-answers/prune.py." in capsys.readouterr().out
    text = (answers / "prune.py").read_text()
    assert "NOBODY = -1" in text
    assert "def prune(kv, owner):" in text
    again = teach.yours("prune")
    assert capsys.readouterr().out == "prune: yours, from my-answers/prune.py.\n"
    assert again is not prune
    assert again is not KVCache.prune
    kv = KVCache(4, 4, 4, 2)
    kv.allocate(0, 8)
    assert again(kv, 0) == 2
    teach.solution("prune")  # the text of a kept function can be shown too
    assert kept.source_of(again, "prune").strip().endswith("return len(blocks)")


def test_what_it_uses_of_other_cells_travels_with_it(answers):
    mine = typed(ORDER, "order")
    launch = typed(LAUNCH, "launch_step", order=mine)
    teach.check("launch_step", launch)
    text = (answers / "launch_step.py").read_text()
    assert text.index("def order(") < text.index("def launch_step(")
    by_package = typed(LAUNCH, "launch_step", order=order)
    teach.check("launch_step", by_package)
    assert "from asyncbatch.streams import order as order" in (answers / "launch_step.py").read_text()
    assert teach.yours("launch_step") is not launch_step


def test_a_wrong_answer_is_not_kept_and_does_not_replace_a_right_one(answers):
    teach.check("prune", frees_nothing)
    assert not answers.exists()
    teach.check("prune", typed(PRUNE, "prune", NOBODY=NOBODY))
    before = (answers / "prune.py").read_text()
    teach.check("prune", frees_nothing)
    teach.check("prune", KVCache.prune)  # the package's own is nobody's answer
    teach.check("prune", lambda kv, owner: ...)
    assert (answers / "prune.py").read_text() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def prune(kv, owner):\n    return 0\n", "yours, from my-answers/prune.py, does not pass its check any more"),
        ("def prune(kv, owner:\n", "stopped with SyntaxError"),
        ("def another(kv, owner):\n    return 0\n", "stopped with KeyError"),
        ("1 / 0\n", "stopped with ZeroDivisionError"),
    ],
    ids=["wrong by now", "no Python", "another name", "raises"],
)
def test_a_file_that_somebody_changed_is_told_and_not_used(text, said, answers, capsys):
    answers.mkdir()
    (answers / "prune.py").write_text(text)
    assert teach.yours("prune") is KVCache.prune
    out = capsys.readouterr().out.replace("\n", " ")
    assert out.startswith("prune: the package's own (")
    assert said in out


def test_with_nothing_there_it_is_the_package_s_own_in_constant_words(answers, monkeypatch, capsys):
    for value in (str(answers), ""):
        monkeypatch.setenv(kept.VARIABLE, value)
        assert teach.yours("prune") is KVCache.prune
        assert capsys.readouterr().out == "prune: the package's own (my-answers holds none of yours).\n"
    assert not answers.exists()
    with pytest.raises(ValueError, match="there is no exercise"):
        teach.yours("prun")


def test_nothing_is_kept_outside_of_notebooks_nor_when_it_is_switched_off(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prune = typed(PRUNE, "prune", NOBODY=NOBODY)
    for value in ("", None):
        monkeypatch.setenv(kept.VARIABLE, "") if value == "" else monkeypatch.delenv(kept.VARIABLE)
        assert teach.check("prune", prune) is prune
        assert "kept" not in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


def test_the_tests_and_the_tool_that_runs_notebooks_look_for_no_answers():
    assert os.environ[kept.VARIABLE] == ""


class Thing:
    """Something that cannot be written down."""


CANNOT = {
    "a thing of the notebook": (
        typed("def f(x):\n    return thing, x\n", "f", thing=Thing()),
        "it uses thing, a Thing",
    ),
    "no function": (partial(max, 1), "it is a partial"),
    "a closure": ((lambda y: lambda x: x + y)(1), "it is made inside another function"),
    "no text": (eval("lambda x: x"), "the text of <lambda> is not known"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_written_down_is_said_and_the_notebook_goes_on(case, answers):
    function, reason = CANNOT[case]
    with pytest.raises(kept.CannotKeep, match=reason):
        kept.source_of(function, "f")
    assert kept.keep("f", function).startswith("It could not be kept for later notebooks: ")
    assert not (answers / "f.py").exists()


def test_modules_values_defaults_and_inner_functions_travel():
    source = """
def f(x, more=OFFSET, *, again=OFFSET):
    def inner(y):
        return math.floor(y) + names["a"] + helper(y)
    return torch.tensor([inner(x) + more + again])
"""
    helper = typed("def helper(y):\n    return 100 * HUNDREDS\n", "helper", HUNDREDS=1)
    made = typed(
        source, "f", OFFSET=OFFSET, math=math, torch=torch, names={"a": 10}, helper=helper, x=Thing(), y=Thing()
    )
    again = kept.defined(kept.source_of(made, "f"), "f")
    assert again(2.5).tolist() == made(2.5).tolist() == [2 + 10 + 100 + 6]


def test_a_lambda_and_a_function_of_another_name_travel():
    made = typed("f = lambda carry, n: carry % n\n", "f")
    assert kept.defined(kept.source_of(made, "f"), "f")(7, 4) == 3
    made = typed("def my_own(step, num_slots):\n    return step % num_slots\n", "my_own")
    assert kept.defined(kept.source_of(made, "slot_of"), "slot_of")(7, 4) == 3


@pytest.mark.parametrize("name", EXERCISES)
def test_every_reference_typed_by_a_learner_is_kept_and_found_right_again(name, answers, capsys):
    """The package's own solutions, as if learners had typed them: what is kept passes the check by itself."""
    from support.wrong_answers import cell_source

    learners = typed(cell_source(EXERCISES[name].reference, name), name)
    assert teach.check(name, learners) is learners
    out = capsys.readouterr().out.replace("\n", " ")
    assert f"It is kept for later notebooks, in my-answers/{name}.py." in out
    assert teach.yours(name) is not EXERCISES[name].reference

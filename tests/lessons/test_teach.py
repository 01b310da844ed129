"""The teaching helpers: checks judge rightly, predictions remember, and no text of a caller becomes HTML."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
from support.lessons import BADGES
from support.wrong_answers import cell_source, wrong_answers

from asyncbatch.lessons import teach
from asyncbatch.lessons.exercises import EXERCISES

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
WRONG = wrong_answers()
TOLD_IN_TEXT = ("08",)  # a trace is read event by event there, and other engines line by line


def test_every_exercise_has_three_wrong_answers():
    assert WRONG.keys() == EXERCISES.keys()
    assert {name: len(wrong) for name, wrong in WRONG.items() if len(set(wrong)) < 3} == {}


@pytest.mark.parametrize("name", EXERCISES)
def test_answers_can_be_typed_into_a_notebook(name):
    """As the browser's test does with the right answer and with the first wrong one."""
    for function in (EXERCISES[name].reference, WRONG[name][0]):
        typed = {}
        exec(cell_source(function, name), typed)
        assert callable(typed[name])
        assert typed[name].__name__ == function.__name__


@pytest.mark.parametrize("name", EXERCISES)
def test_reference_passes_and_is_returned(name, capsys):
    reference = EXERCISES[name].reference
    assert teach.check(name, reference) is reference
    out = capsys.readouterr().out
    assert f"{name}: right in all" in out
    assert "the package's own" in out  # a check cell run twice does not praise a learner who wrote nothing

    def learners(*args):
        return reference(*args)

    assert teach.check(name, learners) is learners
    assert f"{name}: right in all" in (out := capsys.readouterr().out)
    assert "with your function" in out.replace("\n", " ")


@pytest.mark.parametrize("name", EXERCISES)
def test_each_wrong_answer_is_rejected_with_its_own_message(name, capsys):
    messages = []
    for wrong in WRONG[name]:
        assert teach.check(name, wrong) is EXERCISES[name].reference, wrong.__name__
        messages.append(capsys.readouterr().out.replace("\n", " "))
        assert f"{name}: not yet" in messages[-1]
        assert "is right." in messages[-1]
    lessons = [re.split(r"is right\.", message)[1] for message in messages]
    assert len(lessons) >= 3
    # Two ways to make one mistake may get one message.
    assert len(set(lessons)) >= max(3, len(lessons) - 1), "different faults get the same explanation"


def stub_that_raises(*args):
    raise NotImplementedError


def stub_with_dots(*args):
    return ...


@pytest.mark.parametrize("stub", [stub_that_raises, stub_with_dots])
@pytest.mark.parametrize("name", EXERCISES)
def test_an_untouched_stub_says_so(name, stub, capsys):
    assert teach.check(name, stub) is EXERCISES[name].reference
    assert capsys.readouterr().out.startswith(f"{name}: not attempted yet.")


def test_the_message_names_the_input_in_the_learners_terms(capsys):
    teach.check("fit_budget", WRONG["fit_budget"][0])  # ignores the free rows
    out = capsys.readouterr().out.replace("\n", " ")
    assert "room for 2 requests and a budget of 64 tokens your function admitted 3. Expected: 2 is right. Why: " in out
    assert "no third row is free" in out


def test_odd_answers_are_wrong_and_never_raise(capsys):
    def breaks(chunk_sizes, free_rows, budget):
        return [][1]

    for odd in (lambda *args: None, lambda *args: "2", lambda: 2, breaks):
        assert teach.check("fit_budget", odd) is EXERCISES["fit_budget"].reference
    assert "stopped with IndexError" in capsys.readouterr().out.replace("\n", " ")


def test_known_slips_are_really_wrong():
    for name, exercise in EXERCISES.items():
        for args, _, slips in exercise.cases:
            for value, text in slips:
                assert not teach._same(value, exercise.reference(*args)), f"{name}{args}: {text}"


def test_a_function_that_changes_its_arguments_is_judged_by_its_answers():
    def empties(chunk_sizes, free_rows, budget):
        count = EXERCISES["fit_budget"].reference(chunk_sizes, free_rows, budget)
        chunk_sizes.clear()
        return count

    assert teach.check("fit_budget", empties) is empties
    assert teach.check("fit_budget", empties) is empties  # and the cases are as they were


def test_hints_and_solution(capsys):
    for name, exercise in EXERCISES.items():
        for number in (1, 2):
            teach.hint(name, number)
        teach.solution(name)
        out = capsys.readouterr().out
        assert inspect.getsource(exercise.reference) in out
        assert f"# from {exercise.reference.__module__.replace('.', '/')}.py" in out
    for bad in (lambda: teach.hint("fit_budget", 3), lambda: teach.hint("fitbudget", 1), lambda: teach.solution("x")):
        with pytest.raises(ValueError, match="hints 1 and 2|there are"):
            bad()


def test_prediction_without_a_choice_with_the_right_and_with_a_wrong_one(capsys):
    guess = teach.predict("Which?", ["this", "that"])
    guess.reveal("B", "Since.")
    assert capsys.readouterr().out == "The answer is B: that.\nSince.\n"
    guess.choose("B")
    guess.reveal("B", "Since.")
    assert capsys.readouterr().out == "You chose B: that. That is right.\nSince.\n"
    guess.choose("A")
    guess.reveal("B", "Since.")
    assert capsys.readouterr().out == "You chose A: this. The answer is B: that.\nSince.\n"
    for bad in ("C", "", "b", 1):
        with pytest.raises(ValueError, match="not one of the options A, B"):
            guess.choose(bad)
    for bad in ([], ["one"], "yes", list("abcdefghi")):
        with pytest.raises(ValueError, match="2 to 8 options"):
            teach.predict("Which?", bad)


def test_the_widget_sets_the_choice_and_shows_text_as_text():
    pytest.importorskip("ipywidgets")
    guess = teach.predict("<img src=x onerror=alert(1)> & more?", ["<b>bold</b>", "plain"])
    bundle = guess._repr_mimebundle_()
    assert bundle["text/plain"] == repr(guess)
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert set(bundle) <= {"text/plain", "application/vnd.jupyter.widget-view+json"}  # no HTML of ours anywhere
    title, buttons = guess.widget.children
    assert "<img" not in title.value
    assert "&lt;img" in title.value
    assert guess.choice is None
    buttons.value = "B"
    assert guess.choice == "B"


def test_without_ipywidgets_the_text_is_shown(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
    guess = teach.predict("Which?", ["this", "that"])
    assert guess._repr_mimebundle_() == {"text/plain": "Predict: Which?\n  A: this\n  B: that"}


def test_setup_says_device_and_clock(capsys):
    assert teach.setup() in ("cpu", "cuda")
    out = capsys.readouterr().out
    assert "torch" in out
    assert re.search(r"Device: \w+.* Clock: (host|cuda)", out)


EXERCISE = re.compile(r"^### Exercise (\d+): .+ \((\d+) minutes\)$", re.MULTILINE)


def cells(path) -> list[dict]:
    return [cell | {"source": "".join(cell["source"])} for cell in json.loads(path.read_text("utf-8"))["cells"]]


def has_picture(cell) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", ()))


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_hold_to_the_form_of_a_lesson(path):
    book = cells(path)
    markdown = [cell["source"] for cell in book if cell["cell_type"] == "markdown"]
    code = [cell["source"] for cell in book if cell["cell_type"] == "code"]
    text, program = "\n\n".join(markdown), "\n".join(code)
    for promise in ("able to", "**Time:** ", " minutes", "**Needs:** "):
        assert promise in markdown[0]
    assert BADGES.search(markdown[0]), "no badges in the first cell"
    lengths = sorted(len(source.strip().splitlines()) for source in code)
    assert lengths[len(lengths) // 2] < 8
    assert lengths[-1] <= 20

    assert program.count("teach.predict(") >= 3
    assert program.count(".reveal(") == program.count("teach.predict(")
    assert len(re.findall(r"<summary>Answer \d</summary>", text)) >= 3
    assert "**What just happened.**" in text

    pictures = [number for number, cell in enumerate(book) if has_picture(cell)]
    in_view = [cell for cell in book if "scaffolding" not in cell["metadata"].get("tags", ())]
    most = 24 if path.stem.startswith(TOLD_IN_TEXT) else 9  # cells for each picture
    assert len(in_view) <= most * len(pictures), f"{len(in_view)} cells with {len(pictures)} pictures"
    around = {number: book[number - 1]["source"] + book[number + 1]["source"] for number in pictures}
    alone = [number for number, text in around.items() if "*Picture: " not in text]
    assert alone == [], "no sentence above or below says what these pictures show, or what to look for"


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_exercises_of_a_notebook_rise_and_are_complete(path):
    book = cells(path)
    text = "\n\n".join(cell["source"] for cell in book if cell["cell_type"] == "markdown")
    labels = [(int(number), int(minutes)) for number, minutes in EXERCISE.findall(text)]
    minutes = [minutes for _, minutes in labels]
    assert [number for number, _ in labels] == list(range(1, len(labels) + 1))
    assert len(labels) >= 3
    assert minutes == sorted(minutes), "each is at least as long as the one before"
    checks = [number for number, cell in enumerate(book) if " = teach.check(" in cell["source"]]
    assert len(checks) == len(labels)
    for number in checks:
        name = re.match(r'(\w+) = teach\.check\("\1", \1\)\n', book[number]["source"])[1]
        assert re.search(rf"^def {name}\(.*# your code here", book[number - 1]["source"], re.MULTILINE | re.DOTALL)
        assert f'# teach.solution("{name}")' in book[number]["source"]
        for hint in EXERCISES[name].hints:
            assert hint in text, f"{path.name}: a hint of {name} differs from the exercise's"

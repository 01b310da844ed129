"""The teacher's page says what notebooks and wrong answers say; what a teacher wrote stays where it belongs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from support.wrong_answers import wrong_answers

from asyncbatch.lessons.exercises import EXERCISES
from tools import lessons, route, teaching

MARKS = "\n".join(f"<!-- {part} -->\n<!-- end of {part} -->\n" for part in ("walk", "predictions", "exercises"))
ASKED = "Predict: Which is longer,\nthis or that?\n  A: this\n  B: that *one*"


def notebook(name: str = "guess_it", told: str = "The answer is B: that *one*.\nSince it\nis.\n"):
    return new_notebook(
        cells=[
            new_markdown_cell("# 09 Nine"),
            new_code_cell(
                f"{name} = teach.predict(question, options)\n{name}",
                outputs=[new_output("execute_result", {"text/plain": ASKED})],
            ),
            new_markdown_cell("### Exercise 1: the law (3 minutes)\n\nWrite it."),
            new_code_cell("def idle_share(host_s, device_s):\n    return ...  # your code here"),
            new_code_cell('idle_share = teach.check("idle_share", idle_share)'),
            new_code_cell(f'x = 1\n{name}.reveal("B", why)', outputs=[new_output("stream", text="x is 1\n" + told)]),
        ]
    )


@pytest.fixture
def with_notebook(monkeypatch) -> Callable[..., None]:
    def use(book) -> None:
        monkeypatch.setattr(lessons, "all_notebooks", lambda: iter([(Path("09_nine.ipynb"), book)]))
        monkeypatch.setattr(route, "ROUTE", ())

    return use


def test_a_new_notebook_joins_with_its_question_its_answer_and_its_exercise(with_notebook):
    with_notebook(notebook())
    page = teaching.up_to_date(MARKS)
    assert "### 09 Nine" in page
    assert "**Which is longer, this or that?**" in page
    assert "- A: this\n- B: that \\*one\\* *(right)*\n" in page
    assert "*Told afterwards:* Since it is." in page
    assert "**Exercise 1: the law (3 minutes)**, `idle_share`" in page
    assert "| ratio to device: `host_s / device_s` | 1.0, not 0.5 | You divide the host's part by the device's." in page
    assert teaching.to_write(page) == ["09 guess_it: no note yet"]
    assert teaching.up_to_date(page) == page


def test_a_note_stays_when_the_question_changes_and_is_kept_when_it_goes(with_notebook):
    with_notebook(notebook())
    page = teaching.up_to_date(MARKS).replace(teaching.UNWRITTEN, "Expect 30 / 70. Ask: why?\n\nA second line.")
    note = "<!-- note -->\nExpect 30 / 70. Ask: why?\n\nA second line.\n"
    changed = notebook()
    changed.cells[1].outputs[0].data["text/plain"] = ASKED.replace("longer", "shorter")
    with_notebook(changed)
    page = teaching.up_to_date(page)
    assert "shorter" in page
    assert note in page
    with_notebook(notebook(name="guess_new"))
    page = teaching.up_to_date(page)
    assert teaching.to_write(page) == ["09 guess_new: no note yet", "gone: 09 guess_it: a note without a question"]
    assert teaching.up_to_date(page) == page
    with_notebook(notebook())  # and it comes back to its place with its question
    page = teaching.up_to_date(page)
    assert note in page
    assert "gone" not in page


@pytest.mark.parametrize(
    "note", ["Expect 30 / 60. Ask", "Expect 30 / 30 / 40. Ask", "Most say this.", "Counted: 9. Ask"]
)
def test_a_split_that_does_not_fit_its_options_is_named(with_notebook, note):
    with_notebook(notebook())
    page = teaching.up_to_date(MARKS)
    assert teaching.wrong_splits(page, teaching.predictions()) == []  # nothing is said yet
    for good in ("Expect 30 / 70. Ask", "Counted: 9 / 14, Lyon, March."):
        noted = page.replace(teaching.UNWRITTEN, good)
        assert teaching.wrong_splits(noted, teaching.predictions()) == []
    (fault,) = teaching.wrong_splits(page.replace(teaching.UNWRITTEN, note), teaching.predictions())
    assert fault.startswith("09 guess_it: ")


def test_a_notebook_whose_answers_are_not_saved_is_refused(with_notebook, capsys):
    for book, said in (
        (notebook(told="You chose A.\n"), "guess_it: 0 answers are saved"),
        (new_notebook(cells=notebook().cells[:3]), "guess_it: asked, and never revealed"),
        (new_notebook(cells=[notebook().cells[0], notebook().cells[5]]), "never asked"),
    ):
        with_notebook(book)
        with pytest.raises(ValueError, match=f"09_nine.ipynb: .*{said}"):
            teaching.predictions()
    assert teaching.main(["--check"]) == 1
    assert capsys.readouterr().err.startswith("09_nine.ipynb: ")


def test_the_page_has_its_marks_and_all_that_is_rendered():
    """That it is up to date to the letter, `make check` sees to it."""
    page = teaching.PAGE.read_text(encoding="utf-8")
    for name in ("predictions", "exercises"):
        assert "### " in teaching.part_of(page, name)[1]
    with pytest.raises(ValueError, match="end of exercises"):
        teaching.part_of(page.replace("<!-- end of exercises -->", ""), "exercises")
    rows = teaching.part_of(page, "exercises")[1]
    for name, wrong in wrong_answers().items():
        entry = rows.split(f"`{name}`\n", 1)[1].split("<!-- note -->")[0]
        assert len(re.findall(r"^\| (?!---|what comes)", entry, re.MULTILINE)) == len(wrong), name
    by_hand = page.split("<!-- predictions -->")[0]
    named = re.findall(r"exercises? (?:`(\w+)`(?: and `(\w+)`)?)", by_hand)
    assert {name for pair in named for name in pair if name} <= EXERCISES.keys()
    assert named


def test_check_changes_nothing_and_says_what_is_old(with_notebook, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(teaching, "PAGE", tmp_path / "TEACHING.md")
    teaching.PAGE.write_text(MARKS)
    with_notebook(notebook())
    assert teaching.main(["--check"]) == 1
    assert "python tools/teaching.py writes it" in capsys.readouterr().err
    assert teaching.PAGE.read_text() == MARKS
    assert teaching.main([]) == 0
    assert teaching.main(["--check"]) == 0

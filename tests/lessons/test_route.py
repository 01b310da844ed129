"""The workshop's route: a block takes what a hand adds up, and the page's clock marks are those that were walked."""

from __future__ import annotations

import re

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import lessons, route, teaching

BADGE = "![Badge of it](../docs/badges/x.svg)"


def printed(text: str):
    return new_output("stream", text=text)


@pytest.fixture
def nine(monkeypatch):
    """A notebook 09 with four words of text, a question, an exercise and a picture."""
    cells = {
        "top": new_markdown_cell(f"# Nine\n\n{BADGE}\n\n[two three](four.md)\n\n| not | read |"),
        "ask": new_code_cell(
            'guess = teach.predict("Why?", options)\nguess',
            outputs=[new_output("execute_result", {"text/plain": "Predict: Why?\n  A: this\n  B: that"})],
        ),
        "stub": new_code_cell("def idle_share(host_s, device_s):\n    return ..."),
        "check": new_code_cell('idle_share = teach.check("idle_share", idle_share)\n# teach.solution("idle_share")'),
        "hints": new_markdown_cell("<details><summary>Hint 1</summary>\n\nNot in the copies.\n\n</details>\n\nFour."),
        "draw": new_code_cell(
            "draw(it)", outputs=[new_output("display_data", {"text/plain": "<Picture: x>", "image/png": "iVBO"})]
        ),
        "fold": new_code_cell(
            'assert 1 == 1\nguess.reveal("A", "so")',
            metadata={"tags": ["scaffolding"]},
            outputs=[printed("The answer is A: this.\nSo.")],
        ),
    }
    for name, cell in cells.items():
        cell.id = name
    monkeypatch.setattr(route, "books", lambda: {"09": new_notebook(cells=list(cells.values()))})
    return cells


def test_what_is_read_is_what_stands_before_a_participant(nine):
    seen = {name: route.words(route.seen_in(cell)) for name, cell in nine.items()}
    # Nine two three; Predict Why A this B that; def idle_share(host_s device_s) return; idle_share
    # teach.check("idle_share" idle_share); Four; draw(it); The answer is A this So.
    assert seen == {"top": 3, "ask": 6, "stub": 4, "check": 3, "hints": 1, "draw": 1, "fold": 6}


def test_a_block_takes_what_a_hand_adds_up(nine, monkeypatch):
    monkeypatch.setattr(route, "check_says", lambda name: "six words that the check says")
    seconds = {"09": {"ask": 1.0, "stub": 2.0, "check": 3.0, "draw": 4.0, "fold": 5.0}}
    block = route.Block("0:58", "1:03", (route.Passage("09", "top", "fold"),), {"idle_share": 3}, hands=1, talk=1)
    took = route.took(block, {"seconds": seconds})
    assert (took.planned, took.words) == (300, 24 + 6)
    assert took.reading == pytest.approx(30 / 180 * 60)
    assert took.cells == 15
    assert took.looking == 20 + 10 + 45  # a picture, a click, hands
    assert (took.exercises, took.talk) == (180, 60)
    assert took.typing == pytest.approx(0.5 * (35 + 1 + 35))  # return host_s / (host_s + device_s), twice
    assert took.needed == pytest.approx(10 + 15 + 75 + 180 + 60), "typing is a part of the exercise"


def test_what_is_only_run_takes_its_cells_and_nobody_reads_it(nine):
    seconds = {"09": dict.fromkeys(("ask", "stub", "check", "draw", "fold"), 1.0)}
    block = route.Block("0:00", "0:05", (route.Passage("09", "top", "fold", read=False),))
    took = route.took(block, {"seconds": seconds})
    assert (took.words, took.needed) == (0, 5.0)


def test_what_nobody_walked_and_what_is_not_there_is_named(nine):
    block = route.Block("0:00", "0:05", (route.Passage("09", "top", "fold"),))
    with pytest.raises(ValueError, match="cell ask was never walked"):
        route.took(block, {"seconds": {"09": {}}})
    for first, last in (("top", "gone"), ("fold", "top"), ("gone", "fold")):
        with pytest.raises(ValueError, match=f"no cells from {first} to {last}"):
            route.cells_of(route.Passage("09", first, last))


def test_a_block_that_does_not_fit_is_named(monkeypatch):
    monkeypatch.setattr(route, "ROUTE", (route.Block("0:00", "0:05", talk=5), route.Block("0:05", "0:07", talk=3)))
    assert route.too_long() == ["the route's block 0:05 has 2 minutes and takes 3.0"]


def test_the_page_has_the_clock_marks_and_exercises_that_were_walked():
    page = teaching.PAGE.read_text(encoding="utf-8")
    table = page.split("### Two hours")[1].split("### ")[0].split("<!-- walk -->")[0]
    rows = re.findall(r"^\| (\d:\d\d) \| (.*) \|$", table, re.MULTILINE)
    assert [clock for clock, _ in rows] == [block.clock for block in route.ROUTE]
    ends = [*[block.clock for block in route.ROUTE][1:], "2:00"]
    assert [block.end for block in route.ROUTE] == ends
    for block, (_, text) in zip(route.ROUTE, rows, strict=True):
        for passage in block.passages:
            assert f"otebook {passage.notebook}" in text
        for name, minutes in block.exercises.items():
            assert re.search(rf"`{name}`[^|]*?\({minutes} minutes", text), name
        checked = {each.name for number in {p.notebook for p in block.passages} for each in _exercises(number)}
        assert block.exercises.keys() <= checked


def _exercises(number: str) -> list[lessons.ExerciseCells]:
    return lessons.exercises(route.books()[number])

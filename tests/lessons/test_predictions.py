"""No notebook tells the answer of a prediction before its result: neither its text above, nor a caption, nor what was
saved."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
CAPTION = re.compile(r"^\*Picture: .*\*$", re.MULTILINE)
NUMBER = re.compile(r"\d+(?:\.\d+)?")


class Prediction(NamedTuple):
    """A question of a notebook, its right option as saved, and the cells from the one that asks to the one that
    reveals."""

    question: str
    right: str
    cells: list[Any]


ASKS, REVEALS = re.compile(r"^(\w+) = teach\.predict\(", re.MULTILINE), re.compile(r"^(\w+)\.reveal\(", re.MULTILINE)
ASKED = re.compile(r"^Predict: (.*?)((?:\n  [A-H]: .*)+)", re.DOTALL)
ANSWER = re.compile(r"^The answer is ([A-H]: .*?)\.$", re.MULTILINE | re.DOTALL)


def predictions(cells: list[Any]) -> list[Prediction]:
    """The predictions of an executed notebook. A question and its `reveal` belong together by a variable's name."""
    found, asked = [], {}
    for number, cell in enumerate(cells):
        if cell.cell_type == "code" and (match := ASKS.search(cell.source)):
            asked[match[1]] = number
        if cell.cell_type == "code" and (match := REVEALS.search(cell.source)):
            start = asked.pop(match[1])
            question, options = ASKED.search(saved_text(cells[start])).groups()
            right = ANSWER.search(saved_text(cell))[1].replace("\n", " ")
            assert f"  {right}" in options.splitlines(), "what is revealed was no option"
            found.append(Prediction(question, right[3:], cells[start : number + 1]))
    assert asked == {}, "questions that are never answered"
    return found


def has_picture(cell: Any) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", ()))


def saved_text(cell: Any) -> str:
    outputs = cell.get("outputs", ())
    return "\n".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def book(request) -> tuple[str, list[Any]]:
    return request.param.stem, nbformat.read(request.param, as_version=4).cells


def test_what_is_saved_tells_the_answer_only_where_it_is_revealed(book):
    _, cells = book
    assert len(predictions(cells)) >= 3
    for prediction in predictions(cells):
        for cell in prediction.cells[:-1]:
            assert not re.search(r"\bThe answer is\b|\bYou chose\b|did not choose", saved_text(cell))
        assert not has_picture(prediction.cells[0]), "the result stands beside the question"


def test_a_caption_stands_below_its_picture_and_asks(book):
    _, cells = book
    pictures = [number for number, cell in enumerate(cells) if has_picture(cell)]
    for number in pictures:
        assert not CAPTION.search(cells[number - 1].source) or has_picture(cells[number - 2]), cells[number].source
        (caption,) = CAPTION.findall(cells[number + 1].source)
        assert cells[number + 1].source.startswith(caption), "something stands between a picture and its caption"
        assert caption.endswith(("?*", "?)*", ".)*")), caption
        assert "?" in caption, caption
    assert sum(len(CAPTION.findall(cell.source)) for cell in cells) == len(pictures)


def test_no_text_before_the_result_has_the_numbers_of_the_answer(book):
    _, cells = book
    for prediction in predictions(cells):
        asked = {*NUMBER.findall(prediction.question)}
        answer = {*NUMBER.findall(prediction.right)} - asked
        words = prediction.right.lower()
        for cell in prediction.cells:
            if cell.cell_type == "markdown":
                assert not answer & {*NUMBER.findall(cell.source)}, f"{prediction.right} is told by: {cell.source}"
                assert len(words) < 8 or words not in cell.source.lower()  # "no" may stand anywhere

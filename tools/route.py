"""The workshop's route of two hours: which cells a participant reads, runs and fills in, and how long that takes.

    python tools/route.py           print what each block takes, and whether it fits its clock marks
    python tools/route.py --walk    run all of it in a real JupyterLab, and keep the seconds in tools/route.json

Nobody is timed. Reading and typing go by rules of thumb (SPEEDS), cells by the seconds that the last walk measured, the
rest by the minutes that the route itself gives. tools/teaching.py writes the result into notebooks/TEACHING.md, and
`make check` fails where a block does not fit: after a change to a notebook of the route, that is the first to be told.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tools import copies, lessons  # noqa: E402

WALKED = Path(__file__).with_name("route.json")  # what the last walk measured
WORDS_A_MINUTE = 180
KEY_S, LOOK_S, CLICK_S, HANDS_S = 0.5, 20, 10, 45
SPEEDS = (
    f"**Reading:** {WORDS_A_MINUTE} words a minute, of text, code and output. Most adults read English non-fiction at "
    "175 to 300, and slower where it is not their first language (Brysbaert 2019, doi:10.1016/j.jml.2019.104047). "
    f"**Typing:** {KEY_S} s a key; the keystroke-level model has 0.28 for an average typist, 0.75 for complex codes "
    "(Card, Moran and Newell 1980). The package's own solution is typed, and its longest line twice. "
    f"**Our own rules:** {LOOK_S} s for a picture, {CLICK_S} s to click a prediction, {HANDS_S} s where hands go up."
)


class Passage(NamedTuple):
    """Cells of a notebook, from one id to another. read: False where they are only run, and the teacher tells them."""

    notebook: str
    first: str
    last: str
    read: bool = True


class Block(NamedTuple):
    """A line of the route. end: the next clock mark. exercises: name -> minutes that the route gives it, typing
    included. hands: predictions for which hands go up; the others are only clicked. talk: minutes in which the teacher
    speaks, the room does, or a command of everybody's runs."""

    clock: str
    end: str
    passages: tuple[Passage, ...] = ()
    exercises: dict[str, int] = {}
    hands: int = 0
    talk: int = 0


ROUTE = (
    Block("0:00", "0:05", talk=5),
    Block("0:05", "0:18", (Passage("00", "start-00", "start-19"),), {"idle_share": 3}, hands=2),
    Block(
        "0:18",
        "0:45",
        (
            Passage("01", "idle-00", "idle-26", read=False),
            Passage("01", "idle-27", "idle-32"),
            Passage("01", "idle-33", "idle-35", read=False),
            Passage("01", "idle-17", "idle-21"),
            Passage("01", "idle-39", "idle-48-law"),
        ),
        {"fit_budget": 7, "device_activity": 10},
        hands=1,
        talk=2,
    ),
    Block(
        "0:45",
        "1:11",
        (Passage("02", "streams-00", "streams-22"), Passage("02", "streams-35", "streams-54")),
        {"order": 4, "launch_step": 8},
        hands=2,
    ),
    Block("1:11", "1:21", talk=10),
    Block("1:21", "1:50", (Passage("05", "loop-00", "loop-29"),), {"fully_launched": 4, "step": 15}, hands=1),
    Block("1:50", "1:55", talk=5),  # the script itself runs for a minute: --budget-s
    Block("1:55", "2:00", talk=5),
)


class Took(NamedTuple):
    """What a block takes, in seconds but for `words`. exercises: the route's own minutes; typing lies within them."""

    block: Block
    words: int
    reading: float
    cells: float
    looking: float
    exercises: float
    typing: float
    talk: float

    @property
    def planned(self) -> float:
        start, end = (60 * int(hours) + int(minutes) for hours, minutes in (m.split(":") for m in self.block[:2]))
        return 60.0 * (end - start)

    @property
    def needed(self) -> float:
        return self.reading + self.cells + self.looking + self.exercises + self.talk


@lru_cache(maxsize=1)
def books() -> dict[str, Any]:
    return {lessons.number_of(path): book for path, book in lessons.all_notebooks()}


def cells_of(passage: Passage) -> list[Any]:
    """The cells of a passage, in order. ValueError for an id that the notebook has not, or not in this order."""
    cells = books()[passage.notebook].cells
    ids = [cell.id for cell in cells]
    if passage.first not in ids or passage.last not in ids[ids.index(passage.first) :]:
        raise ValueError(f"notebook {passage.notebook} has no cells from {passage.first} to {passage.last}")
    return cells[ids.index(passage.first) : ids.index(passage.last) + 1]


# ---- words and keys --------------------------------------------------------------------------------------------------


def words(text: str) -> int:
    return sum(bool(re.search(r"\w", word)) for word in text.split())


def seen_in(cell: Any) -> str:
    """The words that a participant has before them in a cell of the copies for a class, and below it when it was run.

    Not the sources of folded cells, nor those of a prediction (its buttons say the same), nor badges and tables."""
    from support.lessons import BADGES, TABLE_LINES

    if cell.cell_type != "code":
        text = TABLE_LINES.sub("", BADGES.sub("", copies._without_folds(cell.source)))
        return re.sub(r"\]\([^)\s]*\)", "]", re.sub(r"<[^>]*>", " ", text))
    printed = "\n".join(line for line in lessons.saved_text(cell).splitlines() if not line.startswith("<"))
    folded = lessons.SCAFFOLDING in cell.metadata.get("tags", ()) or lessons.reveals(cell)
    return printed if folded or lessons.asks(cell) else f"{copies.SOLUTION.sub('', cell.source)}\n{printed}"


def check_says(name: str) -> str:
    """What the check of an exercise prints of a planted wrong answer, and of the right one."""
    from support.wrong_answers import wrong_answers

    from asyncbatch.lessons.exercises import EXERCISES

    answers = (wrong_answers()[name][0], EXERCISES[name].reference)
    return "\n".join(copies._what_the_check_says(name, each) for each in answers)


def typed(name: str) -> int:
    """Keys for the package's own solution of an exercise, without docstring, comments and indentation, and once more
    for its longest line: a mistake that is mended. (What learners write is mostly shorter.)"""
    function = next(each for each in ast.parse(copies.solution(name)).body if isinstance(each, ast.FunctionDef))
    body = function.body[1:] if ast.get_docstring(function) else function.body
    lines = [line.strip() for each in body for line in ast.unparse(each).splitlines()]
    return sum(len(line) + 1 for line in lines) + max(map(len, lines))


# ---- what a block takes ----------------------------------------------------------------------------------------------


def walked() -> dict[str, Any]:
    """What the last walk measured: "seconds" (notebook -> cell id -> seconds), "on" (a day) and "where"."""
    return json.loads(WALKED.read_text(encoding="utf-8"))


def took(block: Block, measured: dict[str, Any]) -> Took:
    """ValueError for a cell that was never walked."""
    text, looks, clicks, seconds = "", 0, 0, 0.0
    for passage in block.passages:
        for cell in cells_of(passage):
            if cell.cell_type == "code":
                if cell.id not in measured["seconds"].get(passage.notebook, {}):
                    raise ValueError(f"cell {cell.id} was never walked; python tools/route.py --walk does it")
                seconds += measured["seconds"][passage.notebook][cell.id]
            if passage.read:
                text += f"\n{seen_in(cell)}"
                looks += lessons.has_picture(cell)
                clicks += lessons.asks(cell)
    count = words(text) + sum(words(check_says(name)) for name in block.exercises)
    return Took(
        block,
        count,
        60 * count / WORDS_A_MINUTE,
        seconds,
        LOOK_S * looks + CLICK_S * clicks + HANDS_S * block.hands,
        60.0 * sum(block.exercises.values()),
        KEY_S * sum(typed(name) for name in block.exercises),
        60.0 * block.talk,
    )


def all_took() -> list[Took]:
    measured = walked()
    return [took(block, measured) for block in ROUTE]


def too_long() -> list[str]:
    return [
        f"the route's block {row.block.clock} has {row.planned / 60:.0f} minutes and takes {row.needed / 60:.1f}"
        for row in all_took()
        if row.needed > row.planned
    ]


def rendered() -> str:
    """For TEACHING.md: how the minutes were found, and a table of them."""
    measured = walked()
    lines = [
        f"{SPEEDS} **Cells:** as walked on {measured['on']}, on {measured['where']} (a busy machine: the kernel's "
        "processor time, where that is less than the clock's). An exercise has the minutes that the route gives it; "
        "typing is a part of them.",
        "",
        "| clock | planned | takes | words | reading | cells | pictures, guesses | exercises | of it typing | talk |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in all_took():
        parts = (row.reading, row.cells, row.looking, row.exercises, row.typing, row.talk)
        shown = " | ".join(f"{part / 60:.1f}" if part else "" for part in parts)
        lines.append(
            f"| {row.block.clock} | {row.planned / 60:.0f} | {row.needed / 60:.1f} | {row.words or ''} | {shown} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    if "--walk" in arguments:
        from tools import walk

        walk.walk()
    print(rendered())
    for fault in (faults := too_long()):
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

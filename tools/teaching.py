"""Keep the rendered parts of notebooks/TEACHING.md up to date: what the route takes, every prediction, and what comes
to every exercise.

    python tools/teaching.py           write them
    python tools/teaching.py --check   change nothing; exit 1 if they are not what the notebooks and tests say

The page is written by hand, but for three parts between marks as `<!-- predictions -->` and their ends. In two of them
questions and answers are taken from the saved notebooks, wrong answers from tests/support/wrong and what is said about
each from the exercise's own check: written once, rendered here. A teacher's note below a `<!-- note -->` is kept where
its question goes. A new notebook, question or exercise joins by itself, without a note. The third, `walk`, is what the
route of two hours takes (tools/route.py); it is a fault if a block does not fit its clock marks.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tools import lessons, route  # noqa: E402

PAGE = ROOT / "notebooks" / "TEACHING.md"
NOTE = "<!-- note -->"
GONE = "gone: "
_ENTRY = re.compile(
    r"<!-- (?P<key>(?:gone: )?\d\d \w+) -->\n(?P<body>.*?)(?=<!-- (?:gone: )?\d\d \w* ?-->|\Z)", re.DOTALL
)
_SPLIT = re.compile(r"^(?:Expect|Counted)[^\d]*(\d+(?: / \d+)*)")
UNWRITTEN = "Nobody has written yet what to expect here: count the hands, and write it down."


def notes_of(part: str) -> dict[str, str]:
    """The notes that a rendered part holds, by "NN name" of what they stand below."""
    found = {}
    for entry in _ENTRY.finditer(part):
        text = entry["body"].split(NOTE, 1)[-1].strip()
        if text and text != UNWRITTEN:
            found[entry["key"].removeprefix(GONE)] = text
    return found


def rendered(entries: dict[str, dict[str, str]], notes: dict[str, str], unwritten: str) -> str:
    """A part of the page. entries: heading of a notebook -> key -> what is rendered; notes: key -> what is kept."""
    lines = []
    for heading, of_notebook in entries.items():
        lines.append(f"<!-- {heading[:2]} -->\n### {heading}\n")
        for key, text in of_notebook.items():
            lines.append(f"<!-- {key} -->\n{text}\n\n{NOTE}\n{notes.get(key, unwritten)}".rstrip() + "\n")
    known = {key for of_notebook in entries.values() for key in of_notebook}
    if gone := {key: text for key, text in notes.items() if key not in known}:
        lines.append("<!-- 99 -->\n### Notes whose question is gone\n")
        lines += [f"<!-- {GONE}{key} -->\n`{key}`\n\n{NOTE}\n{text}\n" for key, text in gone.items()]
    return "\n" + "\n".join(lines) + "\n"


# ---- predictions -----------------------------------------------------------------------------------------------------


def predictions() -> dict[str, dict[str, str]]:
    entries: dict[str, dict[str, str]] = {}
    for path, book in lessons.all_notebooks():
        try:
            asked = lessons.predictions(book)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None
        number = lessons.number_of(path)
        entries[lessons.title_of(book)] = {f"{number} {each.name}": _prediction(each) for each in asked}
    return entries


def _prediction(asked: lessons.Prediction) -> str:
    lines = [f"**{_escaped(asked.question)}**", ""]
    for letter, words in asked.options.items():
        mark = " *(right)*" if letter == asked.right else ""
        lines.append(f"- {letter}: {_escaped(words)}{mark}")
    return "\n".join([*lines, "", f"*Told afterwards:* {_escaped(asked.because)}"])


def _escaped(text: str) -> str:
    return re.sub(r"([*_<>\[\]|`])", r"\\\1", text)


# ---- exercises -------------------------------------------------------------------------------------------------------


def exercises() -> dict[str, dict[str, str]]:
    from support.wrong_answers import wrong_answers

    wrong = wrong_answers()
    entries: dict[str, dict[str, str]] = {}
    for path, book in lessons.all_notebooks():
        entries[lessons.title_of(book)] = {
            f"{lessons.number_of(path)} {each.name}": _exercise(each, wrong.get(each.name, ()))
            for each in lessons.exercises(book)
        }
    return entries


def _exercise(cells: lessons.ExerciseCells, wrong: tuple[Callable[..., Any], ...]) -> str:
    """An exercise's title and a table: the wrong answer, what it gives, what the check says about it."""
    from asyncbatch.lessons import teach
    from asyncbatch.lessons.exercises import EXERCISES

    lines = [
        f"**{cells.title}**, `{cells.name}`",
        "",
        "| what comes | where it shows | what to say |",
        "| --- | --- | --- |",
    ]
    for function in wrong:
        done = teach._try(EXERCISES[cells.name], function)
        lines.append(f"| {_described(function)} | {_shown(done)} | {_in_table(done.why)} |")
    return "\n".join(lines)


def _described(function: Callable[..., Any]) -> str:
    """What a wrong answer does: its one expression if it is no more than that, else its name in words."""
    name = function.__doc__ or function.__name__.replace("_", " ")
    try:
        body = inspect.getsource(function).strip().splitlines()
    except OSError:
        return name
    one = body[1].strip() if len(body) == 2 else ""
    if one.startswith("return ") and len(one) <= 90 and "|" not in one:
        return f"{name}: `{one.removeprefix('return ')}`"
    return name


def _shown(done: Any) -> str:
    """What the answer gave and what is right, where both are short; how it stopped, where it did."""
    if isinstance(done.got, Exception):
        return f"stops with {type(done.got).__name__}"
    got, want = (
        re.sub(r"\d+\.\d{5,}", lambda number: f"{float(number[0]):.4g}", repr(each)) for each in (done.got, done.want)
    )
    return f"{_in_table(got)}, not {_in_table(want)}" if len(got) + len(want) <= 60 else ""


def _in_table(text: str) -> str:
    return re.sub(r"([|*<>])", r"\\\1", " ".join(text.split()))


# ---- the page --------------------------------------------------------------------------------------------------------


def part_of(page: str, name: str) -> tuple[str, str, str]:
    """The page before, within and after the part `name`. Raises ValueError if its marks are missing."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"{PAGE.name} needs the marks {start} and {end}, once each")
    before, rest = page.split(start)
    part, after = rest.split(end)
    return before + start + "\n", part, end + after


def up_to_date(page: str) -> str:
    """The page with its three parts rendered anew, and every note where it belongs."""
    before, _, after = part_of(page, "walk")
    page = f"{before}\n{route.rendered()}\n\n{after}"
    for name, render, unwritten in (("predictions", predictions, UNWRITTEN), ("exercises", exercises, "")):
        before, part, after = part_of(page, name)
        page = before + rendered(render(), notes_of(part), unwritten) + after
    return page


def wrong_splits(page: str, entries: dict[str, dict[str, str]]) -> list[str]:
    """Which notes of predictions begin with no split, or with one that does not fit the options."""
    notes = notes_of(part_of(page, "predictions")[1])
    faults = []
    for key, text in ((key, text) for of_notebook in entries.values() for key, text in of_notebook.items()):
        if key not in notes:
            continue
        split = _SPLIT.match(notes[key])
        shares = [int(share) for share in split[1].split(" / ")] if split else []
        options = len(re.findall(r"^- [A-H]: ", text, re.MULTILINE))
        if len(shares) != options or (notes[key].startswith("Expect") and sum(shares) != 100):
            faults.append(
                f"{key}: its note must begin with a split over {options} options, in percent (Expect 60 / 40)"
            )
    return faults


def to_write(page: str) -> list[str]:
    """What somebody should write or delete by hand; not an error."""
    unwritten = [entry["key"] for entry in _ENTRY.finditer(page) if UNWRITTEN in entry["body"]]
    gone = [entry["key"] for entry in _ENTRY.finditer(page) if entry["key"].startswith(GONE)]
    return [f"{key}: no note yet" for key in unwritten] + [f"{key}: a note without a question" for key in gone]


def main(arguments: list[str]) -> int:
    page = PAGE.read_text(encoding="utf-8")
    try:
        new = up_to_date(page)
        faults = [*wrong_splits(new, predictions()), *route.too_long()]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if "--check" in arguments:
        if new != page:
            faults.append("it is not what notebooks and wrong answers say; python tools/teaching.py writes it")
    elif new != page:
        PAGE.write_text(new, encoding="utf-8", newline="\n")
    for line in to_write(new):
        print(f"{PAGE.name}: {line}")
    for fault in faults:
        print(f"{PAGE.name}: {fault}", file=sys.stderr)
    if not faults:
        print(f"{PAGE.name} is up to date")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Copies of the notebooks, for a reader to write in: from a clone, or from the package that is installed.

They hold no results, so that a prediction comes before its answer. What is there already is the reader's, and stays.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from . import links

CLONE = Path(__file__).parents[2]
OWN = "my-notebooks"  # in a clone beside `notebooks`: links from one to another, and to docs/, lead to the same places
ANSWERS = "my-answers"  # beside the notebook that is open (lessons/kept.py)


def originals() -> list[Path]:
    """The notebooks: of the clone that this package stands in, else as they were installed with it; none if neither
    has them."""
    found = sorted((CLONE / "notebooks").glob("[0-9]*.ipynb")) if (CLONE / "pyproject.toml").is_file() else []
    if found:
        return found
    try:
        installed = [Path(str(file.locate())) for file in files("asyncbatch") or [] if file.suffix == ".ipynb"]
    except PackageNotFoundError:
        return []
    return sorted(path.resolve() for path in installed if path.is_file())


def copy_to(folder: Path, each: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Copy each notebook that `folder` lacks into it, without outputs and counts: (names made, names that were there).
    A link to what is not there, beside the copy, becomes its words.
    Answers kept beside the originals, by a reader who worked there, come along. Whatever stops it, no copy is left half
    written.

    FileNotFoundError without notebooks; OSError if `folder` cannot be written."""
    if not each:
        raise FileNotFoundError("this asyncbatch came without its notebooks: install it from a wheel, or clone it")
    folder.mkdir(parents=True, exist_ok=True)
    made, there = [], []
    names = {original.name for original in each}
    for original in each:
        target = folder / original.name
        (there if target.exists() else made).append(original.name)
        if not target.exists():
            draft = target.with_name(f".{target.name}.new")
            text = without_results(original.read_text(encoding="utf-8"), links.of_copy(original, folder, names))
            draft.write_text(text, encoding="utf-8", newline="\n")
            draft.replace(target)
    kept = [answer for beside in {original.with_name(ANSWERS) for original in each} for answer in beside.glob("*.py")]
    for answer in kept:
        (folder / ANSWERS).mkdir(exist_ok=True)
        if not (folder / ANSWERS / answer.name).exists():
            shutil.copyfile(answer, folder / ANSWERS / answer.name)
    return made, there


def without_results(text: str, place: links.Place) -> str:
    """A canonical notebook's text without outputs and execution counts, its links led to `place` of their targets."""
    book = json.loads(text)
    links.in_book(book, place)
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    return json.dumps(book, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def command(words: Sequence[str]) -> int:
    """`asyncbatch notebooks DIR`. Returns the exit status: 0, 1 if they cannot be copied."""
    parser = argparse.ArgumentParser(
        prog="asyncbatch notebooks",
        description="Copy the notebooks into DIR, without results. Copies stay as they are.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="made where it is missing")
    folder = parser.parse_args(words).folder
    if not _copied(folder):
        return 1
    print(f"To open them:  jupyter lab {folder}   (pip install 'asyncbatch[notebook]' brings it)")
    return 0


def lab(words: Sequence[str]) -> int:
    """`asyncbatch lab`: the copies in JupyterLab. Returns its exit status; 1 where there is no JupyterLab."""
    parser = argparse.ArgumentParser(
        prog="asyncbatch lab", description="Open copies of the notebooks, your own, in JupyterLab."
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path(OWN), metavar="DIR", help=f"default {OWN}")
    folder = parser.parse_args(words).folder
    if importlib.util.find_spec("jupyterlab") is None:
        print("asyncbatch lab: JupyterLab is missing; in a clone: make lab; else: pip install 'asyncbatch[notebook]'",
              file=sys.stderr)  # fmt: skip
        return 1
    if not _copied(folder):
        return 1
    first = min(folder.glob("[0-9]*.ipynb"), default=folder)
    return _run(
        [sys.executable, "-m", "jupyterlab", str(first)]
    )  # not the script, which holds an old path after a move


def _run(words: Sequence[str]) -> int:
    """Run a command that handles Ctrl-C itself, as JupyterLab does, which asks first: its exit status."""
    with subprocess.Popen(words) as running:
        while True:
            try:
                return running.wait()
            except KeyboardInterrupt:  # the terminal has told both processes
                continue


def _copied(folder: Path) -> bool:
    try:
        made, there = copy_to(folder, originals())
    except OSError as error:
        print(f"asyncbatch: {error}", file=sys.stderr)
        return False
    numbers = (" ".join(name.split("_")[0] for name in names) or "none" for names in (made, there))
    told = "{}: your copies of the notebooks: made {}; kept {} (for a fresh copy, rename or delete yours)"
    print(told.format(folder, *numbers))
    return True

"""Notebooks with planted faults that nbval alone lets pass: support/nbval_guard.py must fail each in the right cell.

One pytest runs all of them, as `make test` starts it, in a folder with this repository's own settings. The run has less
time than one cell's time-out (300 s), so that a notebook which fails only by its time-out fails the fixture.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import deque
from pathlib import Path
from queue import Empty

import nbformat
import pytest
from support import nbval_guard

ROOT = Path(__file__).parents[2]
SUPPORT = ("nbval_guard.py", "kernel_watch.py", "nbval_sanitize.cfg")
SETTINGS = ("pyproject.toml", "conftest.py", *(f"tests/support/{name}" for name in SUPPORT))
RUN_LIMIT_S = 200

SET_UP = "import asyncio, threading, time"
# Outputs ignored: with them compared, some of these would fail for what they print on stderr, and not for the failure.
IGNORE = "# NBVAL_IGNORE_OUTPUT\n"
RAISE_GROUP = IGNORE + "raise ExceptionGroup('two', [AssertionError('planted')])"
FAIL_LATER = IGNORE + "async def later():\n    await asyncio.sleep(0.05)\n    assert False, 'planted'\n"
FAIL_IN_THREAD = IGNORE + (
    "def check():\n    assert False, 'planted'\nthread = threading.Thread(target=check)\nthread.start()\nthread.join()"
)
MAY_RAISE = "# NBVAL_RAISES_EXCEPTION\n" + IGNORE
TWO = ("1 + 1", "2")
SLIDER = "import ipywidgets\nslider = ipywidgets.IntSlider(value=3, min=1, max=9)\n"
BREAKS = "def follow(change):\n    assert change['new'] < 9, 'planted'\nslider.observe(follow, names='value')"
LOG = "far = ipywidgets.FloatLogSlider(value=10, min=-1, max=2)\n"
LOG += "near = ipywidgets.BoundedFloatText(value=1, min=0, max=7)\n"
CHOICE = "choice = ipywidgets.ToggleButtons(options=['A', 'B'], value=None)\n"
NOTED = "seen = []\nchoice.observe(lambda change: seen.append(change['new']), names='value')\n"
NOTED += "button = ipywidgets.Button()\nbutton.on_click(lambda _: seen.append('pressed'))"
# name: (cells as (source, saved text output), number of the cell that must fail, words: the report must have one)
BAD = {
    "failing_assert": ([(SET_UP, ""), ("assert 1 == 2, 'planted'", ""), TWO], 1, ["AssertionError"]),
    "group_in_first_cell": ([(RAISE_GROUP, ""), TWO], 0, ["Cell execution failed: ExceptionGroup"]),
    # What older kernels do with a group in the first cell: the reply breaks on a missing attribute and never comes.
    "no_reply": ([("get_ipython().__dict__.pop('_last_traceback')\n" + RAISE_GROUP, ""), TWO], 0, ["without a reply"]),
    "group_in_later_cell": ([(SET_UP, ""), TWO, (RAISE_GROUP, ""), TWO], 2, ["Cell execution failed: ExceptionGroup"]),
    "group_after_an_error": (
        [(MAY_RAISE + "1 / 0", ""), (RAISE_GROUP, ""), TWO],
        1,
        ["Cell execution failed: ExceptionGroup"],
    ),
    "group_with_output_checked": ([(RAISE_GROUP.removeprefix(IGNORE), ""), TWO], 0, ["AssertionError: planted"]),
    "group_from_task_group": (
        [
            (SET_UP, ""),
            (FAIL_LATER + "async with asyncio.TaskGroup() as group:\n    group.create_task(later())", ""),
            TWO,
        ],
        1,
        ["AssertionError: planted", "TaskGroup"],
    ),
    "task_nobody_awaits": (
        [(SET_UP, ""), (FAIL_LATER + "asyncio.create_task(later())", ""), TWO],
        1,
        ["task or thread"],
    ),
    "task_thrown_away": (
        [(SET_UP, ""), (FAIL_LATER + "asyncio.create_task(later())\nawait asyncio.sleep(0.2)", ""), TWO],
        1,
        ["task or thread"],
    ),
    "task_kept_not_awaited": (
        [(SET_UP, ""), (FAIL_LATER + "task = asyncio.create_task(later())", ""), TWO],
        1,
        ["task or thread"],
    ),
    "task_never_ends": ([(SET_UP, ""), ("task = asyncio.create_task(asyncio.sleep(999))", "")], 1, ["still pending,"]),
    "assert_in_thread": ([(SET_UP, ""), (FAIL_IN_THREAD, ""), TWO], 1, ["task or thread"]),
    "wrong_output": ([(SET_UP, ""), ("print('16 tokens')", "15 tokens\n"), TWO], 1, ["outputs differ"]),
    "missing_output": ([("print('16 tokens')", ""), TWO], 0, ["outputs differ"]),
    "kernel_dies": ([(SET_UP, ""), ("import os\nos._exit(3)", "")], 1, ["kernel died"]),
    "looks_at_a_slider": (
        [(SLIDER, ""), ("assert slider.value == 3, 'planted'", ""), TWO],
        1,
        ["AssertionError"],
    ),
    "slider_that_breaks": ([(SLIDER + BREAKS, ""), TWO], 0, ["A widget ended with an error when it was moved"]),
    "marked_but_raises_nothing": ([(MAY_RAISE + "x = 1", ""), TWO], 0, ["none was raised"]),
}
GOOD = [
    (SET_UP, ""),
    (SLIDER + LOG + CHOICE + NOTED, ""),
    (
        "print(slider.value, far.value, near.value, choice.value, seen)",
        "9 100.0 7.0 None ['A', 'B', None, 'pressed']\n",
    ),
    ("slider.value = 4", ""),
    ("print(slider.value)  # moved once, and then left alone", "4\n"),
    ("print(f'step took {time.perf_counter() % 9:.3f} ms')", "step took 12.345 ms\n"),
    ("task = asyncio.create_task(asyncio.sleep(0.01, 'slept'))\nprint(await task)", "slept\n"),
    ("print(object())", "<object object at 0x7f0000000000>\n"),
    ("# NBVAL_IGNORE_OUTPUT\nprint(time.time())", "0\n"),
    ("# NBVAL_RAISES_EXCEPTION\n# NBVAL_IGNORE_OUTPUT\n1 / 0", ""),
    (
        "worker = threading.Thread(target=time.sleep, args=(0.01,))\nworker.start()\nworker.join()\n'INSTALL' in dir()",
        "False",
    ),
]


def write_notebook(path: Path, cells: list[tuple[str, str]]) -> None:
    """Write an executed notebook: a last line that is an expression has its value saved, the rest what it printed."""
    book = nbformat.v4.new_notebook()
    for count, (source, text) in enumerate(cells, 1):
        cell = nbformat.v4.new_code_cell(source, execution_count=count)
        if "print" in source:
            cell.outputs = [nbformat.v4.new_output("stream", text=text)] if text else []
        elif text:
            cell.outputs = [nbformat.v4.new_output("execute_result", {"text/plain": text}, execution_count=count)]
        book.cells.append(cell)
    nbformat.write(book, path)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, str | None]]:
    """Notebook name -> cell name -> what pytest reported, None for a cell that passed."""
    folder = tmp_path_factory.mktemp("planted")
    for name in SETTINGS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "notebooks").mkdir()
    write_notebook(folder / "notebooks" / "good.ipynb", GOOD)
    for name, (cells, _, _) in BAD.items():
        write_notebook(folder / "notebooks" / f"{name}.ipynb", cells)
    report = folder / "report.xml"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--color=no", f"--junitxml={report}"],
        cwd=folder,
        timeout=RUN_LIMIT_S,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    outcomes: dict[str, dict[str, str | None]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        book = str(case.get("classname")).split(".")[-2]  # notebooks.NAME.ipynb
        outcomes.setdefault(book, {})[str(case.get("name"))] = None if problem is None else problem.text
    return outcomes


@pytest.mark.parametrize("name", BAD)
def test_planted_fault_fails_in_its_cell(results, name):
    if "Group" in str(BAD[name][0]) and sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no exception groups")
    cells, bad_cell, words = BAD[name]
    outcome = results[name]
    assert len(outcome) == len(cells)
    for number in range(bad_cell):
        assert outcome[f"Cell {number}"] is None
    report = outcome[f"Cell {bad_cell}"]
    assert report is not None, "the fault passed"
    assert f"Cell {bad_cell}:" in report
    assert any(word in report.replace(cells[bad_cell][0], "") for word in words), report


@pytest.mark.parametrize("name", [name for name in BAD if name != "kernel_dies"])
def test_cells_after_the_fault_still_run(results, name):
    cells, bad_cell, _ = BAD[name]
    for number in range(bad_cell + 1, len(cells)):
        assert results[name][f"Cell {number}"] is None


def test_good_notebook_passes(results):
    assert results["good"] == {f"Cell {number}": None for number in range(len(GOOD))}


def test_a_kernel_that_leaves_a_request_unread_is_asked_something_else(monkeypatch):
    class Client:
        """A kernel's client: the reply to request 1 is there once the kernel has been asked for its version."""

        asked = False

        def kernel_info(self):
            self.asked = True

        def get_shell_msg(self, timeout):
            if not self.asked:
                raise Empty
            return {"parent_header": {"msg_id": 1}, "content": {"status": "ok"}}

        def get_iopub_msg(self, timeout):
            raise Empty

    kernel = object.__new__(nbval_guard.WatchedKernel)
    kernel.kc, kernel._published = Client(), deque()
    monkeypatch.setattr(nbval_guard.WatchedKernel, "is_alive", lambda self: True)
    monkeypatch.setattr(nbval_guard, "KNOCK_S", 0.0)
    kernel.await_reply(1, timeout=5)
    assert kernel.reply == {"status": "ok"}


def test_a_kernel_at_work_is_not_asked(monkeypatch):
    class Client:
        polls = 0

        def get_shell_msg(self, timeout):
            self.polls += 1
            if self.polls < 5:
                raise Empty
            return {"parent_header": {"msg_id": 1}, "content": {"status": "ok"}}

        def get_iopub_msg(self, timeout):
            if self.polls != 1:
                raise Empty
            self.polls += 1
            return {"parent_header": {"msg_id": 1}, "content": {"execution_state": "busy"}}

    kernel = object.__new__(nbval_guard.WatchedKernel)
    kernel.kc, kernel._published = Client(), deque()  # without kernel_info: asking it would be an AttributeError
    monkeypatch.setattr(nbval_guard.WatchedKernel, "is_alive", lambda self: True)
    monkeypatch.setattr(nbval_guard, "KNOCK_S", 0.0)
    kernel.await_reply(1, timeout=5)
    assert kernel.reply == {"status": "ok"}

"""docs/performance.md and the notebooks have the same numbers of the published server, derived once."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from asyncbatch.lessons import idle

ROOT = Path(__file__).parents[2]
STEPS, SYNC_S, ASYNC_S, IDLE = 8192, 300.6, 234.5, 0.24  # all that was published, and our one assumption: the steps
# Worked out by hand: 300.6 s / 8192, 24.0 % and 76.0 % of that, 234.5 s / 8192.
STEP_MS, HOST_MS, DEVICE_MS, ASYNC_MS = "36.7", "8.8", "27.9", "28.6"
PUBLISHED = {"sync": "300.6", "async": "234.5", "idle": "24.0"}
DERIVED = {"step": STEP_MS, "host": HOST_MS, "device": DEVICE_MS}


def cell(name: str, id: str) -> nbformat.NotebookNode:
    (path,) = (ROOT / "notebooks").glob(f"{name}_*.ipynb")
    return next(cell for cell in nbformat.read(path, as_version=4).cells if cell.id == id)


def printed(name: str, id: str) -> str:
    return "".join(output.get("text", "") for output in cell(name, id).outputs)


def markdown(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(each.source for each in cells if each.cell_type == "markdown")


def told() -> str:
    """The paragraph about the published server, in one line."""
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    (found,) = (part for part in text.split("\n\n") if "Unlocking asynchronicity" in part)
    return " ".join(found.split())


def read(pattern: str, text: str) -> dict[str, str]:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is nowhere in: {text}"
    return found.groupdict()


def test_the_derivation_is_that_of_a_calculator():
    run = idle.PUBLISHED
    assert (run.steps, run.sync_s, run.async_s, run.idle) == (STEPS, SYNC_S, ASYNC_S, IDLE)
    assert run.sync_ms == pytest.approx(1000 * SYNC_S / STEPS)
    assert [f"{ms:.1f}" for ms in (run.sync_ms, run.host_ms, run.device_ms, run.async_ms)] == [
        *DERIVED.values(),
        ASYNC_MS,
    ]
    assert idle.RECORDED[0] is run


def test_readme_and_notebooks_say_the_same_and_name_the_gpu():
    ours, start, law = told(), printed("00", "start-30-published"), printed("01", "idle-52")
    pattern = r"(?P<sync>[\d.]+) s with the device idle for (?P<idle>[\d.]+) %, and asynchronously (?P<async>[\d.]+) s"
    assert read(pattern, ours) == PUBLISHED
    derived = r"step took (?P<step>[\d.]+) ms, in which the host worked for (?P<host>[\d.]+) ms and the device for "
    assert read(derived + r"(?P<device>[\d.]+) ms", ours) == DERIVED
    assert ours.index("published") < ours.index("300.6") < ours.index("Derived") < ours.index("36.7")

    published, derived_line = start.splitlines()
    pattern = r"^published \(H200\): (?P<sync>[\d.]+) s, idle (?P<idle>[\d.]+)%; asynchronous (?P<async>[\d.]+) s$"
    assert read(pattern, published) == PUBLISHED
    pattern = r"^derived, for 8192 steps: a step (?P<step>[\d.]+) ms, host (?P<host>[\d.]+) ms and device "
    assert read(pattern + r"(?P<device>[\d.]+) ms$", derived_line) == DERIVED

    pattern = r"^A: a step (?P<step>[\d.]+) ms, idle (?P<idle>[\d.]+)%, so host (?P<host>[\d.]+) ms and device "
    pattern += r"(?P<device>[\d.]+) ms; an asynchronous step (?P<async>[\d.]+) ms\n"
    assert read(pattern, law) == {**DERIVED, "idle": PUBLISHED["idle"], "async": ASYNC_MS}
    for text in (ours, published, cell("01", "idle-48").source, cell("00", "start-27").source):
        assert "H200" in text


def test_no_notebook_has_numbers_of_its_own_for_the_published_server():
    """They take them from `idle.PUBLISHED`: in code the published numbers stand nowhere else."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        code = [each.source for each in nbformat.read(path, as_version=4).cells if each.cell_type == "code"]
        assert not re.search(r"300\.6|234\.5|0\.0285|28\.5\b", "\n".join(code)), path.name
        for share in re.findall(r"published[^.]*?(\d+\.\d+) ?%", markdown(path)):
            assert share == PUBLISHED["idle"], path.name

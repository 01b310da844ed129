"""The report in four situations, as an engineer sees it for the first time: what it says first, and that nothing of it
is cut off, on a page of 1280 and of 390 pixels and in a terminal of 100 and of 60 columns."""

from __future__ import annotations

import functools
import re

import pytest
from support.browser import browse, need_browser, screenshot
from support.page_browser import look, open_offline
from support.situations import COLUMNS, SITUATIONS, WIDTHS, in_terminal, measured

from asyncbatch.profile.page import write_page
from asyncbatch.profile.terminal import sections

made = functools.cache(lambda name: measured(SITUATIONS[name]))
EACH = pytest.mark.parametrize("name", SITUATIONS)
BEGINS = {
    "nothing to gain": ("The synchronous loop leaves the device idle for 0.6%", "Why it is idle",
                        "Eliminate this first: nothing in the host's code", "Asynchronous batching: no difference",
                        "Nothing speaks against these numbers"),
    "a lot to gain": ("The synchronous loop leaves the device idle for 44.8%", "Why it is idle",
                      "Eliminate this first: schedule", "Asynchronous batching: 1.7", "Nothing speaks against"),
    "disturbed machine": ("Void: the same steps took the device up to 1.6", "The synchronous loop leaves",
                          "Why it is idle", "Eliminate this first", "Asynchronous batching: not measured"),
    "few steps": ("The synchronous loop leaves the device idle for 23.4% of the time, measured over 5 of 53 steps",
                  "Why it is idle", "Eliminate this first", "Asynchronous batching: 1.27",
                  "Few steps: active and idle are of 5 of 53", "Few pairs of runs: 1"),
}  # fmt: skip


@EACH
def test_what_is_said_first_and_in_which_order(name):
    sentences = made(name)[0].sentences
    assert len(sentences) == len(BEGINS[name])
    for sentence, begins in zip(sentences, BEGINS[name], strict=True):
        assert sentence.startswith(begins)
    text = " ".join(sentences)
    assert ("97% sure" in text) == (name in ("nothing to gain", "a lot to gain"))
    assert ("is no conclusion" in text) == (name == "few steps")


@EACH
@pytest.mark.parametrize("columns", [*COLUMNS, 40])
def test_a_terminal_shows_every_word_and_number_whole(name, columns):
    pytest.importorskip("rich")
    report, _ = made(name)
    text = in_terminal(report, columns)
    lines = text.splitlines()
    told = lines[: lines.index("")]
    assert max(map(len, told)) <= columns
    assert " ".join(line.strip() for line in told) == " ".join(report.sentences), "broken between words only"
    for section in sections(report):
        for row in section.rows:
            (line,) = [
                line for line in lines if line.strip("│ ").startswith(row[0]) and set(row[1:3]) <= set(line.split())
            ]
            for cell in row[1:]:
                if cell[:1].isdigit():
                    assert re.search(rf"(^|[\s│]){re.escape(cell)}([\s│]|$)", line), (cell, line)


def test_a_table_fits_into_60_columns_without_being_given_up():
    pytest.importorskip("rich")
    lines = in_terminal(made("a lot to gain")[0], 60).splitlines()
    assert max(map(len, lines)) <= 60
    assert sum(set(line) == {"─"} for line in lines) == 2, "a line below the head of each table"


FITS = """const inside = (part) => part.scrollWidth <= part.clientWidth + 1;
    const open = (part) => !part.closest('details:not([open])');
    const parts = [...document.querySelectorAll('.scroll')].filter(open);
    return parts.filter((part) => !inside(part)).map((part) => part.getAttribute('aria-label'));"""
BROKEN = """const cells = [...document.querySelectorAll('td:not(.several):not(:has(.meter)), td .meter span')];
    return cells.filter((cell) => !cell.closest('details:not([open])')
    && /^[-+]?[0-9.,]+ ?(ms|s|%|x)?$/.test(cell.textContent.trim())
    && (() => { const range = document.createRange(); range.selectNodeContents(cell);
                return new Set([...range.getClientRects()].map((one) => Math.round(one.top / 8))).size > 1; })()
    ).map((cell) => cell.textContent);"""


def test_a_page_shows_its_tables_whole_at_both_widths(tmp_path):
    need_browser()
    with browse(tmp_path / "chromium") as driver:
        for name in SITUATIONS:
            path = tmp_path / f"{name}.html"
            write_page(path, *made(name))
            open_offline(driver, path)
            for width in WIDTHS:
                look(driver, width=width)
                assert driver.execute_script("return innerWidth") == width
                screenshot(driver, f"situation-{name.replace(' ', '-')}-{width}", tmp_path)
                assert driver.execute_script(FITS) == [], (name, width)
                assert driver.execute_script(BROKEN) == [], (name, width)

"""The report in a terminal: the same words with and without rich, and text of others is never markup."""

from __future__ import annotations

import io
import re
import sys

import pytest
from support.reports import measured

from asyncbatch.profile.report import Report
from asyncbatch.profile.terminal import sections, show


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def report():
    report, _ = measured()
    return Report.from_json({**report, "model": "[bold]a[/bold] [red]model"})


def words(text: str) -> list[str]:
    return re.findall(r"[\w.%]+", text)


def test_rich_and_plain_say_the_same(report, monkeypatch):
    screen, plain = Screen(), io.StringIO()
    monkeypatch.setenv("COLUMNS", "200")
    show(report, screen)
    show(report, plain)
    assert "\x1b[" not in plain.getvalue()
    without_colours = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    assert sorted(words(without_colours)) == sorted(words(plain.getvalue()))
    assert "[bold]a[/bold] [red]model" in without_colours
    assert plain.getvalue().startswith("Eliminate this first: ")


def test_without_rich_a_screen_gets_plain_text(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    screen, plain = Screen(), io.StringIO()
    show(report, screen)
    show(report, plain)
    assert screen.getvalue() == plain.getvalue()


def test_sections_have_the_reports_numbers_in_its_order(report):
    idle = [section for section in sections(report) if "idle for" in section.title]
    assert len(idle) == 2
    for section, run in zip(idle, report.runs, strict=True):
        assert [row[0] for row in section.rows] == list(run.gaps.by)[: len(section.rows)]
        assert f"{1e3 * run.gaps.idle_s:.3f} ms" in section.title
    (what_if,) = [section for section in sections(report) if section.title.startswith("What if")]
    sync = [one for one in report.runs[0].what_if if one.factor == 0]
    assert [row[0] for row in what_if.rows] == [f"{one.point} ({one.where})" for one in sync][: len(what_if.rows)]

"""The report in a terminal: the same words with and without rich, and text of others is never markup."""

from __future__ import annotations

import io
import re
import statistics
import sys

import pytest
from support.reports import measured

from asyncbatch.profile.report import Report
from asyncbatch.profile.terminal import sections, show
from asyncbatch.profile.verdict import who


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
    assert plain.getvalue().splitlines()[: len(report.sentences)] == report.sentences


def test_without_rich_a_screen_gets_plain_text(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    screen, plain = Screen(), io.StringIO()
    show(report, screen)
    show(report, plain)
    assert screen.getvalue() == plain.getvalue()


def test_sections_have_the_reports_numbers_in_its_order(report):
    idle = [section for section in sections(report) if "why the device was idle" in section.title]
    assert len(idle) == 2
    for section, run in zip(idle, report.runs, strict=True):
        seen = [name for name, seconds in run.gaps.all_by.items() if round(1e3 * seconds, 3)]
        assert [row[0] for row in section.rows] == seen[: len(section.rows)]
        for name, decode, everywhere, share, _, who_could in section.rows:
            assert decode == f"{1e3 * run.gaps.by.get(name, 0):.3f}"
            assert everywhere == f"{1e3 * run.gaps.all_by[name]:.3f}"
            assert share == f"{run.gaps.all_by[name] / statistics.median_high(run.wall_s_of_each_run):.1%}"
            assert who_could == who(name)
        assert f"{1e3 * run.gaps.idle_s:.3f} ms" in section.title
    (what_if,) = [section for section in sections(report) if section.title.startswith("What if")]
    sync = [one for one in report.runs[0].what_if if one.factor == 0]
    order = [f"{one.point} ({one.where})" for one in sync]
    places = [order.index(row[0]) for row in what_if.rows]
    assert places == sorted(places)
    assert 0 < len(places) <= 12

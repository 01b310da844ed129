"""Reports of earlier versions load: their page, their table and their comparison say what they said."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from asyncbatch.profile import compare
from asyncbatch.profile.page import page
from asyncbatch.profile.report import Conditions, Floor, Record, Report, Run, Totals, WhatIf
from asyncbatch.profile.terminal import plain, sections
from asyncbatch.profile.text import table

FOLDER = Path(__file__).parent / "reports"
OLD = sorted(FOLDER.glob("*-schema-3.json"))


@pytest.fixture(params=OLD, ids=[path.stem for path in OLD])
def path(request) -> Path:
    return request.param


def test_an_old_report_keeps_all_but_the_targets(path):
    data = json.loads(path.read_text())
    assert data["schema"] == 3
    again = Report.from_json(data).to_json()
    assert data.pop("targets") == []
    for run in (*data["runs"], *data["recorded"]):  # what means something else since version 5
        for steps in (run.get("first_context"), run.get("last_context")):
            if steps:
                steps["context"] /= steps["rows"]
        if guess := run.get("prediction"):
            guess["between_ms"] = guess.pop("host_ms")
    assert again == data


def test_of_an_old_report_a_context_is_a_rows_too():
    steps = {"rows": 4, "context": 100.0, "ms": 1.0}
    old = {"schema": 4, "runs": [{"mode": "sync", "first_context": steps, "prediction": {"host_ms": 3.0}}]}
    (run,) = Report.from_json(old).runs
    assert (run.first_context.context, run.prediction.host_ms, run.prediction.between_ms) == (25.0, None, 3.0)
    (run,) = Report.from_json({**old, "schema": 5}).runs
    assert (run.first_context.context, run.prediction.host_ms, run.prediction.between_ms) == (100.0, 3.0, None)


def test_the_table_of_an_old_report_is_what_it_was(path):
    report = Report.from_json(json.loads(path.read_text()))
    blocks = [table(report).splitlines(), *map(plain, sections(report))]
    assert "\n\n".join("\n".join(block) for block in blocks) + "\n" == path.with_suffix(".txt").read_text()


def test_an_old_report_has_a_page(path):
    data = json.loads(path.read_text())
    text = page(Report.from_json(data), [])
    for run in data["runs"]:
        assert f"{run['tokens_per_s']:.1f}" in text
        assert all(f"{1e3 * idle:.3f} ms" in text for idle in run["gaps"]["by"].values())
    assert "Speed to reach" not in text


def test_an_old_report_can_be_compared_with_itself_and_with_a_new_one(path, tmp_path):
    out = compare.run(str(path), str(path))[0]
    assert "warning" not in out
    assert "1.000x" in out
    new = {**json.loads(path.read_text()), "schema": 4}
    del new["targets"]
    (tmp_path / "new.json").write_text(json.dumps(new))
    lines = compare.run(str(path), str(tmp_path / "new.json"))[0].splitlines()
    assert [line for line in lines if line.startswith("warning")] == ["warning: schema: A has 3, B has 4"]


def records(kind: type = Record) -> list[type]:
    """All kinds of records that stand in a report; `Totals` is only what two of them share."""
    below = [one for child in kind.__subclasses__() for one in (child, *records(child))]
    return [one for one in below if one is not Totals]


@pytest.mark.parametrize("kind", records(), ids=lambda kind: kind.__name__)
def test_each_part_can_be_empty_or_of_another_shape(kind):
    empty = kind()
    for value in (None, 7, "x", [], [7, None], {}, {"a": None}):
        data = {one.name: value for one in fields(kind)}
        made = kind.from_json(data)
        json.dumps(made.to_json())
    assert kind.from_json({}) == kind.from_json({**{one.name: None for one in fields(kind)}, "more": 1}) == empty


def test_the_floor_stands_among_the_numbers_of_its_run():
    data = {"mode": "sync", "floor_s": 2.0, "kv_bytes_per_s": None, "first_context": {"rows": 2, "context": 9.0}}
    run = Run.from_json(data)
    assert (run.floor_s, run.time_over_floor, run.first_context.context) == (2.0, None, 9.0)
    made = run.to_json()
    assert list(made)[-5:] == [one.name for one in fields(Floor)]
    assert "floor" not in made
    assert "floor_s" not in Run.from_json({"mode": "sync"}).to_json()


def test_an_empty_report_has_a_table_and_a_page():
    empty = Report.from_json({})
    assert "Nothing was measured." in page(empty, [])
    assert table(empty) == "model: None\ndevice: None\n\n"
    partly = Report(runs=(Run(mode="sync", what_if=(WhatIf("commit", "host", 0.0),)),))
    assert "What if" in page(partly, [])
    assert [section.rows for section in sections(partly)] == []  # nothing is known of what it saves


def test_what_makes_requests_uneven_is_named():
    assert Conditions(prompt_tokens=4, new_tokens=8, arrivals="all").uneven == []
    drawn = Conditions(prompt_tokens="4-8", new_tokens="lognormal:8:1", arrivals="poisson:3", prompts="p.txt")
    assert drawn.uneven == ["prompts", "prompt_tokens", "new_tokens", "arrivals"]

"""docs/report.schema.json is what the profiling script writes, and docs/report.md says what each field means."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest
from support.reports import EMULATED, REAL, measured

from asyncbatch.profile.report import SCHEMA, Report

jsonschema = pytest.importorskip("jsonschema")
ROOT = Path(__file__).parents[2]
DRAWN = ("--model", "random:tiny", "--requests", "4", "--batch-size", "2", "--prompt-tokens", "2-9", "--new-tokens",
         "lognormal:6:0.5", "--arrivals", "poisson:100", "--repeats", "1")  # fmt: skip
schema = json.loads((ROOT / "docs" / "report.schema.json").read_text(encoding="utf-8"))


def problems(report) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(report)]


def doc_tool():
    spec = importlib.util.spec_from_file_location("report_doc", ROOT / "tools" / "report_doc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def described(part, path="") -> list[str]:
    """The places in the schema where a field has no title or no description, following what it refers to."""
    missing = []
    for name, field in part.get("properties", {}).items():
        found = doc_tool().resolved(schema, field)
        missing += [f"{path}/{name} has no {key}" for key in ("title", "description") if not found.get(key)]
    for name, definition in part.get("$defs", {}).items():
        missing += described(definition, f"{path}/{name}")
    return missing


def test_the_schema_is_one_and_says_what_each_field_is():
    jsonschema.Draft202012Validator.check_schema(schema)
    assert max(schema["properties"]["schema"]["enum"]) == SCHEMA
    assert described(schema) == []


@pytest.mark.parametrize("arguments", [REAL, EMULATED, (*REAL, "--mode", "async"), (*REAL, "--step-ms", "2"), DRAWN])
def test_a_real_report_is_as_the_schema_says(arguments):
    report, _ = measured(arguments)
    assert problems(report) == []


def test_what_only_a_gpu_or_an_option_gives_is_in_the_schema_too():
    report, _ = measured(EMULATED)
    run = report["runs"][0]
    run |= {key: report["recorded"][0][key] for key in ("floor_s", "time_over_floor", "first_context", "last_context")}
    run["overhead"] = {"share": -0.001, "interval": [-0.002, 0.01], "ms_per_step": -0.01, "pairs": [0.01, -0.001]}
    run["kineto"] = {
        "busy": 0.9,
        "step_active": 0.92,
        "event_active": 0.93,
        "differs": True,
        "kernels": 12,
        "note": "n",
    }
    run["request_floor"] = {
        "floor_s": 4.0,
        "time_over_floor": 1.3,
        "decode_steps": 254,
        "decode_s": 1.4,
        "prompts_s": 2.6,
    }
    run["workload"] = report["comparisons"][0]["workload"] = "long prompts"
    report["matmul_flops_per_s"] = 7e14
    report["models"] = {
        "m": {"dtype": "bfloat16", "weight_bytes": 1, "kv_bytes_per_token": 1, "vocab_size": 1, "max_positions": 1,
              "flops_per_token": 1}
    }  # fmt: skip
    report["gpu"] = {"name": "NVIDIA H200", "memory_gib": 139.8, "driver": None, "compute_capability": "9.0"}
    report["copy_bandwidth_bytes_per_s"] = 4.28e12
    report["failed"] = [{"engine": "e", "mode": "sync,async", "model": "m", "batch_size": 8, "error": "no"}]
    report["failed"].append({**report["failed"][0], "workload": "mixed"})
    again = Report.from_json(report).to_json()
    for key in ("models", "failed", "comparisons", "matmul_flops_per_s"):
        assert again[key] == report[key]
    assert [again["runs"][0][key] for key in ("request_floor", "workload")] == [run["request_floor"], run["workload"]]
    assert problems(report) == []


def test_a_report_of_the_schema_before_may_have_targets_and_a_new_one_may_not():
    old = json.loads((Path(__file__).parent / "reports" / "tiny-schema-3.json").read_text(encoding="utf-8"))
    assert problems(old) == []
    assert old["targets"] == []
    assert problems({**old, "schema": 4})
    del old["targets"]
    assert problems({**old, "schema": 4}) == []


@pytest.mark.parametrize("arguments", [REAL, EMULATED, DRAWN])
def test_a_report_read_from_json_gives_the_same_json_again(arguments):
    report, _ = measured(arguments)
    again = Report.from_json(report).to_json()
    assert json.dumps(again) == json.dumps(report), "with the keys in the same order"


def places(value, path=()):
    """Every object in a report, with the path to it."""
    if isinstance(value, dict):
        yield path, value
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


MAY_LACK = {"floor_s", "time_over_floor", "first_context", "last_context", "kv_bytes_per_s"}
OPEN = {"by", "all_by", "versions", "peers_same_tokens", "models"}  # their keys are names


def test_a_field_too_many_or_too_few_is_found_wherever_it_is():
    report, _ = measured(EMULATED)
    kinds = {}
    for path, _ in places(report):
        if not OPEN & set(path):
            kinds.setdefault(tuple(part for part in path if isinstance(part, str)), path)  # one of each kind
    assert len(kinds) > 10
    for path in kinds.values():
        broken = copy.deepcopy(report)
        place = broken
        for part in path:
            place = place[part]
        place["surprise"] = 1
        assert problems(broken), path
        del place["surprise"]
        assert problems(broken) == [], path
        del place[next(key for key in place if key not in MAY_LACK)]
        assert problems(broken), path


def test_the_page_of_docs_names_every_field_and_follows_the_schema():
    tool = doc_tool()
    text = tool.PAGE.read_text(encoding="utf-8")
    assert text == tool.page(schema), "run python tools/report_doc.py"
    report, _ = measured(EMULATED)
    for path, place in places(report):
        if not OPEN & set(path):
            assert [key for key in place if f"| `{key}` |" not in text] == [], path
    assert set(tool.PARTS.values()) == {name for name, part in schema["$defs"].items() if part.get("type") == "object"}

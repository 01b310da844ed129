"""Write docs/report.md, what each field of report.json means, from docs/report.schema.json.

    python tools/report_doc.py           write it
    python tools/report_doc.py --check   change nothing; exit 1 if it is not what the schema says

The schema is the one place where a field is described: add the field there, then run this.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asyncbatch.measure.points import MEANING

DOCS = Path(__file__).parent.parent / "docs"
SCHEMA, PAGE = DOCS / "report.schema.json", DOCS / "report.md"
# Where each part of the report stands, and its name among the schema's $defs.
PARTS = {
    "runs[]": "run",
    "runs[].points[]": "point",
    "runs[].gaps": "gaps",
    "runs[].gaps.longest[]": "gap",
    "runs[].what_if[]": "what_if",
    "runs[].latency": "latency",
    "runs[].latency.first_token_ms, per_token_ms, end_to_end_ms": "median_and_p99",
    "runs[].prediction": "prediction",
    "runs[].overhead": "overhead",
    "runs[].kineto": "kineto",
    "runs[].first_context, last_context": "context",
    "runs[].request_floor": "request_floor",
    "runs[].ranks[]": "rank",
    "runs[].slowest[]": "slowest",
    "comparisons[]": "comparison",
    "recorded[]": "recorded",
    "failed[]": "failed",
    "workload": "workload",
    "gpu": "gpu",
    "models": "model",
}
START = """# report.json

`python -m asyncbatch.profile --json` prints it, `--out DIR` writes it into `DIR/report.json`, and `DIR/report.html`
shows it. [report.schema.json](report.schema.json) (JSON Schema 2020-12) is its exact form; this page is made from it by
`python tools/report_doc.py`.

Times are seconds, but milliseconds where a name has `ms`. Shares are numbers from 0 to 1. What could not be measured is
`null`. `schema` grows when a field changes its meaning or goes; a new field alone does not change it.
"""
POINTS = """## Names of latency points

They stand in `points[].name`, `gaps.by`, `gaps.longest[].cause` and `what_if[].point`.
"""


def resolved(schema: dict[str, Any], field: dict[str, Any]) -> dict[str, Any]:
    """The field with what its `$ref` names filled in; where both say something, the field's own words count."""
    if "$ref" not in field:
        return field
    target: Any = schema
    for key in field["$ref"].removeprefix("#/").split("/"):
        target = target[key]
    return {**resolved(schema, target), **{key: value for key, value in field.items() if key != "$ref"}}


def fields(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields of a part by name; if it extends another part, that part's fields come first."""
    whole = resolved(schema, {"$ref": part["$ref"]})["properties"] if "$ref" in part else {}
    return {name: resolved(schema, field) for name, field in {**whole, **part["properties"]}.items()}


def lines_of(schema: dict[str, Any], part: dict[str, Any]) -> Iterator[str]:
    yield from ("| field | name | meaning |", "| --- | --- | --- |")
    for name, field in fields(schema, part).items():
        yield f"| `{name}` | {field['title']} | {field['description']} |"
    yield ""


def page(schema: dict[str, Any]) -> str:
    """The text of docs/report.md."""
    lines = [START, "## The report", "", *lines_of(schema, schema)]
    for place, name in PARTS.items():
        part = schema["$defs"][name]
        lines += [f"## `{place}`: {part['title'][0].lower()}{part['title'][1:]}", ""]
        lines += [part["description"], ""]
        if "properties" in part:
            lines += lines_of(schema, part)
        else:
            lines += ["Its fields are those of `runs[]` up to `kv_bytes_per_s`.", ""]
    lines += [POINTS, "| name | what it is |", "| --- | --- |"]
    lines += [f"| {name} | {meaning} |" for name, meaning in MEANING.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    text = page(json.loads(SCHEMA.read_text(encoding="utf-8")))
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8", newline="\n")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(
            "docs/report.md is not what docs/report.schema.json says: run python tools/report_doc.py", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

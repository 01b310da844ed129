"""Reports of earlier versions in the form of today."""

from __future__ import annotations

from typing import Any


def of_today(data: dict[str, Any]) -> dict[str, Any]:
    """The report in today's form: until version 4 a context was the sum over the rows, and host_ms what is between_ms
    today."""
    if not isinstance(data.get("schema"), int) or data["schema"] > 4:
        return data
    lists = {key: [dict(run) for run in data.get(key) or [] if isinstance(run, dict)] for key in ("runs", "recorded")}
    for run in (*lists["runs"], *lists["recorded"]):
        for key in ("first_context", "last_context"):
            steps = run.get(key)
            if isinstance(steps, dict) and steps.get("rows") and steps.get("context") is not None:
                run[key] = {**steps, "context": steps["context"] / steps["rows"]}
        if isinstance(guess := run.get("prediction"), dict):
            run["prediction"] = {**guess, "between_ms": guess.get("host_ms"), "host_ms": None}
    return {**data, **lists}

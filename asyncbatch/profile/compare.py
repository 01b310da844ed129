"""Two reports of the profiling script side by side: the runs that they share, the ratios, and what else differs.

    python -m asyncbatch.profile --compare A.json B.json          (--json: the same as JSON)

Runs are paired by engine, mode, model and batch size. Nothing is measured and no model is loaded. What makes the two
hard to compare (another machine, GPU, version, workload, ...) is said first, a line for each difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..request import shown

PAIRED_BY = ("engine", "mode", "model", "batch_size")
# What is shown of two runs: its words, where it stands in a run, how it is written, and by what it is multiplied first.
ROWS = (
    ("wall time", ("wall_s",), "{:.3f} s", 1),
    ("tokens per second", ("tokens_per_s",), "{:.1f}", 1),
    ("device idle", ("idle",), "{:.2f} %", 100),
    ("host work per step", ("host_ms_per_step",), "{:.3f} ms", 1),
    ("device per step", ("device_ms_per_step",), "{:.3f} ms", 1),
    ("wasted tokens", ("wasted_tokens",), "{:.0f}", 1),
)
LATENCY_ROWS = tuple(
    (f"{words}, {part}", ("latency", key, part), "{:.1f} ms", 1)
    for words, key in (
        ("first token", "first_token_ms"),
        ("per token", "per_token_ms"),
        ("end to end", "end_to_end_ms"),
    )
    for part in ("median", "p99")
)
POINT = ("name", "where", "median_ms")
NEEDED = {"schema": int, "model": str, "device": str, "machine": str, "date": str, "gpu": (dict, type(None)),
          "versions": dict, "workload": dict, "same_tokens": bool, "runs": list}  # fmt: skip
NEEDED_OF_RUN = {"engine": str, "mode": str, "model": str, "batch_size": int}
# Everything that should be the same: of a report, of its versions, of its workload as it was asked for, of a run.
SAME = ("schema", "machine", "device", "emulated", "preset")
SAME_VERSIONS = ("python", "torch", "transformers", "triton", "cuda")
SAME_WORKLOAD = ("requests", "prompt_tokens", "new_tokens", "prompts_sha256", "arrivals", "seed", "slots",
                 "host_work_ms", "step_ms")  # fmt: skip
SAME_OF_RUN = ("requests", "prompt_tokens", "new_tokens", "prefill_tokens", "setting", "tokens")
BEFORE = {"arrivals": "all"}  # what it was in reports that do not say it yet; the others: none


def run(path_a: str, path_b: str, as_json: bool = False) -> str:
    """What the script prints. ValueError, of one line, for a file that is no report."""
    found = compared(path_a, load(path_a), path_b, load(path_b))
    return json.dumps(found, indent=1, allow_nan=False) if as_json else table(found)


# ---- reading ------------------------------------------------------------------------------------------------------


def load(path: str) -> dict[str, Any]:
    """The report in a file. ValueError for a file that cannot be read, is not JSON, or is no report."""
    try:
        found = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"--compare {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--compare {path}: not JSON ({error})") from None
    try:
        _check(found)
    except ValueError as error:
        expected = "expected a report.json that asyncbatch.profile --out wrote"
        raise ValueError(f"--compare {path}: {error}; {expected}") from None
    return found


def _check(report: Any) -> None:
    _demand("the report", report, NEEDED)
    for place, row in enumerate(report["runs"]):
        where = f"runs[{place}]"
        _demand(where, row, NEEDED_OF_RUN)
        if missing := [keys[0] for _, keys, _, _ in ROWS if keys[0] not in row]:
            raise ValueError(f"{where} has no {', '.join(missing)}")
        each, points = row.get("wall_s_of_each_run", []), row.get("points") or []
        if not isinstance(each, list) or not isinstance(points, list):
            raise ValueError(f"wall_s_of_each_run or points of {where} is no list")
        for point in points:
            _demand(f"a point of {where}", point, {"name": str, "where": str, "median_ms": object})
        numbers = [(".".join(keys), _value(row, keys)) for _, keys, _, _ in (*ROWS, *LATENCY_ROWS)]
        numbers += [("wall_s_of_each_run", value) for value in each]
        numbers += [(f"median_ms of point {point['name']}", point["median_ms"]) for point in points]
        for name, value in numbers:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
            if value is not None and not is_number:
                raise ValueError(f"{name} of {where} is {shown(value)}, neither a number nor null")
    keys = [_key(row) for row in report["runs"]]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ValueError(f"there are two runs of {_name(twice)}")


def _demand(where: str, found: Any, needed: dict[str, Any]) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where} is {shown(found)} and no object")
    if missing := [key for key in needed if key not in found]:
        raise ValueError(f"{where} has no {', '.join(missing)}")
    for key, kind in needed.items():
        if not isinstance(found[key], kind):
            raise ValueError(f"{key} of {where} is {shown(found[key])}")


def _value(row: dict[str, Any], keys: Sequence[str]) -> Any:
    """What stands in a run under the keys, one in the other; None where there is nothing."""
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


# ---- comparing ----------------------------------------------------------------------------------------------------


def compared(path_a: str, a: dict[str, Any], path_b: str, b: dict[str, Any]) -> dict[str, Any]:
    """The comparison of two reports, as plain values for JSON.

    `a`, `b`: path, model, device, machine and date of each. `warnings`: sentences. `only_in_a`, `only_in_b`: engine,
    mode, model and batch_size of runs without a partner. `runs`: for each pair the same four, and
    `wall_s_of_each_run`: lowest and highest of a and of b, null where they are not known;
    `rows`: name (where it stands in a run of a report), a, b and ratio, b / a, null where it has no value;
    `points`: the latency points that both have: name, where, a and b (their median_ms) and ratio.
    """
    rows_a, rows_b = ({_key(row): row for row in report["runs"]} for report in (a, b))
    both = [key for key in rows_a if key in rows_b]
    facts = ("model", "device", "machine", "date")
    return {
        "a": {"path": path_a, **{key: a[key] for key in facts}},
        "b": {"path": path_b, **{key: b[key] for key in facts}},
        "warnings": list(differences(a, b, [(rows_a[key], rows_b[key]) for key in both])),
        "runs": [_pair(rows_a[key], rows_b[key]) for key in both],
        "only_in_a": [dict(zip(PAIRED_BY, key, strict=True)) for key in rows_a if key not in rows_b],
        "only_in_b": [dict(zip(PAIRED_BY, key, strict=True)) for key in rows_b if key not in rows_a],
    }


def _pair(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    each = {}
    for name, row in (("a", a), ("b", b)):
        walls = row.get("wall_s_of_each_run")
        each[name] = [min(walls), max(walls)] if walls else None
    rows = [(".".join(keys), _value(a, keys), _value(b, keys)) for _, keys, _, _ in (*ROWS, *LATENCY_ROWS)]
    of_a, of_b = ({(one["where"], one["name"]): one["median_ms"] for one in row.get("points") or []} for row in (a, b))
    return {
        **{key: a[key] for key in PAIRED_BY},
        "wall_s_of_each_run": each,
        "rows": [{"name": name, "a": x, "b": y, "ratio": _ratio(x, y)} for name, x, y in rows],
        "points": [
            {"name": key[1], "where": key[0], "a": of_a[key], "b": of_b[key], "ratio": _ratio(of_a[key], of_b[key])}
            for key in of_a
            if key in of_b
        ],
    }


def _ratio(a: float | None, b: float | None) -> float | None:
    return b / a if a and b is not None else None


def _key(row: dict[str, Any]) -> tuple:
    return tuple(row[key] for key in PAIRED_BY)


def _name(key: Sequence[Any]) -> str:
    return "{} {}, {}, batch size {}".format(*key)


def differences(
    a: dict[str, Any], b: dict[str, Any], pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]
) -> Iterator[str]:
    """A sentence for each thing that should be the same in both reports, and is not, or that makes one of them void."""

    def differ(what: str, x: Any, y: Any) -> Iterator[str]:
        if x != y:
            yield f"{what}: A has {_said(x)}, B has {_said(y)}"

    for key in SAME:
        yield from differ(key, a.get(key), b.get(key))
    gpus = [report["gpu"] or {} for report in (a, b)]
    for key in dict.fromkeys([*gpus[0], *gpus[1]]):
        yield from differ(f"gpu, {key.replace('_', ' ')}", gpus[0].get(key), gpus[1].get(key))
    for key in SAME_VERSIONS:
        yield from differ(f"version of {key}", a["versions"].get(key), b["versions"].get(key))
    said = set()
    for key in SAME_WORKLOAD:
        x, y = (report["workload"].get(key, BEFORE.get(key)) for report in (a, b))
        if x != y:
            said.add(key)
            if key == "prompts_sha256":  # the contents count, and the name is what a reader knows them by
                x, y = (f"{report['workload'].get('prompts')} (sha256 {value})" if value else None
                        for report, value in ((a, x), (b, y)))  # fmt: skip
            yield from differ("prompts" if key == "prompts_sha256" else key, x, y)
    for key in SAME_OF_RUN:
        differing = [(x, y) for x, y in pairs if x.get(key) != y.get(key)]
        if differing and key not in said:
            x, y = differing[0]
            more = f", and of {len(differing) - 1} more" if len(differing) > 1 else ""
            yield from differ(f"{key} of {_name(_key(x))}{more}", x.get(key), y.get(key))
    for place, (letter, report) in enumerate((("A", a), ("B", b))):
        for pair in pairs:
            if pair[place].get("interrupted"):
                yield f"interrupted: in {letter} {_name(_key(pair[place]))} ended early"
        others = report.get("peers_same_tokens") or {}
        for engine, same in {"asyncbatch": report["same_tokens"], **others}.items():
            if not same:
                yield f"tokens: in {letter} sync and async of {engine} gave different ones, so its numbers are void"


def _said(value: Any) -> str:
    return "none" if value is None else " ".join(str(value).split())


# ---- as text ------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """The comparison as text: two reports, warnings, a table for each pair of runs, runs without a partner."""
    lines = [f"{letter}: {one['path']}: {one['model']} on {one['device']}; {one['machine']}, {one['date']}"
             for letter, one in (("A", found["a"]), ("B", found["b"]))]  # fmt: skip
    lines += [f"warning: {sentence}" for sentence in found["warnings"]]
    for pair in found["runs"]:
        lines += ["", *_lines(pair)]
    if not found["runs"]:
        lines += ["", "no run of A has a partner in B: paired are runs of the same engine, mode, model and batch size"]
    alone = [(letter, one) for letter in "ab" for one in found[f"only_in_{letter}"]]
    lines += [""] * bool(alone)
    lines += [f"only in {letter.upper()}: {_name([one[key] for key in PAIRED_BY])}" for letter, one in alone]
    return "\n".join(lines)


def _lines(pair: dict[str, Any]) -> list[str]:
    rows: list[tuple[str, ...]] = [("", "A", "B", "B / A")]
    forms = {".".join(keys): (words, form, factor) for words, keys, form, factor in (*ROWS, *LATENCY_ROWS)}
    for row in pair["rows"]:
        if row["name"].startswith("latency.") and None in (row["a"], row["b"]):
            continue
        words, form, factor = forms[row["name"]]
        rows.append((words, *_cells(row, form, factor)))
        each = pair["wall_s_of_each_run"]
        if (
            row["name"] == "wall_s"
            and each["a"]
            and each["b"]
            and each["a"] + each["b"] != [row["a"]] * 2 + [row["b"]] * 2
        ):
            spread = ("{:.3f} to {:.3f} s".format(*each[letter]) for letter in "ab")
            apart = each["a"][1] < each["b"][0] or each["b"][1] < each["a"][0]
            rows.append(("  its runs", *spread, "apart" if apart else "they overlap"))
    for point in pair["points"]:
        rows.append((f"{point['where']}: {point['name']}", *_cells(point, "{:.3f} ms", 1)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [_name([pair[key] for key in PAIRED_BY])]
    for first, *cells in rows:
        lines.append("  ".join([first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip())
    return lines


def _cells(row: dict[str, Any], form: str, factor: float) -> list[str]:
    cells = ["-" if row[letter] is None else form.format(factor * row[letter]) for letter in "ab"]
    return [*cells, "-" if row["ratio"] is None else f"{row['ratio']:.3f}x"]

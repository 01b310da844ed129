"""Two reports of the profiling script side by side: the runs that both have, their ratios, and what else differs.

    python -m asyncbatch.profile --compare A.json B.json          (--json: the same as JSON)
    python -m asyncbatch.profile --compare OLD.json NEW.json --threshold 5%         (exit status for CI, see threshold)

Runs are paired by engine, mode, model and batch size, and by the name of the workload where it has one. Nothing is
measured and no model is loaded. What makes the two hard to compare (another machine, GPU, version, workload, ...) comes
first, one line for each difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from ..measure.text import table_lines
from ..request import shown
from .report import Gpu, Report, Run
from .threshold import FIGURES, Verdict, judge

PAIRED_BY = ("engine", "mode", "model", "batch_size", "workload")  # workload: None but in presets that name theirs
# What is shown of two runs: its words, its place in a run, how it is written, and by what it is multiplied first.
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
# These may be missing in a report.
MORE_ROWS = (("longest gap", ("longest_gap_ms",), "{:.3f} ms", 1), *LATENCY_ROWS)
NEEDED = {"schema": int, "model": str, "device": str, "machine": str, "date": str, "gpu": (dict, type(None)),
          "versions": dict, "workload": dict, "same_tokens": bool, "runs": list}  # fmt: skip
NEEDED_OF_RUN = {"engine": str, "mode": str, "model": str, "batch_size": int}
# What should be the same in both: of a report, of its versions, of its workload as it was asked for, of a run.
SAME = ("schema", "machine", "device", "emulated", "preset")
SAME_VERSIONS = ("python", "torch", "transformers", "triton", "cuda")
SAME_WORKLOAD = ("requests", "prompt_tokens", "new_tokens", "prompts_sha256", "skipped_lines", "arrivals", "seed",
                 "slots", "dtype", "host_work_ms", "step_ms")  # fmt: skip
SAME_OF_RUN = ("requests", "prompt_tokens", "new_tokens", "prefill_tokens", "setting", "tokens")
# Of all of these, what may differ in reports that are judged: it may be just what was changed.
MAY_DIFFER = ("driver", "compute_capability", "versions", "slots", "prefill_tokens", "setting", "tokens")
BEFORE = {"arrivals": "all"}  # how it was before reports had this field; where nothing stands here: none


def run(path_a: str, path_b: str, as_json: bool = False, threshold: float | None = None,
        figures: Sequence[str] = (*FIGURES,)) -> tuple[str, int]:  # fmt: skip
    """What the script prints, and its exit status: 0, or, with a threshold, what the verdict says. ValueError, of one
    line, for a file that is no report."""
    a, b = load(path_a), load(path_b)
    result = compared(path_a, a, path_b, b)
    if threshold is None:
        return _as_json(result) if as_json else comparison_table(result), 0
    verdict = verdict_on(a, b, threshold, figures)
    if as_json:
        return _as_json({"verdict": verdict.to_json(), **result}), verdict.status
    return f"{verdict}\n\n{comparison_table(result)}", verdict.status


def _as_json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, allow_nan=False)


# ---- reading ------------------------------------------------------------------------------------------------------


def load(path: str, option: str = "--compare") -> Report:
    """The report in a file. ValueError, which names the command line's `option`, for a file that cannot be read, is not
    JSON, or is no report."""
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{option} {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{option} {path}: not JSON ({error})") from None
    try:
        _check(data)
    except ValueError as error:
        expected = "expected a report.json that asyncbatch.profile --out wrote"
        raise ValueError(f"{option} {path}: {error}; {expected}") from None
    return Report.from_json(data)


def _check(data: Any) -> None:
    """ValueError, which names the place, unless `data` is a report with all that is compared."""
    _demand("the report", data, NEEDED)
    for place, row in enumerate(data["runs"]):
        where = f"runs[{place}]"
        _demand(where, row, NEEDED_OF_RUN)
        if missing := [keys[0] for _, keys, _, _ in ROWS if keys[0] not in row]:
            raise ValueError(f"{where} has no {', '.join(missing)}")
        _check_numbers(where, row)
    keys = [tuple(row.get(key) for key in PAIRED_BY) for row in data["runs"]]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ValueError(f"there are two runs of {_name(twice)}")


def _check_numbers(where: str, row: dict[str, Any]) -> None:
    each, points = row.get("wall_s_of_each_run", []), row.get("points") or []
    if not isinstance(each, list) or not isinstance(points, list):
        raise ValueError(f"wall_s_of_each_run or points of {where} is no list")
    for point in points:
        _demand(f"a point of {where}", point, {"name": str, "where": str, "median_ms": object})
    numbers = [(".".join(keys), _at(row, keys)) for _, keys, _, _ in (*ROWS, *MORE_ROWS)]
    numbers += [("wall_s_of_each_run", value) for value in each]
    numbers += [(f"median_ms of point {point['name']}", point["median_ms"]) for point in points]
    for name, value in numbers:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
        if value is not None and not is_number:
            raise ValueError(f"{name} of {where} is {shown(value)}, neither a number nor null")


def _demand(where: str, data: Any, needed: dict[str, Any]) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{where} is {shown(data)} and no object")
    if missing := [key for key in needed if key not in data]:
        raise ValueError(f"{where} has no {', '.join(missing)}")
    for key, kind in needed.items():
        if not isinstance(data[key], kind):
            raise ValueError(f"{key} of {where} is {shown(data[key])}")


def _at(row: dict[str, Any], keys: Sequence[str]) -> Any:
    """What stands in a run's JSON under the keys, one in the other; None where there is nothing."""
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


# ---- comparing ----------------------------------------------------------------------------------------------------


def compared(path_a: str, a: Report, path_b: str, b: Report) -> dict[str, Any]:
    """The comparison of two reports, as plain values for JSON.

    `a`, `b`: path, model, device, machine and date of each. `warnings`: sentences. `only_in_a`, `only_in_b`: engine,
    mode, model, batch_size and the workload, if it has a name, of runs without a partner. `runs`: for each pair the
    same, and `wall_s_of_each_run`: lowest and highest of a and of b, null where they are not known;
    `rows`: name (its place in a run of a report), a, b and ratio, b / a, null where it has no value;
    `points`: the latency points that both have: name, where, a and b (their median_ms) and ratio.
    """
    runs_a, runs_b = _by_key(a), _by_key(b)
    both = [key for key in runs_a if key in runs_b]
    facts = ("model", "device", "machine", "date")
    return {
        "a": {"path": path_a, **{key: getattr(a, key) for key in facts}},
        "b": {"path": path_b, **{key: getattr(b, key) for key in facts}},
        "warnings": [one.text for one in differences(a, b, [(runs_a[key], runs_b[key]) for key in both])],
        "runs": [_pair(runs_a[key], runs_b[key]) for key in both],
        "only_in_a": [_names(key) for key in runs_a if key not in runs_b],
        "only_in_b": [_names(key) for key in runs_b if key not in runs_a],
    }


def verdict_on(a: Report, b: Report, threshold: float, figures: Sequence[str]) -> Verdict:
    """Whether `b` is worse than `a` by more than the threshold, or why that cannot be said."""
    runs_a, runs_b = _by_key(a), _by_key(b)
    both = [key for key in runs_a if key in runs_b]
    pairs = [(runs_a[key], runs_b[key]) for key in both]
    void = [one.text for one in differences(a, b, pairs) if one.voids]
    for letter, mine, others in (("A", runs_a, runs_b), ("B", runs_b, runs_a)):
        void += [f"only in {letter}: {_name(key)}" for key in mine if key not in others]
    return judge([(_name(_key(x)), x, y) for x, y in pairs], void, threshold, figures)


def _by_key(report: Report) -> dict[tuple, Run]:
    return {_key(run): run for run in report.runs}


def _pair(a: Run, b: Run) -> dict[str, Any]:
    each = {}
    for name, run in (("a", a), ("b", b)):
        walls = run.wall_s_of_each_run
        each[name] = [min(walls), max(walls)] if walls else None
    rows = [(".".join(keys), _value(a, keys), _value(b, keys)) for _, keys, _, _ in (*ROWS, *MORE_ROWS)]
    of_a, of_b = ({(point.where, point.name): point.median_ms for point in run.points} for run in (a, b))
    return {
        **_names(_key(a)),
        "wall_s_of_each_run": each,
        "rows": [{"name": name, "a": x, "b": y, "ratio": _ratio(x, y)} for name, x, y in rows],
        "points": [
            {"name": key[1], "where": key[0], "a": of_a[key], "b": of_b[key], "ratio": _ratio(of_a[key], of_b[key])}
            for key in of_a
            if key in of_b
        ],
    }


def _value(run: Run, keys: Sequence[str]) -> Any:
    """A number of a run, by the names of the fields that lead to it; None where it is not known."""
    value: Any = run
    for key in keys:
        value = getattr(value, key, None)
    return value


def _ratio(a: float | None, b: float | None) -> float | None:
    return b / a if a and b is not None else None


def _key(run: Run) -> tuple:
    return tuple(getattr(run, key) for key in PAIRED_BY)


def _names(key: Sequence[Any]) -> dict[str, Any]:
    """The key for JSON: without a workload's name where it has none."""
    return {name: value for name, value in zip(PAIRED_BY, key, strict=True) if (name, value) != ("workload", None)}


def _name(key: Sequence[Any]) -> str:
    engine, mode, model, batch_size, workload = key
    where = f"{model}, batch size {batch_size}" + (f", {workload}" if workload else "")
    return f"{engine} {mode}, {where}"


class Difference(NamedTuple):
    """A sentence about two reports. voids: whether their figures say nothing about each other because of it, as with
    another machine or workload; another version or setting may be just what is compared."""

    text: str
    voids: bool


def differences(a: Report, b: Report, pairs: Sequence[tuple[Run, Run]]) -> Iterator[Difference]:
    """Each thing that should be the same in both reports, and is not, or that makes one of them void."""
    for key in SAME:
        yield from _differ(key, getattr(a, key), getattr(b, key))
    gpus = [report.gpu or Gpu() for report in (a, b)]
    for one in fields(Gpu):
        what = f"gpu, {one.name.replace('_', ' ')}"
        yield from _differ(what, getattr(gpus[0], one.name), getattr(gpus[1], one.name), one.name)
    for key in SAME_VERSIONS:
        yield from _differ(f"version of {key}", a.versions.get(key), b.versions.get(key), "versions")
    of_workload = {key: _differ_in(a, b, key) for key in SAME_WORKLOAD}
    yield from (difference for difference in of_workload.values() if difference)
    for key in SAME_OF_RUN:
        differing = [(x, y) for x, y in pairs if getattr(x, key) != getattr(y, key)]
        if differing and not of_workload.get(key):  # once is enough
            x, y = differing[0]
            more = f", and of {len(differing) - 1} more" if len(differing) > 1 else ""
            yield from _differ(f"{key} of {_name(_key(x))}{more}", getattr(x, key), getattr(y, key), key)
    yield from _void("A", a, [of_a for of_a, _ in pairs])
    yield from _void("B", b, [of_b for _, of_b in pairs])


def _differ(what: str, x: Any, y: Any, key: str | None = None) -> Iterator[Difference]:
    if x != y:
        yield Difference(f"{what}: A has {_word(x)}, B has {_word(y)}", (key or what) not in MAY_DIFFER)


def _differ_in(a: Report, b: Report, key: str) -> Difference | None:
    """What is to be said about one condition of the two workloads; None where it is the same."""
    values = [getattr(report.workload, key) for report in (a, b)]
    x, y = (BEFORE.get(key) if value is None else value for value in values)
    if x != y and key == "prompts_sha256":  # the contents count, and the name is what a reader knows them by
        files = zip((a.workload, b.workload), (x, y), strict=True)
        x, y = (f"{_word(workload.prompts)} (sha256 {value})" if value else None for workload, value in files)
        key = "prompts"
    return next(_differ(key, x, y), None)


def _void(letter: str, report: Report, runs: Sequence[Run]) -> Iterator[Difference]:
    """What makes the numbers of a report void, or of a part of a run only."""
    for run in runs:
        if run.interrupted:
            yield Difference(f"interrupted: in {letter} {_name(_key(run))} ended early", True)
    for engine, same in {"asyncbatch": report.same_tokens, **report.peers_same_tokens}.items():
        if not same:
            text = f"tokens: in {letter} sync and async of {engine} gave different ones, so its numbers are void"
            yield Difference(text, True)


def _word(value: Any) -> str:
    return "none" if value is None else " ".join(str(value).split())


# ---- as text ------------------------------------------------------------------------------------------------------


def comparison_table(result: dict[str, Any]) -> str:
    """The comparison as text: two reports, warnings, a table for each pair of runs, runs without a partner."""
    lines = [f"{letter}: {one['path']}: {one['model']} on {one['device']}; {one['machine']}, {one['date']}"
             for letter, one in (("A", result["a"]), ("B", result["b"]))]  # fmt: skip
    lines += [f"warning: {sentence}" for sentence in result["warnings"]]
    for pair in result["runs"]:
        lines += ["", *_lines(pair)]
    if not result["runs"]:
        lines += ["", "no run of A has a partner in B: paired are runs of the same engine, mode, model and batch size"]
    alone = [(letter, one) for letter in "ab" for one in result[f"only_in_{letter}"]]
    lines += [""] * bool(alone)
    lines += [f"only in {letter.upper()}: {_name([one.get(key) for key in PAIRED_BY])}" for letter, one in alone]
    return "\n".join(lines)


def _lines(pair: dict[str, Any]) -> list[str]:
    """One pair of runs: a line for each number that both have, then for each latency point."""
    rows: list[tuple[str, ...]] = [("", "A", "B", "B / A")]
    forms = {".".join(keys): (words, form, factor) for words, keys, form, factor in (*ROWS, *MORE_ROWS)}
    may_lack = {".".join(keys) for _, keys, _, _ in MORE_ROWS}
    for row in pair["rows"]:
        if row["name"] in may_lack and None in (row["a"], row["b"]):
            continue
        words, form, factor = forms[row["name"]]
        rows.append((words, *_cells(row, form, factor)))
        if row["name"] == "wall_s":
            rows += _spread(row, pair["wall_s_of_each_run"])
    for point in pair["points"]:
        rows.append((f"{point['where']}: {point['name']}", *_cells(point, "{:.3f} ms", 1)))
    return [_name([pair.get(key) for key in PAIRED_BY]), *table_lines(rows)]


def _spread(row: dict[str, Any], each: dict[str, list[float] | None]) -> Iterator[tuple[str, ...]]:
    """The lowest and the highest wall time of the repeats, where there are several."""
    a, b = each["a"], each["b"]
    if a and b and a + b != [row["a"]] * 2 + [row["b"]] * 2:
        spreads = ("{:.3f} to {:.3f} s".format(*one) for one in (a, b))
        yield ("  its runs", *spreads, "apart" if a[1] < b[0] or b[1] < a[0] else "they overlap")


def _cells(row: dict[str, Any], form: str, factor: float) -> list[str]:
    cells = ["-" if row[letter] is None else form.format(factor * row[letter]) for letter in "ab"]
    return [*cells, "-" if row["ratio"] is None else f"{row['ratio']:.3f}x"]

"""The file of a recording: which keys it must have, how it is written, and how it is checked.

`check` computes everything in the `totals` of a run again from its steps, and demands that the two agree; the SHA-256
of the whole shows that nobody edited the file.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from .steps import PACKED, Steps, steps_of

SCHEMA = 1
KINDS = ("decode", "prefill")
KEYS = {
    "recording": (
        "schema", "name", "gpu", "versions", "machine", "command", "date", "copy_bandwidth_bytes_per_s", "models",
        "runs", "failed", "sha256",
    ),
    "gpu": ("name", "memory_gib", "driver", "compute_capability"),
    "versions": ("python", "torch", "transformers", "triton", "cuda"),
    "model": ("dtype", "weight_bytes", "kv_bytes_per_token", "vocab_size", "max_positions"),
    "run": (
        "engine", "mode", "setting", "model", "batch_size", "requests", "prompt_tokens", "new_tokens",
        "prefill_tokens", "wall_s_of_each_run", "totals", "phase_us", "steps",
    ),
    "totals": (
        "wall_s", "tokens", "tokens_per_s", "steps", "decode_steps", "device_active", "idle", "host_ms_per_step",
        "wasted_tokens",
    ),
    "rank": ("rank", "replica", "tp_rank", "collectives_us"),
    "steps": ("before_us", "after_us", "device_us", "gap_us", "host_us", "kind", *PACKED),
}  # fmt: skip
# Not every engine or machine has these; they are null where it does not.
MAY_BE_NULL = ("triton", "prefill_tokens", "setting", "device_active", "idle", "host_ms_per_step",
               "collectives_us")  # fmt: skip


def check(data: Any) -> None:
    """ValueError that names what is missing, or which total does not follow from the steps of its run."""
    if not isinstance(data, dict):
        raise ValueError(f"a recording is a JSON object, not a {type(data).__name__}")
    label = f"recording {data.get('name')!r}"
    _demand_keys(label, data, "recording")
    if data["schema"] != SCHEMA:
        raise ValueError(f"{label}: schema is {data['schema']!r}, this version reads {SCHEMA}")
    for part in ("gpu", "versions"):
        _demand_keys(f"{label}, {part}", data[part], part)
    for name, model in data["models"].items():
        _demand_keys(f"{label}, model {name}", model, "model")
    if not data["runs"]:
        raise ValueError(f"{label}: there is no run in it")
    for run in data["runs"]:
        where = f"{label}, {' '.join(str(run.get(key)) for key in ('model', 'batch_size', 'engine', 'mode'))}"
        _demand_keys(where, run, "run")
        if run["model"] not in data["models"]:
            raise ValueError(f"{where}: its model is not among the models {sorted(data['models'])}")
        _check_run(where, run)
    if data["sha256"] != digest({key: value for key, value in data.items() if key != "sha256"}):
        raise ValueError(f"{label}: it is not what was written (its sha256 differs): recordings are not edited")


def _check_run(where: str, run: dict[str, Any]) -> None:
    _demand_keys(f"{where}, totals", run["totals"], "totals")
    _demand_keys(f"{where}, steps", run["steps"], "steps")
    try:
        steps = steps_of(run)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
    if set(steps.kind.tolist()) - set(KINDS):
        raise ValueError(f"{where}: kinds of steps are {sorted(set(steps.kind))}, allowed are {', '.join(KINDS)}")
    if not len(steps.kind) or steps.gap_us[0] != 0:
        raise ValueError(f"{where}: there is no step, or a gap before the first one")
    _check_totals(where, run["totals"], steps)
    for rank in run.get("ranks", ()):
        _check_rank(f"{where}, rank {rank.get('rank')}", rank, steps)
    walls = sorted(run["wall_s_of_each_run"])
    if not walls or abs(walls[(len(walls) - 1) // 2] - run["totals"]["wall_s"]) > 2e-6:
        raise ValueError(f"{where}: wall_s {run['totals']['wall_s']} is not the median of wall_s_of_each_run {walls}")


def _check_rank(where: str, rank: dict[str, Any], steps: Steps) -> None:
    """A rank of a run whose own steps are those of rank 0. Ranks of one replica have the same steps."""
    _demand_keys(where, rank, "rank")
    if rank["rank"]:
        try:
            own = steps_of(rank)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from None
        _check_totals(where, rank["totals"], own)
        if rank["replica"] == 0 and len(own.kind) != len(steps.kind):
            raise ValueError(f"{where}: it has {len(own.kind)} steps, and rank 0 has {len(steps.kind)}")
        steps = own
    timed = rank["collectives_us"]
    if timed is not None and len(timed) != len(steps.kind):
        raise ValueError(f"{where}: {len(timed)} times in collectives for {len(steps.kind)} steps")


def _check_totals(where: str, totals: dict[str, Any], steps: Steps) -> None:
    for key, value in steps.totals().items():
        stated = totals[key]
        same = value == stated if None in (value, stated) else math.isclose(value, stated, rel_tol=1e-9)
        if not same:
            raise ValueError(f"{where}: {key} is stated as {stated}, and its steps give {value}")


def _demand_keys(where: str, value: Any, part: str) -> None:
    """ValueError unless `value` is a dict with all keys of this part of the file."""
    missing = [key for key in KEYS[part] if not isinstance(value, dict) or key not in value]
    missing += [key for key in KEYS[part] if key not in missing and value[key] is None and key not in MAY_BE_NULL]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing")


def text_of(data: dict[str, Any]) -> str:
    """The text of the file: JSON, with one line for each key and each run."""
    lines = []
    for key, value in data.items():
        if key == "runs":
            text = "[\n" + ",\n".join("  " + compact(run) for run in value) + "\n ]"
        else:
            text = json.dumps(value, allow_nan=False)
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def compact(value: Any) -> str:
    """The value as JSON without spaces."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def digest(data: dict[str, Any]) -> str:
    """The SHA-256, in hexadecimal digits, of all of `data` whatever the order of its keys."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

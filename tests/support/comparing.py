"""Reports made up to be compared with each other."""

from __future__ import annotations

VERSIONS = {"python": "3.12.1", "torch": "2.13.0", "transformers": "5.23.0", "triton": None, "cuda": None}
WORKLOAD = {"batch_size": 8, "requests": 16, "prompt_tokens": 64, "new_tokens": 32, "seed": 0, "repeats": 3,
            "slots": 2, "host_work_ms": 0.0, "step_ms": None, "arrivals": "all", "prompts": None,
            "prompts_sha256": None}  # fmt: skip
GPU = {"name": "H200", "memory_gib": 139.8, "driver": "580.1", "compute_capability": "9.0"}


def row(mode="sync", engine="asyncbatch", model="m", **changes):
    times = {"median": 10.0, "p99": 20.0}
    made = {
        "engine": engine, "mode": mode, "model": model, "batch_size": 8, "wall_s": 4.0, "tokens_per_s": 100.0,
        "idle": 0.25, "host_ms_per_step": 1.5, "device_ms_per_step": 4.5, "wasted_tokens": 0, "tokens": 512,
        "wall_s_of_each_run": [4.0, 4.1, 3.9], "requests": 16, "prompt_tokens": 64, "new_tokens": 32,
        "prefill_tokens": 64, "setting": None,
        "latency": {"first_token_ms": times, "per_token_ms": {"median": None, "p99": None}, "end_to_end_ms": times},
        "points": [{"name": "schedule", "where": "host", "median_ms": 0.2, "p99_ms": 0.4},
                   {"name": "forward", "where": "device", "median_ms": 4.0}],
    }  # fmt: skip
    return {**made, **changes}


def report(*rows, **changes):
    made = {
        "schema": 2, "model": "m", "device": "cpu", "machine": "Linux, 2 cores", "date": "2026-11-25T00:00:00+00:00",
        "gpu": None, "versions": dict(VERSIONS), "workload": dict(WORKLOAD), "same_tokens": True,
        "peers_same_tokens": {}, "emulated": None, "preset": None, "runs": list(rows) or [row(), row("async")],
    }  # fmt: skip
    return {**made, **changes}


def changed(path, value):
    """A report in which one thing is another."""
    made = report()
    target = made
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return made

"""Made-up runs and recordings, whose every time is known."""

from __future__ import annotations

import functools
import itertools

from asyncbatch import Timeline
from asyncbatch.measure.recording import Recording

MODEL = "random:llama-8b"
FACTS = dict(dtype="bfloat16", weight_bytes=15 * 10**9, kv_bytes_per_token=131072, vocab_size=501, max_positions=4096)
SESSION = {
    "gpu": {"name": "A GPU", "memory_gib": 1.0, "driver": "1.2", "compute_capability": "9.0"},
    "versions": {"python": "3", "torch": "2", "transformers": "5", "triton": None, "cuda": "13"},
    "machine": "somewhere",
    "command": "python -m asyncbatch.profile --record made-up",
    "date": "2026-01-01",
    "copy_bandwidth_bytes_per_s": 4e12,
    "models": {MODEL: FACTS},
}


def made_timeline(mode, parts, batch=4, origin=0.0, first_context=17):
    """The timeline of a run whose steps are `parts`: (kind, gap_s, device_s, host_s, tokens, wasted) of each."""
    timeline, now = Timeline(mode, "cuda"), origin
    for number, (kind, gap_s, device_s, host_s, tokens, wasted) in enumerate(parts):
        timeline.add("host", "plan", number, now, now + host_s / 2)
        timeline.add("host", "commit", number, now + host_s / 2, now + host_s)
        timeline.add("host", "wait", number, now + host_s, now + host_s + device_s)
        now += gap_s
        timeline.add("compute", "step", number, now, now + device_s)
        now += device_s
        timeline.add("D2H", "copy_out", number, now, now + 1e-5)
        timeline.add_step(number, kind, tokens, wasted, batch, batch * (first_context + number))
    return timeline


def row_of(timeline, batch=4, model=MODEL, engine="asyncbatch", **other):
    """What the report says of the run with this timeline; `other` replaces parts of it."""
    row = dict(engine=engine, mode=timeline.label, setting=None, model=model, batch_size=batch, requests=batch)
    row |= dict(prompt_tokens=16, new_tokens=8, prefill_tokens=48, wall_s_of_each_run=[timeline.summary().wall_s])
    return {**row, **other}


def recorded(*timelines_and_rows, name="made-up", **session):
    """The recording of a session with these runs; `session` replaces parts of SESSION."""
    timelines = [timeline for timeline, _ in timelines_and_rows]
    report = {**SESSION, **session, "runs": [row for _, row in timelines_and_rows]}
    return Recording.from_runs(name, report, timelines)


@functools.cache
def example():
    """Both modes, two batch sizes: a decode step of B rows and context C takes 1 ms + B * 0.1 ms + C * 1 us."""
    runs = []
    for mode, batch in itertools.product(("sync", "async"), (2, 8)):
        device = [1e-3 + 1e-4 * batch + 1e-6 * batch * (17 + number) for number in range(41 * batch)]
        steps = [("decode" if n else "prefill", 1e-4, d if n else 7e-3, 3e-4, batch, 0) for n, d in enumerate(device)]
        timeline = made_timeline(mode, steps, batch)
        runs.append((timeline, row_of(timeline, batch)))
    return recorded(*runs)

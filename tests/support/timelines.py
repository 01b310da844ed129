"""Timelines that no batcher made: one that is steady and simple, and any that could be."""

from __future__ import annotations

from hypothesis import strategies as st

from asyncbatch.timeline import Timeline


def steady_run(label: str, steps: int = 100, active: float = 0.8) -> Timeline:
    """Steps of 10 ms each that keep the device active for a share of it; every tenth is a prefill step."""
    timeline = Timeline(label, "virtual")
    for step in range(steps):
        now = 50 + step * 10e-3
        begin = now + (1 - active) * 10e-3
        timeline.add("host", "plan", step, now, begin)
        timeline.add("H2D", "copy_in", step, now, now + 0.1e-3)
        timeline.add("compute", "step", step, begin, now + 10e-3)
        timeline.add("host", "wait", step, begin, now + 10e-3)
        timeline.add("D2H", "copy_out", step, now + 10e-3, now + 10.1e-3)
        timeline.add_step(step, "prefill" if step % 10 == 0 else "decode", 8, 0)
    return timeline


@st.composite
def runs(draw) -> Timeline:
    """A timeline of device steps that do not overlap, with host work at any time."""
    timeline = Timeline(draw(st.text()), draw(st.sampled_from(["host", "cuda", "virtual"])))
    now = draw(st.floats(0, 1e9))
    for number in range(draw(st.integers(0, 12))):
        idle, busy, host = (draw(st.floats(0, 10)) for _ in range(3))
        timeline.add("host", draw(st.sampled_from(["plan", "wait"])), number, now, now + host)
        timeline.add("compute", "step", number, now + idle, now + idle + busy)
        kind = draw(st.sampled_from(["decode", "prefill"]))
        counts = [draw(st.integers(0, 9)) for _ in range(draw(st.sampled_from([2, 4])))]
        timeline.add_step(number, kind, *counts)
        now += idle + busy
    return timeline

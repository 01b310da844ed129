"""A trace shows runs and lanes in their order, each slice where and as long as it was."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbatch.timeline import LANES, Timeline, load_trace, save_trace

SPAN = st.tuples(
    st.sampled_from([*LANES, "points", "device points"]), st.integers(0, 3), st.integers(0, 999), st.integers(0, 99)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(SPAN, max_size=8), min_size=1, max_size=3))
def test_runs_and_their_lanes_are_listed_in_order_and_slices_are_where_they_were(tmp_path_factory, runs):
    """Of each run the four lanes, used or not, and after them any others as they come. All times are in microseconds
    from the run's own first span on, and `load` gives the seconds back."""
    timelines = [Timeline(f"run {number}", "virtual") for number in range(len(runs))]
    for timeline, spans in zip(timelines, runs, strict=True):
        for lane, step, start, length in spans:
            timeline.add(lane, f"in {lane}", step, start * 1e-6, (start + length) * 1e-6)
    path = tmp_path_factory.mktemp("traces") / "trace.json"
    save_trace(path, timelines)
    events = json.loads(path.read_text())["traceEvents"]

    def told(kind, pid):
        return [event for event in events if event["name"] == kind and event["pid"] == pid]

    order = [told("process_sort_index", pid)[0]["args"]["sort_index"] for pid in range(1, len(runs) + 1)]
    assert order == sorted(set(order)), "runs stand in the order in which they were given"
    seen = set()
    for pid, spans in enumerate(runs, 1):
        names = {event["tid"]: event["args"]["name"] for event in told("thread_name", pid)}
        places = {names[event["tid"]]: event["args"]["sort_index"] for event in told("thread_sort_index", pid)}
        others = dict.fromkeys(lane for lane, *_ in spans if lane not in LANES)
        assert sorted(places, key=lambda name: places[name]) == [*LANES, *others]
        assert len(set(places.values())) == len(places)
        assert not seen & names.keys(), "no two lanes share a number"
        seen |= names.keys()
        first = min((start for _, _, start, _ in spans), default=0)
        slices = [event for event in events if event["ph"] == "X" and event["pid"] == pid]
        assert [
            (names[e["tid"]], e["name"], e["cat"], e["args"]["step"], round(e["ts"]), round(e["dur"])) for e in slices
        ] == [(lane, f"in {lane}", lane, step, start - first, length) for lane, step, start, length in spans]
    assert [list(loaded.spans) for loaded in load_trace(path)] == [list(timeline.spans) for timeline in timelines]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 40)] * 3, *[st.integers(0, 9)] * 3), max_size=4), st.integers(0, 2))
def test_a_step_with_a_slice_on_each_lane_of_the_device_has_one_arrow_through_their_middles(
    tmp_path_factory, steps, missing
):
    """None for a step without one of them, nor where it would lead back in time. A second slice of a step on a lane is
    not on its way."""
    timeline, device = Timeline(), LANES[1:]
    expected = {}
    for number, (*starts, a, b, c) in enumerate(steps):
        middles = []
        for lane, start, length in zip(device, starts, (a, b, c), strict=True):
            if number or lane != device[missing]:
                timeline.add(lane, "x", number, start * 1e-6, (start + length) * 1e-6)
                timeline.add(lane, "y", number, 500e-6, 501e-6)
                middles.append(start + length / 2)
        if len(middles) == len(device) and middles == sorted(middles):
            expected[number] = middles
    timeline.add("host", "plan", 0, 0.0, 1e-6)
    path = tmp_path_factory.mktemp("traces") / "trace.json"
    timeline.save(path)
    found = {}
    for event in json.loads(path.read_text())["traceEvents"]:
        if event["ph"] in "stf":
            found.setdefault((event["name"], event["id"]), []).append((event["ph"], round(event["ts"], 3)))
    assert len({number for _, number in found}) == len(found), "each has a number of its own"
    assert {name: points for (name, _), points in found.items()} == {
        f"step {number}": list(zip("stf", [round(m, 3) for m in middles], strict=True))
        for number, middles in expected.items()
    }

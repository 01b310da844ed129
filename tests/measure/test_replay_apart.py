"""`simulate`, `predict` and `what_if` against a replay written apart: a list of tasks, each of which waits for others.

A run is a set of tasks: what the host does, one thing after the other, and three things of each step on the device. A
task ends its seconds after all that it waits for has ended. The run is over when its last task is.
"""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbatch import Timeline
from asyncbatch.measure.points import DEVICE_LANE, LANE
from asyncbatch.measure.simulate import StepCost, costs_of, predict, simulate, what_if

SECONDS = st.integers(0, 40)
COSTS = st.lists(
    st.builds(
        StepCost,
        *[SECONDS] * 5,
        decode=st.booleans(),
        **dict.fromkeys(("hidden", "between", "waking", "begin"), st.one_of(st.just(0), SECONDS)),
    ),
    max_size=12,
)


def replay(costs, slots):
    """The end of every task, by (name, step)."""
    tasks, last = {}, None  # name -> (seconds, names of what it waits for)
    order = []  # the host's: launch `slots` steps ahead, then commit the oldest
    for step in range(len(costs)):
        order += [("before", step), ("between", step), ("hidden", step)]
        if step + 1 >= slots:
            order.append(("commit", step + 1 - slots))
    order += [("commit", step) for step in range(max(0, len(costs) - slots + 1), len(costs))]
    for name, step in order:
        waits = [last] if last else []
        if name == "commit":
            waits.append(("waking", step))
        tasks[name, step] = getattr(costs[step], name), waits
        last = name, step
    for step, cost in enumerate(costs):
        for name, *after in (
            ("copy_in", "before"),
            ("begin", "copy_in", "between"),
            ("step", "begin"),
            ("copy_out", "step", "hidden"),
            ("waking", "copy_out"),
        ):
            in_order = step and name in ("copy_in", "step", "copy_out")  # those of a stream follow each other
            tasks[name, step] = getattr(cost, name), [(a, step) for a in after] + [(name, step - 1)] * bool(in_order)
    ends = {}

    def end(task):
        if task not in ends:
            seconds, waits = tasks[task]
            ends[task] = seconds + max([end(other) for other in waits], default=0)
        return ends[task]

    for task in tasks:
        end(task)
    return ends, ends[last] if last else 0


def share(costs, starts, ends):
    """The share of time that the device is active: of each decode step but the first, from the end of the one before
    to its own."""
    counted = [step for step in range(1, len(costs)) if costs[step].decode]
    period = sum(ends[step] - ends[step - 1] for step in counted)
    return sum(ends[step] - starts[step] for step in counted) / period if period else math.nan


@settings(max_examples=200, deadline=None)
@given(COSTS, st.integers(1, 5))
def test_a_simulated_run_is_the_replay_of_its_tasks(costs, slots):
    ends, total = replay(costs, slots)
    run = simulate(costs, slots)
    on_device = [ends["step", step] for step in range(len(costs))]
    assert run.ends.tolist() == on_device
    assert run.starts.tolist() == [end - cost.step for end, cost in zip(on_device, costs, strict=True)]
    assert (run.total_s, run.slots) == (total, slots)
    assert run.active == pytest.approx(share(costs, run.starts, on_device), nan_ok=True)
    if len(costs) > 1:
        assert run.step_s == statistics.median(b - a for a, b in zip(on_device, on_device[1:], strict=False))
    else:
        assert math.isnan(run.step_s)


def test_the_first_step_has_no_period_and_a_prefill_step_does_not_count():
    steps = [StepCost(1, 0, 3, 0, 0), StepCost(5, 0, 3, 0, 0, decode=False), StepCost(1, 0, 3, 0, 0)]
    assert simulate(steps, 1).active == 3 / 4
    assert math.isnan(simulate(steps[:2], 1).active)
    assert math.isnan(simulate(steps[:1], 1).active)
    assert simulate(steps, 1).step_s == 6
    assert simulate([], 1).total_s == 0
    with pytest.raises(ValueError, match="slots is 0: allowed are whole numbers from 1"):
        simulate(steps, 0)


# ---- costs from a timeline -------------------------------------------------------------------------------------------

POINTS = {  # where a synchronous loop spends its time, in its order; those after the step are indented
    "callbacks": "before", "schedule": "before", "admit": "before", "fill buffers": "before", "step launch": "before",
    "copy in": "copy_in", "step": "step", "copy out": "copy_out",
    "commit": "commit", "prune": "commit",
}  # fmt: skip
STEP = st.fixed_dictionaries({name: SECONDS for name in POINTS})


def run_of(steps, kinds, before_s=None):
    """The timeline of a synchronous loop whose steps take these seconds for each point, and its costs. before_s: of
    each step the seconds from the end of its launch until the device begins with it."""
    timeline, now, costs = Timeline("sync", "virtual"), 100, []
    for number, (of, kind) in enumerate(zip(steps, kinds, strict=True)):
        if number:
            timeline.add(LANE, "callbacks", number - 1, now, now + of["callbacks"])
            now += of["callbacks"]
        start = now
        timeline.add(LANE, "admit", number, start + of["schedule"], start + of["schedule"] + of["admit"])
        for name, parts in (("plan", ("schedule", "admit")), ("fill", ("fill buffers",)), ("launch", ("step launch",))):
            end = now + sum(of[part] for part in parts)
            timeline.add("host", name, number, now, end)
            now = end
        now += before_s[number] if before_s else 0
        begin = now
        for lane, name, part in (
            ("H2D", "copy_in", "copy in"),
            ("compute", "step", "step"),
            ("D2H", "copy_out", "copy out"),
        ):
            timeline.add(lane, name, number, now, now + of[part])
            now += of[part]
        timeline.add("host", "wait", number, begin, now)
        timeline.add("host", "commit", number, now, now + of["commit"] + of["prune"])
        timeline.add(LANE, "prune", number, now, now + of["prune"])
        now += of["commit"] + of["prune"]
        timeline.add_step(number, kind, 1, 0)
        costs.append(cost_of(of, number, kind, before_s[number] if before_s else 0))
    return timeline, costs


def cost_of(of, number, kind, more=0):
    sums = dict.fromkeys(StepCost._fields[:5], 0)
    for point, field in POINTS.items():
        sums[field] += of[point] if number or point != "callbacks" else 0
    sums["copy_in"] += more
    return StepCost(**sums, decode=kind == "decode")


KINDS = st.sampled_from(["decode", "decode", "prefill"])
RUNS = st.lists(st.tuples(STEP, KINDS, SECONDS), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(RUNS)
def test_the_costs_of_a_synchronous_run_are_its_points_and_what_the_device_takes_to_begin(run):
    steps, kinds, untold = map(list, zip(*run, strict=True))
    timeline, costs = run_of(steps, kinds, untold)
    assert costs_of(timeline) == costs


def test_what_the_host_does_while_the_step_runs_is_hidden():
    """A launch of 9 s starts the step after 4 of them; and of the first step, nothing is known but its spans."""
    timeline = Timeline()
    for number, start in enumerate((0, 100, 200)):
        timeline.add("host", "plan", number, start, start + 2)
        timeline.add("host", "launch", number, start + 2, start + 11)
        begin = start + 11 if number == 0 else start + 6
        timeline.add("compute", "step", number, begin, start + 90)
        timeline.add("host", "wait", number, start + 11, start + 90)
        timeline.add("host", "commit", number, start + 90, start + 100)
        timeline.add_step(number, "decode", 1, 0)
    costs = costs_of(timeline)
    assert costs == [
        StepCost(11, 0, 79, 0, 10),
        StepCost(6, 0, 84, 0, 10, hidden=5),
        StepCost(6, 0, 84, 0, 10, hidden=5),
    ]
    assert simulate(costs, 1).total_s == 300
    assert simulate(costs, 1).starts.tolist() == [11, 106, 206]


def test_a_step_without_a_time_on_the_device_costs_nothing_and_a_run_without_steps_has_no_costs():
    timeline, costs = run_of([dict.fromkeys(POINTS, 2)] * 2, ["decode"] * 2)
    timeline.add("host", "plan", 2, 500, 600)
    timeline.add_step(2, "decode", 0, 0)
    assert costs_of(timeline) == costs
    assert costs_of(Timeline()) == []
    assert what_if(Timeline()) == []


def test_a_step_on_the_device_that_was_never_noted_leaves_the_costs_to_the_spans():
    """An interrupt can come in between. The step after it is told by its own moments."""
    whole, _ = run_of([dict.fromkeys(POINTS, 2)] * 3, ["decode"] * 3, [0, 5, 5])
    timeline = Timeline()
    for span in whole.spans:
        timeline.add(*span)
    for number in (0, 2):
        timeline.add_step(number, "decode", 1, 0)
    assert costs_of(timeline) == [StepCost(8, 2, 2, 2, 4), StepCost(10, 7, 2, 2, 4)]  # 2 for the caller, 5 to begin


# ---- what if ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(RUNS, st.integers(2, 3))
def test_without_a_point_both_loops_take_what_the_replay_without_it_takes(run, async_slots):
    steps, kinds, untold = map(list, zip(*run, strict=True))
    timeline, costs = run_of(steps, kinds, untold)
    base = {slots: replay(costs, slots)[1] for slots in (1, async_slots)}
    found = what_if(timeline, async_slots=async_slots)
    there = {p for n, of in enumerate(steps) for p in POINTS if of[p] and (n or p != "callbacks")}
    there |= {"not begun"} if any(untold) else set()
    assert sorted((one.point, one.factor) for one in found) == sorted((p, f) for p in there for f in (0.0, 0.5))
    for point, where, factor, *numbers in found:
        less = [{**of, point: factor * of.get(point, 0)} for of in steps]
        begin = factor if point == "not begun" else 1
        changed = [cost_of(of, n, kinds[n], begin * untold[n]) for n, of in enumerate(less)]
        totals = [replay(changed, slots)[1] for slots in (1, async_slots)]
        saved = [1 - total / base[slots] if base[slots] else 0.0 for total, slots in zip(totals, base, strict=True)]
        assert numbers == pytest.approx([*totals, *saved])
        assert where == ("device" if point in ("copy in", "step", "copy out", "not begun") else "host")
    assert in_order(found, "sync_saves")


LAUNCHING = st.fixed_dictionaries(
    {name: SECONDS for name in ("schedule", "H2D launch", "step launch", "D2H launch", "commit", "wake")}
    | {"early": st.integers(0, 80), "step": st.integers(1, 40), "copy in": st.integers(0, 9)}
)


@settings(max_examples=100, deadline=None)
@given(st.lists(LAUNCHING, min_size=1, max_size=8))
def test_a_point_saves_the_synchronous_loop_its_time_in_which_the_device_was_idle(steps):
    """The device begins `early`, before the host is done with launching: what lies behind that can save nothing. (The
    copy in takes its time while the host goes on launching, or not: then it is the one that can save nothing.)"""
    timeline, now, idle, free = Timeline("sync", "virtual"), 0, {}, 0

    def host(point, number, seconds, lane=LANE):
        nonlocal now
        if seconds:
            timeline.add(lane, point, number, now, now + seconds)
        now += seconds

    for number, of in enumerate(steps):
        host("plan", number, of["schedule"], "host")
        parts, begun = {"schedule": (now - of["schedule"], now)}, now
        for point in ("H2D launch", "step launch", "D2H launch"):
            parts[point] = now, now + of[point]
            host(point, number, of[point])
        timeline.add("host", "launch", number, begun, now)
        copied = parts["H2D launch"][1] + of["copy in"]
        start = max(parts["step launch"][1] - of["early"], copied, free)
        timeline.add("H2D", "copy_in", number, copied - of["copy in"], copied)
        end = max(start + of["step"], now)  # it lasts until the host is done with launching, so that nothing else waits
        timeline.add("compute", "step", number, start, end)
        timeline.add("D2H", "copy_out", number, end, end)
        timeline.add("host", "wait", number, now, end + of["wake"])
        now = end + of["wake"]
        host("commit", number, of["commit"], "host")
        timeline.add_step(number, "decode", 1, 0)
        for point, (low, high) in parts.items():
            beside = max(0, min(high, start, copied) - max(low, copied - of["copy in"]))  # while the copy ran
            idle[point] = idle.get(point, 0) + max(0, min(high, start) - low) - beside
        idle["commit"] = idle.get("commit", 0) + of["commit"]
        free = end
    total = simulate(costs_of(timeline), 1).total_s
    assert total == now
    saved = {one.point: total - one.sync_s for one in what_if(timeline) if one.factor == 0 and one.where == "host"}
    assert {point: saved.get(point, 0) for point in idle} == idle


def in_order(found, key):
    """The host's points first, then by what leaving out the whole of each (or half, if that is more) saves; the whole
    stands before the half."""
    best = {}
    for one in found:
        best[one.point] = max(best.get(one.point, -math.inf), getattr(one, key))
    places = [(one.where != "host", -best[one.point], one.point, one.factor) for one in found]
    return places == sorted(places)


def test_the_order_is_that_of_the_loop_that_ran():
    fast = dict.fromkeys(POINTS, 0)
    steps = [{**fast, "callbacks": 9, "schedule": 2, "fill buffers": 4, "step": 50, "copy in": 3, "commit": 5}] * 6
    timeline, _ = run_of(steps, ["decode"] * 6)
    timeline.add(LANE, "no request", 6, 5000, 6000)
    hidden, last = {**fast, "step": 50, "schedule": 4}, {**fast, "step": 50, "commit": 7}
    other, _ = run_of([{**fast, "step": 50}, hidden, hidden, last], ["decode"] * 4)
    assert what_if(other)[0].point == "schedule", "8 seconds of it, more than of commit"
    assert what_if(other, slots=2)[0].point == "commit", "what is scheduled while a step runs costs nothing"
    of_async, of_sync = what_if(timeline, slots=2), what_if(timeline)
    assert {one.point for one in of_sync} == {one.point for one in of_async}
    assert not {"wait", "no request"} & {one.point for one in of_sync}
    assert in_order(of_async, "async_saves")
    assert in_order(of_sync, "sync_saves")
    (step,) = [one for one in of_async if (one.point, one.factor) == ("step", 0.5)]
    costs = [StepCost(6, 3, 50, 0, 5), *[StepCost(15, 3, 50, 0, 5)] * 5]
    assert step.async_s == replay([cost._replace(step=25) for cost in costs], 2)[1]
    assert step.async_saves == pytest.approx(1 - step.async_s / replay(costs, 2)[1])


def test_parts_of_a_step_on_the_device_are_points_of_their_own():
    steps = [{**dict.fromkeys(POINTS, 1), "step": 20}] * 3
    timeline, costs = run_of(steps, ["decode"] * 3)
    for step, start in zip(timeline.lane("compute")[1].tolist(), timeline.lane("compute")[2].tolist(), strict=True):
        timeline.add(DEVICE_LANE, "sample", step, start, start + 8)
    found = {(one.point, one.factor): one for one in what_if(timeline)}
    assert "step" not in {point for point, _ in found}
    for point, seconds in (("sample", 8), ("forward", 12)):
        expected = replay([cost._replace(step=20 - seconds) for cost in costs], 1)[1]
        assert found[point, 0.0].sync_s == expected


# ---- the prediction --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(COSTS.filter(len), st.integers(2, 4), st.integers(0, 9), st.integers(1, 5))
def test_a_prediction_replays_both_loops_with_the_steps_that_early_stops_add(costs, slots, early_stops, rows):
    found = predict(costs, slots, early_stops, rows)
    more = [costs[len(costs) // 2]] * round(early_stops * (slots - 1) / rows)
    assert (found.sync.total_s, found.sync.slots) == (replay(costs, 1)[1], 1)
    assert (found.asynchronous.total_s, found.asynchronous.slots) == (replay(costs + more, slots)[1], slots)
    own = [c.before + c.between + c.commit for c in costs]
    assert found.host_s == statistics.median(a + c.hidden for a, c in zip(own, costs, strict=True))
    others = [c.copy_in + c.begin + c.copy_out + c.waking for c in costs]
    assert found.between_s == statistics.median(a + b for a, b in zip(own, others, strict=True))
    assert found.device_s == statistics.median(c.step for c in costs)
    if found.asynchronous.total_s:
        assert found.gain == found.sync.total_s / found.asynchronous.total_s
        assert found.helps == (found.gain >= 1.02)


def test_a_prediction_asks_for_two_slots_and_no_early_stop_unless_told():
    costs = [StepCost(2, 1, 7, 1, 1)] * 9
    assert predict(costs).asynchronous.total_s == replay(costs, 2)[1]
    assert predict(costs, early_stops=3).asynchronous.total_s == replay(costs[:1] * 12, 2)[1]
    assert costs_of(run_of([dict.fromkeys(POINTS, 1)], ["prefill"])[0])[0].decode is False
    assert StepCost(1, 1, 1, 1, 1)[5:] == (True, 0.0, 0.0, 0.0, 0.0)

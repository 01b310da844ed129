"""The closed form is where the simulated loop settles, and the simulation is what loops and recordings do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbatch import AsyncBatcher, Request, SyncBatcher, Timeline
from asyncbatch.devices.virtual import Costs
from asyncbatch.measure.recording import Recording
from asyncbatch.measure.simulate import (
    StepCost,
    costs_of,
    costs_of_recording,
    main,
    predict,
    simulate,
    span_s,
)
from asyncbatch.models.toy import toy_llama

SECONDS = st.integers(0, 3000).map(lambda ms: ms / 1000)
COST = st.tuples(*[SECONDS] * 5).map(lambda seconds: StepCost(*seconds))


def closed_form_s(cost, slots):
    """Seconds a step takes in the steady state when all steps cost the same: the slowest of the three cycles."""
    return max(cost.before + cost.commit, cost.step, cost.copy_in, cost.copy_out, sum(cost[:5]) / slots)


@given(COST, st.integers(1, 5))
def test_many_equal_steps_take_the_closed_form_each_but_for_a_start_and_an_end(cost, slots):
    count = 200
    run = simulate([cost] * count, slots)
    each, way = closed_form_s(cost, slots), sum(cost[:5])
    assert count * each - way - 1e-9 <= run.total_s <= count * each + (slots + 1) * way + 1e-9


@given(st.lists(COST, min_size=1, max_size=30), st.integers(1, 4))
def test_a_run_is_no_shorter_than_any_lane_and_no_longer_than_one_after_the_other(costs, slots):
    run = simulate(costs, slots)
    host = sum(cost.before + cost.commit for cost in costs)
    assert run.total_s >= max(host, sum(cost.step for cost in costs)) - 1e-9
    assert run.total_s <= simulate(costs, 1).total_s + 1e-9 <= sum(sum(cost[:5]) for cost in costs) + 2e-9
    assert run.total_s >= simulate(costs, slots + 1).total_s - 1e-9  # another slot never costs time
    assert (run.starts[1:] >= run.ends[:-1]).all()
    assert np.allclose(run.ends - run.starts, [cost.step for cost in costs])


@given(st.lists(COST, min_size=2, max_size=20))
def test_one_slot_takes_turns(costs):
    run = simulate(costs, 1)
    assert run.total_s == pytest.approx(sum(sum(cost[:5]) for cost in costs))
    idle = sum(c.commit + n.before + c.copy_out + n.copy_in for c, n in zip(costs, costs[1:], strict=False))
    device = sum(cost.step for cost in costs[1:])
    if device + idle > 0:
        assert run.active == pytest.approx(device / (device + idle))


def timeline_of(costs, late=0.0):
    """The timeline of a synchronous loop with these costs, whose device begins each step `late` seconds late."""
    timeline, now = Timeline("sync", "virtual"), 0.0
    for number, cost in enumerate(costs):
        timeline.add("host", "plan", number, now, now + cost.before)
        now += cost.before + late
        for lane, name, seconds in (("H2D", "copy_in", cost.copy_in), ("compute", "step", cost.step),
                                    ("D2H", "copy_out", cost.copy_out)):  # fmt: skip
            timeline.add(lane, name, number, now, now + seconds)
            now += seconds
        timeline.add("host", "commit", number, now, now + cost.commit)
        now += cost.commit
        timeline.add_step(number, "decode" if cost.decode else "prefill", 1, 0)
    return timeline


@given(st.lists(COST, min_size=2, max_size=12), SECONDS)
def test_costs_are_read_from_a_timeline_and_a_late_device_is_not_the_hosts_fault(costs, late):
    timeline = timeline_of(costs, late)
    read_costs = costs_of(timeline)
    expected = [cost._replace(copy_in=cost.copy_in + late) for cost in costs]
    assert np.allclose(read_costs, expected, atol=1e-9)
    assert simulate(read_costs, 1).total_s == pytest.approx(timeline.summary().wall_s, abs=1e-9)


def test_the_verdict_follows_the_times():
    step = StepCost(0.001, 0.0, 0.100, 0.0, 0.0)
    assert "will not help" in str(predict([step] * 50))
    assert not predict([step] * 50).helps
    hidden = predict([step._replace(before=0.05)] * 50)
    assert hidden.helps
    assert hidden.gain == pytest.approx(1.5, rel=0.05)
    assert "disappears" in str(hidden)
    assert "the host works longer than the device" in str(predict([step._replace(before=0.2)] * 50))
    more = predict([step._replace(before=0.05)] * 50, slots=2, early_stops=8, rows=4)
    assert more.asynchronous.total_s == pytest.approx(hidden.asynchronous.total_s + 2 * 0.1)
    for wrong in (dict(early_stops=-1), dict(rows=0), dict(slots=0)):
        with pytest.raises(ValueError, match="allowed are"):
            predict([step], **wrong)
    with pytest.raises(ValueError, match="no step"):
        predict([])


MODEL = toy_llama()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=9), st.integers(2, 4), COST)
def test_on_the_virtual_clock_the_prediction_is_exact(lengths, slots, cost):
    """Requests run to their length limits, so both loops have the same steps, and the prediction covers all of them."""
    requests = [Request(list(range(1, 1 + prompt)), new, stop_token_ids=()) for prompt, new in lengths]
    times = Costs(plan=cost.before / 2, fill=cost.before / 4, launch=cost.before / 4, copy_in=cost.copy_in,
                  step=lambda step: cost.step * (1 + 0.1 * step.rows + 0.01 * step.context), copy_out=cost.copy_out,
                  commit=cost.commit)  # fmt: skip
    timelines = []
    for batcher_class, number in ((SyncBatcher, 1), (AsyncBatcher, slots)):
        options = dict(max_batch_size=4, block_size=4, max_length=64, prefill_tokens=32, num_slots=number)
        with batcher_class(MODEL, clock=times, step_s=0.0, **options) as batcher:
            batcher.run(requests)
            timelines.append(batcher.timeline)
    sync, other = timelines
    if [step[:3] for step in sync.steps] != [step[:3] for step in other.steps]:
        return  # a request was admitted a step later: the synchronous loop frees its row one commit earlier
    prediction = predict(costs_of(sync), slots)
    assert prediction.sync.total_s == pytest.approx(sync.summary().wall_s, abs=1e-9)
    assert prediction.asynchronous.total_s == pytest.approx(other.summary().wall_s, abs=1e-9)
    assert np.allclose(prediction.asynchronous.ends, other.lane("compute")[3], atol=1e-9)


@settings(deadline=None)
@given(st.sampled_from(Recording.names()))
def test_a_recorded_synchronous_run_is_told_as_it_was(name):
    for run in Recording.load(name).runs:
        if run["mode"] == "sync":
            prediction = predict(costs_of_recording(run))
            assert prediction.sync.total_s == pytest.approx(span_s(run), rel=1e-3)
            assert prediction.sync.active == pytest.approx(run["totals"]["device_active"], abs=2e-3)
            assert prediction.asynchronous.active > prediction.sync.active


def test_the_command_prints_a_line_for_each_pair_of_runs(capsys):
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    pairs = 0
    for name in Recording.names():
        keys = {(r["engine"], r["model"], r["batch_size"], r["mode"]) for r in Recording.load(name).runs}
        pairs += sum((*key[:3], "async") in keys for key in keys if key[3] == "sync")
    assert len(lines) == 1 + pairs
    assert all(line.endswith("%") for line in lines[1:])


@pytest.mark.parametrize(("copy_in", "copy_out"), [(9.0, 0.1), (0.1, 9.0)])
def test_a_copy_that_waits_for_the_one_before_it_takes_no_longer_for_that(copy_in, copy_out):
    """Beside steps of 2 s copies of 9 s stand in line, with a third slot on either side of the step."""
    costs = Costs(plan=0.1, fill=0.1, launch=0.1, commit=0.1, copy_in=copy_in, step=2.0, copy_out=copy_out)
    slots = 3
    with AsyncBatcher(toy_llama(), clock=costs, step_s=0.0, num_slots=slots, max_batch_size=1) as batcher:
        batcher.run([Request([1, 2], 8, stop_token_ids=())])
    found = costs_of(batcher.timeline)
    assert [cost.copy_out for cost in found] == pytest.approx([copy_out] * 8)
    assert [cost.copy_in for cost in found] == pytest.approx([copy_in] * 8)
    assert simulate(found, slots).total_s == pytest.approx(batcher.timeline.summary().wall_s)

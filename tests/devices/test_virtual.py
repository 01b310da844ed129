"""The virtual clock: the host clock's tokens, the same timeline in every run, and every mistake of order seen."""

from __future__ import annotations

import functools
import math
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.clocks import costs, kinds
from support.programs import Log
from support.serving import OPTIONS, alone, requests
from support.tiny import tiny_model

from asyncbatch import AsyncBatcher, Request, SyncBatcher
from asyncbatch.base import host_span
from asyncbatch.devices.virtual import Costs, StepWork, VirtualDevice
from asyncbatch.measure.law import idle_share
from asyncbatch.measure.recording import Recording
from asyncbatch.streams import DeviceError
from asyncbatch.timeline import LANES

WORKLOAD = [Request([n, n + 1], 9, stop_token_ids=()) for n in range(3)]
NO_COPIES = Costs(copy_in=0.0, copy_out=0.0)


def serve(batcher_class, workload=WORKLOAD, **options):
    """The batcher after it has served the workload (closed), and the completions. Timed tokens unless told."""
    with batcher_class(tiny_model(), **{**OPTIONS, "step_s": 0.0, **options}) as batcher:
        completions = batcher.run(workload)
    return batcher, completions


# ---- the loops on the virtual clock ----------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.lists(requests, min_size=1, max_size=5), kinds, costs, st.integers(0, 8))
def test_the_tokens_are_the_host_clocks_whatever_the_times(workload, kind, times, spare):
    num_blocks = max(-(-(len(r.token_ids) + r.max_new_tokens) // 4) for r in workload) + spare
    batcher, found = serve(
        kind[0], workload, clock=times, step_s=None, num_slots=kind[1], num_blocks=num_blocks, check_races=True
    )
    assert [c.error for c in found] == [None] * len(workload)
    assert [c.token_ids for c in found] == [alone(request).token_ids for request in workload]
    assert batcher.kv.num_free == num_blocks


@settings(max_examples=40, deadline=None)
@given(st.lists(requests, min_size=1, max_size=5), kinds, costs)
def test_two_runs_have_the_same_timeline_to_the_last_digit_and_no_lane_does_two_things_at_once(workload, kind, times):
    first, second = (serve(kind[0], workload, clock=times, num_slots=kind[1])[0].timeline for _ in range(2))
    assert first.spans == second.spans
    assert first.steps == second.steps
    assert first.clock == "virtual"
    assert first.spans
    for lane in LANES:
        _, steps, starts, ends = first.lane(lane)
        assert (starts <= ends).all()
        assert (starts[1:] >= ends[:-1]).all()
        assert lane == "host" or steps.tolist() == list(range(len(first.steps)))
    host = [span for span in first.spans if span.lane == "host"]  # in the order of the calls
    assert all(a.end <= b.start for a, b in zip(host, host[1:], strict=False))


@settings(max_examples=40, deadline=None)
@given(costs, kinds)
def test_every_step_keeps_the_order_of_its_three_streams_and_each_thing_takes_what_it_costs(times, kind):
    times = replace(times, jitter=0.0)
    timeline = serve(kind[0], clock=times, num_slots=kind[1])[0].timeline
    found = {(name, step): (start, end) for _, name, step, start, end in timeline.spans}
    for step in range(len(timeline.steps)):
        assert found["launch", step][1] <= found["copy_in", step][0]
        assert found["copy_in", step][1] <= found["step", step][0]
        assert found["step", step][1] <= found["copy_out", step][0]
        assert found["copy_out", step][1] <= found["commit", step][0]
        for name in ("plan", "fill", "launch", "commit", "copy_in", "step", "copy_out"):
            start, end = found[name, step]
            assert end - start == pytest.approx(getattr(times, name), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(costs, st.floats(1e-6, 1e-2))
def test_the_synchronous_loop_idles_as_the_law_says(times, device_s):
    times = replace(times, copy_in=0.0, copy_out=0.0, step=device_s, jitter=0.0)
    summary = serve(SyncBatcher, clock=times)[0].timeline.summary()
    host_s = times.plan + times.fill + times.launch + times.commit
    assert summary.idle == pytest.approx(idle_share(host_s, device_s), abs=1e-9 if host_s + device_s < 1e-4 else 1e-12)


@settings(max_examples=40, deadline=None)
@given(costs, st.floats(1.0, 3.0))
def test_the_asynchronous_device_never_waits_for_a_faster_host(times, factor):
    times = replace(times, copy_in=0.0, copy_out=0.0, jitter=0.0)
    host_s = times.plan + times.fill + times.launch + times.commit
    timeline = serve(AsyncBatcher, clock=replace(times, step=1e-6 + 1.0001 * factor * host_s))[0].timeline
    _, _, starts, ends = timeline.lane("compute")
    assert starts[1:].tolist() == ends[:-1].tolist()
    assert timeline.summary().idle == pytest.approx(0.0, abs=1e-12)


def test_the_asynchronous_loop_of_a_slower_host_is_as_fast_as_the_host():
    times = replace(NO_COPIES, step=0.2e-3)
    timeline = serve(AsyncBatcher, clock=times)[0].timeline
    host_s = times.plan + times.fill + times.launch + times.commit
    _, _, starts, _ = timeline.lane("compute")
    assert np.diff(starts)[2:-1] == pytest.approx(host_s, abs=1e-12)


def test_host_work_is_counted_and_not_burnt():
    plain, busy = (serve(SyncBatcher, clock=NO_COPIES, host_work_s=extra)[0].timeline for extra in (0.0, 3600.0))
    spans = [[s.end - s.start for s in timeline.spans if s.name == "plan"] for timeline in (plain, busy)]
    assert spans[1] == pytest.approx([3600.0 + plan_s for plan_s in spans[0]])
    assert busy.summary().wall_s > 3600 * len(spans[0])


def test_completions_have_virtual_times():
    batcher, completions = serve(AsyncBatcher, clock=NO_COPIES)
    last = max(span.end for span in batcher.timeline.spans)
    for completion in completions:
        assert 0.0 == completion.submitted_s < completion.first_token_s < completion.finished_s <= last


def test_costs_see_what_is_in_a_step():
    seen = []

    def step(work):
        seen.append(work)
        return 1e-3

    batcher, _ = serve(SyncBatcher, [Request([1, 2, 3], 3, stop_token_ids=())] * 2, clock=Costs(step=step))
    assert seen == [StepWork("prefill", 2, 6, 6), StepWork("decode", 2, 8, 0), StepWork("decode", 2, 10, 0)]
    assert [(s.kind, s.rows, s.context) for s in batcher.timeline.steps] == [work[:3] for work in seen]


# ---- mistakes --------------------------------------------------------------------------------------------------------


def without_wait(name):
    def launch(self, slot):
        h2d, compute, d2h = self.device.streams
        h2d.launch("copy_in", slot.index)
        h2d.record_event(slot.inputs_ready)
        if name != "inputs_ready":
            compute.wait_event(slot.inputs_ready)
        compute.launch(slot.command, slot.index)
        compute.record_event(slot.step_done)
        if name != "step_done":
            d2h.wait_event(slot.step_done)
        d2h.launch("copy_out", slot.index)
        d2h.record_event(slot.outputs_ready)

    return host_span(launch)


@pytest.mark.parametrize(
    ("name", "wrong_where", "right_where"),
    [
        ("inputs_ready", Costs(copy_in=1e-3, step=0.5e-3), Costs(copy_in=0.1e-3, step=3e-3)),
        ("step_done", Costs(copy_in=0.1e-3, step=3e-3), None),
        (None, None, Costs(copy_in=1e-3, step=0.5e-3)),
    ],
)
def test_a_missing_wait_gives_wrong_tokens_every_time_where_the_times_let_it(name, wrong_where, right_where):
    expected = [c.token_ids for c in serve(SyncBatcher, clock=Costs())[1]]

    def tokens(times):
        with AsyncBatcher(tiny_model(), clock=times, step_s=0.0, **OPTIONS) as batcher:
            batcher.launch = types.MethodType(without_wait(name), batcher)
            return [c.token_ids for c in batcher.run(WORKLOAD)]

    if wrong_where is not None:
        wrong = tokens(wrong_where)
        assert wrong != expected
        assert all(tokens(wrong_where) == wrong for _ in range(4))
    if right_where is not None:  # that is why such a mistake is not found by trying
        assert tokens(right_where) == expected


@pytest.mark.parametrize("batcher_class", [SyncBatcher, AsyncBatcher])
def test_a_step_that_fails_fails_its_requests_and_no_others(batcher_class):
    workload = [Request([n, n + 1], 10, stop_token_ids=()) for n in range(1, 8)]
    failing = []
    with batcher_class(tiny_model(), clock=Costs(), **OPTIONS) as batcher:
        run = batcher.device.program.run

        def failing_run(command, slot):
            if command not in ("copy_in", "copy_out") and batcher.slots[slot].step == 2:
                failing.extend(row.state.number for row in batcher.slots[slot].plan.rows)
                raise ValueError("planted")
            run(command, slot)

        batcher.device.program.run = failing_run
        completions = batcher.run(workload)
        assert batcher.kv.num_free == batcher.kv.num_blocks
    assert failing
    for number, (completion, request) in enumerate(zip(completions, workload, strict=True)):
        if number in failing:
            assert isinstance(completion.error, DeviceError)
            assert "ValueError: planted" in str(completion.error)
        else:
            assert completion.token_ids == alone(request).token_ids


# ---- streams and events ----------------------------------------------------------------------------------------------


class Bench:
    """A device that runs the `Log` of the other tests of streams; a command takes what stands after its "@"."""

    def __init__(self, **others):
        self.shared = {
            "count": torch.zeros((), dtype=torch.int64),
            "log": torch.zeros(200, 2, dtype=torch.int64),
            "value": torch.zeros((), dtype=torch.int64),
            "seen": torch.full((), -1, dtype=torch.int64),
        }
        program = Log(None, **self.shared)
        run = program.run
        program.run = lambda command, slot: run(command.partition("@")[0], slot)

        def cost(work):
            return float(work.kind.partition("@")[2] or 0)

        self.device = VirtualDevice(program, 20, Costs(copy_in=cost, step=cost, copy_out=cost, **others))

    def ran(self):
        return [slot for slot, what in self.shared["log"][: int(self.shared["count"])].tolist() if what == 0]

    def __getattr__(self, name):
        return int(self.shared[name])


operations = st.lists(
    st.one_of(
        st.tuples(st.just("launch"), st.integers(0, 2), st.sampled_from([0.0, 0.25, 1.0, 2.5])),
        st.tuples(st.just("record"), st.integers(0, 2), st.integers(0, 1)),
        st.tuples(st.just("wait"), st.integers(0, 2), st.integers(0, 1)),
        st.tuples(st.just("work"), st.sampled_from([0.0, 0.5, 2.0])),
        st.tuples(st.just("synchronize"), st.integers(0, 1)),
        st.tuples(st.just("query"), st.integers(0, 1)),
    ),
    max_size=20,
)


@given(operations)
@settings(deadline=None, max_examples=200)
def test_any_program_keeps_the_order_of_its_streams_and_events(program):
    """Against a straightforward reading of the rules: each command starts at the latest of what it has to wait for."""
    bench = Bench()
    events = [bench.device.event() for _ in range(2)]
    host, streams, marks = 0.0, [0.0] * 3, [-math.inf] * 2
    expected = []
    for name, number, *more in program:
        if name == "launch":
            start = max(host, streams[number])
            streams[number] = start + more[0]
            bench.device.streams[number].launch(f"get@{more[0]}", len(expected))
            expected.append((number, start, start + more[0]))
        elif name == "record":
            marks[more[0]] = max(host, streams[number])
            bench.device.streams[number].record_event(events[more[0]])
        elif name == "wait":
            streams[number] = max(streams[number], marks[more[0]])
            bench.device.streams[number].wait_event(events[more[0]])
        elif name == "work":
            host += number
            bench.device.work(number)
        elif name == "synchronize":
            host = max(host, marks[number])
            events[number].synchronize()
        else:
            reached = marks[number] <= host
            host += 0.0 if reached else 1e-6
            assert events[number].query() == reached
        assert bench.device.now() == host  # never back, and only for a reason
        done = {slot for slot, (_, _, end) in enumerate(expected) if end <= host}
        assert set(bench.ran()) == done
    for stream in bench.device.streams:
        stream.synchronize()
    for slot, (number, start, end) in enumerate(expected):
        assert bench.device.spans(slot)[number] == [start, end]
    assert bench.ran() == sorted(range(len(expected)), key=lambda slot: expected[slot][2])


@pytest.mark.parametrize("waits", [True, False])
def test_without_a_wait_a_copy_comes_early_and_brings_the_old_value(waits):
    bench = Bench()
    a, b, _ = bench.device.streams
    event = bench.device.event()
    a.launch("put:5@1.0", 0)
    a.record_event(event)
    if waits:
        b.wait_event(event)
    b.launch("get@0.5", 1)
    b.synchronize()
    assert bench.seen == (5 if waits else 0)
    assert bench.device.now() == (1.5 if waits else 0.5)


def test_a_copy_brings_what_stands_there_at_its_end():
    bench = Bench()
    stream = bench.device.streams[0]
    bench.shared["value"].fill_(1)
    stream.launch("get@1.0", 0)
    bench.device.work(0.5)
    bench.shared["value"].fill_(2)  # the host does not wait for the copy
    stream.synchronize()
    assert bench.seen == 2


def test_a_wait_means_the_newest_record_before_it_and_an_event_never_recorded_is_reached():
    bench = Bench()
    a, b, _ = bench.device.streams
    event = bench.device.event()
    assert event.query()
    event.synchronize()
    b.wait_event(event)
    a.launch("put:1@1.0", 0)
    a.record_event(event)
    b.wait_event(event)
    a.launch("put:2@1.0", 1)
    a.record_event(event)
    b.launch("get@0.5", 2)
    b.synchronize()
    assert bench.seen == 1
    assert not event.query()
    polls = 0
    while not a.query():  # comes to an end
        bench.device.work(0.1)
        polls += 1
    assert polls == 5


def test_a_failing_command_is_reported_and_skips_the_rest_of_its_step_only():
    bench = Bench()
    a, b, _ = bench.device.streams
    for slot, command in ((3, "fail@1"), (4, "put:2@1")):
        event = bench.device.event()
        a.launch(command, slot)
        a.record_event(event)
        b.wait_event(event)
        b.launch("get@1", slot)
    assert bench.device.failure(3) is None  # not yet
    b.synchronize()
    assert "fail@1 failed on the device" in bench.device.failure(3)
    assert "ValueError: planted in slot 3" in bench.device.failure(3)
    assert bench.device.failure(4) is None
    assert bench.ran() == [3, 4, 4]
    a.launch("put:9", 3)
    a.synchronize()
    assert bench.device.failure(3) is None  # a new step in the slot begins clean


def test_a_closed_device_has_done_everything_and_takes_nothing_more():
    bench = Bench()
    stream = bench.device.streams[1]
    stream.launch("put:7@1", 0)
    with pytest.raises(DeviceError, match="slot 20: the device has slots 0 to 19"):
        stream.launch("put:7@1", 20)
    bench.device.close()
    bench.device.close()
    assert bench.value == 7
    with pytest.raises(DeviceError, match="closed"):
        stream.launch("put:8", 0)


# ---- costs -----------------------------------------------------------------------------------------------------------


def test_jitter_is_the_steps_own_in_both_loops():
    times = replace(NO_COPIES, jitter=0.5)
    found = []
    for batcher_class in (SyncBatcher, AsyncBatcher):
        timeline = serve(batcher_class, clock=times)[0].timeline
        found.append({(s.name, s.step): s.end - s.start for s in timeline.spans if s.name != "wait"})
    assert found[0] == pytest.approx(found[1], abs=1e-12)
    steps = [length for (name, _), length in found[0].items() if name == "step"]
    assert len(set(steps)) == len(steps)
    assert all(0.5 * 3e-3 <= length <= 1.5 * 3e-3 for length in steps)
    other = serve(SyncBatcher, clock=replace(times, seed=1))[0].timeline
    assert other.summary().wall_s != serve(SyncBatcher, clock=times)[0].timeline.summary().wall_s


@functools.cache
def recorded():
    return Recording.load("h200-llama-8b")


def test_costs_of_a_recording_are_the_recorded_ones():
    times = Recording.load("h200-llama-8b").costs(batch_size=32)
    phases = recorded().main_run()["phase_us"]
    for name in ("plan", "fill", "launch", "commit"):
        assert getattr(times, name) == pytest.approx(1e-6 * phases[name])
    for kind in ("decode", "prefill"):
        work = StepWork(kind, 32, 32 * 4096, 0)
        assert times.seconds("step", work, 0) == recorded().step_s(32, 32 * 4096, kind)
    with pytest.raises(ValueError, match="allowed are 1 to 32"):
        Recording.load("h200-llama-8b").costs(batch_size=33)
    with pytest.raises(ValueError, match="was recorded up to"):
        times.seconds("step", StepWork("decode", 32, 10**7, 0), 0)


def test_a_recording_played_on_the_virtual_clock_idles_as_it_did():
    times = Recording.load("h200-llama-8b").costs(batch_size=32)
    workload = [Request([1 + n] * 16, 40, stop_token_ids=()) for n in range(32)]
    options = dict(max_batch_size=32, prefill_tokens=256, max_length=64)
    sync, asyn = (serve(kind, workload, clock=times, **options)[0] for kind in (SyncBatcher, AsyncBatcher))
    host_s = times.plan + times.fill + times.launch + times.commit
    device_s = times.seconds("step", StepWork("decode", 32, 32 * 36, 0), 0)
    assert sync.timeline.summary().idle == pytest.approx(idle_share(host_s, device_s), rel=0.02)
    assert asyn.timeline.summary().idle == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(plan=-1.0), "plan is -1.0, allowed are seconds from 0"),
        (dict(step="fast"), "step is 'fast'"),
        (dict(copy_in=math.nan), "copy_in is nan"),
        (dict(commit=True), "commit is True"),
        (dict(jitter=1.5), "jitter is 1.5, allowed is a share from 0 to 1"),
    ],
)
def test_costs_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Costs(**options)


def test_a_cost_function_or_clock_that_makes_no_sense_is_refused_with_what_it_gave():
    with pytest.raises(ValueError, match=r"step gave -1 for StepWork\(kind='prefill', rows=3"):
        serve(AsyncBatcher, clock=Costs(step=lambda work: -1))
    with pytest.raises(ValueError, match="clock is 'virtual': allowed are None and Costs"):
        AsyncBatcher(tiny_model(), clock="virtual")

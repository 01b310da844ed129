"""What measuring puts off: between two steps of the synchronous loop no event is read, and all the same every timeline
is complete and right whenever somebody reads it. On a stand-in for CUDA, which knows what really ran."""

from __future__ import annotations

import contextlib
import gc
import math
import threading
import weakref
from collections import Counter

import pytest
from support.cuda_stand_in import PARTS as MOMENTS
from support.cuda_stand_in import between_steps, stand_in, true_spans
from support.interrupts import lines_of, run_until
from support.tiny import tiny_model

from asyncbatch import AsyncBatcher, Request, SyncBatcher, timeline
from asyncbatch.devices.cuda import device as cuda_device
from asyncbatch.measure import record_points
from asyncbatch.measure.points import DEVICE_LANE, PARTS

LOOPS = pytest.mark.parametrize(
    ("loop", "slots"), [(SyncBatcher, 1), (SyncBatcher, 2), (AsyncBatcher, 2), (AsyncBatcher, 3)]
)
OPTIONS = dict(max_batch_size=3, block_size=4, prefill_tokens=6, max_length=40)
REQUESTS = [Request([1, 2, 3], 9, stop_token_ids=()), Request([4] * 14, 12, stop_token_ids=()), Request([7], 7)]
DEVICE = ("H2D", "compute", "D2H")


@contextlib.contextmanager
def opened(loop, slots, computes=False, **options):
    """(stand-in, batcher)."""
    with stand_in(computes=computes) as gpu, loop(tiny_model(), num_slots=slots, **{**OPTIONS, **options}) as batcher:
        yield gpu, batcher


def of_device(timeline) -> list[tuple[str, int, float, float]]:
    return sorted((lane, step, start, end) for lane, _, step, start, end in timeline.spans if lane in DEVICE)


def as_it_was(timeline, ran, first=0) -> bool:
    """Whether the spans on the device are what ran, for the right steps; `first`: number of the first step."""
    found, expected = of_device(timeline), sorted(true_spans(ran))
    assert [(lane, step) for lane, step, *_ in found] == [(lane, step + first) for lane, step, *_ in expected]
    for (_, _, *times), (_, _, *right) in zip(found, expected, strict=True):
        assert times == pytest.approx(right, abs=1e-7)
    return True


# ---- what is put off -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slots", "points"), [(1, False), (2, False), (2, True)])
def test_between_two_synchronous_steps_no_event_is_read(slots, points):
    with opened(SyncBatcher, slots, parts=points) as (gpu, batcher):
        with record_points(batcher) if points else contextlib.nullcontext():
            batcher.run(REQUESTS)
        did = [Counter(each) for each in between_steps(gpu.journal)]
        assert len(did) == batcher.timeline.summary().steps  # (the first wait is that of opening the device)
        # Three events are recorded before a step's launch, and that is all. What the streams wait for are those that
        # tell the ends, so that measuring records three more in a step, and not six.
        assert set(map(str, did)) == {str(Counter(timed=3))}
        assert Counter(gpu.journal)["read"] == (8 if points else 6) * len(batcher.timeline.steps)


def test_without_a_timeline_no_event_has_a_time_until_points_are_recorded():
    with opened(SyncBatcher, 1, timeline=False) as (gpu, batcher):
        del gpu.journal[:]
        batcher.run(REQUESTS)
        assert set(gpu.journal) == {"waited", "launched", "marked"}
        batcher.submit(REQUESTS[0])
        batcher.turn()
        del gpu.truth[:]
        with record_points(batcher):
            batcher.run(REQUESTS)
            assert as_it_was(batcher.timeline, gpu.truth[len(gpu.truth) - 3 * len(batcher.timeline.steps) :])
        del gpu.journal[:]
        batcher.run(REQUESTS)
        assert set(gpu.journal) == {"waited", "launched", "marked"}


def test_points_that_begin_while_untimed_steps_are_under_way_say_nothing_of_those():
    with opened(AsyncBatcher, 2, timeline=False) as (gpu, batcher):
        handles = [batcher.submit(request) for request in REQUESTS]
        batcher.turn()
        under_way = len(gpu.truth) // 3
        assert len(batcher.in_flight) == under_way == 1
        with record_points(batcher):
            while not all(handle.has_ended() for handle in handles):
                batcher.turn()
            while batcher.turn():
                pass
        timed = [step for lane, step, *_ in of_device(batcher.timeline) if lane == "compute"]
    # (The timeline of before is no longer that of steps to come: it keeps none.)
    assert timed == []


# ---- nothing is lost, and nothing goes to another step ---------------------------------------------------------------


@LOOPS
@pytest.mark.parametrize("parts", [False, True])
def test_every_command_is_told_as_it_ran(loop, slots, parts, monkeypatch):
    monkeypatch.setattr(cuda_device, "ORIGIN_S", 0.004)  # the origin moves with every other step
    with opened(loop, slots, parts=parts) as (gpu, batcher):
        for _ in range(2):
            del gpu.truth[:]
            with record_points(batcher):
                batcher.run(REQUESTS)
            assert as_it_was(batcher.timeline, gpu.truth)
            if not parts:
                continue
            found = {(s.name, s.step): s.end - s.start for s in batcher.timeline.spans if s.lane == DEVICE_LANE}
            for lane, step, start, end in true_spans(gpu.truth):
                if lane == "compute":
                    shares = (MOMENTS[0], MOMENTS[1] - MOMENTS[0], 1 - MOMENTS[1])
                    expected = [share * (end - start) for share in shares]
                    assert [found[part, step] for part in PARTS] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("records_follow", [True, False])
def test_a_command_ends_where_it_ended_whatever_its_stream_is_told_next(records_follow):
    with stand_in(records_follow=records_follow) as gpu, AsyncBatcher(tiny_model(), **OPTIONS) as batcher:
        device, shape = batcher.device, batcher.device.shape
        later, event = device.event(), device.event()
        for slot, told in enumerate(["wait", "record"]):
            del gpu.truth[:]
            h2d, compute, d2h = device.streams
            h2d.launch("copy_in", slot)
            h2d.launch("copy_in", slot)  # the first one's end is nobody's any more
            if told == "record":
                h2d.record_event(event)
            compute.launch(shape.kinds[0], slot)
            compute.record_event(later)
            h2d.wait_event(later)  # what comes next on this stream, comes later
            h2d.record_event(event)
            d2h.launch("copy_out", slot)
            if records_follow:
                d2h.record_event(device.event())
            for stream in device.streams:
                stream.synchronize()
            assert event.query()
            found = [moment for span in device.spans(slot)() for moment in span]
            assert found == pytest.approx([moment for ran in gpu.truth[1:] for moment in ran[2:]], abs=1e-7)


@LOOPS
def test_whoever_reads_between_two_turns_sees_all_that_was_committed(loop, slots):
    with opened(loop, slots) as (gpu, batcher):
        timeline = batcher.timeline
        handles = [batcher.submit(request) for request in REQUESTS]
        committed = 0
        while not all(handle.has_ended() for handle in handles):
            batcher.turn()
            committed += gpu.journal[-1:] != ["launched"]
            steps = timeline.totals.steps
            assert steps == len(timeline.steps) == len({span.step for span in timeline.spans if span.name == "commit"})
            assert as_it_was(timeline, [one for one in gpu.truth[: 3 * steps]])
            assert timeline.summary().tokens == sum(len(handle.token_ids) for handle in handles)
        assert steps > 10


@LOOPS
def test_the_last_steps_are_complete_after_a_run_a_drain_and_close_also_of_older_timelines(loop, slots):
    with opened(loop, slots) as (gpu, batcher):
        batcher.run(REQUESTS)
        first, of_first = batcher.timeline, list(gpu.truth)
        batcher.run(REQUESTS[:1])  # and nobody has read the first one
        second = batcher.timeline
        of_second = gpu.truth[len(of_first) :]
        batcher.submit(REQUESTS[0]).result()
        while batcher.turn():
            pass
    steps = second.totals.steps
    assert as_it_was(first, of_first)
    assert as_it_was(second, gpu.truth[len(of_first) :])
    assert len(gpu.truth) == len(of_first) + 3 * steps > len(of_first) + len(of_second)


@LOOPS
def test_an_abandoned_stream_a_cancelled_request_and_close_lose_no_step_that_was_committed(loop, slots):
    with opened(loop, slots) as (gpu, batcher):
        stream = batcher.stream(REQUESTS[1])
        next(stream)
        handle = batcher.submit(REQUESTS[0])
        batcher.turn()
        batcher.cancel(handle)
        stream.close()
        batcher.turn()
        batcher.submit(REQUESTS[0])
        for _ in range(3):
            batcher.turn()
        timeline = batcher.timeline
    steps = [step.step for step in timeline.steps]
    assert steps == list(range(len(steps)))
    assert as_it_was(timeline, gpu.truth[: 3 * len(steps)])
    assert len(gpu.truth) // 3 - len(steps) <= slots - (loop is SyncBatcher), "those in flight when it was closed"


@LOOPS
def test_a_bounded_timeline_keeps_its_newest_steps_and_notes_do_not_pile_up(loop, slots):
    with opened(loop, slots, timeline=4) as (gpu, batcher):
        most = []
        gpu.between = lambda: most.append(len(batcher.timeline.notes) + len(batcher.timeline._spans))
        for _ in range(30):
            batcher.run(REQUESTS[:2])
            batcher.submit(REQUESTS[0]).result()
        whole = batcher.timeline.totals.steps
        kept = batcher.timeline.steps
        assert len(kept) == 4 < whole == kept[-1].step + 1
        spans = of_device(batcher.timeline)
    assert max(most) < 8 * (4 + 2 * slots) + 8
    ran = sorted(true_spans(gpu.truth[-3 * whole :]))
    assert len([span for span in spans if span[1] >= kept[0].step]) == 12
    right = {(lane, step): (start, end) for lane, step, start, end in ran}
    for lane, step, start, end in spans:
        assert (start, end) == pytest.approx(right[lane, step], abs=1e-7)


def test_notes_that_nobody_settles_are_settled_by_their_number(monkeypatch):
    monkeypatch.setattr(timeline, "MOST_NOTES", 50)
    made = timeline.Timeline("never read", most_steps=3)
    for step in range(100):
        made.add("host", "plan", step, step, step + 0.5)
        made.add_step(step, "decode", 1, 0, device=[(step, step + 1)] * 3)
        assert len(made.notes) + len(made._spans) + len(made._steps) < 70
    assert made.totals.tokens == 100


@pytest.mark.parametrize("what", ["a step that fails", "an exception in the loop"])
@LOOPS
def test_around_what_goes_wrong_the_other_steps_are_told_as_they_ran(loop, slots, what, monkeypatch):
    with opened(loop, slots) as (gpu, batcher):
        batcher.submit(REQUESTS[0])
        for _ in range(4):
            batcher.turn()
        if what == "a step that fails":
            launch = batcher.launch

            def failing(slot):
                slot.command = "nonsense"
                monkeypatch.delattr(batcher, "launch")
                launch(slot)

            monkeypatch.setattr(batcher, "launch", failing, raising=False)
            run = batcher.device.program.run
            monkeypatch.setattr(batcher.device.program, "run", lambda c, s: 1 / 0 if c == "nonsense" else run(c, s))
            while batcher.turn():
                pass
        else:
            monkeypatch.setattr(batcher.scheduler, "plan", lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                batcher.turn()
        batcher.submit(REQUESTS[0]).result()
        while batcher.turn():
            pass
        spans, steps = of_device(batcher.timeline), [step.step for step in batcher.timeline.steps]
    by_step = Counter(step for _, step, *_ in spans)
    assert set(by_step.values()) == {3}
    right = {(lane, start, end) for lane, _, start, end in true_spans(gpu.truth)}
    for lane, _, start, end in spans:
        assert any(lane == other and (start, end) == pytest.approx(times, abs=1e-7) for other, *times in right), (
            "a span that nothing took"
        )
    order = [step for lane, step, *_ in spans if lane == "compute"]
    starts = [start for lane, _, start, _ in spans if lane == "compute"]
    assert starts == sorted(starts)
    assert order == sorted(set(order))
    assert len(order) >= len(steps) - 1 >= 9, "all but the one that failed"


def test_when_cuda_is_lost_what_was_read_stays_and_what_was_not_is_left_out():
    with opened(SyncBatcher, 1) as (gpu, batcher):
        handle = batcher.submit(REQUESTS[0])
        for _ in range(4):
            batcher.turn()
        gpu.lost = True
        completion = handle.result()
        assert completion.finish_reason == "error"
        assert "CUDA failed" in str(completion.error)
        timeline = batcher.timeline
        assert [step.step for step in timeline.steps] == [0, 1, 2, 3]
        assert [step for lane, step, *_ in of_device(timeline) if lane == "compute"] == [0, 1, 2]
        assert timeline.summary().steps == 4
        gpu.lost = False


@pytest.mark.parametrize(
    ("loop", "slots", "parts"), [(SyncBatcher, 1, False), (SyncBatcher, 2, True), (AsyncBatcher, 2, True)]
)
def test_after_ctrl_c_at_every_line_of_reading_each_span_is_one_that_ran(loop, slots, parts, monkeypatch):
    monkeypatch.setattr(cuda_device, "ORIGIN_S", 0.004)
    files, ran = {cuda_device.__file__, timeline.__file__}, set()
    floor, ceil = (lambda s: math.floor(1e6 * s)), (lambda s: math.ceil(1e6 * s))  # (each is within 3 nanoseconds)
    with opened(loop, slots, parts=parts) as (gpu, batcher):

        def serve():
            batcher.run(REQUESTS[2:])
            batcher.timeline.totals  # noqa: B018 (it reads what was put off)

        serve()
        lines = lines_of(serve, files, 2)
        assert len(lines) > 60
        for line in lines:
            assert run_until(line, serve), line
            while batcher.turn():
                pass
            ran |= {(lane, near(end)) for lane, _, _, end in true_spans(gpu.truth) for near in (floor, ceil)}
            spans = of_device(batcher.timeline)
            assert {(lane, round(1e6 * end)) for lane, _, _, end in spans} <= ran, line
            assert len({(lane, step) for lane, step, *_ in spans}) == len(spans), line
            del gpu.truth[:]
            batcher.run(REQUESTS[2:])
            assert as_it_was(batcher.timeline, gpu.truth), line


def test_other_threads_may_read_while_the_loop_runs():
    with opened(SyncBatcher, 1) as (gpu, batcher):
        over, wrong = threading.Event(), []

        def read():
            try:
                while not over.is_set():
                    batcher.timeline.summary()
                    found = of_device(batcher.timeline)
                    assert len({(lane, step) for lane, step, *_ in found}) == len(found)
            except BaseException as error:
                wrong.append(error)

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        try:
            for _ in range(10):
                del gpu.truth[:]
                batcher.run(REQUESTS)
                assert as_it_was(batcher.timeline, gpu.truth)
        finally:
            over.set()
            for reader in readers:
                reader.join()
        assert wrong == []


def test_a_timeline_that_stays_keeps_no_device_and_a_device_that_is_dropped_goes_at_once():
    gc.collect()
    gc.disable()
    try:
        with stand_in():
            batcher = SyncBatcher(tiny_model(), **OPTIONS)
            batcher.run(REQUESTS)
            kept, device = batcher.timeline, weakref.ref(batcher.device)
            del batcher
            assert device() is None
        assert kept.summary().steps == len(of_device(kept)) // 3 > 10
    finally:
        gc.enable()


@pytest.mark.parametrize(("loop", "slots"), [(SyncBatcher, 1), (AsyncBatcher, 2)])
def test_tokens_do_not_depend_on_what_is_measured(loop, slots):
    served = []
    for options in ({"timeline": False}, {}, {"parts": True}, {"timeline": 2}):
        with opened(loop, slots, computes=True, **options) as (_, batcher):
            served.append([completion.token_ids for completion in batcher.run(REQUESTS)])
    assert served.count(served[0]) == 4
    assert all(served[0])

"""What `record_points` notes, against times set by hand: nothing more, nothing less, for the right step."""

from __future__ import annotations

import contextlib
import gc
from types import SimpleNamespace

import pytest

from asyncbatch import AsyncBatcher, Request, SyncBatcher, Timeline
from asyncbatch.devices.virtual import Costs
from asyncbatch.measure import attribute, record_points
from asyncbatch.measure.points import (
    ADDED,
    CALLBACKS,
    DEVICE_LANE,
    GC,
    LANE,
    NO_REQUEST,
    PARTS,
    seconds_by_step,
)
from asyncbatch.models.toy import toy_llama
from asyncbatch.ordering.toy import use_toy_model

MODEL = toy_llama()
LOOPS = pytest.mark.parametrize("loop", [SyncBatcher, AsyncBatcher])
REQUESTS = [Request([1, 2, 3], 6, stop_token_ids=())] * 3


def callbacks_of(batcher):
    """What the garbage collector tells the recorder of this batcher."""
    return [one for one in gc.callbacks if getattr(getattr(one, "__self__", None), "batcher", None) is batcher]


class Engine:
    """Anything with a timeline and a clock: its time is what the test says."""

    def __init__(self):
        self.time, self.timeline = 0.0, Timeline()
        self.device = SimpleNamespace(now=lambda: self.time)

    def step(self, number, start, end, *, before=()):
        """A step of the device from start to end; `before` is (start, end) of its plan."""
        self.timeline.add("compute", "step", number, start, end)
        self.timeline.add_step(number, "decode", 1, 0)
        if before:
            self.timeline.add("host", "plan", number, *before)

    def collect(self, start, end):
        """A garbage collection of these times."""
        for callback in callbacks_of(self):
            self.time = start
            callback("start", {})
            self.time = end
            callback("stop", {})


def points(timeline, lane=LANE):
    return [(name, step, start, end) for where, name, step, start, end in timeline.spans if where == lane]


def test_a_collection_is_noted_as_long_as_it_was_and_for_the_step_in_which_it_struck():
    engine = Engine()
    with record_points(engine):
        engine.step(0, 0.0, 2.0)
        engine.step(1, 5.0, 6.0, before=(2.0, 5.0))
        engine.collect(2.5, 3.75)
        engine.step(2, 8.0, 9.0, before=(7.0, 8.0))
        engine.collect(6.25, 6.5)  # between two host spans
        engine.collect(8.75, 9.5)  # the run ends in it
        engine.collect(9.25, 10.0)  # it is over
    collections = [point for point in points(engine.timeline) if point[0] == GC]
    assert collections == [(GC, 1, 2.5, 3.75), (GC, 1, 6.25, 6.5), (GC, 2, 8.75, 9.5)]
    idle = attribute(engine.timeline)
    assert idle.by[GC] == 1.25 + 0.25
    assert [gap.cause for gap in idle.gaps] == [GC, "schedule"], "1.25 of 3 seconds is more than a third; 0.25 of 2 not"


def test_a_collection_counts_for_the_run_in_which_it_struck():
    engine = Engine()
    with record_points(engine):
        engine.step(0, 0.0, 2.0, before=(0.0, 2.0))
        engine.collect(0.5, 1.0)
        earlier, engine.timeline = engine.timeline, Timeline()
        engine.step(0, 10.0, 12.0, before=(10.0, 12.0))
        engine.collect(11.0, 11.5)
    assert points(earlier) == [(GC, 0, 0.5, 1.0)]
    assert points(engine.timeline) == [(GC, 0, 11.0, 11.5)]


def test_a_collection_that_was_under_way_when_recording_began_is_left_out():
    engine = Engine()
    with record_points(engine):
        engine.step(0, 0.0, 2.0, before=(0.0, 2.0))
        (callback,) = callbacks_of(engine)
        callback("stop", {})
    assert points(engine.timeline) == []


def test_a_collection_before_anything_ran_is_of_no_run():
    engine = Engine()
    with record_points(engine):
        engine.collect(0.25, 0.5)
    assert points(engine.timeline) == []


def test_callbacks_are_the_time_between_two_turns_and_belong_to_the_step_before():
    """A turn begins with a plan. Time in which there was nothing to serve is told apart from the caller's."""
    engine = Engine()
    engine.time = 2.0
    with record_points(engine):
        for step, turn in enumerate([(0, 1), (2, 3), (3, 4), (5, 6), (9, 10)]):
            start, end = map(float, turn)
            engine.timeline.add("host", "plan", step, start, start + 0.5)
            engine.timeline.add("host", "commit", step, start + 0.75, end)
        engine.timeline.add(LANE, NO_REQUEST, 3, 7.0, 8.5)
    found = [point for point in points(engine.timeline) if point[0] == CALLBACKS]
    # The first one, from 1 to 2, was before recording began; from 3 to 3 there was no time.
    assert found == [(CALLBACKS, 2, 4.0, 5.0), (CALLBACKS, 3, 6.0, 7.0), (CALLBACKS, 3, 8.5, 9.0)]


def test_callbacks_from_the_moment_on_at_which_recording_begins_are_noted():
    engine = Engine()
    engine.time = 1.0
    with record_points(engine):
        for step in range(3):
            engine.timeline.add("host", "plan", step, 2.0 * step, 2.0 * step + 1.0)
    assert points(engine.timeline) == [(CALLBACKS, 0, 1.0, 2.0), (CALLBACKS, 1, 3.0, 4.0)]


# ---- the package's own batchers --------------------------------------------------------------------------------------


@contextlib.contextmanager
def batcher_of(loop, **options):
    with loop(MODEL, clock=Costs(), step_s=0.0, max_batch_size=4, block_size=4, max_length=64, **options) as batcher:
        use_toy_model(batcher)
        yield batcher


class SlowTokenizer:
    def __init__(self):
        self.name, self.calls, self.device = "slow", 0, None

    def decode(self, ids):
        self.calls += 1
        self.device.work(0.25)
        return "x"


def slow(batcher, owner, name, seconds, calls):
    """Let a call of the method that brings something take so long, and count those calls."""
    method = getattr(owner, name)

    def slower(*arguments, **options):
        result = method(*arguments, **options)
        if result:
            calls.append(name)
            batcher.device.work(seconds)
        return result

    setattr(owner, name, slower)


@LOOPS
def test_a_point_is_as_long_as_its_calls_were_and_without_what_lies_inside_it(loop):
    tokenizer, calls = SlowTokenizer(), []
    requests = [Request([1, 2, 3], 6, stop_token_ids=(), stop_strings=["no"])] * 3
    with batcher_of(loop, tokenizer=tokenizer) as batcher:
        tokenizer.device = batcher.device
        slow(batcher, batcher.kv, "prune", 0.5, calls)
        slow(batcher, batcher.kv, "_grow", 2.0, calls)
        slow(batcher, batcher.scheduler, "_prefill_rows", 8.0, calls)
        own = batcher.kv.prune
        with record_points(batcher):
            assert batcher.tokenizer.name == "slow", "the caller's tokenizer shows through"
            batcher.run(requests)
        assert batcher.kv.prune is own, "what somebody had put in its place before is back"
    assert ADDED not in {name for name, *_ in points(batcher.timeline)}, "nothing was asked for"
    total = {}
    for (name, _), of_step in seconds_by_step(batcher.timeline)[0].items():
        total[name] = total.get(name, 0.0) + sum(of_step.values())
    steps = len(batcher.timeline.steps)
    assert total["prune"] == pytest.approx(0.5 * calls.count("prune"))
    assert total["detokenize"] == pytest.approx(0.25 * tokenizer.calls)
    assert total["KV allocate"] == pytest.approx(2.0 * calls.count("_grow"))
    # Each plan of a prefill asks, and others may. (Those that find nothing belong to no step, and may count or not.)
    prefills = sum(step.kind == "prefill" for step in batcher.timeline.steps)
    assert 0 < 8.0 * prefills <= total["admit"] <= 8.0 * calls.count("_prefill_rows")
    assert total["admit"] % 8.0 == pytest.approx(0.0)
    assert total["commit"] == pytest.approx(Costs().commit * steps)
    (last,) = {step for name, step, *_ in points(batcher.timeline) if name == "prune"}
    assert last == steps - 1


@LOOPS
def test_the_parts_of_a_step_follow_each_other_from_its_start(loop):
    with batcher_of(loop) as batcher:
        asked = []

        def parts(slot):
            asked.append(slot)
            return [0.25, 0.0, 0.5] if len(asked) % 2 else [1.0, 2.0, 3.0]

        batcher.device.parts = parts
        with record_points(batcher):
            batcher.run(REQUESTS)
        timeline = batcher.timeline
    starts = dict(zip(*(timeline.lane("compute")[i].tolist() for i in (1, 2)), strict=True))
    carry, forward, sampling = PARTS
    expected = []
    for step in sorted(starts):
        start = starts[step]
        if step % 2:
            expected += [(carry, step, start, start + 1), (forward, step, start + 1, start + 3)]
            expected += [(sampling, step, start + 3, start + 6)]
        else:
            expected += [(carry, step, start, start + 0.25), (sampling, step, start + 0.25, start + 0.75)]
    noted = points(timeline, DEVICE_LANE)
    assert [(name, step) for name, step, *_ in noted] == [(name, step) for name, step, *_ in expected]
    for (_, _, *found), (_, _, *wanted) in zip(noted, expected, strict=True):
        assert found == pytest.approx(wanted)


@LOOPS
def test_parts_of_a_step_that_the_timeline_does_not_have_are_left_out_and_no_others(loop):
    """Ctrl-C can come between the two. Here somebody asks for the times of a slot that has not had a step."""
    with batcher_of(loop) as batcher:
        batcher.device.parts = lambda slot: [0.25, 0.25, 0.25]
        with record_points(batcher):
            batcher.device.spans(0)
            batcher.submit(REQUESTS[0]).result()
            batcher.turn()
        steps = batcher.timeline.lane("compute")[1].tolist()
    assert points(batcher.timeline, DEVICE_LANE)
    assert [step for _, step, *_ in points(batcher.timeline, DEVICE_LANE)] == [n for n in steps for _ in PARTS]


@LOOPS
def test_each_run_within_one_recording_has_its_points_and_an_earlier_one_is_left_alone(loop):
    with batcher_of(loop) as batcher:
        batcher.run(REQUESTS)
        before, spans = batcher.timeline, list(batcher.timeline.spans)
        timelines = []
        with record_points(batcher):
            for _ in range(2):
                batcher.device.work(1.0)
                batcher.run(REQUESTS)
                timelines.append(batcher.timeline)
        assert before.spans == spans
    first, second = ([(name, step) for name, step, *_ in points(timeline)] for timeline in timelines)
    assert first == second
    assert {name for name, _ in first} >= {"admit", "KV allocate", "prune", "H2D launch", "step launch", "D2H launch"}


def test_on_a_virtual_clock_no_collection_is_noted_and_on_another_it_is():
    with batcher_of(SyncBatcher) as batcher, record_points(batcher):
        assert callbacks_of(batcher) == []
    engine = Engine()
    before = list(gc.callbacks)
    with record_points(engine):
        assert len(gc.callbacks) == len(before) + 1
    assert gc.callbacks == before

"""The checker of missing waits: silent for the real batchers, whatever they serve; loud where a wait is missing; and
right for random programs, where a search through the graph of all orderings says what is a race."""

from __future__ import annotations

import gc
import tracemalloc
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import tiny_model

from asyncbatch import AsyncBatcher, Request, SamplingParams, SyncBatcher
from asyncbatch.devices.checked import CheckedDevice
from asyncbatch.ordering import races
from asyncbatch.ordering.races import RaceError, resource_name
from asyncbatch.scheduler import BatchPlan, Row, StepKind

OPTIONS = dict(max_batch_size=3, block_size=4, prefill_tokens=8, max_length=64)
KINDS = [(SyncBatcher, 1), (SyncBatcher, 2), *((AsyncBatcher, slots) for slots in (1, 2, 3, 4))]

requests = st.builds(
    Request,
    st.lists(st.integers(0, 96), min_size=1, max_size=20),
    max_new_tokens=st.integers(1, 12),
    sampling=st.sampled_from([SamplingParams(), SamplingParams(temperature=1.0, seed=3)]),
    stop_token_ids=st.sets(st.integers(0, 96), max_size=10),
)


# ---- the real batchers ----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.lists(requests, min_size=1, max_size=7),
    st.sampled_from(KINDS),
    st.integers(0, 6),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=6),
)
def test_nothing_is_reported_for_the_real_batchers(workload, kind, spare, cancels):
    """With blocks that go from one request to the next while steps are under way: a tiny pool, stops, preemption,
    cancels. What orders their uses is the compute stream alone, so this holds for any number of slots."""
    batcher_class, num_slots = kind
    num_blocks = max(-(-(len(r.token_ids) + r.max_new_tokens) // 4) for r in workload) + spare
    with batcher_class(
        tiny_model(), num_slots=num_slots, num_blocks=num_blocks, check_races=True, **OPTIONS
    ) as batcher:
        handles = [batcher.submit(request) for request in workload]
        for turns, number in cancels:
            for _ in range(turns):
                if batcher._handles:
                    batcher._turn()
            batcher.cancel(handles[number % len(handles)])
        assert all(handle.result().error is None for handle in handles)
        again = batcher.run(workload)
        assert batcher.device.races == []
        seen = {resource[0] for resource in batcher.device.checker._uses}
    assert seen == {"host inputs", "device inputs", "output ids", "host output ids", "KV block"}
    with SyncBatcher(tiny_model(), **OPTIONS) as plain:
        assert not isinstance(plain.device, CheckedDevice)
        assert [c.token_ids for c in again] == [c.token_ids for c in plain.run(workload)]


def test_it_follows_blocks_that_are_handed_on_and_slots_that_tokens_are_carried_from():
    """A step on H2D waits for its own inputs only: then the compute stream orders neither blocks nor carry-over."""

    def on_another_stream(batcher, slot):
        h2d, _, d2h = batcher.device.streams
        h2d.launch("copy_in", slot.index)
        h2d.launch(slot.command, slot.index)
        h2d.record_event(slot.step_done)
        d2h.wait_event(slot.step_done)
        d2h.launch("copy_out", slot.index)
        d2h.record_event(slot.outputs_ready)

    with AsyncBatcher(tiny_model(), check_races=True, num_blocks=16, **OPTIONS) as batcher:
        first = batcher.submit(Request([1, 2, 3], 9, stop_token_ids=()))
        batcher._turn()
        (block,) = batcher.kv.table(first._state.number)
        batcher.cancel(first)
        batcher.submit(Request([4, 5, 6], 9, stop_token_ids=()))
        batcher.launch = lambda slot: on_another_stream(batcher, slot)
        with pytest.raises(RaceError) as caught:
            batcher._turn()
        assert caught.value.resource == ("KV block", block)
        assert (caught.value.first.lane, caught.value.second.lane) == ("compute", "H2D")
        assert caught.value.mend == "H2D.wait_event(slot 0's step_done) before the step"
        assert f"KV block {block}" in str(caught.value)

        del batcher.launch
        batcher.submit(Request([1, 2, 3], 9, stop_token_ids=()))
        batcher._turn()
        batcher.launch = lambda slot: on_another_stream(batcher, slot)
        with pytest.raises(RaceError) as caught:
            batcher._turn()
        assert caught.value.second.kind == "reads"
        assert caught.value.resource[0] == "output ids"
        assert caught.value.first.step == caught.value.second.step - 1


# ---- each thing that can be missing ---------------------------------------------------------------------------------

CALLS = [
    ("H2D", "launch", "copy_in"),
    ("H2D", "record_event", "inputs_ready"),
    ("compute", "wait_event", "inputs_ready"),
    ("compute", "launch", "step"),
    ("compute", "record_event", "step_done"),
    ("D2H", "wait_event", "step_done"),
    ("D2H", "launch", "copy_out"),
    ("D2H", "record_event", "outputs_ready"),
    ("host", "synchronize", "outputs_ready"),
]
# event: what is a race without it, who waits for what with it, and with which call.
EVENTS = {
    "inputs_ready": ("device inputs", "H2D", "copy_in", "compute.wait_event({}) before the step"),
    "step_done": ("output ids", "compute", "the step", "D2H.wait_event({}) before copy_out"),
    "outputs_ready": ("host output ids", "D2H", "copy_out", "{}.synchronize() before commit"),
}


def mistakes():
    """(calls of a step with one mistake, the event that it is about, its mend), the event's name open: {}."""
    for event, (_, lane, name, wait) in EVENTS.items():
        at = next(i for i, call in enumerate(CALLS) if call[1:] == ("record_event", event))
        waits = at + 1
        record = f"{lane}.record_event({{}}) after {name}"
        yield "no wait", CALLS[:waits] + CALLS[waits + 1 :], event, wait
        yield "no record", CALLS[:at] + CALLS[at + 1 :], event, record
        yield "record too early", [CALLS[at], *CALLS[:at], *CALLS[at + 1 :]], event, record
        for other in sorted({"H2D", "compute", "D2H"} - {lane}):
            elsewhere = [*CALLS[:at], (other, "record_event", event), *CALLS[at + 1 :]]
            yield f"record on {other}", elsewhere, event, f"{record} (it was recorded on {other})"
        if event != "outputs_ready":
            yield "wait too early", [CALLS[waits], *CALLS[:waits], *CALLS[waits + 1 :]], event, wait


MISTAKES = list(mistakes())


def make_calls(batcher, slot, calls):
    streams = {stream.name: stream for stream in batcher.device.streams}
    for lane, method, what in calls:
        if method == "launch":
            streams[lane].launch(slot.command if what == "step" else what, slot.index)
        elif lane != "host":
            getattr(streams[lane], method)(getattr(slot, what))


@pytest.mark.parametrize("mistake", MISTAKES, ids=[f"{m[2]}: {m[0]}" for m in MISTAKES])
@settings(max_examples=3, deadline=None)
@given(st.integers(0, 6), st.sampled_from(KINDS))
def test_a_mistake_in_one_step_is_found_in_that_step_and_names_its_mend(mistake, broken_step, kind):
    """However quick the device was, and whatever the tokens are."""
    _, calls, event, mend = mistake
    resource, lane, _, _ = EVENTS[event]
    workload = [Request([n, n + 1, n + 2], 8, stop_token_ids=()) for n in range(5)]
    batcher_class, num_slots = kind
    with batcher_class(tiny_model(), num_slots=num_slots, check_races=True, **OPTIONS) as batcher:
        launch, wait = batcher.launch, batcher.wait

        def launch_wrongly(slot):
            if slot.step == broken_step:
                make_calls(batcher, slot, calls)
            else:
                launch(slot)

        def wait_wrongly(slot):
            if slot.step != broken_step or CALLS[-1] in calls:
                wait(slot)

        for _ in range(2):
            batcher.launch, batcher.wait = launch_wrongly, wait_wrongly
            with pytest.raises(RaceError) as caught:
                batcher.run(workload)
            race, index = caught.value, broken_step % num_slots
            assert race.resource == (resource, index)
            assert race.first.step == race.second.step == broken_step
            assert (race.first.lane, race.first.kind, race.second.kind) == (lane, "writes", "reads")
            assert race.mend.startswith(mend.format(f"slot {index}'s {event}"))
            for part in (race.mend, str(race.first), str(race.second), resource_name(race.resource)):
                assert part in str(race)
            # The batcher is empty, and serves on.
            del batcher.launch, batcher.wait
            assert [len(c.token_ids) for c in batcher.run(workload)] == [8] * 5
            assert batcher.kv.num_free == batcher.kv.num_blocks


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.permutations(range(len(CALLS) - 1)))
def test_only_orders_of_the_calls_that_say_the_same_pass(num_slots, order):
    """Of all ways to mix up the eight calls of a launch, those pass in which each stream's own calls keep their order
    and each event is recorded before it is waited for."""
    calls = [CALLS[i] for i in order]
    place = {number: at for at, number in enumerate(order)}
    right = all(place[i] < place[i + 1] for i in range(len(CALLS) - 2))
    with AsyncBatcher(tiny_model(), num_slots=num_slots, check_races=True, **OPTIONS) as batcher:
        batcher.launch = lambda slot: make_calls(batcher, slot, calls)
        try:
            batcher.run([Request([1, 2, 3], 5, stop_token_ids=()), Request([4], 5, stop_token_ids=())])
        except RaceError:
            assert not right
        else:
            assert right


# ---- random programs ------------------------------------------------------------------------------------------------


class FakeEvent:
    answer = True

    def synchronize(self):
        pass

    def query(self):
        return self.answer

    wait_event = record_event = synchronize


class FakeStream(FakeEvent):
    def __init__(self, name):
        self.name = name

    def launch(self, command, slot):
        pass

    def wait_event(self, event):
        assert isinstance(event, FakeEvent)

    record_event = wait_event


class FakeDevice:
    clock, colour = "fake", "blue"

    def __init__(self):
        self.streams = tuple(FakeStream(name) for name in ("H2D", "compute", "D2H"))
        self.phases = []

    def event(self, name, slot):
        return FakeEvent()

    def now(self):
        return 7.0

    def host_begins(self, phase, plan, kv):
        self.phases.append((phase, plan))


SLOTS, BLOCK_SIZE = 2, 2
STEP = StepKind("decode", False, 8)
slots, lanes, marks = st.integers(0, SLOTS - 1), st.integers(0, 2), st.integers(0, 2)
rows = st.tuples(
    st.lists(st.integers(1, 4), min_size=3, max_size=3, unique=True),  # its blocks
    st.integers(0, 4),  # position
    st.integers(1, 2),  # tokens
    st.none() | st.integers(0, 5),  # the step that it carries from
)
lines = st.one_of(
    st.tuples(st.just("fill"), slots, st.lists(rows, max_size=2)),
    st.tuples(st.just("commit"), slots),
    st.tuples(st.just("launch"), lanes, st.sampled_from(["copy_in", STEP, "copy_out"]), slots),
    st.tuples(st.just("launch"), lanes, st.sampled_from(["copy_in", STEP, "copy_out"]), slots),
    st.tuples(st.just("record"), lanes, marks),
    st.tuples(st.just("wait"), lanes, marks),
    st.tuples(st.just("event"), st.sampled_from(["synchronize", "query", "query in vain"]), marks),
    st.tuples(st.just("stream"), st.sampled_from(["synchronize", "query", "query in vain"]), lanes),
)


def play(lines, device, after=lambda number: None):
    events = [device.event() for _ in range(3)]
    for number, (kind, *rest) in enumerate(lines):
        if kind == "fill":
            tables = dict(enumerate(blocks for blocks, *_ in rest[1]))
            plan = BatchPlan(number * SLOTS + rest[0], [], 0)
            for owner, (_, position, count, carry) in enumerate(rest[1]):
                state = SimpleNamespace(number=owner)
                plan.rows.append(Row(state, position, count, None if carry is None else (carry, 0), True))
            device.host_begins("fill", plan, SimpleNamespace(block_size=BLOCK_SIZE, table=tables.get))
        elif kind == "commit":
            device.host_begins("commit", BatchPlan(number * SLOTS + rest[0], [], 0), None)
        elif kind == "launch":
            device.streams[rest[0]].launch(*rest[1:])
        elif kind == "record":
            device.streams[rest[0]].record_event(events[rest[1]])
        elif kind == "wait":
            device.streams[rest[0]].wait_event(events[rest[1]])
        else:
            target = events[rest[1]] if kind == "event" else device.streams[rest[1]]
            FakeEvent.answer = rest[0] == "query"
            (target.synchronize if rest[0] == "synchronize" else target.query)()
        after(number)


def races_of(lines):
    """All (first line, second line, resource), by a graph of the calls: who surely ends before whom starts."""
    before = [set() for _ in lines]  # every line that surely comes before this one
    last = {}  # lane: its last line
    recorded = {}
    filled = {}
    accesses = []
    for number, (kind, *rest) in enumerate(lines):
        lane = rest[0] if kind in ("launch", "record", "wait") else "host"
        edges = {last.get(lane), last.get("host")}
        if kind == "wait":
            edges.add(recorded.get(rest[1]))
        if kind in ("event", "stream") and rest[0] != "query in vain":
            edges.add(recorded.get(rest[1]) if kind == "event" else last.get(rest[1]))
        for edge in edges - {None}:
            before[number] |= {edge} | before[edge]
        last[lane] = number
        if kind == "record":
            recorded[rest[1]] = number
        reads, writes = set(), set()
        if kind == "fill":
            writes, filled[rest[0]] = {("host inputs", rest[0])}, rest[1]
        elif kind == "commit":
            reads = {("host output ids", rest[0])}
        elif kind == "launch" and rest[1] == "copy_in":
            reads, writes = {("host inputs", rest[2])}, {("device inputs", rest[2])}
        elif kind == "launch" and rest[1] == "copy_out":
            reads, writes = {("output ids", rest[2])}, {("host output ids", rest[2])}
        elif kind == "launch":
            reads, writes = {("device inputs", rest[2])}, {("output ids", rest[2])}
            for blocks, position, count, carry in filled.get(rest[2], ()):
                reads |= {("KV block", blocks[token // BLOCK_SIZE]) for token in range(position + count)}
                writes |= {("KV block", blocks[p // BLOCK_SIZE]) for p in range(position, position + count)}
                if carry is not None:
                    reads.add(("output ids", carry % SLOTS))
        accesses.append((reads, writes))
    return {
        (first, second, resource)
        for second, (reads, writes) in enumerate(accesses)
        for first, (earlier_reads, earlier_writes) in enumerate(accesses[:second])
        if first not in before[second]
        for resource in (writes & (earlier_reads | earlier_writes)) | (reads & earlier_writes)
    }


@settings(max_examples=500, deadline=None)
@given(st.lists(lines, min_size=5, max_size=30))
def test_the_verdict_is_that_of_a_search_through_all_orderings(lines):
    expected = races_of(lines)
    # Collecting: a race is reported for exactly the resources that have one.
    collecting, seen = CheckedDevice(FakeDevice(), 2, collect=True), {}

    def note(number):
        for race in collecting.races:
            seen.setdefault(race.resource, number)

    play(lines, collecting, note)
    first_line = {}
    for _, second, resource in expected:
        first_line[resource] = min(second, first_line.get(resource, second))
    assert seen == first_line
    # Raising: at the first line that has one.
    raising, played = CheckedDevice(FakeDevice(), 2), []
    if expected:
        with pytest.raises(RaceError) as caught:
            play(lines, raising, played.append)
        end = min(second for _, second, _ in expected)
        assert len(played) == end
        assert caught.value.resource in {resource for _, second, resource in expected if second == end}
    else:
        play(lines, raising)
    assert raising.races == []


@settings(max_examples=300, deadline=None)
@given(st.lists(lines, min_size=5, max_size=30))
def test_the_two_accesses_that_are_named_are_a_race(lines):
    device = CheckedDevice(FakeDevice(), 2, collect=True)
    play(lines, device)

    def name_of(line):
        kind, *rest = lines[line]
        return ("host", kind) if kind in ("fill", "commit") else (("H2D", "compute", "D2H")[rest[0]], rest[1])

    named = {(name_of(first), name_of(second), resource) for first, second, resource in races_of(lines)}
    for race in device.races:
        assert (race.first[:2], race.second[:2], race.resource) in named
        assert "writes" in (race.first.kind, race.second.kind)


# ---- memory, and the rest of the device -----------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [False, True])
def test_memory_does_not_grow_with_the_number_of_steps(wrong):
    device = CheckedDevice(FakeDevice(), 2, collect=True)
    h2d, compute, d2h = device.streams
    ready, done, out = device.event(), device.event(), device.event()
    kv = SimpleNamespace(block_size=2, table=lambda owner: [1, 2, 3])

    def serve(first, last):
        for step in range(first, last):
            row = Row(SimpleNamespace(number=0), step % 6, 1, (step - 1, 0), True)
            device.host_begins("fill", BatchPlan(step, [row], 1), kv)
            h2d.launch("copy_in", step % 2)
            h2d.record_event(ready)
            if not wrong:
                compute.wait_event(ready)
            compute.launch(STEP, step % 2)
            compute.record_event(done)
            d2h.wait_event(done)
            d2h.launch("copy_out", step % 2)
            d2h.record_event(out)
            out.synchronize()
            device.host_begins("commit", BatchPlan(step, [row], 1), kv)

    def traced():
        gc.collect()
        return tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, races.__file__)])

    tracemalloc.start()
    try:
        serve(0, 300)
        before = traced()
        serve(300, 2300)
        grown = sum(entry.size_diff for entry in traced().compare_to(before, "filename"))
    finally:
        tracemalloc.stop()
    assert grown < 8_000  # 4 bytes for each of the steps: less than any object
    assert bool(device.races) == wrong
    assert len(device.races) <= 8


def test_what_it_does_not_check_is_forwarded():
    inner = FakeDevice()
    device = CheckedDevice(inner, 2)
    assert (device.clock, device.colour, device.now()) == ("fake", "blue", 7.0)
    device.host_begins("plan", None, None)
    assert inner.phases == [("plan", None)]
    for thing in (device, device.streams[0], device.event()):
        with pytest.raises(AttributeError):
            thing.nonsense  # noqa: B018

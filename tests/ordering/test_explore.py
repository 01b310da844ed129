"""`explore` against a small machine of queues that is run step by step, and against the checker's verdict."""

from __future__ import annotations

import functools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbatch.ordering.explore import explore

LANES = ("host", "a", "b", "c")
EVENTS = ("x", "y")
CELLS = ("p", "q", "r")

cells = st.sets(st.sampled_from(CELLS), max_size=2)
streams = st.sampled_from(LANES[1:])
events = st.sampled_from(EVENTS)
lines = st.one_of(
    st.tuples(st.just("do"), st.sampled_from(LANES), cells, cells),
    st.tuples(st.just("do"), st.sampled_from(LANES), cells, cells),
    st.tuples(st.just("record"), streams, events),
    st.tuples(st.just("wait"), streams, events),
    st.tuples(st.just("synchronize"), events),
    st.tuples(st.just("synchronize stream"), streams),
)
programs = st.lists(lines, max_size=14).filter(lambda found: sum(line[0] == "do" for line in found) <= 7)


def effect(name, reads, writes, exact):
    """With `exact`, what is left behind shows the order of every two operations that share a cell: a write adds its
    name to the cell, and each operation notes what it has read. Otherwise operations write sums, which are often the
    same in any order."""

    def change(values):
        seen = tuple(values[cell] for cell in sorted(reads))
        for cell in sorted(writes):
            values[cell] = (*values[cell], name) if exact else (values[cell] + sum(seen) + 1) % 3
        if exact:
            values[f"seen by {name}"] = seen

    return change


def as_program(lines, exact=True):
    def program(p):
        p.cells.update({cell: () if exact else 0 for cell in CELLS})
        events = {event: p.event(event) for event in EVENTS}
        for number, (kind, *rest) in enumerate(lines):
            if kind == "do":
                lane, reads, writes = rest
                lane, name = (p.host if lane == "host" else p.stream(lane)), str(number)
                notes = [f"seen by {name}"] if exact else []
                lane.do(name, effect(name, reads, writes, exact), reads=reads, writes=[*writes, *notes])
            elif kind == "record":
                p.stream(rest[0]).record(events[rest[1]])
            elif kind == "wait":
                p.stream(rest[0]).wait(events[rest[1]])
            elif kind == "synchronize":
                p.host.synchronize(events[rest[0]])
            else:
                p.host.synchronize(p.stream(rest[0]))

    return program


def orders_of(lines):
    """All orders of the operations, by a machine that has a queue for each stream and does one thing at a time."""
    records = []  # for each line, how often each event has been recorded before it
    counts = dict.fromkeys(EVENTS, 0)
    for line in lines:
        if line[0] == "record":
            counts[line[2]] += 1
        records.append(dict(counts))
    queues = {lane: [n for n, line in enumerate(lines) if _on(line) == lane] for lane in LANES}

    @functools.cache
    def rest(host, places):
        """host: how many lines it has come to; places: how many of its lines each stream has done."""
        done = {n for lane, place in zip(LANES[1:], places, strict=True) for n in queues[lane][:place]}

        def reached(event, at):
            wanted = records[at][event]
            marks = [n for n, line in enumerate(lines) if line[0] == "record" and line[2] == event]
            return wanted == 0 or marks[wanted - 1] in done

        found = set()
        if host < len(lines):
            kind, *what = lines[host]
            free = True
            if kind == "synchronize":
                free = reached(what[0], host)
            elif kind == "synchronize stream":
                free = all(n in done for n in queues[what[0]] if n < host)
            if free:
                own = (str(host),) if kind == "do" and what[0] == "host" else ()
                found |= {own + order for order in rest(host + 1, places)}
        for index, lane in enumerate(LANES[1:]):
            if places[index] < len(queues[lane]) and queues[lane][places[index]] < host:
                line = queues[lane][places[index]]
                if lines[line][0] == "wait" and not reached(lines[line][2], line):
                    continue
                own = (str(line),) if lines[line][0] == "do" else ()
                next_places = (*places[:index], places[index] + 1, *places[index + 1 :])
                found |= {own + order for order in rest(host, next_places)}
        finished = host == len(lines) and all(p == len(queues[lane]) for p, lane in zip(places, LANES[1:], strict=True))
        return found or ({()} if finished else set())

    return rest(0, (0, 0, 0))


def _on(line):
    return line[1] if line[0] in ("do", "record", "wait") else "host"


def result_of(lines, order, exact):
    values = {cell: () if exact else 0 for cell in CELLS}
    for name in order:
        _, _, reads, writes = lines[int(name)]
        effect(name, reads, writes, exact)(values)
    return frozenset(values.items())


@settings(max_examples=300, deadline=None)
@given(programs, st.booleans())
def test_it_finds_each_outcome_of_every_order_and_counts_its_orders(lines, exact):
    found = explore(as_program(lines, exact))
    orders = orders_of(lines)
    expected = Counter(result_of(lines, order, exact) for order in orders)
    assert found.complete
    assert {frozenset(o.cells.items()): o.orders for o in found} == expected
    assert found.orders == len(orders)
    assert (len(found) > 1) == (len(expected) > 1)
    for outcome in found:
        assert outcome.order in orders
        assert result_of(lines, outcome.order, exact) == frozenset(outcome.cells.items())


@settings(max_examples=300, deadline=None)
@given(programs)
def test_without_a_race_there_is_one_outcome(lines):
    found = explore(as_program(lines, exact=False))
    assert found.races or len(found) == 1


@settings(max_examples=300, deadline=None)
@given(programs)
def test_where_cells_keep_the_order_of_their_uses_a_race_is_a_second_outcome(lines):
    found = explore(as_program(lines, exact=True))
    assert bool(found.races) == (len(found) > 1)
    for race in found.races:
        assert race.first.name in str(race)
        assert race.resource in CELLS


@settings(max_examples=150, deadline=None)
@given(programs, st.integers(1, 60), st.integers(0, 9))
def test_up_to_bound_orders_are_all_tried_and_beyond_it_random_ones_of_the_seed(lines, bound, seed):
    everything = explore(as_program(lines))
    limited = explore(as_program(lines), bound=bound)
    if everything.orders <= bound:
        assert limited.complete
    if limited.complete:
        assert str(limited) == str(everything)
    else:
        assert limited.orders == bound
        assert "random" in str(limited)
    sample = explore(as_program(lines), bound=bound, seed=seed)
    assert not sample.complete
    assert sample.orders == bound
    assert str(sample) == str(explore(as_program(lines), bound=bound, seed=seed))
    possible = {frozenset(o.cells.items()) for o in everything}
    for found in (limited, sample):
        assert {frozenset(o.cells.items()) for o in found} <= possible
        assert found.outcomes[0].orders >= found.outcomes[-1].orders


@pytest.mark.parametrize("again", ["before", "after"])
def test_a_wait_means_the_newest_record_before_it_and_no_other(again):
    """Recording an event on another stream moves it: who waits after that does not wait for the first stream."""

    def program(p):
        p.cells["x"] = 0
        first, second, third, mark = p.stream("a"), p.stream("b"), p.stream("c"), p.event()
        first.do("write", lambda c: c.update(x=1), writes="x")
        first.record(mark)
        if again == "before":
            second.record(mark)
        third.wait(mark)
        if again == "after":
            second.record(mark)
        third.do("add", lambda c: c.update(x=c["x"] * 10 + 2), reads="x", writes="x")

    found = explore(program)
    assert (len(found) > 1) == bool(found.races) == (again == "before")
    assert {outcome.cells["x"] for outcome in found} == ({1, 12} if again == "before" else {12})


def test_billions_of_orders_with_one_outcome_are_counted():
    def program(p):
        for lane in "abcd":
            for number in range(5):
                p.stream(lane).do(f"{lane}{number}", lambda cells: None)

    found = explore(program)
    assert found.complete
    assert found.orders == math.factorial(20) // math.factorial(5) ** 4


# ---- the program of a step ------------------------------------------------------------------------------------------


def one_step(missing=""):
    def program(p):
        p.cells.update(inputs=0, device=0, result=0, output=0, tokens=0)
        h2d, compute, d2h = p.stream("H2D"), p.stream("compute"), p.stream("D2H")
        ready, done, out = p.event("inputs_ready"), p.event("step_done"), p.event("outputs_ready")
        p.host.do("fill", lambda c: c.update(inputs=7), writes="inputs")
        h2d.do("copy_in", lambda c: c.update(device=c["inputs"]), reads="inputs", writes="device")
        h2d.record_event(ready)
        if missing != "ready":
            compute.wait_event(ready)
        compute.do("step", lambda c: c.update(result=c["device"] * 6), reads="device", writes="result")
        compute.record(done)
        if missing != "done":
            d2h.wait(done)
        d2h.do("copy_out", lambda c: c.update(output=c["result"]), reads="result", writes="output")
        d2h.record(out)
        if missing != "out":
            out.synchronize()
        p.host.do("commit", lambda c: c.update(tokens=c["output"]), reads="output", writes="tokens")

    return program


@pytest.mark.parametrize(
    ("missing", "mend", "tokens"),
    [
        ("", "", {42}),
        ("ready", "compute.wait_event(inputs_ready) before step", {0, 42}),
        ("done", "D2H.wait_event(step_done) before copy_out", {0, 42}),
        ("out", "outputs_ready.synchronize() before commit", {0, 42}),
    ],
)
def test_a_step_without_one_of_its_waits(missing, mend, tokens):
    found = explore(one_step(missing))
    assert {outcome.cells["tokens"] for outcome in found} == tokens
    assert [race.mend for race in found.races] == ([mend] if mend else [])
    text = str(found)
    assert f"{len(tokens)} outcome" in text
    assert "fill, copy_in, step, copy_out, commit" in text
    assert mend in text
    assert ("races: none" in text) == (not mend)


def test_the_columns_stand_in_the_order_in_which_the_program_names_its_cells():
    def program(p):
        p.cells.update(zeta=0, alpha=0)
        p.host.do("one", lambda cells: cells.update(new=1), writes="new")
        p.host.do("two", lambda cells: cells.update(alpha=cells["zeta"]), reads="zeta", writes="alpha")

    assert str(explore(program)).splitlines()[1].split() == ["orders", "zeta", "alpha", "new", "for", "example"]


def test_a_long_table_is_cut():
    def program(p):
        p.cells["x"] = ()
        for lane in "abcde":
            p.stream(lane).do(lane, effect(lane, (), ("x",), True), writes=("x", f"seen by {lane}"))

    found = explore(program)
    assert len(found) == 120
    assert len(str(found).split("race: ")[0].splitlines()) == 2 + 20 + 1
    assert "100 more" in str(found)


@pytest.mark.parametrize(
    ("effect", "options", "message"),
    [
        (lambda c: c.update(y=1), dict(writes="x"), "'it' writes 'y' but does not name it in writes"),
        (lambda c: c["y"], dict(writes="x"), "'it' reads 'y' but does not name it in reads"),
        (lambda c: c.update(x=c["x"] + 1), dict(reads="x"), "'it' writes 'x' but does not name it"),
        (lambda c: c.update(x=c["z"]), dict(reads="z", writes="x"), "'it' reads 'z', which has no value"),
        (lambda c: c.update(z=c["z"]), dict(writes="z"), "'it' reads 'z', which has no value"),
        (lambda c: c.update(x=[1]), dict(writes="x"), r"'it' puts \[1\] into 'x'"),
        (lambda c: c["x"] + 1, dict(reads="x"), "'it' returns 1: an effect sets"),
        (lambda c: c.pop("x"), dict(writes="x"), "deletes 'x'"),
    ],
)
def test_a_program_that_makes_no_sense_is_refused(effect, options, message):
    def program(p):
        p.cells.update(x=0, y=0)
        p.stream("a").do("it", effect, **options)

    with pytest.raises(ValueError, match=message):
        explore(program)


def test_bad_names_values_and_bounds_are_refused():
    def twice(p):
        p.host.do("it", lambda c: None)
        p.stream("a").do("it", lambda c: None)

    with pytest.raises(ValueError, match="two operations are called 'it'"):
        explore(twice)
    with pytest.raises(ValueError, match="a stream cannot be called 'host'"):
        explore(lambda p: p.stream("host"))
    with pytest.raises(ValueError, match=r"program.cells puts \[\] into 'x'"):
        explore(lambda p: p.cells.update(x=[]))
    for bound in (0, 2.5):
        with pytest.raises(ValueError, match=f"bound is {bound}: allowed are whole numbers from 1"):
            explore(twice, bound=bound)

"""Notebook 07: both loops on the virtual clock against the law, pairs of runs, pauses, other ways, and its pictures.
test_teach.py tests the exercises."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.collecting import collections_of_everything
from support.wrong import pays as answers

from asyncbatch.batcher import AsyncBatcher, SyncBatcher
from asyncbatch.devices import garbage
from asyncbatch.devices.virtual import Costs
from asyncbatch.lessons import pays, pays_pictures, teach
from asyncbatch.lessons.exercises.pays import Collector
from asyncbatch.lessons.loop import request, toy_batcher
from asyncbatch.measure import law
from asyncbatch.request import Request

MS = st.integers(1, 24).map(lambda number: number / 2)
ONE = [request([1, 2, 3], new=12)]


# ---- the law, against the loops themselves ---------------------------------------------------------------------------


def steady_ms(timeline, slots: int) -> float:
    """Of a run on the virtual clock: from the end of a step to the end of the next, before the drain."""
    _, _, _, ends = timeline.lane("compute")
    return float(1e3 * (ends[-slots - 1] - ends[-slots - 2]))


@settings(max_examples=5)
@given(MS, MS, st.integers(1, 4))
def test_a_step_takes_what_the_law_says(host_ms, device_ms, slots):
    timeline = pays.exact(host_ms, device_ms, [request([1, 2, 3], new=100)], slots)
    assert steady_ms(timeline, slots) == pytest.approx(law.step_time(host_ms, device_ms, slots))


@given(MS, MS, st.integers(1, 4))
def test_a_simulated_step_takes_what_the_law_says(host_ms, device_ms, slots):
    assert pays.step_ms(host_ms, device_ms, slots) == pytest.approx(law.step_time(host_ms, device_ms, slots))


def test_one_slot_is_the_synchronous_loop_and_a_third_does_not_help_a_longer_host():
    assert steady_ms(pays.exact(9, 5, ONE), 1) == pytest.approx(pays.step_ms(9, 5)) == pytest.approx(14)
    assert [law.step_time(9, 5, slots) for slots in (1, 2, 3, 4)] == [14, 9, 9, 9]
    assert [law.step_time(3, 9, slots) for slots in (1, 2, 3)] == [12, 9, 9]


@settings(max_examples=6)
@given(MS, MS, st.sampled_from((1, 2, 3, 5, 9)), st.integers(2, 3))
def test_short_answers_are_served_as_the_law_says(host_ms, device_ms, tokens, slots):
    assert pays.served_gain(host_ms, device_ms, tokens, slots) == pytest.approx(
        law.gain_with_stops(host_ms, device_ms, tokens, slots)
    )


def test_by_hand_what_stops_leave_of_the_gain():
    assert law.gain_with_stops(1, 5, 4) == pytest.approx(4 * 6 / (5 * 5))
    assert law.gain_with_stops(1, 5, 4, slots=3) == pytest.approx(4 * 6 / (6 * 5))
    for host, device in ((1, 5), (2, 3), (5, 5)):  # it pays from device / host tokens on
        assert [law.gain_with_stops(host, device, n) > 1 for n in range(1, 9)] == [
            n > device / host for n in range(1, 9)
        ]


def test_an_answer_ends_at_its_stop_token_and_nowhere_before():
    for tokens in (1, 2, 7, 32):
        with toy_batcher(SyncBatcher, max_length=128) as batcher:
            (done,) = batcher.run([pays.answer(tokens)])
        assert (len(done.token_ids), done.finish_reason) == (tokens, "stop")


@pytest.mark.parametrize("slots", [None, 2, 3])
def test_the_first_token_comes_a_step_later_for_each_slot_more(slots):
    """With next to no host work: a newcomer waits for half a step, for those in flight, and for its own."""
    arrivals, waits = pays.first_token_waits(1e-3, 6.0, slots)
    steps_before = 0 if slots is None else slots - 1
    assert waits == pytest.approx([6 - arrival + 6 * steps_before + 6 for arrival in arrivals], abs=0.01)


def test_with_a_longer_host_the_asynchronous_first_token_is_not_later():
    sync, other = (np.mean(pays.first_token_waits(6.0, 6.0, slots)[1]) for slots in (None, 2))
    assert other < sync


# ---- pairs of runs ---------------------------------------------------------------------------------------------------


def test_a_race_serves_both_loops_in_turns_with_the_learners_step():
    turns = []

    def step(self):
        turns.append(1)
        return AsyncBatcher.step(self)

    requests = [Request([n, n + 1], max_new_tokens=5) for n in (1, 2)]
    race = pays.race(pays._stand_in(), requests, step, count=3, max_batch_size=2, max_length=32, step_s=1e-3)
    assert turns
    assert race.same_tokens
    assert len(race.pairs.speedups) == len(race.pairs.device_ratios) == 3


def test_a_race_beside_a_recorded_gpu_says_what_it_is_and_knows_no_other():
    race = pays.race_beside("8B, 32 rows", count=2, new=4)
    assert race.same_tokens
    assert len(race.pairs.speedups) == 2
    with pytest.raises(ValueError, match="there is no '9B'; allowed: '8B, 32 rows', '1B, 128 rows'"):
        pays.race_beside("9B")


def in_one_line(race):
    lines = str(race).splitlines()
    assert max(map(len, lines)) <= teach.WIDTH
    return " ".join(lines)


def test_what_pairs_say_and_that_disturbed_ones_say_run_me_again():
    told = in_one_line(pays.judge([1.18, 1.19, 1.20, 1.21, 1.21, 1.22]))
    assert "1.205x as fast (between 1.180x and 1.220x, 97% sure, 6 pairs of runs)" in told
    assert "Disturbed" not in told
    void = pays.judge([1.18, 1.9, 1.2], [1.3, 1.3, 1.0])
    assert str(void).startswith("Disturbed, run me again.\nVoid: ")
    assert "as fast" not in str(void)
    left_out = in_one_line(pays.judge([1.18, 1.9, 1.2], [1.0, 1.3, 1.0]))
    assert "between 1.180x and 1.200x" in left_out
    assert "those pairs are left out" in left_out
    assert "the tokens differ" in in_one_line(pays.Race(void.pairs, same_tokens=False))


def test_how_sure_is_what_coins_say():
    assert [pays.sure(count) for count in (2, 3, 6)] == [0.5, 0.75, 1 - 2 / 64]
    with pytest.raises(ValueError, match="1 pairs have no interval"):
        pays.sure(1)


# ---- pauses ----------------------------------------------------------------------------------------------------------


def test_the_pause_of_the_recorded_run():
    periods = pays.recorded_periods()
    assert (len(periods), int(periods.argmax())) == (511, 69)
    assert pays.three_numbers(periods) == "median 5.02 ms, p99 5.40 ms, longest 326.8 ms"


def paused_wall_ms(pause_ms, host_ms, device_ms, slots):
    """How long the batcher itself takes on the virtual clock, if its 21st commit pauses."""
    part, pauses = 1e-3 * host_ms / 4, iter([0] * 20 + [pause_ms] + [0] * 100)
    commit = lambda work: part + 1e-3 * next(pauses)  # noqa: E731
    clock = Costs(part, part, part, commit, copy_in=0.0, step=1e-3 * device_ms, copy_out=0.0)
    with toy_batcher(AsyncBatcher, clock=clock, num_slots=slots) as batcher:
        batcher.run([request([1, 2, 3], new=60)])
    return 1e3 * batcher.timeline.summary().wall_s


@settings(max_examples=8)
@given(MS, MS, st.integers(1, 5), st.integers(0, 40))
def test_a_pause_costs_what_the_steps_in_flight_do_not_hide(host_ms, device_ms, slots, pause_ms):
    """Where the device is longer, the host has device - host to spare in each step, and a whole step for each further
    one in flight. Served by the batcher itself, whose commit pauses."""
    if host_ms < device_ms:
        spare = max((slots - 1) * device_ms - host_ms, 0) if slots > 1 else 0
        want = max(pause_ms - spare, 0)
        assert pays.pause_costs(pause_ms, host_ms, device_ms, slots) == pytest.approx(want, abs=1e-9)
    walls = [paused_wall_ms(pause, host_ms, device_ms, slots) for pause in (pause_ms, 0)]
    assert walls[0] - walls[1] == pytest.approx(pays.pause_costs(pause_ms, host_ms, device_ms, slots), abs=1e-6)


def test_a_server_serves_notes_collections_and_lets_everything_go():
    before = gc.callbacks[:]
    served = pays.Server(2000, steps=40, device_ms=0.5)()
    assert len(served.periods_ms) == 39
    assert served.collections  # which ones there were is Python's affair
    assert gc.callbacks == before
    assert gc.isenabled()
    assert "collections, the longest" in str(served)


def test_quietly_leaves_old_objects_out_and_collects_new_ones_with_pythons_own_collector():
    class Circle:
        pass

    def make() -> None:
        circle = Circle()
        circle.self = circle

    old, seen = Circle(), {}
    old.self = old
    gone = weakref.ref(old)
    del old

    def serve():
        seen["garbage"] = gone()
        seen["frozen"] = gc.get_freeze_count()
        make()
        seen["collected"] = gc.collect()
        return "tokens"

    with collections_of_everything():
        assert garbage.quietly(serve) == "tokens"
        assert seen["garbage"] is None
        assert seen["frozen"] > 1000
        assert 1 <= seen["collected"] < 100
        assert gc.get_freeze_count() == 0
        with pytest.raises(ZeroDivisionError):
            garbage.quietly(lambda: 1 / 0)
        assert gc.get_freeze_count() == 0


def test_quietly_with_a_with_statement_or_a_freeze_twice_is_right_too(capsys):
    import contextlib

    @contextlib.contextmanager
    def frozen(gc):
        gc.collect()
        gc.freeze()
        yield
        gc.unfreeze()

    def with_statement(serve, gc):
        with contextlib.ExitStack() as stack:
            gc.collect()
            gc.freeze()
            stack.callback(gc.unfreeze)
            return serve()

    def collects_afterwards(serve, gc):
        gc.collect()
        gc.freeze()
        try:
            result = serve()
        finally:
            gc.unfreeze()
            gc.collect()
        return result

    for right in (with_statement, collects_afterwards):
        assert teach.check("quietly", right) is right
    capsys.readouterr()
    teach.check("quietly", lambda serve, gc: [serve(), serve()])
    assert "you called it 2 times" in capsys.readouterr().out.replace("\n", " ")


def test_messages_name_the_fault(capsys):
    for name, wrong, words in (
        ("step_time", answers.device_decides, "there is one host"),
        ("step_time", answers.third_slot_helps, "not another host"),
        ("step_time", answers.always_overlapped, "With one slot nothing overlaps"),
        ("gain_with_stops", answers.no_late_stop, "The fifth step is missing"),
        ("gain_with_stops", answers.device_longer_only, "as the host is longer"),
        ("gain_with_stops", answers.turned_over, "Turned over"),
        ("quietly", answers.switched_off, "garbage that refers to itself in a circle stays"),
        ("quietly", answers.no_finally, "ended with an error"),
        ("quietly", answers.garbage_frozen, "frozen garbage stays"),
        ("quietly", answers.collected_only, "nothing is frozen"),
    ):
        teach.check(name, wrong)
        assert words in capsys.readouterr().out.replace("\n", " "), wrong.__name__


def test_the_collector_of_the_exercise_does_as_pythons():
    for name in ("collect", "freeze", "unfreeze", "enable", "disable", "isenabled"):
        assert callable(getattr(gc, name))
        assert callable(getattr(Collector(), name))


# ---- other ways, and equal tokens ------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(MS, MS, st.integers(1, 2))
def test_a_way_takes_as_long_as_the_batcher(host_ms, device_ms, slots):
    way = pays.Way(*[host_ms / 4] * 4, device=device_ms, rows=7, slots=slots)
    step = steady_ms(pays.exact(host_ms, device_ms, [request([1, 2, 3], new=40)], slots), slots)
    assert way.tokens_per_s == pytest.approx(7e3 / step)
    assert way.idle == pytest.approx(1 - device_ms / step, abs=1e-9)


def test_by_hand_several_steps_a_plan():
    way = pays.Way(steps=4)
    assert way.idle == pytest.approx(4 / 28)
    assert way.tokens_per_s == pytest.approx(4 * 32 / 28e-3)
    assert [pays.Way(steps=steps, slots=slots).wasted for steps, slots in ((1, 1), (4, 1), (1, 2), (2, 2))] == [
        0,
        3,
        1,
        3,
    ]


def test_sums_in_float32():
    assert pays.add_up([1e8, 1.0, -1e8]) == 0.0
    assert pays.add_up([1e8, -1e8, 1.0]) == 1.0
    assert pays.add_up([]) == 0.0


def test_padding_costs_what_was_recorded():
    step_of = pays.recorded_step_ms()
    assert list(step_of) == [1, 8, 32, 128]
    assert sorted(step_of.values()) == list(step_of.values())
    assert pays.padding_costs(1, 32) == pytest.approx(5.041 / 4.557)
    assert pays.padding_costs(8, 8) == 1.0
    with pytest.raises(ValueError, match="no step of 4 rows was recorded; allowed: 1, 8, 32, 128"):
        pays.padding_costs(4, 8)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_the_sliders_of_the_regimes_move_the_picture():
    pytest.importorskip("ipywidgets")
    regime = pays_pictures.Regime(host_ms=9.0, device_ms=5.0)
    words = {text.get_text() for text in regime.axes.texts}
    assert "asynchronous, slots: 2. A step takes 9 ms; of these the device idles for 4 ms" in words
    host, device, slots, image = regime.widget.children
    before = image.value
    slots.children[0].value = 3
    assert "asynchronous, slots: 3. A step takes 9 ms; of these the device idles for 4 ms" in {
        text.get_text() for text in regime.axes.texts
    }
    host.children[0].value, device.children[1].value = 3.0, 9.0
    assert "asynchronous, slots: 3. A step takes 9 ms; of these the device idles for 0 ms" in {
        text.get_text() for text in regime.axes.texts
    }
    assert image.value != before
    for control, extreme in ((host, "min"), (device, "max"), (slots, "max")):
        control.children[0].value = getattr(control.children[0], extreme)


def test_pictures_draw_what_they_are_given():
    runs = pays.recorded_runs()
    regimes = pays_pictures.draw_regimes(runs, law.step_time)
    assert repr(regimes) == "<Picture: 27 recorded pairs of runs in three regimes>"
    assert sum(abs(pays.gain_of(run, law.step_time) * (1 - run.saved) - 1) <= 0.06 for run in runs) == 25
    quiet, void = pays.judge([1.18, 1.2], [1.0, 1.0]), pays.judge([1.18, 1.2], [1.3, 1.3])
    races = quiet, void, pays.judge([1.2])
    words = [[text.get_text() for text in pays_pictures.draw_race(race, 1.1).axes.texts][0] for race in races]
    assert words == [" 50% sure", "disturbed, run me again", "one pair is no conclusion"]
    short = pays_pictures.draw_short(law.gain_with_stops, 1.0, 5.0)
    assert short.title.startswith("host 1 ms, device 5 ms, slots 2: 2 tokens 0.80, 4 tokens 0.96, 8 tokens 1.07")
    first = pays_pictures.draw_first_token(0.4, 6.0)
    assert first.title.endswith("synchronous 9.5 ms, asynchronous 15.0 ms on average")
    pause = pays_pictures.draw_pause(30.0, 1.0, 6.0, 2)
    assert [text.get_text() for text in pause.axes.get_yticklabels()] == ["synchronous", "slots: 2"]
    served = pays.Served([5.0] * 10, [])
    jitter = pays_pictures.draw_jitter({"a": served, "b": served})
    assert [axes.get_title(loc="left") for axes in jitter.figure.axes] == [
        f"{name}: median 5.00 ms, p99 5.00 ms, longest 5.0 ms" for name in "ab"
    ]
    ways = pays_pictures.draw_ways({"one": pays.Way(), "two": pays.Way(slots=2)})
    assert repr(ways) == "<Picture: one: idle 40 %; two: idle 0 %>"
    assert [text.get_text() for text in ways.axes.texts] == [
        "idle 40 %, 3200 tokens/s; a stop wastes nothing",
        "idle 0 %, 5333 tokens/s; a stop wastes up to 1 token",
    ]
    assert pays_pictures.draw_periods([5.0, 300.0], 60).png().startswith(b"\x89PNG")

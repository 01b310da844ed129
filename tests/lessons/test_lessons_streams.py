"""Notebook 02: its exercises judge rightly, its lab keeps the order of streams and events, its pictures are whole."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import FancyArrowPatch
from matplotlib.text import Text
from support.wrong import streams as answers
from support.wrong.streams import IN, LAUNCHES, OUT, RIGHT, STEP, WRONG, launches

from asyncbatch import AsyncBatcher, Request
from asyncbatch.devices.virtual import Costs
from asyncbatch.lessons import streams, teach
from asyncbatch.lessons.exercises import EXERCISES
from asyncbatch.lessons.exercises import streams as exercises
from asyncbatch.lessons.lab import COMMANDS, Lab, serve
from asyncbatch.lessons.lab_orders import program
from asyncbatch.lessons.lab_pictures import draw
from asyncbatch.lessons.learned import YourBatcher
from asyncbatch.models.toy import toy_llama
from asyncbatch.ordering import races
from asyncbatch.ordering.explore import explore
from asyncbatch.ordering.faults import launching
from asyncbatch.streams import launch_step, order
from asyncbatch.timeline import Timeline

# ---- exercises -------------------------------------------------------------------------------------------------------


def said(capsys, name, function):
    """What teach.check returns for an answer, and what it says."""
    returned = teach.check(name, function)
    return returned, capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("name", exercises.EXERCISES)
def test_the_reference_passes_and_is_the_packages_own(name, capsys):
    reference = EXERCISES[name].reference
    assert reference.__module__ in ("asyncbatch.streams", "asyncbatch.ordering.races")
    returned, text = said(capsys, name, lambda *args: reference(*args))
    assert "right in all" in text
    assert "with your function" in text
    assert returned is not reference


@pytest.mark.parametrize("name", exercises.EXERCISES)
def test_each_wrong_answer_is_rejected_with_its_own_message(name, capsys):
    lessons = []
    for wrong in WRONG[name]:
        returned, text = said(capsys, name, wrong)
        assert returned is EXERCISES[name].reference, text
        assert f"{name}: not yet" in text
        lessons.append(text.split("is right. ")[1])
    assert len(lessons) >= 3
    assert len(set(lessons)) == len(lessons), "two faults get the same explanation"


@pytest.mark.parametrize("name", exercises.EXERCISES)
def test_an_untouched_stub_says_so(name, capsys):
    def raises(*args):
        raise NotImplementedError

    for stub in (lambda *args: ..., raises):
        returned, text = said(capsys, name, stub)
        assert returned is EXERCISES[name].reference
        assert text.startswith(f"{name}: not attempted yet.")


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("order", answers.waits_before_it_records, "A wait means the newest mark at the time of the call"),
        ("order", answers.the_other_way_round, "here `earlier` waits for `later`"),
        ("order", answers.host_waits, "the host stands still: it waits for 10 ms"),
        ("order", answers.both_ways, "a wait too many: copy in 2 starts 30 ms later than it could"),
        ("launch_step", LAUNCHES["no waits"], "H2D.record_event(inputs_ready) after copy_in (it was never recorded)"),
        ("launch_step", LAUNCHES["no mark for the host"], "D2H.record_event(outputs_ready) after copy_out"),
        ("launch_step", LAUNCHES["all in one stream"], "copy_in runs on the stream compute"),
        ("launch_step", LAUNCHES["batches do not overlap"], "copy in 1 starts 50 ms later than it could"),
        ("launch_step", LAUNCHES["no copy out"], "never launch 'copy_out'"),
        ("launch_step", LAUNCHES["always the first slot"], "copy_in is launched twice for batch 0"),
        ("racing", answers.two_reads_too, "both only read"),
        ("racing", answers.any_operation_will_do, "the clock counts 1 of H2D's operations, so operation 2 may still"),
    ],
)
def test_the_message_names_the_mistake_in_the_learners_terms(name, wrong, words, capsys):
    assert words in said(capsys, name, wrong)[1]


def test_other_right_answers_pass(capsys):
    def waits_twice(earlier, later, event):
        order(earlier, later, event)
        later.wait_event(event)

    more_marks = launches("copy_in", IN, IN, "step", STEP, "compute.record_event step_done", "copy_out", OUT)
    as_a_loop = lambda clock, kind, earlier: tuple(races.racing(clock, kind, earlier))  # noqa: E731
    for name, right in (("order", waits_twice), ("launch_step", more_marks), ("racing", as_a_loop)):
        assert "right in all" in said(capsys, name, right)[1]


def by_wait_stream(earlier, later, event):
    later.wait_stream(earlier)


def launches_by_wait_stream(lanes, slot):
    h2d, compute, d2h = lanes
    h2d.launch("copy_in", slot.index)
    compute.wait_stream(h2d)
    compute.launch("step", slot.index)
    d2h.wait_stream(compute)
    d2h.launch("copy_out", slot.index)
    d2h.record_event(slot.outputs_ready)


def test_pytorch_s_wait_stream_is_right_too(capsys):
    """In the check, in every order, and on a device that really runs; in notebook 05 it serves a real batcher."""
    for name, right in (("order", by_wait_stream), ("launch_step", launches_by_wait_stream)):
        assert said(capsys, name, right)[0] is right
    assert len(explore(program(launches_by_wait_stream, [7, 8, 9], num_slots=2))) == 1
    for lab in (Lab("virtual"), Lab("cpu")):
        assert serve(lab, launches_by_wait_stream, [7, 8, 9]) == [42, 48, 54]
    with YourBatcher(toy_llama(), clock=Costs(), check_races=True, launch_step=launches_by_wait_stream) as batcher:
        served = batcher.run([Request([1, 2, 3], max_new_tokens=6)])
    with AsyncBatcher(toy_llama(), clock=Costs()) as batcher:
        assert served[0].token_ids == batcher.run([Request([1, 2, 3], max_new_tokens=6)])[0].token_ids


# ---- the lab ---------------------------------------------------------------------------------------------------------

times = st.floats(0.1, 50.0)


@settings(max_examples=100, deadline=None)
@given(times, times, times, st.lists(st.integers(-99, 99), min_size=1, max_size=4))
def test_whatever_the_times_are_an_ordered_launch_reads_what_was_asked_for(copy_in, step, copy_out, numbers):
    lab = Lab("virtual", len(numbers), {"copy_in": copy_in, "step": step, "copy_out": copy_out})
    assert serve(lab, launch_step, numbers) == [6 * number for number in numbers]
    spans = lab.spans()
    for slot in range(len(numbers)):
        (_, a, b), (_, c, d), (_, e, f) = (spans[command, slot] for command in COMMANDS)
        assert b <= c + 1e-12
        assert d <= e + 1e-12
        for start, end, ms in ((a, b, copy_in), (c, d, step), (e, f, copy_out)):
            assert end - start == pytest.approx(1e-3 * ms)


@settings(max_examples=100, deadline=None)
@given(st.sets(st.sampled_from([IN, STEP, OUT])), times, times, times)
def test_one_outcome_means_right_on_every_clock_and_a_missing_order_means_several(missing, copy_in, step, copy_out):
    calls = [call for call in ("copy_in", IN, "step", STEP, "copy_out", OUT) if call not in missing]
    launch, numbers = launches(*calls), [7, 8, 9]
    found = explore(program(launch, numbers, num_slots=2))
    lab = Lab("virtual", 3, {"copy_in": copy_in, "step": step, "copy_out": copy_out})
    read = serve(lab, launch, numbers)
    assert found.complete
    assert (len(found) > 1) == bool(found.races) == bool(missing)
    assert (len(found) > 1) or read == [42, 48, 54]
    assert any([o.cells[f"tokens {n}"] for n in range(3)] == [42, 48, 54] for o in found)


def test_times_on_the_virtual_clock_are_exact():
    lab = Lab()
    assert serve(lab, launch_step, [7, 8, 9]) == [42, 48, 54]
    # Fill and three launches take 5 ms a batch; the steps begin after the first copy in, and the last copy out ends it.
    assert lab.total_ms == pytest.approx(2 + 1 + 10 + 3 * 40 + 10)
    assert lab.waited_ms() == pytest.approx(143 - 15)
    lab = Lab()
    assert serve(lab, LAUNCHES["no waits"], [7, 8, 9]) == [0, 0, 0]
    lab.work(7.0)
    assert lab.calls[-1].end - lab.calls[-1].start == pytest.approx(7e-3)


def test_the_lab_on_a_second_process_overlaps_and_its_hasty_batches_are_wrong():
    ordered, hasty = Lab("cpu"), Lab("cpu")
    assert serve(ordered, launch_step, [7, 8, 9]) == [42, 48, 54]
    assert serve(hasty, LAUNCHES["no waits"], [7, 8, 9]) != [42, 48, 54]
    spans = ordered.spans()
    assert spans["copy_in", 1][1] < spans["step", 0][2]  # the next copy ran beside the step
    assert spans["copy_in", 0][2] <= spans["step", 0][1]
    compute = hasty.streams[1]
    compute.launch("step", 0)
    assert not compute.query()
    assert repr(draw({"a": ordered, "b": hasty})) == "<Picture: a; b>"  # measured: no times in the text


def test_a_lab_that_nobody_has_any_more_is_closed_when_the_next_one_opens():
    lab = Lab("cpu", 1)
    device, free = lab.device, len(lab.device.process.free_events)
    del lab
    gc.collect()
    Lab("cpu", 1)
    assert device.session not in device.process.owners, "its events are given back"
    assert len(device.process.free_events) >= free


def test_what_the_lab_does_not_know_is_refused():
    with pytest.raises(ValueError, match="a Lab is on 'virtual', 'cpu' or 'cuda', not on 'gpu'"):
        Lab("gpu")
    with pytest.raises(ValueError, match="there is no command 'copy': there are copy_in, step, copy_out"):
        Lab().streams[0].launch("copy", 0)


def test_the_launch_of_the_batchers_makes_the_calls_that_the_faults_take_away():
    calls = []
    lane = lambda name: SimpleNamespace(  # noqa: E731
        launch=lambda command, slot: calls.append((name, command, slot)),
        wait_event=lambda event: calls.append((name, "wait", event)),
        record_event=lambda event: calls.append((name, "record", event)),
    )
    lanes = tuple(map(lane, ("H2D", "compute", "D2H")))
    slot = SimpleNamespace(index=1, command="decode", inputs_ready="in", step_done="done", outputs_ready="out")
    launch_step(lanes, slot)
    package_calls, calls[:] = list(calls), []
    batcher = SimpleNamespace(kv=None)
    nothing = lambda *_: None  # noqa: E731
    batcher.device = SimpleNamespace(streams=lanes, now=lambda: 0.0, host_begins=nothing, host_ends=nothing)
    batcher.timeline = Timeline()
    slot.plan, slot.step = SimpleNamespace(step=0), 0
    launching(lambda *_: None)(batcher)
    batcher.launch(slot)
    assert package_calls == calls
    assert len(calls) == 8


# ---- pictures --------------------------------------------------------------------------------------------------------


def texts(picture):
    return [text for text in picture.figure.findobj(Text) if text.get_text() and text.get_visible()]


def all_pictures():
    labs = {}
    for name in ("no waits", "batches do not overlap", "the host waits"):
        labs[name] = Lab()
        serve(labs[name], LAUNCHES[name], [7, 8, 9])
    yield draw(labs, [42, 48, 54])
    yield streams.draw_copies(streams.RECORDED_COPIES, streams.RECORDED_ON)
    yield streams.draw_default_stream(streams.RECORDED_DEFAULT_STREAM, streams.RECORDED_ON)
    yield streams.Luck(40.0, 30.0)
    yield streams.Luck(100.0, 1.0)
    case = exercises.EXERCISES["racing"].cases[-1]
    yield streams.draw_clock(*case.args, races.racing(*case.args))
    yield exercises._draw_racing(case.args, case.args[2], [])


@pytest.mark.parametrize("picture", list(all_pictures()), ids=str)
def test_nothing_of_a_picture_is_cut(picture):
    canvas = FigureCanvasAgg(picture.figure)
    canvas.draw()
    drawn, (width, height) = picture.figure.get_tightbbox(canvas.get_renderer()), picture.figure.get_size_inches()
    assert -0.02 <= drawn.x0 < drawn.x1 <= width + 0.02
    assert -0.02 <= drawn.y0 < drawn.y1 <= height + 0.02


def test_a_picture_says_what_was_read_and_has_an_arrow_for_each_wait():
    lab = Lab()
    serve(lab, launch_step, [7, 8, 9])
    picture = draw({"mine": lab}, [42, 48, 0])
    words = [text.get_text() for text in texts(picture)]
    assert repr(picture) == "<Picture: mine: 143 ms in all>"
    assert {"42 right", "48 right", "54 WRONG", "step 0", "copy in 0"} <= set(words)
    arrows = [patch for patch in picture.axes.patches if isinstance(patch, FancyArrowPatch)]
    assert len(arrows) == 9  # three batches, three events each


def test_a_check_shows_the_learners_lab_beside_the_packages():
    draw = exercises.EXERCISES["launch_step"].picture
    wrong, right = (
        exercises.Verdict(launch, (7, 8, 9)) for launch in (LAUNCHES["batches do not overlap"], launch_step)
    )
    assert wrong != right
    assert repr(draw(((7, 8, 9),), wrong, right)).startswith(
        "<Picture: your function: 183 ms in all; the package's: 143"
    )
    mine = exercises.Verdict(RIGHT, (7, 8, 9))
    assert mine == right
    assert repr(draw(((7, 8, 9),), mine, right)) == "<Picture: your function: 143 ms in all>"


def test_the_sliders_decide_whether_reading_without_waiting_is_right():
    pytest.importorskip("ipywidgets")
    luck = streams.Luck(host_ms=40, step_ms=30)
    assert luck.read == [42, 48, 54, 60]
    host, step, image = luck.widget.children
    before = image.value
    step.children[0].value = 60.0
    assert luck.read == [42, 0, 0, 0]
    assert image.value != before
    host.children[1].value = 80.0  # the box beside the slider
    assert host.children[0].value == 80.0
    assert luck.read == [42, 48, 54, 60]
    assert repr(luck) == "<Luck: host busy for 80 ms, a step takes 60 ms: read [42, 48, 54, 60]>"


# ---- measured --------------------------------------------------------------------------------------------------------


def forgets_the_inputs(lanes, slot):
    h2d, compute, d2h = lanes
    h2d.launch("copy_in", slot.index)
    h2d.record_event(slot.inputs_ready)
    compute.launch("step", slot.index)
    order(compute, d2h, slot.step_done)
    d2h.launch("copy_out", slot.index)
    d2h.record_event(slot.outputs_ready)


def test_the_real_batcher_is_launched_by_the_learner_and_watched():
    requests = [Request([n, n + 1, n + 2], max_new_tokens=8) for n in range(1, 4)]
    right, timeline = streams.serve(streams.server(launch_step), requests)
    with AsyncBatcher(toy_llama(), clock=Costs()) as batcher:
        assert [completion.token_ids for completion in batcher.run(requests)] == right
    assert timeline.summary().tokens == 24
    assert streams.serve(streams.server(forgets_the_inputs), requests)[0] == right, "lucky"
    assert streams.watched(launch_step, requests) == "no race"
    told = streams.watched(forgets_the_inputs, requests)
    assert "compute.wait_event(slot 0's inputs_ready) before the step" in told.replace("\n", " ")
    assert max(map(len, told.splitlines())) <= 88


def test_orders_of_a_launch_with_and_without_the_hosts_wait():
    assert len(streams.orders(launch_step)) == 1
    assert len(streams.orders(launch_step, [7, 8, 9], num_slots=2)) == 1
    assert len(streams.orders(launch_step, [7, 8], num_slots=2, waits=False)) == 4, "each number is there or is not"
    lines = str(streams.orders(forgets_the_inputs)).splitlines()
    assert lines[1].split() == ["orders", "inputs", "device", "result", "output", "tokens", "for", "example"]


def test_times_of_a_command_are_milliseconds_since_the_hosts_first_call():
    lab = Lab("virtual")
    assert lab.run(launch_step, [7, 8, 9]) == [42, 48, 54]
    assert lab.times("step") == ([13.0, 53.0, 93.0], [53.0, 93.0, 133.0])  # 2 ms to fill, 1 to launch, 10 to copy
    assert Lab("virtual").times("step") == ([], [])
    with pytest.raises(ValueError, match="there is no command 'jump'"):
        lab.times("jump")


def test_who_finds_which_fault(capsys):
    counts = streams.who_finds(seeds=2)
    assert counts == {
        "a step does not wait for its inputs": (0, 2),
        "the copy out does not wait for the step": (2, 2),
        "the host does not wait for the output": (2, 2),
        "one host buffer for all slots": (2, 0),
    }
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(counts)


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.cuda
@cuda
def test_on_cuda_the_lab_and_the_measurements_say_what_was_recorded():
    lab = Lab("cuda")
    assert serve(lab, launch_step, [7, 8, 9]) == [42, 48, 54]
    hasty = Lab("cuda")
    assert serve(hasty, LAUNCHES["no waits"], [7, 8, 9]) != [42, 48, 54]
    alone = Lab("cuda")
    alone.streams[1].launch("step", 0)  # the other streams are never used
    assert alone.spans() == alone.spans()
    repr(draw({"lab": lab, "hasty": hasty, "alone": alone}))
    copies = {copy.name: copy.host_ms for copy in streams.measure_copies()}
    assert list(copies) == [copy.name for copy in streams.RECORDED_COPIES]
    assert copies["pageable, host to device"] > 10 * copies["pinned, host to device"]
    assert streams.measure_default_stream() == streams.RECORDED_DEFAULT_STREAM

"""Recordings keep what was measured, notice every change, and time a device as the recorded one was."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recordings import MODEL, example, made_timeline, recorded, row_of

from asyncbatch import AsyncBatcher, Request, SyncBatcher, Timeline
from asyncbatch.devices.timed import StepTimes
from asyncbatch.measure.recording import Recording
from asyncbatch.measure.recording_file import KEYS, MAY_BE_NULL
from asyncbatch.measure.steps import pack, steps_from, steps_of, unpack

short = st.floats(0, 1e-2)
parts = st.tuples(
    st.sampled_from(["decode", "decode", "prefill"]), short, st.floats(1e-4, 1e-2), short, st.integers(0, 9),
    st.integers(0, 2),
)  # fmt: skip
timelines = st.builds(
    made_timeline, st.sampled_from(["sync", "async"]), st.lists(parts, min_size=1, max_size=30),
    batch=st.integers(1, 40), origin=st.floats(0, 1e5), first_context=st.integers(1, 9000),
)  # fmt: skip


# ---- packing --------------------------------------------------------------------------------------------------------

integers = st.lists(st.integers(-(10**12), 10**12))
stretches = st.lists(st.tuples(st.integers(0, 99), st.integers(-3, 3), st.integers(1, 50)), max_size=8)


@given(integers)
def test_what_is_packed_is_unpacked(values):
    assert unpack(json.loads(json.dumps(pack(values)))) == values


@given(stretches)
def test_stretches_that_rise_evenly_pack_into_at_most_two_runs_each(stretches):
    values = [first + place * increment for first, increment, count in stretches for place in range(count)]
    assert unpack(pack(values)) == values
    assert len(pack(values)) <= 2 * len(stretches)


@pytest.mark.parametrize("runs", [[[1, 2]], [[1, 2, 0]], [[1.0, 2, 3]], [[1, 2, -1]], [[True, 0, 1]]])
def test_what_is_no_run_is_refused(runs):
    with pytest.raises(ValueError, match="no arithmetic run"):
        unpack(runs)


# ---- what is recorded is what was measured --------------------------------------------------------------------------


@given(timelines)
@settings(deadline=None)
def test_the_totals_are_the_timelines_but_for_the_rounding(timeline):
    expected, totals = timeline.summary().as_dict(), steps_from(timeline).totals()
    assert list(totals) == list(expected)
    for key in ("tokens", "steps", "decode_steps", "wasted_tokens"):
        assert totals[key] == expected[key]
    assert totals["wall_s"] == pytest.approx(expected["wall_s"], abs=2e-6)
    if expected["host_ms_per_step"] is None:
        assert totals["host_ms_per_step"] is None
    else:
        assert totals["host_ms_per_step"] == pytest.approx(expected["host_ms_per_step"], abs=1e-3)
    if expected["device_active"] is None:
        assert totals["device_active"] is totals["idle"] is None
    else:  # each of a decode step's two times is off by a microsecond at the most, of the 100 that it lasts at least
        assert totals["device_active"] == pytest.approx(expected["device_active"], abs=0.03)
        assert totals["idle"] == 1 - totals["device_active"]


@given(timelines)
@settings(deadline=None, max_examples=25)
def test_a_recording_is_loaded_as_it_was_saved_and_its_steps_are_those_measured(tmp_path_factory, timeline):
    path = tmp_path_factory.mktemp("recordings") / "made-up.json"
    saved = recorded((timeline, row_of(timeline)))
    saved.save(path)
    loaded = Recording.load(path)
    assert loaded.data == saved.data
    steps, expected = steps_of(loaded.runs[0]), steps_from(timeline)
    for key, a, b in zip(steps._fields, steps, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=key)
    _, _, starts, ends = timeline.lane("compute")
    np.testing.assert_allclose(steps.device_us, 1e6 * (ends - starts), atol=1.01)
    np.testing.assert_allclose(steps.gap_us[1:], 1e6 * (starts[1:] - ends[:-1]), atol=1.01)
    assert steps.context.tolist() == [step.context for step in timeline.steps]


def test_steps_that_were_not_measured_cannot_be_recorded():
    timeline = made_timeline("async", [("decode", 0, 1e-3, 1e-4, 1, 0)] * 3)
    timeline.spans = [span for span in timeline.spans if (span.lane, span.step) != ("compute", 1)]
    with pytest.raises(ValueError, match="3 steps and 2 of them on the device"):
        recorded((timeline, row_of(timeline)))
    with pytest.raises(ValueError, match="0 steps"):
        steps_from(Timeline("sync"))


def test_phases_are_medians_over_the_decode_steps():
    timeline = made_timeline("async", [("prefill", 0, 1e-3, 9e-3, 1, 0), *[("decode", 0, 1e-3, 2e-4, 1, 0)] * 3])
    (run,) = recorded((timeline, row_of(timeline))).runs
    assert run["phase_us"] == pytest.approx({"plan": 100, "commit": 100, "wait": 1000})


def test_long_runs_stay_small(tmp_path):
    random = np.random.default_rng(0)
    runs = []
    for engine, mode in itertools.product(("asyncbatch", "transformers"), ("sync", "async")):
        times = random.normal([1.2e-3, 1.1e-2, 8e-4], [1e-4, 1e-3, 1e-4], (8200, 3))
        timeline = made_timeline(mode, [("decode" if n > 7 else "prefill", *t, 32, 0) for n, t in enumerate(times)], 32)
        runs.append((timeline, row_of(timeline, 32, engine=engine)))
    recorded(*runs).save(tmp_path / "long.json")
    assert (tmp_path / "long.json").stat().st_size < 600_000


# ---- nobody edits them ----------------------------------------------------------------------------------------------


def test_every_total_is_checked_against_the_steps():
    data = example().data
    for run, key in itertools.product(range(len(data["runs"])), KEYS["totals"]):
        changed = copy.deepcopy(data)
        value = changed["runs"][run]["totals"][key]
        changed["runs"][run]["totals"][key] = value + 1 if isinstance(value, int) else value * 1.001
        with pytest.raises(ValueError, match=f"{key} is stated as"):
            Recording(changed).check()


def places(value, path=()):
    """The path of every number and text in a JSON value."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from places(inner, (*path, key))
    else:
        yield path


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_whatever_is_changed_is_found(data):
    changed = copy.deepcopy(example().data)
    *path, last = data.draw(st.sampled_from(ALL_PLACES))
    inner = functools.reduce(lambda value, key: value[key], path, changed)
    value = inner[last]
    inner[last] = value + data.draw(st.sampled_from([1, -1])) if isinstance(value, int | float) else f"{value}?"
    with pytest.raises(ValueError, match="recording"):
        Recording(changed).check()


ALL_PLACES = list(places(example().data))


@given(st.sampled_from(["device_us", "gap_us", "host_us", "before_us", "after_us"]), st.integers(1, 300))
@settings(deadline=None)
def test_a_changed_step_contradicts_the_totals_before_any_checksum(key, place):
    changed = copy.deepcopy(example().data)
    steps = changed["runs"][3]["steps"]
    if key in ("before_us", "after_us"):
        steps[key] += 1
    elif key == "host_us":  # a median: it moves if enough of them do
        steps[key] = [value + 1 for value in steps[key]]
    else:
        steps[key][place] += 1
    with pytest.raises(ValueError, match="its steps give"):
        Recording(changed).check()


@given(st.data())
@settings(deadline=None)
def test_what_is_missing_is_named(data):
    changed = copy.deepcopy(example().data)
    parts = {
        "recording": changed, "gpu": changed["gpu"], "versions": changed["versions"], "model": changed["models"][MODEL],
        "run": changed["runs"][1], "totals": changed["runs"][1]["totals"], "steps": changed["runs"][1]["steps"],
    }  # fmt: skip
    part = data.draw(st.sampled_from(list(parts)))
    key = data.draw(st.sampled_from(KEYS[part]))
    if data.draw(st.booleans()) or key in MAY_BE_NULL:
        del parts[part][key]
    else:
        parts[part][key] = None
    with pytest.raises(ValueError, match=rf"\b{key}\b.* missing"):
        Recording(changed).check()


def test_a_file_that_is_no_recording_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no recording 'nobody'; allowed"):
        Recording.load("nobody")
    for text, message in (("hello", "not JSON"), ("[]", "not a list"), ("{}", "missing"), ('{"schema": 9}', "missing")):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Recording.load(tmp_path / "other.json")
    with pytest.raises(ValueError, match="schema is 9"):
        Recording({**example().data, "schema": 9}).check()
    with pytest.raises(ValueError, match="no run"):
        Recording({**example().data, "runs": []}).check()


@pytest.mark.parametrize("name", Recording.names())
def test_every_shipped_recording_is_whole_and_honest(name):
    recording = Recording.load(name)
    assert recording.name == name
    for run in recording.runs:
        steps = steps_of(run)
        assert steps.device_us.min() > 0
        assert steps.context.min() > 0
        assert run["totals"]["tokens"] == run["requests"] * run["new_tokens"]


def test_recordings_are_shipped():
    if not Recording.names():
        pytest.xfail("no recording is shipped yet: python -m asyncbatch.profile --preset headline --record NAME")
    headline = [name for name in Recording.names() if len(Recording.load(name).runs) >= 4]
    assert headline, "one with both modes and both engines"


# ---- the timed device -----------------------------------------------------------------------------------------------


def law(batch, context):
    return 1e-3 + 1e-4 * batch + 1e-6 * context


@given(st.integers(1, 8), st.floats(0, 1))
@settings(deadline=None)
def test_a_step_takes_what_it_took_on_the_recorded_gpu(batch, share):
    """Where the recorded times follow a law, so do the emulated ones, between the recorded batch sizes too. But the
    first and last half bin of contexts take the bin's median, and below the widest run's smallest context nothing is
    known of how the time depends on it."""
    recording = example()
    first, last = 8 * 18, 8 * (17 + 41 * 8 - 1)
    context = round(first + share * (last - first))
    half_bin = 1e-6 * (last - first) / 128
    unknown = 1e-6 * 18 * (8 - max(batch, 2))
    seconds = recording.step_s(batch, context)
    assert seconds == pytest.approx(law(max(batch, 2), context), abs=2 * half_bin + unknown)
    assert recording.step_s(batch, context, kind="prefill") == pytest.approx(7e-3)


def law_run(batch, count):
    device = [law(batch, batch * (17 + number)) for number in range(count)]
    steps = [("decode" if n else "prefill", 1e-4, d if n else 7e-3, 3e-4, batch, 0) for n, d in enumerate(device)]
    timeline = made_timeline("async", steps, batch)
    return timeline, row_of(timeline, batch)


def test_a_larger_batch_than_that_of_the_widest_run_takes_its_own_time_at_its_own_contexts():
    """A sweep has short runs of large batches beside the long one of a small batch that gives the curve."""
    recording = recorded(law_run(2, 1000), law_run(8, 40))
    assert recording.main_run()["batch_size"] == 2
    half_bin = 1e-6 * 2 * 1000 / 128
    for context in (8 * 18, 400, 1000, 1900):
        assert recording.step_s(8, context) == pytest.approx(law(8, context), abs=2 * half_bin)


def test_a_recorded_batch_size_begins_with_its_own_time():
    recording = example()
    for batch in (2, 8):
        assert recording.step_s(batch, 1) == pytest.approx(law(batch, batch * 18), abs=3e-5)
    assert recording.step_s(1, 1) == recording.step_s(2, 1), "a batch smaller than recorded takes the smallest"


@given(st.integers(2, 8), st.integers(1, 2000), st.integers(0, 700))
@settings(deadline=None)
def test_more_context_and_more_rows_never_take_less(batch, context, more):
    recording = example()
    here = recording.step_s(batch, context)
    assert recording.step_s(batch, context + more) >= here - 1e-6
    assert recording.step_s(8, context) >= here - 1e-6


def test_beyond_what_was_recorded_is_refused_with_the_numbers():
    recording = example()
    most = 8 * (17 + 41 * 8 - 1)
    assert recording.step_s(8, most) > 0
    with pytest.raises(ValueError, match=rf"{most + 1} tokens .* up to {most}"):
        recording.step_s(8, most + 1)
    with pytest.raises(ValueError, match="batch size 9: .* at batch sizes 2, 8; allowed are 1 to 8"):
        recording.step_s(9, 100)
    with pytest.raises(ValueError, match="batch size 0"):
        recording.step_times(0)
    with pytest.raises(ValueError, match=f"no asynchronous run of other; recorded models: {MODEL}"):
        recording.step_times(8, "other")


@given(st.integers(0, 40))
@settings(deadline=None)
def test_the_recorded_workload_itself_can_be_emulated(lag):
    """Requests that join `lag` steps late are never all at their longest: the longest is allowed all the same, but not
    where the recorded steps did not come near it."""
    timeline = made_timeline("async", [("prefill", 0, 1e-3, 1e-4, 1, 0), *[("decode", 0, 1e-3, 1e-4, 1, 0)] * 5], 4)
    timeline.steps = [step._replace(context=4 * 100 - lag) for step in timeline.steps]
    times = recorded((timeline, row_of(timeline, prompt_tokens=60, new_tokens=41))).step_times(4)
    assert times.max_context == (400 if 1.05 * (400 - lag) >= 400 else int(1.05 * (400 - lag)))


def test_a_recording_without_a_prefill_step_or_an_own_run_times_nothing():
    timeline = made_timeline("async", [("decode", 0, 1e-3, 1e-4, 1, 0)] * 3)
    with pytest.raises(ValueError, match="no prefill step"):
        recorded((timeline, row_of(timeline))).step_times(4)
    other = recorded((timeline, row_of(timeline, engine="transformers")))
    with pytest.raises(ValueError, match="recorded models: none"):
        other.step_times(4)


def test_the_widest_run_gives_the_curve():
    run = example().main_run()
    assert (run["engine"], run["mode"], run["batch_size"]) == ("asyncbatch", "async", 8)


def test_step_times_travel():
    times = example().step_times(8)
    other = pickle.loads(pickle.dumps(times))
    assert isinstance(other, StepTimes)
    assert [other("decode", c) for c in (1, 500, 2000)] == [times("decode", c) for c in (1, 500, 2000)]
    assert other("prefill", 3) == times.prefill_s
    assert not math.isnan(other.prefill_s)


@pytest.mark.parametrize("batcher_class", [SyncBatcher, AsyncBatcher])
def test_the_timed_device_takes_each_steps_own_time_and_says_emulated(batcher_class):
    """No step is shorter than the recording says, each for its kind and context; and the tokens are the same as those
    of any other timed device."""
    recording = example()
    times = recording.step_times(4)
    model = recording.stand_in_model()
    assert model.config.vocab_size == 501
    assert model.config.max_position_embeddings == 4096
    requests = [Request(list(range(1, 60 + n)), max_new_tokens=9) for n in range(6)]
    options = dict(max_batch_size=4, max_length=80, prefill_tokens=50)
    with batcher_class(model, step_s=times, **options) as batcher:
        tokens = [completion.token_ids for completion in batcher.run(requests)]
        timeline = batcher.timeline
    assert timeline.clock == "emulated made-up, host"
    _, steps, starts, ends = timeline.lane("compute")
    known = {step.step: step for step in timeline.steps}
    least = np.array([times(known[number].kind, known[number].context) for number in steps.tolist()])
    assert (ends - starts >= least).all()
    assert len(set(least.tolist())) > 5, "steps of several contexts, decode and prefill"
    with batcher_class(model, step_s=0.0, **options) as batcher:
        assert [completion.token_ids for completion in batcher.run(requests)] == tokens
        assert "emulated" not in batcher.timeline.clock


def test_a_step_beyond_the_recording_fails_its_requests_with_the_numbers():
    times = StepTimes("small", np.array([10.0]), np.array([1e-3]), 1e-3, 10)
    model = example().stand_in_model()
    with AsyncBatcher(model, step_s=times, max_batch_size=1, max_length=64) as batcher:
        (completion,) = batcher.run([Request([1, 2, 3], max_new_tokens=20)])
    assert completion.finish_reason == "error"
    assert "small was recorded up to 10" in str(completion.error)


ROOT = Path(__file__).parents[2]
TOLD = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def test_the_headline_is_told_as_it_was_recorded():
    recording = Recording.load("h200-llama-8b")
    assert recording.data["command"].split(" --out")[0] in TOLD
    assert recording.data["date"][:10] in TOLD
    for name in ("torch", "transformers"):
        assert f"{name} {recording.data['versions'][name]}" in TOLD
    assert f"driver {recording.gpu['driver']}" in TOLD
    rows = {
        "total": lambda t: f"{t['wall_s']:.1f} s",
        "tokens per second": lambda t: f"{t['tokens_per_s']:,.0f}",
        "device idle": lambda t: f"{100 * t['idle']:.2f} %",
        "host work per step": lambda t: f"{t['host_ms_per_step']:.3f} ms",
    }
    for name, cell in rows.items():
        assert f"| {name} | " + " | ".join(cell(run["totals"]) for run in recording.runs) + " |" in TOLD


def test_the_readme_has_the_headlines_numbers():
    totals = {(run["engine"], run["mode"]): run["totals"] for run in Recording.load("h200-llama-8b").runs}
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for idle in (one["idle"] for one in totals.values()):
        assert f"{100 * idle:.2f} %" in text
    faster = totals["transformers", "sync"]["wall_s"] / totals["transformers", "async"]["wall_s"]
    assert f"which is {faster:.2f}x as fast" in text


@pytest.mark.parametrize("shape", ["0.6b", "1b", "8b"])
def test_the_sweep_is_told_as_it_was_recorded(shape):
    swept = [Recording.load(name) for name in Recording.names() if name.startswith("h200-sweep")]
    runs = [run for recording in swept for run in recording.runs if run["model"] == f"random:llama-{shape}"]
    totals = {(run["engine"], run["mode"], run["batch_size"]): run["totals"] for run in runs}
    assert len(totals) == len(runs) == 2 * 2 * 4, "two engines, two modes, four batch sizes"
    for batch in (1, 8, 32, 128):
        sync, own = (totals["asyncbatch", mode, batch] for mode in ("sync", "async"))
        cells = (
            shape.upper(), batch, f"{100 * sync['idle']:.1f} %", f"{100 * own['idle']:.1f} %",
            f"{sync['tokens_per_s']:,.0f}", f"{own['tokens_per_s']:,.0f}",
            f"{sync['wall_s'] / own['wall_s']:.3f}x", f"{totals['transformers', 'async', batch]['tokens_per_s']:,.0f}",
        )  # fmt: skip
        assert "| " + " | ".join(map(str, cells)) + " |" in TOLD

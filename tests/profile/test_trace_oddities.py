"""Traces as profilers have really written them: times that cannot be true, other names of copies, text that is no JSON,
other vendors' devices, and work launched by several threads."""

from __future__ import annotations

import json

import pytest
from support.make_trace import OTHER_THREAD, US, Trace, engine
from support.traces import ns, read, steps_ns

from asyncbatch.measure.points import NOTHING
from asyncbatch.profile.traces.events import TraceError
from asyncbatch.profile.traces.json_stream import PIECE
from asyncbatch.profile.traces.read import read_trace

YEAR, WEEK = 365 * 86_400 * 10**9, 7 * 86_400 * 10**9  # nanoseconds

# ---- times that cannot be true --------------------------------------------------------------------------------------

STRAYS = {
    "a start of 0": lambda trace: trace.kernel("stray", -trace.origin, 5 * US),
    "25 years long": lambda trace: trace.kernel("stray", 900 * US, 25 * YEAR),
    "three weeks long, on another stream": lambda trace: trace.kernel("stray", 900 * US, 3 * WEEK, stream=99),
    "a copy of an hour": lambda trace: trace.copy("Memcpy HtoD (Pinned -> Device)", 900 * US, 3600 * 10**9),
    "a day early": lambda trace: trace.kernel("stray", -86_400 * 10**9, 5 * US),
    "a day late": lambda trace: trace.kernel("stray", 86_400 * 10**9, 5 * US),
}


@pytest.mark.parametrize("name", STRAYS)
@pytest.mark.parametrize("host", [True, False])
def test_an_event_whose_time_cannot_be_true_is_left_out_and_counted(tmp_path, name, host):
    trace = engine(steps=25)
    trace.events = [event for event in trace.events if host or event.get("cat") in ("kernel", "gpu_memcpy")]
    expected = read(trace, tmp_path)
    STRAYS[name](trace)
    report = read(trace, tmp_path)
    assert steps_ns(report) == steps_ns(expected)
    for key in ("step_active", "kernel_busy", "window_s", "compute_stream", "num_kernels"):
        assert getattr(report, key) == getattr(expected, key)
    assert report.notes[0].startswith("1 events of the device were left out: by their times")
    assert report.as_dict()["idle"] == expected.as_dict()["idle"]


def test_a_start_of_0_is_left_out_soon_after_the_machine_was_started_too(tmp_path):
    trace = engine(steps=25)
    trace.origin = 90 * 10**9  # within the ten minutes that are far
    expected = read(trace, tmp_path)
    STRAYS["a start of 0"](trace)
    report = read(trace, tmp_path)
    assert (report.window_s, report.step_active) == (expected.window_s, expected.step_active)


def test_the_launch_of_an_event_that_was_left_out_has_none(tmp_path):
    trace = engine(steps=25, graphs=False)
    next(event for event in trace.events if event.get("cat") == "kernel")["ts"] = -trace.origin
    report = read(trace, tmp_path)
    assert report.coverage.missing == {"kernel launches": 1}
    assert report.step_active is None


def test_a_trace_none_of_whose_kernels_has_a_time_is_refused(tmp_path):
    trace = engine(steps=3)
    for event in trace.events:
        if event.get("cat") == "kernel":
            event["ts"] = -trace.origin
    with pytest.raises(TraceError, match=r"holds no kernel with a time within its recording: 24 events"):
        read(trace, tmp_path)


# ---- names of copies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lane"),
    [
        ("Memcpy DtoH (Device -> Pinned)", "D2H"),
        ("Memcpy HtoD (Pageable -> Device)", "H2D"),
        ("Memcpy D2M(DEVICE->HOST)", "D2H"),
        ("Memcpy M2D (HOST -> DEVICE)", "H2D"),
        ("D2M", "D2H"),
        ("M2D", "H2D"),
        ("DtoH", "D2H"),
        ("HtoD", "H2D"),
        ("CopyDeviceToHost", "D2H"),
        ("CopyHostToDevice", "H2D"),
        ("MEMORY_COPY_DEVICE_TO_HOST", "D2H"),
        ("MEMORY_COPY_HOST_TO_DEVICE", "H2D"),
        ("memcpy_d2h", "D2H"),
        ("Memcpy DtoD (Device -> Device)", None),
        ("CopyDeviceToDevice", None),
        ("Memcpy PtoP", None),
    ],
)
def test_copies_count_by_their_kind_whatever_a_back_end_calls_them(tmp_path, name, lane):
    trace = Trace()
    trace.kernel("a", 0, 10)
    trace.copy(name, 20, 5)
    report = read(trace, tmp_path)
    assert report.num_copies == 1
    assert {key: len(starts) for key, (starts, _) in report.copies_ns.items()} == {
        key: int(key == lane) for key in ("H2D", "D2H")
    }


# ---- what is no JSON, and was written all the same ------------------------------------------------------------------


@pytest.mark.parametrize("number", ["inf", "-inf", "nan", "-nan", "NaN", "Infinity", "-Infinity", "nan(ind)"])
def test_numbers_that_are_none_are_read(tmp_path, number):
    trace = engine(steps=8)
    expected = read(trace, tmp_path).as_dict()
    text = trace.text().replace("0.512", number)
    assert number in text
    assert read(text, tmp_path).as_dict() == expected
    kernel = json.dumps({"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": 4.6e12, "dur": "DUR"})
    report = read(
        text.replace('"traceEvents": [', '"traceEvents": [' + kernel.replace('"DUR"', number) + ","), tmp_path
    )
    assert report.notes[0] == "1 events without a usable time were left out."


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        (r"C:\Users\dan\vllm\engine.py(7): plan", "engine.py(7): plan"),
        ("tab\tand\x01bell\x07", "tab\tand\x01bell\x07"),
        ("\\", "\\"),
        (r"a\u12", r"a\u12"),
        (r"\\server\x", r"\server\x"),
    ],
)
def test_names_with_backslashes_and_control_characters_as_they_are_are_read(tmp_path, name, cause):
    """In many events, so that they lie across the borders between the pieces that are read."""
    trace = engine(steps=60, graphs=False, sampling=True)
    expected = read(trace, tmp_path).as_dict()
    plan = json.dumps("/opt/engine/scheduler.py(88): plan")
    text = trace.text()
    assert len(text) > PIECE
    broken = text.replace(plan, f'"{name} "')
    report = read(broken, tmp_path)
    assert report.as_dict()["steps"] == expected["steps"]
    assert sum(report.idle_by_cause().values()) == pytest.approx(sum(part["s"] for part in expected["idle"].values()))
    assert f"{cause} " in report.idle_by_cause(False)


def test_half_a_character_in_a_name_is_read(tmp_path):
    text = engine(steps=5).text().replace("scheduler.py(210): commit", r"scheduler.py(210): \udc00")
    report = read(text, tmp_path)
    assert any(cause.startswith("scheduler.py(210): ") for cause in report.idle_by_cause())
    str(report).encode()


def test_where_the_text_is_no_json_the_place_is_named(tmp_path):
    text = engine(steps=40).text()
    lines = text.split("\n")
    at = next(i for i, line in enumerate(lines) if i > 0.8 * len(lines) and '"cat": "kernel"' in line)
    lines[at] = lines[at].replace('"cat": "kernel"', '"cat" "kernel"')
    with pytest.raises(TraceError, match=rf"is not JSON \(Expecting ':' delimiter at line {at + 1}, column \d+\)"):
        read("\n".join(lines), tmp_path)


# ---- no kernels, but something --------------------------------------------------------------------------------------


def without_kernels(trace: Trace) -> Trace:
    trace.events = [event for event in trace.events if event.get("cat") not in ("kernel", "gpu_memcpy", "ac2g")]
    return trace


def test_launches_without_any_kernel_are_said_to_be_that(tmp_path):
    with pytest.raises(
        TraceError, match=r"holds 30 launches and none of the kernels that they launched: the driver gave"
    ):
        read(without_kernels(engine(steps=10)), tmp_path)


def test_events_of_another_vendors_device_are_counted(tmp_path):
    trace = without_kernels(engine(steps=10, runtime="mtia"))
    for at in range(50):
        trace.complete("mtia_ccp_events", "FC", 0, 0, at * US, US, {})
    cpu = sum(event["cat"] in ("cpu_op", "python_function", "cuda_runtime", "cuda_driver") for event in trace.events)
    with pytest.raises(TraceError) as caught:
        read(trace, tmp_path)
    assert f"there are 50 of 'mtia_ccp_events', and {cpu} events of the CPU" in str(caught.value)
    assert "needed are events of category 'kernel'" in str(caught.value)
    assert "only CPU events" not in str(caught.value)


# ---- several threads ------------------------------------------------------------------------------------------------


def test_where_the_launching_thread_recorded_nothing_another_one_that_launches_is_asked(tmp_path):
    """Training: one thread launches the backward pass, which is most of the work; the main thread loads the data and
    launches the forward pass. A third one only writes logs, and is not asked."""
    trace = Trace()
    for begin in range(0, 10_000, 1000):
        trace.host("user_annotation", f"ProfilerStep#{begin // 1000}", begin, 990)
        trace.host("user_annotation", "enumerate(DataLoader)#_next_data", begin + 5, 200)
        forward = trace.call("cudaLaunchKernel", begin + 220, 10)
        backward = trace.call("cudaLaunchKernel", begin + 260, 10, tid=OTHER_THREAD)
        trace.host("cpu_op", "aten::mm_backward", begin + 235, 60, tid=OTHER_THREAD)
        trace.kernel("forward", begin + 240, 100, forward)
        trace.kernel("backward", begin + 340, 500, backward)
        trace.host("python_function", "log.py(3): write", begin, 990, tid=5)
    report = read(trace, tmp_path)
    assert "ProfilerStep#" in report.how_steps
    gap = report.gaps[0]
    assert ns(gap.seconds) == 400
    assert {cause: ns(seconds) for cause, seconds in gap.host_s.items()} == {
        NOTHING: 400 - 200 - 10 - 5,
        "enumerate(DataLoader)#_next_data": 200,
        "cudaLaunchKernel": 10,
        "aten::mm_backward": 5,
    }
    assert gap.cause == "enumerate(DataLoader)#_next_data"


def test_a_piece_may_end_at_any_place_of_an_event(tmp_path):
    events = engine(steps=1, kernels=1).text(bare=True)
    path, found = tmp_path / "trace.json", []
    for before in range(PIECE - len(events), PIECE, 9):
        before_it = "\u00e9" * before
        path.write_text(f'{{"p": "{before_it}", "traceEvents": {events}}}', encoding="utf-8")
        found.append(read_trace(path).as_dict())
    assert len(found) > 200
    assert found == [found[0]] * len(found)

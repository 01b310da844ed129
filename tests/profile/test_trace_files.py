"""Files of traces: all ways in which they may be written, those that are no trace, and large ones."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.make_trace import COMPUTE, COPY_OUT, US, Trace, engine, write_large
from support.reports import call_script
from support.traces import from_zero, ns, read, steps_ns

from asyncbatch import Timeline
from asyncbatch.profile.traces import files
from asyncbatch.profile.traces.analysis import report_on
from asyncbatch.profile.traces.events import TraceError
from asyncbatch.profile.traces.read import read_trace

# ---- what a file may look like ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("trace.json", dict(numbers="string")),
        ("trace.json", dict(bare=True)),
        ("trace.json.gz", dict()),
        ("trace", dict(numbers="string", bare=True)),
    ],
)
def test_a_trace_may_be_written_in_several_ways(tmp_path, name, options):
    trace = engine("async", prefill_at=3, sampling=True)
    plain = read(trace, tmp_path)
    other = read(trace, tmp_path, name, **options)
    expected = plain.as_dict() | {"trace": name, "gpu": None if options.get("bare") else trace.gpu}
    assert other.as_dict() == expected
    packed = tmp_path / "packed.json"  # gzip whatever it is called, and a byte order mark
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf\n  " + trace.text().encode()))
    assert read_trace(str(packed)).as_dict() == plain.as_dict() | {"trace": "packed.json"}


def test_every_digit_of_a_time_counts_even_where_a_float_cannot_hold_it(tmp_path):
    trace = engine()
    trace.origin = 1_698_438_996_460_226_123  # nanoseconds since 1970: as microseconds a float64 rounds to 250 ns
    assert steps_ns(read(trace, tmp_path)) == from_zero(trace, trace.steps)


def test_whole_microseconds_and_other_names_of_categories_as_torch_had_them_until_2021(tmp_path):
    trace = engine(graphs=False)
    old = {"kernel": "Kernel", "gpu_memcpy": "Memcpy", "cuda_runtime": "Runtime", "cpu_op": "Operator"}
    for event in trace.events:
        event["cat"] = old.get(event["cat"], event["cat"])
        if event["ph"] == "X" and event["cat"] in ("Kernel", "Memcpy"):
            event["tid"] = f"stream {event['args'].pop('stream')}"
    report = read(trace, tmp_path, numbers="whole")
    assert steps_ns(report) == from_zero(trace, trace.steps)
    assert {stream.stream for stream in report.streams} == {COMPUTE, 20, COPY_OUT}


def test_of_two_gpus_the_one_with_most_kernel_time_is_reported(tmp_path):
    trace = engine()
    expected = read(trace, tmp_path).as_dict()
    for event in [event for event in trace.events if event.get("cat") == "kernel"][::2]:
        trace.kernel("other", event["ts"] + 3, 9 * US, stream=7, device=1)
    report = read(trace, tmp_path)
    assert report.device == 0
    assert any("2 devices" in note and "0 is reported" in note for note in report.notes)
    assert [(stream.device, stream.stream, stream.kernels) for stream in report.streams] == [
        (0, 7, 96), (0, 20, 0), (0, 24, 0), (1, 7, 48),
    ]  # fmt: skip
    same = ("kernel_busy", "step_active", "steps", "idle", "kernels", "copies", "graph_launches")
    assert {key: report.as_dict()[key] for key in same} == {key: expected[key] for key in same}
    for event in trace.events:
        if event.get("cat") == "kernel" and event["pid"] == 1:
            event["dur"] *= 10
    assert read(trace, tmp_path).device == 1


def test_streams_say_what_ran_on_each(tmp_path):
    trace = Trace()
    trace.kernel("a", 0, 10)
    trace.kernel("b", 5, 10)
    trace.memset(20, 5)
    trace.copy("Memcpy DtoD (Device -> Device)", 30, 5, stream=COMPUTE)
    trace.copy("Memcpy HtoD (Pageable -> Device)", 2, 20)
    report = read(trace, tmp_path)
    assert [(s.stream, ns(s.busy_s), s.kernels, s.copies) for s in report.streams] == [(7, 25, 2, 1), (20, 20, 0, 1)]
    assert (report.num_kernels, report.num_copies) == (2, 2)
    assert report.kernel_busy == pytest.approx((25 + 5) / 35)
    assert steps_ns(report) == [(0, 35)], "a memset and a copy within the device are part of a step"


def test_events_of_zero_length_overlap_nothing_and_break_nothing(tmp_path):
    trace = engine("async")
    before = read(trace, tmp_path)
    for start, end in trace.steps:
        trace.kernel("empty", start, 0)
        trace.kernel("empty", end, 0)
        trace.copy("Memcpy HtoD (Pinned -> Device)", start, 0)
        trace.host("cpu_op", "aten::empty", start, 0)
    after = read(trace, tmp_path)
    assert steps_ns(after) == steps_ns(before)
    assert after.kernel_busy == before.kernel_busy
    assert after.idle_by_cause() == before.idle_by_cause()
    alone = Trace()
    alone.kernel("empty", 5, 0)
    assert read(alone, tmp_path).kernel_busy == 0


def test_waits_on_the_device_and_profiler_overhead_are_no_work(tmp_path):
    trace = engine()
    before = read(trace, tmp_path).as_dict()
    end = max(end for _, end in trace.kernels)
    args = {"stream": COMPUTE, "correlation": 5, "device": 0, "cuda_sync_kind": "Stream Wait Event"}
    trace.complete("cuda_sync", "Stream Wait Event", 0, COMPUTE, 0, end, args)
    trace.complete("overhead", "Activity Buffer Request", -1, 0, 0, end, {})
    trace.complete("gpu_user_annotation", "ProfilerStep#1", 0, COMPUTE, 0, end, {"External id": 3})
    assert read(trace, tmp_path).as_dict() == before | {"events": before["events"] + 3}


BROKEN = [
    3, None, "text", [], {}, {"ph": "X"}, {"ph": "X", "cat": ["kernel"]}, {"ph": ["X"], "cat": "kernel"},
    {"ph": "X", "cat": "python_function", "name": None, "ts": 4.6e12, "dur": 0, "pid": [1], "tid": {}},
]  # fmt: skip
UNUSABLE = [
    {"ts": None}, {"ts": "soon"}, {"ts": True}, {"ts": []}, {"dur": -1}, {"dur": {}}, {"ts": "NaN"}, {"ts": "Infinity"},
    {"ts": 10**40}, {"dur": "1e400"}, {"ts": -(10**40)}, {"dur": 4.499e15},
]  # fmt: skip


def test_events_that_make_no_sense_are_left_out_and_counted(tmp_path):
    trace = engine()
    expected = read(trace, tmp_path).as_dict()
    kernel = {"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": 4.6e12, "dur": 1.0}
    text = trace.text(bare=True).rstrip("] \n")
    for event in [*BROKEN, *(kernel | wrong for wrong in UNUSABLE)]:
        text += ", " + json.dumps(event)
    huge = json.dumps(kernel | {"ts": "HUGE"}).replace('"HUGE"', "1e999999999")
    report = read(f"{text}, {huge}]", tmp_path)
    assert report.as_dict()["idle"] == expected["idle"]
    assert report.notes == [f"{len(UNUSABLE) + 1} events without a usable time were left out."]


@pytest.fixture
def call(capsys):
    """Run the script in this process: (exit status, standard output, standard error)."""
    return functools.partial(call_script, capsys)


# ---- bad input ----------------------------------------------------------------------------------------------------

CPU_EVENT = '{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 1, "tid": 1, "ts": 4600000000001.5, "dur": 3.2}'
KERNEL = CPU_EVENT.replace("cpu_op", "kernel")
OPEN = '{"schemaVersion": 1, "traceEvents": ['
# What stands in the file, and what the one line says of it.
BAD = {
    "empty": (b"", "is empty"),
    "white space": (b" \n" * 9000, "is empty"),
    "text": (b"hello", "is not JSON"),
    "binary": (bytes(range(256)), "is not JSON"),
    "a zip archive": (b"PK\x03\x04" + bytes(500), "is not JSON"),
    "UTF-16": ("[]".encode("utf-16"), "is not JSON"),
    "text after some events": (f"{OPEN}{CPU_EVENT}, {CPU_EVENT}, oops]}}".encode(), "2 events were read"),
    "a name that is no text": (OPEN.encode() + b'{"name": "\xff\xfe"}]}', "is not JSON"),
    "cut off in an event": (f"{OPEN}{KERNEL}, {KERNEL[:40]}".encode(), "is cut off: the JSON ends too early; "),
    "cut off between events": (f"{OPEN}{KERNEL}, {KERNEL}".encode(), "2 events were read"),
    "cut off before the first": (OPEN[:-5].encode(), "is cut off"),
    "a cut off list": (f"[{KERNEL}".encode(), "is cut off"),
    "a cut off archive": (gzip.compress((OPEN + f"{KERNEL}, " * 9000).encode())[:500], "is cut off or damaged"),
    "a damaged archive": (gzip.compress(b"[]")[:-5] + b"12345", "is cut off or damaged"),
    "only the mark of an archive": (b"\x1f\x8b", "is cut off or damaged"),
    "no events": (b'{"traceEvents": []}', "holds no events: its traceEvents is an empty list"),
    "an empty list": (b"[]", "holds no events: it is a list of nothing"),
    "an empty object": (b"{}", "holds no events: it is an object; expected a Chrome trace"),
    "another object": (b'{"model": "x", "runs": [{"a": 1}]}', "an object with the keys 'model', 'runs'; expected"),
    "an object with many keys": (json.dumps(dict.fromkeys("abcdefgh", [1])).encode(), "'e', ...; expected"),
    "traceEvents that is no list": (b'{"traceEvents": {"a": 1}}', "its traceEvents is no list"),
    "a number": (b"12", "holds 12; expected"),
    "a string": (b'"' + b"trace " * 100 + b'"', "holds 'trace trace"),
    "events that are none": (b"[1, 2, null]", "none of them with a duration"),
    "metadata only": (b'[{"ph": "M", "name": "process_name"}]', "none of them with a duration"),
    "only the CPU's": (f"[{CPU_EVENT}]".encode(), "holds only CPU events: profile with ProfilerActivity.CUDA"),
    "copies only": (f"[{KERNEL.replace('kernel', 'gpu_memcpy')}]".encode(), "1 copies of a device and no kernel"),
    "kernels without a time": (f"[{KERNEL.replace('ts', 'when')}]".encode(), "no usable time (ts, dur) in 1 of them"),
    "categories of another tool": (f"[{KERNEL.replace('kernel', 'b{}k')}]".encode(), "there are 1 of 'b{}k', and 0"),
    "a number of 5,000 digits": (f"[{KERNEL.replace('3.2', '1' * 5000)}]".encode(), "thousands of digits at line 1, c"),
    "a number out of range": (f"[{KERNEL.replace('3.2', '1e99999999999999999999')}]".encode(), "no usable time (ts,"),
    "two values without a comma": (f"[{KERNEL}\n {KERNEL}]".encode(), "',' or ']' was expected at line 2, column 2"),
    "text after the end": (f"[{KERNEL}] x".encode(), "the text goes on after its end"),
    "lists in lists": (b"[" * 100_000, "brackets in brackets"),
    "objects in objects": (b'[{"a":' * 100_000, "brackets in brackets"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_trace_is_refused_with_what_was_found(tmp_path, name, call):
    content, problem = BAD[name]
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert problem in message
    assert "\n" not in message
    assert len(message) < 300 + len(str(path))
    status, out, error = call("--trace", path)
    assert (status, out) == (2, "")
    assert error == f"asyncbatch.profile: {message}\n"


def test_files_that_cannot_be_opened_are_refused(tmp_path):
    with pytest.raises(TraceError, match=r"none\.json cannot be read: No such file"):
        read_trace(tmp_path / "none.json")
    with pytest.raises(TraceError, match=r"cannot be read: Is a directory"):
        read_trace(tmp_path)


def test_a_trace_of_torch_profiler_without_a_gpu_says_how_to_get_one_with_it(tmp_path):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        torch.mm(torch.ones(8, 8), torch.ones(8, 8)).relu()
    profiler.export_chrome_trace(str(tmp_path / "cpu.json"))
    with pytest.raises(TraceError, match=r"cpu\.json holds only CPU events: profile with ProfilerActivity\.CUDA"):
        read_trace(tmp_path / "cpu.json")


def test_our_own_trace_says_what_reads_it(tmp_path):
    timeline = Timeline("sync")
    timeline.add("host", "plan", 0, 0.0, 1.0)
    timeline.add("compute", "step", 0, 1.0, 2.0)
    timeline.save(tmp_path / "trace.json")
    with pytest.raises(TraceError, match=r"written by Timeline\.save or this script: .*load_trace reads it"):
        read_trace(tmp_path / "trace.json")


@given(st.binary(max_size=60), st.integers(0, 400))
@settings(max_examples=150)
def test_no_file_gives_anything_but_a_report_or_a_trace_error(tmp_path_factory, noise, at):
    text = engine(steps=2, kernels=2).text(bare=True).encode()[:2000]
    path = tmp_path_factory.mktemp("noise") / "trace.json"
    path.write_bytes(text[:at] + noise + text[at:])
    with contextlib.suppress(TraceError):
        read_trace(path)


# ---- size ---------------------------------------------------------------------------------------------------------


def test_memory_grows_by_arrays_not_by_objects(tmp_path):
    """The events as parsed take 1,000 to 2,000 bytes each. Measured: 50 while reading, 200 with the report."""
    count = write_large(tmp_path / "large.json", 4)
    read(engine(steps=3), tmp_path)  # whatever is loaded once
    tracemalloc.start()
    try:
        events = files.read_events(tmp_path / "large.json", False)
        reading = tracemalloc.get_traced_memory()[1]
        report_on("large.json", events)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert events.count == count > 15_000
    assert reading < 100 * count + 1_000_000
    assert peak < 400 * count + 1_000_000


def test_a_bar_shows_how_much_of_a_large_file_is_read(tmp_path, monkeypatch, capsys):
    path = engine().save(tmp_path / "trace.json.gz")
    read_trace(path, progress=True)
    assert capsys.readouterr().err == "", "a small file is read before a bar could be looked at"
    monkeypatch.setattr(files, "BAR_FROM", 1000)
    read_trace(path, progress=True)
    assert "reading trace.json.gz" in capsys.readouterr().err
    read_trace(path)
    assert capsys.readouterr().err == ""

"""Streams and events of the host clock: order within a stream, by events, none without, and a device that dies."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import time
import types
import weakref

import numpy as np
import pytest
import torch
from support.programs import Log
from support.tiny import tiny_model
from support.workers import spawned_workers

from asyncbatch import AsyncBatcher
from asyncbatch.devices import open_program
from asyncbatch.devices.cuda.device import never_free
from asyncbatch.devices.host import HostDevice
from asyncbatch.devices.process import DeviceProcess
from asyncbatch.streams import DeviceError


@pytest.fixture
def shared():
    return {
        "count": torch.zeros((), dtype=torch.int64).share_memory_(),
        "log": torch.zeros(200, 2, dtype=torch.int64).share_memory_(),
        "value": torch.zeros((), dtype=torch.int64).share_memory_(),
        "seen": torch.zeros((), dtype=torch.int64).share_memory_(),
    }


@pytest.fixture
def device(shared):
    device = open_program(tiny_model(), Log, num_slots=8, **shared)
    yield device
    device.close()


def log(shared):
    return [tuple(entry) for entry in shared["log"][: int(shared["count"])].tolist()]


def test_a_stream_runs_in_order_and_launching_does_not_wait(device, shared):
    stream = device.streams[1]
    start = time.perf_counter()
    stream.launch("until:1", 0)
    for slot in range(1, 4):
        stream.launch("sleep:0.1", slot)
    launched = time.perf_counter()
    assert not stream.query()
    shared["value"].fill_(1)
    stream.synchronize()
    assert stream.query()
    assert log(shared) == [(slot, what) for slot in range(4) for what in (0, 1)]
    spans = np.array([device.spans(slot)[1] for slot in range(4)])
    assert (spans[1:, 1] - spans[1:, 0] >= 0.1).all()
    assert (spans[1:, 0] >= spans[:-1, 1]).all()
    assert start <= spans[0, 0]  # one clock for host and device
    assert spans[-1, 1] <= time.perf_counter()
    assert launched < spans[0, 1]


def test_two_streams_overlap_without_an_event(device):
    """Each waits in the middle of a command for what the other does after it."""
    a, b, _ = device.streams
    a.launch("until:1", 0)
    b.launch("put:1", 1)
    b.launch("until:2", 2)
    a.launch("put:2", 3)
    a.synchronize()
    b.synchronize()
    assert [device.failure(slot) for slot in range(4)] == [None] * 4
    assert device.spans(1)[1][0] < device.spans(0)[0][1]
    assert device.spans(3)[0][0] < device.spans(2)[1][1]


def test_an_event_orders_two_streams(device, shared):
    a, b, _ = device.streams
    event = device.event()
    a.launch("sleep:0.1", 0)
    a.launch("put:5", 0)
    a.record_event(event)
    b.wait_event(event)
    b.launch("get", 1)
    b.synchronize()
    assert int(shared["seen"]) == 5
    assert event.query()


def test_a_wait_means_the_newest_record_before_it(device, shared):
    """As in CUDA: a wait on an event that was never recorded does nothing, and a later record does not move a wait."""
    a, b, _ = device.streams
    event = device.event()
    assert event.query()
    b.wait_event(event)
    b.launch("put:1", 0)
    b.synchronize()
    a.record_event(event)
    b.wait_event(event)
    a.launch("until:7", 1)
    a.record_event(event)
    b.launch("get", 2)
    b.synchronize()
    assert not event.query()  # the second record is still to come, and b did not wait for it
    shared["value"].fill_(7)
    event.synchronize()
    assert event.query()
    assert device.spans(1)[0][1] > device.spans(2)[1][1]


def test_a_failing_command_is_reported_and_skips_the_rest_of_its_step_only(device, shared):
    a, b, _ = device.streams
    for slot, command in ((3, "fail"), (4, "put:2")):
        event = device.event()
        a.launch(command, slot)
        a.record_event(event)
        b.wait_event(event)
        b.launch("get", slot)
    b.synchronize()
    assert "ValueError: planted in slot 3" in device.failure(3)
    assert device.failure(4) is None
    assert int(shared["seen"]) == 2
    assert (3, 1) not in log(shared)
    a.launch("put:9", 3)
    a.synchronize()
    assert device.failure(3) is None  # a new step in the slot begins clean


def test_events_come_back_when_a_device_closes(shared):
    process = DeviceProcess.of(tiny_model())
    free = len(process.free_events)
    for _ in range(3):
        device = open_program(tiny_model(), Log, num_slots=1, **shared)
        device.event()
        device.close()
        device.close()
    assert sorted(process.free_events) == sorted(set(process.free_events))
    assert len(process.free_events) == free


def test_too_many_events_are_a_clear_error_and_none_is_lost(shared):
    process = DeviceProcess.of(tiny_model())
    free = len(process.free_events)
    device = open_program(tiny_model(), Log, num_slots=1, **shared)
    for _ in range(free - 3):  # each stream has one of its own
        device.event()
    with pytest.raises(DeviceError, match="all 1024 events of the device are taken"):
        device.event()
    device.close()
    with pytest.raises(DeviceError, match="all 1024 events"):
        AsyncBatcher(tiny_model(), num_slots=400, max_length=16)
    assert len(process.free_events) == free


def test_a_device_that_dies_is_an_error_and_not_a_hang(shared):
    with spawned_workers():
        process = DeviceProcess()
    process.send_model(tiny_model())
    device = HostDevice(process, Log, 1, shared)
    device.streams[1].launch("die", 0)
    with pytest.raises(DeviceError, match="device process ended"):
        device.streams[1].synchronize()
    process.process.join()
    with pytest.raises(DeviceError, match=r"exit code 3"):
        process.ask("close", device.session)
    device.close()


def test_a_program_that_cannot_start_says_why(shared):
    free = len(DeviceProcess.of(tiny_model()).free_events)
    with pytest.raises(DeviceError, match="unexpected keyword argument 'nonsense'"):
        open_program(tiny_model(), Log, num_slots=1, nonsense=1)
    assert len(DeviceProcess.of(tiny_model()).free_events) == free


SCRIPT = """
import sys
sys.path[:0] = [{tests!r}]
from support.tiny import tiny_model
from asyncbatch import AsyncBatcher, Request
print("once")
batcher = AsyncBatcher(tiny_model(), max_batch_size=2)
print(len(batcher.run([Request([1, 2], 3)])[0].token_ids))
"""


def test_a_script_without_a_main_guard_runs_once_and_ends(tmp_path, request):
    """A plain script must not start itself again in the worker, and leaves no process behind when it ends without
    closing its batcher."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(request.path.parents[1])))
    root = request.config.rootpath
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=600, env={"PYTHONPATH": str(root)}
    )
    assert result.stdout.split() == ["once", "3"]
    assert result.returncode == 0
    assert "Traceback" not in result.stderr


# ---- errors of CUDA, without a GPU: what the stream itself does, around stand-ins for what torch has -----------------


class NoStream:
    """What CudaStream needs of a torch.cuda.Stream; `broken` makes the context fail as a lost one does."""

    broken = False

    def synchronize(self):
        if NoStream.broken:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered\nCompile with ...")

    record = wait_event = record_event = __enter__ = lambda self, *_: self.synchronize()
    query = None

    def __exit__(self, *_):
        pass


class NoDevice:
    """What a CudaStream needs of its device."""

    is_timed, records_follow = (True,), True

    def begin(self, slot):
        self.errors[slot] = None


@pytest.fixture
def cuda_stream(monkeypatch):
    from asyncbatch.devices.cuda import device as cuda_device

    monkeypatch.setattr(NoStream, "broken", False)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: NoStream())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: NoStream().synchronize())
    program = types.SimpleNamespace(ran=[], fails=None)

    def run(command, slot):
        program.ran.append(command)
        if program.fails is not None:
            raise program.fails

    program.run = run
    device = NoDevice()
    device.where, device.errors, device.program = None, [None], program
    device.timing = [[(NoStream(), NoStream())] * 3]
    return [cuda_device.CudaStream(device, number) for number in range(3)], device


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), torch.AcceleratorError("invalid argument")])
def test_on_cuda_an_error_of_one_step_skips_the_rest_of_it_and_the_next_step_runs(cuda_stream, error):
    (h2d, compute, d2h), device = cuda_stream
    h2d.launch("copy_in", 0)
    device.program.fails = error
    compute.launch("decode", 0)
    d2h.launch("copy_out", 0)
    assert device.program.ran == ["copy_in", "decode"]
    assert str(error) in device.errors[0]
    device.program.fails = None
    for stream in (h2d, compute, d2h):
        stream.launch("again", 0)
    assert device.errors[0] is None
    assert device.program.ran[2:] == ["again"] * 3


def test_on_cuda_streams_do_not_keep_their_device(cuda_stream):
    """A dropped batcher frees the GPU's memory without the garbage collector, which leaves alone what it froze."""
    from asyncbatch.devices.cuda.device import CudaStream

    device = NoDevice()
    device.where = None
    device.streams = [CudaStream(device, number) for number in range(3)]
    watched = weakref.ref(device)
    gc.disable()
    try:
        del device
        assert watched() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("call", ["launch", "record_event", "wait_event", "synchronize"])
def test_on_cuda_a_lost_context_is_a_device_error_that_says_what_to_do(cuda_stream, call):
    (_, compute, _), device = cuda_stream
    NoStream.broken = True
    event = types.SimpleNamespace(own=NoStream(), newest=NoStream())
    arguments = {"launch": ("decode", 0), "synchronize": ()}.get(call, (event,))
    with pytest.raises(DeviceError, match="device-side assert triggered.*Start Python") as caught:
        getattr(compute, call)(*arguments)
    assert "Compile with" not in str(caught.value)


def test_on_cuda_a_context_lost_during_a_step_is_seen_at_once(cuda_stream):
    (_, compute, _), device = cuda_stream

    def lose(command, slot):
        NoStream.broken = True
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    device.program.run = lose
    with pytest.raises(DeviceError, match="cannot use the GPU any more"):
        compute.launch("decode", 0)


def test_what_must_never_be_freed_is_not_freed_with_its_last_reference():
    class Buffer:
        pass

    kept, other = Buffer(), Buffer()
    holder, kept_seen, other_seen = [kept], weakref.ref(kept), weakref.ref(other)
    never_free(holder)
    address = id(holder)
    del holder, kept, other
    gc.collect()
    assert kept_seen() is not None
    assert other_seen() is None
    held = ctypes.cast(address, ctypes.py_object).value
    ctypes.pythonapi.Py_DecRef(ctypes.py_object(held))  # else every run of the tests would keep it
    del held
    gc.collect()
    assert kept_seen() is None

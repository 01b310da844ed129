"""Streams and events: how the host tells a device what to do without waiting for it.

A *stream* is a queue of work that runs in order; two streams run at the same time unless an *event* orders them. The
names are those of `torch.cuda` (`launch` stands for a kernel launch or graph replay: it names a command and a slot
and never carries a closure). Two clocks are here, and a third, where time is only a number, in `virtual.py`:

- host: the device is a worker process with memory of its own and one thread a stream. A thread of this process
  would not do: it takes the interpreter lock for each of a forward pass's hundreds of operations, so nothing would
  overlap.
- cuda: torch's own streams and events.

What runs on the device is a *program*, any object with `run(command, slot)`; `asyncbatch.runner.Runner` is the one that
serves a model.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import os
import pickle
import shutil
import signal
import sys
import threading
import time
import traceback
import types
import weakref
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import numpy as np
import torch
import torch.multiprocessing as mp

STREAMS = ("H2D", "compute", "D2H")


class DeviceError(RuntimeError):
    """A command failed on the device, or the device is gone. The message says what happened there."""


class Event(Protocol):
    """A mark in a stream. Recording it again moves the mark; a wait means the newest mark at the time of the call."""

    def synchronize(self) -> None: ...  # the host waits until the device has reached the mark
    def query(self) -> bool: ...  # has it? (True if the event was never recorded, as in CUDA)


class Stream(Protocol):
    """Work in order. Every method but `synchronize` returns at once."""

    name: str

    def launch(self, command: str, slot: int) -> None: ...
    def wait_event(self, event: Any) -> None: ...  # what is launched here later starts after the event's mark
    def record_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool: ...


class Device(Protocol):
    """Three streams and a program. `spans(slot)` gives, once the slot's last command is done, the (start, end) of its
    newest command on each stream, float64 [3, 2], in seconds of the host's `now()`. `failure(slot)` gives the text of
    the error in the slot's newest commands, or None. `parts(slot)`, asked after `spans`, gives the seconds that the
    slot's newest step spent on carry-over, on the model and on sampling, 0 where the device does not tell them apart.
    `charge(phase, plan)` says
    that the host does a part of a step ("plan", "fill", "launch", "wait" or "commit"): it moves the virtual clock,
    others move by themselves. In `wait_until` the host does nothing until a time of `now()`."""

    clock: str

    @property
    def streams(self) -> tuple[Stream, Stream, Stream]: ...
    def now(self) -> float: ...
    def charge(self, phase: str, plan: Any) -> None: ...
    def wait_until(self, moment: float) -> None: ...
    def event(self) -> Event: ...
    def spans(self, slot: int) -> np.ndarray: ...
    def parts(self, slot: int) -> list[float]: ...
    def failure(self, slot: int) -> str | None: ...
    def close(self) -> None: ...


def order(earlier: Stream, later: Stream, event: Any) -> None:
    """What is launched on `later` from now on starts after all that `earlier` has been given so far. The host waits for
    none of it. (`torch.cuda` calls these two lines `later.wait_stream(earlier)`.)"""
    earlier.record_event(event)
    later.wait_event(event)


def launch_step(streams: tuple[Stream, Stream, Stream], slot: Any) -> None:
    """Tell the three streams to copy a step's inputs in, to compute it and to copy its results out, each after the one
    before. The host waits for none of it; later it waits for `slot.outputs_ready`. `slot` (`slot.py`) names the command
    and has the three events. The copy in waits for nobody: the host fills a slot only when its last step is done."""
    h2d, compute, d2h = streams
    h2d.launch("copy_in", slot.index)
    order(h2d, compute, slot.inputs_ready)
    compute.launch(slot.command, slot.index)
    order(compute, d2h, slot.step_done)
    d2h.launch("copy_out", slot.index)
    d2h.record_event(slot.outputs_ready)


class _RealTime:
    """The host's time on the clocks where time passes by itself: seconds of `time.perf_counter`."""

    now = staticmethod(time.perf_counter)

    def charge(self, phase: str, plan: Any) -> None:
        pass

    def wait_until(self, moment: float) -> None:
        time.sleep(max(0.0, moment - self.now()))


def open_device(model: torch.nn.Module, program: Callable[..., Any], num_slots: int, **arguments: Any) -> Device:
    """The device where `model` lies, running `program(model, **arguments)`: the host clock for a model on the CPU, else
    CUDA. On the host clock `program` and its arguments travel to the worker: importable names and shared tensors."""
    where = next(model.parameters()).device
    if where.type == "cuda":
        return CudaDevice(program(model, **arguments), num_slots, where)
    if where.type == "cpu":
        return HostDevice(DeviceProcess.of(model), program, num_slots, arguments)
    raise DeviceError(f"the model is on {where}: allowed are cpu and cuda")


# ---- the host clock: a process is the device --------------------------------------------------------------------

MAX_EVENTS = 1024
ORIGIN_S = 0.25  # how long times on CUDA are told from the same event


class DeviceProcess:
    """A worker process that holds one model and serves any number of `HostDevice`s, as one GPU serves many programs.

    Owned by the model: started at the first use, stopped when the model is collected or this process ends.
    `done[i]` is the ticket of the newest record of event i that the device has reached; only the device writes it.
    `wake` is released at every record, so that the host can sleep until something has happened.
    """

    _of: weakref.WeakKeyDictionary[torch.nn.Module, DeviceProcess] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, model: torch.nn.Module) -> DeviceProcess:
        process = cls._of.get(model)
        if process is None or not process.alive:
            process = cls._of[model] = cls(model)
            weakref.finalize(model, process.stop)
        return process

    def __init__(self, model: torch.nn.Module):
        context = mp.get_context("spawn")
        self.done = torch.zeros(MAX_EVENTS, dtype=torch.int64).share_memory_()
        self.done_view = self.done.numpy()
        self.wake = context.Semaphore(0)
        self.free_events = list(range(MAX_EVENTS - 1, -1, -1))
        self.sessions = itertools.count()
        self.lock = threading.Lock()
        self.control, control = context.Pipe()
        self.pipes, pipes = [], []
        for _ in STREAMS:
            receive, send = context.Pipe(duplex=False)
            self.pipes.append(send)
            pipes.append(receive)
        self.process = context.Process(
            target=_device_main, args=(control, pipes, self.done, self.wake), daemon=True, name="asyncbatch-device"
        )
        with _no_main_module():
            self.process.start()
        for end in (control, *pipes):
            end.close()  # the worker has its own: with ours closed, a dead worker is an end of file and not a hang
        self.ask("model", _pickle_model(model))

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def ask(self, *message: Any) -> Any:
        """Send a message to the worker's main thread and wait for the answer."""
        with self.lock:
            try:
                self.control.send(message)
                ok, answer = self.control.recv()
            except (EOFError, OSError) as error:
                raise DeviceError(f"the device process ended (exit code {self.process.exitcode})") from error
        if not ok:
            raise DeviceError(answer)
        return answer

    def send(self, stream: int, message: tuple) -> None:
        try:
            self.pipes[stream].send_bytes(pickle.dumps(message))
        except OSError as error:
            raise DeviceError(f"the device process ended (exit code {self.process.exitcode})") from error

    def wait(self, index: int, ticket: int) -> None:
        while self.done_view[index] < ticket:
            # The timeout is for two cases only: the worker died, or another waiting thread took our wake-up.
            if not self.wake.acquire(timeout=0.1) and not self.alive and self.done_view[index] < ticket:
                raise DeviceError(f"the device process ended (exit code {self.process.exitcode})")

    def stop(self) -> None:
        for pipe in (*self.pipes, self.control):
            pipe.close()
        self.process.join(timeout=2)
        if self.process.is_alive():
            self.process.kill()


class HostEvent:
    """`ticket` counts the records; the device copies it to `done[index]` when it gets there. Written by the host
    only."""

    def __init__(self, process: DeviceProcess):
        if not process.free_events:
            raise DeviceError(f"all {MAX_EVENTS} events of the device are taken: close some of the model's batchers")
        self.process, self.index, self.ticket = process, process.free_events.pop(), 0
        process.done_view[self.index] = 0

    def query(self) -> bool:
        return bool(self.process.done_view[self.index] >= self.ticket)

    def synchronize(self) -> None:
        self.process.wait(self.index, self.ticket)


class HostStream:
    def __init__(self, device: HostDevice, number: int):
        self.process, self.session, self.number, self.name = device.process, device.session, number, STREAMS[number]
        self._end, self._has_new = HostEvent(self.process), False

    def launch(self, command: str, slot: int) -> None:
        self._send("launch", self.session, command, slot)

    def wait_event(self, event: HostEvent) -> None:
        self._send("wait", event.index, event.ticket)

    def record_event(self, event: HostEvent) -> None:
        event.ticket += 1
        self._send("record", event.index, event.ticket)

    def synchronize(self) -> None:
        self._mark_end()
        self._end.synchronize()

    def query(self) -> bool:
        self._mark_end()
        return self._end.query()

    def _send(self, *message: Any) -> None:
        self._has_new = True
        self.process.send(self.number, message)

    def _mark_end(self) -> None:
        if self._has_new:
            self.record_event(self._end)
            self._has_new = False


class HostDevice(_RealTime):
    """One program in a `DeviceProcess`. `times`, `failed` and `moments` are shared: the device writes them, before the
    event that the host waits for; the host reads them after it."""

    clock = "host"

    def __init__(self, process: DeviceProcess, program: Callable[..., Any], num_slots: int, arguments: dict):
        self.process, self.session = process, next(process.sessions)
        self.times = torch.zeros(num_slots, len(STREAMS), 2, dtype=torch.float64).share_memory_()
        self.failed = torch.zeros(num_slots, dtype=torch.int32).share_memory_()
        self.moments = torch.zeros(num_slots, 4, dtype=torch.float64).share_memory_()
        self._times, self._moments = self.times.numpy(), self.moments.numpy()
        self._events: list[HostEvent] = []
        self.streams = (HostStream(self, 0), HostStream(self, 1), HostStream(self, 2))
        self._events += [stream._end for stream in self.streams]
        try:
            process.ask("open", self.session, program, arguments, self.times, self.failed, self.moments)
        except DeviceError:
            self._give_events_back()
            raise

    def event(self) -> HostEvent:
        self._events.append(HostEvent(self.process))
        return self._events[-1]

    def spans(self, slot: int) -> np.ndarray:
        return self._times[slot].copy()

    def parts(self, slot: int) -> list[float]:
        start, carried, computed, end = self._moments[slot].tolist()
        return [carried - start, computed - carried, end - computed]

    def failure(self, slot: int) -> str | None:
        return self.process.ask("failure", self.session, slot) if self.failed[slot] else None

    def close(self) -> None:
        """Free the program and its memory on the device. The process stays, for the model's next batcher."""
        if self._events and self.process.alive:
            for stream in self.streams:
                stream.synchronize()
            self.process.ask("close", self.session)
            self._give_events_back()

    def _give_events_back(self) -> None:
        self.process.free_events += [event.index for event in self._events]
        self._events = []


def device_threads() -> int:
    """How many cores the device process computes on: all that we may use but one. That one stays with the host: with
    all of them busy the two would take turns and not overlap."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return max(1, cores - 1)


@contextlib.contextmanager
def _no_main_module():
    """Hide the caller's `__main__` while a process is spawned. Otherwise the worker would import the script that
    calls us, and a script without an `if __name__ == "__main__":` guard would start itself again. Our worker needs
    none of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _pickle_model(model: torch.nn.Module) -> bytes:
    """The model as bytes: its weights as handles of shared memory, or by value where shared memory is too small for
    them (a container's /dev/shm is often 64 MB; writing beyond it kills the process)."""
    size = sum(t.numel() * t.element_size() for t in itertools.chain(model.parameters(), model.buffers()))
    if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free < 1.1 * size:
        return pickle.dumps(model)
    model.share_memory()
    return bytes(ForkingPickler.dumps(model))


def _device_main(control, pipes, done, wake) -> None:
    """The worker process: one thread a stream, and this thread for the control messages."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the host, which then closes the pipes
    worker = _Worker(done.numpy(), wake)
    for number, pipe in enumerate(pipes):
        threading.Thread(target=worker.run_stream, args=(number, pipe), daemon=True, name=STREAMS[number]).start()
    while True:
        try:
            name, *arguments = control.recv()
        except (EOFError, OSError):
            os._exit(0)  # the host closed the pipe or is gone; a stream thread may be in the middle of a step
        try:
            control.send((True, getattr(worker, name)(*arguments)))
        except Exception:
            control.send((False, traceback.format_exc()))


class _Worker:
    def __init__(self, done: np.ndarray, wake):
        self.done, self.wake = done, wake
        self.reached = threading.Condition()
        self._programs: dict[int, tuple[Any, np.ndarray, np.ndarray, dict[int, str]]] = {}
        torch.set_num_threads(device_threads())

    # Control messages, by name.

    def model(self, blob: bytes) -> None:
        self._model = pickle.loads(blob)
        gc.collect()
        gc.freeze()  # the model's many objects never become garbage: no collection has to look at them

    def open(self, session: int, program: Callable, arguments: dict, times, failed, moments) -> None:
        made = program(self._model, **arguments)
        if hasattr(made, "moments"):
            made.moments = moments.numpy()
        self._programs[session] = (made, times.numpy(), failed.numpy(), {})

    def failure(self, session: int, slot: int) -> str:
        return self._programs[session][3].get(slot, "")

    def close(self, session: int) -> None:
        del self._programs[session]

    # Stream messages.

    @torch.inference_mode()
    def run_stream(self, number: int, pipe) -> None:
        while True:
            try:
                operation, *arguments = pickle.loads(pipe.recv_bytes())
            except (EOFError, OSError):
                return
            if operation == "launch":
                self._launch(number, *arguments)
            elif operation == "wait":
                self._wait(*arguments)
            else:
                self._record(*arguments)

    def _wait(self, index: int, ticket: int) -> None:
        with self.reached:
            self.reached.wait_for(lambda: self.done[index] >= ticket)

    def _record(self, index: int, ticket: int) -> None:
        with self.reached:
            self.done[index] = ticket
            self.reached.notify_all()
        self.wake.release()

    def _launch(self, number: int, session: int, command: str, slot: int) -> None:
        program, times, failed, errors = self._programs[session]
        start = time.perf_counter()
        if number == 0:
            failed[slot] = 0  # a step begins on H2D; its later commands are skipped once one of them has failed
        if not failed[slot]:
            try:
                program.run(command, slot)
            except Exception:
                errors[slot] = f"{command} failed on the device:\n{traceback.format_exc()}"
                failed[slot] = 1
        times[slot, number] = start, time.perf_counter()


def time_work(work: Callable[[], Any], synchronize: Callable[[], Any], now: Callable[[], float] = time.perf_counter):
    """(back, done): how long after its call `work` gave the host back, and how long after it the device was done.

    `synchronize` waits for all that the device was given; `now` is the clock, and its unit that of the answer."""
    synchronize()  # what was launched earlier is not to be measured
    start = now()
    work()
    back = now()
    synchronize()
    return back - start, now() - start


# ---- cuda: torch's own -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _cuda_errors():
    """Most errors of CUDA are found late, by whatever is called next, and end all work of this process on the GPU."""
    try:
        yield
    except torch.AcceleratorError as error:
        reason = str(error).strip().split("\n")[0]
        raise DeviceError(
            f"CUDA failed, and this process cannot use the GPU any more ({reason}). Start Python, or the notebook's "
            "kernel, anew; with CUDA_LAUNCH_BLOCKING=1 in its environment the traceback shows what failed"
        ) from error


def never_free(thing: Any) -> None:
    """Keep `thing` and all that it holds for as long as this process lives, past the end of Python. For pinned memory
    after an error of CUDA: torch asks CUDA for an event when it frees some, and where that fails it ends the process
    ("terminate called ...", seen with torch 2.11)."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


class CudaEvent(torch.cuda.Event):
    """A torch.cuda.Event whose wait raises DeviceError where work before it has failed."""

    def synchronize(self) -> None:
        with _cuda_errors():
            super().synchronize()


class CudaStream:
    """A torch.cuda.Stream that launches a program's commands, each between two timing events."""

    def __init__(self, device: CudaDevice, number: int):
        self.device, self.number, self.name = device, number, STREAMS[number]
        self.stream = torch.cuda.Stream(device.where)
        self.query = self.stream.query

    def wait_event(self, event: CudaEvent) -> None:
        with _cuda_errors():
            self.stream.wait_event(event)

    def record_event(self, event: CudaEvent) -> None:
        with _cuda_errors():
            self.stream.record_event(event)

    def synchronize(self) -> None:
        with _cuda_errors():
            self.stream.synchronize()

    def launch(self, command: str, slot: int) -> None:
        if self.number == 0:
            self.device.errors[slot] = None
        if self.device.errors[slot]:
            return
        start, end = self.device.timing[slot][self.number]
        with _cuda_errors():
            start.record(self.stream)
            try:
                with torch.cuda.stream(self.stream), torch.inference_mode():
                    self.device.program.run(command, slot)
            except Exception as error:
                # Out of memory, or a mistake on the host: this step's fault alone. An error of CUDA may be an earlier
                # one's, and final: then waiting raises it again.
                if isinstance(error, torch.AcceleratorError):
                    torch.cuda.synchronize(self.device.where)
                self.device.errors[slot] = f"{command} failed on the device:\n{traceback.format_exc()}"
            end.record(self.stream)


class CudaDevice(_RealTime):
    clock = "cuda"

    def __init__(self, program: Any, num_slots: int, where: torch.device):
        self.program, self.where = program, where
        self.errors: list[str | None] = [None] * num_slots
        self.step_s = [0.0] * num_slots  # of each slot's newest step
        new = torch.cuda.Event
        self.timing = [[(new(enable_timing=True), new(enable_timing=True)) for _ in STREAMS] for _ in range(num_slots)]
        self.streams = (CudaStream(self, 0), CudaStream(self, 1), CudaStream(self, 2))
        # One moment on both clocks: event times are relative to each other, and this ties them to the host's.
        torch.cuda.synchronize(where)
        self.origin_event = new(enable_timing=True)
        self.origin_event.record(self.streams[1].stream)
        self.origin_event.synchronize()
        self.origin = time.perf_counter()

    def event(self) -> CudaEvent:
        return CudaEvent()

    def spans(self, slot: int) -> np.ndarray:
        elapsed, pairs = self.origin_event.elapsed_time, self.timing[slot]  # milliseconds
        with _cuda_errors():
            spans = self.origin + 1e-3 * np.array([[elapsed(start), elapsed(end)] for start, end in pairs])
        self.step_s[slot] = float(spans[1, 1] - spans[1, 0])
        if spans[1, 1] - self.origin > ORIGIN_S:
            # CUDA gives these times as float32: a minute after the origin they are whole 4 microseconds. So the end of
            # this step is the next origin; its event goes out of use, and the slot gets another one.
            (start, self.origin_event), self.origin = pairs[1], float(spans[1, 1])
            pairs[1] = (start, torch.cuda.Event(enable_timing=True))
        return spans

    def parts(self, slot: int) -> list[float]:
        marks = getattr(self.program, "marks", None)
        if marks is None:
            return [0.0, 0.0, 0.0]
        start, (carried, computed) = self.timing[slot][1][0], marks[slot]
        with _cuda_errors():
            first, second = 1e-3 * start.elapsed_time(carried), 1e-3 * carried.elapsed_time(computed)
        return [first, second, self.step_s[slot] - first - second]

    def failure(self, slot: int) -> str | None:
        return self.errors[slot]

    def close(self) -> None:
        torch.cuda.synchronize(self.where)
        self.program = None

"""The device on a CPU: a worker process with memory of its own and one thread a stream (`worker.py`).

A thread of this process would not do: it takes the interpreter lock for each of a forward pass's hundreds of
operations, so nothing would overlap.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import shutil
import sys
import threading
import types
import weakref
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp

from ..streams import STREAMS, DeviceError, RealTime
from .worker import device_main

MAX_EVENTS = 1024


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
            target=device_main, args=(control, pipes, self.done, self.wake), daemon=True, name="asyncbatch-device"
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

    def launch(self, command: Any, slot: int) -> None:
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


class HostDevice(RealTime):
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

    def event(self, name: str = "", slot: int | None = None) -> HostEvent:
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

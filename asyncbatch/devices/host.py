"""The device on a CPU: a worker process with memory of its own and one thread a stream (`worker.py`).

A thread of this process would not do: it takes the interpreter lock for each of a forward pass's hundreds of
operations, so nothing would overlap.
"""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ..streams import STREAMS, DeviceError
from .process import DeviceProcess
from .real_time import RealTime


class HostEvent:
    """`ticket` counts the records; the device copies it to `done[index]` when it gets there. Written by the host
    only."""

    def __init__(self, process: DeviceProcess, session: int):
        self.process, self.index, self.ticket = process, process.take_event(session), 0
        process.done_view[self.index] = 0

    def query(self) -> bool:
        return bool(self.process.done_view[self.index] >= self.ticket)

    def synchronize(self) -> None:
        self.process.wait(self.index, self.ticket)


class HostStream:
    def __init__(self, device: HostDevice, number: int):
        self.process, self.session, self.number, self.name = device.process, device.session, number, STREAMS[number]
        self._end, self._has_new = HostEvent(self.process, self.session), False
        self._launches: dict[tuple[Any, int], bytes] = {}  # pickled once: the same few come in every step

    def launch(self, command: Any, slot: int) -> None:
        message = self._launches.get((command, slot))
        if message is None:
            message = self._launches[command, slot] = pickle.dumps(("launch", self.session, command, slot))
        self._send(message)

    def wait_event(self, event: HostEvent) -> None:
        self._send(pickle.dumps(("wait", event.index, event.ticket)))

    def record_event(self, event: HostEvent) -> None:
        event.ticket += 1
        self._send(pickle.dumps(("record", event.index, event.ticket)))

    def synchronize(self) -> None:
        self._mark_end()
        self._end.synchronize()

    def query(self) -> bool:
        self._mark_end()
        return self._end.query()

    def _send(self, message: bytes) -> None:
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
        process.reclaim()
        self.process, self.session = process, next(process.sessions)
        # What `close` does; if nobody calls it, the next device of the process does. It stands here first: whatever
        # comes next may be interrupted.
        self.streams: Any = []
        self._drop = weakref.finalize(self, process.dropped.append, (self.session, self.streams))
        self._drop.atexit = False
        self.times = torch.zeros(num_slots, len(STREAMS), 2, dtype=torch.float64).share_memory_()
        self.failed = torch.zeros(num_slots, dtype=torch.int32).share_memory_()
        self.moments = torch.zeros(num_slots, 5, dtype=torch.float64).share_memory_()
        self._times, self._moments = self.times.numpy(), self.moments.numpy()
        for number in range(len(STREAMS)):
            self.streams.append(HostStream(self, number))
        try:
            answer = process.ask("open", self.session, program, arguments, self.times, self.failed, self.moments)
            self.padding: dict[int, int] = answer
        except DeviceError:
            self.close()
            raise

    def event(self, name: str = "an event", slot: int | None = None) -> HostEvent:
        return HostEvent(self.process, self.session)

    def spans(self, slot: int) -> list[list[float]]:
        return self._times[slot].tolist()

    def parts(self, slot: int) -> list[float]:
        start, carried, computed, end, _ = self._moments[slot].tolist()
        return [carried - start, computed - carried, end - computed]

    def collective_s(self, slot: int) -> float:
        """The seconds that the slot's newest step was in collectives, where the model lies on several ranks."""
        return float(self._moments[slot, 4])

    def failure(self, slot: int) -> str | None:
        return self.process.ask("failure", self.session, slot) if self.failed[slot] else None

    def close(self) -> None:
        """Free the program and its memory on the device. The process stays, for the model's next batcher."""
        self._drop()
        self.process.reclaim()

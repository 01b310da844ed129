"""The device on CUDA: torch's own streams and events, with the times of every command."""

from __future__ import annotations

import ctypes
import time
import traceback
import weakref
from typing import Any

import torch

from ...streams import STREAMS, DeviceError
from ..real_time import RealTime

ORIGIN_S = 0.25  # how long times are told from the same event


class _CudaErrors:
    """Within it, an error of CUDA is a DeviceError. Most of them are found late, by whatever is called next, and end
    all work of this process on the GPU. (A class, since a step needs it ten times, and a generator takes longer.)"""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, torch.AcceleratorError):
            reason = str(error).strip().split("\n")[0]
            raise DeviceError(
                f"CUDA failed, and this process cannot use the GPU any more ({reason}). Start Python, or the "
                "notebook's kernel, anew; with CUDA_LAUNCH_BLOCKING=1 in its environment the traceback shows what "
                "failed"
            ) from error


_cuda_errors = _CudaErrors()


def never_free(thing: Any) -> None:
    """Keep `thing` and all that it holds for as long as this process lives, past the end of Python. For pinned memory
    after an error of CUDA: torch asks CUDA for an event when it frees some, and where that fails it ends the process
    ("terminate called ...", seen with torch 2.11)."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


class CudaEvent(torch.cuda.Event):
    """A torch.cuda.Event whose wait raises DeviceError where work before it has failed."""

    def synchronize(self) -> None:
        with _cuda_errors:
            super().synchronize()


class CudaStream:
    """A torch.cuda.Stream that launches a program's commands, each between two timing events."""

    def __init__(self, device: CudaDevice, number: int):
        # Not in a circle with the device: what is dropped must go at once, since the collector leaves it alone.
        self.device: CudaDevice = weakref.proxy(device)
        self.number, self.name = number, STREAMS[number]
        self.stream = torch.cuda.Stream(device.where)
        self.query = self.stream.query

    def wait_event(self, event: CudaEvent) -> None:
        with _cuda_errors:
            self.stream.wait_event(event)

    def record_event(self, event: CudaEvent) -> None:
        with _cuda_errors:
            self.stream.record_event(event)

    def synchronize(self) -> None:
        with _cuda_errors:
            self.stream.synchronize()

    def launch(self, command: Any, slot: int) -> None:
        if self.number == 0:
            self.device.errors[slot] = None
        if self.device.errors[slot]:
            return
        start, end = self.device.timing[slot][self.number]
        with _cuda_errors:
            start.record(self.stream)
            try:
                with self.stream:  # (2 us; torch.cuda.stream(...) takes 18)
                    self.device.program.run(command, slot)
            except Exception as error:
                # Out of memory, or a mistake on the host: this step's fault alone. An error of CUDA may be an earlier
                # one's, and final: then waiting raises it again.
                if isinstance(error, torch.AcceleratorError):
                    torch.cuda.synchronize(self.device.where)
                self.device.errors[slot] = f"{command} failed on the device:\n{traceback.format_exc()}"
            end.record(self.stream)


class CudaDevice(RealTime):
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
        self.padding: dict[int, int] = getattr(program, "padding", {})
        self._keep_quiet()

    def event(self, name: str = "an event", slot: int | None = None) -> CudaEvent:
        return CudaEvent()

    def spans(self, slot: int) -> list[list[float]]:
        origin, elapsed, pairs = self.origin, self.origin_event.elapsed_time, self.timing[slot]  # milliseconds
        with _cuda_errors:
            # (No NumPy: a synchronous device waits meanwhile, and for six numbers it takes longer.)
            spans = [[origin + 1e-3 * elapsed(start), origin + 1e-3 * elapsed(end)] for start, end in pairs]
        began, ended = spans[1]
        self.step_s[slot] = ended - began
        if ended - origin > ORIGIN_S:
            # CUDA gives these times as float32: a minute after the origin they are whole 4 microseconds. So the end of
            # this step is the next origin; its event goes out of use, and the slot gets another one.
            (start, self.origin_event), self.origin = pairs[1], ended
            pairs[1] = (start, torch.cuda.Event(enable_timing=True))
        return spans

    def parts(self, slot: int) -> list[float]:
        marks = getattr(self.program, "marks", None)
        if marks is None:
            return [0.0, 0.0, 0.0]
        start, (carried, computed) = self.timing[slot][1][0], marks[slot]
        with _cuda_errors:
            first, second = 1e-3 * start.elapsed_time(carried), 1e-3 * carried.elapsed_time(computed)
        return [first, second, self.step_s[slot] - first - second]

    def failure(self, slot: int) -> str | None:
        return self.errors[slot]

    def abandon(self, slots: Any) -> None:
        never_free(slots)

    def close(self) -> None:
        self._quiet()
        torch.cuda.synchronize(self.where)
        # torch's caches of compiled functions may keep the program. Its graphs must go: they hold memory, and the
        # connections between GPUs, which cannot be closed before.
        getattr(self.program, "graphs", {}).clear()
        self.program = None

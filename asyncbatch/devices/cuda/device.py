"""The device on CUDA: torch's own streams and events, with the times of every command."""

from __future__ import annotations

import ctypes
import threading
import time
import traceback
import weakref
from typing import Any

import torch

from ...streams import STREAMS, DeviceError
from ..real_time import RealTime

ORIGIN_S = 0.25  # how long times are told from the same event
_reading = threading.RLock()  # whoever reads events


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


class CudaEvent:
    """An event whose wait raises DeviceError where work before it has failed. `newest`: what was last recorded for it.
    Right after a command that is the command's own timing event, which so needs no recording of its own."""

    __slots__ = ("own", "newest")

    def __init__(self) -> None:
        self.own = self.newest = torch.cuda.Event()

    def query(self) -> bool:
        return self.newest.query()

    def synchronize(self) -> None:
        with _cuda_errors:
            self.newest.synchronize()


class EventClock:
    """The host's time of what timing events have seen. One moment on both clocks ties them: event times are relative to
    each other. stream: where the first of these moments is marked."""

    def __init__(self, stream: Any):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(stream)
        self.event.synchronize()
        self.origin = time.perf_counter()

    def spans(self, pairs: Any) -> tuple[tuple[float, float], ...]:
        """(start, end) of each pair of events, in seconds. pairs: one for each stream."""
        origin, elapsed = self.origin, self.event.elapsed_time  # milliseconds
        return tuple([(origin + 1e-3 * elapsed(start), origin + 1e-3 * elapsed(end)) for start, end in pairs])

    def move_on(self, pair: list[Any], ended: float) -> None:
        """CUDA gives these times as float32: a minute after the origin they are whole 4 microseconds. So now and then
        the end of a step, the second of `pair`, becomes the origin; the pair gets another event."""
        if ended - self.origin > ORIGIN_S:
            event, pair[1] = pair[1], torch.cuda.Event(enable_timing=True)
            self.event, self.origin = event, ended


class Unread:
    """The times of a step whose events nobody has read yet: called, it gives them. In the thousandths of a second in
    which the device computed, the code and the data for reading events have left the caches, and a synchronous device
    would wait while they come back. So they are read once the next step has been launched.

    pairs: the step's timing events, one pair for each stream. marks: those of its parts, or None. Until it was read,
    nobody may record them anew. It does not know the device, which knows it: a circle would keep both."""

    __slots__ = ("clock", "pairs", "marks", "times", "seconds")

    def __init__(self, clock: EventClock, pairs: Any, marks: Any):
        self.clock, self.pairs, self.marks = clock, pairs, marks
        self.times: tuple[tuple[float, float], ...] | None = None
        self.seconds = (0.0, 0.0, 0.0)

    def __call__(self) -> tuple[tuple[float, float], ...]:
        """(start, end) on each stream; nothing if CUDA has failed since then."""
        if self.pairs is not None:
            with _reading:
                if self.times is None:
                    try:
                        self._read()
                    except torch.AcceleratorError:  # whoever waits next is told
                        self.times = ()
                self.clock = self.pairs = self.marks = None  # type: ignore[assignment]
        return self.times  # type: ignore[return-value]

    def parts(self) -> tuple[float, float, float]:
        """Seconds of the carry-over, the model and sampling."""
        self()
        return self.seconds

    def _read(self) -> None:
        clock, pair = self.clock, self.pairs[1]
        times = clock.spans(self.pairs)
        began, ended = times[1]
        if self.marks is not None:
            carried, computed = self.marks
            first, second = 1e-3 * pair[0].elapsed_time(carried), 1e-3 * carried.elapsed_time(computed)
            self.seconds = first, second, ended - began - first - second
        self.times = times
        clock.move_on(pair, ended)  # last: after an interrupt before it, all can be read again


class CudaStream:
    """A torch.cuda.Stream that launches a program's commands, each between two timing events."""

    def __init__(self, device: CudaDevice, number: int):
        # Not in a circle with the device: what is dropped must go at once, since the collector leaves it alone.
        self.device: CudaDevice = weakref.proxy(device)
        self.number, self.name = number, STREAMS[number]
        self.stream = torch.cuda.Stream(device.where)
        self.query = self.stream.query
        self.end: Any = None  # the timing event that the newest command's end still waits for

    def wait_event(self, event: CudaEvent) -> None:
        with _cuda_errors:
            self._mark_end()
            self.stream.wait_event(event.newest)

    def record_event(self, event: CudaEvent) -> None:
        with _cuda_errors:
            event.newest = self.end or event.own
            self.end = None
            event.newest.record(self.stream)

    def synchronize(self) -> None:
        with _cuda_errors:
            self._mark_end()
            self.stream.synchronize()

    def _mark_end(self) -> None:
        if self.end is not None:
            end, self.end = self.end, None
            end.record(self.stream)

    def launch(self, command: Any, slot: int) -> None:
        device, number = self.device, self.number
        if number == 0:
            device.begin(slot)
        if device.errors[slot]:
            return
        timed, (start, end) = device.is_timed[slot], device.timing[slot][number]
        with _cuda_errors:
            if timed:
                self._mark_end()
                start.record(self.stream)
            try:
                with self.stream:  # (2 us; torch.cuda.stream(...) takes 18)
                    device.program.run(command, slot)
            except Exception as error:
                # Out of memory, or a mistake on the host: this step's fault alone. An error of CUDA may be an earlier
                # one's, and final: then waiting raises it again.
                if isinstance(error, torch.AcceleratorError):
                    torch.cuda.synchronize(device.where)
                device.errors[slot] = f"{command} failed on the device:\n{traceback.format_exc()}"
            if timed:
                self.end = end
                if not device.records_follow:
                    self._mark_end()


class CudaDevice(RealTime):
    """`timed`: whether commands are launched between timing events; without them a step has no spans. `timing`: by slot
    and stream the pair of events of the newest command. There are two sets of a slot, for while a step is launched the
    last one of its slot may still be `Unread`. `records_follow`: an event is recorded after every command, as
    `streams.launch_step` does, and tells its end too: three recordings less in a step."""

    clock = "cuda"

    def __init__(self, program: Any, num_slots: int, where: torch.device):
        self.program, self.where = program, where
        self.errors: list[str | None] = [None] * num_slots
        self.records_follow = False
        self.timed, self.is_timed = True, [True] * num_slots  # the second: of each slot's newest step
        self.newest = 0  # slot of the newest step
        self.unread: list[Unread | None] = [None] * num_slots  # the times of each slot's last committed step
        self.timing, self.spare = ([self._events() for _ in range(num_slots)] for _ in range(2))
        self.streams = (CudaStream(self, 0), CudaStream(self, 1), CudaStream(self, 2))
        torch.cuda.synchronize(where)
        self.event_clock = EventClock(self.streams[1].stream)
        self.padding: dict[int, int] = getattr(program, "padding", {})
        self._keep_quiet()

    @staticmethod
    def _events() -> list[list[torch.cuda.Event]]:
        return [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in STREAMS]

    def event(self, name: str = "an event", slot: int | None = None) -> CudaEvent:
        return CudaEvent()

    def begin(self, slot: int) -> None:
        """A step is about to be launched on the slot. Events that nobody has read yet stay as they are."""
        self.errors[slot], self.is_timed[slot], self.newest = None, self.timed, slot
        unread = self.unread[slot]
        if unread is None:
            return
        if unread.marks is not None:  # of these a slot has no second set: they are part of its graphs
            unread()
        elif unread.pairs is self.timing[slot]:
            self.timing[slot], self.spare[slot] = self.spare[slot], self.timing[slot]

    def spans(self, slot: int) -> Any:
        if not self.is_timed[slot]:
            return ()
        before, marks = self.unread[slot], getattr(self.program, "marks", None)
        if before is not None:
            before()  # it has been read long ago, unless nobody waited meanwhile
        unread = Unread(self.event_clock, self.timing[slot], marks and marks[slot])
        self.unread[slot] = unread
        if marks is not None and self.newest != slot:  # a later step is under way: now is as good as later
            unread()
        return unread

    def parts(self, slot: int) -> Any:
        unread = self.unread[slot]
        return (0.0, 0.0, 0.0) if unread is None else unread.parts

    def failure(self, slot: int) -> str | None:
        return self.errors[slot]

    def abandon(self, slots: Any) -> None:
        never_free(slots)

    def close(self) -> None:
        self._quiet()
        torch.cuda.synchronize(self.where)
        for unread in filter(None, self.unread):
            unread()
        # torch's caches of compiled functions may keep the program. Its graphs must go: they hold memory, and the
        # connections between GPUs, which cannot be closed before.
        getattr(self.program, "graphs", {}).clear()
        self.program = None

"""In place of a GPU for the package's own `CudaDevice`: streams and events in this process, for tests without one.

A command runs when it is launched, so tokens are right, and takes the time that `SECONDS` says of its stream. The
device's time is a number; so is the host's, unless `real` says that it is the real one. Whatever the host does is noted
in `journal`, and what every command took in `truth`: the timeline must say the same.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from asyncbatch import base
from asyncbatch.devices.cuda import device as cuda_device
from asyncbatch.devices.padding import PaddedRunner
from asyncbatch.devices.timed import TimedRunner
from asyncbatch.scheduler import StepKind

SECONDS = (1e-4, 3e-3, 2e-4)  # of a copy in, a step, a copy out; the later ones of a kind take a little longer
PARTS = (0.1, 0.7)  # of a step: when its carry-over is done, and its model
TICK_S = 1e-9  # the host's time goes on by so much each time that somebody asks for it


class Ran(NamedTuple):
    """A command as it ran: on stream number `stream`, for `slot`, from `start` to `end` (seconds)."""

    stream: int
    slot: int
    start: float
    end: float


class Gpu:
    """The device, its host's clock, and what happened. real: the host's time is real, and commands take none of it.

    journal: in order, "waited" (the host has waited for a step), "launched" (a step), "read" (the time of one event was
    asked for), "timed" and "marked" (an event was recorded: one that has a time, one that has none). lost: from now on
    every call fails, as after an error of CUDA.
    between: called at the end of each wait, before it is noted. host_s: the host's processor seconds from each wait to
    the next launch of a step."""

    def __init__(self, real: bool = False):
        self.real, self.time, self.lost = real, 0.0, False
        self.journal: list[str] = []
        self.truth: list[Ran] = []
        self.streams: list[Any] = []
        self.current: Any = None
        self.between: Callable[[], None] = lambda: None
        self.waited_s, self.host_s = 0.0, []
        gpu = self

        class Event:
            def __init__(self, enable_timing=False, **_):
                self.timing, self.time = enable_timing, None

            def record(self, stream):
                gpu.check()
                self.time = max(stream.time, gpu.time)
                gpu.journal.append("timed" if self.timing else "marked")

            def synchronize(self):
                gpu.check()
                if self.time is not None:
                    gpu.time = max(gpu.time, self.time)
                gpu.between()
                gpu.journal.append("waited")
                gpu.waited_s = time.thread_time()

            def query(self):
                return self.time is None or self.time <= gpu.time

            def elapsed_time(self, end):
                gpu.check()
                gpu.journal.append("read")
                for event in (self, end):
                    assert event.timing, "this event has no time"
                    assert event.time is not None, "it was never recorded"
                    assert event.query(), "it is not reached yet"
                return 1e3 * (end.time - self.time)

        class Stream:
            def __init__(self, where):
                self.time = 0.0
                gpu.streams.append(self)

            def wait_event(self, event):
                gpu.check()
                self.time = max(self.time, event.time)

            def record_event(self, event):
                event.record(self)

            def synchronize(self):
                gpu.check()
                gpu.time = max(gpu.time, self.time)

            def query(self):
                return self.time <= gpu.time

            def __enter__(self):
                gpu.current = self

            def __exit__(self, *_):
                gpu.current = None

        cuda = SimpleNamespace(Event=Event, Stream=Stream, synchronize=self.finish)
        self.torch = SimpleNamespace(cuda=cuda, AcceleratorError=torch.AcceleratorError, device=torch.device)

    def check(self) -> None:
        if self.lost:
            raise torch.AcceleratorError("CUDA error: planted")

    def finish(self, where: Any = None) -> None:
        self.check()
        self.time = max([self.time, *(stream.time for stream in self.streams)])

    def now(self) -> float:
        if self.real:
            return time.perf_counter()
        self.time += TICK_S
        return self.time

    def run(self, original: Callable, marks: Any, command: Any, slot: int) -> None:
        """A command of a program, on the stream that is current."""
        stream = self.current
        # (Of all streams that were made, those of the newest device are the last three.)
        number = self.streams.index(stream) % 3
        start = max(stream.time, self.time)
        took = 0.0 if self.real else SECONDS[number] * (1 + 1e-3 * (len(self.truth) % 7))
        stream.time = start + took
        if isinstance(command, StepKind):
            self.host_s.append(time.thread_time() - self.waited_s)
            self.journal.append("launched")
            for mark, share in zip(marks[slot] if marks else (), PARTS, strict=False):
                mark.time = start + share * took
        self.truth.append(Ran(number, slot, start, stream.time))
        original(command, slot)


@contextlib.contextmanager
def stand_in(*, real: bool = False, computes: bool = False, records_follow: bool = True) -> Iterator[Gpu]:
    """Within it, batchers of a model on the CPU are opened on the stand-in: with the option `parts` too.

    computes: the program is the model; otherwise one that computes next to nothing."""
    gpu = Gpu(real)

    def open_device(model, config, buffers, runner=None):
        kind = PaddedRunner if computes else TimedRunner
        more = {} if computes else {"step_s": 0.0}
        program = kind(model, shape=config.shape, host=buffers, **more)
        if config.parts:
            program.marks = [(gpu.torch.cuda.Event(True), gpu.torch.cuda.Event(True)) for _ in buffers]
        original, marks = program.run, getattr(program, "marks", None)

        def run(command, slot):
            with torch.inference_mode():
                gpu.run(original, marks, command, slot)

        program.run = run
        device = cuda_device.CudaDevice(program, config.num_slots, torch.device("cpu"))
        device.shape, device.host_work_s, device.now = config.shape, config.host_work_s, gpu.now
        if not real:
            device.clock = "virtual"
        if hasattr(device, "timed"):
            device.timed = config.timeline != 0
        device.records_follow = records_follow
        return device

    clock = SimpleNamespace(perf_counter=gpu.now)
    with (
        mock.patch.object(cuda_device, "torch", gpu.torch),
        mock.patch.object(cuda_device, "time", clock),
        mock.patch.object(base, "open_device", open_device),
    ):
        yield gpu


def between_steps(journal: list[str]) -> list[list[str]]:
    """What the host did from each wait to the launch of the next step: in a synchronous loop, what the device waits
    for."""
    found, open_ = [], None
    for entry in journal:
        if entry == "waited":
            open_ = []
        elif entry == "launched" and open_ is not None:
            found.append(open_)
            open_ = None
        elif open_ is not None:
            open_.append(entry)
    return found


def true_spans(ran: list[Ran]) -> list[tuple[str, int, float, float]]:
    """(lane, step, start, end) of each command, where every step uses each stream once: counted from its own stream."""
    lanes, count = ("H2D", "compute", "D2H"), [itertools.count() for _ in range(3)]
    return [(lanes[one.stream], next(count[one.stream]), one.start, one.end) for one in ran]

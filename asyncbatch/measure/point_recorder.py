"""Recording the latency points of a run, while the batcher runs.

    with record_points(batcher):
        batcher.run(requests)

For that time a few methods of the batcher's own objects are wrapped. The loops stay as they are, and whoever does not
measure pays nothing. `points.py` says what the points are, and reads them from the timeline afterwards.
"""

from __future__ import annotations

import bisect
import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

from ..timeline import Timeline
from .points import ADDED, CALLBACKS, DEVICE_LANE, GC, LANE, LAUNCHES, NO_REQUEST, PARTS

FIRST_COMMANDS = ("launch", "wait_event", "wait_event")  # the first command of each stream in `launch_step`


@contextlib.contextmanager
def record_points(batcher: Any) -> Iterator[None]:
    """Every run of the batcher within this context gets its latency points, on the lanes "points" and "device points"
    of its timeline. They are added when the next run begins, and at the end of the context. The timelines of these runs
    are kept whole, whatever the batcher's option `timeline` says.

    It is made for the batchers of this package. For any other object with a `timeline`, only garbage collections are
    noted."""
    recorder = PointRecorder(batcher)
    undo = contextlib.ExitStack()

    def replace(owner: Any, name: str, value: Any) -> None:
        undo.enter_context(override(owner, name, value))

    def time(owner: Any, name: str, point: str) -> None:
        replace(owner, name, recorder.time_calls(point, getattr(owner, name)))

    if hasattr(batcher, "scheduler"):
        scheduler, kv, device = batcher.scheduler, batcher.kv, batcher.device
        replace(batcher, "_new_timeline", recorder.follow_timeline(batcher._new_timeline))
        undo.callback(recorder.bound_again)
        if batcher.config.host_work_s:
            replace(scheduler, "plan", recorder.note_added_work(scheduler.plan))
        time(scheduler, "_prefill_rows", "admit")
        time(kv, "_grow", "KV allocate")
        time(kv, "prune", "prune")
        for stream, method, point in zip(device.streams, FIRST_COMMANDS, LAUNCHES, strict=True):
            replace(stream, method, recorder.note_begin(point, getattr(stream, method)))
        timing = getattr(device, "device", device)  # within a race checker
        if hasattr(timing, "timed"):  # CUDA's: a batcher with timeline=False launches without timing events
            replace(timing, "timed", True)
        if hasattr(device, "parts"):
            replace(device, "spans", recorder.note_parts(device.spans))
        if batcher.tokenizer is not None:
            replace(batcher, "tokenizer", _TimedTokenizer(batcher.tokenizer, recorder))
    # On the virtual clock a collection takes no time. Nor may the time be asked for just anywhere: commands take effect
    # whenever it is.
    virtual = getattr(getattr(batcher, "config", None), "clock", None) is not None
    on_collection = [] if virtual else [recorder.note_collection]
    gc.callbacks += on_collection
    try:
        yield
    finally:
        for callback in on_collection:
            gc.callbacks.remove(callback)
        recorder.settle()
        undo.close()


@contextlib.contextmanager
def override(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within this context, the method or attribute `name` of this one object is `value`.

    Whether the object has it from its class is not looked up in `vars(owner)`: CPython is slower, for good, with an
    object whose dictionary was once asked for, and these objects are in the hot loop."""
    before, of_class = getattr(owner, name), getattr(type(owner), name, None)
    from_class = of_class is not None and before == of_class.__get__(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if from_class:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


class PointRecorder:
    """Logs calls while the loop runs, and turns them into spans when the run is over.

    In a synchronous loop the device waits for every microsecond between two steps, and code that last ran 2 ms ago is
    in no cache any more. So as little as possible is done there. Whatever the host spans tell later is not noted again:
    which step it was, where a launch ends, what lies between two turns."""

    def __init__(self, batcher: Any):
        self.batcher, self.now = batcher, getattr(batcher.device, "now", perf_counter)
        self.timeline: Timeline = batcher.timeline  # of an earlier run, until the next one begins
        self.bound: int | None = getattr(self.timeline, "most_steps", None)  # lifted while it records
        self.since = self.now()
        self.calls: list[Any] = []  # flat: name, start and end of a call, then those of the next call, and so on
        self.parts: list[Any] = []  # flat: a step's spans on the device and seconds of its parts, or what gives them
        self.collections: list[tuple[Timeline, float, float]] = []
        self._collection_start: float | None = None

    # ---- logging: this runs in the loop ------------------------------------------------------------------------

    def time_calls(self, name: str, function: Callable) -> Callable:
        """`function`, with each call noted as `name`."""
        note, now = self.calls.extend, self.now

        def wrapper(*arguments, **options):
            start = now()
            try:
                return function(*arguments, **options)
            finally:
                note((name, start, now()))

        return wrapper

    def note_begin(self, name: str, function: Callable) -> Callable:
        """`function`, with each call noted as the beginning of `name`, which lasts until the next launch begins or the
        host span ends."""
        note, now = self.calls.extend, self.now

        def wrapper(*arguments):
            note((name, now(), None))
            return function(*arguments)

        return wrapper

    def note_added_work(self, plan: Callable) -> Callable:
        """The scheduler's `plan`; after it, in the same host span, the batcher burns its `host_work_s`."""
        note, now, burnt_s = self.calls.extend, self.now, self.batcher.config.host_work_s

        def wrapper():
            batch = plan()
            if batch is not None:
                start = now()
                note((ADDED, start, start + burnt_s))
            return batch

        return wrapper

    def note_parts(self, spans: Callable) -> Callable:
        """The device's `spans` of a slot; they are asked for after a step, and so are the step's parts."""
        note, parts_of = self.parts.extend, self.batcher.device.parts

        def wrapper(slot: int):
            times = spans(slot)
            note((times, parts_of(slot)))
            return times

        return wrapper

    def note_collection(self, phase: str, _: dict) -> None:
        """A callback for `gc.callbacks`."""
        if phase == "start":
            self._collection_start = self.now()
        elif self._collection_start is not None:
            self.collections.append((self.batcher.timeline, self._collection_start, self.now()))

    # ---- making spans: this runs between two runs --------------------------------------------------------------

    def follow_timeline(self, new_timeline: Callable) -> Callable:
        """The batcher's `new_timeline`; before it the run that is over gets its spans."""

        def wrapper() -> Timeline:
            self.settle()
            self.timeline = new_timeline()
            self.bound, self.timeline.most_steps = self.timeline.most_steps, None
            return self.timeline

        return wrapper

    def bound_again(self) -> None:
        """The batcher may be served for ever without a new run."""
        self.timeline.most_steps = self.bound

    def settle(self) -> None:
        """Add what was logged to the timeline that it belongs to, as spans, and empty the logs."""
        host = _HostSpans(self.timeline)
        for step, start, end in host.between_turns():
            if start >= self.since:
                self.timeline.add(LANE, CALLBACKS, step, start, end)
        calls = sorted(zip(*[iter(self.calls)] * 3, strict=True), key=lambda call: call[1])
        for name, step, start, end in _join_calls(calls, host):
            self.timeline.add(LANE, name, step, start, end)
        self._settle_parts()
        for timeline, collections in itertools.groupby(self.collections, key=lambda collection: collection[0]):
            over = max((span.end for span in timeline.spans), default=0.0)
            for _, start, end in collections:
                if start < over:
                    timeline.add(LANE, GC, host.at(start)[1], start, end)
        for log in (self.calls, self.parts, self.collections):
            log.clear()

    def _settle_parts(self) -> None:
        """The parts of each step on the device: one after the other, from the step's start on."""
        _, steps, starts, _ = self.timeline.lane("compute")
        step_at = dict(zip(starts.tolist(), steps.tolist(), strict=True))
        for spans, parts in zip(*[iter(self.parts)] * 2, strict=True):
            spans, parts = (one() if callable(one) else one for one in (spans, parts))
            start = spans[1][0] if spans else -1.0
            if start not in step_at:  # Ctrl-C came before the step was noted
                continue
            step = step_at[start]
            for name, seconds in zip(PARTS, parts, strict=True):
                if seconds > 0:
                    self.timeline.add(DEVICE_LANE, name, step, start, start + seconds)
                    start += seconds


class _HostSpans:
    """The spans of the host lane, in order of start."""

    def __init__(self, timeline: Timeline):
        self.names, steps, starts, ends = timeline.lane("host")
        self.steps, self.starts, self.ends = steps.tolist(), starts.tolist(), ends.tolist()
        self.launches = [index for index, name in enumerate(self.names) if name == "launch"]
        self.launch_starts = [self.starts[index] for index in self.launches]
        self.without_request = [span for span in timeline.spans if span.name == NO_REQUEST]

    def at(self, moment: float) -> tuple[int | None, int]:
        """(index, step) of the host span at this moment. Between two spans the index is None and the step is that of
        the span before; before all of them it is 0."""
        index = bisect.bisect_right(self.starts, moment) - 1
        if index < 0:
            return None, 0
        return (index if moment <= self.ends[index] else None), self.steps[index]

    def launch_at(self, moment: float) -> int | None:
        """The index of the launch span that this moment belongs to; None where there is none. (On the virtual clock the
        last moment of the launch can also be the first one of the wait.)"""
        launch = bisect.bisect_right(self.launch_starts, moment) - 1
        index = self.launches[launch] if launch >= 0 else None
        return index if index is not None and moment <= self.ends[index] else None

    def between_turns(self) -> Iterator[tuple[int, float, float]]:
        """(step, start, end) of each time between two turns of the loop, which belongs to the caller. A turn begins
        with a plan. Where nothing was there to serve, the times before and after that count."""
        others = [(start, end, NO_REQUEST, -1) for _, _, _, start, end in self.without_request]
        spans = sorted([*zip(self.starts, self.ends, self.names, self.steps, strict=True), *others])
        step = 0
        for (_, end, _, before), (start, _, name, _) in itertools.pairwise(spans):
            step = step if before < 0 else before
            if name in ("plan", NO_REQUEST) and end < start:
                yield step, end, start


def _join_calls(calls: list[tuple[str, float, float | None]], host: _HostSpans) -> list[tuple[str, int, float, float]]:
    """(name, step, start, end) of the pieces that `calls` make: (name, start, end) of each call, in order of start.

    A launch has None as its end: it ends where the next launch begins, or with its host span. Calls of the same kind
    that follow each other within one host span become one piece, from the start of the first and as long as all of them
    together. A call outside all host spans was for no step (a look at the empty queue) and is left out."""
    pieces: list[list[Any]] = []
    last: Any = None
    open_ends: list[float] = []  # of the calls that we are in, outermost first
    for (name, start, end), following in itertools.zip_longest(calls, calls[1:]):
        index = host.at(start)[0] if end is not None else host.launch_at(start)
        if index is None:
            continue
        if end is None:
            is_next = following is not None and host.launch_at(following[1]) == index
            end = following[1] if is_next else host.ends[index]
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        kind = name, index, tuple(open_ends)
        if kind == last:
            pieces[-1][3] += end - start
        else:
            pieces.append([name, host.steps[index], start, end])
        last = kind
        open_ends.append(end)
    return [tuple(piece) for piece in pieces]


class _TimedTokenizer:
    """The caller's tokenizer with a `decode` that is timed. The caller's own object is not touched."""

    def __init__(self, tokenizer: Any, recorder: PointRecorder):
        self._tokenizer, self.decode = tokenizer, recorder.time_calls("detokenize", tokenizer.decode)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

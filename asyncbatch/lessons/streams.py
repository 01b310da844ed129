"""Notebook 02: a small device to try streams on, pictures of what it did, what was measured on a GPU, the exercises."""

from __future__ import annotations

import contextlib
import ctypes
import io
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from .. import explore, plot, races, streams
from ..virtual import Costs, VirtualDevice
from .parts import Case, Exercise, slider, with_widget

# ---- the lab: a device whose step multiplies by 6 --------------------------------------------------------------------

COMMANDS = {"copy_in": "H2D", "step": "compute", "copy_out": "D2H"}  # and the stream that each is meant for
EVENTS = ("inputs_ready", "step_done", "outputs_ready")  # of a slot: the end of its command on each stream
MS = {"copy_in": 10.0, "step": 40.0, "copy_out": 10.0}
HOST_MS = {"fill": 2.0, "launch": 1.0}  # on the virtual clock; elsewhere they take what they take


class LabProgram:
    """What the lab's device runs. "copy_in" brings a slot's number to the device, "step" multiplies it by 6, "copy_out"
    brings the result to the host. Each takes its time first and has its effect at its end, as on the virtual clock."""

    def __init__(self, model, *, host, ms):
        where = torch.device("cpu") if model is None else next(model.parameters()).device
        self.host, self.ms = host, ms
        self.inputs = [torch.zeros(1, dtype=torch.int64, device=where) for _ in host]
        self.results = [torch.zeros(1, dtype=torch.int64, device=where) for _ in host]
        self.spend = _spend_on_gpu() if where.type == "cuda" else lambda ms: time.sleep(1e-3 * ms)

    def run(self, command: str, slot: int) -> None:
        self.spend(self.ms.get(command, 0.0))
        given, returned = self.host[slot]
        if command == "copy_in":
            self.inputs[slot].copy_(given, non_blocking=True)
        elif command == "step":
            torch.mul(self.inputs[slot], 6, out=self.results[slot])
        else:
            returned.copy_(self.results[slot], non_blocking=True)


def _spend_on_gpu() -> Callable[[float], None]:
    """A function that keeps the current CUDA stream, and no more than a corner of the GPU, busy for milliseconds."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(1000)  # the first launch loads the kernel
    start.record()
    torch.cuda._sleep(10_000_000)
    end.record()
    end.synchronize()
    per_ms = 10_000_000 / start.elapsed_time(end)
    return lambda ms: torch.cuda._sleep(int(per_ms * ms)) if ms else None


@cache
def _owner(where: str) -> torch.nn.Module:
    """A device belongs to a model: the smallest one there is. It computes nothing."""
    return torch.nn.Linear(1, 1).to(where)


_OPEN: list[tuple[weakref.ref[Lab], Any]] = []  # labs on a real device, and their devices


def _close_unused() -> None:
    """Close the devices of labs that nobody has any more: a notebook's cells are run again and again. (Not by
    `weakref.finalize`, which may come in the middle of another call to the device.)"""
    for entry in list(_OPEN):
        lab, device = entry
        if lab() is None:
            _OPEN.remove(entry)
            device.close()


class Call(NamedTuple):
    """Something that the host did, in its order. kind: "launch", "record", "wait", "synchronize", "fill", "read" or
    "work". lane: the stream it went to, or "host". what: the command, the event, or what was read. start, end:
    seconds of the host's clock. span: when the device did it, where that is known at once: on the virtual clock."""

    kind: str
    lane: str
    what: Any
    slot: int | None
    start: float
    end: float
    span: tuple[float, float] | None = None


class LabEvent:
    def __init__(self, lab: Lab, name: str):
        self.lab, self.name, self.event = lab, name, lab.device.event()

    def synchronize(self) -> None:
        with self.lab.noting("synchronize", "host", self):
            self.event.synchronize()

    def query(self) -> bool:
        return self.event.query()


class LabStream:
    def __init__(self, lab: Lab, stream: Any):
        self.lab, self.stream, self.name = lab, stream, stream.name

    def launch(self, command: str, slot: int) -> None:
        if command not in COMMANDS:
            raise ValueError(f"there is no command {command!r}: there are {', '.join(COMMANDS)}")
        with self.lab.noting("launch", self.name, command, slot):
            self.stream.launch(command, slot)
        if self.lab.device.clock == "virtual":
            end = self.stream.time
            self.lab.calls[-1] = self.lab.calls[-1]._replace(span=(end - 1e-3 * self.lab.ms[command], end))

    def record_event(self, event: LabEvent) -> None:
        with self.lab.noting("record", self.name, event):
            self.stream.record_event(event.event)

    def wait_event(self, event: LabEvent) -> None:
        with self.lab.noting("wait", self.name, event):
            self.stream.wait_event(event.event)

    def synchronize(self) -> None:
        with self.lab.noting("synchronize", "host", self):
            self.stream.synchronize()

    def query(self) -> bool:
        return self.stream.query()


@dataclass(frozen=True)
class LabSlot:
    """As `asyncbatch.slot.Slot`: a number, the name of the step to launch, and the three events of a step."""

    index: int
    inputs_ready: Any
    step_done: Any
    outputs_ready: Any
    command: str = "step"


def _slot(index: int, event: Callable[[str], Any]) -> LabSlot:
    return LabSlot(index, *(event(f"slot {index}'s {name}") for name in EVENTS))


class Lab:
    """A device with three streams and some slots, on which every call of the host is noted down.

    where: "virtual" (exact times, nothing waits), "cpu" (a second process is the device) or "cuda".
    ms: milliseconds of the three commands, where they differ from `MS`.
    """

    def __init__(self, where: str = "virtual", num_slots: int = 3, ms: Mapping[str, float] | None = None):
        self.ms = {**MS, **(ms or {})}
        host = [tuple(torch.zeros(1, dtype=torch.int64) for _ in range(2)) for _ in range(num_slots)]
        if where == "virtual":
            cost = lambda work: 1e-3 * self.ms[work.kind]  # noqa: E731
            program = LabProgram(None, host=host, ms={})
            self.device: Any = VirtualDevice(program, num_slots, Costs(copy_in=cost, step=cost, copy_out=cost))
        elif where in ("cpu", "cuda"):
            host = [tuple(t.pin_memory() if where == "cuda" else t.share_memory_() for t in pair) for pair in host]
            self.device = streams.open_device(_owner(where), LabProgram, num_slots, host=host, ms=self.ms)
            _close_unused()
            _OPEN.append((weakref.ref(self), self.device))
        else:
            raise ValueError(f"a Lab is on 'virtual', 'cpu' or 'cuda', not on {where!r}")
        self.host = host
        self.calls: list[Call] = []
        self.streams = tuple(LabStream(self, stream) for stream in self.device.streams)
        self.slots = [_slot(index, self.event) for index in range(num_slots)]
        if where == "cuda":
            for stream, command in zip(self.streams, COMMANDS, strict=True):
                stream.launch(command, 0)  # the first time kernels are loaded, and that can make anybody wait
                stream.synchronize()
            self.calls.clear()

    def event(self, name: str = "event") -> LabEvent:
        return LabEvent(self, name)

    @contextlib.contextmanager
    def noting(self, kind: str, lane: str, what: Any = None, slot: int | None = None) -> Iterator[None]:
        """Do something and note it; on the virtual clock it costs what `HOST_MS` says, before it has its effect."""
        start = self.device.now()
        if self.device.clock == "virtual":
            self.device.work(1e-3 * HOST_MS.get(kind, 0.0))
        yield
        self.calls.append(Call(kind, lane, what, slot, start, self.device.now()))

    def fill(self, slot: LabSlot, number: int) -> None:
        """The host writes a number into a slot's host inputs."""
        with self.noting("fill", "host", number, slot.index):
            self.host[slot.index][0].fill_(number)

    def read(self, slot: LabSlot) -> int:
        """The host looks at a slot's output, whatever lies there. It waits for nothing."""
        now = self.device.now()
        number = int(self.host[slot.index][1])
        self.calls.append(Call("read", "host", number, slot.index, now, now))
        return number

    def work(self, ms: float) -> None:
        """The host is busy with something else."""
        with self.noting("work", "host"):
            self.device.work(1e-3 * ms) if self.device.clock == "virtual" else time.sleep(1e-3 * ms)

    def spans(self) -> dict[tuple[str, int], tuple[str, float, float]]:
        """For each (command, slot) that was launched, newest only: its stream, start and end in seconds. Waits until
        all are done."""
        for stream in self.device.streams:
            stream.synchronize()
        spans = {}
        for call in self.calls:
            if call.kind == "launch" and call.slot is not None:
                start, end = call.span or self._newest(streams.STREAMS.index(call.lane), call.slot)
                spans[call.what, call.slot] = call.lane, start, end
        return spans

    def _newest(self, number: int, slot: int) -> tuple[float, float]:
        """Start and end of a slot's newest command on a stream. On CUDA not by `spans`: that wants all three streams to
        have been used, and is made to be asked once a step."""
        if self.device.clock != "cuda":
            start, end = self.device.spans(slot)[number].tolist()
        else:
            events = self.device.timing[slot][number]
            start, end = (self.device.origin + 1e-3 * self.device.origin_event.elapsed_time(e) for e in events)
        return start, end

    @property
    def total_ms(self) -> float:
        """From the host's first call to the end of all that it launched and waited for."""
        ends = [end for _, _, end in self.spans().values()]
        return 1e3 * (max(ends + [call.end for call in self.calls]) - self.calls[0].start)

    def waited_ms(self, calls: Sequence[Call] | None = None) -> float:
        """How long the host waited for the device, in all calls or in these."""
        chosen = self.calls if calls is None else calls
        return 1e3 * sum(call.end - call.start for call in chosen if call.kind == "synchronize")


def serve(lab: Any, launch: Callable[[Any, Any], Any], numbers: Sequence[int]) -> list[Any]:
    """The asynchronous loop in small: batches go out as long as there is a free slot, and then the oldest one is waited
    for. One number is a batch. Returns what was read for each."""
    slots, read = lab.slots, []
    for batch, number in enumerate(numbers):
        slot = slots[batch % len(slots)]
        if batch >= len(slots):
            slot.outputs_ready.synchronize()
            read.append(lab.read(slot))
        lab.fill(slot, number)
        if launch(lab.streams, slot) is ...:
            raise NotImplementedError
    for batch in range(len(read), len(numbers)):
        slots[batch % len(slots)].outputs_ready.synchronize()
        read.append(lab.read(slots[batch % len(slots)]))
    return read


# ---- the same lab, in every order ------------------------------------------------------------------------------------


class ExploredLab:
    """What a `Lab` is, within a program for `explore`: there nothing runs, and all orders are tried."""

    def __init__(self, program: explore.Program, num_slots: int, num_batches: int):
        self.program, self.one = program, num_batches == 1
        self.batch_in = [0] * num_slots
        self.batches = 0
        self.streams = tuple(ExploredStream(self, program.stream(lane)) for lane in COMMANDS.values())
        self.slots = [_slot(index, program.event) for index in range(num_slots)]
        if self.one:  # then the checker can say which event is missing where
            for lane, name in zip(COMMANDS.values(), EVENTS, strict=True):
                mark = getattr(self.slots[0], name).mark
                mark.name, mark.meant_for = name, (lane, None)
        program.cells.update({self.cell(name, slot.index): 0 for slot in self.slots for name in CELLS})
        program.cells.update({self.name("tokens", batch): 0 for batch in range(num_batches)})

    def name(self, what: str, number: int) -> str:
        return what if self.one else f"{what} {number}"

    def cell(self, name: str, slot: int) -> str:
        return name if self.one else CELLS[name].format(slot)

    def do(self, lane: Any, command: str, slot: int, source: str | None, target: str, change: Callable) -> None:
        name = self.name(command, self.batch_in[slot])
        effect = lambda cells: cells.update({target: change(cells[source] if source else None)})  # noqa: E731
        lane.do(name, effect, reads=source or (), writes=target)

    def fill(self, slot: LabSlot, number: int) -> None:
        self.batch_in[slot.index], self.batches = self.batches, self.batches + 1
        self.do(self.program.host, "fill", slot.index, None, self.cell("inputs", slot.index), lambda _: number)

    def work(self, ms: float) -> None:
        """Nothing here: no order depends on times."""

    def read(self, slot: LabSlot) -> None:
        tokens = self.name("tokens", self.batch_in[slot.index])
        self.do(self.program.host, "read", slot.index, self.cell("output", slot.index), tokens, lambda value: value)


CELLS = {  # short names for one batch, and the names that the race checker of a batcher uses
    "inputs": "slot {}'s host inputs",
    "device": "slot {}'s device inputs",
    "result": "slot {}'s output ids on the device",
    "output": "slot {}'s output ids on the host",
}
EFFECTS = {"copy_in": ("inputs", "device", 1), "step": ("device", "result", 6), "copy_out": ("result", "output", 1)}


class ExploredStream:
    def __init__(self, lab: ExploredLab, stream: explore.Stream):
        self.lab, self.stream, self.name = lab, stream, stream.name
        self.record_event, self.wait_event, self.synchronize = stream.record, stream.wait, stream.synchronize

    def launch(self, command: str, slot: int) -> None:
        source, target, factor = EFFECTS[command]
        cells = self.lab.cell(source, slot), self.lab.cell(target, slot)
        self.lab.do(self.stream, command, slot, *cells, lambda value: value * factor)


def program(launch: Callable[[Any, Any], Any], numbers: Sequence[int] = (7,), num_slots: int = 1, loop: Any = serve):
    """The program for `explore` that serves one batch for each number, with `launch(streams, slot)` for each."""
    return lambda p: loop(ExploredLab(p, num_slots, len(numbers)), launch, numbers)


# ---- pictures of a lab -----------------------------------------------------------------------------------------------

LANES = ("host", *COMMANDS.values())
LOOKS = {  # face colour, colour of the text, words
    "fill": (plot.COLORS["orange"], "black", "fill"),
    "work": (plot.COLORS["orange"], "black", "other work"),
    "launch": ("#F8D999", "black", "launch"),
    "synchronize": ("#EEEEEE", "#444444", "wait"),
    "copy_in": (plot.COLORS["sky"], "black", "copy in"),
    "step": (plot.COLORS["blue"], "white", "step"),
    "copy_out": (plot.COLORS["green"], "white", "copy out"),
}
LEGEND = {"host works": "fill", "host launches": "launch", "host waits": "synchronize"} | {
    LOOKS[command][2]: command for command in COMMANDS
}
WIDTH, LEFT, ROW, LAB_ROWS = 10.0, 0.85, 0.27, 6.0  # inches; rows of one lab
DOTS = {"hatch": "....", "edgecolor": "#C4C4C4"}  # of waiting


def draw(labs: Mapping[str, Lab], right: Sequence[int] = ()) -> plot.Picture:
    """What host and streams did in each lab, the labs above each other on one time axis. Arrows: from a mark to what
    waited for it. right: what should have been read from each slot; then each read is called right or wrong."""
    height = ROW * LAB_ROWS * len(labs) + 0.75
    figure = Figure((WIDTH, height), facecolor="white")
    axes = figure.add_axes((LEFT / WIDTH, 0.7 / height, 1 - (LEFT + 0.15) / WIDTH, 1 - 0.72 / height))
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("milliseconds since the host began", fontsize=8)
    end = max(lab.total_ms for lab in labs.values())
    axes.set(xlim=(-0.006 * end, 1.03 * end), ylim=(LAB_ROWS * len(labs) - 0.2, -0.1), yticks=[])
    looks = {words: DOTS if kind == "synchronize" else {"linewidth": 0} for words, kind in LEGEND.items()}
    patches = [Patch(facecolor=LOOKS[kind][0], label=words, **looks[words]) for words, kind in LEGEND.items()]  # type: ignore[arg-type]
    figure.legend(handles=patches, loc="lower center", ncols=len(patches), frameon=False, fontsize=8)
    captions = []
    for number, (name, lab) in enumerate(labs.items()):
        exact = lab.device.clock == "virtual"
        captions.append(f"{name}: {lab.total_ms:.4g} ms in all" if exact else name)
        what = f"{captions[-1]} (virtual clock)" if exact else f"{name} (measured, {lab.device.clock} clock)"
        _Lanes(axes, number * LAB_ROWS, end).draw(lab, what, right)
    return plot.Picture(figure, "; ".join(captions), axes)


class _Lanes:
    """The four lanes of one lab, drawn from row `top` on; `end`: milliseconds on the axis."""

    def __init__(self, axes: Any, top: float, end: float):
        self.axes, self.top, self.end = axes, top, end

    def draw(self, lab: Lab, caption: str, right: Sequence[int]) -> None:
        origin, spans = lab.calls[0].start, lab.spans()
        first = self.top + (1.6 if any(call.kind == "read" for call in lab.calls) else 1.1)
        self.rows = {lane: first + number for number, lane in enumerate(LANES)}
        since = lambda seconds: 1e3 * (seconds - origin)  # noqa: E731
        self.text(0, self.top + 0.5, caption, ha="left", fontsize=10, fontweight="bold")
        for lane, y in self.rows.items():
            where = {"transform": self.axes.get_yaxis_transform(), "ha": "right", "va": "center", "fontsize": 9}
            self.axes.text(-0.012, y + 0.5, lane, **where)
            self.axes.axhline(y + 0.5, color="#DDDDDD", linewidth=0.6, zorder=0)
        for (command, slot), (lane, start, end) in spans.items():
            self.box(since(start), since(end), lane, command, f"{LOOKS[command][2]} {slot}")
        for call in lab.calls:
            if call.kind == "read":
                self.read(since(call.start), call, right)
            elif call.kind in LOOKS:
                label = f"fill {call.slot}" if call.kind == "fill" else LOOKS[call.kind][2]
                self.box(since(call.start), since(call.end), "host", call.kind, label)
        for (lane, start), (other, end) in _arrows(lab, spans):
            self.arrow((since(start), lane), (since(end), other))

    def text(self, x: float, y: float, text: str, **options: Any) -> None:
        look = {"ha": "center", "va": "center", "fontsize": 8, "parse_math": False, "zorder": 6}
        self.axes.text(x, y, text, **{**look, **options})

    def box(self, start: float, end: float, lane: str, kind: str, label: str) -> None:
        """A box from start to end, with its label, or the label's last word, where that fits."""
        face, ink, _ = LOOKS[kind]
        width = max(end - start, 0.0015 * self.end)
        edge = DOTS if kind == "synchronize" else {"edgecolor": "white"}
        box = Rectangle((start, self.rows[lane] + 0.1), width, 0.8, facecolor=face, linewidth=0.6, **edge)
        self.axes.add_artist(box)  # add_patch would look at the limits of the axes each time, which are set
        room = (WIDTH - LEFT) * 72 * width / self.end  # points
        texts = [label, label.split()[-1]] if lane != "host" else [label]
        if text := next((text for text in texts if room > 4.6 * len(text) + 3), ""):
            rim = {"path_effects": [withStroke(linewidth=2.5, foreground=face)]} if kind == "synchronize" else {}
            self.text(start + width / 2, self.rows[lane] + 0.5, text, color=ink, **rim)

    def read(self, moment: float, call: Call, right: Sequence[int]) -> None:
        verdict, look = "", {}
        if right and call.slot is not None:
            verdict = " right" if call.what == right[call.slot] else " WRONG"
        if verdict == " WRONG":
            look = {"color": plot.COLORS["vermillion"], "fontweight": "bold"}
        # Reads that follow each other closely get their texts at two heights.
        near = abs(moment - getattr(self, "last_read", -self.end)) < 0.08 * self.end and not getattr(self, "up", False)
        self.last_read, self.up = moment, near
        y = self.rows["host"] - (0.62 if near else 0.22)
        self.text(moment, y, f"{call.what}{verdict}", fontsize=7.5, **look)
        self.axes.plot([moment], [self.rows["host"] + 0.12], "v", markersize=4, color="black", zorder=6)

    def arrow(self, start: tuple[float, str], end: tuple[float, str]) -> None:
        points = [(moment, self.rows[lane] + 0.5) for moment, lane in (start, end)]
        look = {"arrowstyle": "-|>", "mutation_scale": 8, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.1, "zorder": 5}
        self.axes.add_artist(FancyArrowPatch(*points, color="black", **look))


def _arrows(lab: Lab, spans: Mapping) -> list[tuple[tuple[str, float], tuple[str, float]]]:
    """For each event that another lane waited for: where the work before its mark ended, where what waited began."""
    newest: dict[str, float] = {}  # lane: the end of what was launched last
    marks: dict[Any, tuple[str, float]] = {}
    waiting: dict[str, list[tuple[str, float]]] = {lane: [] for lane in LANES}
    arrows = []
    for call in lab.calls:
        if call.kind == "launch":
            _, start, newest[call.lane] = spans[call.what, call.slot]
            arrows += [(mark, (call.lane, start)) for mark in waiting[call.lane]]
            waiting[call.lane] = []
        elif call.kind == "record" and call.lane in newest:
            marks[call.what] = call.lane, newest[call.lane]
        elif call.kind == "wait" and call.what in marks and marks[call.what][0] != call.lane:
            waiting[call.lane].append(marks[call.what])
        elif call.kind == "synchronize" and call.what in marks:
            arrows.append((marks[call.what], ("host", call.end)))
    return arrows


# ---- right by luck ---------------------------------------------------------------------------------------------------


def serve_without_waiting(lab: Any, launch: Callable[[Any, Any], Any], numbers: Sequence[int], host_ms: float = 0.0):
    """`serve`, but nobody waits: a batch is read after the host has launched the next one and done other work."""
    read = []
    for batch, number in enumerate(numbers):
        lab.fill(lab.slots[batch], number)
        launch(lab.streams, lab.slots[batch])
        lab.work(host_ms)
        if batch:
            read.append(lab.read(lab.slots[batch - 1]))
    lab.work(host_ms)
    return [*read, lab.read(lab.slots[len(numbers) - 1])]


class Luck(plot.Picture):
    """Four batches that are read without waiting. The host's other work after each launch and the length of a step are
    two sliders in a notebook; they decide whether what is read is right."""

    numbers, right = (7, 8, 9, 10), (42, 48, 54, 60)

    def __init__(self, host_ms: float, step_ms: float) -> None:
        self.host_ms, self.step_ms = host_ms, step_ms
        self._update()

    def _update(self) -> None:
        lab = Lab("virtual", 4, {"step": self.step_ms})
        self.read = serve_without_waiting(lab, streams.launch_step, self.numbers, self.host_ms)
        name = f"host busy for {self.host_ms:g} ms, a step takes {self.step_ms:g} ms"
        picture = draw({name: lab}, self.right)
        super().__init__(picture.figure, f"{name}: read {self.read}", picture.axes)

    def _live_png(self) -> bytes:
        """As `png`, but soon done: it follows a slider."""
        canvas, file = FigureCanvasAgg(self.figure), io.BytesIO()
        canvas.draw()
        Image.fromarray(np.asarray(canvas.buffer_rgba())).save(file, "png", compress_level=1)
        return file.getvalue()

    @cached_property
    def widget(self) -> Any:
        """Two sliders, each with a box to type into, above the picture."""
        import ipywidgets

        image = ipywidgets.Image(value=self._live_png(), format="png", layout=ipywidgets.Layout(max_width="100%"))

        def control(name: str, label: str, lowest: float, highest: float) -> Any:
            def moved(value: float) -> None:
                setattr(self, name, value)
                self._update()
                image.value = self._live_png()

            return slider(label, getattr(self, name), lowest, highest, moved, step=1.0)

        host, step = control("host_ms", "host, ms", 0.0, 100.0), control("step_ms", "step, ms", 1.0, 100.0)
        return ipywidgets.VBox([host, step, image])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return with_widget(self, super()._repr_mimebundle_())


# ---- what was measured on a GPU --------------------------------------------------------------------------------------

# Measured by this project for its plan, 2026-11, on one NVIDIA H100 with torch 2.11.0+cu130 (its notes: "Streams,
# measured on an H100"). `measure_copies` and `measure_default_stream` do the same on the reader's GPU.
RECORDED_ON = "recorded on an NVIDIA H100, torch 2.11, 2026-11"


class CopyTime(NamedTuple):
    """256 MiB. host_ms: until the call returned. done_ms: until the copy was done; None: not noted."""

    name: str
    host_ms: float
    done_ms: float | None = None


RECORDED_COPIES = (
    CopyTime("pinned, host to device", 0.02, 4.9),
    CopyTime("pinned, device to host", 0.09),
    CopyTime("pageable, host to device", 12.0),
    CopyTime("pageable, device to host", 238.0),
)
# (work here, does not start before earlier work there): whether that was so.
RECORDED_DEFAULT_STREAM = {
    ("default stream", "torch.cuda.Stream()"): False,
    ("torch.cuda.Stream()", "default stream"): False,
    ("default stream", "cudaStreamCreate"): True,
    ("cudaStreamCreate", "default stream"): True,
}
# PyTorch's own checker, TORCH_CUDA_SANITIZER=1, reports a missing wait between two streams on device tensors. It sees
# neither host buffers nor what a graph replay does. So of these faults (`asyncbatch.faults`) it can see:
SANITIZER = {
    "a step does not wait for its inputs": "yes, outside of graphs",
    "the copy out does not wait for the step": "yes, outside of graphs",
    "the host does not wait for the output": "no, host memory",
    "one host buffer for all slots": "no, host memory",
}


def measure_copies(mib: int = 256) -> tuple[CopyTime, ...]:
    """What `RECORDED_COPIES` has, on this machine's GPU. Every copy is asked for with non_blocking=True."""
    there = torch.zeros(mib << 20, dtype=torch.uint8, device="cuda")
    found = []
    for kind in ("pinned", "pageable"):
        here = torch.zeros(mib << 20, dtype=torch.uint8, pin_memory=kind == "pinned")
        for name, target, source in (("host to device", there, here), ("device to host", here, there)):
            torch.cuda.synchronize()
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            back = time.perf_counter()
            torch.cuda.synchronize()
            found.append(CopyTime(f"{kind}, {name}", 1e3 * (back - start), 1e3 * (time.perf_counter() - start)))
    return tuple(sorted(found, key=lambda copy: [other.name for other in RECORDED_COPIES].index(copy.name)))


def measure_default_stream() -> dict[tuple[str, str], bool]:
    """What `RECORDED_DEFAULT_STREAM` has, on this machine's GPU: long work there, then short work here, and a look at
    whether the short work is done while the long work is not."""
    made = ctypes.c_void_p()
    torch.cuda.check_error(torch.cuda.cudart().cudaStreamCreate(ctypes.addressof(made)))
    kinds = {
        "default stream": torch.cuda.default_stream(),
        "torch.cuda.Stream()": torch.cuda.Stream(),
        "cudaStreamCreate": torch.cuda.ExternalStream(made.value),  # type: ignore[arg-type]
    }
    spend, small = _spend_on_gpu(), torch.zeros(1, device="cuda")

    def waits(here: torch.cuda.Stream, there: torch.cuda.Stream) -> bool:
        torch.cuda.synchronize()
        with torch.cuda.stream(there):
            spend(100.0)
        with torch.cuda.stream(here):
            small.add_(1)
            done = here.record_event()
        time.sleep(0.02)
        early = done.query()
        torch.cuda.synchronize()
        return not early

    waits(*[kinds["torch.cuda.Stream()"]] * 2)  # the first launch of a kernel loads it, and can wait for the device
    return {pair: waits(*(kinds[name] for name in pair)) for pair in RECORDED_DEFAULT_STREAM}


def draw_copies(copies: Sequence[CopyTime], where: str) -> plot.Picture:
    """How long the host was away in each call, on a logarithmic axis."""
    picture = plot.figure(8, 2.6, f"256 MiB, non_blocking=True: when is the host back?\n{where}")
    picture.title = where
    axes: Any = picture.axes
    for row, (_, host_ms, done_ms) in enumerate(copies):
        blocked = host_ms > 1
        look = {"color": plot.COLORS["vermillion"], "hatch": "///"} if blocked else {"color": plot.COLORS["sky"]}
        axes.barh(row, host_ms - 0.005, left=0.005, height=0.6, edgecolor="white", **look)
        after = f"{host_ms:.2g} ms" if host_ms < 10 else f"{host_ms:.0f} ms"
        axes.text(
            1.15 * host_ms,
            row,
            f"after {after}: the host waited" if blocked else f"after {after}",
            va="center",
            fontsize=9,
        )
        if done_ms is not None and done_ms > 2 * host_ms:
            axes.plot([done_ms], [row], "D", color="black", markersize=5)
            axes.text(1.2 * done_ms, row, f"the copy is done: {done_ms:.2g} ms", va="center", fontsize=9)
    axes.set(xscale="log", xlim=(0.005, 60000), yticks=range(len(copies)), ylim=(len(copies) - 0.4, -0.6))
    axes.set_yticklabels([copy.name for copy in copies], fontsize=9)
    axes.set_xticks([0.01, 0.1, 1, 10, 100, 1000], ["0.01", "0.1", "1", "10", "100", "1000"])
    axes.minorticks_off()
    axes.set_xlabel("milliseconds until the call returned, logarithmic", fontsize=9)
    return picture


def draw_default_stream(found: Mapping[tuple[str, str], bool], where: str) -> plot.Picture:
    """Long work on a stream, then short work on the default stream: what is often written, and what was found."""
    picture = plot.figure(8, 2.9, "Long work on a stream, then short work on the default stream")
    axes: Any = picture.axes
    panels = [("often written", "any stream", True)]
    panels += [(where, there, waits) for (here, there), waits in found.items() if here == "default stream"]
    for number, (source, there, waits) in enumerate(panels):
        top = 3.1 * number
        axes.text(0, top + 0.5, source, fontsize=9, fontweight="bold", va="center", parse_math=False)
        for row, (name, start, length, color) in enumerate(
            ((there, 1.0, 6.0, "blue"), ("default stream", 7.0 if waits else 1.4, 1.4, "orange"))
        ):
            y = top + 0.95 + row
            axes.text(-0.1, y + 0.45, name, fontsize=9, ha="right", va="center", parse_math=False)
            axes.axhline(y + 0.45, color="#DDDDDD", linewidth=0.6, zorder=0)
            axes.add_patch(Rectangle((start, y), length, 0.9, facecolor=plot.COLORS[color], edgecolor="white"))
            ink = "white" if color == "blue" else "black"
            axes.text(
                start + length / 2,
                y + 0.45,
                "long" if row == 0 else "short",
                color=ink,
                ha="center",
                va="center",
                fontsize=8,
            )
        axes.text(8.7, top + 1.9, "it waits" if waits else "it does NOT wait", va="center", fontsize=9)
    axes.set(xlim=(0, 10.5), ylim=(3.1 * len(panels), 0), yticks=[], xticks=[])
    axes.set_xlabel("time, not to scale", fontsize=9)
    axes.spines[["left"]].set_visible(False)
    return picture


def who_finds(seeds: int = 5) -> dict[str, tuple[int, int]]:
    """Put the faults of `SANITIZER` into the asynchronous batcher, `seeds` times each, and print who finds them. Gives
    in how many runs tokens were wrong, and in how many the race checker found the fault."""
    from .. import faults  # it brings transformers, which the device's process does not need

    model, found = faults.carrier(), {}
    print(f"{'runs of ' + str(seeds) + ' in which':41}  wrong tokens  race checker  CUDA sanitizer can")
    for fault in faults.FAULTS:
        if fault.name in SANITIZER:
            tokens = sum(bool(faults.trial(fault, seed, check_races=False, model=model).by) for seed in range(seeds))
            checker = sum(faults.trial(fault, seed, model=model).by == "checker" for seed in range(seeds))
            found[fault.name] = tokens, checker
            print(f"{fault.name:41}  {tokens:12}  {checker:12}  {SANITIZER[fault.name]}")
    return found


def draw_clock(
    clock: Mapping[str, int], kind: str, earlier: Sequence[races.Use], found: Sequence[races.Use]
) -> plot.Picture:
    """A vector clock as a front across the lanes: what it counts is surely done. The operations that used the resource
    before are marked R or W; those in `found` are called races."""
    longest = max([*clock.values(), *(use.number for use in earlier)]) + 1
    picture = plot.figure(8, 0.36 * len(clock) + 0.9, f"The new operation {kind}. What surely comes before it?")
    axes: Any = picture.axes
    for row, (lane, count) in enumerate(clock.items()):
        axes.text(0.85, row + 0.5, lane, ha="right", va="center", fontsize=9)
        for number in range(1, longest + 1):
            done = number <= count
            use = next((use for use in earlier if (use.lane, use.number) == (lane, number)), None)
            face = plot.COLORS["sky"] if done else "white"
            line = {"edgecolor": "#888888", "linewidth": 0.8, "linestyle": "-" if done else ":"}
            axes.add_patch(Rectangle((number, row + 0.1), 0.92, 0.8, facecolor=face, **line))
            text = str(number) if use is None else f"{number} {use.kind}"
            axes.text(
                number + 0.46,
                row + 0.5,
                text,
                ha="center",
                va="center",
                fontsize=8,
                fontweight="bold" if use else "normal",
            )
            if use is not None and use in found:
                edge = {"edgecolor": plot.COLORS["vermillion"], "linewidth": 2.5, "fill": False}
                axes.add_patch(Rectangle((number, row + 0.1), 0.92, 0.8, zorder=4, **edge))
                axes.text(longest + 1.1, row + 0.5, f"race with {lane} {number}", va="center", fontsize=9)
        axes.plot([count + 0.96] * 2, [row, row + 1], color="black", linewidth=2.5)
    axes.set(xlim=(1, longest + 2.3), ylim=(len(clock), 0), yticks=[], xticks=[])
    axes.set_xlabel("operations of each lane; left of the black line: surely done", fontsize=9)
    axes.spines[:].set_visible(False)
    return picture


# ---- the exercises ---------------------------------------------------------------------------------------------------


class Verdict:
    """How a way to launch steps did. outcomes: how many are possible, over all orders. tokens: what was read on the
    virtual clock. waited_ms: how long the host waited within the launches. copied_ms, total_ms: when all batches were
    copied in, and when all was done."""

    def __init__(self, launch: Callable[[Any, Any], Any], numbers: Sequence[int]):
        found = explore.explore(program(launch, numbers, min(2, len(numbers))))
        self.outcomes, self.race = len(found), next((str(race) for race in found.races), "")
        self.lab, self.inside = Lab("virtual", len(numbers)), list[Call]()  # calls within launches

        def noted(lanes: Any, slot: LabSlot) -> Any:
            first = len(self.lab.calls)
            returned = launch(lanes, slot)
            self.inside += self.lab.calls[first:]
            return returned

        self.tokens = serve(self.lab, noted, numbers)
        self.right = self.tokens == [6 * number for number in numbers]
        copies = [end for (command, _), (_, _, end) in self.lab.spans().items() if command == "copy_in"]
        self.copied_ms = round(1e3 * (max(copies, default=0.0) - self.lab.calls[0].start), 6)
        self.waited_ms, self.total_ms = round(self.lab.waited_ms(self.inside), 6), round(self.lab.total_ms, 6)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Verdict) and self._key == other._key

    @property
    def _key(self) -> tuple:
        return self.outcomes, self.right, self.waited_ms, self.copied_ms, self.total_ms

    def __repr__(self) -> str:
        if self.outcomes > 1:
            return f"{self.outcomes} possible outcomes"
        if not self.right:
            return f"1 possible outcome, tokens {self.tokens}"
        times = f"1 possible outcome: all copied in after {self.copied_ms:g} ms, all done after {self.total_ms:g} ms"
        return times + (f", the host waiting for {self.waited_ms:g} ms" if self.waited_ms else "")


def with_order(order: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A launch in which `order` puts the step after its copy in."""

    def launch(lanes: Any, slot: LabSlot) -> Any:
        h2d, compute, d2h = lanes
        h2d.launch("copy_in", slot.index)
        returned = order(h2d, compute, slot.inputs_ready)
        compute.launch("step", slot.index)
        streams.order(compute, d2h, slot.step_done)
        d2h.launch("copy_out", slot.index)
        d2h.record_event(slot.outputs_ready)
        return returned

    return launch


def _explain_order(args: tuple[Any, ...], got: Any, want: Any) -> str | None:
    lab_calls = got.inside
    first, last = (next(i for i, call in enumerate(lab_calls) if call.what == what) for what in ("copy_in", "step"))
    calls = [(call.kind, call.lane) for call in lab_calls[first + 1 : last]]
    kinds = [kind for kind, _ in calls]
    if got.outcomes > 1 and not calls:
        return "You asked for nothing, so the step may start while its copy is still under way."
    if got.outcomes > 1 and "record" not in kinds:
        return (
            "You wait for an event that nobody has recorded: there is no mark yet, and such a wait waits for nothing."
        )
    if got.outcomes > 1 and "wait" not in kinds:
        return "The mark is there, but nobody waits for it. `later` has to be told: `later.wait_event(event)`."
    if got.outcomes > 1 and ("record", "compute") in calls:
        return (
            "You record the event in `later`, so `later` waits for itself, and for nothing else. The mark belongs "
            "behind the work that comes first."
        )
    if got.outcomes > 1 and ("wait", "H2D") in calls:
        return "The wrong stream waits. `earlier` need not wait for anybody; `later` is the one to hold back."
    if got.outcomes > 1 and kinds.index("wait") < kinds.index("record"):
        return (
            "You wait before you record. A wait means the newest mark at the time of the call, and then your mark was "
            "not there yet. The order of the two lines counts."
        )
    if got.outcomes == 1 and got.right:
        return _explain_too_much(got, want)
    return got.race or None


def _explain_too_much(got: Verdict, want: Verdict) -> str:
    if got.waited_ms:
        return (
            f"The results are right, but the host stands still: it waits for {got.waited_ms:g} ms in your function, "
            "and could have filled the next batch meanwhile. `synchronize` makes the host wait; `wait_event` makes a "
            "stream wait, and returns at once."
        )
    moved = next((call for call in got.inside if call.kind == "launch" and call.lane != COMMANDS[call.what]), None)
    if moved is not None:
        return (
            f"The results are right, but {moved.what} runs on the stream {moved.lane}, and a stream does one thing "
            f"after the other: nothing overlaps there. It belongs on {COMMANDS[moved.what]}."
        )
    spans = got.lab.spans()
    for (command, slot), (lane, start, _) in sorted(want.lab.spans().items(), key=lambda span: span[1][1]):
        late_ms = 1e3 * (spans[command, slot][1] - start)
        if late_ms > 1e-6:
            return (
                f"The results are right and the host is free, but there is a wait too many: {LOOKS[command][2]} {slot} "
                f"starts {late_ms:g} ms later than it could. {lane} waits for more than it needs, so batches no longer "
                "overlap."
            )
    return "The results are right, but it takes longer than it needs to."


def _explain_launch(args: tuple[Any, ...], got: Any, want: Any) -> str | None:
    missing = [command for command in COMMANDS if command not in {call.what for call in got.inside}]
    if missing:
        return f"You never launch {missing[0]!r}, so what it should bring never arrives."
    if got.outcomes > 1:
        return got.race
    if not got.right:
        return "Every order gives the same, and it is wrong: something is launched before what it needs."
    return _explain_too_much(got, want)


def _draw_verdicts(args: tuple[Any, ...], got: Verdict, want: Verdict) -> plot.Picture:
    labs = {"your function": got.lab} if got == want else {"your function": got.lab, "the package's": want.lab}
    return draw(labs, [6 * number for number in args[0]])


def use(lane: str, number: int, kind: str) -> races.Use:
    """Operation `number` of a lane, which "reads" or "writes"."""
    return races.Use(races.Access(lane, f"operation {number}", None, kind), number)


def _listed(racing: Callable[..., Any], *args: Any) -> Any:
    returned = racing(*args)
    return list(returned) if isinstance(returned, tuple | set | filter) or hasattr(returned, "__next__") else returned


def _explain_racing(args: tuple[Any, ...], got: Any, want: list[races.Use]) -> str | None:
    clock, kind, earlier = args
    if not isinstance(got, list):
        return None
    for one in earlier:
        counts = f"the clock counts {clock[one.lane]} of {one.lane}'s operations"
        if one in want and one not in got:
            reason = f"{counts}, so operation {one.number} may still be to come, and one of the two writes"
            return f"You left out {one.lane}'s operation {one.number}: {reason}."
        if one in got and one not in want and "writes" not in (kind, one.kind):
            return f"You name {one.lane}'s operation {one.number}, but both only read: that is right in any order."
        if one in got and one not in want:
            return f"You name {one.lane}'s operation {one.number}, but {counts}: that one is surely done."
    return None


def _draw_racing(args: tuple[Any, ...], got: Any, want: Any) -> plot.Picture:
    clock, kind, earlier = args
    return draw_clock(clock, kind, earlier, [one for one in got if one in earlier])


def _clock(host: int, h2d: int, compute: int, d2h: int) -> dict[str, int]:
    return dict(zip(LANES, (host, h2d, compute, d2h), strict=True))


_NUMBERS_GIVEN = "For the batches {0}"
# fmt: off
EXERCISES = {
    "order": Exercise(
        streams.order, _NUMBERS_GIVEN, "leaves",
        (
            Case(((7,),), "The step must not start before its copy in has ended."),
            Case(((7, 8, 9),), "Each step waits for its own copy in, and for nothing else."),
        ),
        (
            "One call puts a mark behind what `earlier` has been given; another one tells `later` about it.",
            "`earlier.record_event(event)` first, then `later.wait_event(event)`: a wait means the newest mark at the "
            "time of the call.",
        ),
        lambda function, numbers: Verdict(with_order(function), numbers), _explain_order, _draw_verdicts,
    ),
    "launch_step": Exercise(
        streams.launch_step, _NUMBERS_GIVEN, "leaves",
        (
            Case(((7,),), "Each of the three commands needs what the one before has brought."),
            Case(((7, 8, 9),), "The copy in of a batch can run while the batch before is computed."),
        ),
        (
            "Three launches, each on its own stream, `order` between two of them, and at the end a mark for the host.",
            "`order(h2d, compute, slot.inputs_ready)` before the step, `order(compute, d2h, slot.step_done)` before "
            "the copy out, `d2h.record_event(slot.outputs_ready)` at the end.",
        ),
        Verdict, _explain_launch, _draw_verdicts,
    ),
    "racing": Exercise(
        races.racing, "When the clock is {0} and the new operation {1}, after {2}", "finds",
        (
            Case((_clock(1, 0, 0, 0), "reads", [use("H2D", 1, "writes")]),
                 "The clock counts none of H2D's operations, so the write may still be under way."),
            Case((_clock(1, 1, 0, 0), "reads", [use("H2D", 1, "writes")]),
                 "The clock counts one operation of H2D, and this is it: surely done."),
            Case((_clock(2, 1, 0, 0), "reads", [use("H2D", 2, "writes")]),
                 "The clock counts one operation of H2D, and this is the second: the mark was recorded before it."),
            Case((_clock(3, 1, 1, 0), "reads", [use("D2H", 1, "reads")]), "Two reads never race."),
            Case((_clock(4, 2, 2, 2), "writes", [use("H2D", 3, "reads")]),
                 "A write races with an earlier read too: it would change what is being read."),
            Case((_clock(6, 2, 4, 1), "writes",
                  [use("compute", 3, "writes"), use("H2D", 3, "reads"), use("D2H", 1, "reads")]),
                 "Compare each use with the count of its own lane."),
        ),
        (
            "Ask of each use: does one of the two write? And does the clock count it, in the use's own lane?",
            "Keep `use` if `\"writes\" in (kind, use.kind)` and `clock[use.lane] < use.number`.",
        ),
        _listed, _explain_racing, _draw_racing,
    ),
}
# fmt: on

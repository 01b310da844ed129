"""A small device to try streams on: its step multiplies by 6, its times are known, and it can be run in every order.

lab = Lab("virtual")                 # exact times; "cpu" is a second process, "cuda" a GPU: really measured
serve(lab, launch_step, [7, 8, 9])   # [42, 48, 54]
draw({"in order": lab})              # lanes, and arrows for the events that were waited for
explore(program(launch_step))        # the same launch in every order that streams and events allow
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle
from matplotlib.patheffects import withStroke

from .. import streams
from ..devices import open_device
from ..devices.virtual import Costs, VirtualDevice
from ..ordering import explore
from ..pictures.picture import COLORS, Picture

# ---- the device ------------------------------------------------------------------------------------------------------

COMMANDS = {"copy_in": "H2D", "step": "compute", "copy_out": "D2H"}  # and the stream that each is meant for
EVENTS = ("inputs_ready", "step_done", "outputs_ready")  # of a slot: the end of its command on each stream
MS = {"copy_in": 10.0, "step": 40.0, "copy_out": 10.0}
HOST_MS = {"fill": 2.0, "launch": 1.0}  # on the virtual clock; elsewhere they take what they take


def _check_command(command: str) -> None:
    if command not in COMMANDS:
        raise ValueError(f"there is no command {command!r}: there are {', '.join(COMMANDS)}")


class LabProgram:
    """What the lab's device runs. "copy_in" brings a slot's number to the device, "step" multiplies it by 6, "copy_out"
    brings the result to the host. Each takes its time first and has its effect at its end, as on the virtual clock."""

    def __init__(self, model, *, host, ms):
        where = torch.device("cpu") if model is None else next(model.parameters()).device
        self.host, self.ms = host, ms
        self.inputs = [torch.zeros(1, dtype=torch.int64, device=where) for _ in host]
        self.results = [torch.zeros(1, dtype=torch.int64, device=where) for _ in host]
        self.spend = spend_on_gpu() if where.type == "cuda" else lambda ms: time.sleep(1e-3 * ms)

    def run(self, command: str, slot: int) -> None:
        self.spend(self.ms.get(command, 0.0))
        given, returned = self.host[slot]
        if command == "copy_in":
            self.inputs[slot].copy_(given, non_blocking=True)
        elif command == "step":
            torch.mul(self.inputs[slot], 6, out=self.results[slot])
        else:
            returned.copy_(self.results[slot], non_blocking=True)


def spend_on_gpu() -> Callable[[float], None]:
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
        _check_command(command)
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
            self.device = open_device(_owner(where), LabProgram, num_slots, host=host, ms=self.ms)
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


# ---- the same lab, in every order ------------------------------------------------------------------------------------


class ExploredLab:
    """What a `Lab` is, within a program for `explore`: there nothing runs, and all orders are tried."""

    def __init__(self, program: explore.Program, num_slots: int, num_batches: int):
        self.program, self.one = program, num_batches == 1
        self.batch_in = [0] * num_slots
        self.batches = 0
        self.launched: set[tuple[str, int]] = set()
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
    def __init__(self, lab: ExploredLab, stream: explore.ProgramStream):
        self.lab, self.stream, self.name = lab, stream, stream.name
        self.record_event, self.wait_event, self.synchronize = stream.record, stream.wait, stream.synchronize

    def launch(self, command: str, slot: int) -> None:
        _check_command(command)
        if (command, batch := self.lab.batch_in[slot]) in self.lab.launched:
            raise ValueError(
                f"{command} is launched twice for batch {batch}. Is it on the slot that was given, and once?"
            )
        self.lab.launched.add((command, batch))
        source, target, factor = EFFECTS[command]
        cells = self.lab.cell(source, slot), self.lab.cell(target, slot)
        self.lab.do(self.stream, command, slot, *cells, lambda value: value * factor)


def program(launch: Callable[[Any, Any], Any], numbers: Sequence[int] = (7,), num_slots: int = 1, loop: Any = serve):
    """The program for `explore` that serves one batch for each number, with `launch(streams, slot)` for each."""
    return lambda p: loop(ExploredLab(p, num_slots, len(numbers)), launch, numbers)


# ---- pictures of a lab -----------------------------------------------------------------------------------------------

LANES = ("host", *COMMANDS.values())
LOOKS = {  # face colour, colour of the text, words
    "fill": (COLORS["orange"], "black", "fill"),
    "work": (COLORS["orange"], "black", "other work"),
    "launch": ("#F8D999", "black", "launch"),
    "synchronize": ("#EEEEEE", "#444444", "wait"),
    "copy_in": (COLORS["sky"], "black", "copy in"),
    "step": (COLORS["blue"], "white", "step"),
    "copy_out": (COLORS["green"], "white", "copy out"),
}
LEGEND = {"host works": "fill", "host launches": "launch", "host waits": "synchronize"} | {
    LOOKS[command][2]: command for command in COMMANDS
}
WIDTH, LEFT, ROW, LAB_ROWS = 10.0, 0.85, 0.27, 6.0  # inches; rows of one lab
DOTS = {"hatch": "....", "edgecolor": "#C4C4C4"}  # of waiting


def draw(labs: Mapping[str, Lab], right: Sequence[int] = ()) -> Picture:
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
    return Picture(figure, "; ".join(captions), axes)


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
            look = {"color": COLORS["vermillion"], "fontweight": "bold"}
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

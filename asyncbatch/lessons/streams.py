"""Notebook 02: reading without waiting as a slider, what was measured on a GPU, and the exercises."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from matplotlib.patches import Rectangle

from .. import streams
from ..models.toy import toy_llama
from ..ordering import explore, races
from ..ordering.faults import FAULTS
from ..ordering.trials import trial
from ..pictures.picture import COLORS, Picture, figure
from .lab import (
    COMMANDS,
    LANES,
    LOOKS,
    Call,
    Lab,
    LabSlot,
    draw,
    program,
    serve,
    serve_without_waiting,
    spend_on_gpu,
)
from .live import Sliders
from .parts import Case, Exercise

# ---- right by luck ---------------------------------------------------------------------------------------------------


class Luck(Sliders):
    """Four batches that are read without waiting. The host's other work after each launch and the length of a step are
    two sliders in a notebook; they decide whether what is read is right."""

    numbers, right = (7, 8, 9, 10), (42, 48, 54, 60)
    controls = (("host_ms", "host, ms", 0.0, 100.0, 1.0), ("step_ms", "step, ms", 1.0, 100.0, 1.0))

    def __init__(self, host_ms: float, step_ms: float) -> None:
        self.host_ms, self.step_ms = host_ms, step_ms
        self._update()

    def _update(self) -> None:
        lab = Lab("virtual", 4, {"step": self.step_ms})
        self.read = serve_without_waiting(lab, streams.launch_step, self.numbers, self.host_ms)
        name = f"host busy for {self.host_ms:g} ms, a step takes {self.step_ms:g} ms"
        picture = draw({name: lab}, self.right)
        super().__init__(picture.figure, f"{name}: read {self.read}", picture.axes)


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
            copy = partial(target.copy_, source, non_blocking=True)
            back_s, done_s = streams.time_work(copy, torch.cuda.synchronize)
            found.append(CopyTime(f"{kind}, {name}", 1e3 * back_s, 1e3 * done_s))
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
    spend, small = spend_on_gpu(), torch.zeros(1, device="cuda")

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


def draw_copies(copies: Sequence[CopyTime], where: str) -> Picture:
    """How long the host was away in each call, on a logarithmic axis."""
    picture = figure(8, 2.6, f"256 MiB, non_blocking=True: when is the host back?\n{where}")
    picture.title = f"{len(copies)} copies: when is the host back?"
    axes: Any = picture.axes
    for row, (_, host_ms, done_ms) in enumerate(copies):
        blocked = host_ms > 1
        look = {"color": COLORS["vermillion"], "hatch": "///"} if blocked else {"color": COLORS["sky"]}
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


def draw_default_stream(found: Mapping[tuple[str, str], bool], where: str) -> Picture:
    """Long work on a stream, then short work on the default stream: what is often written, and what was found."""
    picture = figure(8, 2.9, "Long work on a stream, then short work on the default stream")
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
            axes.add_patch(Rectangle((start, y), length, 0.9, facecolor=COLORS[color], edgecolor="white"))
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
    """Put each fault of `SANITIZER` into the asynchronous batcher, in `seeds` runs, and print who finds it. Returns for
    each fault the number of runs with wrong tokens, and the number in which the race checker found it."""
    model, counts = toy_llama(), {}
    print(f"{'runs of ' + str(seeds) + ' in which':41}  wrong tokens  race checker  can CUDA's sanitizer see it?")
    for fault in FAULTS:
        if fault.name in SANITIZER:
            tokens = sum(bool(trial(fault, seed, check_races=False, model=model).by) for seed in range(seeds))
            checker = sum(trial(fault, seed, model=model).by == "checker" for seed in range(seeds))
            counts[fault.name] = tokens, checker
            print(f"{fault.name:41}  {tokens:12}  {checker:12}  {SANITIZER[fault.name]}")
    return counts


def draw_clock(
    clock: Mapping[str, int], kind: str, earlier: Sequence[races.Use], found: Sequence[races.Use], who: str = ""
) -> Picture:
    """A vector clock as a front across the lanes: what it counts is surely done. The operations that used the resource
    before say what they do; those in `found` are called races, by `who` where it is somebody's opinion."""
    longest = max([*clock.values(), *(use.number for use in earlier)]) + 1
    picture = figure(8, 0.36 * len(clock) + 0.9, f"The new operation {kind}. What surely comes before it?")
    axes: Any = picture.axes
    for row, (lane, count) in enumerate(clock.items()):
        axes.text(0.75, row + 0.5, lane, ha="right", va="center", fontsize=9)
        for number in range(1, longest + 1):
            done = number <= count
            use = next((use for use in earlier if (use.lane, use.number) == (lane, number)), None)
            face = COLORS["sky"] if done else "white"
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
                edge = {"edgecolor": COLORS["vermillion"], "linewidth": 2.5, "fill": False}
                axes.add_patch(Rectangle((number, row + 0.1), 0.92, 0.8, zorder=4, **edge))
                axes.text(longest + 1.1, row + 0.5, f"{who}race with {lane} {number}", va="center", fontsize=9)
        axes.plot([count + 0.96] * 2, [row, row + 1], color="black", linewidth=2.5)
    axes.set(xlim=(0.9, longest + 2.8), ylim=(len(clock), 0), yticks=[], xticks=[])
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


def _draw_verdicts(args: tuple[Any, ...], got: Verdict, want: Verdict) -> Picture:
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


def _draw_racing(args: tuple[Any, ...], got: Any, want: Any) -> Picture:
    clock, kind, earlier = args
    return draw_clock(clock, kind, earlier, [one for one in got if one in earlier], "you: ")


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

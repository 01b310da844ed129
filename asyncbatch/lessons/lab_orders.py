"""Notebook 02: the lab within a program for `explore`, where nothing runs and every order is tried.

explore(program(launch_step))                               # one batch in one slot
explore(program(launch_step, [7, 8, 9], num_slots=2))       # three batches in two slots
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..ordering import explore
from .lab import COMMANDS, EVENTS, LabSlot, check_command, lab_slot, serve, wait_stream

CELLS = {  # the short name for a single batch, and the name that the race checker of a batcher uses
    "inputs": "slot {}'s host inputs",
    "device": "slot {}'s device inputs",
    "result": "slot {}'s output ids on the device",
    "output": "slot {}'s output ids on the host",
}
EFFECTS = {"copy_in": ("inputs", "device", 1), "step": ("device", "result", 6), "copy_out": ("result", "output", 1)}


class ExploredLab:
    """The same as a `Lab` for a program of `explore`. With only one batch, names do without numbers."""

    def __init__(self, program: explore.Program, num_slots: int, num_batches: int):
        self.program, self.one = program, num_batches == 1
        self.batch_in = [0] * num_slots
        self.batches = 0
        self.launched: set[tuple[str, int]] = set()
        self.streams = tuple(ExploredStream(self, program.stream(lane)) for lane in COMMANDS.values())
        self.slots = [lab_slot(index, program.event) for index in range(num_slots)]
        if self.one:  # then the checker can name the event that is missing
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
        """Does nothing: orders do not depend on times."""

    def read(self, slot: LabSlot) -> None:
        tokens = self.name("tokens", self.batch_in[slot.index])
        self.do(self.program.host, "read", slot.index, self.cell("output", slot.index), tokens, lambda value: value)


class ExploredStream:
    def __init__(self, lab: ExploredLab, stream: explore.ProgramStream):
        self.lab, self.stream, self.name = lab, stream, stream.name
        self.record_event, self.wait_event, self.synchronize = stream.record, stream.wait, stream.synchronize
        self.marks: dict[str, explore.ProgramEvent] = {}

    def wait_stream(self, other: ExploredStream) -> None:
        wait_stream(self, other, self.lab.program.event)

    def launch(self, command: str, slot: int) -> None:
        check_command(command)
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

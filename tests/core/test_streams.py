"""What `launch_step` tells three streams is enough: whichever of them runs first, the results are those of the step."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbatch.streams import DeviceError, check_process, launch_step, order


class Queue:
    """A stream that only writes down what it is given."""

    def __init__(self, name):
        self.name, self.work = name, []

    def launch(self, command, slot):
        self.work.append(("run", command, slot))

    def wait_event(self, event):
        self.work.append(("wait", event, event.marks))

    def record_event(self, event):
        event.marks += 1
        self.work.append(("record", event, event.marks))


class Mark:
    """An event that counts how often it was recorded."""

    marks = 0


def run_in_any_order(streams, choose):
    """Run what the streams hold, a piece at a time: `choose` says which of those that can go on does. Gives the
    (command, slot) in the order in which they ran, and the events as they were reached."""
    todo = {stream.name: list(stream.work) for stream in streams}
    reached, ran = [], []
    while any(todo.values()):
        free = [
            name
            for name, work in todo.items()
            if work and not (work[0][0] == "wait" and work[0][2] and work[0][1:] not in reached)
        ]
        assert free, f"nothing can go on any more: {todo}"
        kind, *what = todo[choose(free)].pop(0)
        if kind == "run":
            ran.append(tuple(what))
        elif kind == "record":
            reached.append(tuple(what))
    return ran, reached


@given(st.integers(1, 3), st.data())
def test_a_step_is_copied_in_then_computed_then_copied_out_whoever_runs_first(steps, data):
    """Steps on different slots, launched one after the other: each has its own order, and all have that of the compute
    stream; a slot's outputs are ready when they have been copied out, and not before."""
    streams = Queue("H2D"), Queue("compute"), Queue("D2H")
    slots = [
        SimpleNamespace(index=index, command=f"step {index}", **{name: Mark() for name in names})
        for index, names in enumerate([("inputs_ready", "step_done", "outputs_ready")] * steps)
    ]
    for slot in slots:
        launch_step(streams, slot)
    ran, reached = run_in_any_order(streams, lambda free: data.draw(st.sampled_from(free)))
    assert sorted(ran) == sorted(
        (command, slot.index) for slot in slots for command in ("copy_in", slot.command, "copy_out")
    )
    for slot in slots:
        own = [command for command, index in ran if index == slot.index]
        assert own == ["copy_in", slot.command, "copy_out"]
        assert (slot.outputs_ready, 1) in reached
    assert [command for command, _ in ran if command.startswith("step")] == [slot.command for slot in slots]
    for stream, event in zip(streams, ("inputs_ready", "step_done", "outputs_ready"), strict=True):
        at = [stream.work.index(("record", getattr(slot, event), 1)) for slot in slots]
        work = [index for index, (kind, *_) in enumerate(stream.work) if kind == "run"]
        assert [index + 1 for index in work] == at, f"{event} stands right behind the work on {stream.name}"


def test_what_was_launched_before_an_order_does_not_wait():
    earlier, later, event = Queue("earlier"), Queue("later"), Mark()
    later.launch("before", 0)
    earlier.launch("first", 0)
    order(earlier, later, event)
    later.launch("after", 0)
    ran, _ = run_in_any_order([earlier, later], lambda free: free[-1])
    assert [command for command, _ in ran] == ["before", "first", "after"]


def test_a_process_may_use_its_own_batcher_and_no_other_may():
    check_process(os.getpid())
    for other in (os.getpid() + 1, os.getppid()):
        with pytest.raises(DeviceError, match=rf"belongs to process {other}, and this is process {os.getpid()}"):
            check_process(other)

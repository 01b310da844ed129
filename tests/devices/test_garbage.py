"""The garbage collector while devices are open: what it looks at, when it runs, and that nothing stays behind."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import numpy as np
import pytest
from support.collecting import collections_of_everything
from support.tiny import tiny_model

from asyncbatch import AsyncBatcher, Request, SyncBatcher
from asyncbatch.devices import garbage, worker
from asyncbatch.devices.host import HostDevice

OPTIONS = {"max_batch_size": 4, "block_size": 4, "max_length": 64, "prefill_tokens": 16, "step_s": 0.0}


@pytest.fixture(autouse=True)
def quiet_host(monkeypatch):
    """Devices of the host that do what those on CUDA do."""
    begin, close = HostDevice.__init__, HostDevice.close

    def init(self, *arguments):
        begin(self, *arguments)
        self._keep_quiet()

    monkeypatch.setattr(HostDevice, "__init__", init)
    monkeypatch.setattr(HostDevice, "close", lambda self: (self._quiet(), close(self)))
    with collections_of_everything():
        yield
        gc.enable()


class Knot:
    """An object that only a collection can free."""

    alive = 0

    def __init__(self):
        self.me = self
        Knot.alive += 1
        weakref.finalize(self, Knot.gone)

    @staticmethod
    def gone():
        Knot.alive -= 1


def test_on_a_cpu_nothing_is_frozen(monkeypatch):
    monkeypatch.undo()
    with SyncBatcher(tiny_model(), **OPTIONS) as batcher:
        batcher.run([Request([1, 2], 3)])
        assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("kind", [SyncBatcher, AsyncBatcher])
def test_what_was_there_before_is_frozen_until_the_last_batcher_closes(kind):
    model = tiny_model()
    limits = gc.get_threshold()
    with kind(model, **OPTIONS) as first:
        everything = gc.get_freeze_count()
        assert everything > 10 * len(gc.get_objects())
        second = kind(model, **OPTIONS)
        first.run([Request([1, 2, 3], 30)])
        second.run([Request([1, 2, 3], 30)])
    assert gc.get_freeze_count() > 0.9 * everything
    second.close()
    second.close()
    assert gc.get_freeze_count() == 0
    assert gc.isenabled()
    assert gc.get_threshold() == limits


def test_a_batcher_that_is_dropped_lets_go_too():
    model = tiny_model()
    SyncBatcher(model, **OPTIONS).run([Request([1, 2], 3)])
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("setting", ["disabled", "frozen"])
def test_a_caller_who_sees_to_it_himself_is_left_alone(setting):
    model = tiny_model()
    (gc.disable if setting == "disabled" else gc.freeze)()
    frozen = gc.get_freeze_count()
    with AsyncBatcher(model, **OPTIONS) as batcher:
        seen = collections_of(lambda: batcher.run([Request([1, 2, 3], 60)] * 8))
        # (Objects that are freed leave the count.)
        assert 0.9 * frozen <= gc.get_freeze_count() <= frozen
    assert gc.isenabled() == (setting == "frozen")
    assert 0.9 * frozen <= gc.get_freeze_count() <= frozen
    assert setting == "frozen" or not seen


def collections_of(action) -> list[int]:
    """The generation of each collection while `action` is called."""
    seen: list[int] = []

    def note(phase, info):
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(note)
    try:
        action()
    finally:
        gc.callbacks.remove(note)
    return seen


def test_circles_that_a_caller_makes_while_the_loop_turns_are_freed():
    """Memory does not grow: knots of every turn go while the loop turns, however long it does."""
    with AsyncBatcher(tiny_model(), **OPTIONS) as batcher:
        most = []
        for _ in range(4):
            for _ in batcher.stream(Request([1, 2, 3], 60)):
                for _ in range(20):
                    Knot()
            most.append(Knot.alive)
    assert max(most) < 1200, most
    gc.collect()
    assert Knot.alive == 0


def test_collections_are_done_while_the_host_waits(monkeypatch):
    """Nearly all of them, in a loop that makes much garbage (an automatic one comes between two waits at times)."""
    phase = [""]
    with AsyncBatcher(tiny_model(), **OPTIONS) as batcher:
        begins, ends = batcher.device.host_begins, batcher.device.host_ends
        monkeypatch.setattr(batcher.device, "host_begins", lambda name, *a: (phase.append(name), begins(name, *a)))
        monkeypatch.setattr(batcher.device, "host_ends", lambda name, *a: (ends(name, *a), phase.append("")))
        where: list[str] = []
        note = lambda what, info: where.append(phase[-1]) if what == "start" else None  # noqa: E731
        gc.callbacks.append(note)
        try:
            for _ in batcher.stream(Request([1, 2, 3], 60)):
                kept = [[number] for number in range(200)]  # containers that live until the next token
                phase.append("the caller")
        finally:
            gc.callbacks.remove(note)
        assert kept
    assert where
    assert where.count("wait") > 0.8 * len(where)


def test_what_a_caller_builds_later_is_frozen_once_it_makes_collections_long(monkeypatch):
    monkeypatch.setattr(garbage, "LONG_S", 0.0)  # every full one is long
    with SyncBatcher(tiny_model(), **OPTIONS) as batcher:
        before = gc.get_freeze_count()
        large = []
        while gc.get_freeze_count() < before + 20_000:
            for _ in batcher.stream(Request([1, 2, 3], 60)):
                large += [[number] for number in range(400)]
            assert len(large) < 200_000, "nothing is ever frozen"
    assert gc.get_freeze_count() == 0


def test_the_worker_looks_at_all_objects_only_for_an_older_model_which_goes(monkeypatch):
    monkeypatch.setattr(worker, "unpack", lambda *_: Knot())
    monkeypatch.setattr(worker.torch, "set_num_threads", lambda _: None)
    served = worker._Worker(np.zeros(1, np.int64), None)
    gc.disable()
    for expected in ([], [2]):
        assert collections_of(lambda: served.model(b"", b"")) == expected
        assert gc.get_freeze_count() > 1000
        assert Knot.alive == 1


def test_a_process_ends_in_the_ordinary_way_with_a_batcher_open():
    """(Extension modules complain on standard error where objects of theirs are frozen to the end.)"""
    code = """
from asyncbatch import AsyncBatcher, Request, load_model
from asyncbatch.devices.host import HostDevice
begin = HostDevice.__init__
HostDevice.__init__ = lambda self, *arguments: (begin(self, *arguments), self._keep_quiet())[0]
if __name__ == "__main__":
    batcher = AsyncBatcher(load_model("random:tiny")[0], max_batch_size=2, max_length=32)
    print(len(batcher.run([Request([1, 2], 5, stop_token_ids=())])[0].token_ids))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "5\n"

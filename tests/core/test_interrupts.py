"""Ctrl-C at any line of a batcher's life: afterwards it is usable or closed, and the next one serves as ever."""

from __future__ import annotations

import gc
import linecache
import random
import sys
from pathlib import Path

import pytest
from support.gpt2 import generated, tiny_gpt2

import asyncbatch
from asyncbatch import AsyncBatcher, Request, SyncBatcher
from asyncbatch.devices.process import DeviceProcess
from asyncbatch.request import RequestError

PACKAGE = Path(asyncbatch.__file__).parent
CORE = ("base", "serving", "config", "slot", "scheduler", "kv_cache", "streams")
DEVICES = ("__init__", "host", "process", "travel", "buffers", "real_time")
FILES = {str(PACKAGE / f"{name}.py") for name in CORE} | {str(PACKAGE / "devices" / f"{name}.py") for name in DEVICES}
OPTIONS = {"max_batch_size": 3, "block_size": 4, "max_length": 32, "prefill_tokens": 8}
REQUEST = Request([1, 2, 3], 6, stop_token_ids=())


class InterruptAt:
    """Raises KeyboardInterrupt before the line number `target` of those that this thread runs in FILES."""

    def __init__(self, target: int):
        self.left, self.where = target, ""

    def trace(self, frame, event, _):
        if frame.f_code.co_filename not in FILES or frame.f_code.co_name == "__del__":
            return None
        # (A bare "try:" does nothing that could be interrupted, but CPython traces it, and outside of its handlers.)
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and line != "try:":
            self.left -= 1
            if self.left == 0:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} {line}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace

    def run(self, work) -> None:
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            work()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)


def life(kind, model, batchers) -> None:
    """All that a caller can do with a batcher."""
    batchers.append(kind(model, **OPTIONS))
    batcher = batchers[-1]
    handle = batcher.submit(REQUEST)
    cancelled = batcher.submit(REQUEST)
    stream = batcher.stream(REQUEST)
    next(stream)
    batcher.cancel(cancelled)
    stream.close()
    handle.result()
    batcher.run([REQUEST])
    batcher.close()


def lines_of_a_life(kind, model) -> int:
    counter = InterruptAt(10**9)
    counter.run(lambda: life(kind, model, []))
    return 10**9 - counter.left


def served_or_closed(batcher) -> list[int] | str:
    try:
        return batcher.run([REQUEST])[0].token_ids
    except RequestError as error:
        return "closed" if "closed" in str(error) else str(error)


@pytest.mark.parametrize("kind", [SyncBatcher, AsyncBatcher])
def test_after_an_interrupt_at_any_line_a_batcher_is_usable_or_closed(kind):
    model = tiny_gpt2()
    expected = generated(model, REQUEST.token_ids, 6)
    lines = lines_of_a_life(kind, model)
    opening = 260
    rng = random.Random(0)
    targets = sorted({*range(1, opening, 7), *rng.sample(range(opening, lines), 20)})
    for target in targets:
        interrupt, batchers = InterruptAt(target), []
        interrupt.run(lambda batchers=batchers: life(kind, model, batchers))
        for batcher in batchers:
            assert served_or_closed(batcher) in (expected, "closed"), interrupt.where
            batcher.close()
        with kind(model, **OPTIONS) as batcher:
            assert batcher.run([REQUEST])[0].token_ids == expected, interrupt.where
    gc.collect()
    process = DeviceProcess.of(model)
    process.reclaim()
    assert len(process.free_events) == 1024


def test_an_answer_that_was_not_read_is_not_taken_for_the_next_one():
    model = tiny_gpt2()
    process = DeviceProcess.of(model)
    for question in (("failure", 12345, 0), ("close", 12345)):  # the first is an error: there is no such session
        process.control.send((next(process.numbers), *question))
    with SyncBatcher(model, **OPTIONS) as batcher:
        assert batcher.run([REQUEST])[0].token_ids == generated(model, REQUEST.token_ids, 6)


def test_batchers_that_are_dropped_give_back_what_they_held():
    model = tiny_gpt2()
    for _ in range(150):  # 12 of the device's 1024 events each
        batcher = AsyncBatcher(model, **OPTIONS)
        batcher.submit(REQUEST)
        batcher.turn()
        del batcher
    gc.collect()
    with AsyncBatcher(model, **OPTIONS) as batcher:
        assert batcher.run([REQUEST])[0].token_ids == generated(model, REQUEST.token_ids, 6)


def test_a_stream_thread_that_fails_ends_the_device_with_an_error(capfd):
    model = tiny_gpt2()
    batcher = SyncBatcher(model, **OPTIONS)
    batcher.device.process.send(1, b"no pickle at all")
    completion = batcher.run([REQUEST])[0]
    assert completion.finish_reason == "error"
    assert "the device process ended" in str(completion.error)
    with SyncBatcher(model, **OPTIONS) as other:
        assert other.run([REQUEST])[0].token_ids == generated(model, REQUEST.token_ids, 6)
    assert "Traceback" in capfd.readouterr().err

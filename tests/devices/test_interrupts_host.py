"""Ctrl-C at every line that the host runs for the worker process: its start, every question and command, and its end.
Afterwards the batcher serves as ever or is closed, the next one on the model serves too, no event is lost, and no
worker is left behind."""

from __future__ import annotations

import copy
import functools
import gc
import multiprocessing
from pathlib import Path

import pytest
from support.gpt2 import generated, tiny_gpt2
from support.interrupts import lines_of, run_until, watchdog
from support.tiny import tiny_model
from support.workers import spawned_workers

import asyncbatch
from asyncbatch import AsyncBatcher, Request, SyncBatcher
from asyncbatch.devices.process import MAX_EVENTS, DeviceProcess
from asyncbatch.request import RequestError

DEVICES = Path(asyncbatch.__file__).parent / "devices"
FILES = {str(DEVICES / f"{name}.py") for name in ("__init__", "host", "process", "travel", "buffers", "real_time")}
OPTIONS = {"max_batch_size": 3, "block_size": 4, "max_length": 32, "prefill_tokens": 8}
REQUEST = Request([1, 2, 3], 6, stop_token_ids=())
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def quick_workers(monkeypatch):
    """Workers are forked here (support/workers.py), so only the check of the model is slow. It has no state."""
    monkeypatch.setattr("asyncbatch.base.check_model", lambda *_: None)


def opened(model):
    return AsyncBatcher(model, step_s=0.0, **OPTIONS)


def answer() -> list[int]:
    """What the timed device says to REQUEST."""
    tokens = list(REQUEST.token_ids)
    for _ in range(REQUEST.max_new_tokens):
        tokens.append((tokens[-1] * 31 + len(tokens) * 7 + 1) % 97)
    return tokens[len(REQUEST.token_ids) :]


def live(model, batchers) -> None:
    """All that a caller can do with a batcher."""
    batchers.append(opened(model))
    batcher = batchers[-1]
    handle, cancelled = batcher.submit(REQUEST), batcher.submit(REQUEST)
    stream = batcher.stream(REQUEST)
    next(stream)
    batcher.cancel(cancelled)
    stream.close()
    handle.result()
    batcher.run([REQUEST])
    batcher.close()


def check(model, batchers, line) -> None:
    for batcher in batchers:
        try:
            assert batcher.run([REQUEST])[0].token_ids == answer(), line
        except RequestError as error:
            if "closed" not in str(error) and "lost its device" not in str(error):
                raise
        batcher.close()
    with opened(model) as batcher:
        assert batcher.run([REQUEST])[0].token_ids == answer(), line


def workers() -> list:
    return [child for child in multiprocessing.active_children() if child.name == "asyncbatch-device"]


def test_while_the_worker_runs(quick_workers, request):
    model = copy.deepcopy(tiny_model())
    live(model, [])  # starts it
    lines = lines_of(functools.partial(live, model, []), FILES, most=2)
    assert len(lines) > 200
    for line in lines:
        batchers: list = []
        with watchdog(request.config, 60):
            assert run_until(line, functools.partial(live, model, batchers)), line
            check(model, batchers, line)
    del batchers
    gc.collect()
    process = DeviceProcess.of(model)
    process.reclaim()
    assert len(process.free_events) == MAX_EVENTS


def test_while_a_worker_is_started_and_ended(quick_workers, request):
    before = len(workers())

    def start_and_stop(model):
        process = DeviceProcess.of(model)
        process.stop()

    model = copy.deepcopy(tiny_model())
    lines = lines_of(functools.partial(start_and_stop, model), FILES, most=1)
    assert len(lines) > 80
    for line in lines:
        model = copy.deepcopy(tiny_model())
        with watchdog(request.config, 60):
            assert run_until(line, functools.partial(start_and_stop, model)), line
            check(model, [], line)
            del model
            gc.collect()
            for worker in workers()[before:]:
                worker.join()
                assert not worker.is_alive(), line
    assert len(workers()) <= before


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
    with spawned_workers():  # one that is forked from the server writes its errors where the server does
        batcher = SyncBatcher(model, **OPTIONS)
    batcher.device.process.send(1, b"no pickle at all")
    completion = batcher.run([REQUEST])[0]
    assert completion.finish_reason == "error"
    assert "the device process ended" in str(completion.error)
    with SyncBatcher(model, **OPTIONS) as other:
        assert other.run([REQUEST])[0].token_ids == generated(model, REQUEST.token_ids, 6)
    assert "Traceback" in capfd.readouterr().err

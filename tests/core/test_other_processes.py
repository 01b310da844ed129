"""A batcher belongs to the process that opened it: forked copies refuse every use, and its own tokens stay right."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from support.tiny import tiny_model

from asyncbatch import AsyncBatcher, Request, SyncBatcher
from asyncbatch.streams import DeviceError

OPTIONS = {"max_batch_size": 4, "block_size": 4, "max_length": 32, "prefill_tokens": 8}
REQUESTS = [Request([n + 1, 2], 12, stop_token_ids=()) for n in range(6)]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def in_a_fork(work) -> tuple[int, str]:
    """(exit status, what it returned as text) of `work()` in a forked child, which ends without Python's exit handlers
    unless `work` ends it otherwise."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        try:
            os.write(send, str(work()).encode())
            os._exit(0)
        except SystemExit:
            raise
        except BaseException:
            os.write(send, traceback.format_exc().encode())
            os._exit(1)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        text = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("kind", [SyncBatcher, AsyncBatcher])
def test_every_use_in_a_forked_child_names_fork_and_the_owner_stays_right(kind):
    with kind(tiny_model(), **OPTIONS) as batcher:
        expected = [c.token_ids for c in batcher.run(REQUESTS)]
        stream = batcher.stream(REQUESTS[0])
        first = next(stream)
        handles = [batcher.submit(request) for request in REQUESTS]
        uses = {
            "run": lambda: batcher.run(REQUESTS),
            "submit": lambda: batcher.submit(REQUESTS[0]),
            "result": handles[0].result,
            "stream": lambda: batcher.stream(REQUESTS[0]),
            "next": lambda: next(stream),
            "cancel": lambda: batcher.cancel(handles[1]),
            "turn": batcher.turn,
        }
        for name, use in uses.items():
            status, text = in_a_fork(use)
            assert status == 1, name
            assert "DeviceError: the batcher belongs to process" in text, (name, text)
            assert "made from it by fork" in text
        assert in_a_fork(batcher.close) == (0, "None")
        assert [first, *stream] == expected[0]
        assert [handle.result().token_ids for handle in handles] == expected


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_that_ends_in_the_ordinary_way_takes_nothing_with_it():
    script = """
import os, sys
from support.tiny import tiny_model
from asyncbatch import AsyncBatcher, Request
batcher = AsyncBatcher(tiny_model(), max_batch_size=2, max_length=32)
request = Request([1, 2], 8, stop_token_ids=())
before = batcher.run([request])[0].token_ids
child = os.fork()
if child == 0:
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert batcher.run([request])[0].token_ids == before
batcher.close()
print("all well")
"""
    import subprocess
    import sys
    from pathlib import Path

    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert ran.stdout == "all well\n", ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.fixture
def two_threads():
    """Torch has threads that it waits for, and that a fork leaves behind."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.rand(300, 300) @ torch.rand(300, 300)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_may_open_a_batcher_of_its_own(two_threads):
    with SyncBatcher(tiny_model(), **OPTIONS) as batcher:
        expected = [c.token_ids for c in batcher.run(REQUESTS)]

        def own():
            with SyncBatcher(tiny_model(), **OPTIONS) as mine:
                return [c.token_ids for c in mine.run(REQUESTS)]

        assert in_a_fork(own) == (0, str(expected))
        assert [c.token_ids for c in batcher.run(REQUESTS)] == expected


def open_one() -> list[int]:
    with SyncBatcher(tiny_model(), **OPTIONS) as batcher:
        return batcher.run(REQUESTS[:1])[0].token_ids


def test_a_worker_of_a_pool_says_what_to_do_and_one_of_an_executor_serves():
    """Both are forked from the server that has imported everything (support/workers.py): they are daemonic or not
    however they start. What computes for the executor's worker is spawned, as ever."""
    server = multiprocessing.get_context("forkserver")
    with server.Pool(1) as pool, pytest.raises(DeviceError, match="ProcessPoolExecutor"):
        pool.apply(open_one)
    with ProcessPoolExecutor(1, mp_context=server) as executor:
        assert executor.submit(open_one).result() == open_one()

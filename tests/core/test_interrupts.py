"""Ctrl-C at every line that the core runs in a batcher's life, on the virtual clock: afterwards the batcher serves as
ever, or it is closed and says so; nobody waits for an answer, and no block is lost."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from support.interrupts import Line, lines_of, run_until, watchdog
from support.tiny import tiny_model

import asyncbatch
from asyncbatch import AsyncBatcher, Request, SamplingParams, SyncBatcher
from asyncbatch.devices.virtual import Costs
from asyncbatch.request import RequestError

PACKAGE = Path(asyncbatch.__file__).parent
FILES = {str(path) for path in [*PACKAGE.glob("*.py"), *(PACKAGE / "devices").glob("[!v]*.py")]}
OPTIONS = dict(max_batch_size=3, block_size=4, prefill_tokens=6, max_length=27, num_blocks=9, timeline=4)
REQUEST = Request([1, 2, 3], 5, stop_token_ids=())
TIMES = 2  # a line is interrupted at its first times
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


def chain(request: Request) -> list[int]:
    """What the timed device says to a request."""
    tokens = list(request.token_ids)
    for _ in range(request.max_new_tokens):
        tokens.append((tokens[-1] * 31 + len(tokens) * 7 + 1) % 97)
    return tokens[len(request.token_ids) :]


class Words:
    """A tokenizer whose tokens are numbers."""

    def decode(self, tokens, **_):
        return " ".join(map(str, tokens))


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    """The check of a model has no state that an interrupt could harm, and takes longer than all the rest."""
    monkeypatch.setattr("asyncbatch.base.check_model", lambda *_: None)


def opened(kind, **options):
    return kind(tiny_model(), tokenizer=Words(), clock=Costs(), step_s=0.0, **{**OPTIONS, **options})


def serve(batcher, handles) -> None:
    """All that a caller can do with a batcher that stays open; there is too little memory for all at once."""
    for prompt, new in (([1, 2, 3], 6), ([4] * 14, 10), ([7] * 8, 9)):
        handles.append(batcher.submit(Request(prompt, new, stop_token_ids=())))
    stream = batcher.stream(Request([5, 6], 9, SamplingParams(1.0, seed=3)))
    handles.append(stream._handle)
    next(stream)
    batcher.cancel(handles[0])
    stream.close()
    handles[1].result()
    batcher.run([REQUEST, Request([7] * 9, 4, stop_strings=["9"]), Request([], 3), Request([8], 3)], progress=True)
    handles.append(batcher.submit(REQUEST))
    batcher.turn()
    batcher.run([REQUEST])


def serves_as_ever(batcher, handles, line: Line) -> bool:
    """Whether it does; False if it is closed. Whoever was under way is answered, with the right tokens."""
    try:
        (completion,) = batcher.run([REQUEST])
    except RequestError as error:
        if "closed" not in str(error):
            raise
        return False
    assert (completion.token_ids, completion.finish_reason) == (chain(REQUEST), "length"), line
    for handle in handles:
        whole = chain(handle._state.request)
        assert handle.result().token_ids == whole[: len(handle.token_ids)], line
    while batcher.turn():  # a request whose handle the interrupt kept from its caller may go on
        pass
    assert not batcher._handles, line
    assert not batcher._inbox, line
    assert all(slot.plan is None for slot in batcher.slots), line
    assert batcher.kv.num_free == batcher.kv.num_blocks, line
    assert batcher.timeline.summary().steps >= 5, line
    return True


@pytest.mark.parametrize("kind", [SyncBatcher, AsyncBatcher])
def test_while_it_serves(kind, request):
    batcher = opened(kind)
    serve(batcher, [])
    lines = lines_of(functools.partial(serve, batcher, []), FILES, TIMES)
    assert len(lines) > 700
    for line in lines:
        handles: list = []
        with watchdog(request.config, 60):
            assert run_until(line, functools.partial(serve, batcher, handles)), line
            assert serves_as_ever(batcher, handles, line), line
    batcher.close()


@pytest.mark.parametrize("kind", [SyncBatcher, AsyncBatcher])
@pytest.mark.parametrize("check_races", [False, True])
def test_while_it_is_opened(kind, check_races, request):
    def live(made):
        made.append(opened(kind, check_races=check_races))
        made[0].close()

    live([])  # imports a module
    lines = lines_of(lambda: live([]), FILES, TIMES)
    assert len(lines) > 150
    for line in lines:
        made: list = []
        with watchdog(request.config, 60):
            assert run_until(line, functools.partial(live, made)), line
            for batcher in made:
                serves_as_ever(batcher, [], line)
                batcher.close()
    assert serves_as_ever(opened(kind), [], line)


@pytest.mark.parametrize("kind", [SyncBatcher, AsyncBatcher])
def test_while_it_is_closed_with_work_under_way(kind, request):
    def busy():
        batcher = opened(kind)
        handles = [batcher.submit(REQUEST) for _ in range(4)]
        for _ in range(3):
            batcher.turn()
        return batcher, handles

    batcher, _ = busy()
    lines = lines_of(batcher.close, FILES, TIMES)
    for line in lines:
        batcher, handles = busy()
        with watchdog(request.config, 60):
            assert run_until(line, batcher.close)
            serves_as_ever(batcher, handles, line)
            batcher.close()
            assert all(handle.completion is not None for handle in handles), line
            assert batcher.device.program is None, line
            assert not serves_as_ever(batcher, handles, line), line

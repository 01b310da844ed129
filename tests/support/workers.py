"""Worker processes for tests that need many: forked from a server that has imported everything. One that is spawned
imports torch and transformers again, which is seconds of work each time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

PRELOADED = ["transformers.models.llama.modeling_llama", "asyncbatch.batcher"]
PRELOADED += [f"asyncbatch.devices.{name}" for name in ("worker", "timed")]
PRELOADED += [
    "asyncbatch.ranks.world",
    "asyncbatch.ranks.replicas",
    "asyncbatch.models.load",
    "torch.distributed.tensor",
]


@contextlib.contextmanager
def forked_workers() -> Iterator[None]:
    """Until the end of the block, fork the device processes of this process from one server. It starts with the first
    of them, and ends with this process. A child of this process that was forked cannot reach it, and spawns as ever."""
    if not hasattr(os, "fork"):
        yield
        return
    from asyncbatch.devices import process

    owner, server, ordinary = os.getpid(), multiprocessing.get_context("forkserver"), process.mp.get_context
    server.set_forkserver_preload(PRELOADED)

    def context(method: str | None = None):
        return server if method == "spawn" and os.getpid() == owner else ordinary(method)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process.mp, "get_context", context)
        yield


@contextlib.contextmanager
def spawned_workers() -> Iterator[None]:
    """Until the end of the block, device processes are spawned, as those of users are."""
    from asyncbatch.devices import process

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process.mp, "get_context", multiprocessing.get_context)
        yield


@contextlib.contextmanager
def forked_ranks() -> Iterator[None]:
    """Until the end of the block, ranks that this process starts are forked from the same server, and so are their
    device processes."""
    from asyncbatch.ranks import launch

    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    started = launch.elastic_launch

    def start(config, function):
        return lambda *arguments: started(config, _as_rank)(function, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "START_METHOD", "forkserver")
        patch.setattr(launch, "elastic_launch", start)
        yield


def _as_rank(function: Callable[..., Any], *arguments: Any) -> Any:
    """In a rank that the server has forked: device processes come from the server, too, where it can be reached."""
    from multiprocessing.forkserver import _forkserver

    from asyncbatch.devices import process

    if _forkserver._forkserver_address and getattr(_forkserver, "_forkserver_authkey", True):
        server, ordinary = multiprocessing.get_context("forkserver"), process.mp.get_context
        _forkserver.ensure_running = lambda: None  # it would start a second one
        process.mp.get_context = lambda method=None: server if method == "spawn" else ordinary(method)
    return function(*arguments)

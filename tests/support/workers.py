"""Worker processes for tests that need many: forked from a server that has imported everything. One that is spawned
imports torch and transformers again, which is seconds of work each time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator

import pytest

PRELOADED = ["transformers.models.llama.modeling_llama", "asyncbatch.batcher"]
PRELOADED += [f"asyncbatch.devices.{name}" for name in ("worker", "timed")]


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
    """Until the end of the block, ranks that this process starts are forked from the same server."""
    from asyncbatch.ranks import launch

    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "START_METHOD", "forkserver")
        yield

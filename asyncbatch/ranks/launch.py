"""Ranks on this machine, started from a notebook or a script: what torchrun does for `torchrun script.py`."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .errors import RankError

START_METHOD = "spawn"  # of multiprocessing; tests, which start many, take another


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call an importable function in `size` new processes, which are ranks as torchrun makes them. Returns what it
    returned, by rank. RankError if one fails."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=size, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1", max_restarts=0, start_method=START_METHOD,
    )  # fmt: skip
    try:
        with _quiet():
            results = elastic_launch(config, function)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message = str(failure.message or failure)
    else:
        return [results[rank] for rank in range(size)]
    raise RankError(message, rank)  # not within `except`: that error keeps the queues of the ranks alive


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the agent's log, of which the error says all."""
    loggers = [
        logging.getLogger(name) for name in ("torch.distributed", "torch.multiprocessing", "torchelastic-events-null")
    ]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)

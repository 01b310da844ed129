"""Keeping Python's garbage collector from stopping the loop.

A collection of the oldest generation looks at every object of the process. Beside a compiled model of the 8B shape it
took 120 to 690 ms (H200), in the middle of a step's 5. So while a GPU is served, the objects that were there before are
frozen: no collection looks at them any more (`gc.freeze`; vLLM and SGLang do the same). And where a collection of
what has come since is nearly due, it is done while the host waits for the device anyway.

What is frozen and becomes garbage in a circle of references stays in memory until the last device is closed, or the
next one opens. Other garbage goes at once, as always. A caller who has switched the collector off, or has frozen
objects, is left alone. On a CPU steps are long and the process is small: there all is as it was.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

LONG_S = 1e-3  # a collection that takes longer than this is too long for a loop: freeze what it looked at

_holders: set[int] = set()  # of the open devices. (No lock: a finalizer runs wherever the collector finds it.)
_frozen_by_us = False


def keep_quiet(device: Any) -> weakref.finalize:
    """Collect, and freeze what is left, until the finalizer that is returned is called, or `device` is dropped."""
    global _frozen_by_us
    if gc.isenabled() and (_frozen_by_us or not gc.get_freeze_count()):
        gc.unfreeze()  # devices that were dropped may be among it
        gc.collect()
        gc.freeze()
        _frozen_by_us = True
    _holders.add(id(device))
    # (Also at the end of the process: extension modules complain about what is frozen then.)
    return weakref.finalize(device, _let_go, id(device))


def _let_go(holder: int) -> None:
    global _frozen_by_us
    _holders.discard(holder)
    if not _holders and _frozen_by_us:
        gc.unfreeze()
        _frozen_by_us = False


def quietly(serve: Callable[[], Any], gc: Any = gc) -> Any:
    """Serve, and return what `serve` returns, while no collection looks at the objects that were there before. Garbage
    among them is collected first: once frozen it would stay. gc: Python's collector, or another with its functions."""
    gc.collect()
    gc.freeze()
    try:
        return serve()
    finally:
        gc.unfreeze()


def collect_while_waiting() -> None:
    """The host is about to wait for the device: do the collection that would come next anyway, if it is half due. Where
    even what is not frozen has become too much for a short one, freeze that too."""
    counts, limits = gc.get_count(), gc.get_threshold()
    if 2 * counts[0] <= limits[0] or not gc.isenabled() or not _frozen_by_us:
        return
    generation = 0 if counts[1] < limits[1] else 1 if counts[2] < limits[2] else 2
    start = time.perf_counter()
    gc.collect(generation)
    if generation == 2 and time.perf_counter() - start > LONG_S:
        gc.freeze()

"""How long work takes that is launched and not waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def time_work(work: Callable[[], Any], synchronize: Callable[[], Any], now: Callable[[], float] = time.perf_counter):
    """(back, done): how long after its call `work` gave the host back, and how long after it the device was done.

    `synchronize` waits for all that the device was given; `now` is the clock, and its unit that of the answer."""
    synchronize()  # what was launched earlier is not to be measured
    start = now()
    work()
    back = now()
    synchronize()
    return back - start, now() - start

"""The two loops. Everything else they share (`base.py`); the difference between them is the lesson.

synchronous      host    plan fill launch ......... commit plan fill launch ......... commit
                 device                   step N                             step N+1

asynchronous     host    plan N+1 . commit N, plan N+2 . commit N+1, plan N+3 . commit N+2 ...
                 device  step N     step N+1             step N+2               step N+3
"""

from __future__ import annotations

from collections import deque

from .base import BatcherBase
from .slot import Slot


class SyncBatcher(BatcherBase):
    """Prepares a step, waits while the device computes it, and reads the result while the device waits."""

    mode = "sync"
    default_slots = 1

    def step(self) -> bool:
        plan = self.plan()
        if plan is None:
            return False
        slot = self.fill(plan)
        self.launch(slot)
        self.wait(slot)
        self.commit(slot)
        return True


class AsyncBatcher(BatcherBase):
    """Prepares step N+1 while the device computes step N. With `num_slots` slots, that many steps are in flight.

    The plan of step N+1 is made without the results of step N: tokens go from one step to the next on the device
    (carry-over), and a request that step N turns out to end costs one wasted token.
    """

    mode = "async"
    default_slots = 2

    def __init__(self, model, **options):
        self.in_flight: deque[Slot] = deque()  # launched and not committed, oldest first
        super().__init__(model, **options)

    def step(self) -> bool:
        plan = self.plan()
        if plan is not None:
            slot = self.fill(plan)
            self.launch(slot)
            self.in_flight.append(slot)
        if len(self.in_flight) == len(self.slots) or (self.in_flight and plan is None):
            slot = self.in_flight.popleft()
            self.wait(slot)
            self.commit(slot)
            return True
        return plan is not None

    def _abort(self, reason, error) -> None:
        self.in_flight.clear()
        super()._abort(reason, error)

"""What devices have in common whose time is real, and not a number."""

from __future__ import annotations

import time
from typing import Any

from .garbage import collect_while_waiting, keep_quiet


class RealTime:
    """The host's time is `time.perf_counter`, in seconds.

    host_work_s: seconds of Python that are burnt with each plan, for lessons."""

    host_work_s = 0.0
    shape: Any = None
    now = staticmethod(time.perf_counter)

    def _keep_quiet(self) -> None:
        """Keep the garbage collector from stopping the loop, until `_quiet` is called."""
        self._quiet = keep_quiet(self)

    def wait_until(self, moment: float) -> None:
        time.sleep(max(0.0, moment - self.now()))

    def host_begins(self, phase: str, plan: Any, kv: Any) -> None:
        if phase == "wait":
            collect_while_waiting()

    def host_ends(self, phase: str, plan: Any) -> None:
        if self.host_work_s and phase == "plan" and plan is not None:
            end = self.now() + self.host_work_s
            while self.now() < end:
                pass

    def abandon(self, slots: Any) -> None:
        pass

"""A batcher whose model lies on several ranks: what it does otherwise than one that has the model to itself.

All ranks have the same requests in the same books, plan the same steps and launch them, each for its part of the model.
The first of them leads: its batcher is used as ever. On the others `follow()` serves along until the leader closes.
What comes in at the leader (a request, a cancellation, the end) is an *entry*, which all ranks take before the same
step (`lockstep.py`).
"""

from __future__ import annotations

import functools
import sys
from collections import deque
from typing import Any

from ..request import RequestError
from ..scheduler import BatchPlan, RunState
from ..serving import Handle, Serving
from ..slot import Slot
from ..streams import DeviceError
from ..timeline import Timeline
from .errors import RankError
from .group import versions
from .local import LocalModels
from .lockstep import Lockstep
from .runner import runner_for
from .watch import Watch
from .world import World


def join_ranks(batcher: Any, model: Any) -> Any:
    """Make `batcher`, which is being made for a model that transformers has sharded, one of a rank. Returns this rank's
    part of the model, to be served in its place. All ranks do so at the same time.

    ModelError for a model that is sharded in a way that is not served, RankError where the ranks differ."""
    local, connection = LocalModels.of(model)
    connection.agree(batcher=batcher.mode, **versions())
    batcher.__class__ = _class_on_ranks(type(batcher))  # type: ignore[arg-type]
    batcher.watch = World.here.watch if World.here else connection.new_watch()
    batcher.lockstep = Lockstep(connection, batcher.watch)
    batcher.runner = runner_for(next(local.parameters()).is_cuda)
    return local


@functools.cache
def _class_on_ranks(kind: type) -> type:
    return type(kind.__name__, (OnRanks, kind), {"__doc__": kind.__doc__, "__module__": kind.__module__})


class OnRanks(Serving):
    """The methods of a batcher that are others where its model lies on several ranks.

    collective_s: for each of the newest steps (step, seconds that this rank's device was in collectives, the waiting
    for other ranks included), on a CPU."""

    lockstep: Lockstep
    watch: Watch
    collective_s: deque[tuple[int, float]]
    config: Any
    _is_ending = False  # all ranks know that the batcher is being closed
    _lost_by: DeviceError | None = None

    @property
    def leads(self) -> bool:
        """Whether requests are given to this rank."""
        return self.lockstep.leads

    def follow(self) -> None:
        """Serve along with the leader until it closes its batcher; then this one is closed, too. RequestError on the
        leader itself. DeviceError and RankError if a rank cannot go on."""
        if self.leads:
            raise RequestError("follow() is for the other ranks: this one leads, and takes the requests")
        super()._check_open()
        with self._lock:
            try:
                while not self._closed:
                    self._step_or_close()
            except BaseException:
                self._abort("cancelled", None)
                raise
        if self._lost_by is not None:
            raise self._lost_by

    # ---- what came in is done by all ranks before the same step ---------------------------------------------------

    def _take_inbox(self) -> None:
        """Not here: with the next step."""

    def step(self) -> bool:
        entries = []
        while self.leads and self._inbox:
            entries.append(_travelling(*self._inbox.popleft()))
        for entry in self.lockstep.exchange(entries):
            self._take(*entry)
        if self._closed:
            return False
        with self.watch.busy("serving, step"):
            return super().step()

    def _take(self, operation: str, number: int, *about: Any) -> None:
        handle = self._handles.get(number)
        if operation == "add":
            self.scheduler.add(handle._state if handle is not None else self._handle_of_leader(number, *about)._state)
        elif operation == "cancel":
            if handle is not None and self.scheduler.finish(handle._state, "cancelled"):
                self._complete(handle, self.device.now())
        elif operation == "renew":
            super()._renew()
        else:
            self._is_ending = True
            super().close()
            if World.here is None:
                self.watch.close()

    def _handle_of_leader(self, number: int, request: Any, stop: frozenset[int], on_text: bool) -> Handle:
        """A handle like the one that the leader has."""
        state = RunState(number, request, stop, self._stops_on_text if on_text else None)
        self._handles[number] = handle = Handle(self, state)
        return handle

    def _renew(self) -> None:
        self._inbox.append(("renew", None))  # type: ignore[arg-type]
        for _ in range(2):  # it is sent with the first step, and done with the second
            self._step_or_close()

    def _new_timeline(self) -> Timeline:
        self.collective_s = deque(maxlen=self.config.timeline)
        timeline: Timeline = super()._new_timeline()  # type: ignore[misc]
        return timeline

    def close(self) -> None:
        if self.leads and not self._closed:
            with self._lock:
                self._inbox.append(("close", None))  # type: ignore[arg-type]
                for _ in range(2):
                    self._step_or_close()
        else:
            super().close()

    def _abort(self, reason: str, error: Exception | None) -> None:
        if not self._is_ending and not isinstance(error, DeviceError):
            # An interrupt, or an exception: where it came, the other ranks cannot know.
            self._lose(sys.exc_info()[1] or RankError("the batcher was closed in the middle of a run"))
        super()._abort(reason, error)

    def _lose(self, error: BaseException) -> None:
        """Also tell the other ranks. What is said of the loss is the first cause, which may be another rank's."""
        self._lost_by = self._lost_by or self.watch.fail(error)
        super()._lose(self._lost_by)

    def _check_open(self) -> None:
        super()._check_open()
        if not self.leads:
            connection = self.lockstep.connection
            raise RequestError(f"{connection.name(0)} takes the requests; here, on {connection.name()}, call follow()")

    # ---- all ranks do the same ------------------------------------------------------------------------------------

    def plan(self) -> BatchPlan | None:
        plan: BatchPlan | None = super().plan()  # type: ignore[misc]
        if plan is not None:
            self.lockstep.note_plan(plan)
        return plan

    def wait(self, slot: Slot) -> None:
        self.watch.doing = "waiting for the device"  # if it comes to that, another rank is to blame
        super().wait(slot)  # type: ignore[misc]
        self.watch.doing = ""

    def commit(self, slot: Slot) -> None:
        failure = self.device.failure(slot.index)
        if failure:  # one rank's, perhaps, and the others have their results: nobody can go on
            raise DeviceError(f"on {self.lockstep.connection.name()}: {failure}")
        plan = slot.plan
        super().commit(slot)  # type: ignore[misc]
        assert plan is not None
        self.lockstep.note_tokens(slot.output_ids[: len(plan.rows)])
        in_collectives = getattr(self.device, "collective_s", None)
        if in_collectives is not None:
            self.collective_s.append((plan.step, in_collectives(slot.index)))


def _travelling(operation: str, state: RunState | None) -> tuple[Any, ...]:
    """An entry of the leader's inbox as it goes to the other ranks."""
    if state is None:
        return operation, -1
    if operation == "add":
        return operation, state.number, state.request, state.stop_token_ids, state.stops_on_text is not None
    return operation, state.number

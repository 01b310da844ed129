"""Exercises of notebook 07: `step_time`, `gain_with_stops` and `quietly`. The last one is tried with a collector that
only notes what it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...devices.garbage import quietly
from ...measure import law
from ..parts import Case, Exercise


class Collector:
    """In place of Python's `gc`. calls: what it was told, in order, with "serve" among it. It starts with garbage."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.garbage, self.frozen, self.enabled, self.keeps_garbage = True, False, True, False

    def collect(self, generation: int = 2) -> int:
        self.calls.append("collect")
        self.garbage = False
        return 0

    def freeze(self) -> None:
        self.calls.append("freeze")
        self.frozen, self.keeps_garbage = True, self.garbage

    def unfreeze(self) -> None:
        self.calls.append("unfreeze")
        self.frozen = False

    def disable(self) -> None:
        self.calls.append("disable")
        self.enabled = False

    def enable(self) -> None:
        self.calls.append("enable")
        self.enabled = True

    def isenabled(self) -> bool:
        return self.enabled


class Quiet:
    """What a function did with a collector. served: (frozen, enabled, frozen with garbage) while it served, for each
    time. after: (frozen, enabled). gave: what it returned, or the exception that came out of it."""

    def __init__(self, function: Callable[..., Any], fails: bool):
        gc = Collector()
        self.served: list[tuple[bool, bool, bool]] = []

        def serve() -> str:
            gc.calls.append("serve")
            self.served.append((gc.frozen, gc.enabled, gc.keeps_garbage))
            if fails:
                raise ConnectionError("the caller has gone")
            return "tokens"

        try:
            self.gave = function(serve, gc)
        except ConnectionError as error:
            self.gave = type(error).__name__
        self.calls, self.after = gc.calls, (gc.frozen, gc.enabled)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Quiet) and self._key == other._key

    @property
    def _key(self) -> tuple:
        return self.served, self.after, self.gave

    def __repr__(self) -> str:
        end = f"stopped with {self.gave}" if self.gave == "ConnectionError" else f"returned {self.gave!r}"
        return f"{', '.join(self.calls) or 'nothing'}, and {end}"


def _quiet(function: Callable[..., Any], what: str) -> Any:
    made = Quiet(function, fails=what == "a run that stops with an error")
    if made.gave is ...:
        return ...
    return made


def _explain_quiet(args: tuple[Any, ...], got: Any, want: Any) -> str | None:
    if not isinstance(got, Quiet):
        return None
    if len(got.served) != 1:
        return f"`serve()` is to be called once; you called it {len(got.served)} times."
    frozen, enabled, garbage = got.served[0]
    if not enabled:
        return (
            "Without a collector nothing pauses, but garbage that refers to itself in a circle stays for as long as "
            "you serve. Frozen, the old objects are left out, and what comes new is still collected."
        )
    if not frozen:
        return "While it serves nothing is frozen, so a collection looks at every object: freeze before `serve()`."
    if garbage:
        return "You freeze what is garbage already, and frozen garbage stays: `gc.collect()` first."
    if got.after[0]:
        when = "with an error " if got.gave == "ConnectionError" else ""
        return f"When `serve` has ended {when}the objects are still frozen: `gc.unfreeze()`, in a `finally`."
    if got.gave != want.gave:
        return "What `serve()` returns is lost: return it."
    return "Leave the collector as it was."


# fmt: off
EXERCISES = {
    "step_time": Exercise(
        law.step_time, "For a host of {0:g} ms, a device of {1:g} ms and slots={2}", "says",
        (
            Case((3.0, 9.0, 1), "With one slot they take turns: 3 + 9 ms.", (
                (9.0, "With one slot nothing overlaps: a slot is filled again only after its commit. They take turns."),
            )),
            Case((3.0, 9.0, 2), "The device is busy all the time, and computes a step in 9 ms.", (
                (12.0, "That is one slot, in turns. With two the host works on one step beside the device's other."),
                (6.0, "Half of 12 would be less than the device needs for a step. It computes one after the other."),
            )),
            Case((9.0, 5.0, 2), "The host is busy all the time: a step takes its 9 ms, and the device waits.", (
                (5.0, "The device could. But the host prepares a step in 9 ms, and there is one host."),
                (7.0, "Half of 14 would be less than the host needs for a step. It prepares one after the other."),
            )),
            Case((9.0, 5.0, 3), "There is one host, however many slots it fills: a step takes its 9 ms.", (
                (5.0, "Another slot is another buffer, not another host: each step still takes the host 9 ms."),
                (14 / 3, "A third of 14 is less than the host needs for a step. It prepares one after the other."),
                (4.5, "Another slot is another buffer, not another host: each step still takes the host 9 ms."),
            )),
        ),
        (
            "Who of the two is busy all the time, if there are two slots? And if there is one?",
            "The sum of both with one slot, else the longer one: `max(host, device)`.",
        ),
    ),
    "gain_with_stops": Exercise(
        law.gain_with_stops, "For a host of {0:g} ms, a device of {1:g} ms, {2} tokens and slots={3}", "says",
        (
            Case((1.0, 5.0, 4, 2), "Synchronous: 4 steps of 6 ms. Asynchronous: 5 steps of 5 ms. 24 / 25.", (
                (1.2, "The fifth step is missing: the stop is seen when the step after it is already launched."),
                (0.8, "That is 24 / 30, one step too many: with two slots the stop is seen one step late. Or 20 / 25: "
                      "a synchronous step takes 6 ms."),
                (25 / 24, "Turned over: how many times as fast is the time before by the time after."),
                (1.0, "Five steps on one side, five on the other? In the synchronous loop the stop is seen at once."),
            )),
            Case((1.0, 5.0, 4, 3), "With three slots two more steps are in flight: 6 steps of 5 ms.", (
                (0.96, "With three slots two steps are launched before the stop is seen, not one: slots - 1."),
            )),
            Case((7.0, 5.0, 10, 2), "The host is longer: 10 steps of 12 ms, and 11 of 7 ms.", (
                (120 / 55, "An asynchronous step takes 7 ms here, as the host is longer: use your step_time."),
            )),
            Case((2.0, 6.0, 1, 2), "An answer of one token is computed twice."),
        ),
        (
            "How many steps does an answer of 4 tokens take in each loop, and how long is each of them?",
            "`tokens * step_time(host, device, 1)` before, `(tokens + slots - 1) * step_time(host, device, slots)` "
            "after. Divide.",
        ),
    ),
    "quietly": Exercise(
        quietly, "For {0}", "did", (
            Case(("a run that ends well",), "Collect, freeze, serve, unfreeze."),
            Case(("a run that stops with an error",), "Unfreeze then too: `try` and `finally`."),
        ),
        (
            "Three of `gc.collect()`, `gc.disable()`, `gc.freeze()`, `gc.unfreeze()` are needed. What must come last, "
            "whatever happens?",
            "`gc.collect()`, `gc.freeze()`, then `try: return serve()` and `finally: gc.unfreeze()`.",
        ),
        _quiet, _explain_quiet,
    ),
}
# fmt: on

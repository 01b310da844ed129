"""The law of the two loops: what a step costs the host and the device says how idle the device is."""

from __future__ import annotations


def idle_share(host_s: float, device_s: float) -> float:
    """The idle share of the device in the synchronous loop, where it idles while the host works.

    host_s, device_s: the seconds that each takes for one step. ZeroDivisionError if both are 0."""
    return host_s / (host_s + device_s)


def overlap_gain(host_s: float, device_s: float) -> float:
    """How many times as fast the asynchronous loop can be. In turns, a step takes the sum of both times. Overlapped, it
    takes the longer one.

    host_s, device_s: the seconds that each takes for one step. ZeroDivisionError if both are 0."""
    return (host_s + device_s) / max(host_s, device_s)


def step_time(host_s: float, device_s: float, slots: int = 2) -> float:
    """Seconds from the end of one step to the end of the next, in the steady state: the longest of three cycles. The
    host prepares and commits every step itself; the device computes every step itself; and a slot is filled again only
    after its commit, when host and device have both had it. With one slot that is the synchronous loop.

    host_s, device_s: the seconds that each takes for one step, copies left out. slots: from 1."""
    return max(host_s, device_s, (host_s + device_s) / slots)


def step_on_ranks(device_s: float, ranks: int, all_reduces: int = 0, seconds: float = 0.0) -> float:
    """Seconds of a step that is shared by so many ranks (tensor parallelism): each has its part of the work, and then
    they exchange sums. One rank has nothing to exchange.

    The host's work is not shared. So the idle share of the synchronous loop, `idle_share(host_s, step_on_ranks(...))`,
    grows with the ranks as long as their all-reduces take less than the work that they save, device_s * (1 - 1/ranks).

    device_s: seconds of the step on one device. ranks: from 1. all_reduces: in a step. seconds: of one all-reduce."""
    return device_s / ranks + (all_reduces * seconds if ranks > 1 else 0.0)


def gain_with_stops(host_s: float, device_s: float, tokens: int, slots: int = 2) -> float:
    """How many times as fast the asynchronous loop is where every answer ends at a stop token, its last of `tokens`.

    A stop is seen slots - 1 steps late, and for so many steps the row is computed for nobody. Below 1 it is slower.

    host_s, device_s: the seconds that each takes for one step. tokens: of an answer, from 1. slots: from 1."""
    return tokens * step_time(host_s, device_s, 1) / ((tokens + slots - 1) * step_time(host_s, device_s, slots))

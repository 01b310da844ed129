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

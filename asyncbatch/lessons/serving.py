"""For notebooks 00 to 05: let a server serve some requests, and read its timeline in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from statistics import median
from typing import Any

from ..devices.virtual import Costs
from ..models.load import load_model
from ..request import Request
from ..timeline import Timeline

# Milliseconds of a step on the virtual clock: the host's parts for each millisecond of its work, and the device's.
HOST_PARTS = {"plan": 0.4, "fill": 0.3, "launch": 0.1, "commit": 0.2}
DEVICE_PARTS = {"copy_in": 0.1, "step": 3.8, "copy_out": 0.1}


@cache
def _tiny() -> Any:
    """A model with random weights, for runs in which only times count."""
    return load_model("random:tiny", device="cpu")[0]


def serve(batcher: Any, requests: Sequence[Request]) -> tuple[list[list[int]], Timeline]:
    """Let a batcher warm up, serve the requests and close. Returns the tokens of each, and the timeline."""
    with batcher:
        batcher.run([Request([1], max_new_tokens=2)])
        completions = batcher.run(requests)
    return [completion.token_ids for completion in completions], batcher.timeline


def exact(batcher: Any, host_ms: float = 1.0, **options: Any) -> Timeline:
    """The timeline of 12 steps of a batcher of the class `batcher` on the virtual clock, where the host works for
    `host_ms` in each step, the device for 3.8 ms, and each of the two copies takes 0.1. options: of the batcher."""
    parts = {name: host_ms * ms for name, ms in HOST_PARTS.items()} | DEVICE_PARTS
    costs: Any = {name: ms / 1000 for name, ms in parts.items()}
    with batcher(_tiny(), max_batch_size=1, clock=Costs(**costs), **options) as server:
        server.run([Request([1], max_new_tokens=12, stop_token_ids=())])
    return server.timeline


def timed(batcher: Any, host_ms: float, device_ms: float, rows: int = 32) -> Timeline:
    """The timeline of 40 steps of a batcher of the class `batcher` on a timed device, which waits for `device_ms`
    instead of computing. In each step the host burns `host_ms` besides its own work."""
    requests = [Request([1], max_new_tokens=40, stop_token_ids=())] * rows
    with batcher(_tiny(), max_batch_size=rows, host_work_s=host_ms / 1000, step_s=device_ms / 1000) as server:
        server.run(requests)
    return server.timeline


def steps(timeline: Timeline) -> tuple[list[float], list[float]]:
    """Starts and ends of the device's steps, in milliseconds since the run began."""
    _, _, starts, ends = timeline.lane("compute")
    return tuple((1000 * (moments - timeline.origin)).tolist() for moments in (starts, ends))  # type: ignore[return-value]


def device_ms(timeline: Timeline) -> float:
    """Milliseconds that the device took for a step: the median."""
    return median(end - start for start, end in zip(*steps(timeline), strict=True))


def step_ms(timeline: Timeline) -> float:
    """Milliseconds from the end of one step to the end of the next: the median."""
    _, ends = steps(timeline)
    return median(after - before for before, after in zip(ends[:-1], ends[1:], strict=True))


def point(sync: Timeline, async_: Timeline) -> tuple[float, float, float]:
    """Where two runs stand on the law: the host's and the device's milliseconds for a step of the synchronous one, and
    how many times as fast the asynchronous one was."""
    faster = async_.summary().tokens_per_s / sync.summary().tokens_per_s
    return sync.summary().host_ms_per_step, device_ms(sync), faster

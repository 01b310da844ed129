"""Does an engine overlap, and what would overlapping bring?

Between the end of a step and the first kernel of the next one lie three things: the results are copied to the host, the
host works until it launches, and what it launched has not begun. An engine that overlaps launches a step before the one
before it has ended; then the device goes from step to step by itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...timeline import union
from .intervals import Stretches, covered_before
from .steps import UNKNOWN

PARTS = ("copy of results", "host, until the launch", "launched, not begun")


@dataclass(frozen=True)
class Overlap:
    """How the host and the device take turns. Milliseconds.

    `pairs`: how many times one step follows another and the launch of the second is known. `ahead`: of these, how many
    were launched before the first had ended. `launch_after_end_ms`: median time from the end of a step to the launch of
    the next, negative where the launch comes first. `gap_ms`: the median gap. `parts_ms`: the mean gap, by what it
    consists of (PARTS). `causes`: of all the time in "host, until the launch" the share of each thing that the host
    did, the largest first.

    `period_ms`: from the end of a step to the end of the next, on average; `device_ms`: the part of it in which a step
    ran; `host_ms`: the part in which the launching thread did not wait for the device. `speedup`: period / the longer
    of these two, which is the most that overlapping brings; None where no wait was recorded, so that the host's part is
    not known."""

    pairs: int
    ahead: int
    launch_after_end_ms: float
    gap_ms: float
    parts_ms: dict[str, float]
    causes: dict[str, float]
    period_ms: float
    device_ms: float
    host_ms: float | None
    speedup: float | None

    @property
    def overlaps(self) -> bool:
        """Whether at least half of the steps were launched before the one before them had ended."""
        return 2 * self.ahead >= self.pairs

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"overlaps": self.overlaps}


def split_gaps(
    steps: np.ndarray, launch: np.ndarray, results: Stretches
) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """(which pairs of steps are known, for each part of a gap its starts and ends, of the known pairs).

    steps: int64 [N, 2]. launch: when the first kernel of each step was launched, or UNKNOWN. results:
    starts and ends of the copies to the host, in order. The parts of a gap follow each other and make up the gap."""
    known = launch[1:] != UNKNOWN
    ends, begins, launched = steps[:-1, 1][known], steps[1:, 0][known], launch[1:][known]
    until = np.clip(launched, ends, begins)
    copied = ends.copy()
    if len(results[0]):
        # The last copy that began before the launch: its end, if it lies in the gap.
        at = np.searchsorted(results[0], until, "right") - 1
        reach = np.maximum.accumulate(results[1])
        copied = np.clip(np.where(at >= 0, reach[np.maximum(at, 0)], ends), ends, until)
    return known, dict(zip(PARTS, ((ends, copied), (copied, until), (until, begins)), strict=True))


def judge(
    steps: np.ndarray, launch: np.ndarray, parts: dict, causes: dict[str, int], waits: Stretches, host_known: bool
) -> Overlap | None:
    """The judgement on steps with their launches (as in `split_gaps`, which gives `parts`).

    causes: nanoseconds by cause within "host, until the launch". waits: (starts, ends) of the host's waits for the
    device. host_known: whether the trace has any. None if no launch of a second step is known."""
    known = launch[1:] != UNKNOWN
    if not known.any():
        return None
    after = (launch[1:] - steps[:-1, 1])[known]
    gaps = (steps[1:, 0] - steps[:-1, 1])[known]
    begin, end, count = int(steps[0, 1]), int(steps[-1, 1]), len(steps) - 1
    period = (end - begin) / count
    device = period - float((steps[1:, 0] - steps[:-1, 1]).sum()) / count
    host = None
    if host_known:
        waited = covered_before(np.array([begin, end]), *union(*waits))
        host = period - float(waited[1] - waited[0]) / count
    total = sum(causes.values())
    return Overlap(
        pairs=int(known.sum()),
        ahead=int((after < 0).sum()),
        launch_after_end_ms=1e-6 * float(np.median(after)),
        gap_ms=1e-6 * float(np.median(gaps)),
        parts_ms={part: 1e-6 * float((stops - starts).mean()) for part, (starts, stops) in parts.items()},
        causes={cause: ns / total for cause, ns in causes.items()},
        period_ms=1e-6 * period,
        device_ms=1e-6 * device,
        host_ms=None if host is None else 1e-6 * host,
        speedup=None if host is None or max(device, host) <= 0 else period / max(device, host),
    )

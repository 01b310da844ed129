"""Runs beside their floors: the least time that a GPU's memory and arithmetic allow (see `measure/bandwidth.py`).

Where ranks share a model, each reads its part of the weights, and of the keys and values, all at the same time; the
sums of each step are added, as long as they take where nobody waits. Replicas serve at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..measure.bandwidth import requests_floor, run_floor_s, step_floor_s
from ..measure.steps import Steps, steps_from
from ..timeline import Timeline
from .measurement import Measurement
from .place import Place
from .rank_times import replicas
from .report import ContextSteps, Floor, ModelFacts, RequestFloor


def request_floor(one: Measurement, wall_s: float, place: Place) -> RequestFloor | None:
    """A run beside the least time of its requests. None without a GPU, and where not all requests were there from the
    beginning and answered with at least one token."""
    facts, served = place.models.get(one.workload.model), one.served
    if facts is None or facts.flops_per_token is None or place.bandwidth is None or place.matmul is None:
        return None
    if facts.no_floor(one.sizes.max_length):
        return None
    if one.workload.arrivals != "all" or not served or min(new for _, new in served) < 1:
        return None
    times = len(replicas(one.ranks_of(one.typical))) or 1  # replicas share the requests, and work at the same time
    least = requests_floor(
        facts.weight_bytes,
        facts.kv_bytes_per_token / times,
        facts.flops_per_token / times,
        served,
        one.workload.batch_size * times,
        place.bandwidth,
        place.matmul,
    )
    collectives_s = None if facts.collectives_s is None else least.decode_steps * facts.collectives_s
    total_s = least.total_s + (collectives_s or 0.0)
    return RequestFloor(total_s, wall_s / total_s, *least, collectives_s)


def run_floor(one: Measurement, wall_s: float, timelines: Sequence[Timeline], place: Place) -> Floor | None:
    """The typical run beside its floor; None without a GPU. timelines: of the leader of each replica, of which the one
    with the most to do says the floor."""
    if place.bandwidth is None:
        return None
    facts, longest = place.models.get(one.workload.model), one.sizes.max_length
    each = [floor_numbers(steps_from(timeline), wall_s, facts, place.bandwidth, longest) for timeline in timelines]
    return max(each, key=lambda floor: floor.floor_s or 0.0)


def floor_numbers(steps: Steps, wall_s: float, model: ModelFacts | None, bandwidth: float, longest: int = 0) -> Floor:
    """A run beside its floor; all None where the steps do not say their context, or the model may read less than that
    for requests of up to `longest` tokens (`ModelFacts.no_floor`).

    first_context, last_context: medians over an eighth of the decode steps with the most rows, at most 32 of them:
    those with the smallest and those with the largest context. kv_bytes_per_s: the keys and values by which these two
    differ / the time by which they differ; only where the context grew at least eightfold."""
    decode = steps.kind == "decode"
    if model is None or model.no_floor(longest) or not decode.any() or not steps.context[decode].all():
        return Floor()
    weights, kv, collectives_s = model.weight_bytes, model.kv_bytes_per_token, model.collectives_s or 0.0
    floor_s = run_floor_s(weights, kv, steps.context.tolist(), bandwidth, collectives_s)
    rows = int(steps.rows[decode].max())
    full = np.flatnonzero(decode & (steps.rows == rows))
    full = full[np.argsort(steps.context[full], kind="stable")]
    count = max(1, min(32, len(full) // 8))

    def at(part: np.ndarray) -> ContextSteps:
        context = float(np.median(steps.context[part])) / rows
        ms = 1e-3 * float(np.median(steps.device_us[part]))
        floor_ms = 1e3 * step_floor_s(weights, kv, rows * context, bandwidth, collectives_s)
        return ContextSteps(rows, context, ms, floor_ms, ms / floor_ms)

    first, last, rate = at(full[:count]), at(full[-count:]), None
    assert first.ms is not None
    assert last.ms is not None
    if last.context >= 8 * first.context and last.ms > first.ms:
        rate = 1e3 * rows * (last.context - first.context) * kv / (last.ms - first.ms)
    return Floor(floor_s, wall_s / floor_s, first, last, rate)

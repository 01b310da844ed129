"""Two or more ranks on this machine's CPU, started from a notebook or a script, and what each of them saw.

served = serve_on_ranks(2, [Request([1, 2, 3], 16)])      # a list, by rank
served[0].timeline, served[1].timeline
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..batcher import AsyncBatcher, SyncBatcher
from ..models.load import load_model
from ..ranks.launch import on_ranks
from ..ranks.world import join
from ..request import Completion, Request
from ..timeline import Timeline


@dataclass
class Served:
    """What one rank has to tell of a run. completions: in the order of the requests; on the leader only, elsewhere
    empty. timeline: of this rank's own host and device. collective_s: for each step, the seconds that its device was in
    collectives, waiting for other ranks included."""

    rank: int
    completions: list[Completion]
    timeline: Timeline
    collective_s: dict[int, float]


def serve_on_ranks(
    size: int, requests: Sequence[Request], model: str = "random:tiny", mode: str = "async", **options: Any
) -> list[Served]:
    """Serve the requests by a model that `size` processes share, connected by gloo. Takes some seconds to start.

    model: a name for `load_model`; its heads must be divisible by `size`. mode: "sync" or "async". options: of the
    batcher. In a script it has to stand under `if __name__ == "__main__":`, as everything that starts processes.

    RankError if a rank fails."""
    return on_ranks(size, _serve, size, list(requests), model, mode, options)


def _serve(size: int, requests: list[Request], model_name: str, mode: str, options: dict[str, Any]) -> Served:
    """On each rank."""
    with join(size) as world:
        model, tokenizer = load_model(model_name, device="cpu", tp=size, progress=False)
        kind = AsyncBatcher if mode == "async" else SyncBatcher
        batcher: Any = kind(model, tokenizer=tokenizer, **options)
        completions: list[Completion] = []
        with batcher:
            if world.leads:
                completions = batcher.run(requests)
            else:
                batcher.follow()
        return Served(world.rank, completions, batcher.timeline, dict(batcher.collective_s))

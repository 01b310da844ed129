"""What ranks that share a model add to a step at least: the sums between them, and nothing else."""

from __future__ import annotations

from typing import Any

import torch

from ..ranks.collectives import Gathered, SharedEmbedding, Summed
from .bandwidth import _median_s


def step_collectives_s(model: Any, rows: int) -> float:
    """Seconds of the collectives of one decode step of `rows` rows, one after the other in a CUDA graph, with nothing
    between them: a sum of [rows, hidden] for the embedding and two for each layer, and the logits of all ranks side by
    side. The median of several replays.

    model: this rank's part of a model (`ranks.local`), on CUDA. All ranks call it at the same time, so that none waits
    long for another. ValueError without CUDA."""
    place = next(model.parameters()).device
    if place.type != "cuda":
        raise ValueError(f"the collectives of a step are measured on CUDA, and the model is on {place}")
    group = model.ranks
    with torch.cuda.device(place), torch.no_grad():
        sums, logits = collectives_of(model, rows)

        def launch() -> None:
            for part in sums:
                torch.ops.asyncbatch.all_reduce(part, group.name)
            for part in logits:
                torch.ops.asyncbatch.all_gather(part, group.name, group.size)

        launch()  # connects
        torch.cuda.synchronize(place)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            launch()
        seconds = _median_s(graph.replay)
        del graph
    return seconds


def collectives_of(model: Any, rows: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(what is summed, what is gathered) in a decode step of `rows` rows: a tensor for each collective, of its shape
    and dtype, one memory for those of equal shape."""
    config, like = model.config.get_text_config(decoder=True), next(model.parameters())
    summed = like.new_zeros(rows, config.hidden_size)
    modules = list(model.modules())
    sums = [summed for module in modules if isinstance(module, (Summed, SharedEmbedding))]
    gathered = [module for module in modules if isinstance(module, Gathered)]
    return sums, [like.new_zeros(rows, -(-module.out_features // model.ranks.size)) for module in gathered]

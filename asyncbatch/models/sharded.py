"""A model over several ranks, sharded by transformers: each rank has a part of every large weight.

torchrun starts the ranks; each loads the model, at the same time, with the same arguments.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from .messages import ModelError


def check_ranks(tp: int, device: torch.device) -> None:
    """ModelError unless this process is one of `tp` ranks that can share a model on that kind of device."""
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if size != tp:
        raise ModelError(
            f"tp is {tp}, and there are {size} ranks here: start {tp} of them, "
            f"torchrun --nproc-per-node {tp} your_script.py"
        )
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = there.type if there is not None else "cpu"
    if device.type != kind:
        raise ModelError(f"transformers shards a model on {kind!r} here, and device {str(device)!r} was asked for")


def distributed_config(tp: int) -> Any:
    """transformers' setting for tensor parallelism. ModelError where transformers is too old."""
    try:
        from transformers.distributed import DistributedConfig

        return DistributedConfig(tp_size=tp)
    except (ImportError, TypeError) as error:
        import transformers

        raise ModelError(
            f"transformers {transformers.__version__} has no DistributedConfig(tp_size=...): take 5.24 or newer"
        ) from error


def shard(model: Any, tp: int) -> Any:
    """The model, which each rank has whole, sharded over the ranks. It gives its memory back part by part."""
    if tp == 1:
        return model
    kind = type(model)
    config, _, meshes = kind.prepare_distribute_model(distributed_config(tp))
    model = kind.maybe_distribute_model(model, config, meshes)
    model.tie_weights()  # parts that were one tensor have become two
    return model.requires_grad_(False)

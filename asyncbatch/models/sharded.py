"""A model over several ranks, sharded by transformers: each rank has a part of every large weight.

torchrun starts the ranks; each loads the model, at the same time, with the same arguments.
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

from .messages import ModelError


def check_ranks(tp: int) -> None:
    """ModelError unless this process is one of `tp` ranks."""
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if size != tp:
        raise ModelError(
            f"tp is {tp}, and there are {size} ranks here: start {tp} of them, "
            f"torchrun --nproc-per-node {tp} your_script.py"
        )


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
    """The model, which each rank has whole, sharded over the ranks where it lies.

    (`from_pretrained(..., distributed_config=...)` would read each rank's part only; but it takes the GPU for the place
    also where torch was only built for one.)"""
    if tp == 1:
        return model
    config = distributed_config(tp)
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.utils import TransformersDeviceMesh

    where, shape = next(model.parameters()).device.type, (1, 1, 1, tp)
    dense = init_device_mesh(where, shape, mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))
    expert = init_device_mesh(where, (1, 1, tp, 1), mesh_dim_names=("pp", "dp_replicate", "efsdp", "ep"))
    model = type(model).maybe_distribute_model(model, config, TransformersDeviceMesh(dense, expert))
    model.tie_weights()  # parts that were one tensor have become two
    return model.requires_grad_(False)

"""From the model that transformers has sharded to one with plain local tensors.

transformers keeps a sharded weight as a DTensor and puts a function around each layer that talks to the other ranks.
That is made for training too: an eager forward of the 8B shape took the host 73 ms on two H200 (19 ms on one), and
the functions stand in the way of compilation. Serving needs less. Here is a copy of the module tree that shares this
rank's part of each weight, without those functions, and with the sums where they belong (`collectives.py`).
"""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..models.messages import ModelError
from .collectives import Gathered, Group, SharedEmbedding, Summed, share_of
from .group import Connection

# The ways of transformers to cut a layer that are served, and the dimension of the weight that is cut. None: not cut.
STYLES = {
    "colwise": 0, "colwise_gather_output": 0, "colwise_rep": 0, "rowwise": 1, "embedding_rowwise": 0,
    "replicate": None, "replicated_with_grad_allreduce": None,
}  # fmt: skip
PLACES = "_device_mesh", "_mesh_manager"  # attributes of a model that hold process groups, which cannot be copied


class LocalModels:
    """The local copy of each sharded model, so that the model's next batcher finds the worker of the last one."""

    _of: weakref.WeakKeyDictionary[nn.Module, tuple[list[Any], nn.Module, Connection]] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, model: nn.Module) -> tuple[Any, Connection]:
        """(the local copy of a sharded model as it is now, the ranks that share it). All ranks ask at the same time.

        ModelError for a model that is sharded in another way than by transformers' tensor parallelism, or in ways that
        are not served."""
        now = list(_identity(model))
        if model not in cls._of or cls._of[model][0] != now:
            connection = Connection.of(_process_group(model))
            local = local_model(model, connection.group_of_next_model())
            cls._of[model] = now, local, connection
        _, local, connection = cls._of[model]
        return local.train(model.training), connection


def _identity(model: nn.Module) -> Iterator[Any]:
    for name, module in model.named_modules():
        yield name, type(module)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        part = _local(tensor)
        yield name, part.data_ptr(), part.shape, part.dtype


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def _process_group(model: nn.Module) -> Any:
    meshes = {parameter.device_mesh for parameter in model.parameters() if hasattr(parameter, "device_mesh")}
    if len(meshes) != 1 or (mesh := meshes.pop()).ndim != 1:
        raise ModelError(
            "the model is sharded in more ways than one: served is tensor parallelism alone, "
            "from_pretrained(..., distributed_config=DistributedConfig(tp_size=N))"
        )
    return mesh.get_group()


def local_model(model: Any, group: Group) -> Any:
    """A copy of a model that transformers has sharded over the ranks of `group`, with plain local tensors that share
    the memory of the model's own. ModelError as in `LocalModels.of`."""
    _check_heads(model, group.size)
    parts: dict[int, Any] = {}
    for tensor in model.parameters():
        if hasattr(tensor, "to_local"):
            parts[id(tensor)] = nn.Parameter(_local(tensor), requires_grad=tensor.requires_grad)
        else:
            parts[id(tensor)] = tensor
    parts |= {id(buffer): _local(buffer) for buffer in model.buffers()}
    for module in model.modules():  # what cannot be copied, and is not wanted: None in its place
        parts |= {id(place): None for name in PLACES if (place := vars(module).get(name)) is not None}
    local, plan = copy.deepcopy(model, parts), model.tp_plan
    vars(local.config).pop("distributed_config", None)
    for name, module in list(local.named_modules()):
        style, original = _style(name, plan), model.get_submodule(name)
        is_cut = any(hasattr(tensor, "to_local") for tensor in original._parameters.values())
        if style is None and not is_cut:
            continue
        _check_style(name, style, original)
        vars(module).pop("forward", None)  # transformers' function around it
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        if style == "rowwise":
            _put(local, name, Summed(module, group))
        elif style in ("colwise_gather_output", "colwise_rep"):
            _put(local, name, Gathered(module, original.out_features, group))
        elif style == "embedding_rowwise":
            module.__class__ = SharedEmbedding
            module.group, module.first = group, share_of(original.num_embeddings, group)[0]
            module.padding_idx = None
    local.ranks = group  # for its runner
    return local


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _style(name: str, plan: dict[str, str]) -> str | None:
    """The style of a layer in a plan of transformers, which has * for numbers, or is written out."""
    return plan.get(name) or plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))


def _check_style(name: str, style: str | None, original: Any) -> None:
    """ModelError for a layer that is sharded in a way that is not served, or otherwise than its style says."""
    if style not in STYLES:
        raise ModelError(f"its layer {name} is sharded as {style!r}; served are {', '.join(STYLES)}")
    cut, weight = STYLES[style], original._parameters.get("weight")
    if cut is None:
        return
    if not isinstance(original, nn.Embedding if style == "embedding_rowwise" else nn.Linear):
        raise ModelError(f"its layer {name}, sharded as {style!r}, is a {type(original).__name__}")
    (placement,) = getattr(weight, "placements", None) or (None,)
    if placement is None or not (placement.is_shard(cut) or placement.is_shard(cut - 2)):
        raise ModelError(f"its layer {name} should be sharded as {style!r}, and its weight is {placement or 'whole'}")


def _check_heads(model: Any, size: int) -> None:
    """ModelError unless each rank gets the same number of whole heads. (Keys and values of fewer heads than ranks would
    have to be kept twice; that is not done.)"""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None)
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, name, None) or heads
        if isinstance(count, int) and count % size:
            raise ModelError(
                f"its {name} is {count}, which {size} ranks cannot share equally: take a --tp that divides it"
            )

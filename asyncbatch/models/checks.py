"""`check_model`: which models can be served, and why not, said before a wrong token is computed."""

from __future__ import annotations

import importlib.util
import inspect
import re
from typing import Any

import torch

from .messages import ModelError
from .probe import attention_layers

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # types of layers
DEFAULT_LENGTH = 2048


def check_model(model: Any, max_length: int | None = None) -> None:
    """Raise ModelError, with the reason, if the paged attention of this package cannot serve `model`.

    Allowed is a decoder-only transformers model whose layers all attend through `transformers.AttentionInterface`, to
    the whole context or to a sliding window. First its settings are read. Then two tokens go through it, which shows
    what each layer really asks of attention (`probe.py`).

    max_length: the longest request (default: as a batcher's). What differs in longer ones does not matter.
    """
    reason = _refusal_by_kind(model) or _refusal_by_layers(model) or _refusal_by_interface(model)
    _refuse(model, reason or _refusal_on_device(model) or _refusal_by_attention(model, max_length))


def check_decoder(model: Any) -> None:
    """Raise ModelError, with the reason, if `model` is no decoder that attends through `AttentionInterface`, which is
    what transformers' own continuous batching asks for."""
    _refuse(model, _refusal_by_kind(model) or _refusal_by_interface(model))


def _refuse(model: Any, reason: str | None) -> None:
    if reason:
        kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
        raise ModelError(f"a model of type {kind!r} ({type(model).__name__}) cannot be served: {reason}")


def is_sharded(model: Any) -> bool:
    """Whether the model's weights are cut into parts for several ranks (DTensor, whose import takes long)."""
    return isinstance(model, torch.nn.Module) and any(hasattr(tensor, "to_local") for tensor in model.parameters())


def _refusal_by_kind(model: Any) -> str | None:
    """Why the model cannot be served, or None if it can, as in all functions below."""
    from transformers import PreTrainedModel

    if reason := _refusal_of_wrapper(model):
        return reason
    if not isinstance(model, PreTrainedModel):
        return "it is no transformers model; load_model(...) or AutoModelForCausalLM.from_pretrained(...) gives one"
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder; only decoder-only models are served"
    if model.get_output_embeddings() is None or not model.can_generate():
        return "it is no causal language model (it has no output layer over the vocabulary)"
    return None


def _refusal_of_wrapper(model: Any) -> str | None:
    """A model inside another object, and how to get it out."""
    if hasattr(model, "_orig_mod"):
        return "torch.compile has wrapped it; model._orig_mod is the model (on CUDA, compile=True compiles it)"
    if isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        return "it stands for copies of a model on several devices; model.module is the model"
    if hasattr(model, "merge_and_unload"):
        return "its adapters stand beside its weights; model.merge_and_unload() gives a model with both in one"
    return None


def _refusal_by_interface(model: Any) -> str | None:
    if not getattr(model, "_supports_attention_backend", False):
        return "its class does not attend through transformers.AttentionInterface"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no position_ids, so rows at different positions cannot share a step"
    return None


def _refusal_by_layers(model: Any) -> str | None:
    config = model.config.get_text_config(decoder=True)
    layers = set(getattr(config, "layer_types", None) or ())
    if other := sorted(layers - ATTENTION):
        return f"it has layers of type {', '.join(other)}; only layers of attention are served"
    if rope := re.search(r"'rope_type': '(dynamic|longrope)'", str(getattr(config, "rope_parameters", None))):
        return f"its rope type {rope[1]!r} depends on the longest row of a step, so tokens would depend on neighbours"
    return None


def _refusal_by_attention(model: Any, max_length: int | None) -> str | None:
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None) or DEFAULT_LENGTH
    if not isinstance(max_length, int) or max_length < 1:  # not given, or nonsense, of which others complain
        max_length = DEFAULT_LENGTH
    if any("forward" in vars(module) for module in model.modules()):
        return None  # a function in its place goes on using the original; what travels to the device says so
    try:
        attention_layers(model, min(max_length, longest))
    except ModelError as error:
        return str(error)
    return None


def _refusal_on_device(model: Any) -> str | None:
    """What is missing on the device where the model's weights are."""
    where = next(model.parameters()).device
    if where.type != "cuda":
        return None
    return _refusal_on_gpu(
        torch.cuda.get_device_name(where),
        torch.cuda.get_device_capability(where),
        model.dtype,
        importlib.util.find_spec("triton") is not None,
    )


def _refusal_on_gpu(name: str, capability: tuple[int, int], dtype: torch.dtype, has_triton: bool) -> str | None:
    if capability < (7, 5):
        return f"{name} has compute capability {capability[0]}.{capability[1]}, and 7.5 or newer is needed"
    if not has_triton:
        return "attention on CUDA needs the package triton, which comes with torch on Linux: pip install triton"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its weights are {dtype}; served on CUDA are float16, bfloat16 and float32"
    if dtype == torch.bfloat16 and capability < (8, 0):
        return f"{name} (compute capability 7.5) has no bfloat16: load the model with dtype=torch.float16"
    return None

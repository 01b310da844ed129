"""`check_model`: which models can be served, and why not, said before a wrong token is computed."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import re
import threading
from typing import Any, NamedTuple

import torch

from .messages import ModelError

UNSUPPORTED = ("softcap", "s_aux", "position_bias", "sliding_window")  # options of attention that this package lacks


def check_model(model: Any) -> None:
    """Raise ModelError, with the reason, if the paged attention of this package cannot serve `model`.

    Allowed is a decoder-only transformers model whose layers all attend to the whole context through
    `transformers.AttentionInterface`, with keys and values of one size. First its settings are read. Then a copy
    without memory (on the device "meta") runs once, which shows what each layer really asks of attention.
    """
    if reason := _refusal(model):
        kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
        raise ModelError(f"a model of type {kind!r} ({type(model).__name__}) cannot be served: {reason}")


def _refusal(model: Any) -> str | None:
    """Why the model cannot be served, or None if it can, as in all functions below."""
    from transformers import PreTrainedModel

    if reason := _refusal_of_wrapper(model):
        return reason
    if not isinstance(model, PreTrainedModel):
        return "it is no transformers model; load_model(...) or AutoModelForCausalLM.from_pretrained(...) gives one"
    return _refusal_by_settings(model) or _refusal_by_attention(model) or _refusal_on_device(model)


def _refusal_of_wrapper(model: Any) -> str | None:
    """A model inside another object, and how to get it out."""
    if hasattr(model, "_orig_mod"):
        return "torch.compile has wrapped it; model._orig_mod is the model (on CUDA, compile=True compiles it)"
    if isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        return "it stands for copies of a model on several devices; model.module is the model"
    if hasattr(model, "merge_and_unload"):
        return "its adapters stand beside its weights; model.merge_and_unload() gives a model with both in one"
    return None


def _refusal_by_settings(model: Any) -> str | None:
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder; only decoder-only models are served"
    if model.get_output_embeddings() is None or not model.can_generate():
        return "it is no causal language model (it has no output layer over the vocabulary)"
    config = model.config.get_text_config(decoder=True)
    layers = set(getattr(config, "layer_types", None) or ())
    if other := sorted(layers - {"full_attention"}):
        return f"it has layers of type {', '.join(other)}; only full_attention layers are served"
    window = getattr(config, "sliding_window", None)
    if not layers and window is not None and getattr(config, "use_sliding_window", True):
        return f"it attends to a sliding window of {window} tokens; only full attention is served"
    if not getattr(model, "_supports_attention_backend", False):
        return "its class does not attend through transformers.AttentionInterface"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no position_ids, so rows at different positions cannot share a step"
    if rope := re.search(r"'rope_type': '(dynamic|longrope)'", str(getattr(config, "rope_parameters", None))):
        return f"its rope type {rope[1]!r} depends on the longest row of a step, so tokens would depend on neighbours"
    return None


class _AttentionCall(NamedTuple):
    """What one layer asked of attention: the shapes of its keys and values, and its options."""

    module: Any
    key: torch.Size
    value: torch.Size
    options: dict[str, Any]


def _refusal_by_attention(model: Any) -> str | None:
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    calls, complete = _attention_calls(model)
    for module, key, value, options in calls:
        if asked := [option for option in UNSUPPORTED if options.get(option) is not None]:
            return f"its attention asks for {', '.join(asked)}, which paged attention here does not have"
        if not getattr(module, "is_causal", True):
            return "its attention is not causal (a token would see the tokens after it)"
        if key[-1] != value[-1] or key != calls[0].key:
            return f"its keys and values have different sizes ({key[-1]} and {value[-1]}), or layers differ in theirs"
    numbers = [getattr(call.module, "layer_idx", None) for call in calls]
    if complete and numbers != list(range(num_layers)):
        return f"attention was called by layers {numbers}, expected each of the {num_layers} once and in order"
    return None


_of_thread = threading.local()  # `calls`: of the probe that runs in this thread


def _note_attention(module: Any, query: Any, key: Any, value: Any, *_: Any, **options: Any) -> Any:
    """In place of attention: note what was asked for, and give a result of the right shape."""
    _of_thread.calls.append(_AttentionCall(module, key.shape, value.shape, options))
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def _attention_calls(model: Any) -> tuple[list[_AttentionCall], bool]:
    """The calls of attention in one forward pass, and whether the pass got to its end.

    Everything is on the device "meta", so nothing is computed and no memory is used."""
    from transformers import AttentionInterface

    calls = _of_thread.calls = []
    AttentionInterface.register("asyncbatch_probe", _note_attention)
    try:
        config = copy.deepcopy(model.config)
        config._attn_implementation = "asyncbatch_probe"
        with torch.device("meta"), torch.no_grad():
            ids = torch.zeros(1, 2, dtype=torch.long)
            type(model)(config).to(torch.bfloat16).eval()(input_ids=ids, position_ids=ids, use_cache=False)
    except Exception:  # some layers (a mixture of experts) read data, and "meta" has none: judge by the calls so far
        return calls, False
    return calls, True


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

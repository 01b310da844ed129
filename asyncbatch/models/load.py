"""`load_model`: the embedded model, a shape with random weights, a folder, or a hub id.

`load_model()` gives SmolLM2-135M-Instruct and needs no model hub. `load_model("random:tiny")` needs nothing at all.
A folder or a hub id is loaded by transformers.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from .embedded import embedded_folder
from .messages import ModelError, progress_bars, say
from .shapes import SHAPES, random_model
from .sharded import check_ranks, distributed_config, shard

ALLOWED = ", ".join(['"smollm2"', *(f'"random:{shape}"' for shape in SHAPES), "a folder", "a hub id"])


def load_model(
    name: str | os.PathLike[str] = "smollm2",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    seed: int = 0,
    tp: int = 1,
) -> tuple[Any, Any]:
    """Load a causal language model, ready to serve: in eval mode and without gradients.

    name: "smollm2" (the embedded model), "random:tiny", "random:llama-0.6b", "random:llama-1b" or "random:llama-8b"
        (random weights drawn from `seed`: the same seed, device and dtype give the same weights), a folder that
        transformers can read, or a hub id.
    device: None means "cuda" if there is a GPU, and "cpu" if there is none.
    dtype: None means bfloat16 on CUDA (float16 on a GPU without bfloat16) and float32 on the CPU.
    progress: whether to show progress bars. A line on stderr says in any case what is fetched, and from where.
    tp: over how many ranks transformers shards the model; all of them load it at the same time (`models/sharded.py`).
    Returns (model, tokenizer); the tokenizer is None for random weights, and for a folder that has none.
    Raises ModelError.
    """
    name = os.fspath(name) if isinstance(name, os.PathLike) else name
    if not isinstance(name, str) or not name.strip():
        raise ModelError(f"the model name is {name!r}; allowed: {ALLOWED}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {str(place)!r} was asked for, but torch {torch.__version__} sees no CUDA device here")
    dtype = dtype or _default_dtype(place)
    if tp > 1:
        check_ranks(tp)
    if name.startswith("random:"):
        try:
            return shard(random_model(name, place, dtype, seed), tp), None
        except torch.OutOfMemoryError as error:
            raise _too_large(name, place) from error
    embedded = name == "smollm2"
    source = str(embedded_folder(progress)) if embedded else _folder_or_hub_id(name)
    try:
        with progress_bars(progress and not embedded):  # the embedded model loads in a moment
            model, tokenizer = _from_pretrained(source, place, dtype, tp)
            if embedded and tokenizer.pad_token is None:  # transformers 5.17 reads none from the GGUF file
                tokenizer.pad_token = tokenizer.eos_token
            return model, tokenizer
    except torch.OutOfMemoryError as error:
        raise _too_large(source, place) from error
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        hint = "If it is damaged, delete it: the next call makes it anew." if embedded else f"Allowed: {ALLOWED}"
        raise ModelError(f"cannot load {source!r} as a causal language model: {reason}\n{hint}") from error


def _too_large(name: str, place: torch.device) -> ModelError:
    free, total = (number / 2**30 for number in torch.cuda.mem_get_info(place))
    return ModelError(
        f"{name!r} does not fit into {torch.cuda.get_device_name(place)}: it has {total:.1f} GiB, and {free:.1f} of "
        "them are free. Take a smaller model, free the GPU, or give device='cpu'"
    )


def _default_dtype(place: torch.device) -> torch.dtype:
    if place.type != "cuda":
        return torch.float32
    with torch.cuda.device(place):  # a T4 (compute capability 7.5) only emulates bfloat16, slowly
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _folder_or_hub_id(name: str) -> str:
    """The path of the folder `name`, or `name` itself if it can be a hub id. ModelError if it is neither."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ModelError(f"{name!r}: there is no such folder, and it is no hub id; allowed: {ALLOWED}")
    from huggingface_hub import constants, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        say(f"Fetching {name} from {constants.ENDPOINT}/{name} into {constants.HF_HUB_CACHE}")
    return name


def _from_pretrained(source: str, device: torch.device, dtype: torch.dtype, tp: int) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or a hub id; the tokenizer is None if there is none or if it cannot be loaded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if tp > 1 and device.type == "cuda":
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, distributed_config=distributed_config(tp))
    else:
        model = shard(AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device), tp)
    model.requires_grad_(False).eval()
    files = [file.name for file in Path(source).glob("*")]  # none for a hub id
    if files and not re.search(r"^(tokenizer|vocab|spiece)|tiktoken$", "\n".join(files), re.MULTILINE):
        return model, None
    try:
        return model, AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        say(f"{source}: no tokenizer could be loaded ({str(error).strip().splitlines()[0]}); going on without one")
        return model, None

"""What the memory bandwidth allows: the least time that a step, or a whole run, can take on one GPU.

A decode step of a language model is limited by memory. Whatever else it does, it reads every weight once and the keys
and values of every token that its rows attend to once:

    floor of a step = (weight bytes + context tokens * key and value bytes a token) / bandwidth

The bandwidth is the one that a plain copy reaches on the same GPU in the same session, read plus write, and not a data
sheet's. The floor of a run is the sum over its steps; prefill steps count the same way, which is too little for long
prompts, whose floor is arithmetic. Time divided by the floor says how far from it one is, on any GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import torch

from ..kv_cache import kv_bytes

BUFFER_BYTES = 2**31
WARM_UP, REPEATS = 20, 21  # an idle GPU's first copies are slower, by 3 % once


def buffer_bytes(free_bytes: int) -> int:
    """Bytes of each of the two buffers of `copy_bandwidth`: 2 GiB, or a quarter of what is free if that is less, in
    whole MiB. ValueError if that is under 16 MiB: it would lie in a GPU's cache."""
    size = min(BUFFER_BYTES, free_bytes // 4) >> 20 << 20
    if size < 2**24:
        raise ValueError(f"{free_bytes / 2**20:.0f} MiB are free on the GPU: measuring its bandwidth needs at least 64")
    return size


def copy_bandwidth(device: torch.device | str) -> float:
    """Bytes a second, read plus write, of a large copy from device memory to device memory: the median of several,
    timed with events. ValueError without CUDA or without memory for it."""
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"the copy bandwidth is measured on a CUDA device, and {device} was given")
    with torch.cuda.device(device):
        size = buffer_bytes(torch.cuda.mem_get_info()[0])
        source = torch.empty(size, dtype=torch.uint8, device=device).random_()  # zeros can be faster than real data
        target = torch.empty_like(source)
        for _ in range(WARM_UP):
            target.copy_(source)
        times_ms = []
        for _ in range(REPEATS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            times_ms.append(start.elapsed_time(end))
        del source, target
        torch.cuda.empty_cache()  # the memory is wanted for the key-value cache now
    return 2 * size / (1e-3 * statistics.median(times_ms))


def weight_bytes(model) -> int:
    """Bytes of the weights that a decode step reads: all parameters, tied ones once. An input embedding table that is
    not the output layer too is left out: a step reads only one row of it for each of its tokens."""
    table = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is table
    return sum(p.numel() * p.element_size() for p in model.parameters() if tied or p is not table)


def kv_bytes_per_token(config, dtype: torch.dtype) -> int:
    """`kv_bytes` of a model. config: a transformers config, also one with a text part. dtype: that of the cache."""
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return kv_bytes(config.num_hidden_layers, heads, size, dtype.itemsize)


def step_floor_s(weight_bytes: float, kv_bytes_per_token: float, context_tokens: float, bandwidth: float) -> float:
    """Seconds of one step at the least: the weights once and `context_tokens` tokens' keys and values once (those of
    all rows together), at `bandwidth` bytes a second. ValueError for a bandwidth that is not above 0."""
    if not bandwidth > 0:
        raise ValueError(f"the bandwidth is {bandwidth!r}: allowed are bytes a second above 0")
    return (weight_bytes + context_tokens * kv_bytes_per_token) / bandwidth


def run_floor_s(weight_bytes: float, kv_bytes_per_token: float, contexts: Iterable[float], bandwidth: float) -> float:
    """Seconds of a whole run at the least; `contexts` holds the context tokens of each of its steps."""
    return sum(step_floor_s(weight_bytes, kv_bytes_per_token, context, bandwidth) for context in contexts)

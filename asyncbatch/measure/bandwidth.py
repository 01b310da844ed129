"""What the memory bandwidth allows: the least time that a step, or a whole run, can take on one GPU.

A decode step of a language model is limited by memory. Whatever else it does, it reads every weight once, and once the
keys and values of every token that its rows attend to:

    floor of a step = (weight bytes + context tokens * key and value bytes a token) / bandwidth

The bandwidth is what a plain copy reaches on the same GPU in the same session, read plus write, and not the number in a
data sheet. The floor of a run is the sum over its steps. Prefill steps count in the same way, which is too little for
long prompts: those are limited by arithmetic. The time of a run divided by its floor says how far from it the run is,
and can be compared between GPUs.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import torch

from ..attention import kv_heads_and_dim
from ..kv_cache import kv_bytes

BUFFER_BYTES = 2**31
WARM_UP, REPEATS = 20, 21  # the first copies of an idle GPU are slower, in one measurement by 3 %


def buffer_bytes(free_bytes: int) -> int:
    """Bytes of each of the two buffers of `copy_bandwidth`, in whole MiB: 2 GiB, or a quarter of the free memory where
    that is less. ValueError if it would be less than 16 MiB, which could fit into the GPU's cache."""
    size = min(BUFFER_BYTES, free_bytes // 4) >> 20 << 20
    if size < 2**24:
        raise ValueError(f"{free_bytes / 2**20:.0f} MiB are free on the GPU: measuring its bandwidth needs at least 64")
    return size


def copy_bandwidth(device: torch.device | str) -> float:
    """Bytes a second, read plus write, of a large copy from device memory to device memory: the median of several
    copies, timed with events. ValueError without CUDA, or without memory for it."""
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
        torch.cuda.empty_cache()  # give the memory back: the KV cache is allocated next
    return 2 * size / (1e-3 * statistics.median(times_ms))


def weight_bytes(model) -> int:
    """Bytes of the weights that a decode step reads: those of all parameters, tied ones once. The input embedding is
    left out unless it is the output layer too: a step reads only one row of it for each of its tokens."""
    embedding = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is embedding
    return sum(p.numel() * p.element_size() for p in model.parameters() if tied or p is not embedding)


def kv_bytes_per_token(config, dtype: torch.dtype) -> int:
    """Bytes that the keys and values of one token take in the cache. config: a transformers config, of a text model or
    of one with a text part. dtype: that of the cache."""
    config = config.get_text_config(decoder=True)
    heads, size = kv_heads_and_dim(config)
    return kv_bytes(config.num_hidden_layers, heads, size, dtype.itemsize)


def step_floor_s(weight_bytes: float, kv_bytes_per_token: float, context_tokens: float, bandwidth: float) -> float:
    """The least seconds that one step can take: to read the weights once, and the keys and values of `context_tokens`
    tokens (of all rows together) once, at `bandwidth` bytes a second. ValueError for a bandwidth that is not above
    0."""
    if not bandwidth > 0:
        raise ValueError(f"the bandwidth is {bandwidth!r}: allowed are bytes a second above 0")
    return (weight_bytes + context_tokens * kv_bytes_per_token) / bandwidth


def run_floor_s(weight_bytes: float, kv_bytes_per_token: float, contexts: Iterable[float], bandwidth: float) -> float:
    """The least seconds that a whole run can take. contexts: the context tokens of each of its steps."""
    return sum(step_floor_s(weight_bytes, kv_bytes_per_token, context, bandwidth) for context in contexts)

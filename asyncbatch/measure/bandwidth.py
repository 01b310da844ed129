"""What the memory bandwidth allows: the least time that a step, or a whole run, can take on one GPU.

A decode step of a language model is limited by memory. Whatever else it does, it reads every weight once, and once the
keys and values of every token that its rows attend to:

    floor of a step = (weight bytes + context tokens * key and value bytes a token) / bandwidth

The bandwidth is what a plain copy reaches on the same GPU in the same session, read plus write, and not the number in a
data sheet. The floor of a run is the sum over its steps. Prefill steps count in the same way, which is too little for
long prompts: those are limited by arithmetic. The time of a run divided by its floor says how far from it the run is,
and can be compared between GPUs.

An engine that takes more steps than it needs has a larger floor of that kind. So there is a second one, which depends
on the requests alone (`requests_floor`): it decodes them in as few steps as continuous batching needs, and counts the
arithmetic of their prompts, at the rate that one large matrix product reaches on the same GPU.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch

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
        seconds = _median_s(partial(target.copy_, source))
        del source, target
        torch.cuda.empty_cache()  # give the memory back: the KV cache is allocated next
    return 2 * size / seconds


def matmul_rate(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> float:
    """Arithmetic operations a second (a multiplication and an addition are two) of one product of two square matrices
    of 8192 rows, 4096 where the memory is short: the median of several, timed with events. ValueError without CUDA."""
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"the rate of matrix products is measured on a CUDA device, and {device} was given")
    with torch.cuda.device(device):
        size = 8192 if torch.cuda.mem_get_info()[0] > 8 * 8192**2 * dtype.itemsize else 4096
        a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
        product = torch.empty_like(a)
        seconds = _median_s(partial(torch.mm, a, b, out=product))
        del a, b, product
        torch.cuda.empty_cache()
    return 2 * size**3 / seconds


def _median_s(launch: Callable[[], object]) -> float:
    """The median time on the device, in seconds, of what is launched, after a warm-up."""
    for _ in range(WARM_UP):
        launch()
    times_ms = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launch()
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    return 1e-3 * statistics.median(times_ms)


def weight_bytes(model) -> int:
    """Bytes of the weights that a decode step reads: those of all parameters, tied ones once. Embeddings, also those of
    positions or of each layer, are left out unless one is the output layer too: a step reads only one row of them for
    each of its tokens. Of a model that ranks share, this rank's part."""
    output = model.get_output_embeddings()
    rows = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    if output is not None:
        rows.discard(id(output.weight))
    return sum(_own(p).nbytes for p in model.parameters() if id(p) not in rows)


def has_experts(model) -> bool:
    """Whether each token goes through some experts of a layer only, so that a step may read fewer weights than all.
    (By the name that transformers gives them, since the settings call their number differently in each model.)"""
    return any(name.rpartition(".")[2] == "experts" for name, _ in model.named_modules())


def _own(parameter):
    """What this rank has of a parameter that several ranks share; else all of it."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def kv_heads_and_dim(config) -> tuple[int, int]:
    """Key-value heads of a layer, and the elements of each head, by the config's settings."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_bytes_per_token(config, dtype: torch.dtype, tp: int = 1) -> int:
    """Bytes that the keys and values of one token take in the cache, by the settings; where they can be seen by running
    the model, `models.probe.attention_layers` knows better. config: a transformers config, of a text model or of one
    with a text part. dtype: that of the cache. tp: how many ranks share the heads, of which this is one's part."""
    config = config.get_text_config(decoder=True)
    heads, size = kv_heads_and_dim(config)
    return kv_bytes(config.num_hidden_layers, heads // tp, size, dtype.itemsize)


def sliding_window(config) -> int | None:
    """Of how many tokens, its own included, the layer that sees the fewest sees the keys, by the settings; None where
    all layers see all tokens."""
    config = config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None) or ["sliding_attention"]
    sliding = getattr(config, "use_sliding_window", True) and "sliding_attention" in types
    return (getattr(config, "sliding_window", None) or None) if sliding else None


def flops_per_token(model) -> int:
    """Arithmetic operations by which one token of a prompt goes through the matrices of a dense model: two for each of
    their numbers. Left out are embeddings, the output layer, which only the last token of a prompt needs, and attention
    itself, which for a prompt of 2048 tokens adds 4 % with the 8B shape. Of a model that ranks share, this rank's
    part."""
    left_out = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    if model.get_output_embeddings() is not None:
        left_out.add(id(model.get_output_embeddings().weight))
    return 2 * sum(_own(p).numel() for p in model.parameters() if p.ndim > 1 and id(p) not in left_out)


def step_floor_s(
    weight_bytes: float,
    kv_bytes_per_token: float,
    context_tokens: float,
    bandwidth: float,
    collectives_s: float = 0.0,
) -> float:
    """The least seconds that one step can take: to read the weights once, and the keys and values of `context_tokens`
    tokens (of all rows together) once, at `bandwidth` bytes a second. Where ranks share the model, all of that is one
    rank's part, and the sums between them take `collectives_s`. ValueError for a bandwidth that is not above 0."""
    if not bandwidth > 0:
        raise ValueError(f"the bandwidth is {bandwidth!r}: allowed are bytes a second above 0")
    return (weight_bytes + context_tokens * kv_bytes_per_token) / bandwidth + collectives_s


def run_floor_s(
    weight_bytes: float,
    kv_bytes_per_token: float,
    contexts: Iterable[float],
    bandwidth: float,
    collectives_s: float = 0.0,
) -> float:
    """The least seconds that a whole run can take. contexts: the context tokens of each of its steps."""
    return sum(step_floor_s(weight_bytes, kv_bytes_per_token, each, bandwidth, collectives_s) for each in contexts)


class RequestsFloor(NamedTuple):
    """The least time of a set of requests in its parts: the decode steps and their seconds, the prompts' seconds."""

    decode_steps: int
    decode_s: float
    prompts_s: float

    @property
    def total_s(self) -> float:
        return self.decode_s + self.prompts_s


def requests_floor(
    weight_bytes: float,
    kv_bytes_per_token: float,
    flops_per_token: float,
    requests: Sequence[tuple[int, int]],
    rows: int,
    bandwidth: float,
    matmul_flops_per_s: float,
) -> RequestsFloor:
    """The least time for `requests`, (prompt tokens, new tokens) each, with at most `rows` of them at once:

        decode_s  = (decode steps * weight bytes + context tokens * key and value bytes a token) / bandwidth
        prompts_s = max(weight bytes / bandwidth, prompt tokens * flops a token / matmul rate)

    Counted: requests join in their order, each one when a row is free, and its prompt gives its first token. Then it is
    in one decode step for each further token, n - 1 of them, and attends to p + 1, p + 2, ... p + n - 1 tokens. A row
    that becomes free is taken in the next step, so there are as many decode steps as the row that ends last is in. Each
    reads the weights once. All prompts together read the weights once too, or take the time of their matrix products,
    whichever is longer; they take no decode step away.

    Not counted: writing keys and values, attention within the prompts, activations, sampling, the host. An order of
    requests other than the given one can need fewer steps.

    The two parts are added, as if no step had both. A step that has decode rows beside a piece of a prompt reads the
    weights once for both, so an engine that mixes them could come below the sum, though never below the larger part
    by itself. ValueError for rates, rows or lengths that are not above 0."""
    for name, value in (("rows", rows), ("bandwidth", bandwidth), ("matmul_flops_per_s", matmul_flops_per_s)):
        if not value > 0:
            raise ValueError(f"{name} is {value!r}: allowed are numbers above 0")
    if not requests or min(min(request) for request in requests) < 1:
        raise ValueError("a request without a prompt or a new token, or no request at all, has no least time")
    free = [0] * min(rows, len(requests))  # in how many decode steps each row has been
    for _, new in requests:
        heapq.heapreplace(free, free[0] + new - 1)
    context = sum((new - 1) * prompt + new * (new - 1) // 2 for prompt, new in requests)
    decode_s = (max(free) * weight_bytes + context * kv_bytes_per_token) / bandwidth
    arithmetic_s = sum(prompt for prompt, _ in requests) * flops_per_token / matmul_flops_per_s
    return RequestsFloor(max(free), decode_s, max(weight_bytes / bandwidth, arithmetic_s))

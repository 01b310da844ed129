"""The stand-in for flash_attn: the functions that transformers looks for in it, on this package's Triton kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ...devices.cuda.attention import splits_for
from .attention_choice import attention_functions, paged_name
from .parts import unknown_version, wrap

# transformers takes an attention for flash attention, with its fast path for decoding, if its name matches
# ".*flash.*2" or ".*flash.*3".
STAND_IN = "asyncbatch_flash_2"


@contextlib.contextmanager
def in_place_of_flash_attn(kernel: StandIn) -> Iterator[str]:
    """Within this context, transformers finds `kernel` as an attention kernel, under the name that the context gives.

    transformers looks up a flash attention by name. Names that it does not know it takes for kernels from the hub,
    which it loads with one function; within this context that function answers for our name. Everything else, from the
    fast path for decoding to the arguments of the calls, is what transformers does with flash_attn. RuntimeError for a
    version of transformers that works in another way."""
    from transformers import AttentionInterface, modeling_flash_attention_utils
    from transformers.integrations import hub_kernels

    functions = attention_functions()
    flash = paged_name("flash_attention_2")
    if flash not in functions or not hasattr(hub_kernels, "load_and_register_attn_kernel"):
        raise unknown_version("it looks attention kernels up in another way")
    name = flash.replace("flash_attention_2", STAND_IN)
    AttentionInterface.register(name, functions[flash])

    def load(original):
        def load_and_register_attn_kernel(requested, *arguments, **options):
            return kernel if requested.endswith(STAND_IN) else original(requested, *arguments, **options)

        return load_and_register_attn_kernel

    # transformers keeps the functions that it loaded last in global variables: put them back afterwards.
    prefixes = ("_loaded_", "_flash_", "_pad_fn", "_unpad_fn", "_process_flash_kwargs_fn", "_process_with_")
    utils = vars(modeling_flash_attention_utils)
    before = {key: value for key, value in utils.items() if key.startswith(prefixes)}
    with wrap(hub_kernels, "load_and_register_attn_kernel", load):
        try:
            yield name
        finally:
            utils.update(before)


class StandIn:
    """The functions that transformers looks for in flash_attn. One object serves one batcher."""

    def __init__(self, max_batch_size: int, kv_heads: int, device: torch.device):
        # The decode kernel counts its finished parts here. CUDA graphs use this memory, so it is made before them.
        self._arrived = torch.zeros(max_batch_size * kv_heads, dtype=torch.int32, device=device)

    def flash_attn_func(self, *_, **__):
        raise RuntimeError("the stand-in for flash_attn serves continuous batching only")

    def flash_attn_with_kvcache(
        self, q, k_cache, v_cache, k, v, cache_seqlens, block_table, softmax_scale=None, causal=True,
        window_size=(-1, -1), softcap=0.0, s_aux=None,
    ) -> torch.Tensor:  # fmt: skip
        """A decode step: store each row's new key and value, and attend to the whole row.

        q: [rows, 1, heads, dim]. k, v: [rows, 1, kv_heads, dim]. k_cache, v_cache: [blocks, block_size, kv_heads, dim],
        with the same strides. cache_seqlens: int32 [rows], the length of each row before the new token; -1 for a row
        that is padding. block_table: int32 [rows, max_blocks]. window_size: how many tokens before its own a token
        sees, and -1 for all; those after it are not seen, whatever the second number. softcap, s_aux: the softcap and
        the sinks of `kernels.decode`. Returns [rows, 1, heads, dim].
        """
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        live = cache_seqlens + 1  # 0 for padding
        splits = splits_for(len(self._arrived))
        asked = (window_size[0] + 1, softcap, s_aux)
        arguments = (block_table, live, cache_seqlens, scale, splits, self._arrived, *asked)
        return _decode(q[:, 0], k[:, 0], v[:, 0], k_cache, v_cache, *arguments)[:, None]

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=True,
        window_size=(-1, -1), softcap=0.0, s_aux=None,
    ) -> torch.Tensor:  # fmt: skip
        """A step with parts of prompts: rows of several queries, with their keys and values gathered row after row.

        q: [N, heads, dim]. k, v: [M, kv_heads, dim]. cu_seqlens_q, cu_seqlens_k: int32 [rows + 1], where each row
        begins among the queries and among the keys; the queries of a row are its last tokens. Rows may be empty, and
        N <= M may be larger than what the rows need. window_size, softcap, s_aux: as above. Returns [N, heads, dim].

        Nothing here waits for the device, so neither the loop nor the capture of a CUDA graph is held up.
        """
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        count = cu_seqlens_q.to(torch.int32).diff()
        starts = cu_seqlens_k.to(torch.int32)
        # For the paged kernel, the gathered keys are a cache with blocks of one token.
        tables = starts[:-1, None] + torch.arange(max_seqlen_k, dtype=torch.int32, device=q.device)
        first, position = cu_seqlens_q[:-1].to(torch.int32), starts.diff() - count
        asked = (window_size[0] + 1, softcap, s_aux)
        return _prefill(q, k.contiguous(), v.contiguous(), tables, first, count, position, scale, *asked)


# From transformers' layout of a cache, [blocks, block_size, kv_heads, dim], to that of `kernels`.


def _decode(query, key, value, keys, values, tables, live, position, scale, splits, arrived, *asked) -> torch.Tensor:
    from ...devices.cuda import kernels

    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    return kernels.decode(query, key, value, keys, values, tables, live, position, scale, splits, arrived, *asked)


def _prefill(query, keys, values, tables, first, count, position, scale, *asked) -> torch.Tensor:
    """keys, values: [M, kv_heads, dim], to which `tables` points token by token."""
    from ...devices.cuda import kernels

    # The kernel stores keys before it reads: here the first N of them, each onto itself.
    places = torch.arange(len(query), device=query.device)
    pools = keys[:, :, None], values[:, :, None]
    return kernels.prefill(query, keys, values, *pools, places, tables, first, count, position, scale, *asked)

"""Paged attention on CUDA, for `attention.Batch.attend`: the Triton kernels behind one operator of torch."""

from __future__ import annotations

import torch

from ...attention import Batch


def splits_for(programs: int) -> int:
    """Into how many parts a decode kernel cuts each row's context: a power of 2, from 4 so that one long row among
    short ones is shared out too, and enough for about 2048 programs."""
    splits = 4
    while splits < 64 and programs * splits < 2048:
        splits *= 2
    return splits


def attend_on_cuda(batch: Batch, query, key, value, keys, values, scale, window, softcap, sinks) -> torch.Tensor:
    """Store the new keys and values in the pool and attend. Shapes as in `attention.attend_on_cpu`."""
    return _attend(
        query, key, value, keys, values, batch.places, batch.tables, batch.first, batch.count, batch.position,
        scale, batch.splits, batch.arrived, window, softcap, sinks,
    )  # fmt: skip


# One operator that says what it changes. torch.compile then calls it as it stands; if it could look inside, it would
# clone the whole pool in every step to be able to treat the write as a value (38 ms instead of 6, measured).
@torch.library.custom_op("asyncbatch::paged_attention", mutates_args=("keys", "values", "arrived"))
def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
    places: torch.Tensor, tables: torch.Tensor, first: torch.Tensor, count: torch.Tensor, position: torch.Tensor,
    scale: float, splits: int, arrived: torch.Tensor | None, window: int, softcap: float, sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    from . import kernels  # needs Triton, which a CPU does not

    more = window, softcap, sinks
    if splits:
        return kernels.decode(query, key, value, keys, values, tables, count, position, scale, splits, arrived, *more)
    return kernels.prefill(query, key, value, keys, values, places, tables, first, count, position, scale, *more)


@_attend.register_fake
def _(query, key, value, *_):
    return query.new_empty(*query.shape[:2], value.shape[2])

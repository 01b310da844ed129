"""The host's side of the slots' buffers, in the kind of memory that the device can reach."""

from __future__ import annotations

import torch

from ..slot import StepShape
from ..streams import DeviceError
from .travel import fits_into_shared_memory


def host_buffers(shape: StepShape, on_cuda: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, output ids) of each slot on the host: int32 [num_inputs] and int32 [max_batch_size]. For CUDA they are
    pinned, because a copy from pageable memory makes the host wait; for a worker process they are shared memory.

    DeviceError where there is too little shared memory: writing beyond it would kill the process."""
    num_bytes = 4 * shape.num_slots * (shape.num_inputs + shape.max_batch_size)
    if not on_cuda and not fits_into_shared_memory(1.1 * num_bytes):
        raise DeviceError(
            f"the slots' buffers take {num_bytes / 2**20:.0f} MiB of shared memory, and /dev/shm has less. Take a "
            f"smaller max_batch_size ({shape.max_batch_size}), max_length ({shape.max_length}) or num_slots "
            f"({shape.num_slots}), or a larger /dev/shm (docker run --shm-size=...)"
        )
    pairs = []
    for _ in range(shape.num_slots):
        pair = (
            torch.zeros(shape.num_inputs, dtype=torch.int32, pin_memory=on_cuda),
            torch.zeros(shape.max_batch_size, dtype=torch.int32, pin_memory=on_cuda),
        )
        pairs.append(pair if on_cuda else tuple(tensor.share_memory_() for tensor in pair))
    return pairs

"""How many blocks the KV cache gets: what is asked for, or what fits into the GPU beside weights and graphs."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """A GPU's memory before the pools are made, in bytes. `total` has the GPU in all, `free` nobody has taken, and
    `step` is what the largest step and the graphs will take of it."""

    name: str
    total: int
    free: int
    step: int

    @property
    def left(self) -> int:
        """For the pools. One part in fifty stays free: allocators round up, and others use the GPU too."""
        return self.free - self.step - self.total // 50

    def __str__(self) -> str:
        taken, left = (self.total - self.free) / GIB, max(self.left, 0) / GIB
        return (
            f"{self.name} has {self.total / GIB:.1f} GiB, of which weights and other programs hold {taken:.1f} and "
            f"steps need {self.step / GIB:.1f}, so {left:.1f} GiB are left for the KV cache"
        )


def plan_blocks(wanted: int, least: int, asked: bool, block_bytes: int, memory: Memory) -> int:
    """The number of blocks in the pool.

    wanted: enough for a full batch of the longest requests, or, if `asked`, what the caller wants, no more and no less.
    least: what one request of the longest kind takes. block_bytes: keys and values of one block, in all layers.
    Raises MemoryError with the numbers if the blocks asked for, or not even `least` of them, fit.
    """
    most = max(memory.left, 0) // block_bytes - 1  # block 0 belongs to nobody, and is there too
    size = f"{block_bytes / 2**20:.2f} MiB a block"
    if asked and wanted > most:
        raise MemoryError(
            f"num_blocks is {wanted}: they take {wanted * block_bytes / GIB:.1f} GiB ({size}). {memory}: "
            f"at most {max(most, 0)} blocks. Take fewer blocks, a smaller model or a larger GPU."
        )
    if not asked and least > most:
        raise MemoryError(
            f"one request of max_length needs {least} blocks of the KV cache, {least * block_bytes / GIB:.1f} GiB "
            f"({size}). {memory}: at most {max(most, 0)} blocks. Take a smaller max_length, max_batch_size or model."
        )
    return wanted if asked else min(wanted, most)

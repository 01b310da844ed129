"""Every option of a batcher, and what is allowed for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .kv_cache import blocks_for
from .slot import StepShape
from .streams import CostModel

PREFILL_SIZES = (256, 512, 1024, 2048)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a batcher, checked and complete: `Config.of(model, **options)` fills in what was not given.

    max_batch_size: the most requests in one step.
    num_slots: how many steps can be under way at once.
    block_size, num_blocks: tokens in a block of the KV cache, and blocks in its pool (default: enough for a full batch
        of the longest requests; on CUDA, as many of them as fit beside the weights).
    max_length: the most tokens, prompt and output together, of one request (default: the model's limit, at most 2048).
    prefill_tokens: how many prompt tokens one step computes: a number, or several sizes. Each chunk of a prompt gets a
        step of a size that fits it (`scheduler.next_chunk`), and longer prompts are cut (default: 64, on CUDA
        PREFILL_SIZES). On CUDA a size costs some seconds when the batcher opens.
    batch_sizes: sizes of a step, up to max_batch_size; each step takes the smallest that holds its rows. Default: only
        max_batch_size, so that the tokens are the same bit for bit whoever shares the batch. With several sizes they
        are only the same up to rounding, for a gain that is small (docs/gpu.md).
    compile: on CUDA, compile the model for speed (`devices/cuda/compile.py`). It takes some seconds. The weights keep
        their values and move: projections of the same input come to lie in one tensor.
    parts: on CUDA, have `record_points` tell a step's carry-over, model and sampling apart, by two more events in each
        graph. They cost 8 us a step (H200).
    timeline: how many of the newest steps `batcher.timeline` keeps, at about 1 KB a step; older ones go on counting in
        its `summary`. True is 100,000. False keeps nothing and measures nothing, and only steps and tokens are counted.

    The others choose another device than the one where the model lies. For lessons, tests and benchmarks:

    host_work_s: burn this many seconds of Python in each step's plan. It stands for a busier host.
    step_s: the device waits this long instead of computing, a number of seconds or the times of a recorded GPU
        (`Recording.step_times`). The tokens are then no language.
    clock: None measures real times. With `Costs(...)` (`devices/virtual.py`) the device is on the virtual clock and
        takes the times that it is given: every run has the same exact timeline, and host_work_s is not burnt but
        counted. If step_s is given too, nothing is computed.
    check_races: raise RaceError (`ordering/races.py`) where two accesses of one buffer or block have no order, though
        the tokens may be right. It costs the host time.

    on_cuda, model_length: where the model is, and the most tokens that it allows. `of` asks the model.

    ValueError, with what was given and what is allowed, for a value or a combination that makes no sense.
    """

    max_batch_size: int = 8
    num_slots: int = 1
    block_size: int = 16
    num_blocks: int | None = None
    max_length: int | None = None
    prefill_tokens: int | Sequence[int] | None = None
    batch_sizes: Sequence[int] = ()
    compile: bool = False
    parts: bool = False
    timeline: int | bool = True
    host_work_s: float = 0.0
    step_s: float | Callable[[str, int], float] | None = None
    clock: CostModel | None = None
    check_races: bool = False
    on_cuda: bool = False
    model_length: int = 2048

    @classmethod
    def of(cls, model, **options: Any) -> Config:
        """The configuration of a batcher for `model`, a causal language model of transformers."""
        length = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
        return cls(on_cuda=next(model.parameters()).is_cuda, model_length=length, **options)

    def __post_init__(self) -> None:
        if self.max_length is None:
            object.__setattr__(self, "max_length", min(self.model_length, 2048))
        if isinstance(self.timeline, bool):
            object.__setattr__(self, "timeline", 100_000 if self.timeline else 0)
        object.__setattr__(self, "batch_sizes", tuple(self.batch_sizes))  # what is frozen must not change under us
        self._check_sizes()
        self._check_times()
        self._check_device()

    def _check_sizes(self) -> None:
        for name in ("max_batch_size", "num_slots", "block_size", "num_blocks", "max_length"):
            value = 1 if name == "num_blocks" and self.num_blocks is None else getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}: allowed are whole numbers from 1")
        if not isinstance(self.timeline, int) or self.timeline < 0:
            raise ValueError(f"timeline is {self.timeline!r}: allowed are True, False and whole numbers from 0")
        if self.max_length > self.model_length:  # type: ignore[operator]  # filled in by now
            raise ValueError(f"max_length is {self.max_length}: the model allows at most {self.model_length} tokens")
        if not self.prefill_sizes or any(not isinstance(size, int) or size < 1 for size in self.prefill_sizes):
            given = self.prefill_tokens
            raise ValueError(f"prefill_tokens is {given!r}: allowed are a whole number from 1, or several of them")
        if any(not isinstance(size, int) or not 1 <= size <= self.max_batch_size for size in self.batch_sizes):
            raise ValueError(
                f"batch_sizes is {self.batch_sizes!r}: allowed are whole numbers from 1 to "
                f"max_batch_size={self.max_batch_size}"
            )

    def _check_times(self) -> None:
        constant_s = 0.0 if self.step_s is None or callable(self.step_s) else self.step_s
        for name, seconds in (("host_work_s", self.host_work_s), ("step_s", constant_s)):
            if not 0 <= seconds < float("inf"):
                raise ValueError(f"{name} is {seconds!r}: allowed are seconds from 0")
        is_model = callable(getattr(self.clock, "seconds", None)) and not isinstance(self.clock, type)
        if self.clock is not None and not is_model:
            raise ValueError(f"clock is {self.clock!r}: allowed are None and Costs(...), the virtual clock")

    def _check_device(self) -> None:
        stands = "stands for a device that is not there: it needs the model on the CPU"
        if self.on_cuda and self.step_s is not None:
            raise ValueError(f"step_s {stands}, not on CUDA")
        if self.on_cuda and self.clock is not None:
            raise ValueError(f"clock=Costs(...) {stands}")
        if self.compile and not self.on_cuda:
            raise ValueError("compile=True needs the model on CUDA: load_model(..., device='cuda')")

    @property
    def prefill_sizes(self) -> tuple[int, ...]:
        """The sizes of a prefill step. By default, on CUDA, those up to the one that holds the longest prompt."""
        given = self.prefill_tokens
        if given is None:
            shorter = [size for size in PREFILL_SIZES if size < self.max_length]  # type: ignore[operator]
            return PREFILL_SIZES[: len(shorter) + 1] if self.on_cuda else (64,)
        return tuple(given) if isinstance(given, (list, tuple)) else (given,)  # type: ignore[return-value]

    @property
    def prefill_budget(self) -> int:
        """`Scheduler.prefill_budget`. On a GPU prefill is fast, and steps that decode for few rows are a loss."""
        return PREFILL_SIZES[-1] if self.on_cuda else 0

    @property
    def shape(self) -> StepShape:
        """The fixed shape of every step. On CUDA the number of blocks is what is wanted: what fits may be less."""
        assert self.max_length is not None
        full = self.max_batch_size * blocks_for(self.max_length, self.block_size)
        return StepShape(
            self.max_batch_size,
            self.num_slots,
            self.block_size,
            self.num_blocks or full,
            self.max_length,
            tuple(sorted(set(self.prefill_sizes))),
            tuple(sorted(set(self.batch_sizes))),
        )

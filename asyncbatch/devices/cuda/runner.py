"""The runner on CUDA: each kind of step is captured once for each slot as a graph, and a launch is its replay.

Before that it finds out how much memory a step takes, and gives the KV cache what is left.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch

from ...attention import Batch
from ...sampling import greedy
from ...scheduler import StepKind
from ...slot import StepShape
from ..padding import PaddedRunner
from .attention import attend_on_cuda, splits_for
from .compile import compile_model
from .memory import Memory, plan_blocks

GRAPH_BYTES = 16 * 2**20  # what the driver keeps for one captured step, with room to spare


@contextlib.contextmanager
def matrix_products_by_cublaslt() -> Iterator[None]:
    """Within it, torch asks cuBLASLt for matrix products, which chooses better for the few rows of a decode step. 8B
    shape, 32 rows, context 33, compiled, H200: 4.69 ms a step instead of 4.87."""
    prefer = torch.backends.cuda.preferred_blas_library
    before = prefer()
    with contextlib.suppress(RuntimeError):  # a torch without it: then its own choice stays
        prefer("cublaslt")
    try:
        yield
    finally:
        prefer(before)


@contextlib.contextmanager
def workspace_of_their_own() -> Iterator[None]:
    """Graphs captured within it have cuBLAS's workspace to themselves. Otherwise torch gives the same one to all graphs
    of the process, since it captures them on one stream (pytorch#193402), and two batchers write into it at the same
    time. Forgotten before, it is made anew in the graphs' own memory; forgotten after, nobody else gets that."""
    forget = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    forget()
    try:
        yield
    finally:
        forget()


@contextlib.contextmanager
def memory_errors(shape: StepShape, where: torch.device) -> Iterator[None]:
    """Within it, torch's lack of memory is a MemoryError that says what does not fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = (number / 2**30 for number in torch.cuda.mem_get_info(where))
        raise MemoryError(
            f"a step of {shape.max_batch_size} rows and {shape.prefill_tokens} prompt tokens does not fit: "
            f"{torch.cuda.get_device_name(where)} has {total:.1f} GiB, and {free:.1f} of them are free. Take a smaller "
            f"max_batch_size, prefill_tokens, num_blocks or model."
        ) from error


class CudaRunner(PaddedRunner):
    """The device side for one batcher, on CUDA.

    model, shape, host: as for `Runner`.
    asked_blocks: the caller wants `shape.num_blocks`; otherwise it is lowered to what fits.
    compile: compile the model's layers (`compile.py`).
    parts: have every step tell when its carry-over and its model are done, by two events for each slot.

    Raises MemoryError, with the numbers, where the pool does not fit.
    """

    marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] | None = None

    def __init__(
        self,
        model,
        *,
        shape: StepShape,
        host: list[tuple[torch.Tensor, torch.Tensor]],
        asked_blocks: bool = True,
        compile: bool = False,
        parts: bool = False,
    ):
        with memory_errors(shape, next(model.parameters()).device):
            super().__init__(model, shape=replace(shape, num_blocks=0), host=host)
        programs = shape.max_batch_size * max(layer.kv_heads for layer in self.layers)
        self.splits = splits_for(programs)
        self.arrived = torch.zeros(programs, dtype=torch.int32, device=self.device)
        self.graphs: dict[tuple[int, StepKind], torch.cuda.CUDAGraph] = {}
        if parts:
            # External: a captured one is recorded anew in every replay of the graph, and can tell its time.
            new = torch.cuda.Event
            self.marks = [(new(True, external=True), new(True, external=True)) for _ in host]
        with matrix_products_by_cublaslt():
            self._prepare(compile, shape.num_blocks, asked_blocks)

    def _find_padding(self) -> None:
        """Later, when projections are merged and cuBLASLt is chosen."""

    def _prepare(self, compile: bool, wanted: int, asked: bool) -> None:
        """Find out how much memory a step takes, give the pools what is left, and capture the steps as graphs."""
        if compile:
            compile_model(self.model)
        with memory_errors(self.shape, self.device), torch.inference_mode(), torch.cuda.device(self.device):
            super()._find_padding()
            memory = self._measure_memory()
            least = self.shape.max_blocks
            blocks = plan_blocks(wanted, least, asked, self._block_bytes(), memory)
            self.shape = replace(self.shape, num_blocks=blocks)
            self._make_pools()
            if compile:
                self.decode_inputs = torch.compile(self.decode_inputs, dynamic=False)  # type: ignore[method-assign]
                self.greedy = torch.compile(greedy, dynamic=False)
            # Once before the capture: what is not compiled or loaded yet cannot be during it.
            with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=10_000):
                for kind in self.shape.kinds:
                    self._step(0, kind)
            torch.cuda.synchronize(self.device)
        self.graphs = self._capture()

    def _measure_memory(self) -> Memory:
        """Run each kind of step, with nothing in it, and see what that takes."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        with torch.compiler.set_stance("force_eager"):  # compiled steps take less, and would be compiled for this pool
            for kind in self.shape.kinds:
                self._step(0, kind)
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        # The graphs keep a step's memory for themselves, and need some of their own: 12 graphs of the 8B shape took 0.3
        # GiB in all on an H200.
        graphs = len(self.shape.kinds) * self.shape.num_slots
        return Memory(torch.cuda.get_device_name(self.device), total, free, 2 * peak + GRAPH_BYTES * graphs + 2**28)

    def _block_bytes(self) -> int:
        """Bytes of one block's keys and values in all layers."""
        return self.shape.block_size * sum(layer.token_bytes for layer in self.layers)

    def _capture(self) -> dict[tuple[int, StepKind], torch.cuda.CUDAGraph]:
        """A graph of every kind of step for each slot: one launch instead of a thousand, which eagerly cost the host
        more time than the device needs. They share one memory pool, since they run one after the other on one stream.
        The rows are all padding here, so nothing is written but block 0.

        One set of graphs for all slots would need the slot's inputs copied before each replay and its output after
        it, which took 30 us more of the host's time in every step. A second set costs 1 s and 0.15 GiB, once (8B shape,
        H200).
        """
        graphs, pool = {}, torch.cuda.graph_pool_handle()
        try:
            with torch.inference_mode(), torch.cuda.device(self.device), workspace_of_their_own():
                for slot in range(self.shape.num_slots):
                    for kind in self.shape.kinds:
                        graphs[slot, kind] = torch.cuda.CUDAGraph()
                        with torch.cuda.graph(graphs[slot, kind], pool=pool):
                            self._step(slot, kind)
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            warnings.warn(f"no CUDA graphs for this model, its steps are launched eagerly ({reason})", stacklevel=2)
            graphs = {}
        torch.cuda.synchronize(self.device)
        return graphs

    def run(self, command: str | StepKind, slot: int) -> None:
        graph = self.graphs.get((slot, command))  # type: ignore[arg-type]
        if graph is not None:
            graph.replay()
        elif isinstance(command, str):
            super().run(command, slot)
        else:
            with torch.inference_mode():
                super().run(command, slot)

    def _mark(self, slot: int, moment: int) -> None:
        if self.marks is not None and moment in (1, 2):
            self.marks[slot][moment - 1].record()

    def _batch(self, fields, places, first, count, decode: bool) -> Batch:
        batch = Batch(places, fields["tables"], first, count, fields["position"], attend_on_cuda)
        if decode:
            batch.splits, batch.arrived = self.splits, self.arrived
        return batch

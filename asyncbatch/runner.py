"""The runner: what the device does when the host launches a command on a slot.

It has three commands, one a stream: "copy_in" copies a slot's inputs from the host, a step ("decode/greedy/8", ...)
carries tokens over, runs the model, and samples, and "copy_out" copies the output ids to the host. A step's name says
all that the host must decide about it: which forward passes it has, whether it samples, and for how many rows. Nothing
in a step depends on a value that only the device knows, so on CUDA nothing here waits.

A step has up to two forward passes, each of a fixed shape: [rows, 1] for decode and [1, prefill_tokens] for chunks of
prompts. On CUDA each kind of step is captured once for each slot as a graph, and a launch is its replay.
"""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from .attention import NAME, Batch, register
from .devices.cuda.compile import compile_model
from .devices.cuda.memory import Memory, plan_blocks
from .kv_cache import kv_bytes, place
from .sampling import greedy, sample
from .slot import StepShape

GRAPH_BYTES = 16 * 2**20  # what the driver keeps for one captured step, with room to spare


def kv_heads_and_dim(config) -> tuple[int, int]:
    """Key-value heads of a layer, and the elements of each head."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def splits_for(programs: int) -> int:
    """Into how many parts a decode kernel cuts each row's context: a power of 2, from 4 so that one long row among
    short ones is shared out too, and enough for about 2048 programs."""
    splits = 4
    while splits < 64 and programs * splits < 2048:
        splits *= 2
    return splits


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


class Runner:
    """The device side for one batcher.

    model: a causal language model of transformers, used as it is: the runner works on a copy of its module tree that
        shares its weights and has another attention implementation in its config.
    host: the (inputs, output ids) buffers of each slot on the host.
    compile: on CUDA, compile the model's layers (see `compile.py`).
    asked_blocks: the caller wants `shape.num_blocks`; otherwise, on CUDA, it is lowered to what fits.
    parts: on CUDA, have every step tell when its carry-over and its model are done (on a CPU it always does).

    Raises MemoryError, with the numbers, where the pool does not fit, and ModelError where a step cannot be run.
    """

    # A step's four moments: its beginning, after the carry-over, after the model, its end. On the host clock a shared
    # array [slots, 4] of seconds; on CUDA two events for each slot, since its stream times beginning and end anyway.
    moments: np.ndarray | None = None
    marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] | None = None

    def __init__(
        self,
        model,
        *,
        shape: StepShape,
        host: list[tuple[torch.Tensor, torch.Tensor]],
        compile: bool = False,
        asked_blocks: bool = True,
        parts: bool = False,
    ):
        register()
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared)
        self.model.set_attn_implementation(NAME)
        self.shape, self.host = shape, host
        self.device = next(model.parameters()).device
        # These belong to the compute stream, except `inputs`, which "copy_in" writes on the H2D stream.
        self.inputs = [torch.zeros(shape.num_inputs, dtype=torch.int32, device=self.device) for _ in host]
        self.outputs = torch.zeros(shape.num_slots, shape.max_batch_size, dtype=torch.int32, device=self.device)
        self.first = torch.arange(shape.max_batch_size, dtype=torch.int32, device=self.device)
        self.graphs: dict[tuple[int, str], torch.cuda.CUDAGraph] = {}
        self.splits, self.arrived = 0, None
        self.decode_inputs, self.greedy = self._decode_inputs, greedy
        if self.device.type == "cuda":
            if parts:
                # External: a captured one is recorded anew in every replay of the graph, and can tell its time.
                new = torch.cuda.Event
                self.marks = [(new(True, external=True), new(True, external=True)) for _ in host]
            with matrix_products_by_cublaslt():
                self._prepare_cuda(compile, asked_blocks)
        else:
            self._make_pools()

    def _prepare_cuda(self, compile: bool, asked_blocks: bool) -> None:
        """Find out how much memory a step takes, give the pools what is left, and capture the steps as graphs."""
        programs = self.shape.max_batch_size * kv_heads_and_dim(self.model.config.get_text_config())[0]
        self.splits = splits_for(programs)
        self.arrived = torch.zeros(programs, dtype=torch.int32, device=self.device)
        if compile:
            compile_model(self.model)
        try:
            with torch.inference_mode(), torch.cuda.device(self.device):
                wanted = self.shape.num_blocks
                self.shape = replace(self.shape, num_blocks=0)
                self._make_pools()
                memory = self._measure_memory()
                least = self.shape.max_blocks
                blocks = plan_blocks(wanted, least, asked_blocks, self._block_bytes(), memory)
                self.shape = replace(self.shape, num_blocks=blocks)
                self._make_pools()
                if compile:
                    self.decode_inputs = torch.compile(self._decode_inputs, dynamic=False)
                    self.greedy = torch.compile(greedy, dynamic=False)
                # Once before the capture: what is not compiled or loaded yet cannot be during it.
                with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=10_000):
                    for command in self.shape.steps:
                        self._step(0, command)
                torch.cuda.synchronize(self.device)
        except torch.OutOfMemoryError as error:
            free, total = (number / 2**30 for number in torch.cuda.mem_get_info(self.device))
            raise MemoryError(
                f"a step of {self.shape.max_batch_size} rows and {self.shape.prefill_tokens} prompt tokens does not "
                f"fit: {torch.cuda.get_device_name(self.device)} has {total:.1f} GiB, and {free:.1f} of them are free. "
                f"Take a smaller max_batch_size, prefill_tokens, num_blocks or model."
            ) from error
        self.graphs = self._capture()

    def _measure_memory(self) -> Memory:
        """Run each kind of step, with nothing in it, and see what that takes."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        with torch.compiler.set_stance("force_eager"):  # compiled steps take less, and would be compiled for this pool
            for command in self.shape.steps:
                self._step(0, command)
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        # The graphs keep a step's memory for themselves, and need some of their own: 12 graphs of the 8B shape took 0.3
        # GiB in all on an H200.
        graphs = len(self.shape.steps) * self.shape.num_slots
        return Memory(torch.cuda.get_device_name(self.device), total, free, 2 * peak + GRAPH_BYTES * graphs + 2**28)

    def _block_bytes(self) -> int:
        """Bytes of one block's keys and values in all layers."""
        config = self.model.config.get_text_config()
        heads, dim = kv_heads_and_dim(config)
        return self.shape.block_size * kv_bytes(config.num_hidden_layers, heads, dim, self.model.dtype.itemsize)

    def _make_pools(self) -> None:
        """Give each attention layer its keys and values, [num_blocks + 1, kv_heads, block_size, head_dim] each."""
        config = self.model.config.get_text_config()
        heads, dim = kv_heads_and_dim(config)
        size = (self.shape.num_blocks + 1, heads, self.shape.block_size, dim)
        # What was never written is never read, so the pool may hold anything, and on a CPU costs nothing until touched.
        pools = [
            tuple(torch.empty(size, dtype=self.model.dtype, device=self.device) for _ in "kv")
            for _ in range(config.num_hidden_layers)
        ]
        for module in self.model.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.paged_pools = pools[module.layer_idx]

    def run(self, command: str, slot: int) -> None:
        """Do a named command. Called by the stream that it was launched on."""
        if command == "copy_in":
            self.inputs[slot].copy_(self.host[slot][0], non_blocking=True)
        elif command == "copy_out":
            self.host[slot][1].copy_(self.outputs[slot], non_blocking=True)
        elif (slot, command) in self.graphs:
            self.graphs[slot, command].replay()
        elif command in self.shape.steps:
            self._step(slot, command)
        else:
            raise ValueError(f"command {command!r}: a runner knows copy_in, copy_out, {', '.join(self.shape.steps)}")

    def _capture(self) -> dict[tuple[int, str], torch.cuda.CUDAGraph]:
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
                    for command in self.shape.steps:
                        graphs[slot, command] = torch.cuda.CUDAGraph()
                        with torch.cuda.graph(graphs[slot, command], pool=pool):
                            self._step(slot, command)
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            warnings.warn(f"no CUDA graphs for this model, its steps are launched eagerly ({reason})", stacklevel=2)
            graphs = {}
        torch.cuda.synchronize(self.device)
        return graphs

    def _step(self, slot: int, command: str) -> None:
        passes, sampling, number = command.split("/")
        rows = int(number)
        self._mark(slot, 0)
        fields = self.shape.fields(self.inputs[slot], rows)
        carried = None if passes == "prefill" else self.decode_inputs(fields)
        self._mark(slot, 1)
        if carried is None:
            logits = self._prefill(fields)
        else:
            logits = self._decode(fields, *carried)
            if passes == "mixed":
                logits = torch.where(fields["decodes"].bool()[:, None], logits, self._prefill(fields))
        self._mark(slot, 2)
        self.outputs[slot, :rows] = sample(logits, fields) if sampling == "sampled" else self.greedy(logits)
        self._mark(slot, 3)

    def _mark(self, slot: int, moment: int) -> None:
        if self.moments is not None:
            self.moments[slot, moment] = time.perf_counter()
        elif self.marks is not None and moment in (1, 2):
            self.marks[slot][moment - 1].record()

    def _decode(self, fields, ids, positions, places) -> torch.Tensor:
        """One token a row. Returns logits [rows, vocabulary]; those of rows that do not decode mean nothing."""
        batch = self._batch(fields, places, self.first[: len(ids)], fields["decodes"])
        batch.splits, batch.arrived = self.splits, self.arrived
        output = self.model(ids[:, None], position_ids=positions[:, None], use_cache=False, paged=batch)
        return output.logits[:, 0]

    def _decode_inputs(self, fields) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each row's input token, its position and its place in a pool; 0 for rows that do not decode: block 0 belongs
        to nobody."""
        live, size = fields["decodes"], self.shape.block_size
        positions = (fields["position"] * live).long()
        rows = self.first[: len(positions)].long()
        return self._input_ids(fields), positions, place(fields["tables"], rows, positions, size) * live

    def _input_ids(self, fields) -> torch.Tensor:
        """Carry-over: a row's input token is an output of a step before, or the host has written it. int32 [rows]."""
        carry = fields["carry"]
        return torch.where(carry >= 0, self.outputs.view(-1)[carry.clamp(min=0)], fields["input_id"])

    def _prefill(self, fields) -> torch.Tensor:
        """Chunks of prompts, packed. Returns the logits after each row's last token, [rows, vocabulary]."""
        first, count, tables = fields["prefill_start"], fields["prefill_count"], fields["tables"]
        size = self.shape.block_size
        positions, rows = fields["prefill_position"].long(), fields["prefill_row"].long()
        used = torch.arange(len(positions), device=self.device) < count.sum()
        places = torch.where(used, place(tables, rows, positions, size), 0)  # padding goes to block 0
        batch = self._batch(fields, places, first, count)
        last = (first + count - 1).clamp(min=0).long()
        ids = fields["prefill_id"][None]
        output = self.model(ids, position_ids=positions[None], use_cache=False, logits_to_keep=last, paged=batch)
        return output.logits[0]

    def _batch(self, fields, places, first, count) -> Batch:
        batch = Batch(places, fields["tables"], first, count, fields["position"])
        if self.device.type == "cpu":
            rows = zip(*(x.tolist() for x in (first, count, batch.position)), batch.tables.long(), strict=True)
            size = self.shape.block_size
            batch.parts = [(f, n, p, table[: -(-(p + n) // size)]) for f, n, p, table in rows if n]
        return batch

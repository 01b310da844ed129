"""The runner: what the device does when the host launches a command on a slot.

It has three commands, one a stream: "copy_in" copies a slot's inputs from the host, a step ("decode/greedy", ...)
carries tokens over, runs the model, and samples, and "copy_out" copies the output ids to the host. A step's name says
all that the host must decide about it: which forward passes it has and whether it samples. Nothing in a step depends
on a value that only the device knows, so on CUDA nothing here waits.

A step has up to two forward passes, each of a fixed shape: [max_batch_size, 1] for decode and [1, prefill_tokens] for
chunks of prompts. On CUDA each kind of step is captured once for each slot as a graph, and a launch is its replay.
"""

from __future__ import annotations

import copy
import time
import warnings

import torch

from .attention import NAME, Batch, register
from .slot import StepShape

STEPS = [f"{passes}/{sampling}" for passes in ("decode", "prefill", "mixed") for sampling in ("greedy", "sampled")]


class Runner:
    """The device side for one batcher.

    model: a causal language model of transformers, used as it is: the runner works on a copy of its module tree that
        shares its weights and has another attention implementation in its config.
    host: the (inputs, output ids) buffers of each slot on the host.
    """

    def __init__(self, model, *, shape: StepShape, host: list[tuple[torch.Tensor, torch.Tensor]]):
        register()
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared)
        self.model.set_attn_implementation(NAME)
        self.shape, self.host = shape, host
        self.device = next(model.parameters()).device
        # These three belong to the compute stream, except `inputs`, which "copy_in" writes on the H2D stream.
        self.inputs = [torch.zeros(shape.num_inputs, dtype=torch.int32, device=self.device) for _ in host]
        self.outputs = torch.zeros(shape.num_slots, shape.max_batch_size, dtype=torch.int32, device=self.device)
        self.keys, self.values = self._pool(), self._pool()
        self.graphs = self._capture() if self.device.type == "cuda" else {}

    def _pool(self) -> list[torch.Tensor]:
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = (self.shape.num_blocks + 1, self.shape.block_size, heads, dim)
        # On CUDA a masked place is still multiplied (by 0), so it must hold a number. On a CPU only written places are
        # read, and memory that is not touched costs nothing.
        new = torch.zeros if self.device.type == "cuda" else torch.empty
        return [new(size, dtype=self.model.dtype, device=self.device) for _ in range(config.num_hidden_layers)]

    def run(self, command: str, slot: int) -> None:
        """Do a named command. Called by the stream that it was launched on."""
        if command == "copy_in":
            self.inputs[slot].copy_(self.host[slot][0], non_blocking=True)
        elif command == "copy_out":
            self.host[slot][1].copy_(self.outputs[slot], non_blocking=True)
        elif (slot, command) in self.graphs:
            self.graphs[slot, command].replay()
        elif command in STEPS:
            self._step(slot, *command.split("/"))
        else:
            raise ValueError(f"command {command!r}: a runner knows copy_in, copy_out, {', '.join(STEPS)}")

    def _capture(self) -> dict[tuple[int, str], torch.cuda.CUDAGraph]:
        """A graph of every kind of step for each slot: one launch instead of a thousand, which eagerly cost the host
        more time than the device needs. They share one memory pool, since they run one after the other on one stream.
        The rows are all padding here, so nothing is written but block 0."""
        graphs, pool = {}, torch.cuda.graph_pool_handle()
        try:
            with torch.inference_mode(), torch.cuda.device(self.device):
                for command in STEPS:
                    self._step(0, *command.split("/"))  # kernels are loaded now: not possible during a capture
                for slot in range(self.shape.num_slots):
                    for command in STEPS:
                        graphs[slot, command] = torch.cuda.CUDAGraph()
                        with torch.cuda.graph(graphs[slot, command], pool=pool):
                            self._step(slot, *command.split("/"))
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            warnings.warn(f"no CUDA graphs for this model, its steps are launched eagerly ({reason})", stacklevel=2)
            graphs = {}
        torch.cuda.synchronize(self.device)
        return graphs

    def _step(self, slot: int, passes: str, sampling: str) -> None:
        fields = self.shape.fields(self.inputs[slot])
        tables = fields["tables"].long()
        decodes = fields["decodes"].bool()
        if passes == "decode":
            logits = self._decode(fields, tables, decodes)
        elif passes == "prefill":
            logits = self._prefill(fields, tables)
        else:
            logits = torch.where(decodes[:, None], self._decode(fields, tables, decodes), self._prefill(fields, tables))
        self.outputs[slot] = sample(logits, fields) if sampling == "sampled" else logits.argmax(-1).to(torch.int32)

    def _decode(self, fields, tables, decodes) -> torch.Tensor:
        """One token a row. Returns logits [B, vocabulary]; those of rows that do not decode mean nothing."""
        input_ids = self._input_ids(fields).long()
        positions = torch.where(decodes, fields["position"], 0).long()
        rows = torch.arange(len(positions), device=self.device)
        # A row that does not decode writes to block 0, which belongs to nobody.
        own = torch.where(decodes[:, None], tables, 0)
        batch = self._batch(own, rows, positions)
        if self.device.type == "cpu":
            size = self.shape.block_size
            places = enumerate(zip(decodes.tolist(), positions.tolist(), strict=True))
            batch.parts = [(row, 1, p, own[row, : p // size + 1]) for row, (decode, p) in places if decode]
        output = self.model(input_ids[:, None], position_ids=positions[:, None], use_cache=False, paged=batch)
        return output.logits[:, 0]

    def _input_ids(self, fields) -> torch.Tensor:
        """Carry-over: a row's input token is an output of a step before, or the host has written it. int32 [B]."""
        carry = fields["carry"].long()
        return torch.where(carry >= 0, self.outputs.view(-1)[carry.clamp(min=0)], fields["input_id"])

    def _prefill(self, fields, tables) -> torch.Tensor:
        """Chunks of prompts, packed. Returns the logits after each row's last token, [B, vocabulary]."""
        start, count = fields["prefill_start"].long(), fields["prefill_count"].long()
        positions, rows = fields["prefill_position"].long(), fields["prefill_row"].long()
        used = torch.arange(len(positions), device=self.device) < count.sum()
        own = torch.where(count[:, None] > 0, tables, 0)
        batch = self._batch(own, rows, positions)
        batch.places = torch.where(used, batch.places, 0)
        if self.device.type == "cpu":
            size = self.shape.block_size
            chunks = zip(start.tolist(), count.tolist(), fields["position"].tolist(), own, strict=True)
            batch.parts = [(s, n, p, table[: -(-(p + n) // size)]) for s, n, p, table in chunks if n]
        last = (start + count - 1).clamp(min=0)
        output = self.model(
            fields["prefill_id"].long()[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=last,
            paged=batch,
        )
        return output.logits[0]

    def _batch(self, tables, rows, positions) -> Batch:
        size = self.shape.block_size
        places = tables[rows, positions // size] * size + positions % size
        batch = Batch(self.keys, self.values, places)
        if self.device.type == "cuda":
            batch.tables, batch.positions = tables[rows], positions
        return batch


class TimedRunner(Runner):
    """A device whose steps take `step_s` seconds and compute nothing, to see how the host does beside a faster device.
    The tokens are no language: each follows from the one before it and its place, so a lost carry-over still shows."""

    def __init__(self, model, *, shape: StepShape, host, step_s: float):
        self.shape, self.host, self.step_s, self.device = shape, host, step_s, torch.device("cpu")
        self.graphs = {}
        self.inputs = [torch.zeros(shape.num_inputs, dtype=torch.int32) for _ in host]
        self.outputs = torch.zeros(shape.num_slots, shape.max_batch_size, dtype=torch.int32)
        self.vocab_size = model.config.get_text_config().vocab_size

    def _step(self, slot: int, passes: str, sampling: str) -> None:
        fields = self.shape.fields(self.inputs[slot])
        last = fields["prefill_id"][(fields["prefill_start"] + fields["prefill_count"] - 1).clamp(min=0)]
        previous = torch.where(fields["decodes"].bool(), self._input_ids(fields), last)
        end = fields["position"] + fields["prefill_count"] + fields["decodes"]
        self.outputs[slot] = (previous * 31 + end * 7 + 1) % self.vocab_size
        if self.step_s:
            time.sleep(self.step_s)


def sample(logits: torch.Tensor, fields) -> torch.Tensor:
    """The next token of each row, int32 [B], from logits [B, vocabulary] and each row's sampling fields.

    One uniform number a row picks from the cumulated probabilities of the tokens that top_k and top_p leave, most
    likely first (the inverse of their distribution function). A row with temperature 0 takes the most likely token.
    """
    temperature, top_k, top_p = fields["temperature"], fields["top_k"], fields["top_p"]
    scaled = logits.float() / torch.where(temperature > 0, temperature, 1.0)[:, None]
    probabilities, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    before = probabilities.cumsum(-1) - probabilities
    kept = ((rank < top_k[:, None]) | (top_k[:, None] == 0)) & (before < top_p[:, None])
    total = torch.where(kept, probabilities, 0).cumsum(-1)
    # The first token whose cumulated probability exceeds the number. Rounding can leave none: then the last one kept.
    pick = (total <= fields["uniform"][:, None] * total[:, -1:]).sum(-1)
    # (A row of padding keeps none at all.)
    pick = torch.minimum(pick, kept.sum(-1) - 1).clamp(min=0)
    sampled = order.gather(1, pick[:, None])[:, 0]
    return torch.where(temperature > 0, sampled, logits.argmax(-1)).to(torch.int32)

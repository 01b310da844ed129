"""Where a step's time goes on a GPU, kernel by kernel: the table of docs/performance.md.

    python tools/step_kernels.py --model random:llama-8b --rows 32 --context 33 --kind decode
    python tools/step_kernels.py --preset mixed --kind mixed --tokens 512 --json out.json

A batcher is opened, and the CUDA graph of one kind of step is replayed under torch.profiler. A table says what ran in
it: kernels grouped by what they are for, how many a step has, their microseconds a step and their share, and beside
matrix products and the attention of decode rows their floor: reading the weights, or the keys and values, once at the
copy bandwidth that the same call measures, or the arithmetic at the rate of one large product, whichever is longer.
Below it: all kernels, the gaps in which nothing runs, and the step, also by events around a replay without profiler.

A replayed graph does not tell which product a kernel belongs to. So the same step also runs once without its graph,
under a profiler that notes each operator and its sizes, and the kernels of both are matched by name, in order. Kernels
without a match are told by their names alone. A replay of which the profiler lost a kernel is left out, and said.

Every row attends to `--context` tokens, its own included; a chunk of a prompt is the first of it, and is full.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asyncbatch import AsyncBatcher, load_model
from asyncbatch.devices.cuda.runner import matrix_products_by_cublaslt
from asyncbatch.kv_cache import blocks_for
from asyncbatch.measure.bandwidth import copy_bandwidth, matmul_rate
from asyncbatch.profile.draws import Lengths
from asyncbatch.profile.presets import PRESETS, SHORT, served_by
from asyncbatch.scheduler import StepKind

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.step_table import MARK, PARTS, origins, replays, step_table, table_text


def fill_inputs(shape: Any, buffer: torch.Tensor, kind: StepKind, context: int, vocab_size: int, seed: int = 0) -> None:
    """Write the inputs of a step into a slot's buffer: every row decodes and attends to `context` tokens, but for the
    last one where the step has a chunk: that is the first of a prompt, and as long as the step's size. The blocks of
    each row lie anywhere in the pool. ValueError where the pool has too few."""
    decodes = kind.rows - (kind.tokens > 0) if kind.passes != "prefill" else 0
    generator = torch.Generator().manual_seed(seed)
    per_row = blocks_for(max(context, kind.tokens), shape.block_size)
    if per_row * kind.rows > shape.num_blocks:
        raise ValueError(f"{kind.rows} rows of {per_row} blocks do not fit into the pool of {shape.num_blocks}")
    order = torch.randperm(shape.num_blocks, generator=generator)[: per_row * kind.rows] + 1
    buffer.zero_()
    fields = shape.fields(buffer, kind)

    def put(name: str, values: Any, where: slice = slice(None)) -> None:
        part = fields[name][where]
        part.copy_(torch.as_tensor(values).to(part.dtype).expand_as(part))

    fields["tables"][:, :per_row].copy_(order.view(kind.rows, per_row).to(torch.int32))
    rows = slice(0, decodes)
    put("position", context - 1, rows)
    put("decodes", 1, rows)
    put("input_id", torch.randint(vocab_size, (decodes,), generator=generator), rows)
    put("carry", -1)
    for name, value in (("temperature", 1.0), ("top_p", 1.0), ("uniform", 0.5)):
        put(name, value)
    if kind.tokens:
        put("prefill_count", kind.tokens, slice(decodes, decodes + 1))
        put("prefill_id", torch.randint(vocab_size, (kind.tokens,), generator=generator))
        put("prefill_position", torch.arange(kind.tokens))
        put("prefill_row", decodes)


def traced(run: Any, **options: Any) -> dict[str, Any]:
    """The trace of torch.profiler of what `run()` does, until the device is done."""
    with torch.profiler.profile(**options) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))


def traced_eagerly(runner: Any, kind: StepKind) -> dict[str, Any]:
    """The trace of a step that is launched kernel by kernel, with its operators, their sizes, and the parts' marks."""
    current: list[Any] = []

    def mark(_: int, moment: int) -> None:
        while current:
            current.pop().__exit__(None, None, None)
        if moment < len(PARTS):
            current.append(torch.profiler.record_function(MARK + PARTS[moment]))
            current[0].__enter__()

    def step() -> None:
        with torch.inference_mode(), matrix_products_by_cublaslt():  # as its graph was captured
            runner._step(0, kind)

    step()
    runner._mark = mark
    try:
        both = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        return traced(step, activities=both, record_shapes=True)
    finally:
        del runner._mark


def by_events_us(graph: Any, count: int) -> float:
    times = []
    for _ in range(count):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Open a batcher as the options say, measure the step, print its table, and return all of it for a file."""
    options = of_preset(options)
    model, _ = load_model(options.model, device="cuda")
    tokens = 0 if options.kind == "decode" else options.tokens
    length = max(options.context, tokens) + 1
    bandwidth, rate = copy_bandwidth("cuda"), matmul_rate("cuda", model.dtype)
    limits = dict(max_batch_size=options.rows, max_length=length, prefill_tokens=options.tokens)
    with AsyncBatcher(model, compile=not options.eager, **limits) as batcher:
        runner: Any = batcher.device.program
        kind = StepKind(options.kind, options.sampled, options.rows, tokens)
        if (0, kind) not in runner.graphs:
            raise ValueError("this model's steps have no CUDA graphs: there is nothing to replay")
        graph, vocab_size = runner.graphs[0, kind], model.config.get_text_config().vocab_size
        fill_inputs(runner.shape, runner.inputs[0], kind, options.context, vocab_size)
        only_device = [torch.profiler.ProfilerActivity.CUDA]
        events_us = by_events_us(graph, options.replays)
        traced(graph.replay, activities=only_device)  # the first use of the profiler loses events
        eager = origins(traced_eagerly(runner, kind))
        found = traced(lambda: [graph.replay() for _ in range(options.replays)], activities=only_device)
        decode_rows = 0 if kind.passes == "prefill" else kind.rows - (tokens > 0)
        kv_bytes = decode_rows * options.context * runner._block_bytes() / runner.shape.block_size
        table = step_table(*replays(found), eager, bandwidth, rate, kv_bytes)
    device = torch.cuda.get_device_name()
    print(f"{options.model}, {kind}, context {options.context}: {device}, torch {torch.__version__}, copy "
          f"{bandwidth / 1e12:.2f} TB/s, matrix products {rate / 1e12:.0f} TFLOP/s")  # fmt: skip
    print(table_text(table, events_us))
    facts = dict(command=shlex.join(["python", *sys.argv]), device=device, torch=torch.__version__, model=options.model,
                 step=str(kind), context=options.context, copy_bandwidth_bytes_per_s=bandwidth,
                 matmul_flops_per_s=rate, by_events_us=events_us)  # fmt: skip
    return facts | asdict(table)


def of_preset(options: argparse.Namespace) -> argparse.Namespace:
    """The options with those of a preset's workload filled in: its model, its rows, and the context that its requests
    have in the middle of their answers, on average. What was given stays."""
    given, filled = vars(options), dict(model="random:llama-8b", rows=32, context=33)
    if options.preset:
        (served,) = served_by(PRESETS["workloads"], [options.preset])
        drawn = [Lengths.parse(part or 16) for part in (served.prompt_tokens, served.new_tokens)]
        prompt, new = (statistics.mean(one.draw(np.random.default_rng(0), 10_000)) for one in drawn)
        filled = dict(model=served.model, rows=served.batch_size, context=round(prompt + new / 2))
    return argparse.Namespace(**given | {key: value for key, value in filled.items() if given[key] is None})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as for load_model (random:llama-8b)")
    parser.add_argument("--rows", type=int, help="max_batch_size (32)")
    parser.add_argument("--context", type=int, help="tokens that each row attends to (33)")
    parser.add_argument("--kind", choices=("decode", "mixed", "prefill"), default="decode", help="of step (decode)")
    parser.add_argument("--tokens", type=int, default=256, help="of the chunk, and the step's prefill size (256)")
    parser.add_argument("--preset", choices=SHORT, help="model, rows and context of a workload of --preset workloads")
    parser.add_argument("--sampled", action="store_true", help="a step that samples, not a greedy one")
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    parser.add_argument("--replays", type=int, default=20, metavar="N", help="replays under the profiler (20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything into FILE too")
    options = parser.parse_args(arguments)
    for name in ("rows", "context", "tokens", "replays"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}: allowed are whole numbers from 1")
    if not torch.cuda.is_available():
        print("step_kernels.py: torch sees no CUDA device, and kernels are measured on one", file=sys.stderr)
        return 2
    try:
        found = measure(options)
    except (ValueError, MemoryError) as error:
        print(f"step_kernels.py: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

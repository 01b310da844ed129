"""A session of the profiling script: it serves each workload with every loop and engine, in turns, and measures."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..base import BatcherBase
from ..batcher import AsyncBatcher, SyncBatcher
from ..devices.worker import device_threads
from ..measure.bandwidth import copy_bandwidth, kv_bytes_per_token, weight_bytes
from ..measure.point_recorder import record_points
from ..measure.recording import Recording
from ..measure.steps import steps_from
from ..models.load import load_model
from ..request import Completion, Request
from ..timeline import Timeline, save_trace
from .console import one_line, tell
from .crosscheck import kineto, overhead
from .options import settle
from .report import OWN, Measured, report
from .workload import arrival_times, make_requests, most_context, note_sizes
from .workload import serve as serve_requests

BATCHERS: dict[str, type[BatcherBase]] = {"sync": SyncBatcher, "async": AsyncBatcher}
PROBE_TOKENS = 32  # a peer first generates so many: is the rest of it bearable?


class Session:
    """What has been measured so far, workload by workload: `report` and `table` work at any time."""

    def __init__(self, options: argparse.Namespace):
        self.recording = None if options.emulate is None else Recording.load(options.emulate)
        self.options, self.workloads = settle(options, self.recording)
        self.measured: list[Measured] = []
        self.failed: list[dict[str, Any]] = []
        self.models: dict[str, dict[str, Any]] = {}
        self.loaded: tuple[str, Any, Any] | None = None  # name, model, tokenizer: workloads in a row share them
        self.device = ""
        self.gpu: dict[str, Any] | None = None
        self.bandwidth: float | None = None

    def run(self) -> None:
        """Measure every workload. In a preset one that fails is noted in `failed`, and the next one follows."""
        for workload in self.workloads:
            try:
                self._run(workload)
            except (ValueError, RuntimeError, OSError, MemoryError) as error:
                if not workload.preset:
                    raise
                self._note_failure(workload, OWN, ",".join(workload.mode), error)
            if workload.preset and workload.out is not None:
                self.write()

    def _run(self, workload: argparse.Namespace) -> None:
        model, tokenizer = self._load(workload)
        on_cuda = is_on_cuda(model)
        if on_cuda:
            self._look_at_gpu(workload.model, model)
        self.device = device_name(model, workload, self.recording)
        requests = make_requests(workload, model, tokenizer)
        note_sizes(workload, requests)
        step_s = None if workload.step_ms is None else 1e-3 * workload.step_ms
        if self.recording is not None:
            step_s = self.recording.step_times(workload.batch_size, workload.model)
            most = most_context(requests, workload.batch_size)
            if most > step_s.max_context:
                raise ValueError(
                    f"the emulated run would reach a context of {most} tokens over all rows of a step, and "
                    f"{self.recording.name} was recorded up to {step_s.max_context}: take a smaller --new-tokens or "
                    "--batch-size"
                )
        keys = [(engine, mode) for engine in workload.engine for mode in workload.mode]
        # Each engine takes much of a GPU's memory, so then they follow each other. Else they take turns: what changes
        # on the machine meanwhile changes for all of them.
        alone = on_cuda and (len(workload.engine) > 1 or workload.preset)
        for group in [[key] for key in keys] if alone else [keys]:
            try:
                self._serve_group(workload, group, model, requests, step_s)
            except Exception as error:
                if not workload.preset:
                    raise
                self._note_failure(workload, *group[0], error)  # it could not be closed; go on with the next one
            if on_cuda:
                free_memory()

    def _load(self, workload: argparse.Namespace) -> tuple[Any, Any]:
        if self.loaded is None or self.loaded[0] != workload.model:
            self.loaded = None
            free_memory()
            if self.recording is not None:
                model, tokenizer = self.recording.stand_in_model(workload.model), None
            else:
                # A timed device is the worker process, also beside a GPU.
                where = None if workload.step_ms is None else "cpu"
                model, tokenizer = load_model(workload.model, seed=workload.seed, device=where)
            self.loaded = workload.model, model, tokenizer
        return self.loaded[1:]

    def _serve_group(self, workload, group, model, requests, step_s) -> None:
        """Open, warm up and run the batchers of `group`, pairs of engine and mode, in turns, then close them."""
        few = [Request(r.token_ids, min(2, r.max_new_tokens)) for r in requests[: workload.batch_size]]
        arrivals_s = arrival_times(workload.arrivals, len(requests), workload.seed)
        points = not (workload.preset or workload.record)  # those runs are for others to build on: nothing slows them
        alive: dict[tuple[str, str], tuple[Any, Measured]] = {}

        @contextlib.contextmanager
        def noting_failure(engine: str, mode: str):
            try:
                yield
            except Exception as error:
                if engine == OWN and not workload.preset:
                    raise
                _, found = alive.pop((engine, mode), (None, None))
                if found is not None and found.runs:
                    self.measured.append(found)
                self._note_failure(workload, engine, mode, error)

        with contextlib.ExitStack() as stack:
            for engine, mode in group:
                with noting_failure(engine, mode):
                    batcher = stack.enter_context(open_batcher(engine, mode, model, workload, step_s))
                    shape = getattr(batcher, "shape", None)
                    found = Measured(workload, engine, mode, getattr(batcher, "setting", None))
                    found.prefill_tokens = getattr(shape, "prefill_tokens", None)
                    alive[engine, mode] = batcher, found
            for (engine, mode), (batcher, _) in list(alive.items()):
                tell(f"{self._where(workload)}{_who(workload, engine, mode)}: warm-up")
                with noting_failure(engine, mode):
                    serve(batcher, few)
                    if engine != OWN:
                        check_speed(batcher, requests, workload)
            for repeat in range(workload.repeats):
                # Every second time the other way round, so that neither mode always runs on the warmer machine.
                for engine, mode in list(alive)[:: -1 if repeat % 2 else 1]:
                    with noting_failure(engine, mode):
                        batcher, found = alive[engine, mode]
                        with self._keeping_what_ran(alive, batcher, found):
                            served = serve(batcher, requests, arrivals_s, sys.stderr.isatty(), points)
                        steps_from(served[0])  # a ValueError now is better than a report that cannot be made
                        found.runs.append(served)
                        wall_s = served[0].summary().wall_s
                        count = f"run {repeat + 1} of {workload.repeats}"
                        tell(f"{self._where(workload)}{_who(workload, engine, mode)}: {count}: {wall_s:.2f} s")
            for (engine, mode), (batcher, found) in list(alive.items()):
                with noting_failure(engine, mode):
                    who = f"{self._where(workload)}{_who(workload, engine, mode)}"
                    if workload.overhead and engine == OWN:
                        tell(f"{who}: with and without measuring")
                        found.overhead = self._overhead(batcher, mode, model, workload, requests, step_s)
                        if found.overhead is None:
                            tell(f"{who}: too few steps to tell what measuring costs; take more --new-tokens")
                    if workload.kineto:
                        tell(f"{who}: once more under torch.profiler")
                        found.kineto = kineto(batcher, requests)
            # Inside: what was measured stays, even if closing a broken device fails.
            self.measured += [found for _, found in alive.values()]

    def _overhead(self, batcher, mode, model, workload, requests, step_s) -> dict[str, Any] | None:
        """What measuring with `batcher` costs: it and another one that measures nothing, and on CUDA tells no parts."""
        with open_batcher(OWN, mode, model, workload, step_s, parts=False) as plain:
            serve(plain, requests)  # warm-up
            return overhead(batcher, plain, requests)

    @contextlib.contextmanager
    def _keeping_what_ran(self, alive, batcher, found: Measured):
        """After Ctrl-C, keep what has been measured; of an engine that has no whole run yet, the run that was ended."""
        try:
            yield
        except KeyboardInterrupt:
            computed = [span for span in batcher.timeline.spans if span.lane == "compute"]
            if not found.runs and len(computed) > 1:
                found.runs.append((batcher.timeline, []))
                found.interrupted = True
            self.measured += [other for _, other in alive.values() if other.runs]
            raise

    def _where(self, workload) -> str:
        return f"{workload.model} batch {workload.batch_size} " if len(self.workloads) > 1 else ""

    def _note_failure(self, workload, engine: str, mode: str, error: BaseException) -> None:
        row = {key: getattr(workload, key) for key in ("model", "batch_size")}
        self.failed.append({"engine": engine, "mode": mode, **row, "error": one_line(error)})
        tell(f"{self._where(workload)}{engine} {mode} failed: {one_line(error)}")

    def _look_at_gpu(self, name: str, model) -> None:
        if self.bandwidth is None:
            self.gpu, bandwidth = gpu_facts(), copy_bandwidth(next(model.parameters()).device)
            self.bandwidth = bandwidth
            tell(f"copy bandwidth: {bandwidth / 1e12:.3f} TB/s")
        config = model.config.get_text_config()
        self.models[name] = {
            "dtype": str(model.dtype).removeprefix("torch."),
            "weight_bytes": weight_bytes(model),
            "kv_bytes_per_token": kv_bytes_per_token(config, model.dtype),
            "vocab_size": config.vocab_size,
            "max_positions": getattr(config, "max_position_embeddings", None) or 2048,
        }

    def report(self) -> tuple[dict[str, Any], list[Timeline]]:
        return report(
            self.options,
            self.measured,
            self.device,
            failed=self.failed,
            gpu=self.gpu,
            bandwidth=self.bandwidth,
            models=self.models,
            recording=self.recording,
        )

    def write(self, made: tuple[dict[str, Any], list[Timeline]] | None = None) -> None:
        """Write the report that was `made`, else a new one: report.json, the recording if asked for, and, but for the
        long runs of a preset, page, picture and trace."""
        folder, (result, timelines) = self.options.out, made or self.report()
        (folder / "report.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if self.options.record and timelines:
            Recording.from_runs(self.options.record, result, timelines).save(folder / f"{self.options.record}.json")
        from .page import write_page  # matplotlib is needed for pictures only

        write_page(folder / "report.html", result, [] if self.options.preset else timelines)
        if timelines and not self.options.preset:
            from ..pictures import plot

            plot(*timelines, title=f"{result['model']} on {result['device']}").savefig(folder / "timeline.png")
            save_trace(folder / "trace.json", timelines)


def open_batcher(engine: str, mode: str, model, options: argparse.Namespace, step_s, parts: bool = True):
    """A batcher for the workload, not yet warm. parts: on CUDA it tells a step's parts apart, but never in a preset or
    for a recording. Whatever the engine raises where it cannot serve the model here."""
    limits: dict[str, Any] = {
        "max_batch_size": options.batch_size,
        "max_length": options.max_length,
    }
    if engine != OWN:
        from .peers.batcher import TransformersBatcher  # only here: what it needs may not be installed

        return TransformersBatcher(model, mode=mode, **limits)
    if options.compile:
        limits["compile"] = True
    limits["parts"] = parts and not (options.preset or options.record)
    if options.prefill_tokens is not None:
        limits["prefill_tokens"] = options.prefill_tokens
    slots = options.slots if mode == "async" else 1
    host_work_s = 1e-3 * options.host_work_ms
    return BATCHERS[mode](model, num_slots=slots, host_work_s=host_work_s, step_s=step_s, **limits)


def serve(
    batcher,
    requests: list[Request],
    arrivals_s: Sequence[float] | None = None,
    progress: bool = False,
    points: bool = False,
) -> tuple[Timeline, list[Completion]]:
    with record_points(batcher) if points else contextlib.nullcontext():
        completions = serve_requests(batcher, requests, arrivals_s, progress)
    for completion in completions:
        if completion.error is not None:
            raise completion.error
    return batcher.timeline, completions


def check_speed(batcher, requests: list[Request], options: argparse.Namespace) -> None:
    """RuntimeError if the workload would take longer than --peer-limit-s, judged by its first tokens."""
    if options.new_tokens < 2 * PROBE_TOKENS:
        return
    short = [replace(r, max_new_tokens=min(PROBE_TOKENS, r.max_new_tokens)) for r in requests]
    whole, probed = (sum(r.max_new_tokens for r in each) for each in (requests, short))
    expected_s = serve(batcher, short)[0].summary().wall_s * whole / probed
    if expected_s > options.peer_limit_s:
        setting = getattr(batcher, "setting", None) or "its setting"
        raise RuntimeError(
            f"it would take about {math.ceil(expected_s)} s, and --peer-limit-s is {options.peer_limit_s} ({setting})"
        )


def _who(options: argparse.Namespace, engine: str, mode: str) -> str:
    return f"{engine} {mode}" if len(options.engine) > 1 else mode


def device_name(model, options: argparse.Namespace, recording: Recording | None = None) -> str:
    where = next(model.parameters()).device
    if recording is not None:
        return f"emulated: {recording.gpu['name']}, recording {recording.name}; nothing computed, this machine's host"
    if options.step_ms is not None:
        return f"timed: {options.step_ms:g} ms a step, nothing computed"
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    threads = device_threads()
    return f"cpu: a worker process, {threads} thread{'s' if threads > 1 else ''}"


def is_on_cuda(model) -> bool:
    return next(model.parameters()).is_cuda


def free_memory() -> None:
    """Give back what closed batchers and unused models held, compiled code too: it is limited for each function."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.compiler.reset()
        torch.cuda.empty_cache()


def gpu_facts() -> dict[str, Any]:
    """Name, memory, driver and compute capability of the GPU in use; None for a driver that does not tell its name."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
        driver = said[0] if said else None
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": driver,
        "compute_capability": f"{properties.major}.{properties.minor}",
    }

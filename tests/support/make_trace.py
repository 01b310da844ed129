"""Traces as torch.profiler writes them, of an engine that is not there: event by event, with the truth beside them.

The layout (keys and their order, three decimals of a microsecond, metadata, flow arrows, spans of the profiler) follows
what torch 2.11 exports. Times are whole nanoseconds here. `python tests/support/make_trace.py FILE MEGABYTES` writes a
large one.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ORIGIN = 4_600_000_000_000_123  # nanoseconds: what torch's clock shows, some days after 2026-09
PID, THREAD, OTHER_THREAD = 4157758, 4157758, 4157801
COMPUTE, COPY_IN, COPY_OUT = 7, 20, 24  # streams
US = 1000


@dataclass
class Trace:
    """Events (dicts with `ts` and `dur` in nanoseconds from ORIGIN), and what is true of them."""

    events: list[dict[str, Any]] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)  # on the compute stream
    kernels: list[tuple[int, int]] = field(default_factory=list)  # and copies and memsets, on any stream of GPU 0
    correlation: int = 100
    gpu: str = "NVIDIA H100 80GB HBM3"
    origin: int = ORIGIN

    def complete(self, cat: str, name: str, pid, tid, start: int, length: int, args: dict[str, Any]) -> None:
        event = {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": start, "dur": length, "args": args}
        self.events.append(event)

    def host(self, cat: str, name: str, start: int, length: int, tid: int = THREAD, **args: Any) -> None:
        self.complete(cat, name, PID, tid, start, length, args)

    def op(self, name: str, start: int, length: int) -> None:
        args = {"External id": len(self.events), "Ev Idx": len(self.events), "Concrete Inputs": ["", "[8, 1]"]}
        self.complete("cpu_op", name, PID, THREAD, start, length, args)

    def call(self, name: str, start: int, length: int, tid: int = THREAD, cat: str = "cuda_runtime") -> int:
        """A call of the CUDA runtime; its correlation id."""
        self.correlation += 1
        self.complete(cat, name, PID, tid, start, length, {"cbid": 211, "correlation": self.correlation})
        return self.correlation

    def flow(self, correlation: int, start: int, device: int, stream: int) -> None:
        arrow = {"id": correlation, "cat": "ac2g", "name": "ac2g"}
        self.events.append({"ph": "s", **arrow, "pid": PID, "tid": THREAD, "ts": start})
        self.events.append({"ph": "f", **arrow, "pid": device, "tid": stream, "ts": start, "bp": "e"})

    def kernel(
        self, name: str, start: int, length: int, correlation: int = 0, stream: int = COMPUTE, device: int = 0, graph=0
    ) -> None:
        args = {"queued": 0, "device": device, "context": 1, "stream": stream, "correlation": correlation}
        args |= {"registers per thread": 32, "blocks per SM": 0.007576, "grid": [1, 1, 1], "block": [64, 1, 1]}
        if graph:
            args |= {"graph id": graph, "graph node id": len(self.events)}
        self.complete("kernel", name, device, stream, start, length, args)
        self.note(device, start, length)

    def copy(self, name: str, start: int, length: int, correlation: int = 0, stream: int = COPY_IN, device=0) -> None:
        args = {"device": device, "context": 1, "stream": stream, "correlation": correlation, "bytes": 512}
        rate = "N/A" if length == 0 else 0.512
        self.complete("gpu_memcpy", name, device, stream, start, length, {**args, "memory bandwidth (GB/s)": rate})
        self.note(device, start, length)

    def memset(self, start: int, length: int, correlation: int = 0, stream: int = COMPUTE) -> None:
        args = {"device": 0, "context": 1, "stream": stream, "correlation": correlation, "bytes": 4096}
        self.complete("gpu_memset", "Memset (Device)", 0, stream, start, length, args)
        self.note(0, start, length)

    def note(self, device: int, start: int, length: int) -> None:
        if device == 0:
            self.kernels.append((start, start + length))

    # ---- as a file

    def text(self, numbers: str = "decimal", bare: bool = False, events: list[dict] | None = None) -> str:
        """JSON. `numbers`: times as torch writes them ("decimal"), as "string"s, or as "whole" microseconds as it did
        until 2023. `bare`: only the list of events."""

        def time(ns: int, origin: int = 0) -> str:
            ns += origin
            if numbers == "whole":
                return str(ns // 1000)
            return f"{ns // 1000}.{ns % 1000:03d}" if numbers == "decimal" else f'"{ns // 1000}.{ns % 1000:03d}"'

        lines = []
        for event in self.metadata() + (self.events if events is None else events):
            parts = []
            for key, value in event.items():
                is_time = key in ("ts", "dur") and isinstance(value, int)
                written = time(value, self.origin if key == "ts" else 0) if is_time else json.dumps(value)
                parts.append(f'"{key}": {written}')
            lines.append("  {\n    " + ", ".join(parts) + "\n  }")
        body = "[\n" + ",\n".join(lines) + "\n  ]"
        if bare:
            return body
        about = {"schemaVersion": 1, "deviceProperties": [{"id": 0, "name": self.gpu, "numSms": 132}]}
        about |= {"cuda_driver_version": 13000, "displayTimeUnit": "ms", "baseTimeNanoseconds": 1775078550000000000}
        return json.dumps(about)[:-1] + f',\n  "traceEvents": {body},\n  "traceName": "trace.json"\n}}\n'

    def metadata(self) -> list[dict[str, Any]]:
        def about(kind: str, pid, tid, **args: Any) -> dict[str, Any]:
            return {"name": kind, "ph": "M", "ts": 0, "pid": pid, "tid": tid, "args": args}

        last = max((event["ts"] for event in self.events), default=0)
        return [
            about("process_name", PID, 0, name="python"),
            about("process_labels", PID, 0, labels="CPU"),
            about("process_labels", 0, 0, labels="GPU 0"),
            about("thread_name", 0, COMPUTE, name="stream 7 "),
            about("process_sort_index", "Spans", 0, sort_index=536870912),
            {"ph": "X", "cat": "Trace", "ts": 0, "dur": last, "pid": "Spans", "tid": "PyTorch Profiler",
             "name": "PyTorch Profiler (0)", "args": {"Op count": 0}},
            {"name": "Record Window End", "ph": "i", "s": "g", "pid": "", "tid": "", "ts": last},
        ]  # fmt: skip

    def save(self, path: Path, **options: Any) -> Path:
        data = self.text(**options).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return path


LAYERS = ("rms_norm_kernel", "nvjet_tst_128x64_64x10", "flash_fwd_splitkv_kernel", "triton_poi_fused_mul_silu_0")


def engine(
    mode: str = "sync", graphs: bool = True, steps: int = 12, kernels: int = 8, copies: bool = True,
    annotation: str | None = None, sampling: bool = False, prefill_at: int | None = None, runtime: str = "cuda",
    start: int = 0, trace: Trace | None = None,
) -> Trace:  # fmt: skip
    """An engine at work: every step copies in, launches the model, samples, copies out.

    A synchronous one waits for each step's result before it plans the next. An asynchronous one launches step N+1
    first. `annotation` is wrapped around the work of the host on a step, {} is its number. `sampling`: one eager kernel
    after the model's. `prefill_at`: before that step the model runs eagerly, longer. The host plans for 300 us and
    commits for 150 us; each of a step's kernels takes 40 us, with 1 us to the next."""
    trace = trace or Trace()
    host = _Host(trace, start, mode, copies, sampling, runtime)
    waiting = None  # when the copy out that is still to be waited for is done
    for number in range(steps):
        began = host.now
        host.plan()
        if copies:
            host.copy_in()
        if number == prefill_at:
            host.launch_model(3 * kernels, False, [f"prefill_{name}" for name in LAYERS])
        host.launch_model(kernels, graphs, [f"embedding_{runtime}", *LAYERS])
        done = host.copy_out() if copies else host.free
        if mode == "sync":
            host.wait_and_commit(done)
        else:
            if waiting:
                host.wait_and_commit(waiting)
            waiting = done
        if annotation:
            trace.host("user_annotation", annotation.format(number), began, host.now - began)
    trace.host("python_function", "/opt/engine/log.py(1): other thread", start, host.now - start, tid=OTHER_THREAD)
    return trace


@dataclass
class _Host:
    """The host of an engine. `now` is its clock, `free` is when the compute stream is done with all it has to do."""

    trace: Trace
    now: int
    mode: str
    copies: bool
    sampling: bool
    runtime: str
    free: int = 0

    def plan(self) -> None:
        self.trace.host("python_function", "/opt/engine/scheduler.py(88): plan", self.now, 300 * US)
        self.trace.op("aten::empty", self.now + 20 * US, 10 * US)
        self.now += 300 * US

    def copy_in(self) -> None:
        self.trace.op("aten::copy_", self.now, 12 * US)
        correlation = self.trace.call(f"{self.runtime}MemcpyAsync", self.now + 2 * US, 6 * US)
        self.trace.copy("Memcpy HtoD (Pinned -> Device)", self.now + 9 * US, 2 * US, correlation)
        self.now += 14 * US

    def launch_model(self, count: int, as_graph: bool, names: Sequence[str]) -> None:
        trace, begin = self.trace, None
        graph = trace.call(f"{self.runtime}GraphLaunch", self.now, 30 * US) if as_graph else 0
        self.now += 30 * US if as_graph else 0
        for i in range(count):
            correlation = graph if as_graph else self.launch_kernel(i)
            at = max(self.free + US, self.now + 5 * US)
            trace.kernel(names[i % len(names)], at, 40 * US, correlation, graph=graph and 3)
            trace.flow(correlation, at, 0, COMPUTE)
            begin, self.free = begin or at, at + 40 * US
        if self.sampling:
            correlation = trace.call(f"{self.runtime}LaunchKernel", self.now, 4 * US)
            trace.kernel("argmax_kernel", self.free + US, 5 * US, correlation)
            self.now, self.free = self.now + 5 * US, self.free + 6 * US
        trace.steps.append((begin, self.free))

    def launch_kernel(self, i: int) -> int:
        """Launch one kernel eagerly; its correlation id."""
        name = f"{self.runtime}LaunchKernel" if i % 3 else "cuLaunchKernelEx"
        self.trace.op("aten::mm", self.now, 6 * US)
        cat = "cuda_runtime" if i % 3 else "cuda_driver"
        correlation = self.trace.call(name, self.now + US, 4 * US, cat=cat)
        self.now += 7 * US
        return correlation

    def copy_out(self) -> int:
        """Launch the copy of the results; when it is done."""
        correlation = self.trace.call(f"{self.runtime}MemcpyAsync", self.now, 5 * US)
        begin = max(self.free, self.now) + 2 * US
        self.trace.copy("Memcpy DtoH (Device -> Pinned)", begin, 2 * US, correlation, COPY_OUT)
        self.now += 6 * US
        return begin + 2 * US

    def wait_and_commit(self, done: int) -> None:
        name = f"{self.runtime}StreamSynchronize" if self.mode == "sync" else f"{self.runtime}EventSynchronize"
        until = max(done + 6 * US, self.now + 2 * US)
        if self.mode == "sync" or self.copies:
            self.trace.call(name, self.now, until - self.now)
        self.trace.host("python_function", "/opt/engine/scheduler.py(210): commit", until, 150 * US)
        self.now = until + 150 * US


def write_large(path: Path, megabytes: float, mode: str = "sync") -> int:
    """A file of about so many megabytes, written a stretch of 50 steps at a time; how many events it has."""
    count, start = 0, 0
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"schemaVersion": 1,\n  "traceEvents": [\n')
        while file.tell() < megabytes * 1e6:
            trace = engine(mode, steps=50, kernels=120, start=start, trace=Trace(correlation=100 + count))
            text = trace.text(bare=True)
            file.write((",\n" if count else "") + text.strip("[]\n "))
            count += len(trace.events) + len(trace.metadata())
            start = max(event["ts"] + event.get("dur", 0) for event in trace.events) + 100 * US
        file.write('\n  ],\n  "traceName": "large.json"\n}\n')
    return count


if __name__ == "__main__":
    print(write_large(Path(sys.argv[1]), float(sys.argv[2])), "events")

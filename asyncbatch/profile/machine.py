"""Where a session runs: the device, the GPU and its driver, the model on it, the versions of what matters."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from ..devices.worker import device_threads
from ..measure.bandwidth import flops_per_token, has_experts, kv_bytes_per_token, sliding_window, weight_bytes
from ..measure.recording import Recording
from ..models.probe import ALL, AttentionLayer, attention_layers
from .report import Gpu, ModelFacts
from .workload import max_positions


def device_name(model, step_ms: float | None, recording: Recording | None = None) -> str:
    """What the report calls the device that serves `model`."""
    where = next(model.parameters()).device
    if recording is not None:
        name = f"{recording.gpu['name']}, recording {recording.name}{recording.of_ranks}"
        return f"emulated: {name}; nothing computed, this machine's host"
    if step_ms is not None:
        return f"timed: {step_ms:g} ms a step, nothing computed"
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    threads = device_threads()
    return f"cpu: a worker process, {threads} thread{'s' if threads > 1 else ''}"


def machine_name() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"


def versions() -> dict[str, str | None]:
    """Of Python, of the packages that matter, and of the CUDA that torch was built for; None for what is missing."""
    numbers: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "transformers", "triton"):
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            numbers[name] = None
    return {**numbers, "cuda": torch.version.cuda}


def version_line() -> str:
    """asyncbatch's own version, and those of what matters to a measurement."""
    try:
        own = version("asyncbatch")
    except PackageNotFoundError:  # a folder that was not installed
        own = "(not installed)"
    return ", ".join([f"asyncbatch {own}", *(f"{name} {number or 'none'}" for name, number in versions().items())])


def is_on_cuda(model) -> bool:
    return next(model.parameters()).is_cuda


def free_memory() -> None:
    """Give back what closed batchers and unused models held, and compiled code, of which there can be only so much."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.compiler.reset()
        torch.cuda.empty_cache()


def gpu_facts(place: torch.device) -> Gpu:
    """The GPU at `place`. Its driver is None where nvidia-smi cannot be asked."""
    properties = torch.cuda.get_device_properties(place)
    driver = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
        driver = lines[0] if lines else None
    memory_gib = round(properties.total_memory / 2**30, 1)
    return Gpu(properties.name, memory_gib, driver, f"{properties.major}.{properties.minor}")


def model_facts(model, tp: int = 1) -> ModelFacts:
    """What the report says of a model on a GPU; of one that `tp` ranks share, this rank's part."""
    config = model.config.get_text_config()
    layers: list[AttentionLayer] = []
    if tp == 1:
        with contextlib.suppress(Exception):  # another engine may serve what cannot be looked at so
            layers = attention_layers(model, max_positions(config))
    if layers:
        kv_bytes = sum(layer.token_bytes for layer in layers)
        window = min((layer.window for layer in layers if layer.window != ALL), default=None)
    else:
        kv_bytes, window = kv_bytes_per_token(config, model.dtype, tp), sliding_window(config)
    return ModelFacts(
        dtype=str(model.dtype).removeprefix("torch."),
        weight_bytes=weight_bytes(model),
        kv_bytes_per_token=kv_bytes,
        vocab_size=config.vocab_size,
        max_positions=max_positions(config),
        flops_per_token=flops_per_token(model),
        window=window,
        experts=has_experts(model) or None,
    )

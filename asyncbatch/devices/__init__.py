"""Devices: where the steps of a batcher run. All of them speak the protocol of `streams.py`.

- host: a worker process, for a model on the CPU.
- cuda: torch's own streams and events, for a model on CUDA.
- virtual: no time passes; every time is said beforehand and is the same in every run.
- timed: a worker process that computes nothing and takes as long as a recorded GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..streams import Device, DeviceError
from .cuda.device import CudaDevice
from .host import DeviceProcess, HostDevice


def open_device(model: torch.nn.Module, program: Callable[..., Any], num_slots: int, **arguments: Any) -> Device:
    """The device where `model` lies, running `program(model, **arguments)`: the host clock for a model on the CPU, else
    CUDA. On the host clock `program` and its arguments travel to the worker: importable names and shared tensors."""
    where = next(model.parameters()).device
    if where.type == "cuda":
        return CudaDevice(program(model, **arguments), num_slots, where)
    if where.type == "cpu":
        return HostDevice(DeviceProcess.of(model), program, num_slots, arguments)
    raise DeviceError(f"the model is on {where}: allowed are cpu and cuda")

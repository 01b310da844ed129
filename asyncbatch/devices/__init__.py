"""Devices: where the steps of a batcher run. All of them speak the protocol of `streams.py`.

- host: a worker process, for a model on the CPU.
- cuda: torch's own streams and events, for a model on CUDA.
- timed: a worker process that computes nothing and takes as long as a recorded GPU.
- virtual: no time passes; every time is chosen beforehand and is the same in every run.
- virtual_ranks: several of these on one clock, which compute each step together; all_reduces: how they exchange.
- checked: any of them, with a race checker around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..config import Config
from ..streams import Device, DeviceError
from .padding import PaddedRunner


def open_device(
    model: torch.nn.Module,
    config: Config,
    buffers: list[tuple[torch.Tensor, torch.Tensor]],
    runner: Callable[..., Any] | None = None,
) -> Device:
    """The device of a batcher, with a program on it that serves `model`. buffers: (inputs, output ids) of each slot on
    the host (`buffers.host_buffers`). The device's `shape` is that of its steps: on CUDA the pool may have fewer blocks
    than were wanted. runner: makes the program, in place of the device's own class; to a worker process it travels, so
    it is an importable name, or a `functools.partial` of one.

    Raises DeviceError for a device that cannot be opened, MemoryError for what does not fit into the GPU."""
    device: Any = (_on_cuda if config.on_cuda else _on_cpu)(model, config, buffers, runner)
    if config.check_races:
        from .checked import CheckedDevice

        device = CheckedDevice(device, config.num_slots)
    return device


def _on_cuda(model, config: Config, buffers, runner) -> Any:
    from .cuda.device import CudaDevice
    from .cuda.runner import CudaRunner

    asked = config.num_blocks is not None
    program = (runner or CudaRunner)(
        model, shape=config.shape, host=buffers, asked_blocks=asked, compile=config.compile, parts=config.parts
    )
    device = CudaDevice(program, config.num_slots, next(model.parameters()).device)
    device.shape, device.host_work_s, device.timed = program.shape, config.host_work_s, config.timeline != 0
    device.records_follow = True
    return device


def _on_cpu(model, config: Config, buffers, runner) -> Any:
    """A worker process, or this process where the clock is virtual; with `step_s` the program computes nothing."""
    program: Callable[..., Any] = runner or PaddedRunner
    arguments: dict[str, Any] = {"shape": config.shape, "host": buffers}
    if config.step_s is not None:
        from .timed import TimedRunner

        program, arguments["step_s"] = TimedRunner, config.step_s
    if config.clock is not None:
        from .virtual import VirtualDevice

        if config.step_s is not None:
            arguments["step_s"] = 0.0  # only the clock says times
        made = program(model, **arguments)
        of_rank = getattr(config.clock, "open_device", None)  # one of several that share a clock
        device: Any = (
            of_rank(made, config.num_slots, config.host_work_s)
            if of_rank
            else VirtualDevice(made, config.num_slots, config.clock, config.host_work_s)
        )
    else:
        device = open_program(model, program, config.num_slots, **arguments)
        device.host_work_s = config.host_work_s
        if config.step_s is not None:
            label = getattr(config.step_s, "label", None)
            device.clock = f"timed device, {device.clock}" if label is None else f"emulated {label}, {device.clock}"
    device.shape = config.shape
    return device


def open_program(model: torch.nn.Module, program: Callable[..., Any], num_slots: int, **arguments: Any) -> Device:
    """The device where `model` lies, running `program(model, **arguments)`, which need not serve the model: the host
    clock for a model on the CPU, else CUDA. On the host clock `program` and its arguments travel to the worker:
    importable names and shared tensors. DeviceError for any other place."""
    where = next(model.parameters()).device
    if where.type == "cuda":
        from .cuda.device import CudaDevice

        return CudaDevice(program(model, **arguments), num_slots, where)
    if where.type == "cpu":
        from .host import HostDevice
        from .process import DeviceProcess

        return HostDevice(DeviceProcess.of(model), program, num_slots, arguments)
    raise DeviceError(f"the model is on {where}: allowed are cpu and cuda")

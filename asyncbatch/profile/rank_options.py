"""What the command line means under torchrun, and what cannot be had there."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping

import torch

from .options import Arguments, flag
from .report import OWN

# torchrun sets these; RANK and WORLD_SIZE alone may come from anywhere.
SET_BY_TORCHRUN = ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def processes(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes torchrun has started, this one among them; 1 without torchrun."""
    if not all(name in environment for name in SET_BY_TORCHRUN):
        return 1
    return int(environment["WORLD_SIZE"])


def own_rank(environment: Mapping[str, str] = os.environ) -> int:
    return int(environment["RANK"]) if processes(environment) > 1 else 0


def words_of_torchrun(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """How torchrun was told how many processes to start: what all of its calls, one a machine, have in common."""
    here = int(environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"]))
    machines = int(environment["WORLD_SIZE"]) // here
    return (*(["--nnodes", str(machines)] if machines > 1 else []), "--nproc-per-node", str(here))


def refuse_for_ranks(arguments: Arguments, size: int) -> None:
    """ValueError for options that cannot be had in `size` processes. It is the same on all of them."""
    tp = arguments.tp or 1
    if size == 1:
        if tp > 1:
            raise ValueError(
                f"--tp {tp}: {tp} processes share the model, and torchrun starts them:\n  {torchrun_command(arguments)}"
            )
        return
    if size % tp:
        raise ValueError(
            f"--tp {tp}: torchrun has started {size} processes, and {tp} is no divisor of {size}: they would not be "
            "whole replicas"
        )
    for name, why in _alone(arguments, tp, size):
        raise ValueError(f"{flag(name)} cannot be had under torchrun with {size} processes: {why}")


def torchrun_command(arguments: Arguments) -> str:
    """The command line by which torchrun starts as many processes as share the model."""
    script = ["-m", "asyncbatch.profile", *arguments.command]
    return shlex.join(["torchrun", "--nproc-per-node", str(arguments.tp or 1), *script])


def _alone(arguments: Arguments, tp: int, size: int):
    """(option, why it is for one process) of those that were given."""
    peers = [engine for engine in arguments.engine or () if engine != OWN]
    device = arguments.device or ""
    for name, given, why in (
        ("trace", arguments.trace, "it measures nothing. Without torchrun it reads the traces of several ranks, too"),
        ("compare", arguments.compare, "it measures nothing: call it without torchrun"),
        ("emulate", arguments.emulate, "a recording of several ranks is the time of one of them: emulate it in one"),
        (
            "step_ms",
            arguments.step_ms is not None and tp > 1,
            "a timed device computes nothing, so the ranks that share a model would not meet in collectives",
        ),
        ("preset", arguments.preset, "presets are for one GPU, each as it was recorded; give --model and the sizes"),
        (
            "overhead",
            arguments.overhead,
            "its two batchers take turns by this process's clock, which the others do not see: measure it in one",
        ),
        (
            "engine",
            peers and tp != size,
            f"transformers' batching has no replicas of its own that take requests from one list; with --tp {size} it "
            "serves beside this package",
        ),
        ("device", ":" in device, f"each process takes the GPU of its LOCAL_RANK: say cuda and not {device}"),
        (
            "device",
            device == "cpu" and tp > 1 and torch.cuda.is_available(),
            "transformers shards a model on the GPUs of a machine that has some; CUDA_VISIBLE_DEVICES= hides them",
        ),
    ):
        if given:
            yield name, why

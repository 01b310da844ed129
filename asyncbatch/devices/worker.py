"""The worker process that plays the device on a CPU (`host.py`): what it runs, and how it answers."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from ..streams import STREAMS
from .travel import TOO_MANY_FILES, unpack

STREAM_FAILED = 70  # exit code of a worker one of whose stream threads failed


def usable_cores() -> float:
    """How many cores this process may use: those that it may run on, or less where its control group has a quota of
    their time (as containers have)."""
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return min([cores, *_quotas()])


def _quotas(root: Path = Path("/sys/fs/cgroup"), of_process: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """The limits, in cores, of the process's control groups from its own up to the root, of version 2 and of 1."""
    groups = {PurePosixPath("/")}
    with contextlib.suppress(OSError):
        for line in of_process.read_text(encoding="utf-8").splitlines():
            own = PurePosixPath(line.split(":", 2)[-1])
            groups |= {own, *own.parents}
    for group in groups:
        for folder in (root, root / "cpu"):
            place = folder / group.relative_to("/") if group.is_absolute() else folder
            with contextlib.suppress(OSError, ValueError):
                quota, period = (place / "cpu.max").read_text(encoding="utf-8").split()
                yield float(quota) / float(period)  # "max" is no number: no limit
            with contextlib.suppress(OSError, ValueError):
                quota_us, period_us = (
                    float((place / f"cpu.cfs_{name}_us").read_text(encoding="utf-8")) for name in ("quota", "period")
                )
                if quota_us > 0:
                    yield quota_us / period_us


def device_threads() -> int:
    """How many threads the device process computes with: OMP_NUM_THREADS if it is set, else one for each core that we
    may use but one. That one stays with the host: with all of them busy the two would take turns and not overlap."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return max(1, int(usable_cores()) - 1)


def device_main(control, pipes, done, wake) -> None:
    """The worker process: one thread a stream, and this thread for the control messages."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the host, which then closes the pipes
    worker = _Worker(done.numpy(), wake)
    for number, pipe in enumerate(pipes):
        threading.Thread(target=worker.run_stream, args=(number, pipe), daemon=True, name=STREAMS[number]).start()
    host = os.getppid()
    while True:
        try:
            while not control.poll(1.0):
                if os.getppid() != host:  # it is gone, and a process forked from it holds the pipe open
                    os._exit(0)
            number, name, *arguments = control.recv()
        except (EOFError, OSError):
            os._exit(0)  # the host closed the pipe or is gone; a stream thread may be in the middle of a step
        try:
            answer = (number, True, getattr(worker, name)(*arguments))
        except Exception as error:
            answer = (number, False, worker.reason(error))
        with contextlib.suppress(OSError):
            control.send(answer)


class _Worker:
    def __init__(self, done: np.ndarray, wake):
        self.done, self.wake = done, wake
        self.reached = threading.Condition()
        self._model: torch.nn.Module | None = None
        self._programs: dict[int, tuple[Any, np.ndarray, np.ndarray, dict[int, str]]] = {}
        torch.set_num_threads(device_threads())

    # Control messages, by name.

    def model(self, description: bytes, tensors: bytes) -> None:
        """From now on programs are opened with this model; those that are open keep theirs."""
        older, self._model = self._model, unpack(description, tensors)
        if older is not None:  # it may go. (Before the first there is little to collect, and all modules to look at.)
            del older
            gc.unfreeze()
            gc.collect()
        gc.freeze()  # the model's many objects never become garbage: no collection has to look at them

    def open(self, session: int, program: Callable, arguments: dict, times, failed, moments) -> dict[int, int]:
        """Returns the program's `padding`, if it has any."""
        made = program(self._model, **arguments)
        if hasattr(made, "moments"):
            made.moments = moments.numpy()
        self._programs[session] = (made, times.numpy(), failed.numpy(), {})
        return getattr(made, "padding", {})

    def failure(self, session: int, slot: int) -> str:
        return self._programs[session][3].get(slot, "")

    def close(self, session: int) -> None:
        self._programs.pop(session, None)  # it may never have been opened

    @staticmethod
    def reason(error: Exception) -> str:
        return TOO_MANY_FILES if str(error) == TOO_MANY_FILES else traceback.format_exc()

    # Stream messages.

    @torch.inference_mode()
    def run_stream(self, number: int, pipe) -> None:
        while True:
            try:
                message = pipe.recv_bytes()
            except (EOFError, OSError):
                return
            try:
                operation, *arguments = pickle.loads(message)
                if operation == "launch":
                    self._launch(number, *arguments)
                elif operation == "wait":
                    self._wait(*arguments)
                else:
                    self._record(*arguments)
            except BaseException:  # not the program's fault, which `_launch` notes: nobody would do the next commands
                traceback.print_exc()
                os._exit(STREAM_FAILED)

    def _wait(self, index: int, ticket: int) -> None:
        with self.reached:
            self.reached.wait_for(lambda: self.done[index] >= ticket)

    def _record(self, index: int, ticket: int) -> None:
        with self.reached:
            self.done[index] = ticket
            self.reached.notify_all()
        self.wake.release()

    def _launch(self, number: int, session: int, command: Any, slot: int) -> None:
        opened = self._programs.get(session)
        if opened is None:  # it could not be opened, or is closed
            return
        program, times, failed, errors = opened
        start = time.perf_counter()
        if number == 0:
            failed[slot] = 0  # a step begins on H2D; its later commands are skipped once one of them has failed
        if not failed[slot]:
            try:
                program.run(command, slot)
            except Exception:
                errors[slot] = f"{command} failed on the device:\n{traceback.format_exc()}"
                failed[slot] = 1
        times[slot, number] = start, time.perf_counter()

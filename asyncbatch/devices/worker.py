"""The worker process that plays the device on a CPU (`host.py`): what it runs, and how it answers."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..streams import STREAMS


def device_threads() -> int:
    """How many cores the device process computes on: all that we may use but one. That one stays with the host: with
    all of them busy the two would take turns and not overlap."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return max(1, cores - 1)


def device_main(control, pipes, done, wake) -> None:
    """The worker process: one thread a stream, and this thread for the control messages."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the host, which then closes the pipes
    worker = _Worker(done.numpy(), wake)
    for number, pipe in enumerate(pipes):
        threading.Thread(target=worker.run_stream, args=(number, pipe), daemon=True, name=STREAMS[number]).start()
    while True:
        try:
            name, *arguments = control.recv()
        except (EOFError, OSError):
            os._exit(0)  # the host closed the pipe or is gone; a stream thread may be in the middle of a step
        try:
            control.send((True, getattr(worker, name)(*arguments)))
        except Exception:
            control.send((False, traceback.format_exc()))


class _Worker:
    def __init__(self, done: np.ndarray, wake):
        self.done, self.wake = done, wake
        self.reached = threading.Condition()
        self._programs: dict[int, tuple[Any, np.ndarray, np.ndarray, dict[int, str]]] = {}
        torch.set_num_threads(device_threads())

    # Control messages, by name.

    def model(self, blob: bytes) -> None:
        self._model = pickle.loads(blob)
        gc.collect()
        gc.freeze()  # the model's many objects never become garbage: no collection has to look at them

    def open(self, session: int, program: Callable, arguments: dict, times, failed, moments) -> None:
        made = program(self._model, **arguments)
        if hasattr(made, "moments"):
            made.moments = moments.numpy()
        self._programs[session] = (made, times.numpy(), failed.numpy(), {})

    def failure(self, session: int, slot: int) -> str:
        return self._programs[session][3].get(slot, "")

    def close(self, session: int) -> None:
        del self._programs[session]

    # Stream messages.

    @torch.inference_mode()
    def run_stream(self, number: int, pipe) -> None:
        while True:
            try:
                operation, *arguments = pickle.loads(pipe.recv_bytes())
            except (EOFError, OSError):
                return
            if operation == "launch":
                self._launch(number, *arguments)
            elif operation == "wait":
                self._wait(*arguments)
            else:
                self._record(*arguments)

    def _wait(self, index: int, ticket: int) -> None:
        with self.reached:
            self.reached.wait_for(lambda: self.done[index] >= ticket)

    def _record(self, index: int, ticket: int) -> None:
        with self.reached:
            self.done[index] = ticket
            self.reached.notify_all()
        self.wake.release()

    def _launch(self, number: int, session: int, command: Any, slot: int) -> None:
        program, times, failed, errors = self._programs[session]
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

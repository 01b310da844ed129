"""The worker process of a model, seen from the host: started, asked, told, and stopped.

Every question has a number, and so has its answer: after an interrupt the answer to an older question is not taken for
that of the next one. A process that was forked from this one has a copy of these objects and of the pipes, which it
must not use: two writers would mix up their commands.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing.process
import os
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from multiprocessing import resource_sharer, util
from typing import Any

import torch
import torch.multiprocessing as mp

from ..streams import STREAMS, DeviceError, check_process
from .travel import PackedModel, pack, pickled
from .worker import device_main

MAX_EVENTS = 1024
FREE = -1
_main_module = threading.Lock()


class DeviceProcess:
    """A worker process that holds one model and serves any number of `HostDevice`s, as one GPU serves many programs.

    Owned by the model: started at the first use, stopped when the model is collected or this process ends.
    `done[i]` is the ticket of the newest record of event i that the device has reached; only the device writes it.
    `wake` is released at every record, so that the host can sleep until something has happened.
    """

    _of: weakref.WeakKeyDictionary[torch.nn.Module, DeviceProcess] = weakref.WeakKeyDictionary()
    _opening = threading.RLock()

    @classmethod
    def of(cls, model: torch.nn.Module) -> DeviceProcess:
        """The process of a model, which from now on has the model as it is at this moment: other modules, parameters
        or settings are sent anew; weights that were changed in place are shared anyway.

        DeviceError if it cannot be started, ModelError if the model cannot be sent."""
        with cls._opening:
            process = cls._of.get(model)
            if process is None or process.pid != os.getpid() or not process.alive:
                process = cls()
                try:
                    process.send_model(model)
                    _forget_name(process.wake)  # it has answered, so it has opened it
                    weakref.finalize(model, process.stop)
                    cls._of[model] = process
                except BaseException:
                    process.kill()  # nobody has it
                    raise
            else:
                process.send_model(model)
            return process

    def __init__(self) -> None:
        if mp.current_process().daemon:
            raise DeviceError(
                "this process is daemonic, as the workers of multiprocessing.Pool are, and may not start the process "
                "that computes: take concurrent.futures.ProcessPoolExecutor, whose workers may, or a batcher on CUDA"
            )
        context = mp.get_context("spawn")
        self.pid = os.getpid()
        self.done = torch.zeros(MAX_EVENTS, dtype=torch.int64).share_memory_()
        self.done_view = self.done.numpy()
        self.wake = context.Semaphore(0)
        self.owners = [FREE] * MAX_EVENTS  # of each event: the session that it belongs to
        self.sessions, self.numbers = itertools.count(), itertools.count()
        self.lock, self.reclaiming, self.taking = threading.Lock(), threading.Lock(), threading.Lock()
        self.sent: PackedModel | None = None  # what the worker has
        self.dropped: list[tuple[int, list[Any]]] = []  # session and streams of devices that nobody has
        self.control, control = context.Pipe()
        self.pipes, pipes = [], []
        for _ in STREAMS:
            receive, send = context.Pipe(duplex=False)
            self.pipes.append(send)
            pipes.append(receive)
        self.process = context.Process(
            target=device_main, args=(control, pipes, self.done, self.wake), daemon=True, name="asyncbatch-device"
        )
        try:
            with _no_main_module():
                self.process.start()
            for end in (control, *pipes):
                end.close()  # the worker has its own: with ours closed, a dead worker is an end of file and not a hang
        except BaseException:
            self.kill()
            raise

    @property
    def alive(self) -> bool:
        return not self.control.closed and self.process.is_alive()

    def send_model(self, model: torch.nn.Module) -> None:
        """Send the model, if it is not the same as when it was sent last."""
        packed, tensors = pack(model)
        if self.sent is None or not packed.same_as(self.sent):
            self.sent = None  # until the worker has it: an interrupt must not leave a model half sent
            self.ask("model", packed.description, pickled(tensors, by_value=packed.identity is None))
            self.sent = packed

    def ask(self, *message: Any) -> Any:
        """Send a message to the worker's main thread and wait for the answer. DeviceError if the worker is gone, or
        with what went wrong there."""
        check_process(self.pid)
        with self.lock:
            number = next(self.numbers)
            self._whole(self.control.send, (number, *message))
            answered = -1
            while answered != number:  # older answers belong to questions that were interrupted
                self.control.poll(None)  # interrupted here, nothing has been read
                answered, good, answer = self._whole(self.control.recv)
        if not good:
            raise DeviceError(answer)
        return answer

    def _whole(self, transfer, *arguments: Any) -> Any:
        """Send or receive a message. If that is interrupted in the middle, nobody can read the pipe any more: then the
        process is ended, and all its devices are lost."""
        try:
            return transfer(*arguments)
        except (EOFError, OSError) as error:
            raise self._gone() from error
        except Exception:
            raise  # nothing has been sent: the message could not be pickled
        except BaseException:
            self.kill()
            raise

    def send(self, stream: int, message: bytes) -> None:
        """Send a pickled command to the worker's thread of that stream."""
        check_process(self.pid)
        try:
            self.pipes[stream].send_bytes(message)
        except OSError as error:
            raise self._gone() from error

    def wait(self, index: int, ticket: int) -> None:
        """Until the device has reached record number `ticket` of event `index`."""
        check_process(self.pid)
        while self.done_view[index] < ticket:
            # The timeout is for two cases only: the worker died, or another waiting thread took our wake-up.
            if not self.wake.acquire(timeout=0.1) and not self.alive and self.done_view[index] < ticket:
                raise self._gone()

    def reclaim(self) -> None:
        """Free the programs and take back the events of all dropped devices, when they have done what they were given.
        Not where the garbage collector finds them: this thread may be in the middle of a question. Where it is
        interrupted, the next call does it all again."""
        with self.reclaiming:
            while self.dropped and self.alive:
                session, streams = self.dropped[0]
                for stream in streams:
                    stream.synchronize()
                self.ask("close", session)
                with self.taking:
                    self.owners = [FREE if owner == session else owner for owner in self.owners]
                del self.dropped[0]

    @property
    def free_events(self) -> list[int]:
        return [index for index, owner in enumerate(self.owners) if owner == FREE]

    def take_event(self, session: int) -> int:
        """The number of an event that from now on belongs to the session. DeviceError if there is none."""
        with self.taking:
            if FREE not in self.owners:
                raise DeviceError(
                    f"all {MAX_EVENTS} events of the device are taken: close some of the model's batchers"
                )
            index = self.owners.index(FREE)
            self.owners[index] = session
            return index

    def _gone(self) -> DeviceError:
        return DeviceError(f"the device process ended (exit code {self.process.exitcode})")

    def stop(self) -> None:
        """End the worker. In a forked process: leave it to its owner."""
        if os.getpid() != self.pid:
            return
        for pipe in (self.control, *self.pipes):  # the first says that it is over
            pipe.close()
        self.process.join(timeout=2)
        if self.process.is_alive():
            self.kill()

    def kill(self) -> None:
        if self.process.pid is not None:  # else it has not been started
            self.process.kill()
            self.process.join()  # while it dies it looks alive, and the model's next batcher would ask it


def _forget_name(semaphore: Any) -> None:
    """Take the name of a semaphore out of /dev/shm, once both processes have opened it. multiprocessing does so when
    the semaphore is collected; of a process group that is killed, tracker and all, the name would stay for ever."""
    for finalizer in list(getattr(util, "_finalizer_registry", {}).values()):
        owner = getattr(finalizer, "_weakref", None)
        if owner is not None and owner() is semaphore:
            finalizer()


def _after_fork() -> None:
    """In a process made by `os.fork`: forget what is the parent's. multiprocessing does so where it forks itself; after
    a plain fork, the child's end would terminate the parent's workers, and its handles of shared memory would ask the
    parent for theirs."""
    children = getattr(multiprocessing.process, "_children", None)
    for process in DeviceProcess._of.values():
        if children is not None:
            children.discard(process.process)
    forget = getattr(getattr(resource_sharer, "_resource_sharer", None), "_afterfork", None)
    if forget is not None:
        forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Hide the caller's `__main__` while a process is spawned. Otherwise the worker would import the script that
    calls us, and a script without an `if __name__ == "__main__":` guard would start itself again. Our worker needs
    none of it."""
    with _main_module:  # two threads at once would each keep the other's empty module
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main

"""How a model travels to the worker process, and whether it is still the one that travelled before.

The model is pickled without its tensors, which go beside it as handles of shared memory, so that weights changed in
place are changed for the worker too. The two together say all that a model is: another module, parameter, hook or
setting makes another description, another storage another tensor.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from ..models.messages import ModelError
from ..streams import DeviceError

TOO_MANY_FILES = (
    "each tensor of the model in shared memory is an open file, and this process may open too few of them: allow more "
    "before Python starts, with `ulimit -n 65536`"
)


@dataclass
class PackedModel:
    """What a model is at one moment. description: the pickled model, with numbers in place of its tensors. identity:
    which memory each of those is, with its shape; None where they go by value. kept: their storages, which must not be
    freed meanwhile, or other tensors could get the same addresses."""

    description: bytes
    identity: list[tuple[Any, ...]] | None
    kept: list[Any]

    def same_as(self, other: PackedModel) -> bool:
        """Whether this is the same model, and not only an equal one. Weights that go by value are never the same."""
        known = self.identity is not None and self.identity == other.identity
        return known and self.description == other.description


class _Packer(ForkingPickler):
    """Pickles a model and puts its tensors aside, each once."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, thing: Any) -> int | None:
        if not isinstance(thing, torch.Tensor):
            return None
        if id(thing) not in self._numbers:
            self._numbers[id(thing)] = len(self.tensors)
            self.tensors.append(thing)
        return self._numbers[id(thing)]

    def reducer_override(self, thing: Any) -> Any:
        if getattr(thing, "__module__", None) == "__main__" and isinstance(getattr(thing, "__qualname__", None), str):
            raise pickle.PicklingError(
                f"{thing.__qualname__} is defined in the notebook or script itself; move it to a file and import it"
            )
        return NotImplemented


class _Unpacker(pickle.Unpickler):
    def __init__(self, description: bytes, tensors: list[torch.Tensor]):
        super().__init__(io.BytesIO(description))
        self.persistent_load = tensors.__getitem__  # type: ignore[method-assign, assignment]


def pack(model: torch.nn.Module) -> tuple[PackedModel, list[torch.Tensor]]:
    """The model as it is now, and its tensors. They move to shared memory, unless that is too small for them (a
    container's /dev/shm is often 64 MB, and writing beyond it kills the process).

    ModelError, with the part that cannot travel; DeviceError where there are too few files for all tensors."""
    file = io.BytesIO()
    packer = _Packer(file)
    try:
        packer.dump(model)
    except Exception as error:
        raise ModelError(f"the model cannot travel to the process that computes: {_culprit(model, error)}") from error
    description, tensors = file.getvalue(), packer.tensors
    not_shared = sum(t.untyped_storage().nbytes() for t in tensors if not t.is_shared())
    if not fits_into_shared_memory(1.1 * not_shared):
        return PackedModel(description, None, []), tensors
    with _too_many_files(DeviceError, f"the model has {len(tensors)} tensors: "):
        for tensor in tensors:
            tensor.share_memory_()
    identity = [
        (t.untyped_storage().data_ptr(), t.storage_offset(), t.size(), t.stride(), t.dtype, t.requires_grad, type(t))
        for t in tensors
    ]
    return PackedModel(description, identity, [tensor.untyped_storage() for tensor in tensors]), tensors


def pickled(tensors: list[torch.Tensor], by_value: bool) -> bytes:
    """The tensors as bytes: their values, or handles of their shared memory. Handles must be sent and unpickled: until
    then each holds a file open. DeviceError where there are too few."""
    if by_value:
        return pickle.dumps(tensors)
    with _too_many_files(DeviceError, f"the model has {len(tensors)} tensors: "):
        return bytes(ForkingPickler.dumps(tensors))


@contextlib.contextmanager
def _too_many_files(kind: type[Exception], before: str = "") -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) == errno.EMFILE or "Too many open files" in str(error):
            raise kind(before + TOO_MANY_FILES) from None
        raise


def fits_into_shared_memory(num_bytes: float) -> bool:
    return not os.path.isdir("/dev/shm") or shutil.disk_usage("/dev/shm").free >= num_bytes


def unpack(description: bytes, tensors: bytes) -> torch.nn.Module:
    """The model in the worker. OSError with TOO_MANY_FILES if it may open too few files."""
    with _too_many_files(OSError):
        return _Unpacker(description, pickle.loads(tensors)).load()


def _culprit(model: torch.nn.Module, error: Exception) -> str:
    """Which part of the model cannot be pickled, as deep in it as can be told, and what to do."""
    for name, module in reversed(list(model.named_modules())):
        for attribute, value in vars(module).items():
            if attribute == "_modules":
                continue
            entries = value.items() if isinstance(value, dict) and attribute.startswith("_") else [(None, value)]
            for key, entry in entries:
                if reason := _why_not(entry):
                    place = ".".join(filter(None, (name, attribute if key is None else f"{attribute}[{key!r}]")))
                    return f"{place} of type {type(entry).__name__} ({reason}). {_remedy(attribute)}"
        if reason := _why_not(type(module)):
            return f"the module {name or 'itself'} ({reason})"
    return str(error)


def _why_not(thing: Any) -> str | None:
    try:
        _Packer(io.BytesIO()).dump(thing)
    except Exception as error:
        return " ".join(str(error).split())
    return None


def _remedy(attribute: str) -> str:
    if "hooks" in attribute:
        return "Remove the hook, or make it a function of a module that can be imported"
    if attribute == "forward":
        return "Give the batcher the model without it; on CUDA, compile=True compiles the model"
    return "Remove it, or make it of classes and functions of modules that can be imported"

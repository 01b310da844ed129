"""What the garbage collector looks at while tests run."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def collections_of_what_is_new() -> Iterator[None]:
    """Until the end of the block, freeze what is there at its beginning: the modules and all tests' names, which stay
    anyway. To look at them takes half a second each time. On a GPU all is as users have it: devices freeze there."""
    if torch.cuda.is_available():
        yield
        return
    _freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def collections_of_everything() -> Iterator[None]:
    """Until the end of the block, nothing is frozen, as in a program of users."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if frozen:
            _freeze()


def _freeze() -> None:
    gc.collect()  # garbage that is frozen stays
    gc.freeze()

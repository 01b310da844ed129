"""The parts of transformers that this package reaches into, and what is said where a version lacks one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from ...measure.point_recorder import override

KNOWN = "known to work: 5.17 to 5.24"


def part(owner: Any, name: str) -> Any:
    """The attribute `name` of an object of transformers. RuntimeError where it is missing or None."""
    if getattr(owner, name, None) is None:
        raise unknown_version(f"its {type(owner).__name__} has no {name}")
    return getattr(owner, name)


def wrap(owner: Any, name: str, wrapper: Callable[[Callable], Callable]) -> contextlib.AbstractContextManager[None]:
    """Within this context, the method `name` of this one object is `wrapper(method)`. RuntimeError as in `part`."""
    return override(owner, name, wrapper(part(owner, name)))


def unknown_version(problem: str) -> RuntimeError:
    """The error to raise for a version of transformers that this package does not fit."""
    import transformers

    return RuntimeError(f"transformers {transformers.__version__} does not fit: {problem} ({KNOWN})")

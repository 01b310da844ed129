"""What the profiling script says while it works: one line at a time, on standard error."""

from __future__ import annotations

import sys

from ..streams import DeviceError


def tell(text: str) -> None:
    """Print one line on standard error, at once."""
    print(text, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """The first line of an error; of a device's error also the last one, without the traceback between them."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, DeviceError):
        lines = [" ".join(dict.fromkeys([lines[0], lines[-1]]))]
    return lines[0]

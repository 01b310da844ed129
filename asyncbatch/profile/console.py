"""What the profiling script says while it works: one line at a time, on standard error."""

from __future__ import annotations

import sys

from ..streams import DeviceError


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, DeviceError):  # between them is the device's traceback
        lines = [" ".join(dict.fromkeys([lines[0], lines[-1]]))]
    return lines[0]

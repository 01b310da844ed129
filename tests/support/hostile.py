"""Text that would do harm if a page took it for markup, and reports full of it."""

from __future__ import annotations

from typing import Any

HOSTILE = "<img src=x onerror=alert(1)></script><!--\"'&amp;\u2028\u2029\ud83d %s {0} </style><script>alert(2)</script>"


def hostile(value: Any) -> Any:
    """A copy of a report, or of part of one, with HOSTILE after every text but the names of modes, host and device."""
    if isinstance(value, dict):
        return {key: hostile(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [hostile(inner) for inner in value]
    return value + HOSTILE if isinstance(value, str) and value not in ("sync", "async", "host", "device") else value

"""Files that are whole or not there: written beside their final name, and renamed when they are complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives the path to write to, with the same ending and in the same folder. When the `with` block ends well, what
    was written there gets its final name, in place of what had it; otherwise it is removed, and what had the name
    stays. A pipe or a device is written to itself.

    Raises an OSError of the same class, whose text is one sentence that names `path`."""
    final = Path(os.path.realpath(path))
    beside = final.with_name(f".{final.stem}.{os.getpid()}.part{final.suffix}")
    if final.exists() and not final.is_file() and not final.is_dir():
        beside = final
    try:
        yield beside
        if beside != final:
            os.replace(beside, final)
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise type(error)(f"{path} cannot be written: {reason}") from error
    finally:
        if beside != final:
            with contextlib.suppress(OSError):
                beside.unlink()

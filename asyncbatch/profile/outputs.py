"""The folder of --out: made before anything is measured, and filled so that what was measured is never lost."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..shown.files import whole_file


class OutError(OSError):
    """The folder of --out, or a file in it, cannot be written. The text is one sentence that names it. lost: whether
    what was measured stands in no file at all."""

    def __init__(self, text: str, lost: bool = False):
        super().__init__(text)
        self.lost = lost


class Output(NamedTuple):
    """A file to write. write: writes it to a path, whole or not at all. measured: whether it is what was measured, and
    cannot be made again without measuring."""

    name: str
    write: Callable[[Path], None]
    measured: bool = False


def make_folder(folder: Path) -> None:
    """Make the folder of --out where it is missing. OutError if that, or writing to it, is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        file = next((one for one in (folder, *folder.parents) if one.exists() and not one.is_dir()), None)
        if file is not None:
            raise OutError(f"--out {folder}: a folder is meant, and {file} is a file") from error
        raise OutError(f"--out {folder}: this folder cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutError(f"--out {folder}: this folder cannot be written to: no permission")


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    with whole_file(path) as beside:
        beside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def write_all(folder: Path, outputs: Sequence[Output]) -> None:
    """Write every file that can be written. OutError, in one sentence, if one could not be: it names the first, the
    others, and the folder into which what was measured went instead."""
    failed: list[tuple[Output, OSError]] = []
    for one in outputs:
        try:
            one.write(folder / one.name)
        except OSError as error:
            failed.append((one, error))
    if not failed:
        return
    text = str(failed[0][1])
    if len(failed) > 1:
        text += f"; nor can {', '.join(one.name for one, _ in failed[1:])}"
    saved, elsewhere = _rescued([one for one, _ in failed if one.measured])
    raise OutError(text + elsewhere, lost=not saved)


def _rescued(outputs: Sequence[Output]) -> tuple[bool, str]:
    """Write them into a new folder for temporary files: (whether that went well, how the sentence goes on)."""
    if not outputs:
        return True, ""
    names = " and ".join(one.name for one in outputs)
    try:
        folder = Path(tempfile.mkdtemp(prefix="asyncbatch-"))
        for one in outputs:
            one.write(folder / one.name)
    except OSError as error:
        return False, f"; and {error.strerror or error}"
    return True, f"; {names} {'is' if len(outputs) == 1 else 'are'} in {folder} instead"

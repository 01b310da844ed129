"""What a caller is told about a model: an error, a line on stderr, a progress bar."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class ModelError(ValueError):
    """A model that cannot be found, fetched, loaded or served. The text says what was given and what is allowed."""


def say(text: str) -> None:
    """Print a line on stderr: what is being fetched, and from where."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """Inside the `with` block, transformers and huggingface_hub show their progress bars only if `show` is true."""
    from transformers.utils import logging

    hide = not show and logging.is_progress_bar_enabled()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            logging.enable_progress_bar()

"""The progress bar of `run`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def progress_bar(handles: Sequence[Any], timeline: Any, wanted: bool) -> Iterator[Callable[[], None]]:
    """A tqdm bar on standard error that counts the tokens of these handles and says how idle the device was; or no bar
    at all. Gives the function that brings it up to date."""
    if not wanted:
        yield lambda: None
        return
    from tqdm import tqdm

    looked = time.monotonic()
    total = sum(handle._state.request.max_new_tokens for handle in handles)
    with contextlib.closing(tqdm(total=total, unit=" tokens", leave=False)) as bar:

        def update() -> None:
            nonlocal looked
            now = time.monotonic()
            if now - looked >= 1:
                looked = now
                if (active := timeline.totals.active) == active:  # not nan
                    bar.set_postfix_str(f"idle {100 * (1 - active):.1f} %", refresh=False)
            bar.update(sum(len(handle._state.generated) for handle in handles) - bar.n)

        yield update

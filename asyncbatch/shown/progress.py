"""What there is to see while something takes long: a line that says what it is, and the progress bar of `run`."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

PATIENCE_S = 10.0  # where no terminal shows the seconds: after so long a line says that it goes on; then twice as long


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say on standard error, at once, what the `with` block is waiting for ("loading torch ..."). In a terminal the
    line counts the seconds, and is gone when the block ends; elsewhere it stays, and is repeated now and then."""
    over, stream = threading.Event(), sys.stderr
    target = _counting if stream.isatty() else _repeating
    if target is _repeating:
        print(f"{what} ...", file=stream, flush=True)
    thread = threading.Thread(target=target, args=(what, over, stream), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _counting(what: str, over: threading.Event, stream: Any) -> None:
    """One line, with the seconds after the first one; not while a progress bar says more."""
    begun, text = time.monotonic(), f"{what} ..."
    while True:
        if not _a_bar_is_shown():
            stream.write(f"\r{text}")
            stream.flush()
        if over.wait(1 - (time.monotonic() - begun) % 1):
            break
        text = f"{what} ... {time.monotonic() - begun:.0f} s"
    stream.write(f"\r{' ' * len(text)}\r")
    stream.flush()


def _a_bar_is_shown() -> bool:
    """Whether somebody shows a bar of tqdm, such as transformers when it loads weights."""
    module = sys.modules.get("tqdm.std")  # importing it would take time at the very beginning
    return module is not None and len(getattr(module.tqdm, "_instances", ())) > 0


def _repeating(what: str, over: threading.Event, stream: Any) -> None:
    begun, pause = time.monotonic(), PATIENCE_S
    while not over.wait(pause):
        print(f"{what}: {time.monotonic() - begun:.0f} s so far ...", file=stream, flush=True)
        pause *= 2


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

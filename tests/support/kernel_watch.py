"""Sent into the kernel of every tested notebook: remembers failures that no cell reports.

An exception in a task that nobody awaited, or in a thread, only appears on stderr, if at all. `check()` raises it.
nbval_guard.py sends this file to the kernel, and calls `check()` and `move_widgets()` after each cell. It uses only the
standard library.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
import traceback
from typing import Any

PENDING_TIMEOUT_S = 2.0
KERNEL_PACKAGES = ("/ipykernel/", "/IPython/", "/jupyter_client/", "/tornado/", "/zmq/")

_failures: list[str] = []
_moved: set[str] = set()  # ids of the widgets that `move_widgets` has used


class _Recorder(logging.Handler):
    """Keeps what asyncio logs: an error for each task that is thrown away before it is done, or with an exception that
    nobody asked for."""

    def emit(self, record: logging.LogRecord) -> None:
        _failures.append(self.format(record))


def install() -> None:
    """Start to remember failures. Call it once, before the first cell."""
    logging.getLogger("asyncio").addHandler(_Recorder(logging.ERROR))
    report_thread = threading.excepthook

    def remember_thread(args: threading.ExceptHookArgs) -> None:
        _failures.append("".join(traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback)))
        report_thread(args)

    threading.excepthook = remember_thread


def _is_of_the_notebook(task: asyncio.Task) -> bool:
    """Return False for the tasks of the kernel itself, which are always pending."""
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and not any(name in code.co_filename for name in KERNEL_PACKAGES)


async def check() -> None:
    """Raise AssertionError with everything that failed unseen since the last call, or that is still pending."""
    pending = {task for task in asyncio.all_tasks() if _is_of_the_notebook(task)} - {asyncio.current_task()}
    if pending:
        _, pending = await asyncio.wait(pending, timeout=PENDING_TIMEOUT_S)
    # A failed task that is still referenced has logged nothing yet: asyncio does that when the task is thrown away.
    for future in [thing for thing in gc.get_objects() if issubclass(type(thing), asyncio.Future)]:
        if future.done() and getattr(future, "_log_traceback", False):
            _failures.append("".join(traceback.format_exception(future.exception())))
    _failures.extend(f"still pending, await it in the cell that made it: {task!r}" for task in pending)
    if _failures:
        report = "\n".join(_failures)
        _failures.clear()
        raise AssertionError(report)


def move_widgets() -> None:
    """Use every widget that has come to life since the last call, as a restless reader would, before the next cell
    runs: a slider (a box, a play button) goes to its lowest, middle and highest value, and stays there; a button is
    pressed; of a choice every option is taken, and then what was chosen before, as the next cells print what it was.

    Raises what their callbacks raise."""
    module: Any = sys.modules.get("ipywidgets")
    for key, widget in list(module.widgets.widget._instances.items()) if module else ():
        if key in _moved:
            continue
        _moved.add(key)
        if widget.has_trait("min") and widget.has_trait("max") and widget.has_trait("value"):
            for place in (widget.min, (widget.min + widget.max) / 2, widget.max):
                logarithmic = widget.has_trait("base")  # then its limits are exponents
                widget.value = type(widget.value)(widget.base**place if logarithmic else place)
        elif widget.has_trait("options") and widget.has_trait("index"):
            before = widget.index
            for index in range(len(widget.options)):
                widget.index = index
            widget.index = before
        elif isinstance(widget, module.Button):
            widget.click()

"""A pytest plugin: notebooks that nbval runs cannot fail unseen.

nbval passes a cell whose failure the kernel did not publish as an `error` message: an ExceptionGroup, a task that
nobody awaited, a thread. With this plugin a cell also fails when
- its `execute_reply` has status "error", or there is none (and the cell is not marked as raising),
- it is marked as raising and does not raise,
- the kernel dies: at once, and not after the time-out,
- something failed in the background (kernel_watch.py, beside this file, tells of it),
- a widget that it shows ends with an error when it is moved. All are moved before the next cell runs: so a cell that
  looks at a widget's state fails, too.
tests/lessons/test_nbval_guard.py shows each of these. The root conftest.py loads the plugin where nbval is installed.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from queue import Empty

import nbval.plugin
import pytest
from nbval.kernel import RunningKernel
from nbval.plugin import NbCellError

WATCH_SOURCE = Path(__file__).with_name("kernel_watch.py").read_text(encoding="utf-8")
# An expression without a name of its own: the notebook's variables stay as they are.
INSTALL = (
    f"exec({WATCH_SOURCE!r}, __import__('sys').modules.setdefault("
    "'_kernel_watch', __import__('types').ModuleType('_kernel_watch')).__dict__); "
    "__import__('sys').modules['_kernel_watch'].install()"
)
CHECK = "await __import__('sys').modules['_kernel_watch'].check()"
MOVE = "__import__('sys').modules['_kernel_watch'].move_widgets()"
WATCH_TIMEOUT_S = 60
POLL_S = 0.5
KNOCK_S = 10.0


class KernelDied(Exception):
    """The kernel's process ended while a cell ran."""


class WatchedKernel(RunningKernel):
    """nbval's kernel, but it keeps the reply to the last request, and does not wait for one that cannot come."""

    def __init__(self, *args, **kwargs):
        self.reply = None  # the content of the last execute_reply; None when there was none
        self._published = deque()  # iopub messages read while waiting for a reply; nbval reads them afterwards
        super().__init__(*args, **kwargs)
        self.request(INSTALL)

    def get_message(self, stream, timeout=None):
        if stream == "iopub" and self._published:
            return self._published.popleft()
        return super().get_message(stream, timeout)

    def await_reply(self, msg_id, timeout=None):
        """As nbval's, but returns without a reply once the kernel is idle again, and raises KernelDied.

        A kernel that has not even begun is asked for its version every KNOCK_S: ipykernel 7.0 to 7.3 may leave a
        request unread until another one arrives (its issue 1554). A kernel at work is left alone: when it was asked at
        work, it fell silent for good in 3 of 10 runs of notebook 00."""
        self.reply = None
        deadline = time.monotonic() + timeout
        knock = time.monotonic() + KNOCK_S
        idle = False
        while (left := deadline - time.monotonic()) > 0:
            try:
                msg = super().get_message("shell", timeout=min(left, POLL_S))
            except Empty:
                if not self.is_alive():
                    raise KernelDied("The kernel died: its process has ended") from None
                if idle:  # idle already in the round before: a reply would have come first
                    return
                states = self._published_states(msg_id)
                idle = "idle" in states
                if not states and time.monotonic() > knock:
                    self.kc.kernel_info()
                    knock = time.monotonic() + KNOCK_S
                continue
            if msg["parent_header"].get("msg_id") == msg_id:
                self.reply = msg["content"]
                return
        raise Empty

    def _published_states(self, msg_id) -> list[str]:
        """The states that the kernel has published for a request: "busy" when it began, "idle" when it was done."""
        while True:
            try:
                self._published.append(self.kc.get_iopub_msg(timeout=0))
            except Empty:
                break
        mine = [msg for msg in self._published if msg["parent_header"].get("msg_id") == msg_id]
        return [msg["content"]["execution_state"] for msg in mine if "execution_state" in msg["content"]]

    def request(self, code):
        """Run code that is not part of the notebook and leaves no trace in it; return the reply's content."""
        msg_id = self.kc.execute(code, silent=True, store_history=False, allow_stdin=False)
        try:
            self.await_reply(msg_id, timeout=WATCH_TIMEOUT_S)
        except (Empty, KernelDied):
            self.reply = None
        return self.reply or {"status": "error", "evalue": "the kernel does not answer any more"}


def pytest_configure() -> None:
    nbval.plugin.RunningKernel = WatchedKernel


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Run a cell as nbval does; then fail it, too, for what nbval did not see."""
    if not isinstance(item, nbval.plugin.IPyNbCell):
        return (yield)
    kernel, failure = item.parent.kernel, None
    try:
        yield
    except NbCellError as error:
        failure = error
    except KernelDied as error:
        item.raise_cell_error(str(error))
    if kernel.is_alive():  # nbval stops a kernel that it could not interrupt
        problem = unseen_problem(item, kernel)
        if problem:
            raise NbCellError(item.cell_num, problem[0], item.cell.source, problem[1]) from failure
    if failure:
        raise failure


def unseen_problem(item, kernel) -> tuple[str, str] | None:
    """Return (message, traceback) of a failure that nbval did not see or could not explain, or None."""
    reply = kernel.reply
    background = kernel.request(CHECK)
    may_raise = item.options["check_exception"]
    if reply is None:
        message = "Cell execution ended without a reply: an exception group, or a fault in the kernel"
        return message, text_on_stderr(item)
    published = any(out["output_type"] == "error" for out in item.test_outputs)
    if reply["status"] != "ok" and not may_raise and not published:
        return f"Cell execution failed: {reply.get('ename')}: {reply.get('evalue')}", text_on_stderr(item)
    if reply["status"] == "ok" and may_raise:
        return "The cell is marked as raising an exception, and none was raised", ""
    if background["status"] != "ok":
        return "A task or thread failed, or is still pending", background["evalue"]
    moved = kernel.request(MOVE)
    if moved["status"] != "ok":
        return "A widget ended with an error when it was moved", f"{moved.get('ename')}: {moved['evalue']}"
    return None


def text_on_stderr(item) -> str:
    """What the cell wrote to stderr, where the traceback of an exception group goes."""
    return "".join(out["text"] for out in item.test_outputs if out.get("name") == "stderr")

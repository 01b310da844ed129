"""Notebooks in a real JupyterLab: a server of its own, a page in the browser, and a kernel that answers.

A kernel can fall silent: ipykernel 7.0 to 7.3 may leave requests unread until another one arrives (its issue 1554). On
a busy machine that happened about once in thirty runs: page and server showed an idle kernel, cells waited, and all of
them ran as soon as anybody asked the kernel something. So the kernel has to answer before the page opens, and
`keep_awake` asks it something every few seconds. If it falls silent all the same, `run_notebook` prints what page,
server, kernel and log show, and does all of it again on a new kernel, at most TRIES times.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import pytest
from support.browser import PATIENCE, browse, need_browser, wait

ROOT = Path(__file__).parents[2]
ANSWER_S = 30  # for a kernel to answer that has nothing else to do
KNOCK_S = 3
SILENCE_S = 150  # for a running notebook to show anything new; its longest cells take 20 s on two cores
TRIES = 3
SETTINGS = {  # JupyterLab: no news, and every cell in the page, not only those in view
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
}
# JavaScript, in a notebook's page: its kernel, its document, the code cells, how far each of them is.
KERNEL = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel"
BOOK = "window.jupyterapp?.shell?.currentWidget?.content?.model?.toJSON()"
CELLS = f"({BOOK}?.cells ?? []).filter((c) => c.cell_type === 'code')"
PROGRESS = f"return JSON.stringify({CELLS}.map((c) => [c.execution_count, c.outputs.length]))"


class SilentKernel(Exception):
    """The kernel does not answer, or the page does not see that it does."""


class Lab(NamedTuple):
    """A running JupyterLab and a browser: `folder` is what it serves, `log` its log, `driver` selenium's."""

    address: str
    folder: Path
    log: Path
    driver: Any

    def api(self, method: str, path: str, body: dict | None = None) -> Any:
        """Return the server's own answer to a REST call, such as api("GET", "kernels")."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.address}/api/{path}", data, {"Content-Type": "application/json"}, method=method)
        with urlopen(request, timeout=PATIENCE) as reply:
            text = reply.read()
        return json.loads(text) if text else None


def server_environment(home: Path) -> dict[str, str]:
    """Environment variables of a JupyterLab that keeps all it writes, and the SETTINGS, in the folder `home`."""
    for name, settings in SETTINGS.items():
        path = home / "settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    folders = {"CONFIG": home / "config", "DATA": home / "data", "RUNTIME": home / "run"}
    env = os.environ | {f"JUPYTER_{name}_DIR": str(path) for name, path in folders.items()}
    env |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    env |= {"ASYNCBATCH_CLONE": str(ROOT)}
    env.pop("ASYNCBATCH_ANSWERS", None)  # as a reader's: answers are kept beside the notebooks
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return env


@contextlib.contextmanager
def serve(folder: Path, log: Path) -> Iterator[str]:
    """Start a JupyterLab on `folder` and yield its address. Its own files go beside `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = (  # no token and no XSRF check: only this machine reaches it, and the tests call its REST interface
        f"--no-browser --allow-root --ip=127.0.0.1 --port={port} --ServerApp.port_retries=0 --IdentityProvider.token= "
        "--ServerApp.disable_check_xsrf=True --LabApp.expose_app_in_browser=True --LabApp.extension_manager=readonly"
    )
    command = [sys.executable, "-m", "jupyterlab", *options.split(), f"--ServerApp.root_dir={folder}"]
    env = server_environment(log.parent)
    with log.open("w") as output:
        server = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        address, late = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
        while True:
            if server.poll() is not None or time.monotonic() > late:
                pytest.fail(f"JupyterLab did not start:\n{log.read_text()}")
            with contextlib.suppress(OSError):
                urlopen(f"{address}/api/status", timeout=5).close()
                break
            time.sleep(0.3)
        yield address
    finally:
        server.terminate()  # it ends its kernels too
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@contextlib.contextmanager
def open_lab(home: Path) -> Iterator[Lab]:
    """Start a JupyterLab and a browser that keep their files in the folder `home`. Skips the test where one is
    missing."""
    need_browser("jupyterlab", "anywidget")
    folder, log = home / "served", home / "jupyterlab.log"
    shutil.copytree(ROOT / "docs", folder / "docs")  # pictures that notebooks show
    (folder / "notebooks").mkdir()
    with serve(folder, log) as address, browse(home / "chromium") as driver:
        yield Lab(address, folder, log, driver)


def write_notebook(path: Path, *cells: str) -> Path:
    """Write a notebook with these code cells; return its path."""
    import nbformat

    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = nbformat.v4.new_notebook(metadata={"kernelspec": spec})
    book.cells = [nbformat.v4.new_code_cell(cell.strip()) for cell in cells]
    nbformat.write(book, path)
    return path


@contextlib.contextmanager
def run_notebook(lab: Lab, path: Path) -> Iterator[list[dict]]:
    """Open a copy of the notebook `path` in the browser, run it on a kernel of its own, and yield its code cells.

    Tries again where the kernel falls silent (see the top of this file)."""
    name = f"notebooks/{path.name}"
    for left in reversed(range(TRIES)):
        shutil.copy(path, lab.folder / name)
        with start_kernel(lab, name) as kernel, keep_awake(lab, kernel):
            try:
                await_answer(lab, kernel)
                open_page(lab, name)
                cells = run_all(lab)
            except SilentKernel as silence:
                print(f"{path.name}: {silence}; {left} tries left\n{describe(lab)}")
                if not left:
                    raise
                continue
            yield cells
            return


@contextlib.contextmanager
def start_kernel(lab: Lab, name: str) -> Iterator[str]:
    """Start a kernel for the notebook `name` and yield its id. The notebook's page takes this kernel."""
    session = {"path": name, "name": "", "type": "notebook", "kernel": {"name": "python3"}}
    session = lab.api("POST", "sessions", session)
    try:
        yield session["kernel"]["id"]
    finally:
        lab.driver.get("about:blank")  # the page would mind that its kernel ends
        lab.api("DELETE", f"sessions/{session['id']}")  # ends the kernel


@contextlib.contextmanager
def kernel_client(lab: Lab, kernel: str) -> Iterator[Any]:
    """Yield a client of the kernel's shell channel, beside those of the page and of the server."""
    from jupyter_client import BlockingKernelClient

    client = BlockingKernelClient(connection_file=str(lab.log.parent / "run" / f"kernel-{kernel}.json"))
    client.load_connection_file()
    client.start_channels(iopub=False, stdin=False, hb=False, control=False)
    try:
        yield client
    finally:
        client.stop_channels()


@contextlib.contextmanager
def keep_awake(lab: Lab, kernel: str) -> Iterator[None]:
    """Ask the kernel for its version every KNOCK_S, from another thread, so that it reads what else has arrived.

    Not while it works: a kernel that is asked then can fall silent for good."""
    done = threading.Event()

    def knock() -> None:
        with kernel_client(lab, kernel) as client:
            while not done.wait(KNOCK_S):
                with contextlib.suppress(OSError):  # a server that is too busy to say
                    if lab.api("GET", f"kernels/{kernel}")["execution_state"] != "busy":
                        client.kernel_info()

    thread = threading.Thread(target=knock)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def await_answer(lab: Lab, kernel: str, patience: float = PATIENCE) -> None:
    """Ask the kernel again and again until it has run a line of code. Raises SilentKernel after `patience` seconds."""
    late = time.monotonic() + patience
    with kernel_client(lab, kernel) as client:
        while time.monotonic() < late:
            with contextlib.suppress(TimeoutError):
                client.execute("pass", silent=True, store_history=False, reply=True, timeout=ANSWER_S)
                return
    raise SilentKernel(f"the kernel has not run a line of code in {patience} s")


def open_page(lab: Lab, name: str) -> None:
    """Open the notebook `name` in the browser and wait until its kernel is idle. Raises SilentKernel."""
    from selenium.common.exceptions import TimeoutException

    lab.driver.get(f"{lab.address}/doc/tree/{name}")
    try:
        wait(lab.driver, f"return !!{KERNEL}", "the page to take the session's kernel")
        wait(lab.driver, f"return {KERNEL}?.status === 'idle'", "the kernel to be idle", ANSWER_S)
    except TimeoutException as error:
        raise SilentKernel(error.msg) from None


def any_busy(lab: Lab) -> bool:
    """Return whether a kernel of the server has begun something that is not done yet."""
    return any(kernel["execution_state"] == "busy" for kernel in lab.api("GET", "kernels"))


def run_all(lab: Lab) -> list[dict]:
    """Run all cells, as the menu does; return the code cells with their outputs once none waits or runs.

    Raises SilentKernel where nothing happens, and AssertionError for a cell that ended with an error."""
    lab.driver.execute_script(
        "window.jupyterapp.commands.execute('notebook:run-all-cells').finally(() => { window.ran = true; });"
    )
    progress, since = None, time.monotonic()
    while not lab.driver.execute_script("return window.ran"):
        if (newest := lab.driver.execute_script(PROGRESS)) != progress:
            progress, since = newest, time.monotonic()
        quiet_s = time.monotonic() - since
        if quiet_s > SILENCE_S or (quiet_s > ANSWER_S and not any_busy(lab)):
            raise SilentKernel(f"no cell has shown anything new for {quiet_s:.0f} s")
        time.sleep(0.3)
    cells = lab.driver.execute_script(f"return {CELLS}")
    assert_no_errors(cells)
    counted = f"return {CELLS}.every((c) => c.execution_count || !c.source.length)"
    wait(lab.driver, counted, "every cell to have a count", ANSWER_S)
    prompts = [prompt.text for prompt in lab.driver.find_elements("css selector", ".jp-InputPrompt")]
    assert "[*]:" not in prompts, f"a cell still runs: {prompts}"
    return lab.driver.execute_script(f"return {CELLS}")


def assert_no_errors(cells: list[dict]) -> None:
    errors = [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert not errors, "\n".join(errors[0]["traceback"])


def describe(lab: Lab) -> str:
    """Say what page, server, kernel and log show, for the report of a failure."""
    page = f"""const kernel = {KERNEL};
        const dialog = document.querySelector(".jp-Dialog")?.innerText;
        return [kernel?.id, kernel?.status, kernel?.connectionStatus, dialog, kernel?._pendingMessages?.length,
            kernel?._ws?.readyState, kernel?._ws?.bufferedAmount];"""
    state = {
        "kernel, status, connection, dialog, messages kept, socket, bytes in it": lab.driver.execute_script(page),
        "cells (count, outputs)": lab.driver.execute_script(PROGRESS),
        "server": lab.api("GET", "kernels"),
        "log": "\n".join(lab.log.read_text().splitlines()[-30:]),
    }
    for kernel in state["server"]:
        try:
            await_answer(lab, kernel["id"], ANSWER_S)
            time.sleep(3)
            state["cells, after the kernel answered a direct question"] = lab.driver.execute_script(PROGRESS)
        except SilentKernel as silence:
            state["asked directly"] = silence
    return "\n".join(f"{what}: {value}" for what, value in state.items())

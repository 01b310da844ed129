"""The timeline in a real JupyterLab in a real browser, and the notebooks as a reader uses them.

Needs jupyterlab, selenium, chromium and chromedriver; skipped where one is missing, but CI=true makes that a failure.
ASYNCBATCH_SCREENSHOTS=folder takes all notebooks and keeps the screenshots. Nothing is fetched: the browser resolves no
name but 127.0.0.1.

One JupyterLab and one Chromium serve all tests. A kernel can fall silent: ipykernel 7.0 to 7.3 may leave requests
unread until another one arrives (its issue 1554; seen here about once in thirty runs on a busy machine: page and server
show an idle kernel, cells wait, and all of them run as soon as anybody asks the kernel something). So the kernel has to
answer before the page opens, and `knocking` asks it something every few seconds. Should it be silent all the same,
`running` prints what page, server, kernel and log show, and does all of it again on a new kernel, TRIES times at most.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import pytest
from support.wrong_answers import cell_source, wrong_answers

from asyncbatch.lessons.exercises import EXERCISES

ROOT = Path(__file__).parents[2]
PATIENCE = 120  # seconds for anything that takes a few on a quiet machine
ANSWER_S = 30  # for a kernel to answer that has nothing else to do
KNOCK_S = 3
SILENCE_S = 150  # for a running notebook to show anything new; its longest cells take 20 s on two cores
TRIES = 3
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SETTINGS = {  # JupyterLab: no news, and every cell in the page, not only those in view
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
}
EXAMPLE = """
from asyncbatch.pictures import plot
from asyncbatch.timeline import Timeline
timelines = []
for label, period in (("sync", 5e-3), ("<b>async</b>", 4e-3)):
    timeline = Timeline(label, clock="virtual")
    for step in range(400):
        now = 100 + step * period
        timeline.add("host", "plan", step, now - 1e-3, now)
        timeline.add("H2D", "copy_in", step, now - 0.1e-3, now)
        timeline.add("compute", "step", step, now, now + 4e-3)
        timeline.add("D2H", "copy_out", step, now + 4e-3, now + 4.1e-3)
        timeline.add_step(step, "decode", 8, 0)
    timelines.append(timeline)
plot(*timelines)
"""


@pytest.fixture(autouse=True, scope="module")
def _needs_a_browser():
    present = {name: find_spec(name) for name in ("jupyterlab", "selenium", "anywidget")}
    present |= {"chromium": CHROMIUM, "chromedriver": shutil.which("chromedriver")}
    missing = ", ".join(name for name, found in present.items() if not found)
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"the browser tests need {missing}")
    if missing:
        pytest.skip(f"not installed: {missing}")


class SilentKernel(Exception):
    """The kernel does not answer, or the page does not see that it does."""


class Lab(NamedTuple):
    """A running JupyterLab and a browser: `folder` is what it serves, `log` its log, `driver` selenium's."""

    address: str
    folder: Path
    log: Path
    driver: Any

    def api(self, method: str, path: str, body: dict | None = None) -> Any:
        """The server's own answer to a REST call, such as api("GET", "kernels")."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.address}/api/{path}", data, {"Content-Type": "application/json"}, method=method)
        with urlopen(request, timeout=PATIENCE) as reply:
            text = reply.read()
        return json.loads(text) if text else None


@contextlib.contextmanager
def serve(folder: Path, log: Path) -> Iterator[str]:
    """A JupyterLab of its own, with settings of its own, on `folder`: yields its address."""
    own = log.parent
    for name, settings in SETTINGS.items():
        path = own / "settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {"CONFIG": own / "config", "DATA": own / "data", "RUNTIME": own / "run"}
    env = os.environ | {f"JUPYTER_{name}_DIR": str(path) for name, path in places.items()}
    env |= {"JUPYTERLAB_SETTINGS_DIR": str(own / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces")}
    env |= {"ASYNCBATCH_CLONE": str(ROOT)}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    options = (  # no token and no XSRF check: only this machine reaches it, and the tests call its REST interface
        f"--no-browser --allow-root --ip=127.0.0.1 --port={port} --ServerApp.port_retries=0 --IdentityProvider.token= "
        "--ServerApp.disable_check_xsrf=True --LabApp.expose_app_in_browser=True --LabApp.extension_manager=readonly"
    )
    command = [sys.executable, "-m", "jupyterlab", *options.split(), f"--ServerApp.root_dir={folder}"]
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
def browse(profile: Path) -> Iterator:
    """A headless Chromium that reaches 127.0.0.1 and nothing else: yields the selenium driver."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-dev-shm-usage "
        "disable-component-update disable-sync no-proxy-server window-size=1300,1000"
    )
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.add_argument(f"--user-data-dir={profile}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.set_page_load_timeout(PATIENCE)
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def lab(_needs_a_browser, tmp_path_factory) -> Iterator[Lab]:
    """One JupyterLab and one browser for all tests of this file."""
    own = tmp_path_factory.mktemp("jupyterlab")
    folder = own / "served"
    shutil.copytree(ROOT / "docs", folder / "docs")  # pictures that notebooks show
    (folder / "notebooks").mkdir()
    with serve(folder, own / "jupyterlab.log") as address, browse(own / "chromium") as driver:
        yield Lab(address, folder, own / "jupyterlab.log", driver)


@contextlib.contextmanager
def running(lab: Lab, path: Path) -> Iterator[list[dict]]:
    """A copy of the notebook `path` in the browser, all its cells run by a kernel of its own: yields the code cells.

    Tried again where the kernel falls silent (see the top)."""
    name = f"notebooks/{path.name}"
    for left in reversed(range(TRIES)):
        shutil.copy(path, lab.folder / name)
        with kernel_of(lab, name) as kernel, knocking(lab, kernel):
            try:
                await_answer(lab, kernel)
                open_page(lab, name)
                cells = run_all(lab)
            except SilentKernel as silence:
                print(f"{path.name}: {silence}; {left} tries left\n{what_is_seen(lab)}")
                if not left:
                    raise
                continue
            yield cells
            return


@contextlib.contextmanager
def kernel_of(lab: Lab, name: str) -> Iterator[str]:
    """A new kernel for the notebook `name`, which its page takes: yields the kernel's id."""
    session = {"path": name, "name": "", "type": "notebook", "kernel": {"name": "python3"}}
    session = lab.api("POST", "sessions", session)
    try:
        yield session["kernel"]["id"]
    finally:
        lab.driver.get("about:blank")  # the page would mind that its kernel ends
        lab.api("DELETE", f"sessions/{session['id']}")  # ends the kernel


@contextlib.contextmanager
def asking(lab: Lab, kernel: str) -> Iterator[Any]:
    """A client of the kernel's shell channel, beside the page and the server."""
    from jupyter_client import BlockingKernelClient

    client = BlockingKernelClient(connection_file=str(lab.log.parent / "run" / f"kernel-{kernel}.json"))
    client.load_connection_file()
    client.start_channels(iopub=False, stdin=False, hb=False, control=False)
    try:
        yield client
    finally:
        client.stop_channels()


@contextlib.contextmanager
def knocking(lab: Lab, kernel: str) -> Iterator[None]:
    """Ask the kernel for its version every KNOCK_S, from another thread, so that it reads what else has arrived. Not
    while it works: asked then, it can fall silent for good."""
    done = threading.Event()

    def knock() -> None:
        with asking(lab, kernel) as client:
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
    """Ask the kernel, until it has run a line of code."""
    late = time.monotonic() + patience
    with asking(lab, kernel) as client:
        while time.monotonic() < late:
            with contextlib.suppress(TimeoutError):
                client.execute("pass", silent=True, store_history=False, reply=True, timeout=ANSWER_S)
                return
    raise SilentKernel(f"the kernel has not run a line of code in {patience} s")


KERNEL = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel"
BOOK = "window.jupyterapp?.shell?.currentWidget?.content?.model?.toJSON()"
CELLS = f"({BOOK}?.cells ?? []).filter((c) => c.cell_type === 'code')"
PROGRESS = f"return JSON.stringify({CELLS}.map((c) => [c.execution_count, c.outputs.length]))"


def open_page(lab: Lab, name: str) -> None:
    """The notebook in the browser, its kernel idle."""
    from selenium.common.exceptions import TimeoutException

    lab.driver.get(f"{lab.address}/doc/tree/{name}")
    try:
        wait(lab.driver, f"return !!{KERNEL}", "the page to take the session's kernel")
        wait(lab.driver, f"return {KERNEL}?.status === 'idle'", "the kernel to be idle", ANSWER_S)
    except TimeoutException as error:
        raise SilentKernel(error.msg) from None


def any_busy(lab: Lab) -> bool:
    """Whether the server has seen its kernel begin something that is not done yet."""
    return any(kernel["execution_state"] == "busy" for kernel in lab.api("GET", "kernels"))


def run_all(lab: Lab) -> list[dict]:
    """Run all cells, as the menu does, until none waits or runs: the code cells with their outputs, none an error."""
    lab.driver.execute_script(
        "window.jupyterapp.commands.execute('notebook:run-all-cells').finally(() => { window.ran = true; });"
    )
    seen, since = None, time.monotonic()
    while not lab.driver.execute_script("return window.ran"):
        if (now_seen := lab.driver.execute_script(PROGRESS)) != seen:
            seen, since = now_seen, time.monotonic()
        quiet_s = time.monotonic() - since
        if quiet_s > SILENCE_S or (quiet_s > ANSWER_S and not any_busy(lab)):
            raise SilentKernel(f"no cell has shown anything new for {quiet_s:.0f} s")
        time.sleep(0.3)
    cells = lab.driver.execute_script(f"return {CELLS}")
    assert_no_errors(cells)
    counted = f"return {CELLS}.every((c) => c.execution_count || !c.source.length)"
    wait(lab.driver, counted, "every cell to have a count", ANSWER_S)
    assert "[*]:" not in [prompt.text for prompt in lab.driver.find_elements("css selector", ".jp-InputPrompt")]
    return lab.driver.execute_script(f"return {CELLS}")


def assert_no_errors(cells: list[dict]) -> None:
    errors = [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert not errors, "\n".join(errors[0]["traceback"])


def what_is_seen(lab: Lab) -> str:
    """What page, server, kernel and log show, for the report of a failure."""
    page = f"""const kernel = {KERNEL};
        const dialog = document.querySelector(".jp-Dialog")?.innerText;
        return [kernel?.id, kernel?.status, kernel?.connectionStatus, dialog, kernel?._pendingMessages?.length,
            kernel?._ws?.readyState, kernel?._ws?.bufferedAmount];"""
    seen = {
        "kernel, status, connection, dialog, messages kept, socket, bytes in it": lab.driver.execute_script(page),
        "cells (count, outputs)": lab.driver.execute_script(PROGRESS),
        "server": lab.api("GET", "kernels"),
        "log": "\n".join(lab.log.read_text().splitlines()[-30:]),
    }
    for kernel in seen["server"]:
        try:
            await_answer(lab, kernel["id"], ANSWER_S)
            time.sleep(3)
            seen["cells, after the kernel answered a direct question"] = lab.driver.execute_script(PROGRESS)
        except SilentKernel as silence:
            seen["asked directly"] = silence
    return "\n".join(f"{what}: {told}" for what, told in seen.items())


def wait(driver, script: str, what: str, patience: float = PATIENCE):
    """The first true value of a script in the page."""
    return until(driver, lambda: driver.execute_script(script), what, patience)


def until(driver, true, what: str, patience: float = PATIENCE):
    """The first true value of the function `true`."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, patience, poll_frequency=0.1).until(
        lambda _: true(), f"waited {patience} s for {what}"
    )


def screenshot(driver, name: str, folder: Path) -> None:
    folder = Path(os.environ.get("ASYNCBATCH_SCREENSHOTS") or folder)
    folder.mkdir(parents=True, exist_ok=True)
    driver.save_screenshot(str(folder / f"{name}.png"))


@pytest.fixture
def write(tmp_path):
    """write(*cells): the path of a notebook with these code cells."""
    import nbformat

    def write(*cells: str) -> Path:
        spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        book = nbformat.v4.new_notebook(metadata={"kernelspec": spec})
        book.cells = [nbformat.v4.new_code_cell(cell.strip()) for cell in cells]
        nbformat.write(book, tmp_path / "example.ipynb")
        return tmp_path / "example.ipynb"

    return write


def test_a_silent_kernel_is_reported_and_replaced(lab, write, monkeypatch, capsys):
    kernels, really_run_all = [], run_all

    def silent_at_first(lab: Lab) -> list[dict]:
        kernels.append(lab.api("GET", "kernels")[0]["id"])
        if len(kernels) == 1:
            raise SilentKernel("not a word")
        return really_run_all(lab)

    monkeypatch.setitem(globals(), "run_all", silent_at_first)
    with running(lab, write("6 * 7")) as (cell,):
        assert cell["outputs"][0]["data"]["text/plain"] == "42"
    assert len(set(kernels)) == 2, "a new kernel"
    assert "example.ipynb: not a word; 2 tries left" in (said := capsys.readouterr().out)
    assert "Kernel started" in said


def test_the_timeline_is_drawn_and_answers_to_keys_and_mouse(lab, write, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains

    with running(lab, write(EXAMPLE)) as (cell,):
        driver = lab.driver
        (output,) = cell["outputs"]
        assert len(output["data"]["image/png"]) > 10_000, "the static picture goes with the widget"
        assert output["data"]["text/plain"] == "<TimelineFigure: sync, <b>async</b>>"

        drawn = "return Number(document.querySelector('.jp-OutputArea canvas[tabindex]')?.dataset.drawMs) > 0"
        wait(driver, drawn, "the canvas to be drawn")
        canvas = driver.find_element("css selector", ".jp-OutputArea canvas[tabindex]")
        script = """const c = arguments[0], d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
            return [...new Set(new Uint32Array(d.buffer))].map((v) => "#" + [v, v >> 8, v >> 16].map(
                (b) => (b & 255).toString(16).padStart(2, "0")).join(""));"""
        colours = driver.execute_script(script, canvas)
        assert {"#e69f00", "#56b4e9", "#0072b2", "#009e73"} <= set(colours), "host, copies and steps are painted"
        assert canvas.get_attribute("aria-label").startswith("Timeline of sync: device active 80.0 %")

        def view() -> tuple[float, float]:
            low, high = canvas.get_attribute("data-view").split()
            return float(low), float(high)

        def press(key: str, times: int = 1) -> tuple[float, float]:
            for _ in range(times):
                old = canvas.get_attribute("data-view")
                canvas.send_keys(key)
                wait(driver, f"return document.activeElement.dataset.view !== '{old}'", f"{key!r} to be answered")
            return view()

        first = view()
        closer = press("+")
        assert first[0] < closer[0] < closer[1] < first[1]
        assert closer[1] - closer[0] == pytest.approx((first[1] - first[0]) / 2)
        right = press("\ue014")  # arrow right
        assert right[0] > closer[0]
        assert right[1] - right[0] == pytest.approx(closer[1] - closer[0])
        assert press("\ue012") == pytest.approx(closer)  # arrow left
        assert press("0") == pytest.approx(first)
        live = driver.find_element("css selector", ".asyncbatch-live")
        before = live.text
        assert press("-", times=6) == pytest.approx((0.0, 399 * 5e-3 + 4.1e-3 + 1e-3)), (
            "no further out than the whole run"
        )
        assert live.text != before
        assert "Showing 0 " in live.text
        # Both runs have 400 steps of 4 ms: far out, too, their blue is 1.6 of 2 s, on 30 pixels and 11 of the overview.
        script = """const c = arguments[0], d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
            let blue = 0;
            for (let i = 0; i < d.length; i += 4) blue += d[i] < 12 && Math.abs(d[i + 1] - 114) < 12;
            return blue / c.width * c.clientWidth / (c.clientWidth - 118) / devicePixelRatio;"""
        assert driver.execute_script(script, canvas) == pytest.approx(2 * 0.8 * (30 + 11), rel=0.06)
        press("0")
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)

        ActionChains(driver).move_to_element_with_offset(canvas, 60, 0).perform()
        texts = []
        for y in range(-int(canvas.size["height"] / 2) + 5, int(canvas.size["height"] / 2), 8):
            ActionChains(driver).move_to_element_with_offset(canvas, 60, y).perform()
            texts.append(driver.find_element("css selector", ".asyncbatch-tip").text)
        steps = [text.split(", ")[:3] for text in texts if "compute: step, " in text]
        assert {track for track, *_ in steps} == {"sync", "<b>async</b>"}, f"labels are text, not markup: {texts}"
        assert all(", 4 ms, from " in text for text in texts if "compute: step, " in text)
        low = view()
        ActionChains(driver).click_and_hold(canvas).move_by_offset(-80, 0).release().perform()
        assert view()[0] > low[0], "dragging to the left moves on in time"
        screenshot(driver, "timeline", tmp_path)


# Every notebook is run by nbval, too. Here CI takes three, to stay within its 20 minutes; who wants to look takes all.
TAKEN = ("*.ipynb",) if os.environ.get("ASYNCBATCH_SCREENSHOTS") else ("00_*.ipynb", "02_*.ipynb", "03_*.ipynb")
NOTEBOOKS = sorted(path for pattern in TAKEN for path in (ROOT / "notebooks").glob(pattern))
CHECK = re.compile(r'^(\w+) = teach\.check\("(\w+)", \1\)', re.MULTILINE)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_as_its_reader_uses_it(path, lab, tmp_path):
    with running(lab, path) as cells:
        broken = "return [...document.images].filter((i) => !i.complete || !i.naturalWidth).map((i) => i.src)"
        wait(lab.driver, f"return !(() => {{ {broken} }})().length", "every picture to be there")
        zoomed, moved = zoom_a_timeline(lab.driver), move_a_slider(lab.driver)
        assert zoomed or "TimelineFigure" not in str(cells)
        assert moved or "slider" not in path.read_text("utf-8"), "the text promises a slider"
        for i, output in enumerate(lab.driver.find_elements("css selector", ".jp-Cell-outputArea")):
            if output.find_elements("css selector", "canvas, img"):
                lab.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", output)
                screenshot(lab.driver, f"{path.stem}-{i}", tmp_path)
        name = next(match[1] for cell in cells if (match := CHECK.search(cell["source"])))
        wrong = answer(lab, name, cell_source(wrong_answers()[name][0], name))
        screenshot(lab.driver, f"{path.stem}-wrong", tmp_path)
        assert f"{name}: not yet." in wrong
        assert "is right." in wrong.replace("\n", " ")
        right = answer(lab, name, cell_source(EXERCISES[name].reference, name))
        screenshot(lab.driver, f"{path.stem}-right", tmp_path)
        assert f"{name}: right in all" in right
        assert "goes on with your function" in right.replace("\n", " ")


def zoom_a_timeline(driver) -> bool:
    """Halve the window of the page's first timeline with the + key; False where there is none."""
    canvases = driver.find_elements("css selector", ".jp-OutputArea canvas[tabindex][data-view]")
    if not canvases:
        return False
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvases[0])
    before = canvases[0].get_attribute("data-view")
    canvases[0].send_keys("+")
    wait(driver, f"return document.activeElement.dataset.view !== '{before}'", "the timeline to zoom")
    low, high = map(float, before.split())
    closer_low, closer_high = map(float, canvases[0].get_attribute("data-view").split())
    assert closer_high - closer_low == pytest.approx((high - low) / 2)
    return True


def move_a_slider(driver) -> bool:
    """Drag the page's first slider, then type into the box beside it: each is answered by a new picture. False where
    there is no slider."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    handles = driver.find_elements("css selector", ".jp-OutputArea .widget-slider .noUi-handle")
    if not handles:
        return False
    row = "arguments[0].closest('.widget-hbox')"
    box = driver.execute_script(f"return {row}.querySelector('input[type=number]')", handles[0])
    shown = """const area = arguments[0].closest('.jp-OutputArea');
        return [...area.querySelectorAll('img')].map((i) => i.src).join() +
            [...area.querySelectorAll('canvas')].map((c) => c.toDataURL()).join() +
            [...area.querySelectorAll('svg, .widget-html-content')].map((e) => e.outerHTML).join();"""
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", handles[0])

    def answered(move) -> None:
        value, picture = box.get_attribute("value"), driver.execute_script(shown, handles[0])
        move()
        until(driver, lambda: box.get_attribute("value") != value, "the box beside the slider to follow")
        until(driver, lambda: driver.execute_script(shown, handles[0]) != picture, "the slider's picture to follow")

    answered(lambda: ActionChains(driver).drag_and_drop_by_offset(handles[0], 60, 0).perform())
    lowest = box.get_attribute("min")
    answered(lambda: box.send_keys(Keys.CONTROL, "a", Keys.NULL, lowest, Keys.ENTER))
    assert float(box.get_attribute("value")) == float(lowest)
    return True


def answer(lab: Lab, name: str, source: str) -> str:
    """Write `source` into the stub of the exercise `name`, run it and the cell that checks it: what that one prints."""
    run = f"""const [source, done] = arguments, app = window.jupyterapp, notebook = app.shell.currentWidget.content;
        const code = (cell) => cell.model.sharedModel.getSource();
        const check = notebook.widgets.findIndex((cell) => code(cell).startsWith('{name} = teach.check('));
        const stub = notebook.widgets.slice(0, check).findLastIndex((cell) => cell.model.type === 'code');
        notebook.widgets[stub].model.sharedModel.setSource(source);
        const one = (i) => {{ notebook.deselectAll(); notebook.activeCellIndex = i;
            return app.commands.execute('notebook:run-cell'); }};
        const outputs = (i) => notebook.widgets[i].model.toJSON().outputs;
        one(stub).then(() => one(check)).finally(() => done([outputs(stub), outputs(check)]));"""
    lab.driver.set_script_timeout(PATIENCE)
    stub, check = lab.driver.execute_async_script(run, source)
    assert_no_errors([{"outputs": stub + check}])
    node = lab.driver.find_element("css selector", ".jp-Notebook-cell.jp-mod-active")
    lab.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", node)
    return "".join(output.get("text", "") for output in check)

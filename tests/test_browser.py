"""The timeline in a real JupyterLab in a real browser, and the notebooks as a reader runs them.

Needs jupyterlab, selenium, chromium and chromedriver; skipped where one is missing, but CI=true makes that a failure.
ASYNCBATCH_SCREENSHOTS=folder keeps the screenshots. Nothing is fetched: the browser resolves no name but 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).parents[1]
PATIENCE = 120  # seconds for anything that takes a few on a quiet machine
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SETTINGS = {  # JupyterLab: no news, and every cell in the page, not only those in view
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
}
EXAMPLE = """
from asyncbatch.plot import plot
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


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """A JupyterLab of its own, with settings of its own, on `folder`: yields its address."""
    own = folder / ".jupyter"
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
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    options = (
        f"--no-browser --allow-root --ip=127.0.0.1 --port={port} --ServerApp.port_retries=0 --IdentityProvider.token="
    )
    options += " --LabApp.expose_app_in_browser=True --LabApp.extension_manager=readonly"
    command = [sys.executable, "-m", "jupyterlab", *options.split(), f"--ServerApp.root_dir={folder}"]
    log = folder / "jupyterlab.log"
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
def open_notebook(path: Path, folder: Path) -> Iterator:
    """A browser with a copy of the notebook `path` in `folder`, its kernel idle: yields the selenium driver."""
    from selenium import webdriver

    folder.mkdir(exist_ok=True)
    shutil.copy(path, folder)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-dev-shm-usage"
    )
    for flag in [
        *flags.split(),
        "disable-component-update",
        "disable-sync",
        "no-proxy-server",
        "window-size=1300,1000",
    ]:
        options.add_argument(f"--{flag}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.add_argument(f"--user-data-dir={folder / '.chromium'}")
    with serve(folder) as address:
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            driver.set_page_load_timeout(PATIENCE)
            driver.get(f"{address}/doc/tree/{path.name}")
            idle = "return window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
            wait(driver, idle, "the kernel to be idle")
            yield driver
        finally:
            driver.quit()


def wait(driver, script: str, what: str, patience: float = PATIENCE):
    """The first true value of a script in the page."""
    from selenium.webdriver.support.ui import WebDriverWait

    waiting = WebDriverWait(driver, patience, poll_frequency=0.3)
    return waiting.until(lambda d: d.execute_script(script), f"waited {patience} s for {what}")


def run_all(driver, patience: float = PATIENCE) -> list[dict]:
    """Run all cells, as the menu does, until none waits or runs: the code cells with their outputs, none an error.

    Seen once in about ten runs: JupyterLab shows an idle kernel, and nothing that is sent to it comes back. So a run
    that does not end gets a second try on a restarted kernel, and what was seen is printed.
    """
    from selenium.common.exceptions import TimeoutException

    cells = "window.jupyterapp.shell.currentWidget.content.model.toJSON().cells.filter((c) => c.cell_type === 'code')"
    start = """const [attempt] = arguments;
        window.jupyterapp.commands.execute("notebook:run-all-cells").finally(() => { window.ran = attempt; });"""
    driver.execute_script(start, 1)
    try:
        wait(driver, "return window.ran === 1", "all cells to run", patience)
    except TimeoutException:
        state = """const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
            return [kernel.status, kernel.connectionStatus, document.querySelector(".jp-Dialog")?.innerText];"""
        print(f"not all cells have run in {patience} s:", driver.execute_script(state))
        driver.execute_async_script(
            """const [done] = arguments;
            window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart().then(done, done);"""
        )
        driver.execute_script(start, 2)
        wait(driver, "return window.ran === 2", "all cells to run, on a new kernel", patience)
    wait(
        driver, f"return {cells}.every((c) => c.execution_count || !c.source.length)", "every cell to have a count", 30
    )
    prompts = [prompt.text for prompt in driver.find_elements("css selector", ".jp-InputPrompt")]
    assert "[*]:" not in prompts
    done = driver.execute_script(f"return {cells}")
    errors = [output for cell in done for output in cell["outputs"] if output["output_type"] == "error"]
    assert not errors, "\n".join(errors[0]["traceback"])
    return done


def screenshot(driver, name: str, folder: Path) -> None:
    folder = Path(os.environ.get("ASYNCBATCH_SCREENSHOTS") or folder)
    folder.mkdir(parents=True, exist_ok=True)
    driver.save_screenshot(str(folder / f"{name}.png"))


def test_the_timeline_is_drawn_and_answers_to_keys_and_mouse(tmp_path):
    import nbformat
    from selenium.webdriver.common.action_chains import ActionChains

    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": spec})
    notebook.cells = [nbformat.v4.new_code_cell(EXAMPLE.strip())]
    nbformat.write(notebook, tmp_path / "example.ipynb")
    with open_notebook(tmp_path / "example.ipynb", tmp_path / "served") as driver:
        (cell,) = run_all(driver)
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


@pytest.mark.parametrize("name", ["00_start_here.ipynb", "01_the_idle_device.ipynb"])
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path):
    path = ROOT / "notebooks" / name
    if not path.exists():
        pytest.skip(f"{name} is not written yet")
    with open_notebook(path, tmp_path / "served") as driver:
        run_all(driver, patience=600)
        if driver.find_elements("css selector", ".jp-OutputArea canvas[tabindex]"):
            drawn = "return Number(document.querySelector('.jp-OutputArea canvas[tabindex]').dataset.drawMs) > 0"
            wait(driver, drawn, "the canvas to be drawn")
        for i, output in enumerate(driver.find_elements("css selector", ".jp-Cell-outputArea")):
            driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", output)
            if output.find_elements("css selector", "canvas, img"):
                screenshot(driver, f"{path.stem}-{i}", tmp_path)
        screenshot(driver, path.stem, tmp_path)

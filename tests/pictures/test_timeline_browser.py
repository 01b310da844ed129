"""The timeline's widget in a notebook's page: drawn, and answering to keys and mouse.

Needs jupyterlab, anywidget, selenium, chromium and chromedriver; skipped where one is missing, but CI=true makes that a
failure. ASYNCBATCH_SCREENSHOTS=folder keeps the screenshot.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from support.browser import screenshot, wait
from support.jupyterlab import open_lab, run_notebook, write_notebook

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


COLOURS = """const c = arguments[0], d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
    return [...new Set(new Uint32Array(d.buffer))].map((v) => "#" + [v, v >> 8, v >> 16].map(
        (b) => (b & 255).toString(16).padStart(2, "0")).join(""));"""
BLUE = """const c = arguments[0], d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
    let blue = 0;
    for (let i = 0; i < d.length; i += 4) blue += d[i] < 12 && Math.abs(d[i + 1] - 114) < 12;
    return blue / c.width * c.clientWidth / (c.clientWidth - 118) / devicePixelRatio;"""


class Page(NamedTuple):
    """The notebook's page, with one timeline: `output` is that of its cell, `canvas` what the timeline is drawn on."""

    driver: Any
    output: dict
    canvas: Any

    def view(self) -> tuple[float, float]:
        """The window of time that is drawn, in seconds."""
        low, high = self.canvas.get_attribute("data-view").split()
        return float(low), float(high)

    def press(self, key: str, times: int = 1) -> tuple[float, float]:
        """Press a key, each time until the view has changed; return the view."""
        for _ in range(times):
            old = self.canvas.get_attribute("data-view")
            self.canvas.send_keys(key)
            changed = f"return document.activeElement.dataset.view !== '{old}'"
            wait(self.driver, changed, f"{key!r} to be answered")
        return self.view()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("jupyterlab")
    example = write_notebook(folder / "example.ipynb", EXAMPLE)
    with open_lab(folder) as lab, run_notebook(lab, example) as (cell,):
        drawn = "return Number(document.querySelector('.jp-OutputArea canvas[tabindex]')?.dataset.drawMs) > 0"
        wait(lab.driver, drawn, "the canvas to be drawn")
        canvas = lab.driver.find_element("css selector", ".jp-OutputArea canvas[tabindex]")
        (output,) = cell["outputs"]
        yield Page(lab.driver, output, canvas)


def test_a_static_picture_and_a_text_go_with_the_widget(page):
    assert len(page.output["data"]["image/png"]) > 10_000
    assert page.output["data"]["text/plain"] == "<TimelineFigure: sync, <b>async</b>>"
    assert page.canvas.get_attribute("aria-label").startswith("Timeline of sync: device active 80.0 %")


def test_host_copies_and_steps_are_painted(page):
    assert {"#e69f00", "#56b4e9", "#0072b2", "#009e73"} <= set(page.driver.execute_script(COLOURS, page.canvas))


def test_keys_zoom_and_move(page):
    first = page.view()
    closer = page.press("+")
    assert first[0] < closer[0] < closer[1] < first[1]
    assert closer[1] - closer[0] == pytest.approx((first[1] - first[0]) / 2)
    right = page.press("\ue014")  # arrow right
    assert right[0] > closer[0]
    assert right[1] - right[0] == pytest.approx(closer[1] - closer[0])
    assert page.press("\ue012") == pytest.approx(closer)  # arrow left
    assert page.press("0") == pytest.approx(first)


def test_the_whole_run_is_as_far_out_as_it_goes_and_its_steps_are_painted_there_too(page):
    live = page.driver.find_element("css selector", ".asyncbatch-live")
    before = live.text
    assert page.press("-", times=8) == pytest.approx((0.0, 399 * 5e-3 + 4.1e-3 + 1e-3))
    assert live.text != before
    assert "Showing 0 " in live.text
    # Both runs have 400 steps of 4 ms: far out, too, their blue is 1.6 of 2 s, on 30 pixels and 11 of the overview.
    assert page.driver.execute_script(BLUE, page.canvas) == pytest.approx(2 * 0.8 * (30 + 11), rel=0.06)
    page.press("0")


def test_the_mouse_tells_spans_and_drags(page, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains

    driver, canvas = page.driver, page.canvas
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    ActionChains(driver).move_to_element_with_offset(canvas, 150, 0).perform()
    texts = []
    for y in range(-int(canvas.size["height"] / 2) + 5, int(canvas.size["height"] / 2), 8):
        ActionChains(driver).move_to_element_with_offset(canvas, 150, y).perform()
        texts.append(driver.find_element("css selector", ".asyncbatch-tip").text)
    steps = [text.split(", ")[:3] for text in texts if "compute: step, " in text]
    assert {track for track, *_ in steps} == {"sync", "<b>async</b>"}, f"labels are text, not markup: {texts}"
    assert all(", 4 ms, from " in text for text in texts if "compute: step, " in text)
    low = page.view()
    ActionChains(driver).click_and_hold(canvas).move_by_offset(-80, 0).release().perform()
    assert page.view()[0] > low[0], "dragging to the left moves on in time"
    screenshot(driver, "timeline", tmp_path)

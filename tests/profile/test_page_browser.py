"""The report's page in a real browser: opened from disk, offline, drawn, and answering to wheel, keys and mouse.

Needs selenium, chromium and chromedriver; skipped where one is missing, but CI=true makes that a failure.
ASYNCBATCH_SCREENSHOTS=folder keeps the screenshots.
"""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path

import pytest
from support.browser import browse, need_browser, until, wait
from support.hostile import hostile
from support.page_browser import answered, canvas_of, look, open_offline, open_page, view
from support.ranks import measured_by, report_on, shared_model
from support.reports import EMULATED, measured
from support.timelines import steady_run as made_run

from asyncbatch.profile import document
from asyncbatch.profile.page import write_page
from asyncbatch.profile.report import Report
from asyncbatch.profile.traces.page import write_trace_page
from asyncbatch.profile.traces.read import read_trace


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    need_browser()
    with browse(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


def picture_of(driver, name: str, folder: Path) -> None:
    """A screenshot of the whole page, not only of what is in view."""
    size = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    folder = Path(os.environ.get("ASYNCBATCH_SCREENSHOTS") or folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


def fetched(driver) -> list[str]:
    return driver.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")


def test_it_opens_from_disk_without_a_network_and_fetches_nothing(driver, tmp_path):
    report, timelines = measured(EMULATED)
    open_page(driver, tmp_path / "report.html", report, timelines)
    assert driver.get_log("browser") == []
    assert [name for name in fetched(driver) if not name.startswith("data:")] == []
    assert driver.title == f"Profile of {report['model']} on {report['device']}"
    assert driver.find_element("tag name", "h1").text.rstrip(".") == Report.from_json(report).sentences[0].partition(
        ". "
    )[0].rstrip(".")
    for size in (1300, 400):
        look(driver, width=size)
        wait(driver, f"return innerWidth === {size}", "the new width", 30)
        picture_of(driver, f"report-light-{size}", tmp_path)
    # And what would be fetched, or run, is not, and is seen: so the silence above means something.
    driver.execute_script(
        "new Image().src = 'http://127.0.0.1:9/planted.png'; const made = document.createElement('script');"
        "made.textContent = 'window.planted = true'; document.body.append(made);"
    )
    refused: list[str] = []

    def both_refused() -> bool:
        refused.extend(entry["message"] for entry in driver.get_log("browser"))
        return len(refused) >= 2

    until(driver, both_refused, "both to be refused", 30)
    assert all("Content Security Policy" in message for message in refused), refused
    assert driver.execute_script("return window.planted") is None


def test_the_timeline_zooms_moves_and_tells(driver, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    report, timelines = measured(EMULATED)
    open_page(driver, tmp_path / "report.html", report, timelines)
    canvas = canvas_of(driver)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    first = view(driver)

    def wheel(by: int):
        ActionChains(driver).scroll_from_origin(ScrollOrigin.from_element(canvas), 0, by).perform()

    ActionChains(driver).move_to_element(canvas).click().perform()
    closer = answered(driver, lambda: wheel(-300))
    assert first[0] < closer[0] < closer[1] < first[1], "the wheel zooms in"
    assert answered(driver, lambda: wheel(300)) == pytest.approx(first)
    half = answered(driver, lambda: canvas.send_keys("+"))
    assert half[1] - half[0] == pytest.approx((first[1] - first[0]) / 2)
    later = answered(driver, lambda: canvas.send_keys("\ue014"))  # arrow right
    assert later[0] > half[0]
    assert answered(driver, lambda: canvas.send_keys("0")) == pytest.approx(first)
    drag = ActionChains(driver).click_and_hold(canvas).move_by_offset(-80, 0).release()
    assert answered(driver, drag.perform)[0] > first[0], "dragging to the left moves on in time"

    buttons = {button.text: button for button in driver.find_elements("css selector", ".buttons button")}
    assert list(buttons) == ["Zoom in", "Zoom out", "Earlier", "Later", "Reset", "Whole run"]
    assert answered(driver, buttons["Reset"].click) == pytest.approx(first)
    half = answered(driver, buttons["Zoom in"].click)
    assert half[1] - half[0] == pytest.approx((first[1] - first[0]) / 2)
    assert answered(driver, buttons["Later"].click)[0] > half[0]
    assert answered(driver, buttons["Earlier"].click) == pytest.approx(half)
    assert answered(driver, buttons["Zoom out"].click) == pytest.approx(first)
    end = max(timeline.summary().wall_s for timeline in timelines)
    assert answered(driver, buttons["Whole run"].click) == pytest.approx((0, end))
    answered(driver, buttons["Reset"].click)

    texts = []
    for y in range(-int(canvas.size["height"] / 2) + 5, int(canvas.size["height"] / 2), 8):
        ActionChains(driver).move_to_element_with_offset(canvas, 60, y).perform()
        texts.append(driver.find_element("css selector", ".asyncbatch-tip").text)
    told = {match[1] for text in texts if (match := re.match(r"(a?sync), compute: (?:step, step \d+,|idle)", text))}
    assert told == {"sync", "async"}, texts
    assert driver.get_log("browser") == []


def test_a_gap_of_the_table_is_shown_in_the_timeline(driver, tmp_path):
    report, _ = measured()
    sync, async_ = made_run("sync", 300), made_run("async", 300, active=1.0)
    gap = {"step": 150, "at_s": 1.5, "ms": 2.0, "cause": "commit"}
    report["runs"][0]["gaps"]["longest"] = [gap]
    open_page(driver, tmp_path / "report.html", report, [sync, async_])
    button = driver.find_element("css selector", "button[aria-label^='Show the gap before step 150 of sync']")
    low, high = answered(driver, button.click)
    assert low < 1.5 < 1.502 < high < low + 0.02
    assert driver.execute_script("return document.activeElement") == canvas_of(driver), "and keys now move it"
    top = driver.execute_script("return arguments[0].getBoundingClientRect().top", canvas_of(driver))
    assert 0 <= top < 1000, "it has been scrolled into view"


def test_a_trace_of_another_engine_has_such_a_page_too(driver, tmp_path):
    path = tmp_path / "report.html"
    write_trace_page(path, read_trace(Path(__file__).parent / "traces" / "transformers-sync.json.gz"))
    open_offline(driver, path)
    assert fetched(driver) == []
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    button = driver.find_element("css selector", "#longest ~ * button[data-from]")
    before = view(driver)
    button.click()
    low, high = view(driver)
    assert (low, high) != before
    begin, end = (float(button.get_attribute(f"data-{edge}")) for edge in ("from", "to"))
    assert low <= begin < end <= high
    picture_of(driver, "trace-page", tmp_path)


def test_hostile_text_is_shown_and_does_nothing(driver, tmp_path):
    report, timelines = measured(EMULATED)
    open_page(driver, tmp_path / "report.html", hostile(report), timelines)
    assert driver.get_log("browser") == []
    assert len(driver.find_elements("tag name", "script")) == 2
    assert not driver.find_elements("css selector", "img[src='x'], [onerror]")
    assert "onerror=alert(1)" in driver.find_element("class name", "verdict").text


NARROW = """const parts = [...document.querySelectorAll('h1, h2, p, canvas, dl, .scroll, .buttons, nav')];
    const out = parts.filter((part) => part.getBoundingClientRect().right > innerWidth + 1);
    const { scrollWidth, clientWidth } = document.documentElement;
    return [innerWidth, scrollWidth - clientWidth, out.map((part) => part.outerHTML.slice(0, 80))];"""


def test_400_pixels_are_wide_enough(driver, tmp_path):
    report, timelines = measured(EMULATED)
    open_page(driver, tmp_path / "report.html", report, timelines)
    look(driver, width=400)
    until(driver, lambda: canvas_of(driver).size["width"] < 400, "the picture to be narrower", 30)
    assert driver.execute_script(NARROW) == [400, 0, []], "the window's width, what is beyond it, and which part"
    assert driver.get_log("browser") == []


INK = """const c = arguments[0], d = c.getContext('2d').getImageData(0, 0, 100 * devicePixelRatio, c.height).data;
    let sum = 0, count = 0;
    for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 200) { sum += d[i]; count++; }
    return sum / count;"""


def test_dark_and_light_are_the_readers_and_both_can_be_read(driver, tmp_path):
    report, timelines = measured(EMULATED)
    open_page(driver, tmp_path / "report.html", report, timelines)
    colours = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    light, ink = driver.execute_script(colours), driver.execute_script(INK, canvas_of(driver))
    look(driver, "dark")
    wait(driver, "return document.body.dataset.theme === 'dark'", "the page to be dark", 30)
    until(driver, lambda: driver.execute_script(INK, canvas_of(driver)) > 200, "the picture's words to be light", 30)
    assert ink < 60, "they were dark before"
    dark = driver.execute_script(colours)

    def grey(colour: str) -> float:
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    assert grey(light[0]) < 60 < 200 < grey(light[1])
    assert grey(dark[1]) < 60 < 200 < grey(dark[0])
    for width in (1300, 400):
        look(driver, "dark", width)
        wait(driver, f"return innerWidth === {width}", "the new width", 30)
        picture_of(driver, f"report-dark-{width}", tmp_path)


SHOWN = "return ['#timeline-view', '.still', 'nav', '.buttons'].map((s) => document.querySelector(s).offsetHeight > 0)"


def test_on_paper_and_without_scripts_the_timeline_is_a_picture(driver, tmp_path):
    report, timelines = measured(EMULATED)
    open_page(driver, tmp_path / "report.html", report, timelines)
    assert driver.execute_script(SHOWN) == [True, False, True, True]
    look(driver, media="print")
    assert driver.execute_script(SHOWN) == [False, True, False, False]
    picture_of(driver, "report-print", tmp_path)
    look(driver)
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        driver.get((tmp_path / "report.html").as_uri())
        assert driver.execute_script(SHOWN) == [False, True, True, False]
        assert driver.execute_script("return document.querySelector('.still img').naturalWidth") > 1000
        assert "Scripts do not run here" in driver.find_element("tag name", "main").text
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_what_is_left_out_is_drawn_and_told_as_left_out(driver, tmp_path, monkeypatch):
    from selenium.webdriver.common.action_chains import ActionChains

    report, _ = measured()
    monkeypatch.setattr(document, "MOST_SPANS", 1000)
    open_page(driver, tmp_path / "report.html", report, [made_run("sync", 300), made_run("async", 300, active=1.0)])
    answered(driver, driver.find_element("css selector", "button[data-to]").click)
    canvas = canvas_of(driver)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    told = {}
    for x in (-0.4, 0.05):
        texts = set()
        for y in range(-int(canvas.size["height"] / 2) + 5, int(canvas.size["height"] / 2), 6):
            ActionChains(driver).move_to_element_with_offset(canvas, int(x * canvas.size["width"]), y).perform()
            text = driver.find_element("css selector", ".asyncbatch-tip").text
            texts.add(re.sub(r"step \d+,.*", "step", text))
        told[x] = texts
    assert "left out of this page" in told[-0.4]
    assert "left out of this page" not in told[0.05], "the middle is kept"
    assert {"sync, compute: step, step", "async, compute: step, step"} & told[-0.4], "steps are kept everywhere"
    assert not [text for text in told[-0.4] if "host" in text or "copy" in text]
    picture_of(driver, "report-left-out", tmp_path)
    assert driver.get_log("browser") == []


def test_the_page_of_several_ranks_fits_a_wide_and_a_narrow_window(driver, tmp_path):
    runs = [shared_model("sync"), shared_model("async", begins_ms=(0.0, 1.0))]
    made = report_on(*(measured_by([ranks], ranks[0].timeline.label) for ranks in runs))
    write_page(tmp_path / "report.html", made, [ranks[0].timeline for ranks in runs], runs)
    open_offline(driver, tmp_path / "report.html")
    tables = driver.find_elements("css selector", "table caption")
    assert [one.text for one in tables if "in collectives" in one.text] == [
        f"{mode}: ranks; in collectives and waiting are shares of a decode step on the device"
        for mode in ("sync", "async")
    ]
    assert "added up: the waiting for the slowest rank" in driver.find_element("tag name", "body").text
    for width in (1280, 390):
        look(driver, width=width)
        wait(driver, f"return innerWidth === {width}", "the new width", 30)
        widest = driver.execute_script("return document.documentElement.scrollWidth")
        assert widest <= width, "tables scroll by themselves"
        picture_of(driver, f"ranks-{width}", tmp_path)
    assert driver.get_log("browser") == []

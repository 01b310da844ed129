"""The report's page in a real browser: opened offline, and its timeline asked to do something."""

from __future__ import annotations

from pathlib import Path

from asyncbatch.profile.page import write_page
from asyncbatch.profile.report import Report

from .browser import until, wait

LIVE = (
    "return document.documentElement.classList.contains('live') && document.querySelector('canvas').dataset.drawMs > 0"
)


def look(driver, scheme: str = "light", width: int = 1300, media: str = "") -> None:
    """From now on the page is seen in this colour scheme, at this width, on this medium."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [feature]})
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def open_page(driver, path: Path, report, timelines) -> None:
    """Write a page and open it, offline, light and wide."""
    write_page(path, Report.from_json(report), timelines)
    open_offline(driver, path)


def open_offline(driver, path: Path) -> None:
    driver.get_log("browser")  # of the page before
    driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    look(driver)
    driver.get(path.as_uri())
    wait(driver, LIVE, "the timeline to be drawn", 30)


def canvas_of(driver):
    return driver.find_element("css selector", "#timeline-view canvas[tabindex]")


def view(driver) -> tuple[float, float]:
    low, high = canvas_of(driver).get_attribute("data-view").split()
    return float(low), float(high)


def answered(driver, action) -> tuple[float, float]:
    """The view after the action, which has to change it."""
    old = view(driver)
    action()
    until(driver, lambda: view(driver) != old, "the picture to answer", 30)
    return view(driver)

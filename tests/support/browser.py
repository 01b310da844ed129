"""A real browser for the tests: Chromium, headless, driven by selenium. It reaches 127.0.0.1 and nothing else.

ASYNCBATCH_SCREENSHOTS=folder keeps the screenshots.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

PATIENCE = 120  # seconds for anything that takes a few on a quiet machine
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")


def need_browser(*packages: str) -> None:
    """Skip the test where Chromium, its driver, selenium or one of these packages is missing. CI=true makes that a
    failure."""
    present = {name: find_spec(name) for name in ("selenium", *packages)}
    present |= {"chromium": CHROMIUM, "chromedriver": CHROMEDRIVER}
    missing = ", ".join(name for name, place in present.items() if not place)
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"the browser tests need {missing}")
    if missing:
        pytest.skip(f"not installed: {missing}")


@contextlib.contextmanager
def browse(profile: Path, **capabilities) -> Iterator:
    """Start a headless Chromium that keeps its files in the folder `profile`, and yield the selenium driver.

    capabilities: what else WebDriver is asked for, as {"goog:loggingPrefs": {"performance": "ALL"}}."""
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
    for name, value in capabilities.items():
        options.set_capability(name, value)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    try:
        driver.set_page_load_timeout(PATIENCE)
        yield driver
    finally:
        driver.quit()


def wait(driver, script: str, what: str, patience: float = PATIENCE):
    """Return the first true value of a script in the page. Raises selenium's TimeoutException, which says `what`."""
    return until(driver, lambda: driver.execute_script(script), what, patience)


def until(driver, ask, what: str, patience: float = PATIENCE):
    """Return the first true value of the function `ask`. Raises selenium's TimeoutException, which says `what`."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, patience, poll_frequency=0.1).until(lambda _: ask(), f"waited {patience} s for {what}")


def screenshot(driver, name: str, folder: Path) -> None:
    """Save what is in view as `name`.png, in ASYNCBATCH_SCREENSHOTS or, where that is not set, in `folder`."""
    folder = Path(os.environ.get("ASYNCBATCH_SCREENSHOTS") or folder)
    folder.mkdir(parents=True, exist_ok=True)
    driver.save_screenshot(str(folder / f"{name}.png"))

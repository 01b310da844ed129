"""Open every page of the site from its folder, in a real browser, and say what is wrong.

Wrong are: a request that would leave the machine, a link or a part of a page that leads nowhere, a picture without alt
text, a page wider than a phone, code broken within a word in a table there, an error of a script, a search that finds
nothing, a page that does not get dark.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TESTS = str(Path(__file__).resolve().parents[2] / "tests")
PHONE, DESKTOP = (390, 844), (1366, 768)
PATIENCE_S = 60  # for a search; a machine may be busy
GATHER = """
const links = [...document.querySelectorAll('a[href], link[href]')].map(e => e.href);
const parts = [...document.querySelectorAll('img[src], script[src], iframe[src]')].map(e => e.src);
return {
  targets: [...links, ...parts],
  ids: [...document.querySelectorAll('[id]')].map(e => e.id),
  without_alt: [...document.querySelectorAll('img')].filter(e => !e.alt.trim()).map(e => e.src),
};
"""

# In a table: short code that is broken within a word (but at a hyphen). Each line of inline text is a rectangle.
BROKEN = """
const words = e => e.textContent.trim().split(/[\\s-]+/).length;
return [...document.querySelectorAll('td code')].filter(e => e.textContent.trim().length < 20)
  .filter(e => e.getClientRects().length > words(e)).map(e => e.textContent);
"""


def report(site: Path, pictures: Path | None = None) -> int:
    """Look at the site and print what was found. Returns the exit status: 1 if something is wrong."""
    sys.path.insert(0, TESTS)
    from support.browser import CHROMEDRIVER, CHROMIUM

    if not (CHROMIUM and CHROMEDRIVER):
        print("Nobody has looked at it: chromium and chromedriver are not installed.")
        return 0
    pages, faults = look(site, pictures)
    for fault in faults:
        print(fault, file=sys.stderr)
    print(
        f"{len(pages)} pages opened from their folder, in {len((PHONE, DESKTOP))} widths: {len(faults) or 'no'} faults"
    )
    return 1 if faults else 0


def look(site: Path, pictures: Path | None = None) -> tuple[list[str], list[str]]:
    """Open every page. Returns the pages, and what is wrong, a line for each fault."""
    sys.path.insert(0, TESTS)
    from support.browser import browse

    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html") if "_static" not in path.parts)
    found: dict[str, dict[str, Any]] = {}
    faults = []
    with tempfile.TemporaryDirectory() as profile, browse(Path(profile), **_everything_logged()) as driver:
        for page in pages:
            _resize(driver, DESKTOP)
            driver.get((site / page).as_uri())
            found[page] = driver.execute_script(GATHER)
            faults += [f"{page}: a picture without alt text: {each}" for each in found[page]["without_alt"]]
            _resize(driver, PHONE)
            width = driver.execute_script("return document.documentElement.scrollWidth")
            if width > PHONE[0]:
                faults.append(f"{page}: {width} pixels wide on a phone of {PHONE[0]}")
            if broken := driver.execute_script(BROKEN):
                faults.append(f"{page}: broken within a word on a phone: {', '.join(broken[:5])}")
            faults += [f"{page}: {problem}" for problem in _requests_and_errors(driver)]
        faults += _search(driver, site) + _dark(driver, site)
        if pictures:
            _take_pictures(driver, site, pages, pictures)
    return pages, faults + broken_links(site, found)


def _everything_logged() -> dict[str, Any]:
    return {"goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"}}


def _resize(driver: Any, size: tuple[int, int]) -> None:
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def _requests_and_errors(driver: Any) -> list[str]:
    """What was asked for outside of the folder since the last call, and what scripts complained of."""
    problems = []
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
            url = message["params"].get("request", message["params"]).get("url", "")
            if not re.match(r"(file|data|blob|about|chrome)[:-]", url):
                problems.append(f"asks for {url}")
    problems += [
        f"a script says {entry['message']}" for entry in driver.get_log("browser") if entry["level"] == "SEVERE"
    ]
    return problems


def broken_links(site: Path, found: dict[str, dict[str, Any]]) -> list[str]:
    """Links from the pages `found` (page -> targets, ids) to files that are not there or to parts that no page has."""
    faults = []
    for page, parts in found.items():
        for target in sorted(set(parts["targets"])):
            url = urlsplit(target)
            if url.scheme != "file":
                continue
            path = Path(unquote(url.path))
            if not path.exists():
                faults.append(f"{page}: a link to {path}, which is not there")
            elif url.fragment and path.suffix == ".html" and path.is_relative_to(site):
                ids = found.get(path.relative_to(site).as_posix(), {}).get("ids", [])
                if unquote(url.fragment) not in ids:
                    faults.append(f"{page}: a link to {path.name}#{url.fragment}, which has no such part")
    return faults


def _search(driver: Any, site: Path) -> list[str]:
    from support.browser import wait

    _resize(driver, DESKTOP)
    driver.get((site / "search.html").as_uri() + "?q=wasted")
    try:
        wait(driver, "return document.querySelectorAll('#search-results li a').length", "something found", PATIENCE_S)
    except Exception as error:
        return [f"search.html finds nothing: {str(error).splitlines()[0]}"]
    return []


def _dark(driver: Any, site: Path) -> list[str]:
    driver.get((site / "index.html").as_uri())
    ground = "return getComputedStyle(document.body).backgroundColor"
    grounds = {}
    for mode in ("light", "dark"):
        driver.execute_script(
            f"document.documentElement.dataset.mode = document.documentElement.dataset.theme = '{mode}'"
        )
        grounds[mode] = driver.execute_script(ground)
    if not driver.execute_script("return document.querySelectorAll('.theme-switch-button').length"):
        return ["no button turns the pages dark"]
    return ["the dark page is as light as the other"] if grounds["light"] == grounds["dark"] else []


def _take_pictures(driver: Any, site: Path, pages: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for page in pages:
        for mode in ("light", "dark"):
            for name, size in (("desktop", DESKTOP), ("phone", PHONE)):
                _resize(driver, size)
                driver.get((site / page).as_uri())
                driver.execute_script(
                    f"localStorage.setItem('mode', '{mode}'); localStorage.setItem('theme', '{mode}')"
                )
                driver.refresh()
                driver.save_screenshot(str(folder / f"{page.replace('/', '-')}-{name}-{mode}.png"))

"""What the page's timeline says of what is under the mouse: also of gaps, and also after the picture moved under it.

Needs selenium, chromium and chromedriver; skipped where one is missing, but CI=true makes that a failure.
"""

from __future__ import annotations

import pytest
from support.browser import browse, need_browser
from support.page_browser import answered, canvas_of, open_page, view
from support.reports import measured
from support.timelines import steady_run

from asyncbatch.profile.document import gap_causes
from asyncbatch.timeline import Timeline

PERIOD, IDLE = 10e-3, 2e-3  # of `steady_run`


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of one run of 100 steps, each after a gap of 2 ms in which the host plans; the mouse is nowhere yet."""
    need_browser()
    folder = tmp_path_factory.mktemp("tooltip")
    with browse(folder / "chromium") as driver:
        open_page(driver, folder / "report.html", measured()[0], [steady_run("sync", 100)])
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas_of(driver))
        canvas_of(driver).click()
        yield driver


def point(driver, x: int) -> tuple[int, int]:
    """Put the mouse on the compute lane, `x` pixels from the left; found by asking for a tooltip of that lane."""
    from selenium.webdriver.common.action_chains import ActionChains

    canvas = canvas_of(driver)
    for y in range(10, canvas.size["height"], 6):
        offset = x - int(canvas.size["width"] / 2), y - int(canvas.size["height"] / 2)
        ActionChains(driver).move_to_element_with_offset(canvas, *offset).perform()
        if ", compute: " in told(driver):
            return offset
    raise AssertionError("no tooltip tells of the compute lane")


def told(driver) -> str:
    """The tooltip; "" if it is not seen."""
    return driver.find_element("css selector", ".asyncbatch-tip").text


def expected_at(driver, x: int) -> str:
    """How the tooltip begins for a mouse at `x`, worked out from the view alone: step n runs from 10 n + 2 to 10 n + 10
    ms, and the run begins with the planning of step 0."""
    low, high = view(driver)
    width = canvas_of(driver).size["width"]
    step, within = divmod(low + (x - 108) / (width - 108 - 10) * (high - low), PERIOD)
    if within < IDLE:
        return f"sync, compute: idle for 2 ms before step {step:.0f}"
    return f"sync, compute: step, step {step:.0f}, 8 ms, from "


def test_a_gap_says_how_long_it_is_and_why_and_nothing_goes_stale(page):
    driver = page
    x = 500
    point(driver, x)
    seen = set()
    for key in ("+", "+", "+", "\ue014", "\ue014", "\ue014", "\ue012", "-", "\ue014", "+", "+", "\ue012", "0"):
        answered(driver, lambda key=key: canvas_of(driver).send_keys(key))
        text = told(driver)
        assert text.startswith(expected_at(driver, x)), key
        seen.add(text)
    assert {": idle for" in text for text in seen} == {True, False}, "both were under the mouse"


def test_a_gap_has_its_cause_before_a_decode_step_and_before_a_prefill_step(page):
    driver = page
    causes = {step: (cause, share) for step, cause, share in gap_causes(steady_run("sync", 100))}
    point(driver, 500)
    told_of = {}
    canvas, width = canvas_of(driver), canvas_of(driver).size["width"]
    for step in (49, 50, 51):  # the middle of the gap before it, in the middle of the picture
        middle, half = step * PERIOD + IDLE / 2, 4e-3
        x = 108 + (width - 118) / 2 - 500  # from the mouse to the middle of the lanes, in pixels
        moved = x / (width - 118) * 2 * half
        detail = [middle - half + moved, middle + half + moved]
        script = "arguments[0].dispatchEvent(new CustomEvent('show-time', {detail: arguments[1]}))"
        answered(driver, lambda detail=detail, script=script: driver.execute_script(script, canvas, detail))
        told_of[step] = told(driver)
    cause, share = causes[49]
    assert (cause, round(share, 6)) == ("schedule", 1), "the host's planning, by the name of its latency point"
    for step in (49, 50, 51):
        assert told_of[step] == f"sync, compute: idle for 2 ms before step {step}: {cause} ({100 * share:.0f} % of it)"


def test_the_tooltip_goes_while_dragging_and_when_the_mouse_has_left(page):
    from selenium.webdriver.common.action_chains import ActionChains

    driver = page
    point(driver, 500)
    assert told(driver)
    ActionChains(driver).click_and_hold().move_by_offset(-40, 0).perform()
    assert told(driver) == ""
    ActionChains(driver).release().perform()
    assert told(driver).startswith(expected_at(driver, 460))
    ActionChains(driver).move_to_element(driver.find_element("tag name", "h1")).perform()
    assert told(driver) == ""
    answered(driver, lambda: canvas_of(driver).send_keys("+"))
    assert told(driver) == "", "nothing is under the mouse"


def test_gaps_of_rounding_errors_have_no_causes():
    assert list(gap_causes(steady_run("async", 300, active=1.0))) == []


def test_gaps_of_a_bounded_timeline_have_no_causes():
    timeline = Timeline("sync", most_steps=2)
    for step in range(5):
        timeline.add("compute", "step", step, step, step + 0.5)
        timeline.add_step(step, "decode", 1, 0)
    assert timeline.dropped
    assert list(gap_causes(timeline)) == []

"""The notebooks as a reader uses them: run in a real JupyterLab in a real browser, sliders moved, exercises answered.

Needs jupyterlab, anywidget, selenium, chromium and chromedriver; skipped where one is missing, but CI=true makes that a
failure. ASYNCBATCH_SCREENSHOTS=folder takes all notebooks and keeps the screenshots.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator

import pytest
from support import jupyterlab
from support.browser import PATIENCE, screenshot, until, wait
from support.jupyterlab import ROOT, Lab, SilentKernel, assert_no_errors, open_lab, run_notebook, write_notebook
from support.wrong_answers import cell_source, wrong_answers

from asyncbatch.lessons.exercises import EXERCISES

# nbval runs every notebook. Here CI takes three of them, to stay within its 20 minutes; with screenshots all are taken.
TAKEN = ("*.ipynb",) if os.environ.get("ASYNCBATCH_SCREENSHOTS") else ("00_*.ipynb", "02_*.ipynb", "03_*.ipynb")
NOTEBOOKS = sorted(path for pattern in TAKEN for path in (ROOT / "notebooks").glob(pattern))
CHECK = re.compile(r'^(\w+) = teach\.check\("(\w+)", \1\)', re.MULTILINE)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    with open_lab(tmp_path_factory.mktemp("jupyterlab")) as lab:
        yield lab


def test_a_silent_kernel_is_reported_and_replaced(lab, tmp_path, monkeypatch, capsys):
    kernels, really_run_all = [], jupyterlab.run_all

    def silent_at_first(lab: Lab) -> list[dict]:
        kernels.append(lab.api("GET", "kernels")[0]["id"])
        if len(kernels) == 1:
            raise SilentKernel("not a word")
        return really_run_all(lab)

    monkeypatch.setattr(jupyterlab, "run_all", silent_at_first)
    with run_notebook(lab, write_notebook(tmp_path / "example.ipynb", "6 * 7")) as (cell,):
        assert cell["outputs"][0]["data"]["text/plain"] == "42"
    assert len(set(kernels)) == 2, "a new kernel"
    out = capsys.readouterr().out
    assert "example.ipynb: not a word; 2 tries left" in out
    assert "Kernel started" in out


def test_what_is_written_in_one_notebook_is_used_in_another(lab, tmp_path):
    teach, answers = "from asyncbatch.lessons import teach", lab.folder / "notebooks" / "my-answers"
    helper = "def turn(step, num_slots):\n    return step % num_slots"
    own = "def slot_of(step, num_slots):\n    return turn(step, num_slots)"
    first = write_notebook(tmp_path / "first.ipynb", teach, helper, own, 'slot_of = teach.check("slot_of", slot_of)')
    second = write_notebook(tmp_path / "second.ipynb", teach, 'slot_of = teach.yours("slot_of")', "slot_of(7, 4)")
    try:
        with run_notebook(lab, second) as (_, told, value):
            assert "the package's own (my-answers holds none of yours)" in str(told["outputs"])
            assert not answers.exists()
        with run_notebook(lab, first) as cells:
            assert "It is kept for later notebooks, in my-answers/slot_of.py." in str(cells[-1]["outputs"])
        with run_notebook(lab, second) as (_, told, value):
            assert told["outputs"][0]["text"] == "slot_of: yours, from my-answers/slot_of.py.\n"
            assert value["outputs"][0]["data"]["text/plain"] == "3"
    finally:
        shutil.rmtree(answers, ignore_errors=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_as_its_reader_uses_it(path, lab, tmp_path):
    with run_notebook(lab, path) as cells:
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
    """Zoom into the page's first timeline with the + key, which halves its window. False where there is none."""
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
    """Drag the page's first slider, then type into the box beside it: both must give a new picture. False where there
    is no slider."""
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
    """Write `source` into the stub of the exercise `name`, run stub and check, and return what the check prints."""
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

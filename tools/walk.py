"""The route of tools/route.py, walked in a real browser: JupyterLab, copies for a class, a kernel for each notebook.

Each cell is run as a participant runs it, one after the other. Of a prediction the first option is clicked, right or
wrong; of an exercise a planted wrong answer is written and checked, and then the right one. What is left out on the
route is not run. Kept is, for each cell, the processor time of its kernel and the kernel's children, or the seconds on
the clock until the page has drawn what it shows, whichever is less: so a busy machine may walk too.

Needs jupyterlab, selenium, chromium and chromedriver. ASYNCBATCH_SCREENSHOTS=folder keeps a picture of every cell.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from tools import lessons, notebooks, route

# JavaScript: run one cell; `window.walked` holds the milliseconds until what it shows is drawn, and its outputs.
RUN = """const [id, source] = arguments, app = window.jupyterapp, notebook = app.shell.currentWidget.content;
    const number = notebook.widgets.findIndex((cell) => cell.model.id === id), cell = notebook.widgets[number];
    if (source !== null) { cell.model.sharedModel.setSource(source); }
    notebook.deselectAll(); notebook.activeCellIndex = number; cell.node.scrollIntoView();
    const began = performance.now(), drawn = () => {
        window.walked = [performance.now() - began, cell.model.toJSON().outputs]; };
    window.walked = null;
    app.commands.execute('notebook:run-cell').then(() => requestAnimationFrame(() => requestAnimationFrame(drawn)));"""
# Planted wrong answers that are not source of their own: this one is "no waits", as the notebook has it above.
PASTED = {"launch_step": "launch_step = hasty_step"}
CLICK = "const all = arguments[0].querySelectorAll('.widget-toggle-button'); all[0]?.click(); return all.length"


def walk() -> None:
    """Walk all blocks and write what was measured to route.WALKED. AssertionError for a cell that ends with an error,
    or an answer that its check takes for another."""
    from support.jupyterlab import open_lab

    measured: dict[str, Any] = {"seconds": {}, "on": datetime.date.today().isoformat()}
    measured["where"] = f"{os.cpu_count()} cores, Python {platform.python_version()}, {platform.system()}"
    with tempfile.TemporaryDirectory() as folder, open_lab(Path(folder)) as lab:
        notebooks.make_copies(sorted(notebooks.FOLDER.glob("*.ipynb")), lab.folder / "notebooks", "students")
        for block in route.ROUTE:
            for number in dict.fromkeys(passage.notebook for passage in block.passages):
                passages = [passage for passage in block.passages if passage.notebook == number]
                print(f"notebook {number}", flush=True)
                measured["seconds"][number] = walk_notebook(lab, passages, block.exercises)
    route.WALKED.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n", encoding="utf-8", newline="\n")


def walk_notebook(lab: Any, passages: list[route.Passage], exercises: dict[str, int]) -> dict[str, float]:
    """Open the copy of a notebook, and run its passages: cell id -> seconds."""
    from support import jupyterlab

    (path,) = (lab.folder / "notebooks").glob(f"{passages[0].notebook}_*.ipynb")
    found = {each.stub: each.name for each in lessons.exercises(lessons.read(path))}
    found = {lessons.read(path).cells[number].id: name for number, name in found.items() if name in exercises}
    seconds: dict[str, float] = {}
    with jupyterlab.start_kernel(lab, f"notebooks/{path.name}") as kernel, jupyterlab.keep_awake(lab, kernel):
        jupyterlab.await_answer(lab, kernel)
        jupyterlab.open_page(lab, f"notebooks/{path.name}")
        for passage in passages:
            cells = [cell for cell in route.cells_of(passage) if cell.cell_type == "code"]
            for cell, after in zip(cells, [*cells[1:], None], strict=True):
                if cell.id in found and after is not None:
                    run_exercise(lab, found[cell.id], cell.id, after.id)
                busy = processor_s(kernel)
                clock = run(lab, cell.id)[0]
                seconds[cell.id] = round(min(clock, processor_s(kernel) - busy), 2)
                if passage.read and lessons.asks(cell):
                    click(lab)
    return seconds


def processor_s(kernel: str) -> float:
    """Seconds that processors have worked for a kernel and for all that it started and that still runs."""
    (process,) = (each for each in psutil.process_iter(["cmdline"]) if f"kernel-{kernel}.json" in str(each.info))
    each_used = (each.cpu_times() for each in [process, *process.children(recursive=True)])
    ended = process.cpu_times()
    return sum(used.user + used.system for used in each_used) + ended.children_user + ended.children_system


def run(lab: Any, cell_id: str, source: str | None = None) -> tuple[float, str]:
    """Run a cell, with another source where one is given: (seconds, what it prints)."""
    from support.browser import screenshot
    from support.jupyterlab import ANSWER_S, SilentKernel, any_busy, assert_no_errors

    lab.driver.execute_script(RUN, cell_id, source)
    idle_since = time.monotonic()
    while not (done := lab.driver.execute_script("return window.walked")):
        if any_busy(lab):
            idle_since = time.monotonic()
        if time.monotonic() - idle_since > ANSWER_S:
            raise SilentKernel(f"{cell_id} does not end, and no kernel works")
        time.sleep(0.05)
    ms, outputs = done
    assert_no_errors([{"outputs": outputs}])
    if os.environ.get("ASYNCBATCH_SCREENSHOTS"):
        screenshot(lab.driver, cell_id, Path())
    return ms / 1000, "".join(output.get("text", "") for output in outputs)


def run_exercise(lab: Any, name: str, stub: str, check: str) -> None:
    """Write a planted wrong answer and see it refused, then the right one and see it taken."""
    from support.wrong_answers import cell_source, wrong_answers

    from asyncbatch.lessons.exercises import EXERCISES

    wrong = PASTED.get(name) or cell_source(wrong_answers()[name][0], name)
    for source, said in ((wrong, "not yet."), (cell_source(EXERCISES[name].reference, name), "right in all")):
        run(lab, stub, source)
        text = run(lab, check)[1]
        assert f"{name}: {said}" in text, text


def click(lab: Any) -> None:
    """Click the first option of the prediction that was asked last."""
    from support.browser import until

    def clicked() -> bool:
        boxes = lab.driver.find_elements("css selector", ".jp-OutputArea .widget-toggle-buttons")
        return bool(boxes) and lab.driver.execute_script(CLICK, boxes[-1]) > 1

    until(lab.driver, clicked, "the buttons of a prediction")

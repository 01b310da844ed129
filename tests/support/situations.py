"""The report in four situations, made on the virtual clock: the same to the last digit on every machine.

    PYTHONPATH=. python tests/support/situations.py OUT

writes for each of them the page, its screenshots at 1280 and 390 pixels, whole, and what a terminal of 100 and of 60
columns shows. To be looked at by whoever changes what a report says.
"""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.browser import browse
from support.page_browser import look, open_offline

from asyncbatch import Request, Timeline
from asyncbatch.devices.virtual import Costs
from asyncbatch.measure.point_recorder import record_points
from asyncbatch.models.toy import toy_llama
from asyncbatch.profile.diagnosis import Place, make_report
from asyncbatch.profile.measurement import Measurement
from asyncbatch.profile.options import parse_arguments
from asyncbatch.profile.page import write_page
from asyncbatch.profile.report import Report
from asyncbatch.profile.settings import settle
from asyncbatch.profile.terminal import show
from asyncbatch.profile.turns import BATCHERS
from asyncbatch.profile.workload import Sizes

WIDTHS, COLUMNS = (1280, 390), (100, 60)


class Situation(NamedTuple):
    """What a machine is like. host_ms, step_ms: of the host's parts of a step together, and of a decode step. new: new
    tokens of a request. prompt: its tokens. pairs: of runs. disturbed: the pairs in whose asynchronous run every step
    takes 1.6 times as long."""

    host_ms: float
    step_ms: float
    new: int = 48
    prompt: int = 16
    pairs: int = 6
    disturbed: tuple[int, ...] = ()


SITUATIONS = {
    "nothing to gain": Situation(host_ms=0.05, step_ms=14.0),
    "a lot to gain": Situation(host_ms=3.2, step_ms=4.0),
    "disturbed machine": Situation(host_ms=3.2, step_ms=4.0, disturbed=(0, 2, 3, 5)),
    "few steps": Situation(host_ms=1.5, step_ms=5.0, new=6, prompt=200, pairs=1),
}


def costs(one: Situation, mode: str, pair: int) -> Costs:
    share, slow = 1e-3 * one.host_ms, 1.6 if mode == "async" and pair in one.disturbed else 1.0
    return Costs(
        plan=0.45 * share, fill=0.25 * share, launch=0.1 * share, commit=0.2 * share, copy_in=20e-6, copy_out=15e-6,
        step=lambda work: 1e-3 * slow * one.step_ms * (1 + 2e-3 * work.num_prefill_tokens),
        jitter=0.03, seed=2 * pair + (mode == "async"),
    )  # fmt: skip


def measured(one: Situation) -> tuple[Report, list[Timeline]]:
    """The report of a situation, and the timelines of its runs."""
    arguments = f"--model random:llama-1b --requests 12 --new-tokens {one.new} --repeats {one.pairs}"
    settings = settle(parse_arguments([*arguments.split(), "--prompt-tokens", str(one.prompt)]))
    (workload,), length = settings.workloads, one.prompt + one.new
    requests = [Request([1 + n] * one.prompt, one.new, stop_token_ids=()) for n in range(12)]
    measurements = []
    for mode, kind in BATCHERS.items():
        made = Measurement(workload, Sizes(one.prompt, one.new, length), "asyncbatch", mode)
        made.prompts, made.limits = (one.prompt,) * 12, (one.new,) * 12
        for pair in range(one.pairs):
            clock = costs(one, mode, pair)
            with kind(toy_llama(), clock=clock, step_s=0.0, max_length=length, prefill_tokens=64) as batcher:
                with record_points(batcher):
                    completions = batcher.run(requests)
                made.runs.append((batcher.timeline, completions))
        measurements.append(made)
    report, timelines = make_report(settings, measurements, Place("a virtual device"))
    return report, timelines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def in_terminal(report: Report, columns: int) -> str:
    """What a terminal of so many columns is sent, without colours; it breaks what is longer at its right edge."""
    file = Terminal()
    with mock.patch.dict(os.environ, {"COLUMNS": str(columns), "TERM": "xterm"}):
        show(report, file)
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


def broken(text: str, columns: int) -> str:
    """The text as it stands there on the screen."""
    lines = (line[at : at + columns] for line in text.splitlines() for at in range(0, max(len(line), 1), columns))
    return "\n".join(lines) + "\n"


def whole_page(driver, path: Path, width: int) -> None:
    """Save all of the page at this width."""
    look(driver, width=width)
    height = driver.execute_script("return document.documentElement.scrollHeight")
    size = {"width": width, "height": min(height, 6000), "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.save_screenshot(str(path))


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, browse(Path(profile)) as driver:
        for name, one in SITUATIONS.items():
            report, timelines = measured(one)
            stem = out / name.replace(" ", "-")
            write_page(stem.with_suffix(".html"), report, timelines)
            open_offline(driver, stem.with_suffix(".html").resolve())
            for width in WIDTHS:
                whole_page(driver, Path(f"{stem}-{width}.png"), width)
            for columns in COLUMNS:
                Path(f"{stem}-{columns}.txt").write_text(broken(in_terminal(report, columns), columns))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

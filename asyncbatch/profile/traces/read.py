"""A profiler's trace of any engine: how idle was its GPU, why, and what would overlapping bring?

    python -m asyncbatch.profile --trace vllm.pt.trace.json.gz

`read_trace` takes what `torch.profiler` exports (Chrome trace JSON, also .gz), checks that nothing is missing, finds
the compute stream and where each step begins and ends, and says what the host was doing in each gap of the device. The
file is read event by event, so a large one needs little memory: docs/traces.md says how much.

There are two methods, as everywhere in this project. **Step active** counts the compute stream as active from the first
to the last kernel of a step, over the time from the end of the first step to the end of the last, as
`timeline.device_activity` does. **Kernel busy** is the union of all kernel, copy and memset intervals of the device,
over a window.

Times are whole nanoseconds while anything is added up, and seconds in what is returned; 0 is the beginning of the first
kernel or copy of the device.

It is tested on traces that are made up (tests/support/make_trace.py), on a CPU-only trace of torch.profiler itself, and
on traces of this project's own GPU runs (tests/profile/traces), whole and with events taken out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from .analysis import report_on
from .events import TraceError
from .files import read_events
from .intervals import covered_share
from .report import TraceReport


def read_trace(path: str | os.PathLike, progress: bool = False, graphs: Sequence[int] | None = None) -> TraceReport:
    """The report on a trace file. `progress` shows a bar on stderr for files larger than 20 MB. `graphs`: a number from
    1 for each graph launch in it, in order, the same for launches that bring the same kernels, where the caller knows.

    TraceError, with one line that says what was found, for a file that cannot be read, is not JSON, is cut off, or has
    no events or none of a device. If there are several devices, the one with most kernel time is reported, and a note
    says so."""
    path = Path(path)
    events = read_events(path, progress)
    try:
        return report_on(path.name, events, graphs)
    except TraceError as error:
        raise TraceError(f"{path} {error}") from None


def busy_in(trace: str | os.PathLike | TraceReport, start_s: float | None = None, end_s: float | None = None) -> float:
    """Kernel busy from `start_s` to `end_s`: the share in which any kernel, copy or memset ran on the device.

    `trace` is a file or a report. The times are seconds as in the report; None stands for its first or last event.
    TraceError for a file as in `read_trace`, and where events of the device are missing; ValueError for an empty
    window."""
    report = trace if isinstance(trace, TraceReport) else read_trace(trace)
    if not report.coverage.complete:
        raise TraceError(
            f"{report.label} does not tell how busy the device was: {'; '.join(report.coverage.problems())}"
        )
    start = 0.0 if start_s is None else start_s
    end = report.window_s if end_s is None else end_s
    if not (math.isfinite(start) and math.isfinite(end) and start < end):
        raise ValueError(f"the window is {start} to {end} s; allowed are finite times with start_s < end_s")
    return covered_share(report.busy_ns, round(1e9 * start), round(1e9 * end))

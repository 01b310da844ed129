"""The command line of the profiling script: what each call does, what it prints, and its exit status."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from ..streams import DeviceError
from . import compare
from .console import one_line, tell
from .options import Arguments, flag, parse_arguments
from .outputs import OutError, Output, make_folder, write_all, write_json
from .report import OWN, Report
from .session import Session
from .terminal import show


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says (None: of this process). Returns the exit status, see the end of `--help`."""
    options = parse_arguments(arguments)
    if options.trace is not None:
        return main_trace(options)
    try:
        if options.compare:
            a, b = options.compare
            text, status = compare.run(a, b, options.json, options.threshold, options.figures)
            print(text)
            return status
        return main_session(options)
    except OutError as error:
        if options.debug:
            raise
        tell(f"asyncbatch.profile: {error}")
        return 1
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        if options.debug:
            raise
        tell("asyncbatch.profile: " + (one_line(error) if isinstance(error, DeviceError) else str(error).strip()))
        return 2
    except KeyboardInterrupt:
        tell("asyncbatch.profile: interrupted before anything was measured")
        return 130


def main_session(options: Arguments) -> int:
    """Measure, print the report, and write it with --out DIR. Returns the exit status, or raises what went wrong."""
    session, interrupted = Session(options), False
    if options.out is not None:  # before anything is measured: otherwise the results would be lost
        make_folder(options.out)
    try:
        session.run()
    except KeyboardInterrupt:
        if not session.measurements:
            raise
        interrupted = True  # what ran is not thrown away
        tell("asyncbatch.profile: interrupted; the report is about what ran")
    report, timelines = session.report()
    print(json.dumps(report.to_json(), indent=1)) if options.json else show(report)
    if options.out is not None:
        try:
            session.write((report, timelines))
        except OutError as error:
            if error.lost and not options.json:
                print(json.dumps(report.to_json(), indent=1))  # the last place that is left
            raise
    return 130 if interrupted else status_of(report)


def status_of(report: Report) -> int:
    """The exit status: 0, 1 for different tokens, 2 if this package, or everything, could not be measured."""
    if not report.runs or any(one.engine == OWN for one in report.failed):
        return 2
    return 0 if report.same_tokens else 1


def main_trace(options: Arguments) -> int:
    """`asyncbatch.profile --trace FILE`: print the report on a trace, and write it with --out DIR.

    Exit status 0, 2 with one line on stderr, or 1 if that is about --out."""
    try:
        _report_on_trace(options)
    except OutError as error:
        if options.debug:
            raise
        tell(f"asyncbatch.profile: {error}")
        return 1
    except (ValueError, OSError, MemoryError) as error:
        if options.debug:
            raise
        tell(f"asyncbatch.profile: {str(error).strip() or type(error).__name__}")
        return 2
    except KeyboardInterrupt:
        tell("asyncbatch.profile: interrupted")
        return 130
    return 0


def _report_on_trace(options: Arguments) -> None:
    from .traces.page import write_trace_page
    from .traces.read import read_trace  # the streaming JSON parser is needed for traces only

    assert options.trace is not None
    others = [name for name in options.changed if name not in ("trace", "json", "out", "debug")]
    if others:
        flags = ", ".join(sorted(map(flag, others)))
        raise ValueError(f"--trace reads a file and measures nothing: it cannot be had with {flags}")
    if options.out is not None:
        make_folder(options.out)
    tell(f"reading {options.trace} ...")
    report = read_trace(options.trace, progress=sys.stderr.isatty())
    print(json.dumps(report.as_dict(), indent=1) if options.json else report)
    if options.out is not None:
        from ..pictures import plot  # matplotlib is needed for pictures only

        picture = plot(report.timeline(), title=f"{report.label}, device {report.device}")
        outputs = (
            Output("report.html", lambda path: write_trace_page(path, report)),
            Output("report.json", lambda path: write_json(path, report.as_dict())),
            Output("trace-timeline.png", picture.savefig),
        )
        write_all(options.out, outputs)

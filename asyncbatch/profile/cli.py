"""The command line of the profiling script: what each call does, what it prints, and its exit status."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from ..streams import DeviceError
from . import compare
from .console import one_line, tell
from .options import parse_arguments
from .report import OWN
from .session import Session
from .terminal import show


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.trace is not None:
        return main_trace(options)
    interrupted = False
    try:
        if options.compare:
            a, b = options.compare
            print(compare.run(a, b, options.json))
            return 0
        session = Session(options)
        if options.out is not None:  # before anything is measured: otherwise the results would be lost
            options.out.mkdir(parents=True, exist_ok=True)
            if not os.access(options.out, os.W_OK):
                raise PermissionError(f"--out {options.out}: this folder cannot be written to")
        try:
            session.run()
        except KeyboardInterrupt:
            if not session.measured:
                raise
            interrupted = True  # what ran is not thrown away
            tell("asyncbatch.profile: interrupted; the report is about what ran")
        made = session.report()
        result = made[0]
        print(json.dumps(result, indent=1)) if options.json else show(result)
        if options.out is not None:
            session.write(made)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        if options.debug:
            raise
        tell("asyncbatch.profile: " + (one_line(error) if isinstance(error, DeviceError) else str(error).strip()))
        return 2
    except KeyboardInterrupt:
        tell("asyncbatch.profile: interrupted before anything was measured")
        return 130
    if interrupted:
        return 130
    if not result["runs"] or any(row["engine"] == OWN for row in result["failed"]):
        return 2
    return 0 if result["same_tokens"] else 1


def main_trace(options) -> int:
    """`asyncbatch.profile --trace FILE`: print the report, as a table or with --json, and write it with --out DIR.

    `options` has trace, json, out, debug, and changed: the names of all options that do not have their default. Exit
    status 0, or 2 with one line on stderr."""
    from .traces.page import write_trace_page
    from .traces.read import read_trace  # the streaming JSON parser is needed for traces only

    try:
        others = [name for name in options.changed if name not in ("trace", "json", "out", "debug")]
        if others:
            flags = ", ".join(sorted("--" + name.replace("_", "-") for name in others))
            raise ValueError(f"--trace reads a file and measures nothing: it cannot be had with {flags}")
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            if not os.access(options.out, os.W_OK):
                raise PermissionError(f"--out {options.out}: this folder cannot be written to")
        report = read_trace(options.trace, progress=sys.stderr.isatty())
        print(json.dumps(report.as_dict(), indent=1) if options.json else report)
        if options.out is not None:
            from ..pictures import plot  # matplotlib is needed for pictures only

            write_trace_page(options.out / "report.html", report)
            (options.out / "report.json").write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
            plot(report.timeline(), title=f"{report.label}, device {report.device}").savefig(
                options.out / "trace-timeline.png"
            )
    except (ValueError, OSError, MemoryError) as error:
        if options.debug:
            raise
        tell(f"asyncbatch.profile: {str(error).strip() or type(error).__name__}")
        return 2
    except KeyboardInterrupt:
        tell("asyncbatch.profile: interrupted")
        return 130
    return 0

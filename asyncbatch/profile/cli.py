"""The command line of the profiling script: what each call does, what it prints, and its exit status."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence

from ..streams import DeviceError
from . import compare
from .console import muted, one_line, quiet, tell
from .options import Arguments, flag, parse_arguments
from .outputs import OutError, make_folder, write_json
from .rank_options import own_rank, processes, refuse_for_ranks
from .report import OWN, Report
from .session import Session
from .terminal import show
from .together import joined


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says (None: of this process). Returns the exit status, see the end of `--help`. Of the
    processes that torchrun has started, one speaks."""
    rank = own_rank()
    if rank == 0:
        return _main(arguments)
    with muted(rank):
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    with quiet(own_rank() > 0):  # what is wrong with the command line, rank 0 says
        options = parse_arguments(arguments)
    try:
        refuse_for_ranks(options, processes())
        if options.trace is not None:
            return main_trace(options)
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
    """Measure, print the report, and write it with --out DIR. Returns the exit status, or raises what went wrong. Of
    several ranks all measure, and rank 0 does the rest."""
    with joined(options) as ranks:
        session = Session(options, ranks=ranks)
        ranks.on_lost(functools.partial(_keep, session, options))
        if options.out is not None:  # before anything is measured: otherwise the results would be lost
            ranks.first_only(make_folder, options.out)
        try:
            session.run()
        except KeyboardInterrupt:
            session.interrupted = True
            if session.measurements:  # what ran is not thrown away
                tell("asyncbatch.profile: interrupted; the report is about what ran")
            ranks.interrupted()
            if not session.measurements:
                raise
    return _tell_and_write(session, options) if ranks.speaks else 0


def _keep(session: Session, options: Arguments, error: Exception) -> None:
    """A rank is lost: what is finished is told and written, before this process ends, too. (After Ctrl-C the other
    ranks call this one lost.)"""
    if not session.interrupted:
        finished = session.lost(error)
        if options.out is not None:
            write_json(options.out / "completions.json", finished)
    _tell_and_write(session, options)


def _tell_and_write(session: Session, options: Arguments) -> int:
    report, timelines = session.report()
    print(json.dumps(report.to_json(), indent=1)) if options.json else show(report)
    if options.out is not None:
        try:
            session.write((report, timelines))
        except OutError as error:
            if error.lost and not options.json:
                print(json.dumps(report.to_json(), indent=1))  # the last place that is left
            raise
    return 130 if session.interrupted else status_of(report)


def status_of(report: Report) -> int:
    """The exit status: 0, 1 for different tokens, 2 if this package, or everything, could not be measured."""
    if not report.runs or any(one.engine == OWN for one in report.failed):
        return 2
    return 0 if report.same_tokens else 1


def main_trace(options: Arguments) -> int:
    """`asyncbatch.profile --trace FILE ...`: print the report on a trace, or on the traces of several ranks, and write
    it with --out DIR.

    Exit status 0; 2 if a file that was named is no trace, and 1 if --out cannot be written: there is a line on stderr
    for each such file."""
    try:
        return _report_on_trace(options)
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


def _report_on_trace(options: Arguments) -> int:
    from .traces.ranks import Ranks, trace_files  # of use for traces only

    assert options.trace is not None
    others = [name for name in options.changed if name not in ("trace", "json", "out", "debug")]
    if others:
        flags = ", ".join(sorted(map(flag, others)))
        raise ValueError(f"--trace reads a file and measures nothing: it cannot be had with {flags}")
    if options.out is not None:
        make_folder(options.out)
    tell(f"reading {', '.join(map(str, options.trace))} ...")
    ranks = Ranks.read(trace_files(options.trace), progress=sys.stderr.isatty())
    single = len(ranks.reports) == 1
    found = ranks.reports[0] if single else ranks
    print(json.dumps(found.as_dict(), indent=1) if options.json else found)
    for problem in ranks.failed.values():
        tell(f"asyncbatch.profile: {problem}")
    if options.out is not None:
        from .traces.page import write_trace, write_traces  # matplotlib is needed for pictures only

        write_trace(options.out, ranks.reports[0]) if single else write_traces(options.out, ranks)
    return 2 if ranks.failed.keys() & set(options.trace) else 0  # what else lies in a folder does no harm

"""The profiling script called in this process, and real reports, each measured once in a test session."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from asyncbatch.profile import cli
from asyncbatch.timeline import Timeline, load_trace

REAL = ("--model", "random:tiny", "--batch-size", "3", "--requests", "5", "--new-tokens", "20", "--repeats", "2")
EMULATED = ("--emulate", "h200-llama-8b", "--new-tokens", "12")


@functools.cache
def _measured(arguments: tuple[str, ...]) -> tuple[dict[str, Any], list[Timeline]]:
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            status = cli.main([*arguments, "--out", folder])
        assert status == 0
        report = json.loads((Path(folder) / "report.json").read_text())
        return report, load_trace(Path(folder) / "trace.json")


def call_script(capsys, *arguments) -> tuple[Any, str, str]:
    """Run the profiling script in this process: (exit status, standard output, standard error without the lines that
    only say what is waited for, "loading ... ...")."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as end:  # argparse ends so
        status = end.code
    out, error = capsys.readouterr()
    return status, out, "".join(line for line in error.splitlines(True) if not line.endswith(" ...\n"))


def measured(arguments: tuple[str, ...] = REAL) -> tuple[dict[str, Any], list[Timeline]]:
    """The report of a run with these arguments, to be changed at will, and its timelines."""
    report, timelines = _measured(arguments)
    return copy.deepcopy(report), timelines

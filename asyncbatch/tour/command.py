"""The command `asyncbatch`: without a word it is the first minute, with one it is one of its sub-commands."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path

from ..shown.progress import waiting
from . import notebooks

HELP = {
    "profile": "measure your own model, or read a trace of any engine (python -m asyncbatch.profile)",
    "faults": "take things away from the asynchronous loop, one at a time: each is found",
    "simulate": "predict the recorded asynchronous runs from the synchronous ones",
    "lab": "open copies of the notebooks, your own, in JupyterLab",
    "notebooks": "notebooks DIR: copy the notebooks into DIR, without results",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says (None: of this process). Returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words and words[0] in HELP:
            return _sub_commands()[words[0]](words[1:])
        return _first_minute(_options(words))
    except KeyboardInterrupt:
        print("asyncbatch: interrupted", file=sys.stderr)
        return 130


def _options(words: Sequence[str]) -> argparse.Namespace:
    each = "\n".join(f"  {name:<10} {text}" for name, text in HELP.items())
    parser = argparse.ArgumentParser(
        prog="asyncbatch",
        usage="asyncbatch [--out DIR] [--open]   or   asyncbatch COMMAND ...",
        description="What asynchronous continuous batching does, and for whom: a minute of measuring, and one page.",
        epilog=f"commands (each has its own --help):\n{each}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", metavar="COMMAND", choices=[*HELP], help="see below")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="where the page goes (default out)"
    )
    parser.add_argument("--open", action="store_true", help="open the page in a browser, where there is a display")
    parser.add_argument("--version", action="store_true", help="print the versions of what matters, and end")
    options = parser.parse_args(words)
    if options.command:
        parser.error(f"{options.command} has to come first: asyncbatch {options.command} ...")
    return options


def _sub_commands() -> dict[str, Callable[[Sequence[str]], int]]:
    return {
        "profile": _profile,
        "faults": _faults,
        "simulate": _simulate,
        "lab": notebooks.lab,
        "notebooks": notebooks.command,
    }


def _profile(words: Sequence[str]) -> int:
    from ..profile.__main__ import main

    return main(words)


def _faults(words: Sequence[str]) -> int:
    with waiting("loading asyncbatch and torch"):
        from ..ordering.trials import main
    return main(words)


def _simulate(words: Sequence[str]) -> int:
    argparse.ArgumentParser(prog="asyncbatch simulate", description=HELP["simulate"]).parse_args(words)
    with waiting("loading asyncbatch and torch"):
        from ..measure.simulate import main
    return main()


def _first_minute(options: argparse.Namespace) -> int:
    with waiting("loading asyncbatch and torch"):  # the import alone can take half a minute, the first time
        from ..profile.console import one_line
        from ..profile.machine import version_line
        from ..profile.outputs import make_folder
        from . import page, screen
    if options.version:
        print(version_line())
        return 0
    try:
        make_folder(options.out)  # before anything is measured
        findings = screen.show_all()
        path = options.out / page.NAME
        with waiting(f"writing {path}"):
            page.write(path, findings)
    except OSError as error:  # of --out among them
        print(f"asyncbatch: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, ValueError, MemoryError) as error:
        print(f"asyncbatch: {one_line(error)}", file=sys.stderr)
        return 2
    screen.end(path.resolve())
    if options.open:
        _open(path.resolve())
    return 0 if findings.same_tokens else 1


def _open(path: Path) -> None:
    on_screen = sys.platform in ("win32", "darwin") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not on_screen or not webbrowser.open(path.as_uri()):
        print("asyncbatch: there is no display here to open it on", file=sys.stderr)

"""Make .venv and install into it what a goal of make needs: pinned, with one line of progress, and only once.

    python tools/install.py run                  what `make run` needs, and the embedded model
    python tools/install.py run notebooks        what `make lab` needs
    python tools/install.py run notebooks test   everything

Each part is a file of requirements/. It is installed again after a change of the pins, a failure, or a move of the
clone. uv does it where it is there and would do the same as pip; pip does it where pip has settings or options of its
own (a mirror, a folder of wheels, ...), which uv does not know. Standard library only: nothing else is there yet.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
LOG = VENV / "install.log"
PARTS = ("run", "notebooks", "test")
LOWEST, HIGHEST = (3, 10), (3, 14)
CPU_INDEX = "https://download.pytorch.org/whl/"
CUDA_BUILD_MB = 3000  # PyPI's PyTorch on Linux x86_64, with the libraries of CUDA
SIZED = re.compile(r"Downloading .*\(([\d.]+) ?(kB|MB|GB|KiB|MiB|GiB)\)")
MEGABYTES = {"kB": 1e-3, "MB": 1.0, "GB": 1e3, "KiB": 1.024e-3, "MiB": 1.048576, "GiB": 1073.741824}
# Run by the Python of .venv.
FETCH = """
import sys
from asyncbatch.models import embedded, messages
try:
    embedded.embedded_folder(sys.stderr.isatty())
except messages.ModelError as error:
    sys.exit(str(error))
"""


class Failed(Exception):
    """Something could not be installed; the text says what, and where to read on."""


def file_of(part: str) -> Path:
    return ROOT / "requirements" / f"{part}.txt"


def stamp_of(part: str) -> Path:
    return VENV / f"installed-{part}"


def mark(part: str) -> str:
    """What the stamp of a part says: where the clone is, and what was installed."""
    files = (file_of(part), ROOT / "pyproject.toml")
    return f"{ROOT}\n{hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()}\n"


def is_installed(part: str) -> bool:
    stamp = stamp_of(part)
    return PYTHON.exists() and stamp.is_file() and stamp.read_text(encoding="utf-8") == mark(part)


def size_of(part: str) -> str:
    """What the file of a part says in its first line that it costs."""
    first = file_of(part).read_text(encoding="utf-8").splitlines()[0]
    return first.partition("About ")[2] or "its size was not noted"


# ---- pip or uv ----------------------------------------------------------------------------------------------------


def command(options: argparse.Namespace, arguments: Sequence[str]) -> list[str]:
    """The command that installs `arguments`, with pip or with uv."""
    more = shlex.split(options.pip_options)
    index = ["--extra-index-url", CPU_INDEX + options.torch] if options.torch else []
    if uses_uv(options.installer, more):
        strategy = ["--index-strategy", "unsafe-best-match"] if index else []  # as pip does it
        return ["uv", "pip", "install", "--python", str(PYTHON), *index, *strategy, *more, *arguments]
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "off"]
    return [*pip, *index, *more, *arguments]


def uses_uv(wanted: str, for_pip: Sequence[str]) -> bool:
    """Whether uv installs: where it was asked for, or is there and pip has no settings, and gets no options, that uv
    would not know."""
    if wanted != "auto":
        return wanted == "uv"
    if for_pip or shutil.which("uv") is None:
        return False
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    return not re.search(r"index-url|find-links|constraint|no-index|proxy|cert", told.stdout)


# ---- .venv --------------------------------------------------------------------------------------------------------


def make_venv() -> None:
    """Make .venv, unless its Python and pip run. Failed where it is the reader's own, and where Python has no venv."""
    with contextlib.suppress(OSError):
        if not subprocess.run([str(PYTHON), "-m", "pip", "--version"], capture_output=True, check=False).returncode:
            return
    ours = LOG.exists() or any(stamp_of(part).exists() for part in PARTS)
    if not ours and VENV.exists() and (not VENV.is_dir() or any(VENV.iterdir())):
        raise Failed(f"{VENV} is there, has no pip that runs, and was not made by make; `make distclean` removes it")
    if ours:
        print("  .venv was made here, and its Python or pip does not run any more: made anew")
    try:
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True)
    except BaseException:  # half of one would look like the reader's own
        shutil.rmtree(VENV, ignore_errors=True)
        raise
    if made.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        raise Failed(without_venv((made.stdout + made.stderr).strip()))


def without_venv(said: str) -> str:
    """Why there is no .venv. said: what `python -m venv` printed."""
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if not missing and "ensurepip is not" not in said:  # Debian's words
        return f"{VENV} cannot be made:\n{said}"
    found = re.fullmatch(r"python3(\.\d+)?", Path(sys.executable).name)
    name = found[0] if found else "python3"
    return f"{name} has no venv" + (f": sudo apt install {name}-venv" if sys.platform == "linux" else "")


# ---- doing it -----------------------------------------------------------------------------------------------------


def install(parts: Sequence[str], options: argparse.Namespace) -> None:
    """Install these parts and the package itself, then fetch the embedded model. Failed if something cannot be had."""
    began = time.monotonic()
    for part in parts:
        stamp_of(part).unlink(missing_ok=True)
    files = [word for part in parts for word in ("-r", str(file_of(part)))]
    LOG.write_text("", encoding="utf-8")
    follow("installing " + ", ".join(parts), command(options, files), options.verbose)
    follow("installing asyncbatch itself",
           command(options, ["--no-deps", "--no-build-isolation", "-e", str(ROOT)]), options.verbose)  # fmt: skip
    for part in parts:
        stamp_of(part).write_text(mark(part), encoding="utf-8")
    if not options.verbose:  # else the log does not hold what was printed
        print(f"  fetched {megabytes(LOG.read_text(encoding='utf-8')):.0f} MB in {clock(time.monotonic() - began)}")
    if "run" in parts:
        fetch_model()


def fetch_model() -> None:
    """Fetch and convert the embedded model, if it is not there. Without a network the rest works all the same."""
    if subprocess.run([str(PYTHON), "-W", "ignore", "-c", FETCH], cwd=ROOT, check=False).returncode:
        print("  the embedded model could not be fetched (above): what needs it will say so", file=sys.stderr)


def follow(what: str, words: Sequence[str], verbose: bool) -> None:
    """Run a command with its output in `LOG`, and one line that says how far it is. Failed with its last lines.
    verbose: its output is shown, and is not in `LOG`."""
    began, shown = time.monotonic(), ""
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(words)}\n")
        log.flush()
        place = log.tell()
        output = None if verbose else log
        with subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=None if verbose else subprocess.STDOUT) as running:
            while running.poll() is None:
                if not verbose:
                    shown = progress(f"{what}: {clock(time.monotonic() - began)}", place, shown)
                time.sleep(0.5)
    if shown:
        print("\r" + " " * len(shown) + "\r", end="", flush=True)
    if running.returncode and verbose:
        raise Failed(f"{what} failed: see above")
    if running.returncode:
        last = LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-6:]
        raise Failed("\n".join([f"{what} failed; all of it is in {LOG}, V=1 shows it:", *last]))
    print(f"  {what}: {clock(time.monotonic() - began)}")


def progress(text: str, place: int, before: str) -> str:
    """Show the line of progress, on a terminal in place of the one before; returns it."""
    if not sys.stdout.isatty():
        return ""
    with LOG.open(encoding="utf-8", errors="replace") as log:
        log.seek(place)
        lines = log.read().split("\n")
    now = next((line.strip() for line in reversed(lines) if line.strip()), "")
    line = f"  {text}  {now}"[: max(20, shutil.get_terminal_size().columns - 1)]
    print(f"\r{line.ljust(len(before))}", end="", flush=True)
    return line


def megabytes(log: str) -> float:
    """What pip or uv says that it downloaded."""
    return sum(float(number) * MEGABYTES[unit] for number, unit in SIZED.findall(log))


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Install what a goal of make needs, into .venv.")
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--torch", default="", help="PyTorch's own build of that name: cpu, cu126, ...")
    parser.add_argument("--pip-options", default="", help="anything else that pip should be told; then it is not uv")
    parser.add_argument("--installer", default="auto", choices=("auto", "pip", "uv"))
    parser.add_argument("--verbose", action="store_true", help="show what pip or uv prints")
    options = parser.parse_args(arguments)
    parts = [part for part in PARTS if part in options.parts and not is_installed(part)]
    if not parts:
        return 0
    if not LOWEST <= sys.version_info[:2] <= HIGHEST:
        allowed = " to ".join(".".join(map(str, version)) for version in (LOWEST, HIGHEST))
        print(f"asyncbatch needs Python {allowed}; {sys.executable} is {sys.version.split()[0]}", file=sys.stderr)
        print("Name another one:  make run PYTHON=python3.12", file=sys.stderr)
        return 1
    print(f"Installing into {VENV}, once:")
    for part in parts:
        print(f"  {part}: {size_of(part)}")
    if "run" in parts and sys.platform == "linux" and not options.torch:
        print(f"  (on Linux, PyPI's PyTorch is a CUDA build: {CUDA_BUILD_MB:,} MB more; TORCH=cpu takes a small one)")
    sys.stdout.flush()
    try:
        make_venv()
        install(parts, options)
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

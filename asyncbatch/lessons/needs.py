"""For all notebooks: the packages that they need, and how a notebook installs those that are missing.

torch is never touched. Nothing but the standard library is imported here, since nothing else may be installed yet.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

# The lowest versions, as in pyproject.toml (a test compares them). A bare clone has no metadata to read them from.
NEEDS = {
    "torch": "2.11",
    "transformers": "5.17",
    "numpy": "1.26",
    "matplotlib": "3.9",
    "safetensors": "0.5",
    "accelerate": "1.1",
    "gguf": "0.17",
    "tqdm": "4.66",
    "jinja2": "3.1",
    "rich": "13",
    "ipywidgets": "8.1.5",
    "anywidget": "0.9.18",
}
ESSENTIAL = ("torch", "transformers", "numpy", "matplotlib")  # without these no notebook gets far


def provide() -> None:
    """Install the packages that the notebooks need and this Python lacks, and print which. If all are there, print
    nothing. Outside a notebook nothing is installed.

    Raises RuntimeError, with the line to type, if an essential package is still missing, if torch is missing or too old
    (it is never installed from here), or if the kernel has to be restarted."""
    lacks = lacking()
    if "torch" in lacks:
        raise RuntimeError(f"{_sentence({'torch': lacks['torch']})}; {_line(['torch'])}")
    if not lacks:
        return
    in_use = [name for name, version in lacks.items() if version and name in sys.modules]
    trouble = _install(lacks) if _in_notebook() else "not in a notebook, so nothing was installed"
    if left := lacking():
        sentence = f"{_sentence(left)} ({trouble or 'pip changed nothing'}); {_line(left)}"
        if any(name in ESSENTIAL for name in left):
            raise RuntimeError(sentence)
        print(f"{sentence}. The notebook goes on without.")
    if in_use and not trouble:
        raise RuntimeError(
            f"{' and '.join(in_use)} was in use while it was renewed: restart the kernel, run this again"
        )


def lacking() -> dict[str, str | None]:
    """The packages of NEEDS that are too old, with their version, or missing, with None."""
    lacks: dict[str, str | None] = {}
    for name, lowest in NEEDS.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lacks[name] = None
            continue
        if _numbers(version) < _numbers(lowest):
            lacks[name] = version
    return lacks


def _numbers(version: str) -> tuple[int, ...]:
    """The three numbers of a release: (5, 17, 0) for "5.17". What follows them ("rc1", "+cu130") is left out."""
    release = re.match(r"[\d.]*\d", version)
    numbers = [int(part) for part in release[0].split(".")] if release else []
    return tuple((numbers + [0, 0, 0])[:3])


def _install(lacks: dict[str, str | None]) -> str:
    """Let pip install these packages, while torch stays at its version. Returns what went wrong, or ""."""
    torch = importlib.metadata.version("torch")
    requirements = [f"{name}>={NEEDS[name]}" for name in lacks]
    print(f"Installing with pip: {', '.join(requirements)}. torch stays at {torch}.", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(f"torch=={torch}\n", encoding="utf-8")
        options = ["--quiet", "--disable-pip-version-check", "--no-input", "--retries", "1"]
        command = [sys.executable, "-m", "pip", "install", *options, "--constraint", str(constraints), *requirements]
        done = subprocess.run(command, capture_output=True, text=True)
    importlib.invalidate_caches()
    if done.returncode == 0:
        return ""
    output = (done.stderr or done.stdout).strip().splitlines()
    return f"pip: {output[-1]}" if output else f"pip ended with status {done.returncode}"


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    return shell is not None and shell.get_ipython() is not None


def _sentence(lacks: dict[str, str | None]) -> str:
    return ", ".join(
        f"{name} {version} is too old" if version else f"{name} is missing" for name, version in lacks.items()
    )


def _line(names: Iterable[str]) -> str:
    requirements = " ".join(f"'{name}>={NEEDS[name]}'" for name in names)
    return f"type: pip install {requirements}; then restart the kernel"

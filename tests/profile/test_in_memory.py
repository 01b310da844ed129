"""`asyncbatch.profile_model`: the profiling script for a model in memory."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.changed_models import Quantized, WithAdapter, change
from support.prompts import Words
from support.reports import call_script

import asyncbatch
from asyncbatch import Request, load_model
from asyncbatch.models.messages import ModelError
from asyncbatch.profile import session, turns

OPTIONS = {"batch_size": 2, "repeats": 1, "new_tokens": 4}


@pytest.fixture(scope="module")
def tiny():
    return load_model("random:tiny")[0]


@pytest.fixture
def served(monkeypatch):
    """(prompt, tokens) of all that is served, in each run with its measurements."""
    found = []
    original = turns.run_once

    def noted(batcher, requests, *more, **options):
        timeline, completions = original(batcher, requests, *more, **options)
        if more:  # the warm-up has no arrivals
            found.append([(list(r.token_ids), list(c.token_ids)) for r, c in zip(requests, completions, strict=True)])
        return timeline, completions

    monkeypatch.setattr(turns, "run_once", noted)
    return found


def without_times(report):
    """What two measurements of the same have in common."""
    keys = ("engine", "mode", "model", "batch_size", "requests", "prompt_tokens", "new_tokens", "tokens", "steps",
            "decode_steps", "wasted_tokens", "setting", "prefill_tokens", "workload")  # fmt: skip
    runs = [{key: run.get(key) for key in keys} for run in report["runs"]]
    return runs, report["workload"], report["device"], report["same_tokens"], report["schema"], report["versions"]


def test_it_does_what_the_command_does(tiny, capsys, monkeypatch):
    monkeypatch.setattr(session, "load_model", lambda name, **options: (tiny, None))
    words = ["--requests", "5", "--prompt-tokens", "3-9", "--seed", "4", "--batch-size", "2", "--repeats", "2"]
    status, out, _ = call_script(capsys, "--model", "random:tiny", "--new-tokens", "4", "--json", *words)
    options = {"num_requests": 5, "prompt_tokens": "3-9", "seed": 4, "batch_size": 2, "repeats": 2}
    report = asyncbatch.profile_model(tiny, name="random:tiny", new_tokens=4, **options)
    assert status == 0
    assert without_times(report.to_json()) == without_times(json.loads(out))
    assert report.command.startswith("asyncbatch.profile_model(model, tokenizer, requests, model='random:tiny', ")
    assert "prompt_tokens='3-9'" in report.command


def generated(model, prompt):
    """What transformers itself generates."""
    found = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", [WithAdapter, Quantized])
def test_a_changed_model_is_served_as_it_is(kind, served):
    model = load_model("random:tiny")[0]
    prompts = [[1, 2, 3], [200, 7], [5, 6, 7, 8]]
    unchanged = [generated(model, prompt) for prompt in prompts]
    change(model, kind)
    report = asyncbatch.profile_model(model, None, [Request(one, 4, stop_token_ids=()) for one in prompts], **OPTIONS)
    assert report.same_tokens
    assert [(run.mode, run.requests, run.tokens) for run in report.runs] == [("sync", 3, 12), ("async", 3, 12)]
    assert len(served) == 2
    expected = [(prompt, generated(model, prompt)) for prompt in prompts]
    assert served == [expected, expected]
    assert [tokens for _, tokens in expected] != unchanged, "the change changes the tokens"


def test_requests_can_be_texts_tokens_chats_and_the_forms_of_a_file(tiny, served):
    requests = [
        "two words", [1, 2, 3], np.array([4, 5]), torch.tensor([6]), [{"role": "user", "content": "a chat"}],
        {"body": {"prompt": "one", "max_tokens": 2}},
    ]  # fmt: skip
    report = asyncbatch.profile_model(tiny, Words(), requests, mode="async", **OPTIONS)
    (run,) = served
    assert [prompt for prompt, _ in run] == [[3, 5], [1, 2, 3], [4, 5], [6], [9, 1, 4], [3]]
    assert report.runs[0].tokens == 5 * 4 + 2
    assert (report.workload.requests, report.workload.prompts) == (6, "in memory")
    other = asyncbatch.profile_model(tiny, None, [[1]], mode="sync", **OPTIONS)
    assert other.workload.prompts_sha256 != report.workload.prompts_sha256


def test_it_says_what_it_does_or_nothing(tiny, capsys):
    asyncbatch.profile_model(tiny, None, [[1]], mode="sync", **OPTIONS)
    assert "sync: run 1 of 1: " in capsys.readouterr().err
    asyncbatch.profile_model(tiny, None, [[1]], mode="sync", progress=False, **OPTIONS)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("requests", "options", "error", "said"),
    [
        ([], {}, ValueError, "requests is empty"),
        ([[1], [256]], {}, ValueError, 'requests, number 2: "token_ids" has 256'),
        ([[1], []], {}, ValueError, 'requests, number 2: "token_ids" is []'),
        ([[1], Request([1])], {}, ValueError, "requests has Requests, and [1] beside them"),
        (["text"], {}, ValueError, '"prompt" is text, and LlamaForCausalLM has no tokenizer here'),
        ([[1] * 1021], {}, ValueError, "prompts of 1021 tokens and 4 new ones: LlamaForCausalLM allows 1024"),
        ([[1]], {"slots": 0}, ValueError, "argument --slots: '0' was given; allowed are whole numbers from 1"),
        ([[1]], {"engine": "vllm"}, ValueError, "allowed are asyncbatch, transformers"),
        ([[1]], {"num_requests": 3}, ValueError, "requests and num_requests were given"),
        ([[1]], {"out": "x"}, TypeError, "profile_model has no option 'out'; allowed are arrivals, batch_size"),
        ([[1]], {"kineto": True}, ValueError, "--kineto asks a GPU's own profiler"),
    ],
)
def test_what_is_not_allowed_is_said(tiny, requests, options, error, said):
    with pytest.raises(error) as caught:
        asyncbatch.profile_model(tiny, None, requests, **{**OPTIONS, **options})
    assert said in str(caught.value)


def test_what_is_no_model_is_refused():
    with pytest.raises(ModelError, match="it is no transformers model"):
        asyncbatch.profile_model(torch.nn.Linear(2, 2))


def test_asking_for_it_is_what_loads_it():
    code = (
        "import asyncbatch, sys\n"
        "assert 'torch' not in sys.modules and 'profile_model' in asyncbatch.__all__\n"
        "from asyncbatch import profile_model\n"
        "assert profile_model.__module__ == 'asyncbatch.profile.in_memory'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- --dtype, --device, --version ------------------------------------------------------------------------------------

TINY = ("--model", "random:tiny", "--requests", "2", "--new-tokens", "3", "--repeats", "1", "--mode", "sync", "--json")


def test_dtype_and_device_are_those_of_the_model_that_is_loaded(capsys, monkeypatch):
    loaded = []

    def noted(name, **options):
        model, tokenizer = load_model(name, **options)
        loaded.append((options["device"], model.dtype))
        return model, tokenizer

    monkeypatch.setattr(session, "load_model", noted)
    report = json.loads(call_script(capsys, *TINY, "--dtype", "bfloat16", "--device", "cpu")[1])
    assert report["workload"]["dtype"] == "bfloat16"
    assert "dtype" not in json.loads(call_script(capsys, *TINY)[1])["workload"]
    assert loaded == [("cpu", torch.bfloat16), (None, torch.float32)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "tpu"], "'tpu' was given; allowed are cpu, cuda and cuda:N"),
        (["--dtype", "int4"], "invalid choice: 'int4'"),
        (["--device", "cuda", "--step-ms", "2"], "--step-ms and --device were given: only one"),
        (["--dtype", "float16", "--emulate", "h200-llama-8b"], "--emulate and --dtype were given: only one"),
    ],
)
def test_other_devices_and_dtypes_are_refused(capsys, arguments, said):
    status, out, error = call_script(capsys, *TINY[2:], *arguments)
    assert (status, out) == (2, "")
    assert said in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_a_gpu_that_is_not_there_is_said(capsys):
    status, _, error = call_script(capsys, *TINY, "--device", "cuda:1")
    assert status == 2
    assert "device 'cuda:1' was asked for, but torch" in error


def test_a_preset_is_not_for_the_cpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    status, _, error = call_script(capsys, "--preset", "sweep", "--device", "cpu")
    assert status == 2
    assert "--preset sweep needs a CUDA GPU, and --device is cpu" in error


def test_the_version_line_names_what_matters(capsys):
    status, out, _ = call_script(capsys, "--version")
    assert status == 0
    assert out.count("\n") == 1
    for part in ("asyncbatch ", f"torch {torch.__version__.split('+')[0]}", "transformers ", "python ", "cuda "):
        assert part in out

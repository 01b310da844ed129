"""A new batcher serves the model as it is at that moment, and what cannot travel to the worker is named."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.gpt2 import generated, tiny_gpt2
from support.tiny import tiny_model

from asyncbatch import AsyncBatcher, Request, SyncBatcher
from asyncbatch.devices.process import DeviceProcess
from asyncbatch.models import ModelError
from asyncbatch.streams import DeviceError

PROMPT, COUNT = [1, 2, 3], 10
OPTIONS = {"max_batch_size": 4, "block_size": 4, "max_length": 32, "prefill_tokens": 8}
TESTS = Path(__file__).parents[1]


def served(model, kind=AsyncBatcher) -> list[int]:
    with kind(model, **OPTIONS) as batcher:
        first, second = batcher.run([Request(PROMPT, COUNT, stop_token_ids=())] * 2)
    assert first.token_ids == second.token_ids
    return first.token_ids


def test_a_model_in_training_is_served_without_dropout_and_stays_in_training():
    model = tiny_gpt2()
    assert served(model, SyncBatcher) == served(model) == generated(model, PROMPT, COUNT)
    assert all(module.training for module in model.modules())


def assign_other_weights(model):
    model.load_state_dict(tiny_gpt2(1).state_dict(), assign=True)


def replace_a_module(model):
    model.transformer.h[1].mlp = tiny_gpt2(1).transformer.h[1].mlp


def replace_a_parameter(model):
    model.transformer.wpe.weight = torch.nn.Parameter(tiny_gpt2(1).transformer.wpe.weight.detach())


def swap_the_data_of_a_parameter(model):
    model.transformer.wpe.weight.data = tiny_gpt2(1).transformer.wpe.weight.detach().clone()


def change_a_setting(model):
    for block in model.transformer.h:
        block.ln_1.eps = 10.0


def write_into_the_weights(model):
    with torch.no_grad():
        for mine, other in zip(model.parameters(), tiny_gpt2(1).parameters(), strict=True):
            mine.copy_(other)


CHANGES = (
    assign_other_weights, replace_a_module, replace_a_parameter, swap_the_data_of_a_parameter, write_into_the_weights,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_new_batcher_serves_what_was_changed(change):
    model = tiny_gpt2()
    before = served(model)
    change(model)
    assert served(model) == generated(model, PROMPT, COUNT) != before


def test_a_setting_of_a_module_counts_too():
    model = tiny_gpt2()
    before = served(model)
    change_a_setting(model)
    other = tiny_gpt2()
    change_a_setting(other)
    expected = other.eval().generate(torch.tensor([PROMPT]), max_new_tokens=COUNT, do_sample=False)[0, 3:].tolist()
    assert served(model) == expected != before


def test_a_model_that_did_not_change_is_not_sent_again(monkeypatch):
    model = tiny_gpt2()
    served(model)
    process = DeviceProcess.of(model)
    questions = []
    ask = process.ask
    monkeypatch.setattr(process, "ask", lambda *message: (questions.append(message[0]), ask(*message))[1])
    served(model)
    assert questions == ["open", "close"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_opening_batchers_opens_no_files_for_good():
    model = tiny_gpt2()
    served(model)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        served(model)
    assert len(os.listdir("/proc/self/fd")) <= before + 5


def test_a_batcher_that_is_open_keeps_its_model_while_another_one_is_sent():
    model = tiny_gpt2()
    with SyncBatcher(model, **OPTIONS) as old:
        before = old.run([Request(PROMPT, COUNT, stop_token_ids=())])[0].token_ids
        replace_a_module(model)
        now = served(model)
        assert old.run([Request(PROMPT, COUNT, stop_token_ids=())])[0].token_ids == before
    assert now == generated(model, PROMPT, COUNT) != before


# ---- what cannot travel ----------------------------------------------------------------------------------------------


def hook_of_a_lambda(model):
    model.transformer.h[0].register_forward_hook(lambda *_: None)


def forward_of_a_closure(model):
    forward = model.forward
    model.forward = functools.wraps(forward)(lambda *arguments, **options: forward(*arguments, **options))


@pytest.mark.parametrize(
    ("change", "words"),
    [(hook_of_a_lambda, "transformer.h.0._forward_hooks"), (forward_of_a_closure, "forward of type function")],
)
def test_what_cannot_travel_is_named(change, words):
    model = tiny_gpt2()
    model.eval()
    change(model)
    with pytest.raises(ModelError, match="cannot travel to the process that computes") as caught:
        AsyncBatcher(model, **OPTIONS)
    assert words in str(caught.value)
    assert served(tiny_model())  # another model is served all the same


SCRIPT = """
import torch
from support.gpt2 import tiny_gpt2
from asyncbatch import AsyncBatcher

class LoRALinear(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, x):
        return self.inner(x)

if __name__ == "__main__":
    model = tiny_gpt2()
    model.lm_head = LoRALinear(model.lm_head)
    try:
        AsyncBatcher(model, max_batch_size=2, max_length=32)
    except Exception as error:
        print(type(error).__name__, error)
"""


def run_script(tmp_path, text, prefix=()) -> subprocess.CompletedProcess:
    script = tmp_path / "script.py"
    script.write_text(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    command = [*prefix, sys.executable, str(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)


def test_a_class_of_the_script_itself_is_named(tmp_path):
    ran = run_script(tmp_path, SCRIPT)
    assert ran.stdout.startswith("ModelError the model cannot travel"), ran.stderr
    assert "LoRALinear is defined in the notebook or script itself" in ran.stdout
    assert ran.stderr == ""


def test_too_few_open_files_are_said_to_be_that(tmp_path):
    text = SCRIPT.replace("    model.lm_head = LoRALinear(model.lm_head)\n", "")
    many = "    model.many = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(3)) for _ in range(400))\n    try:"
    ran = run_script(tmp_path, text.replace("    try:", many), prefix=("sh", "-c", 'ulimit -n 256; exec "$@"', "sh"))
    assert ran.stdout.startswith("DeviceError"), ran.stderr
    assert "ulimit -n" in ran.stdout
    assert "Traceback" not in ran.stderr


def test_too_little_shared_memory_is_said_before_anything_is_written(monkeypatch):
    monkeypatch.setattr("asyncbatch.devices.travel.shutil.disk_usage", lambda _: type("", (), {"free": 2**20}))
    with pytest.raises(DeviceError, match=r"max_batch_size \(1024\).*docker run --shm-size"):
        SyncBatcher(tiny_model(), max_batch_size=1024, max_length=256, block_size=1)


def test_weights_go_by_value_where_shared_memory_is_small_and_are_sent_each_time(monkeypatch):
    model = tiny_gpt2()
    monkeypatch.setattr("asyncbatch.devices.travel.fits_into_shared_memory", lambda num_bytes: num_bytes < 1000)
    before = served(model)
    write_into_the_weights(model)
    assert served(model) == generated(model, PROMPT, COUNT) != before

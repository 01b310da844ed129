"""What compile=True changes in a model's modules changes nothing in what the model computes."""

from __future__ import annotations

import copy

import pytest
import torch
from support.tiny import tiny_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from asyncbatch.devices.cuda.compile import Part, compile_model, merged_weight

IDS = torch.arange(24).view(2, 12)


def qwen2():
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("make", [lambda: copy.deepcopy(tiny_model()), qwen2], ids=["llama", "qwen2 with biases"])
def test_merged_projections_compute_the_same_and_share_the_callers_weights(make, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)  # only the merge: a compiler may be missing
    model = make()
    expected = model(IDS).logits
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    shared = {id(weight): weight for weight in model.parameters()}
    for _ in range(2):  # the second time the weights are views already, and stay where they are
        made = copy.deepcopy(model, dict(shared))
        compile_model(made)
        places = [weight.data_ptr() for weight in model.parameters()]
        parts = [module for module in made.modules() if isinstance(module, Part)]
        assert len(parts) == 2 * 5
        assert torch.allclose(made(IDS).logits, expected, atol=1e-5)
        storages = {part.merged.weight.untyped_storage().data_ptr() for part in parts}
        assert storages == {
            getattr(layer, name).weight.untyped_storage().data_ptr()
            for both in model.model.layers
            for layer, names in ((both.self_attn, ("q_proj", "v_proj")), (both.mlp, ("gate_proj", "up_proj")))
            for name in names
        }
    assert places == [weight.data_ptr() for weight in model.parameters()]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name
    assert torch.equal(model(IDS).logits, expected)  # the caller's model itself is as it was


def test_weights_that_only_look_like_neighbours_are_copied():
    whole = torch.arange(24.0).view(6, 4)
    apart = [whole[0:2], whole[3:6]]
    merged = merged_weight(apart)
    assert merged.tolist() == [*whole[0:2].tolist(), *whole[3:6].tolist()]
    assert merged.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
    swapped = [whole[2:4], whole[0:2]]
    assert merged_weight(swapped).tolist() == [*whole[2:4].tolist(), *whole[0:2].tolist()]

"""Which models can be served: with the tokens of `model.generate`, or refused at the check with the reason."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gpt2 import tiny_gpt2
from transformers import masking_utils

from asyncbatch import AsyncBatcher, SyncBatcher
from asyncbatch.models import ModelError, check_model
from asyncbatch.models.probe import ALL, attention_layers, window_of
from asyncbatch.models.toy import toy_llama
from tools.served import LENGTH, SLIDING, WINDOW, generated, kinds, outcome, served, tiny_model

ROUTED = dict(num_hidden_layers=2)
NO_WINDOW = dict(layer_types=["full_attention"] * 4)
# name: (type, settings, settings with which its windows, softcap or sinks are gone and tokens must differ)
SERVED = {
    "llama": ("llama", {}, None),
    "gpt2": ("gpt2", {}, None),
    "bert as a decoder": ("bert", {}, None),
    "experts": ("qwen3_moe", {}, None),
    "a router with two inputs": ("minimax_m2", ROUTED, None),
    "sliding in all layers": ("mistral", {}, dict(sliding_window=None)),
    "full in some layers": ("qwen2", {}, NO_WINDOW),
    "softcap": ("gemma2", {}, dict(attn_logit_softcapping=None)),
    "softcap and windows": ("gemma2", {}, NO_WINDOW),
    "two kinds of rope": ("gemma3_text", {}, NO_WINDOW),
    "layers of different sizes": ("gemma4_text", {}, NO_WINDOW),
    "sinks and windows": ("gpt_oss", ROUTED, dict(layer_types=["full_attention"] * 2)),
    "sinks in sliding layers": ("granite_swa", {}, None),
    "keys larger than values": ("deepseek_v3", ROUTED, None),
    "the same, without low rank queries": ("deepseek_v2", dict(q_lora_rank=None), None),
    "keys and values of an earlier layer": ("gemma3n_text", {}, None),
    "two attentions in a layer": ("longcat_flash", {}, None),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """For models as small as these, threads that wait for each other take longer than the work, on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SERVED)
def test_a_model_gives_the_tokens_of_generate(name):
    """Prompts longer and shorter than the window, of different lengths, in chunks, in both loops."""
    kind, settings, without = SERVED[name]
    model = tiny_model(kind, **settings)
    expected = generated(model)
    assert served(model, SyncBatcher) == expected
    assert served(model, AsyncBatcher) == expected
    if without is not None:
        assert generated(tiny_model(kind, **{**settings, **without})) != expected


def test_a_sliding_window_is_served_by_a_worker_process_too():
    model = tiny_model("mistral")
    assert served(model, AsyncBatcher, clock=None) == generated(model)


@pytest.mark.parametrize("window", [2, 7, 8, 40, LENGTH])
def test_windows_of_all_sizes(window):
    """Of two tokens (with one, the cache of `generate` keeps all), as long as a chunk, longer than all requests."""
    model = tiny_model("mistral", sliding_window=window)
    assert served(model) == generated(model)


def test_what_the_sweep_says():
    """tools/served.py tries all types; here one of each outcome."""
    good, text = outcome("qwen3")
    assert good
    assert text.startswith("served (")
    good, text = outcome("mamba")
    assert good
    assert text.startswith("refused: it has layers of type linear_attention")
    good, text = outcome("blt")
    assert good
    assert text.startswith("not built: ValueError: it is not tiny")
    assert {"llama", "gpt_oss", "deepseek_v3"} < set(kinds())


def test_the_sweep_tells_other_tokens_and_failures(monkeypatch):
    monkeypatch.setattr("tools.served.generated", lambda model: [[0]])
    good, text = outcome("llama")
    assert not good
    assert text.startswith("OTHER TOKENS")
    monkeypatch.setattr("tools.served.check_model", lambda *_: None)
    good, text = outcome("nemotron")
    assert not good
    assert text.startswith("FAILED after the check")


REFUSED = {
    "linear_attention": lambda: tiny_model("mamba"),
    "conv": lambda: tiny_model("lfm2_moe"),
    "AttentionInterface": lambda: tiny_model("bloom"),
    "encoder-decoder": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16)
    ),
    "no output layer": lambda: tiny_model("llama").model,
    "longest row": lambda: tiny_model(
        "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ),
    "neither causal nor": lambda: tiny_model("bert", is_decoder=False),
    "no batch arrives at the attention of NemotronAttention": lambda: tiny_model("nemotron"),
    "self_attn calls attention more than once": lambda: tiny_model("diffllama"),
    "another mask": lambda: tiny_model("doge"),
    "its cache keeps the newest 9 tokens only": lambda: tiny_model("moshi"),
    "in requests of up to 128 tokens": lambda: tiny_model("llama4_text", floor_scale=8192),
    "depends on more than the positions": lambda: tiny_model("gemma4_unified"),
    "no transformers model": lambda: torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_with_the_type_and_the_reason(reason):
    model = REFUSED[reason]()
    kind = model.config.model_type if hasattr(model, "config") else "Linear"
    with pytest.raises(ModelError, match=f"{kind}.*cannot be served: .*{reason}"):
        check_model(model)


def test_a_batcher_refuses_at_once():
    with pytest.raises(ModelError, match="nemotron.*no batch arrives"):
        SyncBatcher(tiny_model("nemotron"), max_length=LENGTH)


@pytest.mark.parametrize("max_length", [0, -1, "long", 65, 10**9])
def test_a_length_that_makes_no_sense_is_not_the_models_fault(max_length):
    """The options say so; learned positions end at 64."""
    with pytest.raises(ValueError, match="max_length is") as caught:
        SyncBatcher(tiny_gpt2(), max_length=max_length)
    assert not isinstance(caught.value, ModelError)


def test_chunked_attention_is_served_where_no_request_is_longer_than_a_chunk():
    model = tiny_model("llama4_text", attention_chunk_size=LENGTH, floor_scale=8192)
    assert served(model) == generated(model)
    with pytest.raises(ModelError, match=r"neither causal nor .* up to 65 tokens"):
        SyncBatcher(model, max_length=LENGTH + 1)


def test_positions_that_come_from_the_cache_are_refused():
    model = tiny_model("llama4_text", attention_chunk_size=LENGTH, floor_scale=4)
    with pytest.raises(ModelError, match="takes positions from the cache"):
        check_model(model, LENGTH)


def leak(module, arguments, output):
    """As a convolution over tokens: each one gets something of the one before it in its row."""
    return output + 0.1 * output.roll(1, 1)


def count(module, arguments, options):
    """Count positions from the row's first token, whatever the caller says."""
    length = arguments[0].shape[1] if arguments else options["input_ids"].shape[1]
    return arguments, {**options, "position_ids": torch.arange(length)[None]}


def test_what_carries_from_token_to_token_beside_attention_is_refused():
    model = toy_llama(97, hidden_size=32, num_heads=4, num_layers=2, spread=0.4)
    check_model(model)
    hook = model.model.layers[0].mlp.register_forward_hook(leak)
    with pytest.raises(ModelError, match="attention is not all that carries from token to token"):
        check_model(model)
    hook.remove()
    hook = model.model.register_forward_pre_hook(count, with_kwargs=True)
    with pytest.raises(ModelError, match="carries from token to token"):
        check_model(model)
    hook.remove()
    check_model(model)


class AllLogits(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, position_ids=None, logits_to_keep=0, **options):
        return super().forward(input_ids=input_ids, position_ids=position_ids, **options)


def test_a_model_that_cannot_choose_whose_logits_it_computes_is_refused():
    with pytest.raises(ModelError, match="takes no logits_to_keep"):
        check_model(AllLogits(tiny_model("llama").config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_probe_allows_for_the_rounding_of_short_dtypes(dtype):
    for kind in ("llama", "gemma2", "qwen3_moe"):
        check_model(tiny_model(kind).to(dtype))


# --- what the probe sees


def test_layers_have_the_sizes_that_were_seen():
    layers = attention_layers(tiny_model("deepseek_v3"), LENGTH)
    assert [layer.name for layer in layers] == [f"model.layers.{n}.self_attn" for n in range(4)]
    assert {layer[1:] for layer in layers} == {(4, 12, 6, torch.float32, ALL)}
    assert layers[0].token_bytes == 4 * (12 + 6) * 4
    layers = attention_layers(tiny_model("gemma4_text").to(torch.bfloat16), LENGTH)
    assert [(layer.key_size, layer.value_size, layer.window) for layer in layers] == [(8, 8, WINDOW), (16, 16, ALL)] * 2
    assert layers[1].token_bytes == 2 * (16 + 16) * 2


def test_windows_come_from_the_masks_and_count_only_where_requests_are_longer():
    model = tiny_model("gemma3_text")
    assert [layer.window for layer in attention_layers(model, WINDOW + 1)] == [WINDOW, ALL] * 2
    assert SLIDING == ["sliding_attention", "full_attention"] * 2
    assert [layer.window for layer in attention_layers(model, WINDOW)] == [ALL] * 4


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_window_of_a_mask_is_found(window, length):
    assert window_of(masking_utils.causal_mask_function, length) == ALL
    sliding = masking_utils.sliding_window_causal_mask_function(window)
    assert window_of(sliding, length) == (ALL if window >= length else window)
    chunked = masking_utils.chunked_causal_mask_function(window, torch.zeros(1, dtype=torch.long))
    if window >= length:
        assert window_of(chunked, length) == ALL
    elif window > 1:  # (chunks of one token are windows of one)
        with pytest.raises(ModelError, match="neither causal nor"):
            window_of(chunked, length)
    if length > 1:
        with pytest.raises(ModelError, match="neither causal nor"):
            window_of(masking_utils.bidirectional_mask_function, length)


def test_check_leaves_the_model_alone():
    model, ids = tiny_gpt2(), torch.tensor([[1, 2, 3]])
    before, attention = model.config.to_json_string(), model.config._attn_implementation
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    check_model(model)
    assert model.training
    assert model.config.to_json_string() == before
    assert model.config._attn_implementation == attention
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)


class Adapted(torch.nn.Module):
    """As PEFT's PeftModel: a module around the model, with a method that merges the two."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def merge_and_unload(self):
        return self.base_model


@pytest.mark.parametrize(
    ("wrap", "remedy"),
    [
        (torch.compile, lambda model: model._orig_mod),
        (torch.nn.DataParallel, lambda model: model.module),
        (Adapted, lambda model: model.merge_and_unload()),
    ],
)
def test_a_model_inside_a_wrapper_is_refused_with_the_way_to_get_it_out(wrap, remedy):
    model = wrap(tiny_gpt2())
    with pytest.raises(ModelError, match=r"_orig_mod is|\.module is|merge_and_unload\(\) gives"):
        check_model(model)
    check_model(remedy(model))

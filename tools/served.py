"""Which of transformers' causal language models can be served: tries a tiny one of each type, with random weights.

    .venv/bin/python tools/served.py              # all of them, a few minutes on two cores
    .venv/bin/python tools/served.py qwen2 bert   # some of them

Each line says that the model is served, with the tokens of `model.generate`; or refused, and the reason, as
`check_model` gives it; or that no tiny one could be built here. The exit status is 1 if a model got through the check
and then failed, or gave other tokens.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from asyncbatch import Request, SyncBatcher
from asyncbatch.devices.virtual import Costs
from asyncbatch.models import ModelError, check_model

LENGTH, NEW = 64, 24  # of the longest request, and tokens to generate
WINDOW = 9  # of a sliding window: shorter than most prompts
PROMPTS = ([5, 9, 3, 17, 22, 40, 11, 2, 8, 30, 31, 7, 6, 4, 55, 50], [7, 8], list(range(1, 31)))
MOST_PARAMETERS = 8_000_000

# Each type of config takes those of these that it has. Weights are spread wide, so that tokens vary.
SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.3, is_decoder=True,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
    # by other names
    n_embd=32, n_layer=4, n_head=4, n_positions=128, d_model=32, n_layers=4, n_heads=4, d_ff=48, max_seq_len=128,
    num_heads=4, num_layers=4, ffn_dim=48, decoder_layers=4, decoder_attention_heads=4, decoder_ffn_dim=48,
    encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=48, word_embed_proj_dim=32,
    # windows
    sliding_window=WINDOW, attention_chunk_size=WINDOW, window_size=WINDOW, local_attention=WINDOW,
    attention_window=WINDOW, attention_window_size=WINDOW,
    # keys and values made from one vector: of different sizes, one for each query head
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, qk_head_dim=12, v_head_dim=6,
    # experts
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, num_experts_per_token=2,
    moe_topk=2, moe_k=2, moe_num_experts=4, moe_intermediate_size=16, n_group=2, topk_group=1, n_shared_experts=1,
    num_shared_experts=1, moe_num_shared_experts=1, shared_expert_intermediate_size=16, first_k_dense_replace=1,
    # small parts
    hidden_size_per_layer_input=8, vocab_size_per_layer_input=64,
)  # fmt: skip
SLIDING = ["sliding_attention", "full_attention"] * 2
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1)
# What else a type needs to be built, or to show what it can.
MORE: dict[str, dict[str, Any]] = {
    "bamba": MAMBA,
    "gemma2": dict(attn_logit_softcapping=2.0, query_pre_attn_scalar=5, tie_word_embeddings=False),
    "gemma3_text": dict(query_pre_attn_scalar=5, layer_types=SLIDING, tie_word_embeddings=False),
    "gemma3n_text": dict(num_kv_shared_layers=1, layer_types=SLIDING[:1] + SLIDING[:3], altup_num_inputs=2,
                         laurel_rank=4, activation_sparsity_pattern=[0.0] * 4),
    "gemma4_text": dict(global_head_dim=16, layer_types=SLIDING, tie_word_embeddings=False),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "granitemoehybrid": MAMBA,
    "kimi_linear": dict(linear_attn_config=None),
    "llama4_text": dict(floor_scale=4),
    "lfm2_moe": dict(layer_types=["full_attention", "conv"] * 2),
    "longcat_flash": dict(num_layers=2, ffn_hidden_size=48, expert_ffn_hidden_size=16, zero_expert_num=2),
    "mamba2": dict(num_heads=8, head_dim=8, n_groups=1),
    "qwen2": dict(use_sliding_window=True, max_window_layers=2),
    "qwen2_moe": dict(use_sliding_window=True, max_window_layers=2),
    "qwen3": dict(use_sliding_window=True, max_window_layers=2),
    "qwen4_exp_text": dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=16,
                           indexer_compress_ratio=4, ngram_vocab_size_base=100),
    "reformer": dict(axial_pos_embds=False),
    "roc_bert": dict(pronunciation_vocab_size=64, shape_vocab_size=64),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"] * 2, **MAMBA),
    "zaya": dict(num_experts_per_tok=1),
}  # fmt: skip


def kinds() -> list[str]:
    """The types of model that transformers can make a causal language model of."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(kind: str, **more: Any) -> Any:
    """The config of a type of model, with tiny sizes. `more` overrules them."""
    from transformers import CONFIG_MAPPING

    plain = CONFIG_MAPPING[kind]()
    text = plain.get_text_config(decoder=True)
    fixed = {name for name in SIZES if isinstance(getattr(type(text), name, None), property)}
    known = {*vars(text), *(name for name in dir(type(text)) if not name.startswith("_")), *text.attribute_map}
    sizes = {name: value for name, value in SIZES.items() if name in known - fixed}
    if "qk_rope_head_dim" in sizes:
        sizes |= dict(head_dim=sizes["qk_rope_head_dim"], num_key_value_heads=sizes["num_attention_heads"])
    sizes |= MORE.get(kind, {}) | more
    part = next((name for name, value in vars(plain).items() if value is text), None)
    return type(plain)(**(sizes if part is None else {part: sizes}))


def tiny_model(kind: str, seed: int = 0, **more: Any) -> Any:
    """A tiny model with random weights, in eval mode, with eager attention and no end-of-sequence token."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(kind, **more)
    with torch.device("meta"):
        count = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"it is not tiny: {count / 1e6:.0f} million parameters")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
        for name, weight in model.named_parameters():
            if "sink" in name:  # they begin as zeros, or as what was in memory
                weight.normal_()
    model.generation_config.eos_token_id = None
    return model


def generated(model: Any, prompts: Sequence[Sequence[int]] = PROMPTS, new: int = NEW) -> list[list[int]]:
    """What `model.generate` answers to each prompt, alone and greedily."""
    ids = [torch.tensor([list(prompt)], device=model.device) for prompt in prompts]
    return [model.generate(x, max_new_tokens=new, do_sample=False)[0, x.shape[1] :].tolist() for x in ids]


def served(
    model: Any, batcher: Any = SyncBatcher, prompts: Sequence[Sequence[int]] = PROMPTS, new: int = NEW, **options: Any
) -> list[list[int]]:
    """What a batcher answers to all prompts together, which arrive in chunks. The first error is raised."""
    options = dict(max_batch_size=3, max_length=LENGTH, block_size=4, prefill_tokens=7, clock=Costs()) | options
    with batcher(model, **options) as opened:
        answers = opened.run([Request(list(prompt), new, stop_token_ids=()) for prompt in prompts])
    for answer in answers:
        if answer.error:
            raise answer.error
    return [answer.token_ids for answer in answers]


def outcome(kind: str) -> tuple[bool, str]:
    """(whether that is as it should be, what became of the type) for one type of model."""
    try:
        model = tiny_model(kind)
    except Exception as error:
        return True, f"not built: {first_line(error)}"
    try:
        check_model(model, LENGTH)
    except ModelError as error:
        return True, f"refused: {str(error).partition('cannot be served: ')[2]}"
    try:
        tokens = served(model)
    except Exception as error:
        return False, f"FAILED after the check: {first_line(error)}"
    try:
        expected = generated(model)
    except Exception as error:
        return True, f"served, and generate fails: {first_line(error)}"
    various = len({token for answer in tokens for token in answer})
    return tokens == expected, f"{'served' if tokens == expected else 'OTHER TOKENS'} ({various} different tokens)"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:160]


def main(arguments: Sequence[str]) -> int:
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # for models as small as these, more threads take longer
    good = True
    for kind in arguments or kinds():
        fine, text = outcome(kind)
        good &= fine
        print(f"{kind:26} {text}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

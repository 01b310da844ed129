"""A GPT-2 of milliseconds: a model with dropout, so that training and evaluation differ."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Random weights, another model for each seed. It is in training mode, as every new module of torch."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=97,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.4,
        eos_token_id=None,
        bos_token_id=None,
    )
    return GPT2LMHeadModel(config).train()


def generated(model: GPT2LMHeadModel, prompt: list[int], count: int) -> list[int]:
    """What `generate` answers, with a copy of the model in evaluation mode."""
    copy = tiny_gpt2()
    copy.load_state_dict(model.state_dict())
    ids = copy.eval().generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return ids[0, len(prompt) :].tolist()

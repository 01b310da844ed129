"""Which attention transformers uses for continuous batching, and why none that is faster."""

from __future__ import annotations

import importlib.util
import os

import torch

ATTENTIONS = ("auto", "sdpa", "flash_attention_2", "stand-in")


def choose_attention(attention: str, device: torch.device) -> tuple[str, str]:
    """(the attention to use on this device, the reason why it is not a faster one). ValueError for an attention that is
    not one of ATTENTIONS, or that cannot be had here."""
    if attention not in ATTENTIONS:
        raise ValueError(f"attention is {attention!r}: allowed are {', '.join(map(repr, ATTENTIONS))}")
    no_flash, no_stand_in = _why_no_flash_attn(device), _why_no_stand_in(device)
    if attention == "flash_attention_2" and no_flash:
        raise ValueError(f"attention is 'flash_attention_2', but {no_flash}")
    if attention == "stand-in" and no_stand_in:
        raise ValueError(f"attention is 'stand-in', but {no_stand_in}")
    if attention != "auto":
        return attention, "as asked for"
    if not no_flash:
        return "flash_attention_2", ""
    if not no_stand_in:
        return "stand-in", no_flash
    return "sdpa", no_flash if no_flash == no_stand_in else f"{no_flash}; {no_stand_in}"


def _why_no_flash_attn(device: torch.device) -> str:
    """Why flash_attn cannot be used; "" where it can."""
    from transformers.utils import is_flash_attn_2_available

    if device.type != "cuda":
        return "flash_attn and its stand-in need CUDA"
    return "" if is_flash_attn_2_available() else "flash_attn is not installed"


def _why_no_stand_in(device: torch.device) -> str:
    """Why the stand-in for flash_attn cannot be used; "" where it can."""
    if device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        return "flash_attn and its stand-in need CUDA"
    if importlib.util.find_spec("triton") is None:
        return "its stand-in needs Triton, which is not installed"
    return ""


def attention_functions():
    """The registry of transformers: functions by name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def paged_name(attention: str) -> str:
    """The name of an attention in continuous batching. Until 5.17 it had a prefix; since then the same function serves
    both ways."""
    prefixed = f"paged|{attention}"
    return prefixed if prefixed in attention_functions() else attention

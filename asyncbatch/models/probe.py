"""What a model asks of attention, seen by running it: two tokens go through it, and a stand-in for attention looks on.

The settings of a model do not say how its layers call attention. So a copy that shares the model's weights runs, called
as the runner calls it: with the two tokens in one row, as in a chunk of a prompt, and with each in a row of its own, as
in a decode step. In place of attention each token sees only itself, so both ways must give the same, layer by layer.
Where they do not, something else than attention carries from token to token, and the model cannot be served. Nor can it
where a cache that claims to be long changes anything: then positions are not taken from `position_ids` alone.
"""

from __future__ import annotations

import copy
import inspect
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .messages import ModelError

ALL = 0  # a window of this size is none: all tokens up to a token's own are seen
WITH_MASKS, BARE = "asyncbatch_probe", "asyncbatch_probe_bare"
TAKEN = {"scaling", "sliding_window", "softcap", "s_aux"}  # options of attention that paged attention takes
# Options that change nothing where a model generates: the mask says what is causal, and nothing is dropped.
IDLE = {"dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}


class AttentionLayer(NamedTuple):
    """What the pool of a layer needs: the name of its attention in `model.named_modules()`, the heads of its keys and
    values, the elements of each key and of each value, their dtype, and of how many tokens, its own included, a token
    sees the keys (0: all)."""

    name: str
    kv_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    window: int

    @property
    def token_bytes(self) -> int:
        """Bytes of the key and value of one token."""
        return self.kv_heads * (self.key_size + self.value_size) * self.dtype.itemsize


def shared_copy(model: Any) -> Any:
    """A copy of the model's module tree, in eval mode, that shares its weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).eval()


_forked: list[bool] = []  # not empty in a child that was forked
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(True))


def attention_layers(model: Any, max_length: int) -> list[AttentionLayer]:
    """The attention of each layer, in the order of a forward pass. Runs the model three times, on two tokens.

    max_length: the longest request. A window that holds so many tokens is none.
    Raises ModelError with the reason if paged attention cannot do what a layer asks for."""
    if _forked:
        torch.set_num_threads(1)  # torch's threads did not come along, and it would wait for them for ever
    model = shared_copy(model)
    start = max(max_length - 2, 0)
    with torch.inference_mode():
        chunk, decode = _run(model, WITH_MASKS, start, one_row=True), _run(model, BARE, start, one_row=False)
    names = {module: name for name, module in model.named_modules()}
    called = [names.get(call.module, type(call.module).__name__) for call in decode.calls]
    if not called:
        raise ModelError("its class does not attend through transformers.AttentionInterface")
    if twice := [name for name, times in Counter(called).items() if times > 1]:
        raise ModelError(f"{twice[0]} calls attention more than once in a pass, and has one place for keys and values")
    if [call.module for call in chunk.calls] != [call.module for call in decode.calls]:
        raise ModelError("other layers call attention for a chunk of a prompt than for a decode step")
    for call in decode.calls:
        _check_call(call)
    masks = [call.mask for call in chunk.calls if call.mask is not None]
    if len(masks) < len(called):
        raise ModelError("its attention has another mask than those that transformers makes")
    _check_same(chunk, decode)
    _check_positions(model, start, decode)
    windows = {mask: window_of(chunk.masks[mask][0], max_length) for mask in set(masks)}
    if forgotten := sorted(_kept_by_cache(model, max_length) - set(windows.values())):
        raise ModelError(f"its cache keeps the newest {forgotten[0]} tokens only, and its mask says otherwise")
    return [
        AttentionLayer(name, call.key.shape[1], call.key.shape[3], call.value.shape[3], call.key.dtype, windows[mask])
        for name, call, mask in zip(called, decode.calls, masks, strict=True)
    ]


class _Call(NamedTuple):
    """One call of attention. mask: the number of the mask that it was given, or None for one that was not ours."""

    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: int | None
    has_marker: bool
    options: dict[str, Any]

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query, self.key, self.value


@dataclass
class _Seen:
    """One run of the model: the masks that it had made and the calls of attention, in order, and its result."""

    masks: list[tuple[Callable[..., Any], torch.Tensor]] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)
    logits: Any = None


_of_thread = threading.local()  # `seen`: of the run in this thread


def _make_mask(*_: Any, mask_function: Callable[..., Any], device: Any = None, dtype: Any = None, **__: Any) -> Any:
    """In place of a mask: zeros that are recognized when they arrive."""
    mask = torch.zeros(1, 1, 2, 2, device=device, dtype=dtype)
    _of_thread.seen.masks.append((mask_function, mask))
    return mask


def _look_on(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *, paged: Any = None, **options: Any):
    """In place of attention: note what was asked for. Each token sees only itself."""
    seen = _of_thread.seen
    number = next((number for number, (_, ours) in enumerate(seen.masks) if _is_part_of(attention_mask, ours)), None)
    seen.calls.append(_Call(module, query, key, value, number, paged is seen, options))
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None


def _is_part_of(mask: Any, ours: torch.Tensor) -> bool:
    """A model may cut a mask to length, and may not change it."""
    return isinstance(mask, torch.Tensor) and mask.untyped_storage()._cdata == ours.untyped_storage()._cdata


def _run(model: Any, name: str, start: int, one_row: bool, cache: Any = None) -> _Seen:
    """Run the model on two tokens, number `start` and the next, as the runner does: in one row, with the second one's
    logits first, or in two."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for each in (WITH_MASKS, BARE):
        AttentionInterface.register(each, _look_on)
    AttentionMaskInterface.register(WITH_MASKS, _make_mask)  # under the other name no mask is known, and none is made
    model.set_attn_implementation(name)
    weight = model.get_input_embeddings().weight
    shape = (1, 2) if one_row else (2, 1)
    ids = torch.tensor([len(weight) // 2, len(weight) // 3], device=weight.device).view(shape)
    places = torch.arange(2, device=weight.device)
    options: dict[str, Any] = {"logits_to_keep": places.flip(0)} if one_row else {}
    if cache is not None:
        named = "cache" in inspect.signature(model.forward).parameters  # so since transformers 5.24
        options["cache" if named else "past_key_values"] = cache
    seen = _of_thread.seen = _Seen()
    try:
        positions = places.view(shape) + start
        seen.logits = model(input_ids=ids, position_ids=positions, use_cache=False, paged=seen, **options).logits
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"a step of two tokens fails ({type(error).__name__}: {reason})") from error
    finally:
        del _of_thread.seen
    return seen


def _check_positions(model: Any, start: int, decode: _Seen) -> None:
    """ModelError if a layer asks a cache for the positions of its tokens. Here there is none to ask."""
    from transformers import DynamicCache

    class LongCache(DynamicCache):
        def get_seq_length(self, *_: Any, **__: Any) -> int:
            return start + 1

        def update(self, key: Any, value: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
            return key, value

    try:
        with torch.inference_mode():
            cached = _run(model, BARE, start, one_row=False, cache=LongCache())
    except ModelError:  # its own kind of cache, which it does not find
        return
    for one, two in zip(cached.calls, decode.calls, strict=True):
        if not all(_is_close(x, y) for x, y in zip(one.tensors, two.tensors, strict=True)):
            raise ModelError(f"its {type(one.module).__name__} takes positions from the cache, not from position_ids")


def _kept_by_cache(model: Any, max_length: int) -> set[int]:
    """How many tokens those layers keep, in the cache that `generate` makes for this model, that do not keep all."""
    from transformers import DynamicCache

    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    kept = {layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)}
    return {size for size in kept if size < max_length}


def _check_call(call: _Call) -> None:
    """ModelError if paged attention cannot do what this call asks for."""
    kind = type(call.module).__name__
    if not call.has_marker:
        raise ModelError(f"its layers drop what the model is called with: no batch arrives at the attention of {kind}")
    asked = {name for name, value in call.options.items() if value is not None and value is not False}
    if unknown := sorted(asked - TAKEN - IDLE):
        raise ModelError(f"its attention asks for {', '.join(unknown)}, which paged attention here does not have")
    (_, heads, _, size), kv_heads = call.query.shape, call.key.shape[1]
    if call.key.shape[:3] != call.value.shape[:3] or call.key.shape[3] != size or heads % kv_heads:
        shapes = ", ".join(str(list(each.shape)) for each in (call.query, call.key, call.value))
        raise ModelError(f"the shapes of its queries, keys and values do not fit together ({kind}: {shapes})")
    if len(dtypes := {str(each.dtype) for each in (call.query, call.key, call.value)}) > 1:
        raise ModelError(f"its queries, keys and values have different dtypes ({', '.join(sorted(dtypes))})")


def _check_same(chunk: _Seen, decode: _Seen) -> None:
    """ModelError if a token's queries, keys, values or logits depend on whether the other token is in its row."""
    for in_chunk, alone in zip(chunk.calls, decode.calls, strict=True):
        for one, two in zip(in_chunk.tensors, alone.tensors, strict=True):
            if not _is_close(one.transpose(0, 2), two):
                raise ModelError("attention is not all that carries from token to token")
    logits, alone = chunk.logits[0], decode.logits[:, 0]
    if not _is_close(logits.flip(0), alone):
        if _is_close(logits, alone):
            raise ModelError("its forward takes no logits_to_keep")
        raise ModelError("attention is not all that carries from token to token")


def _is_close(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether both are the same but for rounding."""
    if one.shape != two.shape or one.is_meta:
        return one.shape == two.shape
    one, two = one.float(), two.float()
    most = float(two.nan_to_num(0.0).abs().max())
    return torch.allclose(one, two, rtol=0.0, atol=most / 50 + 1e-6, equal_nan=True)


def window_of(mask_function: Callable[..., Any], max_length: int) -> int:
    """How many tokens a token sees, itself included, by a mask function of transformers; ALL if it sees all before it
    in requests of up to `max_length` tokens. ModelError for a mask of another form."""

    def sees(query: int, key: int) -> bool:
        try:
            return bool(mask_function(*(torch.tensor(number) for number in (0, 0, query, key))))
        except Exception as error:
            raise ModelError("its mask depends on more than the positions of two tokens") from error

    last = max_length - 1
    window, most = 1, max_length
    while window < most:  # the last token sees those that are less than `window` before it
        middle = (window + most) // 2
        window, most = (middle + 1, most) if sees(last, last - middle) else (window, middle)
    for query in {
        0,
        1,
        window - 1,
        window,
        window + 1,
        2 * window,
        2 * window + 1,
        last // 3,
        last // 2,
        last - 1,
        last,
    }:
        for distance in {-1, 0, 1, window // 2, window - 1, window, window + 1, query}:
            if query <= last and distance <= query and sees(query, query - distance) != (0 <= distance < window):
                raise ModelError(
                    f"its attention is neither causal nor a sliding window in requests of up to {max_length} tokens "
                    f"(a token at {query} and the one at {query - distance})"
                )
    return ALL if window == max_length else window

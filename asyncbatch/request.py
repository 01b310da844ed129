"""What a caller asks for and what comes back: `Request`, `SamplingParams`, `Completion`, and when a request ends.

Nothing here knows about batches or devices. A request is checked once, when it is submitted. A bad one raises a
`RequestError`, which says what was given and what is allowed. The other requests are not affected.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, field
from numbers import Integral, Real

import numpy as np

NO_TOKEN = -1  # what a step gives for a row whose logits are not finite: no token can be chosen from them


class RequestError(ValueError):
    """What a caller asked for cannot be done: a bad request, a handle of another batcher, a closed batcher.

    This is the one exception for anything wrong with the arguments of `submit`, `run`, `stream` or `cancel`. The
    message says what was given and what is allowed. Nothing has been queued, and all other requests go on. (For a bad
    request, `run` does not raise it but puts it into that request's `Completion.error`.)
    """


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen from the logits.

    temperature: 0 takes the most likely token (greedy). A number from 1e-6 to 1e6 divides the logits before the softmax
        (beyond these limits a logit could leave the range of float32).
    top_k: keep only the k most likely tokens. 0 keeps all.
    top_p: keep only the most likely tokens, as few as together reach the probability top_p (Holtzman et al. 2019, "The
        Curious Case of Neural Text Degeneration"). 1.0 keeps all.
    seed: 0 to 2**63 - 1. The random number for a token depends on this seed and on the token's position, and on nothing
        else. So the same request gives the same tokens in any batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    token_ids: the prompt, one int for each token, at least one.
    max_new_tokens: how many tokens to generate at most, from 1 on.
    stop_token_ids: the request ends when one of these tokens is generated (it stays in the result). None means the
        model's own end-of-sequence tokens. () means none: then only the length limit ends the request.
    stop_strings: the request ends when the generated text contains one of these. The batcher then needs a tokenizer.
    """

    token_ids: Sequence[int]
    max_new_tokens: int = 64
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: Collection[int] | None = None
    stop_strings: Sequence[str] = ()


@dataclass
class Completion:
    """What became of a request.

    token_ids: the tokens that were generated, up to the end of the request.
    finish_reason: "stop" (a stop token or stop string), "length" (max_new_tokens is reached), "cancelled" or "error".
    error: the exception, if finish_reason is "error"; else None.
    submitted_s, first_token_s, finished_s: times in seconds on the host's clock (`time.perf_counter`). first_token_s is
        None if there is no token.
    """

    token_ids: list[int]
    finish_reason: str
    error: Exception | None = None
    submitted_s: float = 0.0
    first_token_s: float | None = None
    finished_s: float = 0.0


def finish_reason(token_ids: Sequence[int], max_new_tokens: int, stop_token_ids: Collection[int]) -> str | None:
    """Why a request that has generated `token_ids` so far is finished, or None if it is not.

    If the last token that is allowed is a stop token, the reason is "stop": the model has ended its text by itself.
    """
    if token_ids and token_ids[-1] in stop_token_ids:
        return "stop"
    return "length" if len(token_ids) >= max_new_tokens else None


def token_numbers(name: str, ids) -> tuple[int, ...]:
    """A token number, or any nesting of lists of them, or None for none, as a tuple. RequestError for anything else."""
    if ids is None:
        return ()
    if _is_whole(ids):
        return (int(ids),)
    if isinstance(ids, (Sequence, Set, np.ndarray)) and not isinstance(ids, (str, bytes)):
        return tuple(number for item in ids for number in token_numbers(name, item))
    raise RequestError(f"{name} has {shown(ids)}: allowed are a token number, a list of them, and None")


def contains_stop_string(token_ids: Sequence[int], stop_strings: Sequence[str], tokenizer) -> bool:
    """True if the newest of the generated tokens completes one of `stop_strings`.

    Only a tail of the tokens is decoded: as many as the longest stop string has bytes, and two more for tokenizers that
    trim the first word's space. Some tokens have no text (numbers beyond a tokenizer, in a padded vocabulary), so while
    the tail's text is shorter than what a stop string and the newest token can fill, the tail is doubled.
    """
    longest = max(map(len, stop_strings)) + 2 + len(tokenizer.decode(token_ids[-1:]))
    tail = max(len(text.encode()) for text in stop_strings) + 2
    while True:
        text = tokenizer.decode(token_ids[-tail:])
        if any(stop in text for stop in stop_strings):
            return True
        # (A character whose first bytes are cut off shows as U+FFFD: it says nothing about the length.)
        if tail >= len(token_ids) or len(text.replace("\ufffd", "")) >= longest:
            return False
        tail *= 2


def shown(value, longest: int = 60) -> str:
    """A value as it stands in an error message: on one line of at most `longest` characters, however large it is."""
    if isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) >> 100:
        return f"a whole number of {int(value).bit_length()} bits"  # Python refuses to write out very long ones
    try:
        text = " ".join(repr(value).split())
    except Exception:  # the caller's own __repr__ fails, or a list holds an int of thousands of digits
        return f"a {type(value).__name__} that cannot be written out"
    return text if len(text) <= longest else text[: longest - 3] + "..."


def check_request(request: Request, *, vocab_size: int, max_length: int, limited_by: str, tokenizer=None) -> None:
    """Raise RequestError unless `request` can be served.

    vocab_size: how many tokens the model knows. max_length: how many tokens fit, prompt and output together.
    limited_by: where that limit comes from, in words for the message. tokenizer: needed for stop strings.
    """
    if not isinstance(request, Request):
        raise RequestError(f"a request must be a Request, not {type(request).__name__} {shown(request)}")
    ids = request.token_ids
    is_list = isinstance(ids, (Sequence, np.ndarray)) and not isinstance(ids, (str, bytes, bytearray))
    if not is_list or getattr(ids, "ndim", 1) != 1:
        shape = f" of shape {tuple(ids.shape)}" if hasattr(ids, "shape") else ""
        raise RequestError(
            f"token_ids must be a list of token numbers, not {type(ids).__name__}{shape} {shown(ids)}: turn text into "
            "tokens first, tokenizer(text).input_ids, and a tensor into a list, tensor.tolist()"
        )
    if len(ids) == 0:
        raise RequestError("token_ids is empty: a prompt needs at least one token")
    for index, token in enumerate(ids):
        if not _is_whole(token) or not 0 <= token < vocab_size:
            raise RequestError(f"token_ids[{index}] is {shown(token)}: the vocabulary has 0 to {vocab_size - 1}")
    limit = request.max_new_tokens
    if not _is_whole(limit) or limit < 1:
        raise RequestError(f"max_new_tokens is {shown(limit)}: allowed are whole numbers from 1")
    total = len(ids) + int(limit)  # a NumPy number would wrap around here: uint8(255) + 2 is 1
    if total > max_length:
        raise RequestError(
            f"the prompt has {len(ids)} tokens and max_new_tokens is {shown(limit)}, together {shown(total)}: "
            f"at most {max_length} fit ({limited_by})"
        )
    _check_sampling(request.sampling)
    _check_stops(request, vocab_size, tokenizer)


def _is_whole(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_sampling(sampling: SamplingParams) -> None:
    def number(name: str, value, kind, allowed: str, is_allowed) -> None:
        if not isinstance(value, kind) or isinstance(value, bool) or not is_allowed(value):
            raise RequestError(f"sampling.{name} is {shown(value)}: allowed {allowed}")

    if not isinstance(sampling, SamplingParams):
        raise RequestError(f"sampling must be a SamplingParams, not {type(sampling).__name__} {shown(sampling)}")
    heat = "is 0 (greedy), or from 1e-6 to 1e6"
    number("temperature", sampling.temperature, Real, heat, lambda t: t == 0 or 1e-6 <= t <= 1e6)
    number("top_k", sampling.top_k, Integral, "are whole numbers from 0 (all) to 2**31 - 1", lambda k: 0 <= k < 2**31)
    number("top_p", sampling.top_p, Real, "is above 0 and at most 1", lambda p: 0 < p <= 1)
    number("seed", sampling.seed, Integral, "are whole numbers from 0 to 2**63 - 1", lambda s: 0 <= s < 2**63)


def _check_stops(request: Request, vocab_size: int, tokenizer) -> None:
    tokens, texts = request.stop_token_ids, request.stop_strings
    allowed = f"whole numbers from 0 to {vocab_size - 1}"
    is_list = isinstance(tokens, (Collection, np.ndarray)) and not isinstance(tokens, (str, bytes, bytearray))
    if tokens is not None and (not is_list or getattr(tokens, "ndim", 1) != 1):
        raise RequestError(
            f"stop_token_ids must be a list or set of token numbers, or None for the model's own, not "
            f"{type(tokens).__name__} {shown(tokens)}: allowed in it are {allowed}"
        )
    for token in () if tokens is None else tokens:
        if not _is_whole(token) or not 0 <= token < vocab_size:
            raise RequestError(f"stop_token_ids has {shown(token)}: allowed are {allowed}")
    if (
        not isinstance(texts, Collection)
        or isinstance(texts, (str, bytes, bytearray))
        or getattr(texts, "ndim", 1) != 1
    ):
        one = "one string" if isinstance(texts, str) else type(texts).__name__
        raise RequestError(f"stop_strings must be a list of strings, not {one} ({shown(texts)})")
    for text in texts:
        if not isinstance(text, str) or not text:
            raise RequestError(f"stop_strings has {shown(text)}: allowed are strings of at least one character")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError(
                f"stop_strings has {shown(text)}, half of a UTF-16 pair: allowed are strings that UTF-8 can write"
            ) from None
    if len(texts) and tokenizer is None:
        raise RequestError(
            f"stop_strings is {shown(texts)}, which needs the text of the tokens: give the batcher a tokenizer=..."
        )

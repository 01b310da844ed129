"""What a profiling run serves, and when each request arrives.

    requests = make_requests(options, model, tokenizer)         # random prompts, short questions, or a file's lines
    arrivals_s = arrival_times("poisson:50", len(requests), seed=0)
    completions = serve(batcher, requests, arrivals_s)          # with either engine
    latency(completions)

Numbers of tokens are fixed or drawn (`Lengths`), times of arrival are all zero or drawn (`arrival_times`); a draw
depends on the seed alone, and each has random numbers of its own: other arrivals do not change the prompts.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..base import BatcherBase
from ..measure.points import LANE
from ..measure.points import NO_REQUEST as NO_REQUEST_NAME
from ..request import Completion, Request, shown

TOPICS = (
    "the sea", "a library", "rain", "old trains", "bread", "a lost key", "the moon", "two cats", "music", "winter",
    "a lighthouse", "gravity", "a market", "prime numbers", "the desert", "a letter",
)  # fmt: skip
MOST = 10**9  # tokens of a length that may be asked for
NO_REQUEST = (LANE, NO_REQUEST_NAME, -1)  # lane, name and step of the time in which there was nothing to serve
_PROMPT_LENGTHS, _NEW_LENGTHS, _ARRIVALS = 1, 2, 3  # with the seed, what each draw's random numbers depend on


# ---- lengths and arrivals -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens, one for each request: whole numbers from `lowest` to `highest`, all equally likely. Where
    `highest` is None they are log-normal instead, with this `median` and `sigma`, rounded, at least `lowest`."""

    lowest: int
    highest: int | None
    median: float = 0.0
    sigma: float = 0.0

    @classmethod
    def parse(cls, given: int | str) -> Lengths:
        """From a number, "16-128" or "lognormal:64:0.5" (median, sigma). ValueError for anything else."""
        text = str(given)
        if found := re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", text):
            lowest, highest = int(found[1]), int(found[2] or found[1])
            if 1 <= lowest <= highest <= MOST:
                return cls(lowest, highest)
        elif (numbers := _numbers_after("lognormal", text, 2)) and 1 <= numbers[0] <= MOST and 0 <= numbers[1] <= 5:
            return cls(1, None, *numbers)
        raise ValueError(
            f"{text!r} was given; allowed are a whole number from 1 (64), two of them (16-128: uniform between them), "
            "or lognormal:MEDIAN:SIGMA (lognormal:64:0.5), MEDIAN from 1 and SIGMA from 0 to 5"
        )

    def __str__(self) -> str:
        if self.highest is None:
            return f"lognormal:{self.median:.15g}:{self.sigma:.15g}"
        return f"{self.lowest}" if self.fixed else f"{self.lowest}-{self.highest}"

    @property
    def fixed(self) -> bool:
        return self.lowest == self.highest

    @property
    def needed(self) -> int:
        """What a model must allow. A log-normal has no largest value: its draws are cut where the model ends."""
        return self.lowest if self.highest is None else self.highest

    def draw(self, generator: np.random.Generator, count: int, most: int | Sequence[int] = MOST) -> list[int]:
        """`count` numbers. `most`, for all or for each of them: where a log-normal is cut; from `needed` on."""
        if self.highest is not None:
            return generator.integers(self.lowest, self.highest + 1, count).tolist()
        values = self.median * np.exp(self.sigma * generator.standard_normal(count))
        return np.clip(np.rint(values), self.lowest, most).astype(np.int64).tolist()


@dataclass(frozen=True)
class Arrivals:
    """When requests arrive: all at the beginning (`rate` None), or as a Poisson process of `rate` requests a second."""

    rate: float | None = None

    @classmethod
    def parse(cls, text: str) -> Arrivals:
        """From "all" or "poisson:RATE". ValueError for anything else."""
        if text == "all":
            return cls()
        if (numbers := _numbers_after("poisson", text, 1)) and 1e-4 <= numbers[0] <= 1e6:
            return cls(numbers[0])
        raise ValueError(
            f"{text!r} was given; allowed are all, or poisson:RATE (poisson:50), RATE requests per second from 0.0001 "
            "to 1000000"
        )

    def __str__(self) -> str:
        return "all" if self.rate is None else f"poisson:{self.rate:.15g}"

    def times(self, count: int, seed: int) -> list[float]:
        """Seconds from the beginning, rising, the first one 0. More requests only add times at the end."""
        if self.rate is None:
            return [0.0] * count
        gaps = np.random.default_rng([seed, _ARRIVALS]).exponential(1 / self.rate, max(count - 1, 0))
        return [0.0, *np.cumsum(gaps).tolist()][:count]


def arrival_times(text: str, count: int, seed: int) -> list[float]:
    """`Arrivals.parse(text).times(count, seed)`."""
    return Arrivals.parse(text).times(count, seed)


def _numbers_after(name: str, text: str, count: int) -> list[float] | None:
    """The `count` numbers of "name:1:0.5", or None if `text` is not of this form."""
    first, *rest = text.split(":")
    try:
        numbers = [float(part) for part in rest]
    except ValueError:
        return None
    return numbers if first == name and len(numbers) == count else None


def uneven(options: argparse.Namespace) -> list[str]:
    """Names of the options by which requests differ in length, or are not all there at the beginning."""
    drawn = [name for name in ("prompt_tokens", "new_tokens") if isinstance(getattr(options, name), str)]
    return ["prompts"] * (options.prompts is not None) + drawn + ["arrivals"] * (options.arrivals != "all")


# ---- a file of prompts --------------------------------------------------------------------------------------------

KINDS = ("prompt", "messages", "token_ids")
ONE_OF_KINDS = 'exactly one of "prompt", "messages" and "token_ids"'


@dataclass(frozen=True)
class Line:
    """A line of a prompts file: where it stands ("file, line 3"), which of KINDS it has, and what is in it."""

    where: str
    kind: str
    content: Any
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class PromptFile:
    """The lines of a prompts file, blank ones left out, and the beginning of its SHA-256."""

    lines: list[Line]
    sha256: str

    @classmethod
    def read(cls, path: str) -> PromptFile:
        """A `.txt` file has a prompt a line; a `.jsonl` file a JSON object a line, with exactly one of "prompt" (text),
        "messages" (a chat: a list of objects with "role" and "content") and "token_ids", and perhaps "max_new_tokens".
        ValueError, with the number of the line, for anything else; nothing is turned into tokens yet."""
        parse = {".txt": _text_line, ".jsonl": _json_line}.get(Path(path).suffix.lower())
        if parse is None:
            raise ValueError(
                f"--prompts {path}: allowed are files that end in .txt (one prompt a line) or .jsonl (one JSON object "
                "a line)"
            )
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"--prompts {path}: {error.strerror}") from None
        lines = []
        for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            where = f"{path}, line {number}"
            try:
                text = raw.removesuffix(b"\r").decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: byte {error.start + 1} of the line is not UTF-8") from None
            if text.strip():
                lines.append(parse(where, text))
        if not lines:
            raise ValueError(f"--prompts {path}: there is no prompt in it")
        return cls(lines, hashlib.sha256(data).hexdigest()[:16])


def _text_line(where: str, text: str) -> Line:
    return Line(where, "prompt", text)


def _json_line(where: str, text: str) -> Line:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise ValueError(f"{where}: JSON that cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: a JSON object with {ONE_OF_KINDS} is expected, not {shown(found)}")
    kinds = [kind for kind in KINDS if kind in found]
    if len(kinds) != 1:
        have = " and ".join(f'"{kind}"' for kind in kinds) or "none of them"
        raise ValueError(f"{where}: {ONE_OF_KINDS} is allowed, and it has {have}")
    if unknown := sorted(set(found) - {*kinds, "max_new_tokens"}):
        raise ValueError(f'{where}: unknown key {shown(unknown[0])}; allowed beside "{kinds[0]}" is "max_new_tokens"')
    kind, content, limit = kinds[0], found[kinds[0]], found.get("max_new_tokens")
    expected, fits = {
        "prompt": ("text of at least one character that UTF-8 can write", _is_text),
        "messages": ('a list of objects, each with the texts "role" and "content" and nothing else', _is_chat),
        "token_ids": ("a list of at least one whole number from 0", _is_token_ids),
    }[kind]
    if not fits(content):
        raise ValueError(f'{where}: "{kind}" is {shown(content)}; allowed is {expected}')
    if "max_new_tokens" in found and not (type(limit) is int and 1 <= limit <= MOST):
        raise ValueError(f'{where}: "max_new_tokens" is {shown(limit)}; allowed are whole numbers from 1')
    return Line(where, kind, content, limit)


def _is_text(content: Any) -> bool:
    try:
        return isinstance(content, str) and len(content.encode()) > 0
    except UnicodeEncodeError:  # half of a UTF-16 pair: JSON can write it
        return False


def _is_chat(content: Any) -> bool:
    def is_message(one: Any) -> bool:
        return isinstance(one, dict) and one.keys() == {"role", "content"} and all(map(_is_text, one.values()))

    return isinstance(content, list) and bool(content) and all(map(is_message, content))


def _is_token_ids(content: Any) -> bool:
    return isinstance(content, list) and bool(content) and all(type(one) is int and one >= 0 for one in content)


def token_ids_of(line: Line, tokenizer, model_name: str, vocab_size: int) -> list[int]:
    """The prompt in tokens. ValueError, with the number of the line, where there is no tokenizer or no chat template
    for it, and for tokens that the model does not have."""
    if line.kind == "token_ids":
        beyond = next((token for token in line.content if token >= vocab_size), None)
        if beyond is not None:
            has = f"the vocabulary of {model_name} has 0 to {vocab_size - 1}"
            raise ValueError(f'{line.where}: "token_ids" has {shown(beyond)}: {has}')
        return line.content
    if tokenizer is None:
        raise ValueError(
            f'{line.where}: "{line.kind}" is text, and {model_name} has no tokenizer here: allowed are .jsonl files '
            'with "token_ids"'
        )
    if line.kind == "messages" and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f'{line.where}: the tokenizer of {model_name} has no chat template: allowed are "prompt" and "token_ids"'
        )
    try:
        if line.kind == "messages":
            ids = tokenizer.apply_chat_template(line.content, add_generation_prompt=True, return_dict=False)
        else:
            ids = tokenizer(line.content, verbose=False).input_ids  # no warning of its own when it is long
    except Exception as error:  # a template may refuse a chat with any exception
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{line.where}: the tokenizer of {model_name} refused it: {said}") from error
    if not ids:
        raise ValueError(f"{line.where}: the prompt has no tokens: at least one is needed")
    return list(ids)


# ---- requests -----------------------------------------------------------------------------------------------------


def make_requests(options: argparse.Namespace, model, tokenizer) -> list[Request]:
    """`options.requests` requests: the lines of `options.prompt_file`, or random prompts of `options.prompt_tokens`
    tokens, or, for a chat model that is told neither, short questions. Lines and questions are cycled or cut; there the
    model may end by itself, unless `options.new_tokens` is a distribution. Otherwise each request runs to its length.

    ValueError for what is too long for the model. Log-normal lengths are cut instead: prompts so that the new tokens
    still fit, then new tokens to what is left beside the prompt."""
    config, count = model.config.get_text_config(), options.requests
    most = getattr(config, "max_position_embeddings", None) or 2048
    new, file = Lengths.parse(options.new_tokens), options.prompt_file
    limits: list[int | None] = [None]  # what a line of the file says of itself
    stop: tuple[()] | None = None if new.fixed else ()
    if file is not None:
        wanted = file.lines[:count]
        prompts = [token_ids_of(line, tokenizer, options.model, config.vocab_size) for line in wanted]
        limits = [line.max_new_tokens for line in wanted]
        for line, prompt in zip(wanted, prompts, strict=True):
            if len(prompt) + (line.max_new_tokens or new.needed) > most:
                asked = line.max_new_tokens or new
                raise ValueError(f"{line.where}: {_too_long(len(prompt), asked, options.model, most)}")
    elif options.prompt_tokens is None and getattr(tokenizer, "chat_template", None):
        chats = [[{"role": "user", "content": f"Tell me about {topic}."}] for topic in TOPICS]
        prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
        longest = max(map(len, prompts))
        if longest + new.needed > most:
            raise ValueError(_too_long(longest, new, options.model, most))
    else:
        lengths, stop = Lengths.parse(options.prompt_tokens or 16), ()
        if lengths.needed + new.needed > most:
            raise ValueError(_too_long(lengths, new, options.model, most))
        generator = np.random.default_rng([options.seed, _PROMPT_LENGTHS])
        drawn = lengths.draw(generator, count, most - new.needed)
        tokens = np.random.default_rng(options.seed).integers(0, config.vocab_size, sum(drawn))
        prompts = [part.tolist() for part in np.split(tokens, np.cumsum(drawn)[:-1])]
    prompts = list(itertools.islice(itertools.cycle(prompts), count))
    room = [most - len(prompt) for prompt in prompts]
    new_tokens = new.draw(np.random.default_rng([options.seed, _NEW_LENGTHS]), count, room)
    asked_for = zip(prompts, new_tokens, itertools.cycle(limits), strict=False)
    return [Request(prompt, limit or drawn_one, stop_token_ids=stop) for prompt, drawn_one, limit in asked_for]


def _too_long(prompt: int | Lengths, new: int | Lengths, model_name: str, most: int) -> str:
    return f"prompts of {prompt} tokens and {new} new ones: {model_name} allows {most}"


def note_sizes(options: argparse.Namespace, requests: Sequence[Request]) -> None:
    """Write into the options how large the requests are: `longest_prompt` and `new_tokens` are the largest of them, and
    `max_length` is what a batcher must allow for the two together."""
    options.longest_prompt = max(len(request.token_ids) for request in requests)
    options.new_tokens = max(request.max_new_tokens for request in requests)
    options.max_length = max(len(request.token_ids) + request.max_new_tokens for request in requests)


def most_context(requests: Sequence[Request], batch_size: int) -> int:
    """The most tokens that the rows of one step can attend to, over all rows."""
    ends = sorted((len(request.token_ids) + request.max_new_tokens - 1 for request in requests), reverse=True)
    return sum(ends[:batch_size])


# ---- serving ------------------------------------------------------------------------------------------------------


def arrival_order(requests: Sequence[Request], arrivals_s: Sequence[float]) -> list[int]:
    """The places of the requests in the order in which they arrive. ValueError unless each has a time from 0."""
    if len(arrivals_s) != len(requests):
        raise ValueError(f"arrivals_s has {len(arrivals_s)} times for {len(requests)} requests: each needs one")
    for moment in arrivals_s:
        if not 0 <= moment < math.inf:
            raise ValueError(f"arrivals_s has {shown(moment)}: allowed are seconds from 0")
    return sorted(range(len(requests)), key=lambda index: arrivals_s[index])


def serve(batcher, requests: Sequence[Request], arrivals_s: Sequence[float] | None = None, progress: bool = False
          ) -> list[Completion]:  # fmt: skip
    """Serve requests that arrive at `arrivals_s` (seconds from the beginning; None: all at once) with a batcher of this
    package or of `peers`. Their completions are in the order given, and errors and interrupts are those of its `run`.

    `submitted_s` is then the moment at which a request arrived, though a loop in the middle of a turn took it a little
    later. The time without any request is noted on the timeline, as NO_REQUEST: idle for want of work."""
    requests = list(requests)
    if arrivals_s is None or not any(arrivals_s):
        return batcher.run(requests, progress)
    if not isinstance(batcher, BatcherBase):
        return batcher.run(requests, progress, arrivals_s)
    order = arrival_order(requests, arrivals_s)
    device, start_s = batcher.device, 0.0

    def arriving() -> Iterator[Request]:
        """Each request when it is due; until then the loop is turned for those that are there."""
        nonlocal start_s
        start_s = device.now()
        with _bar(len(requests), progress) as bar:
            for index in order:
                due = start_s + arrivals_s[index]
                while device.now() < due:
                    if not batcher.turn():
                        _wait(batcher, due)
                bar.update()
                yield requests[index]

    answers = batcher.run(arriving(), progress)
    completions = dict(zip(order, answers, strict=True))
    for index, completion in completions.items():
        completion.submitted_s = start_s + arrivals_s[index]
    return [completions[index] for index in range(len(requests))]


def _wait(batcher: BatcherBase, moment: float) -> None:
    """Until then there is no request."""
    device, start = batcher.device, batcher.device.now()
    if start < moment:
        device.wait_until(moment)
        batcher.timeline.add(*NO_REQUEST, start, device.now())


def _bar(total: int, wanted: bool):
    from tqdm import tqdm

    return tqdm(total=total, unit=" requests arrived", leave=False, disable=not wanted)


def latency(completions: Sequence[Completion]) -> dict[str, dict[str, float | None]]:
    """What those who wait for the tokens notice, in milliseconds, as median and p99 over the requests:

    first_token_ms: from the arrival of a request to its first token.
    per_token_ms: from one of its tokens to the next, on average over the request (with two tokens or more).
    end_to_end_ms: from its arrival to its end.
    p99 is the smallest of them that at least 99 % do not exceed. Null where no request has such a time; one that was
    cancelled or failed counts for its first token only.
    """
    first, between, whole = [], [], []
    for one in completions:
        has_ended = one.finish_reason in ("stop", "length")
        if one.first_token_s is not None:
            first.append(one.first_token_s - one.submitted_s)
            if has_ended and len(one.token_ids) > 1:
                between.append((one.finished_s - one.first_token_s) / (len(one.token_ids) - 1))
        if has_ended:
            whole.append(one.finished_s - one.submitted_s)
    times = {"first_token_ms": first, "per_token_ms": between, "end_to_end_ms": whole}
    return {name: _median_and_p99(seconds) for name, seconds in times.items()}


def _median_and_p99(seconds: Sequence[float]) -> dict[str, float | None]:
    if not seconds:
        return {"median": None, "p99": None}
    ranked = sorted(seconds)
    p99 = ranked[math.ceil(0.99 * len(ranked)) - 1]
    return {"median": 1e3 * statistics.median(ranked), "p99": 1e3 * p99}

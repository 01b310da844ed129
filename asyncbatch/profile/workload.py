"""What a profiling run serves, and how it is served.

    workload = Workload("smollm2", batch_size=8, requests=16, new_tokens=64)
    requests = make_requests(workload, model, tokenizer)        # random prompts, short questions, or a file's lines
    arrivals_s = arrival_times("poisson:50", len(requests), seed=0)
    completions = serve_over_time(batcher, requests, arrivals_s)          # with either engine
    latency(completions)

How many tokens a request has, and when it arrives, can be drawn (`draws.py`); prompts can come from a file
(`prompts.py`).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..base import BatcherBase
from ..measure.percentile import p99
from ..measure.points import LANE, NO_REQUEST
from ..request import Completion, Request, shown
from .draws import NEW_LENGTHS, PROMPT_LENGTHS, Lengths
from .prompts import BadLine, Line, PromptFile, first_of, token_ids_of
from .report import Latency, MedianAndP99

TOPICS = (
    "the sea", "a library", "rain", "old trains", "bread", "a lost key", "the moon", "two cats", "music", "winter",
    "a lighthouse", "gravity", "a market", "prime numbers", "the desert", "a letter",
)  # fmt: skip
NO_REQUEST_SPAN = (LANE, NO_REQUEST, -1)  # lane, name and step of the time in which there was nothing to serve


@dataclass(frozen=True)
class Workload:
    """What is served to a model, at most `batch_size` requests in one step.

    prompt_tokens: length of random prompts, a number or the text of a distribution (see `draws.Lengths`); None for a
    chat model's short questions, or for the prompts of `prompt_file`; once: serve each of its lines that can be served
    once, at most `requests` of them, and repeat none. new_tokens: the most that a request generates, a
    number or a distribution. arrivals: "all" at the beginning, or "poisson:RATE" (see `draws.Arrivals`). name: what a
    preset calls it."""

    model: str
    batch_size: int
    requests: int
    new_tokens: int | str
    prompt_tokens: int | str | None = None
    prompt_file: PromptFile | None = None
    arrivals: str = "all"
    seed: int = 0
    name: str | None = None
    once: bool = False

    @property
    def words(self) -> str:
        """What it is called where there are several."""
        return self.name or f"{self.model} batch {self.batch_size}"


@dataclass(frozen=True)
class Sizes:
    """How large the requests of a workload came out, in tokens: the longest prompt, the most new tokens of a request,
    and what a batcher must allow for both together."""

    longest_prompt: int
    new_tokens: int
    max_length: int

    @classmethod
    def of(cls, requests: Sequence[Request]) -> Sizes:
        return cls(
            max(len(request.token_ids) for request in requests),
            max(request.max_new_tokens for request in requests),
            max(len(request.token_ids) + request.max_new_tokens for request in requests),
        )


# ---- requests -----------------------------------------------------------------------------------------------------


def make_requests(workload: Workload, model, tokenizer) -> list[Request]:
    """The requests of a workload: the lines of its prompts file, or random prompts, or, for a chat model of which
    neither is asked, short questions. Lines and questions are repeated, or cut off, to as many as there are requests.

    Random prompts run to their length; a line or a question may be ended by the model, unless `new_tokens` is a
    distribution. ValueError for what is too long for the model. Log-normal lengths are cut instead: prompts so that
    the new tokens still fit, then new tokens to what is left beside the prompt."""
    config = model.config.get_text_config()
    most = max_positions(config)
    new = Lengths.parse(workload.new_tokens)
    limits: list[int | None] = [None]  # what a line of the file says of itself
    count = workload.requests
    stop: tuple[()] | None = None if new.fixed else ()
    if workload.prompt_file is not None:
        prompts, limits = _lines(workload, workload.prompt_file, tokenizer, config.vocab_size, most)
        count = len(prompts) if workload.once else count
    elif workload.prompt_tokens is None and getattr(tokenizer, "chat_template", None):
        prompts = _questions(tokenizer)
        longest = max(map(len, prompts))
        if longest + new.needed > most:
            raise ValueError(_too_long(longest, new, workload.model, most))
    else:
        prompts, stop = _random_prompts(workload, config.vocab_size, most), ()
    prompts = list(itertools.islice(itertools.cycle(prompts), count))
    room = [most - len(prompt) for prompt in prompts]
    new_tokens = new.draw(np.random.default_rng([workload.seed, NEW_LENGTHS]), count, room)
    rows = zip(prompts, new_tokens, itertools.cycle(limits), strict=False)
    return [Request(prompt, limit or drawn, stop_token_ids=stop) for prompt, drawn, limit in rows]


def max_positions(config: Any) -> int:
    """How many tokens a model takes in one sequence, from its config."""
    return getattr(config, "max_position_embeddings", None) or 2048


def _lines(workload: Workload, file: PromptFile, tokenizer, vocab_size: int, most: int
           ) -> tuple[list[list[int]], list[int | None]]:  # fmt: skip
    """(prompts, limits): the tokens of each line, and its own limit of new tokens. BadLine for one that cannot be
    served; where the file skips those, they are noted in it."""
    new = Lengths.parse(workload.new_tokens)
    prompts: list[list[int]] = []
    limits: list[int | None] = []
    for line in file.lines:
        if len(prompts) == workload.requests:
            break
        try:
            prompt = _fitting(line, token_ids_of(line, tokenizer, workload.model, vocab_size), new, workload, most)
        except BadLine as error:
            if not file.skip:
                raise
            file.bad.append(error)
        else:
            prompts.append(prompt)
            limits.append(line.max_new_tokens)
    if not prompts:
        raise ValueError(f"--prompts {file.path}: no line of it can be served{first_of(file.bad)}")
    return prompts, limits


def _fitting(line: Line, prompt: list[int], new: Lengths, workload: Workload, most: int) -> list[int]:
    limit = line.max_new_tokens or new
    if len(prompt) + (line.max_new_tokens or new.needed) > most:
        raise BadLine(line.where, line.number, _too_long(len(prompt), limit, workload.model, most))
    return prompt


def _questions(tokenizer) -> list[list[int]]:
    chats = [[{"role": "user", "content": f"Tell me about {topic}."}] for topic in TOPICS]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]


def _random_prompts(workload: Workload, vocab_size: int, most: int) -> list[list[int]]:
    lengths, new = Lengths.parse(workload.prompt_tokens or 16), Lengths.parse(workload.new_tokens)
    if lengths.needed + new.needed > most:
        raise ValueError(_too_long(lengths, new, workload.model, most))
    generator = np.random.default_rng([workload.seed, PROMPT_LENGTHS])
    drawn = lengths.draw(generator, workload.requests, most - new.needed)
    tokens = np.random.default_rng(workload.seed).integers(0, vocab_size, sum(drawn))
    return [part.tolist() for part in np.split(tokens, np.cumsum(drawn)[:-1])]


def _too_long(prompt: int | Lengths, new: int | Lengths, model_name: str, most: int) -> str:
    return f"prompts of {prompt} tokens and {new} new ones: {model_name} allows {most}"


def most_context(requests: Sequence[Request], batch_size: int) -> int:
    """The most tokens that the rows of one step can attend to, over all rows."""
    ends = sorted((len(request.token_ids) + request.max_new_tokens - 1 for request in requests), reverse=True)
    return sum(ends[:batch_size])


# ---- serving ------------------------------------------------------------------------------------------------------


def arrival_order(requests: Sequence[Request], arrivals_s: Sequence[float]) -> list[int]:
    """The indices of the requests in the order in which they arrive. ValueError unless each one has a time from 0."""
    if len(arrivals_s) != len(requests):
        raise ValueError(f"arrivals_s has {len(arrivals_s)} times for {len(requests)} requests: each needs one")
    for moment in arrivals_s:
        if not 0 <= moment < math.inf:
            raise ValueError(f"arrivals_s has {shown(moment)}: allowed are seconds from 0")
    return sorted(range(len(requests)), key=lambda index: arrivals_s[index])


def serve_over_time(
    batcher, requests: Sequence[Request], arrivals_s: Sequence[float] | None = None, progress: bool = False
) -> list[Completion]:
    """Serve requests with a batcher of this package or of `peers`. Completions come in the order of the requests, and
    errors and interrupts are those of the batcher's `run`.

    arrivals_s: when each request arrives, in seconds from the beginning; None for all at once. A completion's
    `submitted_s` is the moment of arrival, even if the loop was in the middle of a turn and took the request a little
    later. Time without any request stands on the timeline as NO_REQUEST_SPAN: idle because nothing was asked."""
    requests = list(requests)
    if arrivals_s is None or not any(arrivals_s):
        return batcher.run(requests, progress)
    if not isinstance(batcher, BatcherBase):
        return batcher.run(requests, progress, arrivals_s)
    order = arrival_order(requests, arrivals_s)
    device, start_s = batcher.device, 0.0

    def arriving() -> Iterator[Request]:
        """Yield each request when it is due; until then the loop serves those that have arrived."""
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
    """Let the time pass until `moment`, before which no request is due."""
    device, start = batcher.device, batcher.device.now()
    if start < moment:
        device.wait_until(moment)
        batcher.timeline.add(*NO_REQUEST_SPAN, start, device.now())


def _bar(total: int, progress: bool):
    from tqdm import tqdm

    return tqdm(total=total, unit=" requests arrived", leave=False, disable=not progress)


def latency(completions: Sequence[Completion]) -> Latency:
    """What those who wait for the tokens notice, in milliseconds, as median and p99 over the requests:

    first_token_ms: from the arrival of a request to its first token.
    per_token_ms: from one of its tokens to the next, on average over the request (with two tokens or more).
    end_to_end_ms: from its arrival to its end.
    None where no request has such a time; one that was cancelled or failed counts for its first token only.
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
    return Latency(*map(_median_and_p99, (first, between, whole)))


def _median_and_p99(seconds: Sequence[float]) -> MedianAndP99:
    if not seconds:
        return MedianAndP99()
    return MedianAndP99(1e3 * statistics.median(seconds), 1e3 * p99(seconds))

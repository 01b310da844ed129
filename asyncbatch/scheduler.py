"""The scheduler: which requests are in the next step, and what becomes of its results.

Plain Python, no tensors. `plan` picks the rows of the next step *without knowing the results of steps still in
flight*; `commit` takes the results of one step, in the order of the steps. The synchronous loop commits step N before
it plans N+1, the asynchronous loop plans N+1 (or further) first. Three rules see to it that the tokens are the same:

- A row whose input token is still on the device names the step and row that sampled it (its *carry-over*).
- A request is computed in the same pieces every time: its prompt in chunks (`next_chunk`), each generated token as one
  decode row. So a preempted request is replayed exactly as it ran first, and no chunk depends on the other rows.
- A length limit is known ahead, so nothing is planned beyond it. Only a stop token or a cancellation is found late, and
  what was computed for that request meanwhile is a *wasted token*.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import NamedTuple

from .kv_cache import blocks_for
from .request import NO_TOKEN, Request, RequestError, finish_reason


def fit_budget(chunk_sizes: Sequence[int], free_rows: int, budget: int) -> int:
    """How many of the waiting prefill chunks go into this step, first come, first served.

    Each takes one of the `free_rows`, and its tokens from the `budget`. The first chunk that does not fit ends the
    count: it is not cut, and nobody overtakes it."""
    fitting = 0
    for size in chunk_sizes:
        if fitting == free_rows or size > budget:
            break
        budget -= size
        fitting += 1
    return fitting


def next_chunk(tokens_left: int, sizes: Sequence[int]) -> tuple[int, int]:
    """(tokens, size) of a prompt's next chunk: how many of its `tokens_left` are computed next, and in a step of which
    size, one of the rising `sizes`. Only the prompt itself decides that: never who shares the step.

    What is left goes into the smallest size that holds it, if three quarters of that get filled. Otherwise a full step
    of the largest size comes first that the prompt can fill: padding costs as much as tokens do."""
    size = next((size for size in sizes if size >= tokens_left), sizes[-1])
    if 4 * tokens_left < 3 * size:
        size = max((size for size in sizes if size <= tokens_left), default=size)
    return min(size, tokens_left), size


_new = tuple.__new__  # makes a named tuple in half the time that a call of its class takes


class RunState:
    """One request while it is served. Only the scheduler writes it.

    prompt, generated: the tokens that the host knows: those of the prompt, and those committed so far.
    placed: how many tokens have their keys and values in the cache, counting steps still in flight.
    carry: (step, row) of its newest launched row, which samples token number `placed`.
    stops_on_text: for a request with stop strings, whether the newest token completes one; it may raise RequestError.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        stop_token_ids: frozenset[int],
        stops_on_text: Callable[[RunState], bool] | None = None,
    ):
        self.number, self.request, self.stop_token_ids = number, request, stop_token_ids
        self.stops_on_text = stops_on_text
        self.sampled = request.sampling.temperature > 0
        self.prompt = [int(token) for token in request.token_ids]
        self.generated: list[int] = []
        self.num_prompt = len(self.prompt)
        self.max_tokens = self.num_prompt + int(request.max_new_tokens)
        self.placed = 0
        self.carry: tuple[int, int] | None = None
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.num_preemptions = 0

    @property
    def num_known(self) -> int:
        return self.num_prompt + len(self.generated)

    def known_tokens(self, start: int, count: int) -> list[int]:
        """Tokens number start to start + count - 1; a row never spans the prompt's end."""
        if start < self.num_prompt:
            return self.prompt[start : start + count]
        return self.generated[start - self.num_prompt : start - self.num_prompt + count]

    def end(self, token: int) -> tuple[str | None, Exception | None]:
        """Why the request ends with its newest token, and the error if there is one; (None, None) if it goes on."""
        if token == NO_TOKEN:
            return "error", FloatingPointError(f"the logits after {self.num_known} tokens are nan or infinite")
        reason = finish_reason(self.generated, self.request.max_new_tokens, self.stop_token_ids)
        if reason == "stop" or self.stops_on_text is None:
            return reason, None
        try:
            return ("stop" if self.stops_on_text(self) else reason), None
        except RequestError as error:
            return "error", error.with_traceback(None)  # it would keep the frames alive

    @property
    def fully_launched(self) -> bool:
        """Whether the step that samples the last allowed token has been launched, so that nothing is left to plan."""
        return self.placed >= self.max_tokens - 1


class Row(NamedTuple):
    """One row of a step: `num_tokens` tokens of a request from `position` on (1 for decode, a chunk for prefill).

    carry: (step, row) that samples the input token, or None if the host knows it.
    samples: whether the row's output is the request's next token (a chunk in the middle of a prompt has none).
    """

    state: RunState
    position: int
    num_tokens: int
    carry: tuple[int, int] | None
    samples: bool


class StepKind(NamedTuple):
    """All that the host must decide about how a step is computed: on CUDA each kind has a graph of its own.

    passes: which forward passes it runs: "decode", "prefill" or "mixed" (both).
    sampled: whether any row samples; otherwise every row takes its most likely token.
    rows, tokens: how many rows it has, and prompt tokens, padding included.
    """

    passes: str
    sampled: bool
    rows: int
    tokens: int = 0

    def __str__(self) -> str:
        of_tokens = f"/{self.tokens}" if self.tokens else ""
        return f"{self.passes}/{'sampled' if self.sampled else 'greedy'}/{self.rows}{of_tokens}"


@dataclass
class BatchPlan:
    """The rows of one step: first `num_decode` decode rows, then the prefill rows. tokens: the size of its prefill, one
    of `prefill_sizes`; 0 without one."""

    step: int
    rows: list[Row]
    num_decode: int
    tokens: int = 0

    @property
    def passes(self) -> str:
        """`StepKind.passes` of the step."""
        return "decode" if not self.tokens else "mixed" if self.num_decode else "prefill"

    @property
    def work(self) -> str:
        """What the step is for: "decode", or "prefill" if it has any prefill row."""
        return "prefill" if self.tokens else "decode"

    @property
    def context(self) -> int:
        """How many tokens the rows' last queries attend to, themselves included, over all rows."""
        return sum([row.position + row.num_tokens for row in self.rows])

    def kind(self, rows: int) -> StepKind:
        """The step's kind when it is padded to so many rows."""
        sampled = any([row.state.sampled for row in self.rows])
        return StepKind(self.passes, sampled, rows, self.tokens)


class Committed(NamedTuple):
    """What the results of a step brought: the new (request, token) pairs in the order of the rows, the requests that
    ended with them, and the number of wasted tokens."""

    new: list[tuple[RunState, int]]
    ended: list[RunState]
    wasted: int


class Scheduler:
    """Continuous batching (Yu et al. 2022, "Orca"): requests join and leave the batch at any step.

    A step has a decode row for every running request, and chunks of prompts. While more of these wait, steps of chunks
    alone come first: the sooner the batch is full, the more a decode step brings. But those who decode must not wait
    for long: there is a budget of prompt tokens from one decode row of a request to its next.

    kv: the books of the block pool (`KVCache`). max_batch_size: rows of a step.
    prefill_sizes: how many prompt tokens a step may have, those of all rows together, padding included; rising.
    prefill_budget: that budget, padding included; at least the largest size.
    """

    def __init__(self, kv, max_batch_size: int, prefill_sizes: Sequence[int], prefill_budget: int = 0):
        self.kv, self.max_batch_size, self.prefill_sizes = kv, max_batch_size, prefill_sizes
        self.prefill_budget = max(prefill_budget, prefill_sizes[-1])
        self.prefill_left = self.prefill_budget  # of it, until the next decode rows
        self.waiting: deque[RunState] = deque()
        self.running: list[RunState] = []  # in the order of admission: the last one is preempted first
        self.num_steps = 0

    def add(self, state: RunState) -> None:
        self.waiting.append(state)

    # ---- plan -------------------------------------------------------------------------------------------------

    def plan(self) -> BatchPlan | None:
        """The next step, or None if no request can go on before another step is committed."""
        alone = self._chunks_come_alone()
        rows = [] if alone else self._decode_rows()
        num_decode = len(rows)
        if not alone and not rows:
            self.prefill_left = self.prefill_budget  # nobody decodes, so nobody waits
        everybody = num_decode == len(self.running) and not self.waiting  # decodes
        chunks, tokens = ([], 0) if everybody else self._prefill_rows(free_rows=self.max_batch_size - num_decode)
        if alone and not chunks:  # there was no room for them
            rows = self._decode_rows()
            num_decode = len(rows)
        rows += chunks
        self.prefill_left = self.prefill_left - tokens if alone and chunks else self.prefill_budget
        if not rows:
            return None
        plan = BatchPlan(self.num_steps, rows, num_decode, tokens)
        for index, (state, position, count, _, _) in enumerate(rows):
            state.placed = position + count
            state.carry = (plan.step, index)
        self.num_steps += 1
        return plan

    def _decode_rows(self) -> list[Row]:
        rows, block_size = [], self.kv.block_size
        for state in list(self.running):
            position = state.placed
            if not state.num_prompt <= position < state.max_tokens - 1:  # it is in prefill, or fully launched
                continue
            # A new block is needed where one begins. (This loop is the longest part of a plan: no call without need.)
            if position % block_size == 0 and not self._make_room(state, position + 1):
                continue
            # A token that the host does not know yet is an output of the request's row before, still on the device.
            carry = None if position < state.num_prompt + len(state.generated) else state.carry
            rows.append(_new(Row, (state, position, 1, carry, True)))
        return rows

    def _make_room(self, state: RunState, num_tokens: int) -> bool:
        """Grow the request's block table. While the pool is full, preempt the newest request; False if it was this."""
        while not self.kv.allocate(state.number, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is state:
                return False
        return True

    def _preempt(self, state: RunState) -> None:
        self.running.remove(state)
        self.kv.prune(state.number)
        if state.fully_launched:  # it only waits for its last result: it needs no blocks, and nothing is computed again
            self.running.insert(0, state)
            return
        state.placed = 0
        state.num_preemptions += 1
        self.waiting.appendleft(state)

    def _next_chunks(self) -> list[tuple[RunState, int, int]]:
        """(request, tokens, size) of the chunks that may come next, in order: of started prompts, then of newcomers."""
        candidates = [state for state in self.running if state.placed < state.num_prompt]
        if self.waiting:
            places = self.max_batch_size - sum(not state.fully_launched for state in self.running)
            candidates += islice(self.waiting, max(places, 0))
        return [(state, *next_chunk(state.num_prompt - state.placed, self.prefill_sizes)) for state in candidates]

    def _chunks_come_alone(self) -> bool:
        """Whether the next step has no decode rows: more chunks wait than fit, and the budget allows two steps."""
        chunks = self._next_chunks() if 2 * self.prefill_sizes[0] <= self.prefill_left else []  # no room for two steps
        count = self._fitting(chunks, self.max_batch_size)
        return 0 < count < len(chunks) and chunks[0][2] + chunks[count][2] <= self.prefill_left

    def _fitting(self, chunks: Sequence[tuple[RunState, int, int]], free_rows: int) -> int:
        """How many of the chunks one step takes: those of the first one's size, if the budget has room for it."""
        if not chunks or chunks[0][2] > self.prefill_left:
            return 0
        size = chunks[0][2]
        return fit_budget([count for _, count, _ in takewhile(lambda chunk: chunk[2] == size, chunks)], free_rows, size)

    def _prefill_rows(self, free_rows: int) -> tuple[list[Row], int]:
        """The prefill rows of a step and its size, one of `prefill_sizes`; none, and 0, if no chunk can go on."""
        chunks, rows = self._next_chunks(), []
        for state, count, _ in chunks[: self._fitting(chunks, free_rows)]:
            if state.placed == 0 and not self._admit(state):
                break
            samples = state.placed + count == state.num_prompt
            rows.append(Row(state, state.placed, count, None, samples))
        return rows, chunks[0][2] if rows else 0

    def _admit(self, state: RunState) -> bool:
        """Move the first waiting request to the running ones, with blocks for all tokens that it has so far. False if
        the pool has too few. One block is kept free for each running request that may still grow: without it, the
        newcomer would often be preempted at once."""
        kv, growing = self.kv, len(self.running)
        if kv.num_free < blocks_for(state.num_known, kv.block_size) + growing:  # then it matters how many do grow
            growing = sum(self._may_grow(other) for other in self.running)
        if not kv.allocate(state.number, state.num_known, keep_free=growing):
            return False
        self.waiting.remove(state)
        self.running.append(state)
        return True

    def _may_grow(self, state: RunState) -> bool:
        """Whether a request may need more blocks than it has. Its last token needs no place: nobody attends to it."""
        return not state.fully_launched and self.kv.room(state.number) < state.max_tokens - 1

    # ---- commit -----------------------------------------------------------------------------------------------

    def commit(self, plan: BatchPlan, token_ids: Sequence[int]) -> Committed:
        """Take the results of a step: `token_ids[i]` is what row i sampled. Append, stop, prune."""
        new, ended, wasted = [], [], 0
        for (state, position, count, _, samples), token in zip(plan.rows, token_ids, strict=False):
            if not samples:
                continue
            if state.finish_reason:
                wasted += 1
                continue
            if position + count != state.num_prompt + len(state.generated):
                continue  # a replayed token: it was committed before
            if token != NO_TOKEN:
                state.generated.append(token)
                new.append((state, token))
            reason, error = state.end(token)
            if reason and self.finish(state, reason, error):
                ended.append(state)
        return Committed(new, ended, wasted)

    def finish(self, state: RunState, reason: str, error: Exception | None = None) -> bool:
        """End a request, running or waiting, and prune its blocks. False if it had already ended."""
        if state.finish_reason:
            return False
        state.finish_reason, state.error = reason, error
        self.kv.prune(state.number)
        if state in self.running:
            self.running.remove(state)
        else:
            self.waiting.remove(state)
        return True

"""Notebook 08, the capstone: a policy says who of the waiting requests comes in next, and a scoreboard ranks it.

    def first_come(waiting, running, free):
        return waiting[:free]

    print(board(first_come))

The package's own asynchronous loop serves the recorded workload with it, on the virtual clock, with the times of a
recorded GPU. Tokens are checksums of all tokens before them, so an answer that was damaged cannot go unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import median
from typing import Any, NamedTuple

from matplotlib.patches import Rectangle

from ..batcher import AsyncBatcher
from ..measure.recording import Recording
from ..models.toy import VOCABULARY, toy_llama
from ..ordering.toy import toy_tokens, use_toy_model
from ..pictures.picture import COLORS, TEXT, Picture, figure
from ..request import Request
from ..scheduler import RunState, Scheduler, next_chunk
from .learned import Endless, limited

ROWS, NUM_BLOCKS, RECORDING = 8, 160, "h200-sweep-1b"
MOST_LINES = 20_000  # of a policy in one call; it is called a few hundred times in a run
# (prompt, new tokens) of 40 requests, in the order in which they came: drawn once and kept, with random.Random(0) and
# the laws of docs/profiling.md's mixed workload, with a sixteenth of its medians (lognormal: 32 and 0.8, 16 and 0.6).
WORKLOAD = (
    (28, 16), (56, 15), (99, 6), (40, 8), (31, 13), (25, 5), (34, 23), (123, 26), (5, 8), (68, 8),
    (38, 7), (60, 32), (40, 19), (37, 11), (50, 16), (35, 21), (120, 48), (26, 22), (43, 38), (9, 10),
    (59, 23), (6, 5), (107, 19), (51, 18), (17, 7), (15, 7), (25, 16), (17, 70), (66, 8), (29, 15),
    (39, 12), (59, 17), (53, 8), (24, 23), (52, 12), (24, 20), (106, 14), (52, 19), (29, 8), (31, 16),
)  # fmt: skip
LONG = 20  # new tokens from which an answer is drawn in red
Policy = Callable[[list, list, int], Any]


class Asked(NamedTuple):
    """A request as a policy sees it: its number, the tokens of its prompt, and how many new ones it may have."""

    number: int
    prompt: int
    new: int


# ---- policies to be ranked against -----------------------------------------------------------------------------------


def whole_batches(waiting: list[Asked], running: list[Asked], free: int) -> list[Asked]:
    """The planted weakness: nobody comes in before everybody has left."""
    return [] if running else waiting[:free]


def first_come(waiting: list[Asked], running: list[Asked], free: int) -> list[Asked]:
    """Whoever came first, as soon as a row is free."""
    return waiting[:free]


def shortest_first(waiting: list[Asked], running: list[Asked], free: int) -> list[Asked]:
    """Whoever will be done soonest."""
    return sorted(waiting, key=lambda one: one.new)[:free]


def longest_first(waiting: list[Asked], running: list[Asked], free: int) -> list[Asked]:
    """Whoever will take longest, so that no long answer is left alone at the end."""
    return sorted(waiting, key=lambda one: -one.new)[:free]


REFERENCES = {
    "whole batches": whole_batches,
    "first come, first served": first_come,
    "shortest answer first": shortest_first,
    "longest answer first": longest_first,
}

# ---- serving with a policy -------------------------------------------------------------------------------------------


class PolicyError(ValueError):
    """A policy gave what cannot be done. The message says what, and what is allowed."""


class _PolicyScheduler(Scheduler):
    """The package's scheduler, but a policy says which waiting requests come in, and in which order. Whom it has let in
    keeps a row, even if their prompt has to wait for a later step."""

    policy: Policy = staticmethod(first_come)

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.let_in: list[RunState] = []  # by the policy, and not yet admitted: their prompts did not fit so far

    def _next_chunks(self) -> list[tuple[RunState, int, int]]:
        self.let_in = [state for state in self.let_in if state in self.waiting]
        active = [state for state in self.running if not state.fully_launched]
        left = [state for state in self.waiting if state not in self.let_in]
        free = self.max_batch_size - len(active) - len(self.let_in)
        if left and free > 0:
            self.let_in += self._ask(left, active + self.let_in, free)
        states = [state for state in self.running if state.placed < state.num_prompt] + self.let_in
        return [(state, *next_chunk(state.num_prompt - state.placed, self.prefill_sizes)) for state in states]

    def _ask(self, left: list[RunState], busy: list[RunState], free: int) -> list[RunState]:
        by_number = {state.number: state for state in left}
        chosen = self.policy([_asked(state) for state in left], [_asked(state) for state in busy], free)
        if chosen is ...:
            raise NotImplementedError
        if not isinstance(chosen, list | tuple) or not all(isinstance(one, Asked) for one in chosen):
            raise PolicyError(f"it gave {str(chosen)[:60]}: allowed is a list of requests out of `waiting`")
        numbers = [one.number for one in chosen]
        if len(set(numbers)) < len(numbers) or not set(numbers) <= by_number.keys():
            raise PolicyError(f"it gave the requests {numbers}: allowed is each at most once, and only from `waiting`")
        if not chosen and not busy and not self.running:
            raise PolicyError("it gave nobody though nobody runs: the loop would stand still for ever")
        return [by_number[number] for number in numbers[:free]]


def _asked(state: RunState) -> Asked:
    return Asked(state.number, state.num_prompt, state.max_tokens - state.num_prompt)


class _PolicyBatcher(AsyncBatcher):
    def __init__(self, model: Any, policy: Policy, **options: Any):
        self.policy = policy
        super().__init__(model, **options)

    def _new_books(self) -> None:
        super()._new_books()
        shape = self.shape
        self.scheduler = _PolicyScheduler(
            self.kv, shape.max_batch_size, shape.prefill_sizes, self.config.prefill_budget
        )
        self.scheduler.policy = self.policy  # type: ignore[method-assign]


class Score(NamedTuple):
    """What a policy brought. tokens_per_s: new tokens over the time of the whole workload. first_ms: until a request's
    first token, median and longest. unchanged: whether every request got the tokens that it gets alone. spans: of each
    request, by number, the milliseconds of its first and last step."""

    tokens_per_s: float
    first_ms: tuple[float, float]
    unchanged: bool
    spans: dict[int, tuple[float, float]]


def requests() -> list[Request]:
    """The requests of the workload."""
    return [
        Request([(11 * number + 7 * place) % VOCABULARY for place in range(prompt)], new, stop_token_ids=())
        for number, (prompt, new) in enumerate(WORKLOAD)
    ]


def serve(policy: Policy) -> Score:
    """Serve the workload with a policy. PolicyError for one that gives what cannot be done, NotImplementedError for an
    empty one; whatever else it raises comes as it is."""
    costs = Recording.load(RECORDING).costs(ROWS)
    with _PolicyBatcher(
        toy_llama(max_positions=256), policy, clock=costs, max_batch_size=ROWS, block_size=16, num_blocks=NUM_BLOCKS,
        max_length=256, prefill_tokens=64,
    ) as batcher:  # fmt: skip
        use_toy_model(batcher)
        handles = [batcher.submit(request) for request in requests()]
        firsts: dict[int, float] = {}
        spans: dict[int, tuple[float, float]] = {}
        commit = batcher.scheduler.commit

        def noted(plan: Any, token_ids: Sequence[int]) -> Any:
            now = 1e3 * batcher.device.now()
            for row in plan.rows:
                number = row.state.number
                spans[number] = (spans.get(number, (now, now))[0], now)
            done = commit(plan, token_ids)
            for state, _ in done.new:
                firsts.setdefault(state.number, now)
            return done

        batcher.scheduler.commit = noted  # type: ignore[method-assign]
        while batcher.turn():
            pass
        total_s = batcher.device.now()
        got = [handle.completion.token_ids for handle in handles]
    want = [toy_tokens(request) for request in requests()]
    first_ms = (median(firsts.values()), max(firsts.values()))
    return Score(sum(map(len, got)) / total_s, first_ms, got == want, spans)


@lru_cache(maxsize=1)
def references() -> dict[str, Score]:
    """The scores of the reference policies, by name."""
    return {name: serve(policy) for name, policy in REFERENCES.items()}


def tried(policy: Policy) -> tuple[Score | None, str]:
    """The score of a policy, or None and what is wrong with it. Whatever it does or raises, this does not."""
    # (Lines are counted by file: the policies of this one need no limit, and the server must not get it.)
    own = getattr(policy, "__module__", "") == __name__
    try:
        return serve(policy if own else limited(policy, MOST_LINES)), ""
    except NotImplementedError:
        return None, "it is not written yet"
    except (PolicyError, Endless) as error:
        return None, str(error)
    except Exception as error:
        return None, f"it stopped with {type(error).__name__}: {error}"


# ---- the scoreboard --------------------------------------------------------------------------------------------------


def board(policy: Policy | None = None) -> str:
    """The scoreboard: the reference policies and, if there is one, the learner's, the best first. What is wrong with a
    policy is said in its place: it has no rank."""
    scores, told = dict(references()), ""
    if policy is not None:
        score, told = tried(policy)
        if score is not None:
            scores["YOURS"] = score
    ranked = sorted(scores, key=lambda name: (-round(scores[name].tokens_per_s, 6), name != "YOURS"))
    lines = [f"{'':<28}tokens/s   first token: median, longest   tokens"]
    for rank, name in enumerate(ranked, 1):
        score = scores[name]
        typical, longest = score.first_ms
        proof = "unchanged" if score.unchanged else "CHANGED"
        lines.append(f"{rank}. {name:<25}{score.tokens_per_s:8,.0f}   {typical:16.1f}, {longest:5.1f} ms   {proof}")
    return "\n".join([*lines, *[f"YOURS has no rank: {told}"] * bool(told)])


def draw(policies: dict[str, Policy]) -> Picture:
    """When each request was served, by policy: a bar from its first step to its last, in the order in which they came
    in. An empty place is a row that nobody had. Of a policy that cannot serve, what is wrong stands in its place."""
    picture = figure(10, 0.6 + 1.35 * len(policies))
    axes: Any = picture.axes
    ticks, end, captions = {}, 0.0, []
    for place, (name, policy) in enumerate(policies.items()):
        (score, told), top = tried(policy), place * (ROWS + 2.2)
        free_at = [0.0] * ROWS
        spans = {} if score is None else score.spans
        words = f"{name}: {told if score is None else f'{score.tokens_per_s:,.0f} tokens/s'}"
        for number, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
            row = min(range(ROWS), key=lambda one: (free_at[one] > start, free_at[one]))
            free_at[row] = stop
            color = COLORS["vermillion" if WORKLOAD[number][1] >= LONG else "sky"]
            axes.add_patch(Rectangle((start, top + 1 + row), stop - start, 0.86, facecolor=color, edgecolor="white"))
        axes.text(0, top + 0.45, words, fontsize=9.5, fontweight="bold", va="center", color=TEXT, parse_math=False)
        ticks[top + 1 + ROWS / 2] = f"{ROWS} rows"
        end = max(end, *free_at)
        captions.append(words)
    axes.set(
        xlim=(0, 1.02 * end or 1), ylim=(len(policies) * (ROWS + 2.2), 0), xlabel="milliseconds of the virtual clock"
    )
    axes.set_yticks(list(ticks), list(ticks.values()))
    picture.title = "; ".join(captions)
    return picture

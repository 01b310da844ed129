"""Notebook 08: a text under a grammar, where the host must see each token, served by several strategies on the virtual
clock.

A strategy is a function of a `Server`. It says what is launched when; what comes out, and when, is the device's.

    def wait_for_token(server):
        while not server.done:
            mask = server.mask()          # the host looks which tokens the grammar allows now
            step = server.forward()       # the device computes scores of the next token, from the tokens it has itself
            server.sample(step, mask)     # ... and takes the best one, of those in the mask
            server.accept(server.wait(step))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from matplotlib.patches import Patch, Rectangle

from ..devices.virtual import Costs, StepWork, VirtualDevice
from ..pictures.picture import COLORS, TEXT, Picture, figure
from .learned import Endless, limited

DIGITS = "0123456789"
LISTS = {  # the grammar "lists of numbers": for each state, where each allowed token leads
    "start": {"[": "item"},
    "item": dict.fromkeys(DIGITS, "number"),
    "number": {**dict.fromkeys(DIGITS, "number"), ",": "item", "]": "start"},
}
TOKENS = "[],0123456789abc"
Grammar = Mapping[str, Mapping[str, str]]
MOST_CALLS = 2000  # of a server in one run; right strategies need a few for each token

# ---- the model -------------------------------------------------------------------------------------------------------


def checksum(text: str, salt: str) -> int:
    """A number from 0 to 1,000,002 that depends on every character and their order."""
    total = 7
    for letter in salt + text:
        total = (total * 131 + ord(letter)) % 1_000_003
    return total


def check_grammar(grammar: Grammar) -> None:
    """ValueError unless a text under this grammar can always go on: it begins in "start", every token is one of the toy
    model's and leads to a state, and every state allows a token."""
    if "start" not in grammar:
        raise ValueError(f"the grammar has the states {', '.join(grammar) or 'none'}: it needs one named 'start'")
    for state, allowed in grammar.items():
        if not allowed:
            raise ValueError(f"state {state!r} allows no token: a text would stand still there")
        for token, to in allowed.items():
            if token not in list(TOKENS) or to not in grammar:
                raise ValueError(
                    f"state {state!r} has {token!r}: {to!r}; allowed are tokens out of {TOKENS}, and states out of "
                    f"{', '.join(grammar)}"
                )


def after(grammar: Grammar, text: str) -> str:
    """The state of the grammar after a text. KeyError if the grammar does not allow it."""
    state = "start"
    for token in text:
        state = grammar[state][token]
    return state


def scores(text: str, grammar: Grammar, skill: float) -> dict[str, float]:
    """How much the toy model likes each token after a text. With a share `skill` of the texts its favourite is one that
    the grammar allows: a model that has learnt the grammar more or less well."""
    liked = {token: float(checksum(text, token)) for token in TOKENS}
    try:
        allowed = grammar[after(grammar, text)]
    except KeyError:  # a text that went astray
        return liked
    knows = checksum(text, "skill") < skill * 1_000_003
    return {token: score + (2e6 if (token in allowed) == knows else 0) for token, score in liked.items()}


def best(liked: Mapping[str, float], allowed: Sequence[str] | None) -> str:
    """The token with the highest score, among those that are allowed; None allows all."""
    return max(liked if allowed is None else allowed, key=lambda token: liked[token])


# ---- the device ------------------------------------------------------------------------------------------------------

NUM_SLOTS = 4  # a step that is done again, the one that went ahead of it, and a new one; and one to spare


class _Program:
    """What runs on the device. tokens: by their place in the text; a step writes its own over what was there. So the
    next step finds its input on the device, and one that is computed again repairs what it left."""

    def __init__(self, grammar: Grammar, skill: float):
        self.grammar, self.skill = grammar, skill
        self.tokens: dict[int, str] = {}
        self.places, self.outputs = [0] * NUM_SLOTS, [""] * NUM_SLOTS  # the host's buffers
        self.masks: list[list[str]] = [[] for _ in range(NUM_SLOTS)]
        self.inputs: list[Any] = [None] * NUM_SLOTS  # the device's: (place, mask)
        self.liked: list[dict[str, float]] = [{}] * NUM_SLOTS
        self.sampled: list[str] = [""] * NUM_SLOTS

    def run(self, command: str, slot: int) -> None:
        if command == "place in":
            self.inputs[slot] = (self.places[slot], None)
        elif command == "mask in":
            self.inputs[slot] = (self.inputs[slot][0], self.masks[slot])
        elif command == "forward":
            text = "".join(self.tokens[place] for place in range(self.inputs[slot][0]))
            self.liked[slot] = scores(text, self.grammar, self.skill)
        elif command == "sample":
            place, mask = self.inputs[slot]
            self.tokens[place] = self.sampled[slot] = best(self.liked[slot], mask)
        else:
            self.outputs[slot] = self.sampled[slot]


class Step(NamedTuple):
    """A step of the device. place: of the token that it samples. number: which forward pass it is, from 0."""

    place: int
    number: int

    @property
    def slot(self) -> int:
        return self.number % NUM_SLOTS


class Block(NamedTuple):
    """What happened from `start` to `end` (milliseconds) on a lane: "host", "H2D", "compute" or "D2H"."""

    lane: str
    what: str
    step: Step | None
    start: float
    end: float


@dataclass(frozen=True)
class Prices:
    """Milliseconds of everything. mask: until the host knows all tokens that are allowed. check: whether one is."""

    mask: float = 2.0
    check: float = 0.1
    launch: float = 0.3
    accept: float = 0.4
    forward: float = 6.0
    sample: float = 0.5
    copy: float = 0.2


class Server:
    """What a strategy works with: one text, of `new` tokens, under a grammar.

    text: the tokens accepted so far. done: whether these are all."""

    def __init__(self, grammar: Grammar, skill: float, new: int, prices: Prices):
        self.grammar, self.new, self.prices = grammar, new, prices
        self.program = _Program(grammar, skill)
        step = {"forward": prices.forward, "sample": prices.sample}
        costs = Costs(
            copy_in=1e-3 * prices.copy, copy_out=1e-3 * prices.copy, step=lambda work: 1e-3 * _price(step, work)
        )
        self.device = VirtualDevice(self.program, NUM_SLOTS, costs)
        self.events = [[self.device.event() for _ in range(3)] for _ in range(NUM_SLOTS)]
        self.text, self.place, self.forwards, self.calls = "", 0, 0, 0
        self.blocks: list[Block] = []
        self.sampled: set[Step] = set()
        self.accepted: list[tuple[Step | None, str]] = []
        self.waited: Step | None = None

    # ---- for strategies ----------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        self._count()
        return len(self.text) >= self.new

    def forward(self) -> Step | None:
        """Launch the next step's forward pass; its input is the token that the step before sampled, on the device.
        None if all tokens of the text have a step already."""
        self._count()
        if self.place >= self.new:
            return None
        step = Step(self.place, self.forwards)
        self.place, self.forwards = self.place + 1, self.forwards + 1
        self.program.places[step.slot] = step.place
        self._host("launch", step, self.prices.launch)
        self._copy_in("place in", step)
        self._launch(1, "forward", step)
        return step

    def sample(self, step: Step | None, mask: Sequence[str] | None = None) -> None:
        """Launch the sampling of a step, and the copy of its token to the host. mask: the tokens that are allowed; None
        allows all, and nothing waits. A step that was sampled before is **rolled back**: its token is chosen again,
        from the same scores, and steps after it are forgotten. For None this does nothing. ValueError for a step whose
        slot a later one has."""
        self._count()
        if step is None:
            return
        self._still_there(step, "sampled")
        if step in self.sampled:
            self.place = step.place + 1
        self.sampled.add(step)
        self._host("launch", step, self.prices.launch)
        if mask is not None:
            self.program.masks[step.slot] = list(mask)
            self._copy_in("mask in", step)
        self._launch(1, "sample", step)
        _, computed, out = self.events[step.slot]
        self.device.streams[1].record_event(computed)
        self.device.streams[2].wait_event(computed)
        self._launch(2, "token out", step)
        self.device.streams[2].record_event(out)

    def wait(self, step: Step | None) -> str:
        """Wait until the token of a step has come, and return it. ValueError for a step that was not sampled, or whose
        slot a later one has."""
        self._count()
        if step is None or step not in self.sampled:
            raise ValueError(f"waited for {'no step' if step is None else 'a step that was not sampled'}")
        self._still_there(step, "waited for")
        start = self.device.now()
        self.events[step.slot][2].synchronize()
        self._note("host", "wait", step, start)
        self.waited = step
        return str(self.program.outputs[step.slot])

    def mask(self) -> list[str]:
        """All tokens that the grammar allows after the text so far. This takes the host `Prices.mask`."""
        self._count()
        self._host("mask", None, self.prices.mask)
        return list(self.grammar[after(self.grammar, self.text)])

    def allows(self, token: str) -> bool:
        """Whether the grammar allows this one token after the text so far. This is cheap."""
        self._count()
        self._host("check", None, self.prices.check)
        return token in self.grammar[after(self.grammar, self.text)]

    def accept(self, token: str) -> None:
        """Add a token to the text. ValueError if the grammar does not allow it there, or the text is complete."""
        self._count()
        if len(self.text) >= self.new:
            raise ValueError(f"the text {self.text!r} is complete, and {token!r} was accepted all the same")
        if token not in self.grammar[after(self.grammar, self.text)]:
            raise ValueError(f"{token!r} was accepted after {self.text!r}, where the grammar does not allow it")
        self._host("accept", self.waited, self.prices.accept)
        self.accepted.append((self.waited, token))
        self.text += token

    # ---- behind them -------------------------------------------------------------------------------------------

    def _still_there(self, step: Step, what: str) -> None:
        if self.forwards > step.number + NUM_SLOTS:
            raise ValueError(
                f"{what}: forward pass {step.number} (from 0), but {self.forwards} are launched, and pass "
                f"{step.number + NUM_SLOTS} has its slot; allowed are the newest {NUM_SLOTS}, as there are "
                f"{NUM_SLOTS} slots"
            )

    def _count(self) -> None:
        self.calls += 1
        if self.calls > MOST_CALLS:
            raise Endless(f"it was stopped after {MOST_CALLS:,} calls of the server: the text never got done")

    def _note(self, lane: str, what: str, step: Step | None, start: float, end: float | None = None) -> None:
        self.blocks.append(Block(lane, what, step, 1e3 * start, 1e3 * (self.device.now() if end is None else end)))

    def _host(self, what: str, step: Step | None, ms: float) -> None:
        start = self.device.now()
        self.device.work(1e-3 * ms)
        self._note("host", what, step, start)

    def _launch(self, number: int, command: str, step: Step) -> None:
        stream = self.device.streams[number]
        start = max(stream.time, self.device.now())
        stream.launch(command, step.slot)
        self._note(("H2D", "compute", "D2H")[number], command, step, start, stream.time)

    def _copy_in(self, command: str, step: Step) -> None:
        h2d, compute, _ = self.device.streams
        self._launch(0, command, step)
        h2d.record_event(self.events[step.slot][0])
        compute.wait_event(self.events[step.slot][0])


def _price(prices: Mapping[str, float], work: StepWork) -> float:
    return prices[work.kind]


# ---- strategies ------------------------------------------------------------------------------------------------------


def wait_for_token(server: Server) -> None:
    """The synchronous way: nothing is launched before the mask is known."""
    while not server.done:
        mask = server.mask()
        step = server.forward()
        server.sample(step, mask)
        server.accept(server.wait(step))


def split(server: Server) -> None:
    """Only the sampling needs the mask: the host looks at the grammar while the device computes the forward pass."""
    step = server.forward()
    while not server.done:
        server.sample(step, server.mask())
        ahead = server.forward()
        server.accept(server.wait(step))
        step = ahead


def go_ahead(server: Server) -> None:
    """Sample without a mask, launch the next step, then look. A token that the grammar forbids is rolled back."""
    step = server.forward()
    server.sample(step)
    while not server.done:
        ahead = server.forward()
        server.sample(ahead)
        token = server.wait(step)
        if not server.allows(token):
            server.sample(step, server.mask())
            ahead = server.forward()
            server.sample(ahead)
            token = server.wait(step)
        server.accept(token)
        step = ahead


# ---- what came of it -------------------------------------------------------------------------------------------------


@dataclass
class Served:
    """What a strategy did. text: what it accepted. total_ms: until the last token was accepted. idle: the share of the
    time from the first forward pass to the end of the last sampling in which the device computed nothing. forwards: how
    many passes it computed, wasted: how many of these for nothing. error: what ended it early."""

    text: str
    total_ms: float
    idle: float
    forwards: int
    blocks: list[Block] = field(repr=False)
    error: BaseException | None = None

    @property
    def wasted(self) -> int:
        return self.forwards - len(self.text)

    def __str__(self) -> str:
        each = self.total_ms / max(len(self.text), 1)
        return f"{each:5.2f} ms a token, idle {self.idle:5.1%}, {self.wasted:2} forward passes wasted"


def run(
    strategy: Callable[[Server], Any], grammar: Grammar, skill: float, new: int, prices: Prices
) -> tuple[Server, Served]:
    """Let a strategy serve a text. Whatever it raises is in `error`, but NotImplementedError, as of an empty stub."""
    server = Server(grammar, skill, new, prices)
    error: BaseException | None = None
    # (Lines are counted by file, and the server itself is in this one: a strategy of this file is not limited.)
    careful = strategy if getattr(strategy, "__module__", "") == __name__ else limited(strategy)
    try:
        if careful(server) is ...:
            raise NotImplementedError
    except NotImplementedError:
        raise
    except (Exception, Endless) as failure:
        error = failure
    compute = sorted((block.start, block.end) for block in server.blocks if block.lane == "compute")
    end = max((block.end for block in server.blocks if block.what == "accept"), default=server.device.now() * 1e3)
    busy = sum(stop - start for start, stop in compute)
    span = compute[-1][1] - compute[0][0] if compute else 0.0
    idle = round(1 - busy / span, 9) if span else 0.0
    return server, Served(server.text, round(end, 6), abs(idle), server.forwards, server.blocks, error)


def serve(
    strategy: Callable[[Server], Any],
    mask_ms: float = 2.0,
    skill: float = 1.0,
    new: int = 24,
    grammar: Grammar = LISTS,
) -> Served:
    """Let a strategy serve a text of `new` tokens on the virtual clock. mask_ms: what the mask costs the host. skill:
    the share of tokens that the model gets right by itself. The strategy's own error is raised."""
    check_grammar(grammar)
    _, served = run(strategy, grammar, skill, new, Prices(mask=mask_ms))
    if served.error is not None:
        raise served.error
    return served


def table(strategies: Mapping[str, Callable[[Server], Any]], **options: Any) -> str:
    """A line for each strategy, the same text served by all, and the text. options: of `serve`."""
    served = {name: serve(strategy, **options) for name, strategy in strategies.items()}
    texts = {each.text for each in served.values()}
    lines = [f"{name:<15} {each}" for name, each in served.items()]
    return "\n".join([*lines, *(f"text {text}" for text in sorted(texts)), *["DIFFERENT TEXTS"] * (len(texts) > 1)])


LANES = ("host", "compute")
LOOKS = {"forward": "sky", "sample": "blue", "mask": "orange", "check": "purple", "accept": "yellow", "launch": "green"}


def draw(strategies: Mapping[str, Callable[[Server], Any]], until_ms: float = 40.0, **options: Any) -> Picture:
    """The first `until_ms` of each strategy: what the host did, and the device. A forward pass bears the place of its
    token in the text; one that was for nothing is hatched. options: of `serve`."""
    picture = figure(10, 0.75 + 0.95 * len(strategies))
    axes: Any = picture.axes
    ticks, captions = {}, []
    for number, (name, strategy) in enumerate(strategies.items()):
        served, top = serve(strategy, **options), 2.9 * number
        captions.append(f"{name}: {served.total_ms:g} ms for {len(served.text)} tokens")
        axes.text(0, top + 0.4, name, fontsize=9.5, fontweight="bold", va="center")
        used = {block.step for block in served.blocks if block.what == "accept"}
        for block in served.blocks:
            if block.lane in LANES and block.what in LOOKS and block.start < until_ms:
                row = top + 0.75 + LANES.index(block.lane)
                wasted = block.lane == "compute" and block.step not in used
                look = {"facecolor": COLORS[LOOKS[block.what]], "hatch": "////" if wasted else None}
                end = min(block.end, until_ms)
                axes.add_patch(Rectangle((block.start, row), end - block.start, 0.9, edgecolor="white", **look))
                if block.what == "forward" and block.step is not None and end - block.start > 2:
                    axes.text((block.start + end) / 2, row + 0.45, f"forward {block.step.place}", ha="center",
                              va="center", fontsize=8, color=TEXT)  # fmt: skip
        ticks |= {top + 1.2 + place: lane for place, lane in enumerate(LANES)}
    axes.set(xlim=(0, until_ms), ylim=(2.9 * len(strategies), 0), xlabel="milliseconds")
    axes.set_yticks(list(ticks), list(ticks.values()))
    patches = [Patch(facecolor=COLORS[color], label=what) for what, color in LOOKS.items()]
    patches.append(Patch(facecolor="white", edgecolor=TEXT, hatch="////", label="for nothing"))
    picture.figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=8)
    picture.title = "; ".join(captions)
    return picture

"""Ranks that serve the same requests on the virtual clock, and how they agree on what comes in.

Requests and cancellations come in at rank 0, the leader, at any moment. All ranks must apply them before the same step.
So the leader sends a message a step, mostly an empty one, beside the step: it is on its way while the step is launched
and computed. Before a rank plans step N it waits for the message of step N - 1, which has usually come long ago; that
of step N may have come or not. A rule says whether a rank may apply what it knows: `may_apply` is the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..base import BatcherBase
from ..batcher import AsyncBatcher, SyncBatcher
from ..devices.all_reduces import AllReduces
from ..devices.virtual import Costs
from ..devices.virtual_ranks import RankDevice, VirtualRanks
from ..models.toy import toy_llama
from ..request import Completion, Request
from ..serving import Handle
from .toy import use_toy_model

BATCHERS: dict[str, type[BatcherBase]] = {"sync": SyncBatcher, "async": AsyncBatcher}
PATIENCE = 8  # steps for which the ranks go on for news that nobody applies
SIZES = {"max_batch_size": 4, "block_size": 4, "num_blocks": 64, "max_length": 64, "prefill_tokens": 16}


class News(NamedTuple):
    """What came in at the leader. number: which news it is, from 0. sent: the step that the leader was about to plan
    when it sent this to the others. request: a new one; None for a cancellation. cancels: the number of the request
    that is cancelled, counted from 0 in the order in which they are applied."""

    number: int
    sent: int
    request: Request | None = None
    cancels: int | None = None


Rule = Callable[[News, int], bool]


def may_apply(news: News, planning: int) -> bool:
    """Whether a rank may apply what the leader has sent, before it plans step number `planning`. On every rank the
    answer must be yes in the same step, whenever the message came: by the step after it was sent, all have it."""
    return planning == news.sent + 1


class Message(NamedTuple):
    """What the leader sends for a step. arrives: when the other ranks have it (seconds). last: nothing comes after."""

    arrives: float
    news: tuple[News, ...]
    last: bool


class RankHost:
    """The host of one rank. A step is two turns: it hears or tells what came in, and turns the loop of its batcher.

    applied: by number of the news the step before which this rank applied it. handles: in the order of submission."""

    def __init__(self, serving: RankServing, rank: int, batcher: BatcherBase, rule: Rule):
        self.serving, self.rank, self.batcher, self.rule = serving, rank, batcher, rule
        self.applied: dict[int, int] = {}
        self.handles: list[Handle] = []
        self.planning = 0
        self.pending: list[News] = []
        self.heard = 0  # messages
        self._talks, self._ended = True, False

    @property
    def device(self) -> RankDevice:
        device: Any = self.batcher.device
        return device

    def turn(self) -> bool:
        """False once there is nothing more to do."""
        if self._ended:
            return False
        if self._talks:
            (self._tell if self.rank == 0 else self._hear)()
            self._apply()
        else:
            self.batcher.turn()
            self.planning += 1
        self._talks = not self._talks
        return True

    def submit(self, request: Request) -> None:
        self.handles.append(self.batcher.submit(request))

    def _is_busy(self) -> bool:
        return any(handle.completion is None for handle in self.handles)

    def _tell(self) -> None:
        """The leader: send what has come in by now. Without anything to do it waits until something does."""
        inbox, device = self.serving.inbox, self.device
        patient = any(self.planning - news.sent < PATIENCE for news in self.pending)
        if inbox and not self._is_busy() and not patient:
            device.wait_until(inbox[0][0])
        news = []
        while inbox and inbox[0][0] <= device.now():
            _, what = inbox.pop(0)
            number = self.serving.num_news
            self.serving.num_news += 1
            request, cancels = (what, None) if isinstance(what, Request) else (None, what)
            news.append(News(number, self.planning, request, cancels))
        self._ended = not (inbox or news or patient or self._is_busy())
        arrives = device.now() + self.serving.message_s
        self.serving.messages.append(Message(arrives, tuple(news), self._ended))
        self.pending += news

    def _hear(self) -> None:
        """Another rank: wait for the message of the step before, and take that of this step if it is here by now."""
        device, serving, planning = self.device, self.serving, self.planning
        messages, leader = serving.messages, serving.hosts[0]
        device.ranks.wait_for(self.rank, lambda: len(messages) >= planning)
        while self.heard < planning:
            device.wait_until(messages[self.heard].arrives)
            self._take()
        in_time = device.now() - serving.message_s
        if not self._ended:
            # The leader has sent the message of this step, or will send it too late for us to see it now.
            device.ranks.wait_for(self.rank, lambda: len(messages) > planning or leader.device.now() > in_time)
        if len(messages) > self.heard and messages[self.heard].arrives <= device.now():
            self._take()

    def _take(self) -> None:
        message = self.serving.messages[self.heard]
        self.heard += 1
        self.pending += message.news
        self._ended = message.last

    def _apply(self) -> None:
        for news in list(self.pending):
            if self.rule(news, self.planning):
                self.pending.remove(news)
                self.applied[news.number] = self.planning
                if news.request is not None:
                    self.submit(news.request)
                elif news.cancels is not None and news.cancels < len(self.handles):
                    self.batcher.cancel(self.handles[news.cancels])


@dataclass
class RankServing:
    """Serve requests of the toy model on several ranks, on the virtual clock.

    size: of the ranks. mode: "sync" or "async". costs: of each rank, or of all. all_reduces, check: as for
    `VirtualRanks`. message_s: seconds that a message takes. rule: as `may_apply`. options: of every batcher.

    `serve` gives one list of completions a rank; `timelines` and `ranks.exchanges` are what it took. It may be used
    once. Raises DisagreementError if the ranks disagree."""

    size: int = 2
    mode: str = "async"
    costs: Costs | Sequence[Costs] = field(default_factory=Costs)
    all_reduces: AllReduces = field(default_factory=AllReduces)
    check: bool = True
    message_s: float = 0.5e-3
    rule: Rule = may_apply
    model: Any = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in BATCHERS:
            raise ValueError(f"mode is {self.mode!r}: allowed are {', '.join(map(repr, BATCHERS))}")
        self.ranks = VirtualRanks(self.size, self.all_reduces, self.check)
        each = [self.costs] * self.size if isinstance(self.costs, Costs) else list(self.costs)
        if len(each) != self.size:
            raise ValueError(f"costs are those of {len(each)} ranks: there are {self.size}")
        self.inbox: list[tuple[float, Request | int]] = []
        self.messages: list[Message] = []
        self.num_news = 0
        self.hosts: list[RankHost] = []
        model = toy_llama() if self.model is None else self.model
        for rank, costs in enumerate(each):
            options = {**SIZES, "step_s": 0.0, **self.options, "clock": self.ranks.clock(rank, costs)}
            batcher = BATCHERS[self.mode](model, **options)
            use_toy_model(batcher)
            self.hosts.append(RankHost(self, rank, batcher, self.rule))
        self.ranks.turn = [host.turn for host in self.hosts]

    def serve(
        self, requests: Sequence[Request], later: Sequence[tuple[float, Request | int]] = ()
    ) -> list[list[Completion | None]]:
        """requests: there from the beginning. later: (seconds, what), what comes in when: a request, or the number of
        one to cancel. None stands for a completion that never came."""
        self.inbox = sorted(later, key=lambda each: each[0])
        for host in self.hosts:
            for request in requests:
                host.submit(request)
        try:
            while any([host.turn() for host in sorted(self.hosts, key=lambda host: host.planning)]):
                pass
        except BaseException:
            self.ranks.broken = self.ranks.broken or "serving was given up"  # closing waits for nobody
            raise
        finally:
            for host in self.hosts:
                host.batcher.close()
        return [[handle.completion for handle in host.handles] for host in self.hosts]

    @property
    def timelines(self) -> list[Any]:
        """The timeline of each rank."""
        return [host.batcher.timeline for host in self.hosts]

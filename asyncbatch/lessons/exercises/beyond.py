"""Exercises of notebook 08: `under_way` and `gaps`, on the events of a trace, `go_ahead`, a strategy that rolls back,
and `may_apply`, on which several ranks must agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .. import automaton, beyond, ranks
from ..automaton import LISTS, Prices, best, scores
from ..learned import Endless
from ..parts import Case, Exercise

# ---- exercise 1: steps under way -------------------------------------------------------------------------------------


def _counted(function: Callable[..., Any], launches: Sequence[tuple], copies: Sequence[tuple]) -> Any:
    made = [
        [beyond.Event(kind, name, start, end, number) for number, (start, end) in enumerate(each)]
        for kind, name, each in (("call", "cudaGraphLaunch", launches), ("copy out", "Memcpy DtoH", copies))
    ]
    got = function(*made)
    return [int(each) for each in got] if isinstance(got, list | tuple) else got


def _explain_counted(args: tuple[Any, ...], got: Any, want: list[int]) -> str | None:
    launches, copies = args
    if not isinstance(got, list) or len(got) != len(want):
        return f"Return a list with a number for each of the {len(want)} launches."
    if got == [number - 1 for number in want]:
        return "The step that is being launched is under way, too: count it."
    if got == [number - sum(end <= stop for _, end in copies) for number, (_, stop) in enumerate(launches, 1)]:
        return "You look at the end of each launch. What had come when it began (`launch.start`)?"
    if got == [number - sum(begin <= start for begin, _ in copies) for number, (start, _) in enumerate(launches, 1)]:
        return "A token is on the host when its copy has ended (`copy.end`), not when it has begun."
    if got == list(range(1, len(launches) + 1)):
        return "You count launches only. Of these, the steps whose copy has come are not under way any more."
    return None


# ---- exercise 2: the gaps --------------------------------------------------------------------------------------------


def _gaps(function: Callable[..., Any], steps: Sequence[tuple[float, float]]) -> Any:
    got = function(list(steps))
    return list(got) if isinstance(got, list | tuple) else got


def _explain_gaps(args: tuple[Any, ...], got: Any, want: list[float]) -> str | None:
    (steps,) = args
    if not isinstance(got, list):
        return "Return a list: one gap for each step but the first."
    if got == [end - start for start, end in steps]:
        return "That is how long each step took. A gap lies between the end of one and the start of the next."
    if got == [later[0] - earlier[0] for earlier, later in zip(steps, steps[1:], strict=False)]:
        return "That is from start to start, so the step itself is in it. Begin at the end of the earlier one."
    if len(got) != len(want):
        return f"Between {len(steps)} steps there are {len(want)} gaps, and you gave {len(got)}."
    if got == [-gap for gap in want]:
        return "The later start minus the earlier end, and not the other way round."
    return None


# ---- exercise 3: go ahead, and roll back -----------------------------------------------------------------------------


class Ahead:
    """What a strategy did with a text. right: whether the text is complete and as it should be. ahead: whether every
    step was launched before the token before it was waited for. masks: how many masks the host looked for."""

    def __init__(self, strategy: Callable[..., Any], mask_ms: float, skill: float, new: int):
        server, served = automaton.run(strategy, LISTS, skill, new, Prices(mask=mask_ms))
        self.text, self.error, self.ms = served.text, served.error, served.total_ms
        self.forwards = served.forwards
        self.right = served.text == _text(skill, new)
        order = [(block.what, block.step.place) for block in served.blocks if block.step is not None]
        self.ahead = all(
            ("wait", place) in order and order.index(("forward", place + 1)) < order.index(("wait", place))
            for place in range(new - 1)
            if ("forward", place + 1) in order
        )
        self.masks = sum(block.what == "mask" for block in served.blocks)

    @property
    def _key(self) -> tuple:
        return self.right, self.error is None, self.ahead, self.masks

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ahead) and self._key == other._key

    def __repr__(self) -> str:
        if self.error is not None:
            kind = "no end" if isinstance(self.error, Endless) else f"{type(self.error).__name__}: {self.error}"
            return f"{self.text!r}, and then {kind}"
        masks = f"{self.masks} mask{'' if self.masks == 1 else 's'}"
        return f"{self.text!r} in {self.ms:g} ms, with {masks} and {self.forwards} forward passes"


def _text(skill: float, new: int) -> str:
    """The text under the grammar, without a server: at each place the best of the tokens that are allowed."""
    text, state = "", "start"
    for _ in range(new):
        token = best(scores(text, LISTS, skill), list(LISTS[state]))
        text, state = text + token, LISTS[state][token]
    return text


def _explain_ahead(args: tuple[Any, ...], got: Any, want: Ahead) -> str | None:
    if not isinstance(got, Ahead):
        return None
    if isinstance(got.error, Endless):
        return "The text never got done. Each turn of the loop has to accept a token."
    told = str(got.error)
    if "does not allow" in told and got.masks == 0:
        return "Look before you accept: `server.allows(token)` is cheap. If it says no, choose again with the mask."
    if "was not sampled" in told or "no step" in told:
        return "Every step has to be sampled before you wait for it, the one that goes ahead as well."
    if got.error is None and got.text != want.text[: len(got.text)] or "does not allow" in told:
        return (
            "After a roll back, the step that went ahead was computed from a token that is gone. Launch another one: "
            "`server.forward()` and `server.sample` once more."
        )
    if got.error is None and not got.right:
        return f"{len(got.text)} of {len(want.text)} tokens were accepted. Go on until `server.done`."
    if got.error is None and got.masks > want.masks:
        return (
            f"You asked for {got.masks} masks, and {want.masks} are enough: only a token that is not allowed needs "
            "one. The mask is what costs."
        )
    if got.error is None and not got.ahead:
        return "Nothing goes ahead: launch the next step before you wait for this one's token."
    return None


# ---- exercise 4: in the same step ------------------------------------------------------------------------------------


def _agreed(function: Callable[..., Any], *case: Any) -> ranks.Agreed:
    def rule(news: ranks.News, planning: int) -> bool:
        answer = function(news, planning)
        if answer is ...:
            raise NotImplementedError
        return bool(answer)

    return ranks.Agreed(rule, *case)


def _explain_agreed(args: tuple[Any, ...], got: Any, want: ranks.Agreed) -> str | None:
    if not isinstance(got, ranks.Agreed):
        return None
    if got.error and got.applied[0] == got.sent:
        return (
            "Rank 0 knows at once, and the message is still on its way to rank 1. When it came differs from rank to "
            "rank; `news.sent` does not."
        )
    if got.error:
        return "The ranks said yes in different steps. Only what is the same on all ranks may decide: `news.sent`."
    if got.applied[0] is None:
        return "Nobody ever said yes, so it waits for ever. Say yes in one step, the same on every rank."
    if got.applied[0] == got.sent:
        return "That went well by luck: the message happened to be there. By which step has it surely come?"
    return "All agree, but later than need be. By which step does every rank have the message?"


# fmt: off
EXERCISES = {
    "under_way": Exercise(
        beyond.under_way, "For launches {0} and copies {1}, as (start, end),", "says",
        (
            Case(([(0, 2), (10, 12), (20, 22)], [(7, 8), (17, 18), (27, 28)]),
                 "Each copy has come before the next launch: never more than one step is under way."),
            Case(([(0, 2), (5, 7), (10, 12)], [(8, 9), (15, 16), (22, 23)]),
                 "When launch 1 begins, no copy has come: two steps are under way."),
            Case(([(0, 2), (3, 9), (10, 18), (20, 22)], [(8, 11), (16, 17), (21, 23), (30, 31)]),
                 "Count the launches so far, this one too, and take away the copies that had ended when it began."),
        ),
        (
            "`enumerate(launches, start=1)` gives the number of launches so far. How many copies had ended by then?",
            "`number - sum(copy.end <= launch.start for copy in copies)` for each launch.",
        ),
        _counted, _explain_counted,
    ),
    "gaps": Exercise(
        beyond.gaps, "For steps {0}", "gives",
        (
            Case(([(0.0, 4.0), (6.0, 10.0)],), "The device waited from 4 to 6."),
            Case(([(0.0, 4.0), (4.0, 8.0), (11.0, 12.5), (13.0, 20.0)],), "Three gaps: the first one is 0 long."),
            Case(([(5.0, 6.0)],), "One step has no gap before it that we know of."),
        ),
        (
            "`zip(steps, steps[1:])` pairs each step with the next one.",
            "`[later[0] - earlier[1] for earlier, later in zip(steps, steps[1:])]`",
        ),
        _gaps, _explain_gaps,
    ),
    "go_ahead": Exercise(
        automaton.go_ahead, "With a mask of {0} ms, a model that is right by itself in {1:.0%} of its tokens, and {2} "
        "tokens,", "made",
        (
            Case((2.0, 1.0, 6), "Every token is allowed: no mask is needed, and the device never waits."),
            Case((2.0, 0.5, 10), "Some tokens are not allowed: choose again with the mask, launch the next one anew."),
            Case((2.0, 0.0, 5), "No token is allowed at first, the last one neither."),
            Case((12.0, 0.8, 12), "The same with a dear mask."),
        ),
        (
            "As in `split`, launch the next step before you wait. What do you do with it if the token is not allowed?",
            "`if not server.allows(token):` sample the step again with `server.mask()`, launch a new step in place of "
            "the one that went ahead, and wait for the token once more. Then accept it.",
        ),
        Ahead, _explain_ahead,
    ),
    "may_apply": Exercise(
        ranks.may_apply, "For something that comes in after {0} ms, with messages that take {1} ms,", "led to",
        (
            Case((13.0, 0.5), "Every rank has to say yes before the same step."),
            Case((16.3, 0.5), "The same, a step later."),
            Case((13.0, 8.0), "The message takes longer than a step, and a rank waits for that of the step before."),
            Case((13.0, 0.5, True), "Rank 1 has a slow host."),
            Case((13.0, 0.5, False, True), "A cancellation: the sizes fit, and the sums are wrong."),
        ),
        (
            "When the message comes differs from rank to rank. What is the same on all, and when do all have it?",
            "Before it plans step `news.sent + 1`, every rank has the message.",
        ),
        _agreed, _explain_agreed,
    ),
}
# fmt: on

"""Exercises of notebooks 00 and 01: the law of the idle device, stop rules, the token budget, device activity."""

from __future__ import annotations

from typing import Any

from ... import request, scheduler, timeline
from ...measure import law
from ..idle import draw_budget, draw_gaps
from ..parts import Case, Exercise


def explain_gaps(args: tuple[Any, ...], got: Any, want: list[tuple[int, float]]) -> str | None:
    """What is wrong with a list of gaps, in terms of these steps; None if there is nothing to say."""
    starts, ends = args
    try:
        gaps = {int(i): float(seconds) for i, seconds in got}
    except (TypeError, ValueError):
        return "Return a list of pairs, one for each gap: the number of the late step, and the seconds."
    if zero := next((i for i, seconds in gaps.items() if i > 0 and seconds <= 0), None):
        return f"Step {zero} starts just when step {zero - 1} ends: no time passes, so there is no gap before it."
    if 0 in gaps and dict(want) == {i: seconds for i, seconds in gaps.items() if i}:
        return "Step 0 has no step before it, so no gap either: begin with step 1."
    if want and gaps == {i - 1: seconds for i, seconds in want}:
        return "The seconds are right. Name the step that comes late, the one behind the gap."
    if want and gaps == {i: starts[i] - starts[i - 1] for i, _ in want}:
        return "That is from start to start, so the step itself is in it. A gap begins where the step before ends."
    late, seconds = next((pair for pair in want if pair[0] not in gaps), (None, 0.0))
    if late is not None:
        between = f"Step {late - 1} ends at {ends[late - 1]:g} and step {late} starts at {starts[late]:g}"
        return f"{between}: the device was idle for {seconds:g}, and your list does not say so."
    return None


# fmt: off
EXERCISES = {
    "idle_share": Exercise(
        law.idle_share, "With {0:g} ms of host work and a device step of {1:g} ms", "says",
        (
            Case((4.0, 4.0), "The device works for 4 ms of every 8 ms, so it is idle for half of the time.", (
                (1.0, "You divide the host's part by the device's. Divide it by the whole round."),
                (50.0, "Right, if it were in percent. A share is a number from 0 to 1."),
                (0.0, "// cuts everything after the point away. Divide with /."),
            )),
            Case((1.0, 3.0), "The whole round takes 1 + 3 = 4 ms, and the device waits for 1 ms of it.", (
                (0.75, "For that share of the time the device is active. For the rest it is idle."),
            )),
            Case((0.0, 5.0), "With no host work the device never waits."),
        ),
        (
            "One round of the synchronous loop is host work first, then the device step. How long is the round?",
            "The device waits exactly as long as the host works. Divide that by the length of the round.",
        ),
    ),
    "overlap_gain": Exercise(
        law.overlap_gain, "With {0:g} ms of host work and a device step of {1:g} ms", "says",
        (
            Case((2.0, 6.0), "Taking turns, a step costs 2 + 6 = 8 ms. Overlapped, the host's 2 ms fit beside the "
                 "device's 6, so a step costs 6: 8 / 6 times as fast.", (
                     (0.75, "Turned over: in 0.75 of the time. As many tokens in less time is a factor above 1."),
                     (0.25, "That is the share that was idle. Ask how long a step takes before and after."),
                     (1 / 3, "A third more is right, as a gain; as a factor it is 1 more than that."),
                     (4.0, "You divide by the shorter time. Overlapped, a step ends when the longer one ends."),
                 )),
            Case((5.0, 5.0), "10 ms before, 5 ms after: twice as fast. More than that is never to be had."),
            Case((6.0, 2.0), "Now the host is the slower one: a step takes its 6 ms, and the device waits for it.", (
                (4.0, "You divide by the device's time always. Here the host needs longer: a step takes 6 ms, not 2."),
            )),
            Case((0.0, 5.0), "No host work, nothing to hide: as fast as before, a factor of 1."),
        ),
        (
            "How long does a step take when host and device take turns? How long when both work at the same time?",
            "Before: the sum of both. After: the longer of the two, `max(host_s, device_s)`. Divide before by after.",
        ),
    ),
    "idle_gaps": Exercise(
        timeline.idle_gaps, "For steps that start at {0} and end at {1}", "finds",
        (
            Case(([0, 6], [5, 10]), "Step 0 ends at 5, step 1 starts at 6: one gap of 1 before step 1."),
            Case(([0, 5, 12], [5, 10, 15]), "Step 1 starts just when step 0 ends, step 2 comes 2 late."),
            Case(([0, 6, 12, 18], [5, 12, 15, 20]), "There are two gaps here: before step 1 and before step 3."),
            Case(([0, 4, 8], [4, 8, 12]), "An asynchronous loop: no gap at all, an empty list."),
            Case(([3, 9], [5, 11]), "Only the time between two steps counts. This clock did not start at 0."),
            Case(([3], [5]), "One step alone has no gap before it."),
        ),
        (
            "Go through the steps from the second one on. Compare the start of each with the end of the one before.",
            "For `i` in `range(1, len(starts))`, if `starts[i] > ends[i - 1]`: append `(i, starts[i] - ends[i - 1])`.",
        ),
        explain=explain_gaps,
        picture=lambda args, got, want: draw_gaps(args[0], args[1], got),
    ),
    "finish_reason": Exercise(
        request.finish_reason, "For the tokens {0}, a limit of {1} and the stop tokens {2}", "says",
        (
            Case(([7, 8], 4, (2,)), "Two tokens of at most four, and no stop token: this request goes on."),
            Case(([7, 8, 9, 6], 4, (2,)), "Four tokens are written and four were allowed: the limit is reached."),
            Case(([7, 2], 4, (2,)), "The last token is a stop token: the model has said that it is done."),
            Case(([7, 8, 9, 2], 4, (2,)), "Both are true at once. The model ended its text itself, so nothing was cut "
                 "off: \"stop\" wins, and the caller knows that the text is complete."),
            Case(([7, 5], 4, (2, 5)), "A model may have several stop tokens, and any of them ends the request."),
            Case(([7, 8, 2, 9], 8, ()), "The caller gave no stop tokens, so no token may end this request."),
            Case(([], 4, (2,)), "A request that has not written anything yet has no last token; it goes on."),
        ),
        (
            "Two questions, in this order: is the newest token a stop token? Are as many tokens written as allowed?",
            "`token_ids[-1]` is the newest token, and an empty list has none. Ask about the stop token first: it wins.",
        ),
    ),
    "fit_budget": Exercise(
        scheduler.fit_budget, "With waiting chunks {0}, room for {1} requests and a budget of {2} tokens", "admitted",
        (
            Case(([10, 10], 4, 64), "Both chunks fit into the budget and into the free rows, so both go.", (
                (20, "20 is a number of tokens. Count chunks: each is one request that joins."),
            )),
            Case(([20, 20, 20], 2, 64), "Tokens are left in the budget, but each request needs a row of its own and no "
                 "third row is free."),
            Case(([40, 20, 10], 4, 64), "40 + 20 = 60 tokens; a third chunk would make 70, more than the budget."),
            Case(([40, 24, 1], 4, 64), "40 + 24 is exactly the budget, and a budget may be used up."),
            Case(([40, 30, 10], 4, 64), "The second chunk does not fit. The third would, but it came later: first "
                 "come, first served. If short prompts could always overtake, a long one might wait for ever."),
            Case(([], 4, 64), "Nobody is waiting, so nobody is admitted."),
            Case(([10], 0, 64), "No row is free, so nobody can join, however small the chunk."),
        ),
        (
            "Walk along the waiting chunks from the front and keep a running total. Two things can stop you.",
            "Before you count a chunk, ask: is a row left (`count < free_rows`), and is `total + chunk <= budget`? At "
            "the first no, stop: `break`, not `continue`.",
        ),
        picture=lambda args, got, want: draw_budget(args[0], args[1], args[2], got),
    ),
    "device_activity": Exercise(
        timeline.device_activity, "For steps that start at {0} and end at {1}", "says",
        (
            Case(([0.0, 10.0], [6.0, 16.0]), "The second step's period runs from the end of the first (6) to its own "
                 "end (16): 10, and it computes for 6 of them. The first step has none before it and does not count.", (
                     ((12.0, 16.0), "You count the first step too. It has no step before it and so no period: leave it "
                      "out of both sums."),
                     ((6.0, 16.0), "Active is right. Your period begins at 0, where the first step starts; let it "
                      "begin where that step ends, at 6."),
                     (0.6, "That is the share. Return both sums, (active, period), and the caller can divide."),
                 )),
            Case(([0.0, 10.0, 18.0], [6.0, 16.0, 26.0]), "Add up all steps but the first: 6 + 8 active in periods of "
                 "10 + 10. Each step has its own length."),
            Case(([5.0, 9.0], [9.0, 12.0]), "The steps follow each other without a gap, so active and period are "
                 "equal. Only differences of times count: this clock did not start at 0."),
            Case(([0.0], [4.0]), "One step alone has no period, so there is nothing to add up yet: both are 0."),
        ),
        (
            "Leave step 0 out of both sums, but use its end: there the period of step 1 begins.",
            "Active is the sum of `ends[i] - starts[i]`. The periods are `ends[i] - ends[i - 1]`; added up, only the "
            "last end minus the first one is left.",
        ),
    ),
}
# fmt: on

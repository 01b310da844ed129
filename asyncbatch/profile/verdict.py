"""What a report says first, in this order: how idle the device is, why, what asynchronous batching brings, and whether
to believe it. Terminal and page show the same sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter

from ..measure.points import COPY_IN, COPY_OUT, GC, MEANING, NO_REQUEST, NOT_BEGUN, NOTHING, WAIT, WAKING
from ..measure.simulate import WORTH_IT
from .pairs import Pairs
from .report import OWN, VOID, Comparison, Prediction, Run

OVER_TIME = "Requests arrive over time, so no total time is predicted: compare the latencies of the two loops."
WORTH_SAYING = 0.01  # a latency point that would give back less is not worth eliminating
FEW_STEPS, ENOUGH_PAIRS = 20, 6
LOOPS = {"sync": "synchronous", "async": "asynchronous"}
# Who could mend a cause of idle time, in a few words; of all others, the host's own code.
WHO = {
    COPY_IN: "the copies",
    COPY_OUT: "the copies",
    NOT_BEGUN: "the driver and the device",
    WAKING: "the operating system",
    NOTHING: "the operating system",
    GC: "Python's garbage collector",
    NO_REQUEST: "nobody: there was no request",
    WAIT: "not told",  # in reports before version 5
}
HOST = "the host's code"


def who(cause: str) -> str:
    """Who could mend a cause of idle time."""
    return WHO.get(cause, HOST)


def judged(runs: Sequence[Run]) -> Run | None:
    """The run that the first sentences are about: this package's synchronous one, else the first."""
    return min(runs, key=lambda run: (run.engine != OWN, run.mode != "sync"), default=None)


# ---- how idle, and why --------------------------------------------------------------------------------------------


def idle_line(run: Run) -> str:
    """How idle the device is, and over how many steps that was measured."""
    loop = LOOPS.get(str(run.mode), str(run.mode))
    if run.idle is None:
        return "No decode step came after another step, so active and idle could not be measured."
    words = f"The {loop} loop leaves {_idle_devices(run)}, measured over {steps_counted(run)}"
    # Besides the first of each replica, which has no period.
    left_out = (run.steps or 0) - run.replicas - (run.measured_steps or 0)
    if run.idle_all_steps is not None and left_out > 0:
        words += f" ({run.idle_all_steps:.1%} over all steps, prefill and mixed ones too)"
    return words + "."


def _idle_devices(run: Run) -> str:
    known = [one for one in run.ranks or () if one.idle is not None]
    if len(known) < 2:
        return f"the device idle for {run.idle:.1%} of the time"
    worst = max(known, key=lambda one: one.idle or 0.0)
    mean = f"the devices idle for {run.idle:.1%} of the time, the mean over {len(known)} ranks"
    return f"{mean}; rank {worst.rank}'s, the most, for {worst.idle:.1%}"


def steps_counted(run: Run) -> str:
    """Of how many steps active and idle were measured."""
    return f"{run.measured_steps} of {run.steps} steps"


def why_line(run: Run) -> str | None:
    """The idle time by who could mend it, and the largest causes. None where the device was not idle."""
    by = run.gaps.by if run.gaps else {}
    idle_s = sum(by.values())
    if idle_s <= 0:
        return None
    parties: dict[str, float] = {}
    for cause, seconds in by.items():
        parties[who(cause)] = parties.get(who(cause), 0.0) + seconds
    words = [
        f"{party} {seconds / idle_s:.0%}{_largest(party, by, idle_s)}"
        for party, seconds in sorted(parties.items(), key=lambda item: -item[1])
        if seconds >= 0.05 * idle_s
    ]
    what = "Why rank 0's device is idle" if run.ranks else "Why it is idle"
    return f"{what}, by who could mend it: {'; '.join(words)}."


def _largest(party: str, by: Mapping[str, float], idle_s: float) -> str:
    causes = [(cause, by[cause]) for cause in by if who(cause) == party and by[cause] >= 0.05 * idle_s]
    causes.sort(key=lambda item: -item[1])
    if not causes or [cause for cause, _ in causes] == [party]:
        return ""
    return f" ({', '.join(f'{cause} {seconds / idle_s:.0%}' for cause, seconds in causes[:3])})"


def first_line(run: Run) -> str | None:
    """What to eliminate first: the host's latency point that would give back most. None where no step was measured."""
    loop, saves = LOOPS[str(run.mode)], attrgetter(f"{run.mode}_saves")
    entirely = [one for one in run.what_if if one.where == "host" and one.factor == 0.0 and who(one.point) == HOST]
    if not entirely:
        return None
    best, this = max(entirely, key=saves), "Eliminate this first" + (", on every rank" if run.ranks else "")
    median = next((point.median_ms for point in run.points if point.name == best.point), None)
    what = f"{best.point} ({MEANING.get(best.point, best.point)}), {median or 0:.3f} ms of each step"
    if saves(best) < WORTH_SAYING:
        return (
            f"{this}: nothing in the host's code. The largest, {what}, would give back {saves(best):.1%} "
            f"of the {loop} run."
        )
    other = "" if run.mode == "async" else f", the asynchronous one {max(best.async_saves or 0.0, 0):.1%}"
    return f"{this}: {what}. Without it the {loop} run takes {saves(best):.1%} less time{other}."


# ---- what asynchronous batching brings ----------------------------------------------------------------------------


def gain_line(run: Run | None, only: Comparison) -> str | None:
    """What asynchronous batching brings: measured, with the interval, and predicted from the synchronous run. None
    where neither is known."""
    guess = run.prediction if run else None
    source = "the synchronous run" + (" of rank 0" if run and run.ranks else "")
    predicted = f"predicted from {source}: {guess.gain:.3f}x" if guess and guess.gain else None
    measured = _measured(only)
    if measured is None and predicted is None:
        return None
    words = "; ".join(part for part in (measured, predicted) if part)
    meaning = _meaning(guess) if guess else None
    return f"Asynchronous batching: {words}.{' ' + meaning if meaning else ''}"


def _measured(only: Comparison) -> str | None:
    pairs = _pairs(only)
    if not pairs.speedups:
        return None
    if pairs.void:
        return "not measured, since the runs are void"
    if pairs.interval is None:
        return f"{pairs.speedup:.3f}x as fast in one pair of runs, which is no conclusion"
    low, high, sure = pairs.interval
    within = f"between {low:.3f}x and {high:.3f}x, {sure:.0%} sure, {len(pairs.counted)} pairs of runs"
    if low <= 1 <= high:
        return f"no difference that these runs could show ({pairs.speedup:.3f}x, {within})"
    return f"{pairs.speedup:.3f}x as {'fast' if low > 1 else 'fast, so it is slower'} ({within})"


def _meaning(guess: Prediction) -> str | None:
    """Why the prediction is what it is."""
    if guess.gain is None or guess.between_ms is None or guess.device_ms is None or guess.host_ms is None:
        return None
    between, step = f"{guess.between_ms:.3f} ms", f"{guess.device_ms:.3f} ms on the device"
    if guess.slots == 1:
        return "With one slot the asynchronous loop is the synchronous one."
    if guess.gain < WORTH_IT:
        return f"There is little to hide: {between} between two steps of {step}."
    if guess.host_ms > guess.device_ms:
        return f"The host works longer, {guess.host_ms:.3f} ms a step beside {step}, so the device still waits."
    return f"It hides most of the {between} between two steps of {step}."


# ---- whether to believe it ----------------------------------------------------------------------------------------


def trust(run: Run | None, only: Comparison, same_tokens: bool, over_time: bool) -> tuple[str, ...]:
    """What speaks against the numbers, the worst first; or one sentence that nothing does."""
    found = tuple(_doubts(run, only, same_tokens, over_time))
    if found or run is None:
        return found
    pairs = _pairs(only)
    if not pairs.speedups:
        return ()
    looked_at = []
    if ratio := pairs.worst_device_ratio:
        looked_at.append(f"equal steps took the device the same time in both loops ({ratio:.3f}x)")
    if run.prediction and run.prediction.gain and pairs.interval and not over_time:
        looked_at.append("prediction and measurement agree")
    return (f"Nothing speaks against these numbers: {', and '.join(looked_at)}.",) if looked_at else ()


def _pairs(only: Comparison) -> Pairs:
    speedups = only.pairs or ()
    return Pairs(speedups, only.device_ratios or (None,) * len(speedups))


def _doubts(run: Run | None, only: Comparison, same_tokens: bool, over_time: bool) -> Iterator[str]:
    if not same_tokens:
        yield f"{VOID}: the tokens differ. That is a fault of asyncbatch, or of this machine."
    pairs = _pairs(only)
    disturbed, worst = len(pairs.speedups) - len(pairs.counted), pairs.worst_device_ratio
    if disturbed and worst:
        so = "so no ratio is given" if pairs.void else "and those pairs are left out"
        yield (
            f"{VOID if pairs.void else 'Disturbed'}: the same steps took the device up to {max(worst, 1 / worst):.2f}x "
            f"as long in one loop as in the other (in {disturbed} of {len(pairs.speedups)} pairs of runs), {so}. "
            "Something else kept this machine busy, or host and device share its cores: run it again when it is quiet."
        )
    if run and run.interrupted:
        yield "Interrupted: the numbers are of what ran until then."
    if run and run.measured_steps is not None and run.measured_steps < FEW_STEPS:
        yield f"Few steps: active and idle are of {steps_counted(run)} only. Take more --new-tokens."
    guess = run.prediction if run else None
    interval = pairs.interval
    if guess and guess.gain and interval and not over_time:
        low, high, _ = interval
        if not low * (2 - WORTH_IT) <= guess.gain <= high * WORTH_IT:
            yield (
                f"Prediction and measurement disagree: {guess.gain:.3f}x predicted, {low:.3f}x to {high:.3f}x measured."
            )
    if pairs.speedups and not pairs.void and len(pairs.counted) < ENOUGH_PAIRS:
        yield f"Few pairs of runs: {len(pairs.counted)}. With --repeats {ENOUGH_PAIRS} the interval is 95 % sure."

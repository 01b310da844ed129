"""Exercises of notebook 02: `order`, `launch_step` and `racing`. A launch is tried in a `Lab` and in every order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ... import streams
from ...ordering import explore, races
from ...pictures.picture import Picture
from ...timeline import LANES
from ..lab import COMMANDS, Call, Lab, LabSlot, serve
from ..lab_orders import program
from ..lab_pictures import LOOKS, draw
from ..parts import Case, Exercise
from ..streams import draw_clock, use


class Verdict:
    """What came of a way to launch steps.

    outcomes: how many are possible, over all orders. tokens: what was read on the virtual clock. waited_ms: how long
    the host waited inside the launches. copied_ms, total_ms: when all copies in, and when everything was done.
    """

    def __init__(self, launch: Callable[[Any, Any], Any], numbers: Sequence[int]):
        outcomes = explore.explore(program(launch, numbers, min(2, len(numbers))))
        self.outcomes, self.race = len(outcomes), next((str(race) for race in outcomes.races), "")
        self.lab, self.inside = Lab("virtual", len(numbers)), list[Call]()  # calls within launches

        def noted(lanes: Any, slot: LabSlot) -> Any:
            first = len(self.lab.calls)
            returned = launch(lanes, slot)
            self.inside += self.lab.calls[first:]
            return returned

        self.tokens = serve(self.lab, noted, numbers)
        self.right = self.tokens == [6 * number for number in numbers]
        copies = [end for (command, _), (_, _, end) in self.lab.spans().items() if command == "copy_in"]
        self.copied_ms = round(1e3 * (max(copies, default=0.0) - self.lab.calls[0].start), 6)
        self.waited_ms, self.total_ms = round(self.lab.waited_ms(self.inside), 6), round(self.lab.total_ms, 6)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Verdict) and self._key == other._key

    @property
    def _key(self) -> tuple:
        return self.outcomes, self.right, self.waited_ms, self.copied_ms, self.total_ms

    def __repr__(self) -> str:
        if self.outcomes > 1:
            return f"{self.outcomes} possible outcomes"
        if not self.right:
            return f"1 possible outcome, tokens {self.tokens}"
        times = f"1 possible outcome: all copied in after {self.copied_ms:g} ms, all done after {self.total_ms:g} ms"
        return times + (f", the host waiting for {self.waited_ms:g} ms" if self.waited_ms else "")


def with_order(order: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A launch in which the learner's `order` puts the step after its copy in."""

    def launch(lanes: Any, slot: LabSlot) -> Any:
        h2d, compute, d2h = lanes
        h2d.launch("copy_in", slot.index)
        returned = order(h2d, compute, slot.inputs_ready)
        compute.launch("step", slot.index)
        streams.order(compute, d2h, slot.step_done)
        d2h.launch("copy_out", slot.index)
        d2h.record_event(slot.outputs_ready)
        return returned

    return launch


def _explain_order(args: tuple[Any, ...], got: Any, want: Any) -> str | None:
    lab_calls = got.inside
    first, last = (next(i for i, call in enumerate(lab_calls) if call.what == what) for what in ("copy_in", "step"))
    calls = [(call.kind, call.lane) for call in lab_calls[first + 1 : last]]
    kinds = [kind for kind, _ in calls]
    if got.outcomes > 1 and not calls:
        return "You asked for nothing, so the step may start while its copy is still under way."
    if got.outcomes > 1 and "record" not in kinds:
        return (
            "You wait for an event that nobody has recorded: there is no mark yet, and such a wait waits for nothing."
        )
    if got.outcomes > 1 and "wait" not in kinds:
        return "The mark is there, but nobody waits for it. `later` has to be told: `later.wait_event(event)`."
    if got.outcomes > 1 and ("record", "compute") in calls and ("wait", "H2D") in calls:
        return (
            "It is the other way round: here `earlier` waits for `later`. `later` is the one to hold back, as in "
            "PyTorch's `later.wait_stream(earlier)`."
        )
    if got.outcomes > 1 and ("record", "compute") in calls:
        return (
            "You record the event in `later`, so `later` waits for itself, and for nothing else. The mark belongs "
            "behind the work that comes first."
        )
    if got.outcomes > 1 and ("wait", "H2D") in calls:
        return "The wrong stream waits. `earlier` need not wait for anybody; `later` is the one to hold back."
    if got.outcomes > 1 and kinds.index("wait") < kinds.index("record"):
        return (
            "You wait before you record. A wait means the newest mark at the time of the call, and then your mark was "
            "not there yet. The order of the two lines counts."
        )
    if got.outcomes == 1 and got.right:
        return _explain_too_much(got, want)
    return got.race or None


def _explain_too_much(got: Verdict, want: Verdict) -> str:
    if got.waited_ms:
        return (
            f"The results are right, but the host stands still: it waits for {got.waited_ms:g} ms in your function, "
            "and could have filled the next batch meanwhile. `synchronize` makes the host wait; `wait_event` makes a "
            "stream wait, and returns at once."
        )
    moved = next((call for call in got.inside if call.kind == "launch" and call.lane != COMMANDS[call.what]), None)
    if moved is not None:
        return (
            f"The results are right, but {moved.what} runs on the stream {moved.lane}, and a stream does one thing "
            f"after the other: nothing overlaps there. It belongs on {COMMANDS[moved.what]}."
        )
    spans = got.lab.spans()
    for (command, slot), (lane, start, _) in sorted(want.lab.spans().items(), key=lambda span: span[1][1]):
        late_ms = 1e3 * (spans[command, slot][1] - start)
        if late_ms > 1e-6:
            return (
                f"The results are right and the host is free, but there is a wait too many: {LOOKS[command][2]} {slot} "
                f"starts {late_ms:g} ms later than it could. {lane} waits for more than it needs, so batches no longer "
                "overlap."
            )
    return "The results are right, but it takes longer than it needs to."


def _explain_launch(args: tuple[Any, ...], got: Any, want: Any) -> str | None:
    missing = [command for command in COMMANDS if command not in {call.what for call in got.inside}]
    if missing:
        return f"You never launch {missing[0]!r}, so what it should bring never arrives."
    if got.outcomes > 1:
        return got.race
    if not got.right:
        return "Every order gives the same, and it is wrong: something is launched before what it needs."
    return _explain_too_much(got, want)


def _draw_verdicts(args: tuple[Any, ...], got: Verdict, want: Verdict) -> Picture:
    labs = {"your function": got.lab} if got == want else {"your function": got.lab, "the package's": want.lab}
    return draw(labs, [6 * number for number in args[0]])


def _listed(racing: Callable[..., Any], *args: Any) -> Any:
    returned = racing(*args)
    return list(returned) if isinstance(returned, tuple | set | filter) or hasattr(returned, "__next__") else returned


def _explain_racing(args: tuple[Any, ...], got: Any, want: list[races.Use]) -> str | None:
    clock, kind, earlier = args
    if not isinstance(got, list):
        return None
    for one in earlier:
        counts = f"the clock counts {clock[one.lane]} of {one.lane}'s operations"
        if one in want and one not in got:
            reason = f"{counts}, so operation {one.number} may still be to come, and one of the two writes"
            return f"You left out {one.lane}'s operation {one.number}: {reason}."
        if one in got and one not in want and "writes" not in (kind, one.kind):
            return f"You name {one.lane}'s operation {one.number}, but both only read: that is right in any order."
        if one in got and one not in want:
            return f"You name {one.lane}'s operation {one.number}, but {counts}: that one is surely done."
    return None


def _draw_racing(args: tuple[Any, ...], got: Any, want: Any) -> Picture:
    clock, kind, earlier = args
    return draw_clock(clock, kind, earlier, [one for one in got if one in earlier], "you: ")


def _clock(host: int, h2d: int, compute: int, d2h: int) -> dict[str, int]:
    return dict(zip(LANES, (host, h2d, compute, d2h), strict=True))


_NUMBERS_GIVEN = "For the batches {0}"
# fmt: off
EXERCISES = {
    "order": Exercise(
        streams.order, _NUMBERS_GIVEN, "leaves",
        (
            Case(((7,),), "The step must not start before its copy in has ended."),
            Case(((7, 8, 9),), "Each step waits for its own copy in, and for nothing else."),
        ),
        (
            "One call puts a mark behind what `earlier` has been given; another one tells `later` about it.",
            "`earlier.record_event(event)` first, then `later.wait_event(event)`: a wait means the newest mark at the "
            "time of the call.",
        ),
        lambda function, numbers: Verdict(with_order(function), numbers), _explain_order, _draw_verdicts,
    ),
    "launch_step": Exercise(
        streams.launch_step, _NUMBERS_GIVEN, "leaves",
        (
            Case(((7,),), "Each of the three commands needs what the one before has brought."),
            Case(((7, 8, 9),), "The copy in of a batch can run while the batch before is computed."),
        ),
        (
            "Three launches, each on its own stream, `order` between two of them, and at the end a mark for the host.",
            "`order(h2d, compute, slot.inputs_ready)` before the step, `order(compute, d2h, slot.step_done)` before "
            "the copy out, `d2h.record_event(slot.outputs_ready)` at the end.",
        ),
        Verdict, _explain_launch, _draw_verdicts,
    ),
    "racing": Exercise(
        races.racing, "When the clock is {0} and the new operation {1}, after {2}", "finds",
        (
            Case((_clock(1, 0, 0, 0), "reads", [use("H2D", 1, "writes")]),
                 "The clock counts none of H2D's operations, so the write may still be under way."),
            Case((_clock(1, 1, 0, 0), "reads", [use("H2D", 1, "writes")]),
                 "The clock counts one operation of H2D, and this is it: surely done."),
            Case((_clock(2, 1, 0, 0), "reads", [use("H2D", 2, "writes")]),
                 "The clock counts one operation of H2D, and this is the second: the mark was recorded before it."),
            Case((_clock(3, 1, 1, 0), "reads", [use("D2H", 1, "reads")]), "Two reads never race."),
            Case((_clock(4, 2, 2, 2), "writes", [use("H2D", 3, "reads")]),
                 "A write races with an earlier read too: it would change what is being read."),
            Case((_clock(6, 2, 4, 1), "writes",
                  [use("compute", 3, "writes"), use("H2D", 3, "reads"), use("D2H", 1, "reads")]),
                 "Compare each use with the count of its own lane."),
        ),
        (
            "Ask of each use: does one of the two write? And does the clock count it, in the use's own lane?",
            "Keep `use` if `\"writes\" in (kind, use.kind)` and `clock[use.lane] < use.number`.",
        ),
        _listed, _explain_racing, _draw_racing,
    ),
}
# fmt: on

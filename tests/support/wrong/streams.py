"""Notebook 02: wrong answers to its exercises, as learners write them, and launch_steps made of named calls."""

from __future__ import annotations

import re
from types import SimpleNamespace

from asyncbatch.lessons.lab import COMMANDS
from asyncbatch.streams import order


def nothing(earlier, later, event):
    pass


def waits_before_it_records(earlier, later, event):
    later.wait_event(event)
    earlier.record_event(event)


def only_records(earlier, later, event):
    earlier.record_event(event)


def only_waits(earlier, later, event):
    later.wait_event(event)


def records_in_later(earlier, later, event):
    later.record_event(event)
    later.wait_event(event)


def holds_back_the_wrong_stream(earlier, later, event):
    earlier.record_event(event)
    earlier.wait_event(event)


def host_waits(earlier, later, event):
    earlier.record_event(event)
    event.synchronize()


def both_ways(earlier, later, event):
    order(earlier, later, event)
    order(later, earlier, event)


def the_other_way_round(earlier, later, event):
    earlier.wait_stream(later)


def launches(*calls):
    """A launch_step that makes these calls: "copy_in", "step", "copy_out" are launched on their streams, or as
    "step on H2D"; "H2D > compute" orders two streams; the rest are methods, as "D2H.record_event outputs_ready"."""

    def launch(lanes, slot):
        by_name = {lane.name: lane for lane in lanes}
        events = {"H2D": slot.inputs_ready, "compute": slot.step_done, "D2H": slot.outputs_ready}
        for call in calls:
            if ">" in call:
                earlier, later = call.split(" > ")
                order(by_name[earlier], by_name[later], events[earlier])
            elif "." in call:
                lane, method, *event = re.split(r"[. ]", call)
                getattr(by_name[lane], method)(*(getattr(slot, name) for name in event))
            else:
                command, *lane = call.split(" on ")
                by_name[lane[0] if lane else COMMANDS[command]].launch(command, slot.index)

    return launch


IN, STEP, OUT, END = "H2D > compute", "compute > D2H", "D2H.record_event outputs_ready", "D2H > H2D"
LAUNCHES = {
    "no waits": launches("copy_in", "step", "copy_out", OUT),
    "no wait for the step": launches("copy_in", IN, "step", "copy_out", OUT),
    "no mark for the host": launches("copy_in", IN, "step", STEP, "copy_out"),
    "mark for the host too early": launches("copy_in", IN, "step", STEP, OUT, "copy_out"),
    "no copy out": launches("copy_in", IN, "step", "compute.record_event outputs_ready"),
    "copy out before the step": launches(
        "copy_in", "H2D > D2H", "copy_out", "D2H > compute", "step", "compute.record_event outputs_ready"
    ),
    "the host waits": launches("copy_in", "H2D.synchronize", "step", STEP, "copy_out", OUT),
    "all in one stream": launches(
        *(f"{command} on compute" for command in COMMANDS), "compute.record_event outputs_ready"
    ),
    "batches do not overlap": launches("copy_in", IN, "step", STEP, "copy_out", END),
    "always the first slot": lambda lanes, slot: RIGHT(lanes, SimpleNamespace(**{**vars(slot), "index": 0})),
    "steps wait for copies out": launches("copy_in", IN, "step", STEP, "copy_out", "D2H > compute"),
}
for words, wrong in LAUNCHES.items():
    wrong.__doc__ = words  # what a teacher reads of it
RIGHT = launches("copy_in", IN, "step", STEP, "copy_out", OUT)


def not_the_last_one(clock, kind, earlier):
    return [use for use in earlier if "writes" in (kind, use.kind) and clock[use.lane] <= use.number]


def any_operation_will_do(clock, kind, earlier):
    return [use for use in earlier if "writes" in (kind, use.kind) and clock[use.lane] == 0]


def two_reads_too(clock, kind, earlier):
    return [use for use in earlier if clock[use.lane] < use.number]


def only_after_writes(clock, kind, earlier):
    return [use for use in earlier if use.kind == "writes" and clock[use.lane] < use.number]


def only_new_writes(clock, kind, earlier):
    return [use for use in earlier if kind == "writes" and clock[use.lane] < use.number]


def yes_or_no(clock, kind, earlier):
    return any("writes" in (kind, use.kind) and clock[use.lane] < use.number for use in earlier)


WRONG = {
    "order": (
        nothing,
        waits_before_it_records,
        only_records,
        only_waits,
        records_in_later,
        holds_back_the_wrong_stream,
        host_waits,
        both_ways,
        the_other_way_round,
    ),
    "launch_step": tuple(LAUNCHES.values()),
    "racing": (
        not_the_last_one,
        any_operation_will_do,
        two_reads_too,
        only_after_writes,
        only_new_writes,
        yes_or_no,
    ),
}

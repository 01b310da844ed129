"""Notebook 07: wrong answers to its exercises, as learners write them. Each has a fault of its own."""

from __future__ import annotations


def in_turns(host, device, slots):
    return host + device


def device_decides(host, device, slots):
    return device if slots > 1 else host + device


def shared_among_slots(host, device, slots):
    return (host + device) / slots


def third_slot_helps(host, device, slots):
    return host + device if slots == 1 else max(host / (slots - 1), device)


def always_overlapped(host, device, slots):
    return max(host, device)


def no_late_stop(host, device, tokens, slots):
    return third_of(host, device, 1) / third_of(host, device, slots)


def third_of(host, device, slots):
    return max(host, device, (host + device) / slots)


def late_in_both(host, device, tokens, slots):
    more = slots - 1
    return (tokens + more) * third_of(host, device, slots) / ((tokens + more) * third_of(host, device, slots))


def turned_over(host, device, tokens, slots):
    return (tokens + slots - 1) * third_of(host, device, slots) / (tokens * third_of(host, device, 1))


def one_late_always(host, device, tokens, slots):
    return tokens * third_of(host, device, 1) / ((tokens + 1) * third_of(host, device, slots))


def as_many_as_slots(host, device, tokens, slots):
    return tokens * third_of(host, device, 1) / ((tokens + slots) * third_of(host, device, slots))


def device_longer_only(host, device, tokens, slots):
    return tokens * (host + device) / ((tokens + slots - 1) * device)


def switched_off(serve, gc):
    gc.disable()
    try:
        return serve()
    finally:
        gc.enable()


def frozen_for_good(serve, gc):
    gc.collect()
    gc.freeze()
    return serve()


def garbage_frozen(serve, gc):
    gc.freeze()
    try:
        return serve()
    finally:
        gc.unfreeze()


def no_finally(serve, gc):
    gc.collect()
    gc.freeze()
    result = serve()
    gc.unfreeze()
    return result


def nothing_returned(serve, gc):
    gc.collect()
    gc.freeze()
    try:
        serve()
    finally:
        gc.unfreeze()


def collected_only(serve, gc):
    gc.collect()
    return serve()


WRONG = {
    "step_time": (in_turns, device_decides, shared_among_slots, third_slot_helps, always_overlapped),
    "gain_with_stops": (
        no_late_stop, late_in_both, turned_over, one_late_always, as_many_as_slots, device_longer_only,
    ),
    "quietly": (switched_off, frozen_for_good, garbage_frozen, no_finally, nothing_returned, collected_only),
}  # fmt: skip

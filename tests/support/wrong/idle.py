"""Notebooks 00 and 01: wrong answers to their exercises, as learners write them. Each has a fault of its own."""

from __future__ import annotations


def ratio_to_device(host_s, device_s):
    return host_s / device_s


def share_of_device(host_s, device_s):
    return device_s / (host_s + device_s)


def whole_number(host_s, device_s):
    return host_s // (host_s + device_s)


def percent(host_s, device_s):
    return 100 * host_s / (host_s + device_s)


def time_left(host_s, device_s):
    return max(host_s, device_s) / (host_s + device_s)


def idle_once_more(host_s, device_s):
    return host_s / (host_s + device_s)


def how_much_more(host_s, device_s):
    return (host_s + device_s) / max(host_s, device_s) - 1


def shorter_of_the_two(host_s, device_s):
    return (host_s + device_s) / min(host_s, device_s)


def device_always(host_s, device_s):
    return (host_s + device_s) / device_s


def never_below_two(host_s, device_s):
    return 2 if host_s >= device_s else (host_s + device_s) / device_s


def gaps_of_no_length(starts, ends):
    return [(i, starts[i] - ends[i - 1]) for i in range(1, len(starts))]


def step_before(starts, ends):
    return [(i - 1, starts[i] - ends[i - 1]) for i in range(1, len(starts)) if starts[i] > ends[i - 1]]


def start_to_start(starts, ends):
    return [(i, starts[i] - starts[i - 1]) for i in range(1, len(starts)) if starts[i] > ends[i - 1]]


def before_the_first(starts, ends):
    return [(i, start - end) for i, (start, end) in enumerate(zip(starts, [0, *ends], strict=False)) if start > end]


def only_the_first(starts, ends):
    return next(([(i, starts[i] - ends[i - 1])] for i in range(1, len(starts)) if starts[i] > ends[i - 1]), [])


def only_seconds(starts, ends):
    return [starts[i] - ends[i - 1] for i in range(1, len(starts)) if starts[i] > ends[i - 1]]


def length_first(token_ids, max_new_tokens, stop_token_ids):
    if len(token_ids) >= max_new_tokens:
        return "length"
    return "stop" if token_ids and token_ids[-1] in stop_token_ids else None


def one_too_many(token_ids, max_new_tokens, stop_token_ids):
    if token_ids and token_ids[-1] in stop_token_ids:
        return "stop"
    return "length" if len(token_ids) > max_new_tokens else None


def first_stop_only(token_ids, max_new_tokens, stop_token_ids):
    if token_ids and stop_token_ids and token_ids[-1] == stop_token_ids[0]:
        return "stop"
    return "length" if len(token_ids) >= max_new_tokens else None


def forgets_empty(token_ids, max_new_tokens, stop_token_ids):
    if token_ids[-1] in stop_token_ids:
        return "stop"
    return "length" if len(token_ids) >= max_new_tokens else None


def two_always_stops(token_ids, max_new_tokens, stop_token_ids):
    if token_ids and token_ids[-1] in (*stop_token_ids, 2) or 2 in token_ids:
        return "stop"
    return "length" if len(token_ids) >= max_new_tokens else None


def ignores_rows(chunk_sizes, free_rows, budget):
    count = total = 0
    for chunk in chunk_sizes:
        total += chunk
        if total > budget:
            break
        count += 1
    return count


def ignores_budget(chunk_sizes, free_rows, budget):
    return min(len(chunk_sizes), free_rows)


def strictly_less(chunk_sizes, free_rows, budget):
    count = total = 0
    for chunk in chunk_sizes:
        if count >= free_rows or total + chunk >= budget:
            break
        count, total = count + 1, total + chunk
    return count


def lets_overtake(chunk_sizes, free_rows, budget):
    count = total = 0
    for chunk in chunk_sizes:
        if count < free_rows and total + chunk <= budget:
            count, total = count + 1, total + chunk
    return count


def counts_tokens(chunk_sizes, free_rows, budget):
    return min(sum(chunk_sizes), budget)


def counts_first_step(starts, ends):
    return sum(e - s for s, e in zip(starts, ends, strict=True)), ends[-1] - starts[0]


def period_from_start(starts, ends):
    return sum(e - s for s, e in zip(starts[1:], ends[1:], strict=True)), ends[-1] - starts[0]


def same_length_steps(starts, ends):
    return (ends[0] - starts[0]) * (len(ends) - 1), ends[-1] - ends[0]


def period_from_zero(starts, ends):
    return sum(e - s for s, e in zip(starts[1:], ends[1:], strict=True)), ends[-1] - 6.0


def share_alone(starts, ends):
    return sum(e - s for s, e in zip(starts[1:], ends[1:], strict=True)) / (ends[-1] - ends[0])


WRONG = {
    "idle_share": (ratio_to_device, share_of_device, whole_number, percent),
    "overlap_gain": (
        time_left,
        idle_once_more,
        how_much_more,
        shorter_of_the_two,
        device_always,
        never_below_two,
    ),
    "idle_gaps": (gaps_of_no_length, step_before, start_to_start, before_the_first, only_the_first, only_seconds),
    "finish_reason": (length_first, one_too_many, first_stop_only, forgets_empty, two_always_stops),
    "fit_budget": (ignores_rows, ignores_budget, strictly_less, lets_overtake, counts_tokens),
    "device_activity": (counts_first_step, period_from_start, same_length_steps, period_from_zero, share_alone),
}

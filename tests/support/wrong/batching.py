"""Notebook 01: wrong loops of continuous batching, as learners write them."""

from __future__ import annotations

from asyncbatch.request import finish_reason
from asyncbatch.scheduler import fit_budget


def goes_on(request):
    return finish_reason(request.token_ids, request.max_new_tokens, request.stop_token_ids) is None


def static(waiting, rows, budget, compute):
    waiting = list(waiting)
    while waiting:
        count = fit_budget([len(request.prompt) for request in waiting], rows, budget)
        running, waiting = waiting[:count], waiting[count:]
        while running:
            compute(running)
            running = [request for request in running if goes_on(request)]


def nobody_leaves(waiting, rows, budget, compute):
    waiting, running = list(waiting), []
    while waiting or running:
        count = fit_budget([len(request.prompt) for request in waiting], rows - len(running), budget)
        running, waiting = running + waiting[:count], waiting[count:]
        compute(running)


def leaves_a_step_late(waiting, rows, budget, compute):
    waiting, running = list(waiting), []
    while waiting or running:
        done = [request for request in running if not goes_on(request)]
        count = fit_budget([len(request.prompt) for request in waiting], rows - len(running), budget)
        running, waiting = running + waiting[:count], waiting[count:]
        compute(running)
        running = [request for request in running if request not in done]


def counts_no_rows(waiting, rows, budget, compute):
    waiting, running = list(waiting), []
    while waiting or running:
        count = fit_budget([len(request.prompt) for request in waiting], rows, budget)
        running, waiting = running + waiting[:count], waiting[count:]
        compute(running)
        running = [request for request in running if goes_on(request)]


def no_budget(waiting, rows, budget, compute):
    waiting, running = list(waiting), []
    while waiting or running:
        count = rows - len(running)
        running, waiting = running + waiting[:count], waiting[count:]
        compute(running)
        running = [request for request in running if goes_on(request)]


def forgets_who_runs(waiting, rows, budget, compute):
    waiting, running = list(waiting), []
    while waiting:
        count = fit_budget([len(request.prompt) for request in waiting], rows - len(running), budget)
        running, waiting = running + waiting[:count], waiting[count:]
        compute(running)
        running = [request for request in running if goes_on(request)]


def only_limits(waiting, rows, budget, compute):
    waiting, running = list(waiting), []
    while waiting or running:
        count = fit_budget([len(request.prompt) for request in waiting], rows - len(running), budget)
        running, waiting = running + waiting[:count], waiting[count:]
        compute(running)
        running = [request for request in running if len(request.token_ids) < request.max_new_tokens]


def newest_first(waiting, rows, budget, compute):
    waiting, running = list(waiting), []
    while waiting or running:
        count = fit_budget([len(request.prompt) for request in waiting], rows - len(running), budget)
        running += [waiting.pop() for _ in range(count)]
        compute(running)
        running = [request for request in running if goes_on(request)]


def computes_nothing(waiting, rows, budget, compute):
    while waiting:
        pass


WRONG = {
    "continuous_batch": (
        static,
        nobody_leaves,
        leaves_a_step_late,
        counts_no_rows,
        no_budget,
        forgets_who_runs,
        only_limits,
        newest_first,
        computes_nothing,
    ),
}

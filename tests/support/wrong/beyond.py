"""Notebook 08: wrong answers to its exercises, as learners write them, each with words that only the right message
has; and strategies that are right, though they are written in another way than the package's."""

from __future__ import annotations

# ---- under_way -------------------------------------------------------------------------------------------------------


def without_this_one(launches, copies):
    return [number - sum(copy.end <= launch.start for copy in copies) for number, launch in enumerate(launches)]


def at_the_end_of_the_launch(launches, copies):
    return [number - sum(copy.end <= launch.end for copy in copies) for number, launch in enumerate(launches, 1)]


def launches_only(launches, copies):
    return list(range(1, len(launches) + 1))


def one_number(launches, copies):
    return len(launches) - len(copies)


# ---- gaps ------------------------------------------------------------------------------------------------------------


def lengths(steps):
    return [end - start for start, end in steps]


def start_to_start(steps):
    return [later[0] - earlier[0] for earlier, later in zip(steps, steps[1:], strict=False)]


def the_wrong_way_round(steps):
    return [earlier[1] - later[0] for earlier, later in zip(steps, steps[1:], strict=False)]


def the_sum(steps):
    return sum(later[0] - earlier[1] for earlier, later in zip(steps, steps[1:], strict=False))


# ---- go_ahead --------------------------------------------------------------------------------------------------------


def never_looks(server):
    step = server.forward()
    server.sample(step)
    while not server.done:
        ahead = server.forward()
        server.sample(ahead)
        server.accept(server.wait(step))
        step = ahead


def keeps_the_step_ahead(server):
    step = server.forward()
    server.sample(step)
    while not server.done:
        ahead = server.forward()
        server.sample(ahead)
        token = server.wait(step)
        if not server.allows(token):
            server.sample(step, server.mask())
            token = server.wait(step)
        server.accept(token)
        step = ahead


def always_with_a_mask(server):
    step = server.forward()
    while not server.done:
        server.sample(step, server.mask())
        ahead = server.forward()
        server.accept(server.wait(step))
        step = ahead


def nothing_goes_ahead(server):
    while not server.done:
        step = server.forward()
        server.sample(step)
        token = server.wait(step)
        if not server.allows(token):
            server.sample(step, server.mask())
            token = server.wait(step)
        server.accept(token)


def does_not_sample_ahead(server):
    step = server.forward()
    server.sample(step)
    while not server.done:
        ahead = server.forward()
        token = server.wait(step)
        if not server.allows(token):
            server.sample(step, server.mask())
            token = server.wait(step)
            ahead = server.forward()
        server.accept(token)
        step = ahead


def never_accepts(server):
    step = server.forward()
    server.sample(step)
    while not server.done:
        server.wait(step)


def one_token(server):
    step = server.forward()
    server.sample(step)
    ahead = server.forward()
    server.sample(ahead)
    server.accept(server.wait(step))


# ---- may_apply -------------------------------------------------------------------------------------------------------


def at_once(news, planning):
    return True


def two_steps_later(news, planning):
    return planning >= news.sent + 2


def never(news, planning):
    return False


def in_even_steps(news, planning):
    return planning % 2 == 0


def without_the_message(news, planning):
    return planning > news


WRONG = {
    "under_way": {
        without_this_one: "is under way, too: count it",
        at_the_end_of_the_launch: "You look at the end of each launch",
        launches_only: "You count launches only",
        one_number: "a list with a number for each",
    },
    "gaps": {
        lengths: "how long each step took",
        start_to_start: "from start to start",
        the_wrong_way_round: "not the other way round",
        the_sum: "Return a list",
    },
    "go_ahead": {
        never_looks: "Look before you accept",
        keeps_the_step_ahead: "computed from a token that is gone",
        always_with_a_mask: "The mask is what costs",
        nothing_goes_ahead: "Nothing goes ahead",
        does_not_sample_ahead: "has to be sampled before you wait",
        never_accepts: "The text never got done",
        one_token: "Go on until `server.done`",
    },
    "may_apply": {
        at_once: "the message is still on its way to rank 1",
        two_steps_later: "later than need be",
        never: "Nobody ever said yes",
        in_even_steps: "the message is still on its way to rank 1",
        without_the_message: "before the same step",
    },
}


# ---- right, in other words -------------------------------------------------------------------------------------------


def launched(server):
    step = server.forward()
    server.sample(step)
    return step


def with_a_helper(server):
    step = launched(server)
    while not server.done:
        ahead = launched(server)
        token = server.wait(step)
        if not server.allows(token):
            server.sample(step, server.mask())
            token = server.wait(step)  # and only then the next one
            ahead = launched(server)
        server.accept(token)
        step = ahead


def keeps_a_queue(server):
    queue = [launched(server), launched(server)]
    while not server.done:
        step = queue.pop(0)
        token = server.wait(step)
        if server.allows(token):
            server.accept(token)
        else:
            server.sample(step, server.mask())
            queue = []
            server.accept(server.wait(step))
        while len(queue) < 2 and not server.done:
            queue.append(launched(server))


def from_the_next_step_on(news, planning):
    return news.sent < planning


RIGHT_STRATEGIES = (with_a_helper, keeps_a_queue)

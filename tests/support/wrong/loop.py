"""Notebook 05: wrong answers to its exercises, as learners write them, and words that only the right message has;
and steps that are right, though they are written in another way than the package's."""

from __future__ import annotations

import torch


def one_token_more(state):
    return state.placed >= state.max_tokens


def one_token_less(state):
    return state.placed >= state.max_tokens - 2


def looks_at_what_has_come(state):
    return len(state.generated) + 1 >= state.max_tokens - state.num_prompt


def forgets_the_prompt(state):
    return state.placed >= state.max_tokens - state.num_prompt - 1


def still_synchronous(self):
    plan = self.plan()
    if plan is None:
        return False
    slot = self.fill(plan)
    self.launch(slot)
    self.wait(slot)
    self.commit(slot)
    return True


def newest_first(self):
    plan = self.plan()
    if plan is not None:
        slot = self.fill(plan)
        self.launch(slot)
        self.in_flight.append(slot)
    if len(self.in_flight) == len(self.slots) or (self.in_flight and plan is None):
        slot = self.in_flight.pop()
        self.wait(slot)
        self.commit(slot)
        return True
    return plan is not None


def does_not_drain(self):
    plan = self.plan()
    if plan is None:
        return False
    slot = self.fill(plan)
    self.launch(slot)
    self.in_flight.append(slot)
    if len(self.in_flight) == len(self.slots):
        slot = self.in_flight.popleft()
        self.wait(slot)
        self.commit(slot)
    return True


def without_a_limit(self):
    plan = self.plan()
    if plan is not None:
        slot = self.fill(plan)
        self.launch(slot)
        self.in_flight.append(slot)
        return True
    if self.in_flight:
        slot = self.in_flight.popleft()
        self.wait(slot)
        self.commit(slot)
        return True
    return False


def does_not_wait(self):
    plan = self.plan()
    if plan is not None:
        slot = self.fill(plan)
        self.launch(slot)
        self.in_flight.append(slot)
    if len(self.in_flight) == len(self.slots) or (self.in_flight and plan is None):
        slot = self.in_flight.popleft()
        self.commit(slot)
        return True
    return plan is not None


def returns_nothing(self):
    plan = self.plan()
    if plan is not None:
        slot = self.fill(plan)
        self.launch(slot)
        self.in_flight.append(slot)
    if len(self.in_flight) == len(self.slots) or (self.in_flight and plan is None):
        slot = self.in_flight.popleft()
        self.wait(slot)
        self.commit(slot)


def always_two_slots(self):
    plan = self.plan()
    if plan is not None:
        slot = self.fill(plan)
        self.launch(slot)
        self.in_flight.append(slot)
    if len(self.in_flight) == 2 or (self.in_flight and plan is None):
        slot = self.in_flight.popleft()
        self.wait(slot)
        self.commit(slot)
        return True
    return plan is not None


def waits_before_it_launches(self):
    if self.in_flight:
        slot = self.in_flight.popleft()
        self.wait(slot)
        self.commit(slot)
    plan = self.plan()
    if plan is None:
        return False
    slot = self.fill(plan)
    self.launch(slot)
    self.in_flight.append(slot)
    return True


def fills_without_a_plan(self):
    plan = self.plan()
    slot = self.fill(plan)
    self.launch(slot)
    self.in_flight.append(slot)
    if len(self.in_flight) == len(self.slots):
        slot = self.in_flight.popleft()
        self.wait(slot)
        self.commit(slot)
    return True


def never_ends(self):
    while self.plan() is not ...:
        while True:
            pass


def plans_forever(self):
    while True:
        self.plan()


def always_says_true(self):
    plan = self.plan()
    if plan is not None:
        slot = self.fill(plan)
        self.launch(slot)
        self.in_flight.append(slot)
    if len(self.in_flight) == len(self.slots) or (self.in_flight and plan is None):
        slot = self.in_flight.popleft()
        self.wait(slot)
        self.commit(slot)
    return True


def leaves_it_in_flight(self):
    plan = self.plan()
    if plan is not None:
        slot = self.fill(plan)
        self.launch(slot)
        self.in_flight.append(slot)
    if len(self.in_flight) == len(self.slots) or (self.in_flight and plan is None):
        slot = self.in_flight[0]
        self.wait(slot)
        self.commit(slot)
        return True
    return plan is not None


def takes_from_an_empty_deque(self):
    slot = self.in_flight.popleft()
    self.wait(slot)
    self.commit(slot)
    return self.plan() is not None


def waits_for_a_slot_first(self):
    done = False
    if len(self.in_flight) == len(self.slots):
        slot = self.in_flight.popleft()
        self.wait(slot)
        self.commit(slot)
        done = True
    plan = self.plan()
    if plan is not None:
        slot = self.fill(plan)
        self.launch(slot)
        self.in_flight.append(slot)
        return True
    if self.in_flight:
        slot = self.in_flight.popleft()
        self.wait(slot)
        self.commit(slot)
        return True
    return done


def asks_for_the_drain_by_itself(self):
    plan = self.plan()
    if plan is None and not self.in_flight:
        return False
    if plan is not None:
        self.in_flight.append(self.fill(plan))
        self.launch(self.in_flight[-1])
        if len(self.in_flight) < len(self.slots):
            return True
    oldest = self.in_flight.popleft()
    self.wait(oldest)
    self.commit(oldest)
    return True


def pair(shape):
    inputs = torch.zeros(shape.num_inputs, dtype=torch.int32)
    return inputs, torch.zeros(shape.max_batch_size, dtype=torch.int32)


def one_pair_for_all(shape, on_cuda):
    return [pair(shape)] * shape.num_slots


def one_input_for_all(shape, on_cuda):
    inputs = torch.zeros(shape.num_inputs, dtype=torch.int32)
    return [(inputs, torch.zeros(shape.max_batch_size, dtype=torch.int32)) for _ in range(shape.num_slots)]


def always_two_pairs(shape, on_cuda):
    return [pair(shape), pair(shape)]


def one_pair(shape, on_cuda):
    return [pair(shape)]


def of_int64(shape, on_cuda):
    return [tuple(part.long() for part in pair(shape)) for _ in range(shape.num_slots)]


def not_zero(shape, on_cuda):
    return [tuple(part + 1 for part in pair(shape)) for _ in range(shape.num_slots)]


RIGHT_STEPS = (waits_for_a_slot_first, asks_for_the_drain_by_itself)
WRONG = {
    "fully_launched": {
        one_token_more: "samples token 6, the last of 7",
        one_token_less: "One more step is to come",
        looks_at_what_has_come: "Token 5 has come, but it has no place yet",
        forgets_the_prompt: "Token 3 has no place yet",
    },
    "step": {
        still_synchronous: "You wait for step 0 before step 1 is launched",
        newest_first: "You commit the newest step first",
        does_not_drain: "step 3 was still in flight, and nobody committed it",
        without_a_limit: "You fill slot 0 again while it holds a step that is not committed yet",
        does_not_wait: "You commit a step before its output ids have surely arrived",
        returns_nothing: "Turn 0 did something and returned None",
        always_two_slots: "at most 2 of 3 slots were in use",
        waits_before_it_launches: "You wait for step 0 before step 1 is launched",
        fills_without_a_plan: "`self.plan()` returned None",
        never_ends: "stopped after 20,000 lines",
        plans_forever: "stopped after 2000 calls",
        always_says_true: "your step returned True, so the loop went on turning",
        leaves_it_in_flight: "Step 0 is committed and still stands in `self.in_flight`",
        takes_from_an_empty_deque: "when there is none",
    },
    "host_buffers": {
        one_pair_for_all: "The inputs of slot 0 and the inputs of slot 1 are the same memory",
        one_input_for_all: "`[x] * n` does not make n buffers",
        always_two_pairs: "There are 3 slots",
        one_pair: "There are 2 slots",
        of_int64: "int32, `shape.num_inputs` inputs",
        not_zero: "A new buffer holds zeros",
    },
}

"""Notebook 04: wrong answers to its exercises, as learners write them, and words that only the right message has."""

from __future__ import annotations

import torch

from asyncbatch.slot import slot_of


def two_slots_only(step, num_slots):
    return step % 2


def how_often(step, num_slots):
    return step // num_slots


def always_the_first(step, num_slots):
    return 0


def counts_on(step, num_slots):
    return step


def from_one(step, num_slots):
    return step % num_slots + 1


def row_of_now(carries, num_slots, batch):
    return [-1 if c is None else slot_of(c[0], num_slots) * batch + row for row, c in enumerate(carries)]


def slot_forgotten(carries, num_slots, batch):
    return [-1 if carry is None else carry[1] for carry in carries]


def one_step_on(carries, num_slots, batch):
    return [-1 if c is None else slot_of(c[0] + 1, num_slots) * batch + c[1] for c in carries]


def zero_for_none(carries, num_slots, batch):
    return [0 if c is None else slot_of(c[0], num_slots) * batch + c[1] for c in carries]


def only_what_is_carried(carries, num_slots, batch):
    return [slot_of(c[0], num_slots) * batch + c[1] for c in carries if c is not None]


def believes_minus_one(carry, outputs, ids):
    return outputs[carry]


def zero_and_add(carry, outputs, ids):
    return outputs[carry] * (carry >= 0) + ids


def adds_everything(carry, outputs, ids):
    return outputs[carry] + ids


def takes_its_own_row(carry, outputs, ids):
    return torch.where(carry >= 0, outputs[: len(carry)], ids)


def the_other_way_round(carry, outputs, ids):
    return torch.where(carry < 0, outputs[carry], ids)


def does_not_clamp(carry, outputs, ids):
    return torch.where(carry >= 0, outputs[carry], ids)


def clamps_the_index_only(carry, outputs, ids):
    return outputs[carry.clamp(min=0)]


def in_place(carry, outputs, ids):
    ids[carry >= 0] = outputs[carry[carry >= 0]]
    return ids


WRONG = {
    "slot_of": {
        two_slots_only: "right for two slots only",
        how_often: "how often all slots have been used",
        always_the_first: "Steps 0, 1, 2, 3 take slots 0, 1, 0, 1",
        counts_on: "There is no slot 3",
        from_one: "The first step takes slot 0",
    },
    "carry_ids": {
        row_of_now: "in step 3 it was row 2, and its token lies where that step put it",
        slot_forgotten: "That is row 0 of slot 0. Step 1 used slot 1, whose outputs begin at 3",
        one_step_on: "3 is not in slot 0, which step 0 used: its outputs are 0 to 2",
        zero_for_none: "Say -1, as 0 is a place like any other",
        only_what_is_carried: "one number for each row",
    },
    "carry_over": {
        believes_minus_one: "it means the last output",
        zero_and_add: "right only where the host wrote 0",
        adds_everything: "You added what -1 brought",
        takes_its_own_row: "You took output 0, the row itself. The carry of row 0 says 1",
        the_other_way_round: "Row 0 goes on with what the host wrote, 0. Its carry is 0",
        does_not_clamp: "NO_TOKEN",
        clamps_the_index_only: "you gave it the first output instead",
        in_place: "Make a new tensor",
    },
}

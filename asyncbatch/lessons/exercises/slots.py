"""Exercises of notebook 04: `slot_of`, `carry_ids` and `carry_over`, on tensors that fit on the screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ... import slot
from ...pictures.picture import Picture
from ...runner import Runner
from ..parts import Case, Exercise
from ..slots import draw_carry


def _whole(function: Callable[..., Any], *args: Any) -> Any:
    got = function(*args)
    return int(got) if isinstance(got, int | float | torch.Tensor) and int(got) == got else got


def _explain_slot(args: tuple[Any, ...], got: Any, want: Any) -> str | None:
    step, num_slots = args
    if isinstance(got, int) and not 0 <= got < num_slots:
        return f"There is no slot {got}: with {num_slots} of them, they are numbered 0 to {num_slots - 1}."
    if got == step // num_slots:
        return "That is how often all slots have been used. What is left over when you divide names the slot."
    if got == step % 2:
        return f"That is right for two slots only, and here are {num_slots}. Use `num_slots`."
    return None


# ---- exercise 2: the index -------------------------------------------------------------------------------------------


def _listed(function: Callable[..., Any], carries: Sequence, num_slots: int, batch: int) -> Any:
    got = function(carries, num_slots, batch)
    if isinstance(got, torch.Tensor):
        got = got.tolist()
    return [int(each) if isinstance(each, torch.Tensor) else each for each in got] if isinstance(got, list) else got


def _explain_ids(args: tuple[Any, ...], got: Any, want: Any) -> str | None:
    carries, num_slots, batch = args
    if not isinstance(got, list) or len(got) != len(carries):
        return f"Return a list with one number for each row: {len(carries)} here."
    row = next(row for row, (mine, right) in enumerate(zip(got, want, strict=True)) if mine != right)
    mine, carry = got[row], carries[row]
    if carry is None:
        return f"Row {row} has its token from the host: nothing is carried. Say -1, as 0 is a place like any other."
    step, source = carry
    own, index = slot.slot_of(step, num_slots), want[row]
    if mine == own * batch + row:
        return (
            f"You took row {row}, where the request sits now. It has moved: in step {step} it was row {source}, and "
            "its token lies where that step put it."
        )
    if mine == source:
        return f"That is row {source} of slot 0. Step {step} used slot {own}, whose outputs begin at {own * batch}."
    if isinstance(mine, int) and mine // batch != own:
        first, last = own * batch, (own + 1) * batch - 1
        return f"{mine} is not in slot {own}, which step {step} used: its outputs are {first} to {last}."
    return f"Row {source} of slot {own} is number {own} * {batch} + {source} = {index} of all outputs."


# ---- exercise 3: the carry-over --------------------------------------------------------------------------------------


def _carried(function: Callable[..., Any], carry: Sequence[int], outputs: Sequence[int], ids: Sequence[int]) -> Any:
    given = [torch.tensor(part, dtype=torch.int32) for part in (carry, outputs, ids)]
    got = function(*given)
    if isinstance(got, torch.Tensor):
        if any(
            not torch.equal(part, torch.tensor(kept)) for part, kept in zip(given, (carry, outputs, ids), strict=True)
        ):
            return "inputs that were changed in place"
        return got.tolist()
    return got


def _explain_carried(args: tuple[Any, ...], got: Any, want: Any) -> str | None:
    carry, outputs, ids = args
    if isinstance(got, str):
        return "A slot's inputs belong to the copy in, its outputs to later steps as well. Make a new tensor."
    if not isinstance(got, list) or len(got) != len(want):
        return f"Return one tensor of {len(want)} tokens: one for each row."
    row = next(row for row, (mine, right) in enumerate(zip(got, want, strict=True)) if mine != right)
    mine, index = got[row], carry[row]
    if index < 0 and mine == outputs[index]:
        return (
            f"Row {row} has its token from the host, {ids[row]}. An index of -1 is valid in PyTorch: it means the last "
            "output. Look at the carry before you believe what it brought."
        )
    if index < 0 and mine == outputs[0]:
        return f"Row {row} has its token from the host, {ids[row]}; you gave it the first output instead."
    if index < 0 and mine == outputs[index] + ids[row]:
        return f"You added what -1 brought, the last output, to the host's {ids[row]}. Put 0 there first, or choose."
    if index >= 0 and mine == ids[row]:
        carried = f"Its carry is {index}: output {index} is {outputs[index]}."
        return f"Row {row} goes on with what the host wrote, {mine}. {carried}"
    if index >= 0 and mine == outputs[index] + ids[row]:
        return (
            f"You added the output to the host's {ids[row]}. That is right only where the host wrote 0. Choose "
            "instead: `torch.where`."
        )
    if index >= 0 and mine == outputs[row]:
        return f"You took output {row}, the row itself. The carry of row {row} says {index}."
    if mine < 0:
        return (
            f"Output {index} is {outputs[index]}: NO_TOKEN, what a step writes when its numbers are not finite. No "
            "model has an embedding for it, so take 0 in its place: `.clamp(min=0)`."
        )
    return None


def _carried_picture(args: tuple[Any, ...], got: Any, want: Any) -> Picture:
    carry, outputs, ids = args
    return draw_carry(carry, outputs, ids, got, want)


# fmt: off
EXERCISES = {
    "slot_of": Exercise(
        slot.slot_of, "For step {0} and {1} slots", "says",
        (
            Case((0, 2), "The first step takes slot 0."),
            Case((3, 2), "Steps 0, 1, 2, 3 take slots 0, 1, 0, 1."),
            Case((4, 3), "Steps 0 to 4 take slots 0, 1, 2, 0, 1."),
            Case((5, 3), "Steps 0 to 5 take slots 0, 1, 2, 0, 1, 2."),
            Case((7, 1), "With one slot, every step takes it."),
        ),
        (
            "The slots take turns. Which operator of Python counts in circles?",
            "The remainder: `step % num_slots`.",
        ),
        _whole, _explain_slot,
    ),
    "carry_ids": Exercise(
        slot.carry_ids, "For the carries {0}, {1} slots and {2} rows", "says",
        (
            Case(([(0, 0), (0, 1)], 2, 3), "Step 0 used slot 0, whose outputs come first."),
            Case(([(1, 0), (1, 1), None], 2, 3), "Step 1 used slot 1. Slot 0 has 3 outputs, so slot 1's begin at 3."),
            Case(([(3, 2), None, (3, 0)], 2, 3), "Step 3 used slot 1; rows 2 and 0 of it are outputs 5 and 3."),
            Case(([(5, 1), (4, 0)], 3, 4), "With three slots, step 5 used slot 2 and step 4 slot 1."),
        ),
        (
            "Which slot did the step use (`slot_of`), and how many outputs come before that slot's?",
            "`slot_of(step, num_slots) * batch + row` for each `(step, row)`, and -1 for None.",
        ),
        _listed, _explain_ids,
    ),
    "carry_over": Exercise(
        Runner.carry_over, "For carry {0}, outputs {1} and ids {2}", "gives",
        (
            Case(([0, 1, 2], [51, 52, 53, 0, 0, 7], [0, 0, 0]), "Each row's token is an output."),
            Case(([1, 2, -1], [51, 52, 53, 0, 0, 7], [0, 0, 9]), "Row 2 has its token from the host."),
            Case(([5, -1, 3], [0, 0, 0, 64, 65, 66], [0, 58, 0]), "Outputs 3 to 5 are those of slot 1."),
            Case(([4, -1], [11, 12, 13, -1, 14, 15], [2, 3]), "What the host wrote counts where nothing is carried."),
            Case(([3, -1], [11, 12, 13, -1, 14, 15], [2, 3]), "Output 3 is -1, which stands for no token."),
        ),
        (
            "For each row choose: `torch.where(condition, this, that)`. Which condition says that a token is carried?",
            "`torch.where(carry >= 0, outputs[carry], ids)`; an index of -1 is valid and not used. Clamp what is "
            "chosen: `outputs[carry].clamp(min=0)`.",
        ),
        _carried, _explain_carried, _carried_picture,
    ),
}
# fmt: on

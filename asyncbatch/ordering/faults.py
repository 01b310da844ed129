"""The faults: what can be taken away from the asynchronous loop, one thing at a time.

Each fault is one that an engine really had, or nearly had: their kinds are from the issue trackers of transformers,
SGLang, vLLM and TensorRT-LLM. `FAULTS` lists them all; `trials` puts each into a batcher and sees how it is found.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..base import BatcherBase, host_span
from ..sampling import uniforms
from .toy import program_of

PLACEHOLDER = 0  # what stands for a token that the host does not know yet


class Fault(NamedTuple):
    """One thing that is missing or wrong in a batcher.

    name: the fault in a few words. what: what was taken away. symptom: what comes of it. seen_in: the engines whose
    issue trackers have faults of this kind. apply: puts the fault into a batcher that has not yet run.
    """

    name: str
    what: str
    symptom: str
    seen_in: str
    apply: Callable[[BatcherBase], None]

    def explain(self) -> str:
        """The fault in two sentences."""
        return f"Taken away: {self.what}. So {self.symptom}; engines with faults of this kind: {self.seen_in}."


# ---- how a fault is put in -------------------------------------------------------------------------------------------


def _put(owner: Any, name: str, damaged: Callable) -> None:
    """Replace the method `name` of one object by a damaged one."""
    setattr(owner, name, damaged)


def replace_part(batcher: BatcherBase, name: str, function: Callable) -> None:
    """Replace one of the five parts of a step (plan, fill, launch, wait, commit) by `function(self, ...)`."""
    function.__name__ = name
    setattr(batcher, name, types.MethodType(host_span(function), batcher))


def launching(edit: Callable[[dict[str, Callable], object, BatcherBase], Sequence[str] | None]):
    """A fault in `launch`, which is eight calls. `edit(calls, slot, batcher)` is given them by name, in order. It
    changes some of them, or returns the names in another order."""

    def apply(batcher: BatcherBase) -> None:
        def launch(self, slot) -> None:
            h2d, compute, d2h = self.device.streams
            calls = {
                "copy in": lambda: h2d.launch("copy_in", slot.index),
                "record inputs_ready": lambda: h2d.record_event(slot.inputs_ready),
                "wait inputs_ready": lambda: compute.wait_event(slot.inputs_ready),
                "step": lambda: compute.launch(slot.command, slot.index),
                "record step_done": lambda: compute.record_event(slot.step_done),
                "wait step_done": lambda: d2h.wait_event(slot.step_done),
                "copy out": lambda: d2h.launch("copy_out", slot.index),
                "record outputs_ready": lambda: d2h.record_event(slot.outputs_ready),
            }
            for name in edit(calls, slot, self) or list(calls):
                calls[name]()

        replace_part(batcher, "launch", launch)

    return apply


def without(call: str):
    """A launch in which one of the eight calls is missing."""
    return launching(lambda calls, *_: [name for name in calls if name != call])


def earlier(call: str, than: str):
    """A launch in which `call` comes just before the call `than`."""

    def edit(calls, *_):
        names = [name for name in calls if name != call]
        names.insert(names.index(than), call)
        return names

    return launching(edit)


def recorded_on(event: str, lane: int):
    """A launch that records the slot's event on another stream: 0 is H2D, 1 compute, 2 D2H."""

    def edit(calls, slot, batcher):
        calls[f"record {event}"] = lambda: batcher.device.streams[lane].record_event(getattr(slot, event))

    return launching(edit)


def filling(change: Callable):
    """A fault in what `fill` writes: after it, `change(slot, plan, batcher)` damages the slot's inputs."""

    def apply(batcher: BatcherBase) -> None:
        def fill(self, plan):
            slot = type(self).fill.__wrapped__(self, plan)
            change(slot, plan, self)
            return slot

        replace_part(batcher, "fill", fill)

    return apply


# ---- a wait that is missing, or for the wrong event ------------------------------------------------------------------


def no_wait(batcher: BatcherBase) -> None:
    replace_part(batcher, "wait", lambda self, slot: None)


def wait_for_the_other_slot(batcher: BatcherBase) -> None:
    def wait(self, slot) -> None:
        self.slots[(slot.index + 1) % len(self.slots)].inputs_ready.synchronize()

    replace_part(batcher, "wait", wait)


def no_wait_without_samples(batcher: BatcherBase) -> None:
    def wait(self, slot) -> None:
        if any(row.samples for row in slot.plan.rows):
            slot.outputs_ready.synchronize()

    replace_part(batcher, "wait", wait)


# ---- buffers and carry-over ------------------------------------------------------------------------------------------


def one_host_buffer(batcher: BatcherBase) -> None:
    first = batcher.slots[0]
    for slot in batcher.slots[1:]:
        slot.inputs, slot.fields = first.inputs, first.fields
        program_of(batcher).host[slot.index] = (program_of(batcher).host[0][0], program_of(batcher).host[slot.index][1])


def one_device_buffer(batcher: BatcherBase) -> None:
    program = program_of(batcher)
    program.inputs = [program.inputs[0]] * len(program.inputs)


def no_carry(slot, plan, batcher) -> None:
    slot.fields["carry"][:] = -1


def carry_from_the_wrong_slot(slot, plan, batcher) -> None:
    carry, batch = slot.fields["carry"], batcher.shape.max_batch_size
    carried = carry >= 0
    carry[carried] = (carry[carried] + batch) % (batch * len(batcher.slots))


def carry_from_the_row_it_has_now(slot, plan, batcher) -> None:
    carry, batch = slot.fields["carry"], batcher.shape.max_batch_size
    rows = np.arange(batch)
    carried = carry >= 0
    carry[carried] = carry[carried] // batch * batch + rows[carried]


def numbers_a_step_behind(slot, plan, batcher) -> None:
    rows = [row for row in plan.rows if row.state.request.sampling.temperature > 0]
    if rows:
        seeds = np.array([row.state.request.sampling.seed for row in plan.rows], np.uint64)
        slot.fields["uniform"][: len(plan.rows)] = uniforms(seeds, np.array([r.state.num_known for r in plan.rows]))


# ---- the books: tokens, blocks, finished requests --------------------------------------------------------------------


def placeholder_left(batcher: BatcherBase) -> None:
    """A token that the host does not know yet is noted as a placeholder. One of them is never replaced."""
    commit = batcher.scheduler.commit

    def damaged(plan, token_ids):
        result = commit(plan, token_ids)
        for state, _ in result.new:
            if len(state.generated) == 2:
                state.generated[-1] = PLACEHOLDER
        return result

    _put(batcher.scheduler, "commit", damaged)


def pruned_before_the_fill(batcher: BatcherBase) -> None:
    def change(slot, plan, batcher) -> None:
        for index, row in enumerate(plan.rows):
            if row.state.fully_launched:
                slot.fields["tables"][index] = 0

    filling(change)(batcher)


def given_back_too_early(batcher: BatcherBase) -> None:
    """A request's first block goes back as soon as it is planned, though every later step reads it."""
    plan = batcher.scheduler.plan
    kv = batcher.kv

    def damaged():
        step = plan()
        for row in step.rows if step else ():
            for block in kv.table(row.state.number)[:1]:
                if block not in kv.free:
                    kv.free.append(block)
        return step

    _put(batcher.scheduler, "plan", damaged)


def freed_twice(batcher: BatcherBase) -> None:
    prune = batcher.kv.prune

    def damaged(owner: int) -> int:
        blocks = batcher.kv.table(owner)
        count = prune(owner)
        batcher.kv.free.extend(blocks)
        return count

    _put(batcher.kv, "prune", damaged)


def stop_not_discarded(batcher: BatcherBase) -> None:
    """A step in flight computes one token too many for a request that has stopped. It is appended all the same."""
    commit = batcher.scheduler.commit

    def damaged(plan, token_ids):
        reasons = [row.state.finish_reason for row in plan.rows]
        result = commit(plan, token_ids)
        for row, reason, token in zip(plan.rows, reasons, token_ids, strict=False):
            if reason and row.samples:
                row.state.generated.append(token)
        return result

    _put(batcher.scheduler, "commit", damaged)


def stop_seen_a_step_early(batcher: BatcherBase) -> None:
    """The host reads the output buffer of the other slot, which holds the results of another step."""
    commit = batcher.scheduler.commit

    def damaged(plan, token_ids):
        return commit(plan, batcher.slots[(plan.step + 1) % len(batcher.slots)].output_ids.tolist())

    _put(batcher.scheduler, "commit", damaged)


FAULTS = (
    Fault("a step does not wait for its inputs", "compute.wait_event(inputs_ready)",
          "the step may compute the slot's last batch again", "SGLang, vLLM", without("wait inputs_ready")),
    Fault("the copy out does not wait for the step", "d2h.wait_event(step_done)",
          "the host gets the slot's results of two steps ago", "vLLM, TensorRT-LLM", without("wait step_done")),
    Fault("the host does not wait for the output", "outputs_ready.synchronize()",
          "tokens are read before they have landed", "vLLM, transformers", no_wait),
    Fault("the host waits for another event", "the right event in wait",
          "tokens are read before they have landed", "SGLang", wait_for_the_other_slot),
    Fault("nobody waits for a step without output", "the wait after a piece of a prompt",
          "its slot is filled again while it is still in use", "vLLM", no_wait_without_samples),
    Fault("inputs_ready recorded on the compute stream", "the event's right stream",
          "the step waits for itself, and not for its inputs", "SGLang", recorded_on("inputs_ready", 1)),
    Fault("step_done recorded on the H2D stream", "the event's right stream",
          "the copy out waits for the copy in only", "SGLang", recorded_on("step_done", 0)),
    Fault("outputs_ready recorded on the compute stream", "the event's right stream",
          "the host reads while the copy out is still running", "TensorRT-LLM", recorded_on("outputs_ready", 1)),
    Fault("inputs_ready recorded before the copy in", "the order of launch and record",
          "the step may compute the slot's last batch again", "vLLM", earlier("record inputs_ready", "copy in")),
    Fault("step_done recorded before the step", "the order of launch and record",
          "the host gets the slot's results of two steps ago", "vLLM", earlier("record step_done", "step")),
    Fault("outputs_ready recorded before the copy out", "the order of launch and record",
          "tokens are read before they have landed", "transformers", earlier("record outputs_ready", "copy out")),
    Fault("one host buffer for all slots", "the second slot's pinned inputs",
          "inputs are overwritten before their copy has run", "vLLM, SGLang", one_host_buffer),
    Fault("one device buffer for all slots", "the second slot's device inputs",
          "inputs are overwritten while a step still reads them", "TensorRT-LLM", one_device_buffer),
    Fault("no carry-over", "the carry-over",
          "a placeholder is computed on instead of the last token", "vLLM", filling(no_carry)),
    Fault("the carry-over looks into the wrong slot", "the slot in the carry-over's index",
          "a request goes on with an older token", "transformers", filling(carry_from_the_wrong_slot)),
    Fault("the carry-over forgets that rows move", "the row in the carry-over's index",
          "a request goes on with another request's token", "SGLang", filling(carry_from_the_row_it_has_now)),
    Fault("a placeholder is left behind", "the last replacement of a placeholder",
          "an invented token stays in the answer", "vLLM, SGLang", placeholder_left),
    Fault("random numbers a step behind", "the position in the random number's seed",
          "sampled tokens depend on how many steps are in flight", "vLLM", filling(numbers_a_step_behind)),
    Fault("the last step finds its blocks pruned", "the order of prune and last write",
          "the last token is computed without its context", "vLLM", pruned_before_the_fill),
    Fault("a block is handed on while it is in use", "the owner's exclusive right to a block",
          "two requests write into one block", "vLLM, SGLang", given_back_too_early),
    Fault("blocks are freed twice", "the check that a request has ended already",
          "two requests get the same blocks", "vLLM", freed_twice),
    Fault("a token after the stop is kept", "the discarding of a wasted token",
          "answers are a token too long", "SGLang, mini-sglang", stop_not_discarded),
    Fault("results are taken from the other slot", "the slot in commit",
          "every request gets tokens of another step", "transformers", stop_seen_a_step_early),
)  # fmt: skip

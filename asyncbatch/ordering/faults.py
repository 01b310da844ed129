"""Faults on purpose: take one thing away from the asynchronous loop, and see how that shows.

    python -m asyncbatch.faults              # the table: each fault, and how it is found
    python -m asyncbatch.faults --explain    # and in two sentences what happens

Each fault is one that an engine really had, or nearly (the classes are from the trackers of transformers, SGLang, vLLM
and TensorRT-LLM). It is put into a batcher on the virtual clock, where times are chosen and every run is the same, and
must be found in one of three ways: the race checker proves that an order is missing, whatever the times; or the tokens
are wrong; or the books of the KV cache are. A toy model takes the real one's place: its next token is a checksum of the
whole context, read through the block table, so that no damage is without effect.
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..base import BatcherBase, host_span
from ..batcher import AsyncBatcher
from ..devices.virtual import Costs
from ..request import Request, SamplingParams
from ..runner import Runner
from ..sampling import uniforms
from ..scheduler import StepKind
from .races import RaceError

VOCABULARY = 251
PLACEHOLDER = 0

# ---- the toy model ---------------------------------------------------------------------------------------------------


def next_token(context: Sequence[int], uniform: float | None) -> int:
    """A checksum of the context, order and length included; `uniform` (0 to 1) moves it where a token is sampled."""
    total = 0
    for token in context:
        total = (total * 31 + int(token) + 1) % 1_000_003
    return (total + (0 if uniform is None else int(uniform * VOCABULARY))) % VOCABULARY


def toy_tokens(request: Request) -> list[int]:
    """What the toy model answers to a request, without any batcher."""
    context = list(request.token_ids)
    params = request.sampling
    for _ in range(request.max_new_tokens):
        number = None
        if params.temperature > 0:
            number = float(uniforms(np.array([params.seed], np.uint64), np.array([len(context)]))[0])
        context.append(next_token(context, number))
        if context[-1] in (request.stop_token_ids or ()):
            break
    return context[len(request.token_ids) :]


class ToyRunner(Runner):
    """A runner whose model is `next_token`. Its KV cache holds the tokens themselves: [num_blocks + 1, block_size]."""

    def __init__(self, shape, host):
        self.shape, self.host = shape, host
        self.inputs = [torch.zeros(shape.num_inputs, dtype=torch.int32) for _ in host]
        self.outputs = torch.zeros(shape.num_slots, shape.max_batch_size, dtype=torch.int32)
        self.cache = np.zeros((shape.num_blocks + 1, shape.block_size), np.int64)

    def _step(self, slot: int, kind: StepKind) -> None:
        rows = kind.rows
        fields = {name: part.numpy() for name, part in self.shape.fields(self.inputs[slot], rows).items()}
        carried = self._input_ids(self.shape.fields(self.inputs[slot], rows)).numpy()
        answers = np.zeros(rows, np.int32)
        for row in range(rows):
            start, count = int(fields["position"][row]), int(fields["prefill_count"][row])
            first = int(fields["prefill_start"][row])
            tokens = [carried[row]] if fields["decodes"][row] else fields["prefill_id"][first : first + count]
            if not len(tokens):
                continue
            places = np.arange(start + len(tokens))
            blocks = fields["tables"][row][places // self.shape.block_size]
            self.cache[blocks[start:], places[start:] % self.shape.block_size] = tokens
            context = self.cache[blocks, places % self.shape.block_size]
            answers[row] = next_token(context, fields["uniform"][row] if fields["temperature"][row] > 0 else None)
        self.outputs[slot, :rows] = torch.from_numpy(answers)


def carrier() -> LlamaForCausalLM:
    """A batcher wants a model: the smallest there is. It computes nothing here."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=256, eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def program_of(batcher: BatcherBase) -> Any:
    """The program on a batcher's virtual device."""
    device: Any = batcher.device
    return device.program


def use_toy_model(batcher: BatcherBase) -> None:
    """Have a batcher on the virtual clock serve the toy model, whatever model it was made for."""
    device: Any = getattr(batcher.device, "device", batcher.device)  # within a CheckedDevice
    device.program = ToyRunner(batcher.shape, device.program.host)


# ---- the faults ------------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """`name` as a learner would meet it; `what` is taken away; `symptom`: what comes of it; `seen_in`: which engines'
    trackers tell of its kind; `apply` puts it into a batcher."""

    name: str
    what: str
    symptom: str
    seen_in: str
    apply: Callable[[BatcherBase], None]


def _put(owner: Any, name: str, damaged: Callable) -> None:
    """Put a damaged function in the place of a method of one object."""
    setattr(owner, name, damaged)


def _replace(batcher: BatcherBase, name: str, function: Callable) -> None:
    """Put `function(self, slot)` in the place of one of the five parts of a step."""
    function.__name__ = name
    setattr(batcher, name, types.MethodType(host_span(function), batcher))


def launching(edit: Callable[[dict[str, Callable], object, BatcherBase], Sequence[str] | None]):
    """A fault in `launch`: its eight calls by name, in order; `edit` changes them or returns another order."""

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

        _replace(batcher, "launch", launch)

    return apply


def without(call: str):
    return launching(lambda calls, *_: [name for name in calls if name != call])


def earlier(call: str, than: str):
    """Do `call` just before `than`."""

    def edit(calls, *_):
        names = [name for name in calls if name != call]
        names.insert(names.index(than), call)
        return names

    return launching(edit)


def recorded_on(event: str, lane: int):
    def edit(calls, slot, batcher):
        calls[f"record {event}"] = lambda: batcher.device.streams[lane].record_event(getattr(slot, event))

    return launching(edit)


def filling(change: Callable):
    """A fault in what `fill` writes: `change(slot, plan, batcher)` after it."""

    def apply(batcher: BatcherBase) -> None:
        def fill(self, plan):
            slot = type(self).fill.__wrapped__(self, plan)
            change(slot, plan, self)
            return slot

        _replace(batcher, "fill", fill)

    return apply


def no_wait(batcher: BatcherBase) -> None:
    _replace(batcher, "wait", lambda self, slot: None)


def wait_for_the_other_slot(batcher: BatcherBase) -> None:
    def wait(self, slot) -> None:
        self.slots[(slot.index + 1) % len(self.slots)].inputs_ready.synchronize()

    _replace(batcher, "wait", wait)


def no_wait_without_samples(batcher: BatcherBase) -> None:
    def wait(self, slot) -> None:
        if any(row.samples for row in slot.plan.rows):
            slot.outputs_ready.synchronize()

    _replace(batcher, "wait", wait)


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


def placeholder_left(batcher: BatcherBase) -> None:
    """What the host does not know yet when it plans is noted as a placeholder, and one of them is not replaced."""
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
    """A request's blocks go back once its prompt is computed, as if nothing would read them any more."""
    plan = batcher.scheduler.plan
    kv = batcher.kv

    def damaged():
        made = plan()
        for row in made.rows if made else ():
            for block in kv.table(row.state.number)[:1]:
                if block not in kv.free:
                    kv.free.append(block)
        return made

    _put(batcher.scheduler, "plan", damaged)


def freed_twice(batcher: BatcherBase) -> None:
    prune = batcher.kv.prune

    def damaged(owner: int) -> int:
        blocks = batcher.kv.table(owner)
        given = prune(owner)
        batcher.kv.free.extend(blocks)
        return given

    _put(batcher.kv, "prune", damaged)


def stop_not_discarded(batcher: BatcherBase) -> None:
    """The token that a step computed for a request that had already stopped is appended all the same."""
    commit = batcher.scheduler.commit

    def damaged(plan, token_ids):
        ended = [row.state.finish_reason for row in plan.rows]
        result = commit(plan, token_ids)
        for row, reason, token in zip(plan.rows, ended, token_ids, strict=False):
            if reason and row.samples:
                row.state.generated.append(token)
        return result

    _put(batcher.scheduler, "commit", damaged)


def stop_seen_a_step_early(batcher: BatcherBase) -> None:
    """The host takes what lies in the output buffer of the other slot: the results of another step."""
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


# ---- finding them ----------------------------------------------------------------------------------------------------


def workload(seed: int) -> list[Request]:
    """Requests of different lengths, more than the batch holds, some that sample, some that stop early."""
    generator = np.random.default_rng(seed)
    requests = []
    for number in range(int(generator.integers(9, 14))):
        # The first prompts are cut into pieces, and while nobody else runs their steps have no output at all.
        length = int(generator.integers(33, 40) if number < 2 else generator.integers(1, 30))
        prompt = generator.integers(1, VOCABULARY, length).tolist()
        sampling = SamplingParams(temperature=1.0, seed=number) if number % 3 == 1 else SamplingParams()
        plain = Request(prompt, int(generator.integers(6, 14)), sampling, stop_token_ids=())
        stop = toy_tokens(plain)[int(generator.integers(2, 5))]
        requests.append(Request(prompt, plain.max_new_tokens, sampling, stop_token_ids=(stop,) if number % 2 else ()))
    return requests


def costs_for(seed: int) -> Costs:
    """Times with which every missing order shows: copies take long, and the device is slower than the host."""
    generator = np.random.default_rng(seed)
    scale = lambda low, high: float(generator.uniform(low, high)) * 1e-3  # noqa: E731
    return Costs(
        plan=scale(0.05, 0.2), fill=scale(0.05, 0.2), launch=scale(0.01, 0.1), commit=scale(0.05, 0.2),
        copy_in=scale(0.5, 1.0), step=scale(2.0, 4.0), copy_out=scale(0.5, 1.0),
    )  # fmt: skip


class Finding(NamedTuple):
    """How one run ended: "checker", "tokens", "books", "error", or "" where all was well; and what was seen."""

    by: str
    detail: str


def trial(fault: Fault | None, seed: int, check_races: bool = True, slots: int = 2, model=None) -> Finding:
    """Run the asynchronous batcher with a fault, or without one, and see whether and how it is found."""
    requests = workload(seed)
    batcher = AsyncBatcher(
        carrier() if model is None else model, clock=costs_for(seed), step_s=0.0, check_races=check_races,
        max_batch_size=4, num_slots=slots, block_size=4, num_blocks=30, max_length=64, prefill_tokens=16,
    )  # fmt: skip
    with batcher:
        use_toy_model(batcher)
        if fault is not None:
            fault.apply(batcher)
        try:
            completions = batcher.run(requests)
        except RaceError as race:
            return Finding("checker", str(race))
        except (AssertionError, RuntimeError, ValueError, IndexError, KeyError) as error:
            return Finding("error", f"{type(error).__name__}: {error}")
        for number, (request, completion) in enumerate(zip(requests, completions, strict=True)):
            expected = toy_tokens(request)
            if completion.error is not None:
                return Finding("error", str(completion.error))
            if completion.token_ids != expected:
                return Finding("tokens", f"request {number}: {completion.token_ids}, expected {expected}")
        free = batcher.kv.num_free
        if free != batcher.kv.num_blocks or len(set(batcher.kv.free)) != free:
            return Finding("books", f"{free} of {batcher.kv.num_blocks} blocks are free at the end")
    return Finding("", "all tokens are right")


def explain(fault: Fault) -> str:
    """What happened, in two sentences."""
    return f"Taken away: {fault.what}. So {fault.symptom}; engines with faults of this kind: {fault.seen_in}."


def table(seeds: int) -> tuple[str, bool]:
    """The table as Markdown, and whether every fault was found with every seed."""
    lines, complete, model = [], True, carrier()
    lines.append("| fault | what comes of it | checker | tokens, books | kind seen in |")
    lines.append("| --- | --- | --- | --- | --- |")
    for fault in FAULTS:
        proved = [trial(fault, seed, model=model).by for seed in range(seeds)]
        shown = [trial(fault, seed, check_races=False, model=model).by for seed in range(seeds)]
        complete &= all(a or b for a, b in zip(proved, shown, strict=True))
        by_checker, by_tokens = proved.count("checker"), sum(map(bool, shown))
        cells = (fault.name, fault.symptom, f"{by_checker} of {seeds}", f"{by_tokens} of {seeds}", fault.seen_in)
        lines.append("| " + " | ".join(cells) + " |")
    clean = [trial(None, seed, model=model).by for seed in range(seeds)]
    lines.append(f"| (no fault) | | {clean.count('checker')} of {seeds} | {sum(map(bool, clean))} of {seeds} | |")
    return "\n".join(lines), complete and not any(clean)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="asyncbatch.faults", description="Put faults into the asynchronous loop.")
    parser.add_argument("--seeds", type=int, default=10, help="runs of each fault (default 10)")
    parser.add_argument("--explain", action="store_true", help="say of each what happens")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: allowed are whole numbers from 1")
    text, complete = table(options.seeds)
    print(text)
    if options.explain:
        for fault in FAULTS:
            print(f"\n{fault.name}\n  {explain(fault)}\n  For example: {trial(fault, 0).detail}")
    print("\nEvery fault was found in every run." if complete else "\nNOT every fault was found in every run.")
    return 0 if complete else 1

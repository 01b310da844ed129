"""A timed device: its steps take a said time, such as a recorded GPU's, and compute nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from ..runner import Runner
from ..scheduler import StepKind
from ..slot import StepShape


@dataclass(frozen=True, eq=False)
class StepTimes:
    """How long a step of a recorded GPU takes at one batch size: `step_times(kind, context)` gives seconds.

    A batcher takes it as `step_s`; it travels to the device process. label: the recording's name. contexts, seconds:
    float64, the curve of a decode step; context counts the tokens of all rows together. A smaller context than the
    first takes as long as the first; a larger one than `max_context` is a ValueError. prefill_s: any other step.
    """

    label: str
    contexts: np.ndarray
    seconds: np.ndarray
    prefill_s: float
    max_context: int

    def __call__(self, kind: str, context: int) -> float:
        if context > self.max_context:
            raise ValueError(
                f"the step has a context of {context} tokens over all its rows: {self.label} was recorded up to "
                f"{self.max_context}"
            )
        return float(np.interp(context, self.contexts, self.seconds)) if kind == "decode" else self.prefill_s


class TimedRunner(Runner):
    """A device whose steps take a given time and compute nothing, to see how the host does beside a faster device.

    step_s: seconds of every step, or `StepTimes`: the times of a recorded GPU by context.
    The tokens are no language: each follows from the one before it and its place, so a lost carry-over still shows.
    """

    def __init__(self, model, *, shape: StepShape, host, step_s: float | StepTimes):
        self.shape, self.host, self.step_s, self.device = shape, host, step_s, torch.device("cpu")
        self.inputs = [torch.zeros(shape.num_inputs, dtype=torch.int32) for _ in host]
        self.outputs = torch.zeros(shape.num_slots, shape.max_batch_size, dtype=torch.int32)
        self.vocab_size = model.config.get_text_config().vocab_size

    def _step(self, slot: int, kind: StepKind) -> None:
        start = time.perf_counter()
        fields = self.shape.fields(self.inputs[slot], kind)
        previous = self._input_ids(fields)
        if kind.passes != "decode":
            last = fields["prefill_id"][(fields["prefill_start"] + fields["prefill_count"] - 1).clamp(min=0)]
            previous = torch.where(fields["decodes"].bool(), previous, last)
        end = fields["position"] + fields["prefill_count"] + fields["decodes"]  # 0 for padding
        self.outputs[slot, : kind.rows] = (previous * 31 + end * 7 + 1) % self.vocab_size
        step_s = self.step_s
        if callable(step_s):
            step_s = step_s("decode" if kind.passes == "decode" else "prefill", int(end.sum()))
        wait_until(start + step_s)


def wait_until(deadline: float) -> None:
    """Return at `deadline` (seconds of `time.perf_counter`), more precisely than a sleep, which oversleeps by 0.1 ms
    and more: the last 0.3 ms are spun, giving other threads the interpreter lock each time round."""
    left = deadline - time.perf_counter()
    if left > 3e-4:
        time.sleep(left - 3e-4)
    while time.perf_counter() < deadline:
        time.sleep(0)

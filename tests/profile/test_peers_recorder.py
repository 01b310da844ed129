"""How the steps of transformers' batching are timed: what only happens asynchronously, on CUDA, acted out by hand."""

from __future__ import annotations

import types

import numpy as np
import torch
import transformers

from asyncbatch.profile.peers.recorder import StepRecorder
from asyncbatch.timeline import Timeline


class Scripted:
    """The parts of transformers that the recorder wraps, in one object, doing what the test says."""

    def __init__(self):
        self.model_runner = self.inputs_and_outputs = self
        self.rows = []
        self.has_batch = True

    def prepare_next_batch(self):
        return self.has_batch

    def _generation_step(self, model):
        self.compute_batch(model, {})
        self.retrieve_device_outputs()

    def compute_batch(self, model, data):
        pass

    def retrieve_device_outputs(self):
        pass

    def prepare_batch_update(self):
        return self.rows, [], None

    def update_batch(self):
        self.prepare_batch_update()


def row(generated: int, *, finished: bool = False, query: int = 1, new: bool = True):
    status = transformers.generation.continuous_batching.RequestStatus
    state = types.SimpleNamespace(
        request_id="0",
        initial_tokens=[0] * 10,
        generated_tokens=[0] * generated,
        status=status.FINISHED if finished else status.DECODING,
    )
    return types.SimpleNamespace(state=state, has_new_token=new, query_length=query)


def test_steps_are_read_one_late_and_tokens_after_the_end_are_wasted():
    script, timeline = Scripted(), Timeline()
    recorder = StepRecorder(timeline, script, torch.device("cpu"), "async", [])
    recorder.ready.set()
    script_of_rows = [
        [row(0, query=6, new=False)],
        [row(0, query=4)],
        [row(1), row(1)],
        [row(2, finished=True), row(2)],
    ]
    with recorder.hooks():
        for number in range(5):
            if number < 4:
                assert script.prepare_next_batch()
                script._generation_step(None)
            if number:
                recorder.all_answered = number == 4
                script.rows = script_of_rows[number - 1]
                script.update_batch()
        script.has_batch = False
        assert not script.prepare_next_batch()
    assert [tuple(step) for step in timeline.steps] == [
        (0, "prefill", 0, 0, 1, 6),
        (1, "prefill", 1, 0, 1, 10),
        (2, "decode", 2, 0, 2, 22),
        (3, "decode", 1, 1, 2, 24),
    ]
    names = [(span.name, span.step) for span in timeline.spans if span.lane == "host" and span.name != "launch"]
    assert names == [
        *[("plan", 0), ("plan", 1), ("wait", 0), ("commit", 0), ("plan", 2), ("wait", 1), ("commit", 1)],
        *[("plan", 3), ("wait", 2), ("commit", 2)],  # the last one is read when the run is over
    ]


class FakeEvent:
    def __init__(self, ms: float):
        self.ms = ms

    def elapsed_time(self, other) -> float:
        return float(np.float32(other.ms - self.ms))  # all that CUDA gives


def test_event_times_stay_exact_over_a_long_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    recorder = StepRecorder(Timeline(), None, torch.device("cpu"), "async", [])
    recorder.on_cuda, recorder._origin_event, recorder._origin = True, FakeEvent(0.0), 1000.0
    starts = 3.0007 + np.arange(20_000) * 14.0013
    recorder.events = [(FakeEvent(ms), FakeEvent(ms + 14.0003)) for ms in starts] + [(FakeEvent(-1), FakeEvent(-2))]
    recorder._launched = len(starts)
    recorder.finish()
    _, steps, begins, ends = recorder.timeline.lane("compute")
    assert steps.tolist() == list(range(len(starts)))
    np.testing.assert_allclose(begins, 1000 + 1e-3 * starts, rtol=0, atol=5e-5)
    np.testing.assert_allclose((begins[1:] - ends[:-1]), 1e-6, rtol=0, atol=2e-7)

"""How the steps of transformers' continuous batching are timed, without a change to its loop."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch

from ...timeline import Timeline
from .parts import part, wrap


class StepRecorder:
    """Notes what happens in one run, through wrappers around the methods of transformers' objects.

    The loop of transformers runs in a thread of its own. For each batch it calls, in this order:
    prepare_next_batch                               "plan"
    _generation_step: inputs to the device,
        compute_batch (carry-over, model, sampling)  "launch" on the host, "step" on the compute lane
        retrieve_device_outputs                      sync: "wait"; async: only launches a copy, part of "launch"
    update_batch: prepare_batch_update               "wait" (async: for the batch before)
        and the rest of it                           "commit"

    The loop does not plan before `ready` is set. Set `all_answered` when every request has its answer: what comes
    after that is no part of the run. `first_token_s`: by request id, when its first token was there.

    timeline: where the spans and steps go. processor: transformers' batch processor. mode: "sync" or "async".
    events: pairs of CUDA events around each step, used again from run to run; more are added as needed.
    """

    def __init__(self, timeline: Timeline, processor, device: torch.device, mode: str, events: list):
        self.timeline, self.processor, self.device, self.mode, self.events = timeline, processor, device, mode, events
        self.on_cuda = device.type == "cuda"
        self.ready = threading.Event()
        self.all_answered = False
        self.first_token_s: dict[str, float] = {}
        self._launched = 0
        self._in_flight: deque[int] = deque()
        self._prefilled: dict[str, int] = {}
        self._launch_start = self._read_at = 0.0
        self._committing = 0  # the step whose results were read last
        self._within_run = True
        if self.on_cuda:
            # One moment on both clocks: event times are relative to each other, and this ties them to the host's clock.
            torch.cuda.synchronize(device)
            self._origin_event = torch.cuda.Event(enable_timing=True)
            self._origin_event.record(torch.cuda.current_stream(device))
            self._origin_event.synchronize()
            self._origin = time.perf_counter()

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Within this context, the wrappers are in place. RuntimeError for a version that lacks one of the methods."""
        from transformers.generation.continuous_batching import RequestStatus

        self._finished = RequestStatus.FINISHED
        processor = self.processor
        runner = part(processor, "model_runner")
        inputs_and_outputs = part(processor, "inputs_and_outputs")
        if self.on_cuda:
            self._stream = part(inputs_and_outputs, "compute_stream")
        compute = self._compute_on_cuda if self.on_cuda else self._compute_on_cpu
        with contextlib.ExitStack() as stack:
            for owner, name, wrapper in (
                (processor, "prepare_next_batch", self._plan),
                (processor, "_generation_step", self._generation_step),
                (runner, "compute_batch", compute),
                (inputs_and_outputs, "retrieve_device_outputs", self._retrieve),
                (inputs_and_outputs, "prepare_batch_update", self._results),
                (processor, "update_batch", self._commit),
            ):
                stack.enter_context(wrap(owner, name, wrapper))
            yield

    def finish(self) -> None:
        """After the run: turn the CUDA events into spans."""
        if not self.on_cuda:
            return
        torch.cuda.synchronize(self.device)
        # CUDA gives the time of an event as a float32 of milliseconds since another event. After a minute that is exact
        # only to 4 microseconds, more than an asynchronous gap. So the event that times are counted from moves along.
        base, base_s = self._origin_event, self._origin
        for step, (start, end) in enumerate(self.events[: self._launched]):
            elapsed_s = 1e-3 * base.elapsed_time(start)
            start_s = base_s + elapsed_s
            self.timeline.add("compute", "step", step, start_s, start_s + 1e-3 * start.elapsed_time(end))
            if elapsed_s > 0.25:
                base, base_s = start, start_s

    def _plan(self, original: Callable) -> Callable:
        def prepare_next_batch() -> bool:
            self.ready.wait()
            start = time.perf_counter()
            has_batch = original()
            if has_batch:
                self.timeline.add("host", "plan", self._launched, start, time.perf_counter())
            return has_batch

        return prepare_next_batch

    def _generation_step(self, original: Callable) -> Callable:
        def generation_step(model) -> None:
            self._launch_start = time.perf_counter()
            original(model)
            self._in_flight.append(self._launched)
            self._launched += 1

        return generation_step

    def _compute_on_cuda(self, original: Callable) -> Callable:
        def compute_batch(*arguments) -> None:
            if self._launched == len(self.events):
                self.events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            start, end = self.events[self._launched]
            start.record(self._stream)
            original(*arguments)
            end.record(self._stream)

        return compute_batch

    def _compute_on_cpu(self, original: Callable) -> Callable:
        def compute_batch(*arguments) -> None:
            start = time.perf_counter()
            original(*arguments)
            self.timeline.add("host", "launch", self._launched, self._launch_start, start)
            self.timeline.add("compute", "step", self._launched, start, time.perf_counter())

        return compute_batch

    def _retrieve(self, original: Callable) -> Callable:
        def retrieve_device_outputs() -> None:
            start = time.perf_counter()
            original()
            if self.on_cuda:
                end = time.perf_counter()
                if self.mode == "async":
                    start = end
                else:
                    self.timeline.add("host", "wait", self._launched, start, end)
                self.timeline.add("host", "launch", self._launched, self._launch_start, start)

        return retrieve_device_outputs

    def _results(self, original: Callable) -> Callable:
        def prepare_batch_update():
            start = time.perf_counter()
            result = original()
            self._read_at = time.perf_counter()
            self._committing = self._in_flight.popleft()
            # Async reads the last batch, whose tokens nobody wants, only when its loop is told to stop. Before the loop
            # notices that, it may sleep for 0.1 s, which is no part of the run.
            self._within_run = not self.all_answered
            if self._within_run:
                self.timeline.add("host", "wait", self._committing, start, self._read_at)
            self._note_step(result[0])
            return result

        return prepare_batch_update

    def _commit(self, original: Callable) -> Callable:
        def update_batch() -> None:
            original()
            if self._within_run:
                self.timeline.add("host", "commit", self._committing, self._read_at, time.perf_counter())

        return update_batch

    def _note_step(self, rows) -> None:
        """Note what the step was for, from the state of its requests before its tokens are added to them."""
        kind, tokens, wasted, context = "decode", 0, 0, 0
        for row in rows:
            state = row.state
            generated = len(state.generated_tokens)
            if generated == 0:  # its first token is still to come: this was a part of its prompt
                kind = "prefill"
                done = self._prefilled.get(state.request_id, 0) + row.query_length
                self._prefilled[state.request_id] = done
                context += done
            else:
                context += len(state.initial_tokens) + generated
            if row.has_new_token and state.status == self._finished:
                wasted += 1
            elif row.has_new_token:
                tokens += 1
                if generated == 0:
                    self.first_token_s[state.request_id] = self._read_at
        self.timeline.add_step(self._committing, kind, tokens, wasted, len(rows), context)

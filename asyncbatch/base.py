"""What both batchers share: taking requests, answering them, and the five things a loop is made of.

`plan`, `fill`, `launch`, `wait` and `commit` each leave a span on the timeline's host lane. In which order, and on how
many slots at once, is the batcher's own `step` (see `batcher.py`). There is no thread behind it: whoever waits for a
result (`run`, `stream`, `Handle.result`) turns the loop, and serves everybody else's requests with it.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .devices import open_device
from .devices.cuda.device import CudaDevice, never_free
from .devices.timed import StepTimes, TimedRunner
from .devices.virtual import Costs, VirtualDevice
from .kv_cache import KVCache, blocks_for
from .models.checks import check_model
from .ordering.races import CheckedDevice
from .request import Completion, Request, RequestError, check_request, contains_stop_string, shown
from .runner import Runner
from .scheduler import BatchPlan, RunState, Scheduler
from .slot import Slot, StepShape, host_buffers
from .streams import Device, DeviceError, launch_step
from .timeline import LANES, Timeline


class Handle:
    """A submitted request. `token_ids` grows as steps are committed; `completion` is None until it has ended."""

    def __init__(self, batcher: BatcherBase, state: RunState):
        self._batcher, self._state = batcher, state
        self.submitted_s = batcher.device.now()
        self.first_token_s: float | None = None
        self.completion: Completion | None = None
        self._cancelled = False

    @property
    def token_ids(self) -> list[int]:
        return list(self._state.generated)

    def result(self) -> Completion:
        """Serve until this request has ended."""
        while self.completion is None:
            self._batcher._turn()
        return self.completion


def host_span(method):
    """Record the method's time on the host lane, under its name and the step of its plan or slot, and charge it to the
    clock. That makes a difference on the virtual clock only, where a launch is charged first: what it launches starts
    when the host has paid for it."""

    @functools.wraps(method)
    def timed(self, *args):
        device, name = self.device, method.__name__
        plan = getattr(args[0], "plan", args[0]) if args else None
        start = device.now()
        if name == "launch":
            device.charge(name, plan)
        result = method(self, *args)
        subject = args[0] if args else result
        if subject is not None:
            if name != "launch":
                device.charge(name, plan if args else result)
            self.timeline.add("host", name, subject.step, start, device.now())
        return result

    return timed


class BatcherBase:
    """Continuous batching for a causal language model of transformers.

    model: on a CPU (the device is then a worker process) or on CUDA. It is not changed.
    max_batch_size: the most requests in one step.
    tokenizer: only needed for stop strings.
    num_slots: how many steps can be under way at once.
    block_size, num_blocks: tokens in a block of the KV cache, and blocks in its pool (default: enough for a full batch
        of the longest requests; on CUDA, as many of them as fit beside the weights).
    max_length: the most tokens, prompt and output together, of one request (default: the model's limit, at most 2048).
    prefill_tokens: the most prompt tokens computed in one step, and where long prompts are cut (default: 64, on CUDA
        256).
    compile: on CUDA, compile the model for speed (`compile.py`). It takes some seconds. The weights keep their values
        and move: projections of the same input come to lie in one tensor.
    parts: on CUDA, have `record_points` tell a step's carry-over, model and sampling apart, by two more events in each
        graph. They cost 8 us a step (H200).
    batch_sizes: sizes of a step, up to max_batch_size; each step takes the smallest that holds its rows. Default: only
        max_batch_size, so that the tokens are the same bit for bit whoever shares the batch. With several sizes they
        are only the same up to rounding, for a gain that is small (README, "Batch sizes").
    host_work_s: burn this many seconds of Python in each step's plan. For lessons: it stands for a busier host.
    step_s: the device waits this long instead of computing, a number of seconds or the times of a recorded GPU
        (`Recording.step_times`). For lessons and benchmarks: the tokens are then no language.
    clock: None measures times as they are. `Costs(...)` (`virtual.py`) says them: the device is then on the virtual
        clock, in this process, every run has the same exact timeline, and host_work_s is counted and not burnt.
        With step_s too nothing is computed; the times are the clock's all the same.
    check_races: raise RaceError (`races.py`) where two accesses of one buffer or block have no order, though the tokens
        may be right. For lessons and tests: it costs the host time.

    Raises ModelError for a model that cannot be served, ValueError for limits that make no sense, MemoryError, with the
    numbers, for what does not fit into the GPU.
    """

    mode = ""
    default_slots = 1

    def __init__(
        self,
        model,
        *,
        max_batch_size: int = 8,
        tokenizer=None,
        num_slots: int | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
        max_length: int | None = None,
        prefill_tokens: int | None = None,
        compile: bool = False,
        parts: bool = False,
        batch_sizes: Sequence[int] = (),
        host_work_s: float = 0.0,
        step_s: float | StepTimes | None = None,
        clock: Costs | None = None,
        check_races: bool = False,
    ):
        check_model(model)
        config = model.config.get_text_config()
        on_cuda = next(model.parameters()).is_cuda
        num_slots = self.default_slots if num_slots is None else num_slots
        prefill_tokens = (256 if on_cuda else 64) if prefill_tokens is None else prefill_tokens
        model_length = getattr(config, "max_position_embeddings", None) or 2048
        max_length = min(model_length, 2048) if max_length is None else max_length
        for name, value in (
            ("max_batch_size", max_batch_size),
            ("num_slots", num_slots),
            ("block_size", block_size),
            ("num_blocks", 1 if num_blocks is None else num_blocks),
            ("max_length", max_length),
            ("prefill_tokens", prefill_tokens),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}: allowed are whole numbers from 1")
        if max_length > model_length:
            raise ValueError(f"max_length is {max_length}: the model allows at most {model_length} tokens")
        constant_s = 0.0 if step_s is None or isinstance(step_s, StepTimes) else step_s
        for name, seconds in (("host_work_s", host_work_s), ("step_s", constant_s)):
            if not 0 <= seconds < float("inf"):
                raise ValueError(f"{name} is {seconds!r}: allowed are seconds from 0")

        sizes = tuple(sorted(set(batch_sizes)))
        if any(not isinstance(size, int) or not 1 <= size <= max_batch_size for size in sizes):
            raise ValueError(f"batch_sizes is {batch_sizes!r}: allowed are whole numbers from 1 to {max_batch_size=}")
        if step_s is not None and on_cuda:
            raise ValueError("step_s stands for a device that is not there: it needs the model on the CPU, not on CUDA")
        if clock is not None and not isinstance(clock, Costs):
            raise ValueError(f"clock is {clock!r}: allowed are None and Costs(...), the virtual clock")
        if clock is not None and on_cuda:
            raise ValueError("clock=Costs(...) stands for a device that is not there: it needs the model on the CPU")
        if compile and not on_cuda:
            raise ValueError("compile=True needs the model on CUDA: load_model(..., device='cuda')")

        self.model, self.tokenizer, self.host_work_s, self.step_s = model, tokenizer, host_work_s, step_s
        self.clock, self.vocab_size = clock, config.vocab_size
        full = max_batch_size * blocks_for(max_length, block_size)
        shape = StepShape(max_batch_size, num_slots, block_size, num_blocks or full, max_length, prefill_tokens, sizes)
        buffers = host_buffers(shape, on_cuda=on_cuda)
        program: type[Runner] = Runner if step_s is None else TimedRunner
        arguments: dict[str, Any] = {} if step_s is None else {"step_s": step_s}
        if on_cuda:
            arguments = {"compile": compile, "asked_blocks": num_blocks is not None, "parts": parts}
        device: Device
        if clock is None:
            device = open_device(model, program, num_slots, shape=shape, host=buffers, **arguments)
        else:
            if step_s is not None:
                arguments = {"step_s": 0.0}  # the tokens of the timed device, at the virtual clock's times
            device = VirtualDevice(
                program(model, shape=shape, host=buffers, **arguments), num_slots, clock, host_work_s
            )
        self.checked = CheckedDevice(device) if check_races else None
        self.device: Device = device if self.checked is None else self.checked
        try:
            self.slots = [Slot(index, shape, pair, self.device) for index, pair in enumerate(buffers)]
        except DeviceError:
            self.device.close()
            raise
        if self.checked is not None:
            self.checked.name_events(self.slots)
        # On CUDA the number of blocks is what the runner found to fit.
        self.shape = device.program.shape if isinstance(device, CudaDevice) else shape
        self._new_books()
        self.timeline = self._new_timeline()

        self._numbers = itertools.count()
        self._handles: dict[int, Handle] = {}
        self._inbox: deque[tuple[str, RunState]] = deque()  # from any thread; emptied before each step
        self._lock = threading.RLock()  # held by whoever turns the loop
        self._door = threading.RLock()  # held, never for long, while a request is entered or its end is asked for
        self._closed = ""

    # ---- for callers -----------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Handle:
        """Queue a request, from any thread. RequestError if it cannot be served; then nothing has been queued."""
        self._check_open()
        most = self.kv.num_blocks * self.kv.block_size
        limited_by = f"max_length={self.shape.max_length}"
        if most < self.shape.max_length:
            limited_by = f"the pool: {self.kv.num_blocks} blocks of {self.kv.block_size} tokens"
        check_request(
            request,
            vocab_size=self.vocab_size,
            max_length=min(most, self.shape.max_length),
            limited_by=limited_by,
            tokenizer=self.tokenizer,
        )
        stop = self._model_stop_tokens() if request.stop_token_ids is None else request.stop_token_ids
        state = RunState(next(self._numbers), request, frozenset(int(token) for token in stop))
        with self._door:  # closed meanwhile by another thread: then it must not be entered any more
            self._check_open()
            handle = self._handles[state.number] = Handle(self, state)
            self._inbox.append(("add", state))
        return handle

    def cancel(self, handle: Handle) -> bool:
        """End a request early, from any thread; it keeps what it has generated. False if there is nothing left to
        cancel: it has ended, or was cancelled before. A result that is already being committed still counts, so that
        it may yet end as "stop" or "length". RequestError for what is no handle of this batcher."""
        if not isinstance(handle, Handle) or handle._batcher is not self:
            is_handle = isinstance(handle, Handle)
            given = "the handle of another batcher" if is_handle else f"{type(handle).__name__} {shown(handle)}"
            raise RequestError(f"cancel takes a handle that this batcher's submit gave, not {given}")
        with self._door:
            if handle.completion is not None or handle._cancelled:
                return False
            handle._cancelled = True
            self._inbox.append(("cancel", handle._state))
        return True

    def run(self, requests: Iterable[Request], progress: bool = False) -> list[Completion]:
        """Serve all requests and return their completions in the order given. One that cannot be served has
        finish_reason "error" and the reason in `error`; the others finish. On an idle batcher this starts a new
        `timeline`. Interrupted (Ctrl-C), everything under way ends as "cancelled" and the batcher is empty again. An
        exception in `requests` or in the progress bar ends this call's requests so, and no others. RequestError for
        what is no list of requests, and on a closed batcher."""
        self._check_open()
        if not isinstance(requests, Iterable) or isinstance(requests, (str, bytes, bytearray)):
            raise RequestError(f"run takes a list of Requests, not {type(requests).__name__} {shown(requests)}")
        with self._lock:
            self._drain()
            if not self._handles:
                self.timeline, self.scheduler.num_steps = self._new_timeline(), 0
        answers: list[Handle | Completion] = []
        try:
            for request in requests:
                try:
                    answers.append(self.submit(request))
                except RequestError as error:
                    now = self.device.now()
                    answers.append(Completion([], "error", error, submitted_s=now, finished_s=now))
            pending = [answer for answer in answers if isinstance(answer, Handle)]
            with _progress_bar(pending, self.timeline, progress) as update:
                for handle in pending:
                    while handle.completion is None:
                        self._turn()
                        update()
        except BaseException as error:
            self._give_up(answers, error)
            raise
        self._drain()
        return [answer.completion if isinstance(answer, Handle) else answer for answer in answers]  # type: ignore[misc]

    def turn(self) -> bool:
        """One turn of the loop for whoever has submitted requests; for callers that do other things between two turns.
        False if no request is under way: then nothing is, for steps still in flight for nobody are committed first.
        RequestError on a closed batcher."""
        self._check_open()
        if self._handles:
            self._turn()
            return True
        self._drain()
        return False

    def stream(self, request: Request) -> Iterator[int]:
        """Give the request's tokens as they are committed. Leaving the loop early cancels the request. An error in the
        request itself is raised here, an error while serving it after its last good token."""
        tokens = self._tokens_of(self.submit(request))
        next(tokens)  # it is begun: so even one that is dropped before its first token cancels its request
        return tokens

    def _tokens_of(self, handle: Handle) -> Iterator[int]:
        given = 0
        try:
            yield -1  # for `stream`, not for its caller
            while True:
                # Asked before the tokens are read: while the caller has the word, others may serve this request too.
                ended = handle.completion is not None
                new = handle._state.generated[given:]
                given += len(new)
                yield from new
                if ended:
                    break
                if not new:
                    self._turn()
        finally:
            if handle.completion is None:
                self.cancel(handle)
        if handle.completion is not None and handle.completion.error is not None:
            raise handle.completion.error

    def close(self) -> None:
        """Cancel what is under way and free the device's memory. A closed batcher takes no more requests."""
        with self._lock:
            if not self._closed:
                self._closed = "the batcher is closed"
                self._abort("cancelled", None)
                self.device.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- the five parts of a step ----------------------------------------------------------------------------

    def step(self) -> bool:
        """One turn of the loop: launch and commit at most one step each. False if there was nothing to do."""
        raise NotImplementedError

    @host_span
    def plan(self) -> BatchPlan | None:
        """Pick the rows of the next step; None if there are none."""
        plan = self.scheduler.plan()
        if plan is not None and self.host_work_s and self.clock is None:
            end = self.device.now() + self.host_work_s
            while self.device.now() < end:
                pass
        return plan

    @host_span
    def fill(self, plan: BatchPlan) -> Slot:
        """Write the step's inputs into the next slot's host buffers."""
        slot = self.slots[plan.step % len(self.slots)]
        if self.checked is not None:
            self.checked.before_fill(slot.index, plan, self.kv, len(self.slots))
        slot.fill(plan, self.kv)
        return slot

    @host_span
    def launch(self, slot: Slot) -> None:
        """Tell the three streams what to do, and in which order. The host waits for none of it."""
        launch_step(self.device.streams, slot)

    @host_span
    def wait(self, slot: Slot) -> None:
        """Until the slot's output ids have arrived. The only place where the host waits for the device."""
        slot.outputs_ready.synchronize()

    @host_span
    def commit(self, slot: Slot) -> None:
        """Take the results of the slot's step: append tokens, end requests, prune their blocks, free the slot."""
        plan, slot.plan = slot.plan, None
        assert plan is not None, f"slot {slot.index} holds no step"
        if self.checked is not None:
            self.checked.before_commit(slot.index, plan.step)
        failure = self.device.failure(slot.index)
        if failure:
            for row in plan.rows:
                self.scheduler.finish(row.state, "error", DeviceError(failure))
            new, wasted = [], 0
        else:
            new, wasted = self.scheduler.commit(plan, slot.output_ids.tolist())
            for lane, name, (start, end) in zip(
                LANES[1:], ("copy_in", "step", "copy_out"), self.device.spans(slot.index).tolist(), strict=True
            ):
                self.timeline.add(lane, name, plan.step, start, end)
        kind = "decode" if plan.passes == "decode" else "prefill"
        context = sum(row.position + row.num_tokens for row in plan.rows)
        self.timeline.add_step(plan.step, kind, len(new), wasted, len(plan.rows), context)
        now = self.device.now()
        for state, _ in new:
            handle = self._handles[state.number]
            handle.first_token_s = handle.first_token_s or now
        self._answer(now)

    # ---- behind them -----------------------------------------------------------------------------------------

    def _turn(self) -> None:
        with self._lock:
            self._check_open()
            try:
                self._take_inbox()
                # (Not `_handles`: another thread may just have entered a request, for the next turn.)
                if not self._step_or_close() and (self.scheduler.waiting or self.scheduler.running):
                    raise AssertionError("no request can go on, though some have not ended: a fault of the scheduler")
            except BaseException:
                self._abort("cancelled", None)
                raise

    def _step_or_close(self) -> bool:
        """`step`, but where the device is lost, every request ends with that error, and the batcher says so."""
        try:
            return self.step()
        except DeviceError as error:
            self._lose(error)
            self._abort("error", error)
            return True

    def _lose(self, error: DeviceError) -> None:
        if not self._closed:
            self._closed = f"the batcher lost its device: {error}"
            if self.device.clock == "cuda":
                never_free(self.slots)

    def _drain(self) -> None:
        """Commit steps that are still under way for nobody: all their tokens are wasted, and are counted."""
        with self._lock:
            try:
                while not self._handles and not self._closed and self._step_or_close():
                    pass
            except BaseException:
                self._abort("cancelled", None)
                raise

    def _take_inbox(self) -> None:
        while self._inbox:
            operation, state = self._inbox.popleft()
            if operation == "add":
                self.scheduler.add(state)
            else:
                self.scheduler.finish(state, "cancelled")
        self._answer(self.device.now())

    def _answer(self, now: float) -> None:
        for state in self.scheduler.finished:
            self._complete(self._handles[state.number], now)
        self.scheduler.finished.clear()

    def _complete(self, handle: Handle, now: float) -> None:
        state = handle._state
        # In this order: an interrupt between the two lines must not lose the answer. (`_abort` sees to the rest.)
        handle.completion = Completion(
            state.generated, str(state.finish_reason), state.error, handle.submitted_s, handle.first_token_s, now
        )
        del self._handles[state.number]

    def _give_up(self, answers: list[Handle | Completion], error: BaseException) -> None:
        """Leave `run` with an exception: end its own requests, and after an interrupt all of them."""
        with self._lock:
            if self._closed:
                return
            if not isinstance(error, Exception):
                self._abort("cancelled", None)
                return
            for answer in answers:
                if isinstance(answer, Handle):
                    self.cancel(answer)
            self._take_inbox()

    def _abort(self, reason: str, error: Exception | None) -> None:
        """End every request, empty every slot, and begin new books: what raised may have left the old ones half done.
        What the device still does is waited for, if it answers."""
        with self._door:
            self._inbox.clear()
            for number, handle in list(self._handles.items()):
                state = handle._state
                if handle.completion is not None:
                    del self._handles[number]
                    continue
                if state.finish_reason is None:  # else it has ended, and only its answer was not given yet
                    state.finish_reason, state.error = reason, error
                self._complete(handle, self.device.now())
            self._new_books()
        try:
            if not isinstance(error, DeviceError):
                for stream in self.device.streams:
                    stream.synchronize()
        except DeviceError as lost:
            self._lose(lost)
        for slot in self.slots:
            slot.plan = None

    def _new_books(self) -> None:
        """An empty pool, and a scheduler without requests that goes on counting the steps."""
        shape, before = self.shape, getattr(self, "scheduler", None)
        # More owners than rows: a request whose last token is under way keeps its blocks while its row is given on.
        owners = shape.max_batch_size * (shape.num_slots + 1)
        self.kv = KVCache(shape.num_blocks, shape.block_size, shape.max_blocks, owners)
        self.scheduler = Scheduler(self.kv, shape.max_batch_size, shape.prefill_tokens, self._stops_on_text)
        self.scheduler.num_steps = before.num_steps if before is not None else 0

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError(self._closed)

    def _model_stop_tokens(self) -> tuple[int, ...]:
        config = getattr(self.model, "generation_config", None) or self.model.config
        ids = config.eos_token_id
        return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)

    def _stops_on_text(self, state: RunState) -> bool:
        strings = state.request.stop_strings
        try:
            return len(strings) > 0 and contains_stop_string(state.generated, strings, self.tokenizer)
        except Exception as error:  # in the caller's tokenizer: this request's fault alone
            failed = RequestError(f"stop_strings: the tokenizer's decode raised {type(error).__name__}: {error}")
            failed.__cause__ = error
            self.scheduler.finish(state, "error", failed)
            return False

    def _new_timeline(self) -> Timeline:
        clock = self.device.clock
        if self.clock is not None:
            pass  # "virtual": all times are its own
        elif isinstance(self.step_s, StepTimes):
            clock = f"emulated {self.step_s.label}, {clock}"
        elif self.step_s is not None:
            clock = f"timed device, {clock}"
        return Timeline(self.mode, clock)


class _progress_bar:
    """A tqdm bar on standard error that counts generated tokens and says how idle the device was, or nothing."""

    def __init__(self, handles: list[Handle], timeline: Timeline, wanted: bool):
        self.handles, self.wanted = handles, wanted
        self.idle, self.looked = _IdleSoFar(timeline), time.monotonic()

    def __enter__(self):
        if not self.wanted:
            return lambda: None
        from tqdm import tqdm

        total = sum(handle._state.request.max_new_tokens for handle in self.handles)
        self.bar = tqdm(total=total, unit=" tokens", leave=False)

        def update() -> None:
            done = sum(len(handle._state.generated) for handle in self.handles)
            now = time.monotonic()
            if now - self.looked >= 1:
                self.looked = now
                self.say_idle()
            self.bar.update(done - self.bar.n)

        return update

    def say_idle(self) -> None:
        idle = self.idle()
        if idle is not None:
            self.bar.set_postfix_str(f"idle {100 * idle:.1f} %", refresh=False)

    def __exit__(self, *_) -> None:
        if self.wanted:
            self.bar.close()


class _IdleSoFar:
    """The idle share of a timeline that still grows, as `Timeline.summary` has it. Each call looks at what has come
    since the call before, so a long run does not slow itself down by being watched."""

    def __init__(self, timeline: Timeline):
        self.timeline = timeline
        self.spans = self.steps = 0  # so many have been looked at
        self.kinds: dict[int, str] = {}  # of steps that have been noted and whose span has not been looked at
        self.last_end: float | None = None
        self.active_s = self.period_s = 0.0

    def __call__(self) -> float | None:
        """The share from 0 to 1; None before there is one."""
        new_steps = self.timeline.steps[self.steps :]
        self.steps += len(new_steps)
        self.kinds |= {step.step: step.kind for step in new_steps}
        for lane, _, step, start, end in self.timeline.spans[self.spans :]:
            if lane == "compute":
                if step not in self.kinds:
                    break  # another thread is committing it just now
                if self.kinds.pop(step) == "decode" and self.last_end is not None:
                    self.active_s += end - start
                    self.period_s += end - self.last_end
                self.last_end = end
            self.spans += 1
        return max(0.0, 1 - self.active_s / self.period_s) if self.period_s > 0 else None

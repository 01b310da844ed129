"""Who asks, and who is answered: submit, run, stream, cancel, close.

There is no thread behind it: whoever waits for a result (`run`, `stream`, `Handle.result`) turns the loop, and serves
everybody else's requests with it. What a turn does is `step`, in `batcher.py`.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator

from .config import Config
from .kv_cache import KVCache
from .request import Completion, Request, RequestError, check_request, contains_stop_string, shown
from .scheduler import Committed, RunState, Scheduler
from .slot import Slot, StepShape
from .streams import Device, DeviceError
from .timeline import Timeline


class Handle:
    """A submitted request. `token_ids` grows as steps are committed; `completion` is None until it has ended."""

    def __init__(self, batcher: Serving, state: RunState):
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


class TokenStream(Iterator[int]):
    """The tokens of one request as they are committed. Closed or dropped before its end, it cancels the request."""

    def __init__(self, batcher: Serving, handle: Handle):
        self._batcher, self._handle = batcher, handle
        self._taken, self._closed = 0, False

    def __next__(self) -> int:
        handle = self._handle
        while not self._closed:
            # Asked before the tokens are looked at: another thread's turn may add the last ones in between.
            ended = handle.completion is not None
            if self._taken < len(handle._state.generated):
                self._taken += 1
                return handle._state.generated[self._taken - 1]
            if ended:
                self._closed = True
                if handle.completion is not None and handle.completion.error is not None:
                    raise handle.completion.error
                break
            try:
                self._batcher._turn()
            except BaseException:
                self.close()
                raise
        raise StopIteration

    def close(self) -> None:
        """Cancel the request, if it has not ended."""
        if not self._closed:
            self._closed = True
            if self._handle.completion is None:
                self._batcher.cancel(self._handle)

    def __del__(self) -> None:
        self.close()


class Serving:
    """The requests of a batcher. Any thread may submit one; whoever turns the loop serves them all; each is answered
    exactly once.

    A subclass sets `config`, `device`, `shape` and `slots` before it calls `__init__`, and defines `step`, `_new_books`
    and `_new_timeline`."""

    config: Config
    device: Device
    shape: StepShape
    slots: list[Slot]
    kv: KVCache
    scheduler: Scheduler
    timeline: Timeline

    def __init__(self, model, tokenizer=None):
        self.model, self.tokenizer = model, tokenizer
        self.vocab_size = model.config.get_text_config().vocab_size
        self._numbers = itertools.count()
        self._handles: dict[int, Handle] = {}
        self._inbox: deque[tuple[str, RunState]] = deque()  # from any thread; emptied before each step
        self._lock = threading.RLock()  # held by whoever turns the loop
        self._door = threading.RLock()  # held, never for long, while a request is entered or its end is asked for
        self._closed = ""
        self._new_books()
        self.timeline = self._new_timeline()

    def step(self) -> bool:
        """One turn of the loop: launch and commit at most one step each. False if there was nothing to do."""
        raise NotImplementedError

    def _new_books(self) -> None:
        """Make `kv` and `scheduler` anew, without requests."""
        raise NotImplementedError

    def _new_timeline(self) -> Timeline:
        raise NotImplementedError

    # ---- what callers use -----------------------------------------------------------------------------------------

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
        stops_on_text = self._stops_on_text if len(request.stop_strings) else None
        state = RunState(next(self._numbers), request, frozenset(int(token) for token in stop), stops_on_text)
        with self._door:  # closed meanwhile by another thread: then it must not be entered any more
            self._check_open()
            handle = self._handles[state.number] = Handle(self, state)
            self._inbox.append(("add", state))
        return handle

    def cancel(self, handle: Handle) -> bool:
        """End a request early, from any thread. It keeps the tokens that it has generated.

        False if there is nothing to cancel, because the request has ended or was cancelled before. A step that is being
        committed at that moment still counts, so the request may yet end as "stop" or "length". RequestError for
        anything but a handle of this batcher."""
        if not isinstance(handle, Handle) or handle._batcher is not self:
            of_another = isinstance(handle, Handle)
            argument = "the handle of another batcher" if of_another else f"{type(handle).__name__} {shown(handle)}"
            raise RequestError(f"cancel takes a handle that this batcher's submit gave, not {argument}")
        with self._door:
            if handle.completion is not None or handle._cancelled:
                return False
            handle._cancelled = True
            self._inbox.append(("cancel", handle._state))
        return True

    def run(self, requests: Iterable[Request], progress: bool = False) -> list[Completion]:
        """Serve all requests and return their completions, in the order of the requests.

        A request that cannot be served has finish_reason "error" and the exception in `error`; all others are served.
        If the batcher was idle, a new `timeline` begins. `progress` shows a bar on standard error.
        Ctrl-C ends everything that is under way as "cancelled", and the batcher can be used again. An exception raised
        by `requests` or by the progress bar cancels the requests of this call only.
        RequestError for anything but a list of requests, and on a closed batcher."""
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
        """Turn the loop once; for callers that submit requests and do something else between two turns.

        True while requests are under way. When none is left, the steps that are still in flight are committed, and the
        answer is False. RequestError on a closed batcher."""
        self._check_open()
        if self._handles:
            self._turn()
            return True
        self._drain()
        return False

    def stream(self, request: Request) -> TokenStream:
        """Serve one request and give its tokens as they are committed. Who leaves the loop early cancels the request.

        RequestError, at once, for a request that cannot be served. If serving it fails, the error is raised after the
        last good token."""
        return TokenStream(self, self.submit(request))

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

    # ---- inside -----------------------------------------------------------------------------------------

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
        """`step`; but if the device is lost, end every request with that error and close the batcher."""
        try:
            return self.step()
        except DeviceError as error:
            self._lose(error)
            self._abort("error", error)
            return True

    def _lose(self, error: DeviceError) -> None:
        if not self._closed:
            self._closed = f"the batcher lost its device: {error}"
            self.device.abandon(self.slots)

    def _drain(self) -> None:
        """Once no request is left, commit the steps that are still in flight. Their tokens count as wasted."""
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
            elif self.scheduler.finish(state, "cancelled"):
                self._complete(self._handles[state.number], self.device.now())

    def _answer(self, result: Committed) -> None:
        """Pass the results of a committed step on to those who asked for them."""
        now = self.device.now()
        for state, _ in result.new:
            handle = self._handles[state.number]
            handle.first_token_s = handle.first_token_s or now
        for state in result.ended:
            self._complete(self._handles[state.number], now)

    def _complete(self, handle: Handle, now: float) -> None:
        state = handle._state
        # In this order: an interrupt between the two lines must not lose the answer. (`_abort` sees to the rest.)
        handle.completion = Completion(
            state.generated, str(state.finish_reason), state.error, handle.submitted_s, handle.first_token_s, now
        )
        del self._handles[state.number]

    def _give_up(self, answers: list[Handle | Completion], error: BaseException) -> None:
        """`run` is being left with an exception: cancel its own requests, and after an interrupt all requests."""
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
        """End every request, empty every slot and begin new books, because an exception may have left the old ones half
        written. Wait for what the device is still doing, if it answers."""
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

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError(self._closed)

    def _model_stop_tokens(self) -> tuple[int, ...]:
        config = getattr(self.model, "generation_config", None) or self.model.config
        ids = config.eos_token_id
        return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)

    def _stops_on_text(self, state: RunState) -> bool:
        """Whether the newest token of a request completes one of its stop strings. Given to each request that has some,
        so that the scheduler need not know of tokenizers. RequestError if the caller's tokenizer fails."""
        try:
            return contains_stop_string(state.generated, state.request.stop_strings, self.tokenizer)
        except Exception as error:
            raise RequestError(
                f"stop_strings: the tokenizer's decode raised {type(error).__name__}: {error}"
            ) from error


class _progress_bar:
    """A tqdm bar on standard error that counts generated tokens and says how idle the device was; or no bar at all."""

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

"""Who asks, and who is answered: submit, run, stream, cancel, close.

There is no thread behind it: whoever waits for a result (`run`, `stream`, `Handle.result`) turns the loop, and serves
everybody else's requests with it. What a turn does is `step`, in `batcher.py`.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from .kv_cache import KVCache
from .request import Completion, Request, RequestError, check_request, contains_stop_string, shown, token_numbers
from .scheduler import Committed, RunState, Scheduler
from .slot import Slot, StepShape
from .streams import Device, DeviceError, check_process
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

    def has_ended(self) -> bool:
        return self.completion is not None

    def result(self) -> Completion:
        """Serve until this request has ended."""
        self._batcher._serve_until(self.has_ended)
        assert self.completion is not None
        return self.completion


class TokenStream(Iterator[int]):
    """The tokens of one request as they are committed. Closed or dropped before its end, it cancels the request."""

    _closed = True  # if an interrupt comes before it is made, there is nothing to do in `__del__`

    def __init__(self, batcher: Serving, handle: Handle):
        self._batcher, self._handle = batcher, handle
        self._taken, self._closed = 0, False

    def __next__(self) -> int:
        handle = self._handle
        try:
            while not self._closed:
                # Asked before the tokens are looked at: another thread's turn may add the last ones in between.
                completion = handle.completion
                if self._taken < len(handle._state.generated):
                    token = handle._state.generated[self._taken]
                    self._taken += 1
                    return token
                if completion is not None:
                    self._closed = True
                    if completion.error is not None:
                        raise completion.error
                    break
                self._batcher._serve_until(self._has_news)
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def _has_news(self) -> bool:
        return self._taken < len(self._handle._state.generated) or self._handle.completion is not None

    def close(self) -> None:
        """Cancel the request, if it has not ended."""
        if not self._closed:
            self._closed = True
            if self._handle.completion is None:
                self._batcher.cancel(self._handle)

    def __del__(self) -> None:
        # Without locks, which a thread may hold where the garbage collector finds this. The next turn sees to it.
        if not self._closed and self._handle.completion is None:
            self._handle._cancelled = True
            self._batcher._inbox.append(("cancel", self._handle._state))


class Serving:
    """The requests of a batcher. Any thread may submit one, whoever turns the loop serves all, and each is answered
    exactly once. A subclass sets `device`, `shape` and `slots` before it calls `__init__`."""

    device: Device
    shape: StepShape
    slots: list[Slot]
    kv: KVCache
    scheduler: Scheduler
    timeline: Timeline
    _new_books: Callable[[], None]  # makes `kv` and `scheduler` anew, without requests
    _new_timeline: Callable[[], Timeline]

    def __init__(self, model, tokenizer=None):
        self.model, self.tokenizer = model, tokenizer
        self.vocab_size = model.config.get_text_config().vocab_size
        self._numbers = itertools.count()
        self._handles: dict[int, Handle] = {}
        self._inbox: deque[tuple[str, RunState]] = deque()  # from any thread; emptied before each step
        self._lock = threading.RLock()  # held by whoever turns the loop
        self._door = threading.RLock()  # held, never for long, while a request is entered or its end is asked for
        self._news = threading.Condition()  # told after each turn, to those who wait while another thread turns
        self._closed = ""  # why it takes no more requests
        self._freed = False  # the device is closed, or lost
        self._pid = os.getpid()
        self._new_books()
        self.timeline = self._new_timeline()

    def step(self) -> bool:
        """One turn of the loop: launch and commit at most one step each. False if there was nothing to do."""
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
        handle = Handle(self, state)
        with self._door:  # closed meanwhile by another thread: then it must not be entered any more
            self._check_open()
            self._handles[state.number] = handle
            try:
                self._inbox.append(("add", state))
            except BaseException:  # an interrupt: it must not be waited for without being served
                del self._handles[state.number]
                raise
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
        check_process(self._pid)
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
        from .shown.progress import progress_bar

        self._check_open()
        if not isinstance(requests, Iterable) or isinstance(requests, (str, bytes, bytearray)):
            raise RequestError(f"run takes a list of Requests, not {type(requests).__name__} {shown(requests)}")
        with self._lock:
            self._drain()
            if not self._handles:
                self._renew()
        answers: list[Handle | Completion] = []
        try:
            for request in requests:
                try:
                    answers.append(self.submit(request))
                except RequestError as error:
                    now = self.device.now()
                    answers.append(Completion([], "error", error, submitted_s=now, finished_s=now))
            pending = [answer for answer in answers if isinstance(answer, Handle)]
            with progress_bar(pending, self.timeline, progress) as update:
                for handle in pending:
                    while handle.completion is None:
                        self._serve_until(handle.has_ended, most_turns=1)
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
        """Serve one request and give its tokens as they are committed. Leaving the loop early cancels the request.

        RequestError at once if the request cannot be served. An error in serving it comes after the last token."""
        return TokenStream(self, self.submit(request))

    def close(self) -> None:
        """Cancel what is under way and free the device's memory. A closed batcher takes no more requests. After an
        interrupt it can be called again. In a forked process it does nothing: the batcher is its owner's."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if not self._freed:
                self._closed = self._closed or "the batcher is closed"
                self._abort("cancelled", None)
                self.device.close()
                self._freed = True
        with self._news:
            self._news.notify_all()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- inside -----------------------------------------------------------------------------------------

    def _serve_until(self, done: Callable[[], bool], most_turns: int | None = None) -> None:
        """Turn the loop until something is done, or so many turns were taken. While another thread turns it, wait for
        the news that it tells after each turn: whoever turns, everybody learns at once of what concerns them."""
        turns = 0
        while not done() and (most_turns is None or turns < most_turns):
            check_process(self._pid)
            mine = False
            try:
                with self._news:
                    mine = self._lock.acquire(blocking=False)
                    if not mine:
                        self._news.wait(1.0)  # (a thread that was killed tells nobody)
                if mine and not done():
                    self._turn()
            finally:
                if mine:
                    self._lock.release()
                    with self._news:
                        self._news.notify_all()
            turns += 1

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
            self._closed, self._freed = f"the batcher lost its device: {error}", True
            self.device.abandon(self.slots)

    def _renew(self) -> None:
        self.timeline, self.scheduler.num_steps = self._new_timeline(), 0

    def _drain(self) -> None:
        """Once no request is left, commit the steps that are still in flight. Their tokens count as wasted."""
        with self._lock:
            try:
                self._take_inbox()  # those who left count no more
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
            if len(state.generated) == 1:
                self._handles[state.number].first_token_s = now
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
            try:
                for answer in answers:
                    if isinstance(answer, Handle):
                        self.cancel(answer)
                self._take_inbox()
            except BaseException:
                self._abort("cancelled", None)
                raise

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
            if not self._freed:
                for stream in self.device.streams:
                    stream.synchronize()
        except DeviceError as lost:
            self._lose(lost)
        for slot in self.slots:
            slot.plan = None

    def _check_open(self) -> None:
        check_process(self._pid)
        if self._closed:
            raise RequestError(self._closed)

    def _model_stop_tokens(self) -> Iterable[int]:
        config = getattr(self.model, "generation_config", None) or self.model.config
        return token_numbers("the model's eos_token_id", config.eos_token_id)

    def _stops_on_text(self, state: RunState) -> bool:
        """Whether the newest token of a request completes one of its stop strings. Given to each request that has some,
        so that the scheduler need not know of tokenizers. RequestError if the caller's tokenizer fails."""
        try:
            return contains_stop_string(state.generated, state.request.stop_strings, self.tokenizer)
        except Exception as error:
            raise RequestError(
                f"stop_strings: the tokenizer's decode raised {type(error).__name__}: {error}"
            ) from error

"""transformers' own continuous batching on the same requests, measured the same way.

    with TransformersBatcher(model, mode="async", max_batch_size=32, max_length=8208) as batcher:
        completions = batcher.run(requests)
    print(batcher.setting)
    print(batcher.timeline.summary())

It runs the `ContinuousBatchingManager` behind `model.generate_batch`, with the settings that make it fastest here. For
the time of a run, small wrappers on the manager's objects note when the host did what, and put a CUDA timing event
before and after each batch on the stream that computes it. The events are read after the run; the loop waits for
nothing that it would not have waited for anyway.

transformers is fast only with flash_attn, whose paged decode kernel reads the cache in place; its `sdpa` gathers and
masks all of it, in every layer of every step. Where flash_attn is missing, this package's Triton kernels can stand in
for it, so that what is compared is the two loops and not two attentions (`attention="stand-in"`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ...kv_cache import blocks_for
from ...measure.points import replaced
from ...models.checks import check_model
from ...request import Completion, Request, RequestError, check_request, finish_reason
from ...runner import kv_heads_and_dim, splits_for
from ...timeline import Timeline
from ..workload import NO_REQUEST, arrival_order

ATTENTIONS = ("auto", "sdpa", "flash_attention_2", "stand-in")
# transformers takes an attention for flash attention, with its fast path for decoding, if its name matches
# ".*flash.*2" or ".*flash.*3".
STAND_IN = "asyncbatch_flash_2"
KNOWN = "known to work: 5.17 to 5.23"
CACHED = "_cached_continuous_batching_manager"  # where a model keeps the manager of `persistent_manager=True`


class TransformersBatcher:
    """Serves requests with transformers' continuous batching. The model is given back unchanged after each `run`.

    model: a causal language model of transformers. On a CPU only mode "sync" works: transformers' asynchronous
        batching needs CUDA streams.
    mode: "sync" or "async".
    max_batch_size: the most requests in one step. max_length: the most tokens, prompt and output, of one request
        (default: the model's limit, at most 2048).
    attention: "sdpa", "flash_attention_2" (needs the package flash_attn), "stand-in" (this package's Triton kernels in
        flash_attn's place), or "auto": the first of flash_attention_2, stand-in, sdpa that works here.
    block_size: tokens in a block of the KV cache; flash_attn wants multiples of 256.
    prefill_tokens: the most prompt tokens in one step (default: 1024, or 256 with sdpa).
    compile_level: transformers' `default_compile_level`, 0 (no torch.compile, its default) to 3.

    `setting` says in one line what is used, and why nothing better. `timeline` is that of the last run: lanes "host"
    (plan, launch, wait, commit) and "compute" (step).

    Raises ModelError for a model that cannot be served, ValueError for settings that make no sense or cannot be had
    here, RuntimeError for a version of transformers that this does not fit.
    """

    def __init__(
        self,
        model,
        *,
        mode: str,
        max_batch_size: int = 8,
        max_length: int | None = None,
        attention: str = "auto",
        block_size: int = 256,
        prefill_tokens: int | None = None,
        compile_level: int = 0,
    ):
        check_model(model)
        config = model.config.get_text_config()
        model_length = getattr(config, "max_position_embeddings", None) or 2048
        max_length = min(model_length, 2048) if max_length is None else max_length
        self.device = next(model.parameters()).device
        self.on_cuda = self.device.type == "cuda"
        if mode not in ("sync", "async"):
            raise ValueError(f"mode is {mode!r}: allowed are 'sync' and 'async'")
        if mode == "async" and not self.on_cuda:
            raise ValueError(f"mode is 'async' and the model is on {self.device}: transformers needs CUDA for it")
        for name, value, lowest in (
            ("max_batch_size", max_batch_size, 1),
            ("max_length", max_length, 2),
            ("block_size", block_size, 4),
            ("prefill_tokens", 1 if prefill_tokens is None else prefill_tokens, 1),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ValueError(f"{name} is {value!r}: allowed are whole numbers from {lowest}")
        if max_length > model_length:
            raise ValueError(f"max_length is {max_length}: the model allows at most {model_length} tokens")
        if compile_level not in range(4):
            raise ValueError(f"compile_level is {compile_level!r}: allowed are 0, 1, 2 and 3")
        self.attention, reason = _choose_attention(attention, self.device)
        if self.attention == "flash_attention_2" and block_size % 256:
            raise ValueError(f"block_size is {block_size}: flash_attn allows multiples of 256")

        self.model, self.mode = model, mode
        self.max_batch_size, self.max_length, self.vocab_size = max_batch_size, max_length, config.vocab_size
        self.timeline = self._new_timeline()
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # kept from run to run
        self._closed = ""

        # A sequence may be one token longer than allowed: async learns one step late that a request has ended.
        blocks_each = blocks_for(max_length + 1, block_size)
        num_blocks = max_batch_size * blocks_each
        if prefill_tokens is None:
            prefill_tokens = 256 if self.attention == "sdpa" else 1024
        heads = kv_heads_and_dim(config)[0]
        self._stand_in = StandIn(max_batch_size, heads, self.device) if self.attention == "stand-in" else None
        with self._borrowed_model():
            self.manager = self._make_manager(block_size, blocks_each, num_blocks, prefill_tokens, compile_level)
            with torch.no_grad():
                self.manager.warmup()  # captures the CUDA graphs of decode steps for 1, 2, 4, ... max_batch_size rows
        self.setting = self._describe(reason, block_size, compile_level)

    def _make_manager(self, block_size, blocks_each, num_blocks, prefill_tokens, compile_level):
        from transformers import ContinuousBatchingConfig, GenerationConfig

        known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
        flash = self.attention != "sdpa"
        options: dict[str, Any] = {
            # Room for a full batch of the longest requests, and for nothing else on the GPU.
            "num_blocks": num_blocks,
            # The static input tensors have this size; so have the list of carry-over ids that async makes anew in
            # Python in each step, and, with sdpa, the attention mask [prefill tokens, all tokens of the cache] that
            # async copies to the device in each step. So: as many as prompts need to be computed well, not 8192.
            "max_batch_tokens": min(self.max_batch_size + prefill_tokens, num_blocks * block_size),
            # A decode step is padded to a power of 2 rows, at most this many. Full batches are then not padded.
            "max_requests_per_batch": self.max_batch_size,
            # By default new requests wait while less than 15 % of the cache is free. It is sized for all of them.
            "safety_margin": 0.0,
            # Hashing full blocks, to share equal prompts, costs host time, and this package does not share either.
            "allow_block_sharing": False,
            "use_async_batching": self.mode == "async",
            # None is transformers' own choice, off with sdpa: a graph would pad the keys and the mask to thousands.
            "use_cuda_graph": True if self.on_cuda and flash else None,
            "default_compile_level": compile_level,
            # Blocks in a row of the block table. A request with more would fall off the fast path for decoding.
            "max_blocks_per_request": blocks_each if self.on_cuda and flash else None,
            # Tokens in a block: called block_size until it became page_size.
            "page_size" if "page_size" in known else "block_size": block_size,
        }
        if "auto_switch_to_flash" in known:
            options["auto_switch_to_flash"] = False  # the attention has been chosen already
        if missing := sorted(set(options) - known):
            raise _unknown_version(f"its ContinuousBatchingConfig has no {', '.join(missing)}")
        generation = GenerationConfig(do_sample=False, eos_token_id=-1)  # -1: none; each request brings its own
        manager = self.model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=ContinuousBatchingConfig(**options)
        )
        for name in ("warmup", "start", "stop", "destroy", "add_request", "get_result", "is_running"):
            _part(manager, name)
        resolved = _part(manager, "continuous_batching_config")
        if self.attention == "stand-in":
            # transformers allows the fast path on CUDA only; the stand-in has it everywhere, so that a CPU can test it.
            resolved.max_blocks_per_request = blocks_each
        return manager

    # ---- for callers -----------------------------------------------------------------------------------------

    def run(
        self, requests: list[Request], progress: bool = False, arrivals_s: Sequence[float] | None = None
    ) -> list[Completion]:
        """Serve all requests and return their completions in the order given. Starts a new `timeline`.

        arrivals_s: seconds from the beginning at which each request arrives (`workload.serve`); None: all at once.
        Raises RequestError (a ValueError), before anything is computed, for a request that cannot be served: one that
        samples, has stop strings, or is too long. A request that fails later has finish_reason "error"."""
        if self._closed:
            raise RequestError(self._closed)
        requests = list(requests)
        stops = [self._check(request) for request in requests]
        order = list(range(len(requests))) if arrivals_s is None else arrival_order(requests, arrivals_s)
        self.timeline = self._new_timeline()
        if not requests:
            return []
        try:
            with self._borrowed_model():
                outputs, recorder, submitted = self._serve(requests, stops, progress, arrivals_s, order)
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt):
                self._closed = f"the batcher failed: {error}"
            raise
        recorder.finish()
        answers = []
        for index, (request, stop) in enumerate(zip(requests, stops, strict=True)):
            output = outputs[str(index)]
            tokens = [int(token) for token in output.generated_tokens]
            reason = None if output.error else finish_reason(tokens, request.max_new_tokens, stop)
            problem = None
            if reason is None:
                problem = RuntimeError(f"transformers gave up request {index}: {output.error or 'no reason given'}")
            first_s = recorder.first_token_s.get(str(index))
            answers.append(
                Completion(tokens, reason or "error", problem, submitted[str(index)], first_s, output.lifespan[1])
            )
        return answers

    def close(self) -> None:
        """Free the device's memory. A closed batcher takes no more requests."""
        if self.manager is not None:
            self._closed = self._closed or "the batcher is closed"
            self.manager.destroy()
            self.manager = None
            self._events.clear()
            gc.collect()  # the manager's objects refer to each other, and graphs and cache hang on them
            if self.on_cuda:
                torch.cuda.empty_cache()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- behind them -----------------------------------------------------------------------------------------

    def _serve(self, requests, stops, progress, arrivals_s, order):
        manager, processor = self.manager, self.manager.batch_processor
        if processor is None:
            raise _unknown_version("its manager has no batch_processor after warmup()")
        recorder = _Recorder(self.timeline, processor, self.device, self.mode, self._events)
        outputs: dict[str, Any] = {}
        submitted: dict[str, float] = {}
        bar = _bar(len(requests), progress)
        while manager.get_result(timeout=0) is not None:
            pass  # left over from a run that was interrupted

        def collect(timeout_s: float) -> None:
            output = manager.get_result(timeout=timeout_s)
            if output is not None and (output.is_finished() or output.error is not None):
                outputs[output.request_id] = output
                bar.update(1)
            elif output is None and not manager.is_running():
                raise RuntimeError("the loop of transformers ended early; it has logged why")

        def until(due_s: float) -> None:
            """Until then the loop serves those that are there."""
            while (now := time.perf_counter()) < due_s:
                recorder.ready.set()
                if len(outputs) < len(submitted):
                    collect(due_s - now)
                else:
                    time.sleep(due_s - now)
                    self.timeline.add(*NO_REQUEST, now, time.perf_counter())

        with recorder.hooks():
            manager.start()
            hard_stop = True
            try:
                start_s = time.perf_counter()
                for index in order:
                    request, stop = requests[index], stops[index]
                    if arrivals_s is not None:
                        until(start_s + arrivals_s[index])
                    submitted[str(index)] = time.perf_counter() if arrivals_s is None else start_s + arrivals_s[index]
                    given = manager.add_request(
                        [int(token) for token in request.token_ids],
                        request_id=str(index),
                        max_new_tokens=request.max_new_tokens,
                        eos_token_id=sorted(stop) if stop else -1,
                    )
                    if given is None:
                        raise RuntimeError("transformers did not take a request: its manager is stopping")
                recorder.ready.set()  # but for arrivals, the loop plans its first batch only now, with all requests
                while len(outputs) < len(requests):
                    collect(timeout_s=1)
                recorder.all_answered = True
                hard_stop = False
            finally:
                recorder.ready.set()
                bar.close()
                # "keep" keeps the cache and the graphs for the next run. It also puts the manager on the model, from
                # where `_borrowed_model` takes it away again.
                manager.stop(block=True, keep_for_next_session=True, hard_stop=hard_stop)
        return outputs, recorder, submitted

    def _check(self, request: Request) -> frozenset[int]:
        """RequestError unless `request` can be served. Returns its stop tokens."""
        limited_by = f"max_length={self.max_length}"
        tokenizer = object()  # it only has to be there: stop strings are refused just below
        check_request(
            request, vocab_size=self.vocab_size, max_length=self.max_length, limited_by=limited_by, tokenizer=tokenizer
        )
        if request.sampling.temperature > 0:
            raise RequestError(
                f"sampling.temperature is {request.sampling.temperature}: here only 0 (greedy) is allowed, because "
                "transformers draws other random numbers, so the tokens could not be compared"
            )
        if request.stop_strings:
            raise RequestError(f"stop_strings is {request.stop_strings!r}: transformers' continuous batching has none")
        if request.stop_token_ids is not None:
            return frozenset(int(token) for token in request.stop_token_ids)
        ids = (getattr(self.model, "generation_config", None) or self.model.config).eos_token_id
        return frozenset(() if ids is None else (ids,) if isinstance(ids, int) else ids)

    @contextlib.contextmanager
    def _borrowed_model(self) -> Iterator[None]:
        """Within it, the model has the paged attention and is in eval mode; after it, all is as it was before."""
        model, cached = self.model, vars(self.model).pop(CACHED, None)
        training = [module for module in model.modules() if module.training]
        before = model.config._attn_implementation
        with contextlib.ExitStack() as stack:
            try:
                name = _paged_name(self.attention)
                if self._stand_in is not None:
                    name = stack.enter_context(_in_place_of_flash_attn(self._stand_in))
                model.set_attn_implementation(name)
                model.eval()
                yield
            finally:
                vars(model).pop(CACHED, None)
                if cached is not None:
                    setattr(model, CACHED, cached)
                model.set_attn_implementation(before)
                for module in training:
                    module.training = True

    def _new_timeline(self) -> Timeline:
        return Timeline(f"transformers {self.mode}", "cuda" if self.on_cuda else "host")

    def _describe(self, reason: str, block_size: int, compile_level: int) -> str:
        import transformers

        with_graphs = all(self.manager.continuous_batching_config.cuda_graph_booleans)
        no_graphs = "no CUDA graphs" + (" (they would pad sdpa's masks)" if self.on_cuda else "")
        names = {"stand-in": "asyncbatch's Triton kernels standing in for flash_attn"}
        parts = [
            f"transformers {transformers.__version__}",
            names.get(self.attention, self.attention) + (f" ({reason})" if reason else ""),
            "CUDA graphs" if with_graphs else no_graphs,
            *([f"default_compile_level {compile_level}"] if compile_level else []),
            f"blocks of {block_size}",
            self.mode,
        ]
        return ", ".join(parts)


# ---- timing --------------------------------------------------------------------------------------------------------


class _Recorder:
    """Notes what happens in one run, through wrappers around methods of transformers' objects.

    The loop of transformers, in its own thread, calls for each batch, in this order:
    prepare_next_batch                               "plan"
    _generation_step: inputs to the device,
        compute_batch (carry-over, model, sampling)  "launch" on the host, "step" on the compute lane
        retrieve_device_outputs                      sync: "wait"; async: only launches a copy, part of "launch"
    update_batch: prepare_batch_update               "wait" (async: for the batch before)
        and the rest of it                           "commit"
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
        self._began = self._read = 0.0
        self._committing = 0
        self._within_run = True
        if self.on_cuda:
            # One moment on both clocks: event times are relative to each other, and this ties them to the host's.
            torch.cuda.synchronize(device)
            self._origin_event = torch.cuda.Event(enable_timing=True)
            self._origin_event.record(torch.cuda.current_stream(device))
            self._origin_event.synchronize()
            self._origin = time.perf_counter()

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Put the wrappers on; take them off again at the end."""
        from transformers.generation.continuous_batching import RequestStatus

        self._finished = RequestStatus.FINISHED
        processor = self.processor
        runner = _part(processor, "model_runner")
        inputs_and_outputs = _part(processor, "inputs_and_outputs")
        if self.on_cuda:
            self._stream = _part(inputs_and_outputs, "compute_stream")
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
                stack.enter_context(_wrapped(owner, name, wrapper))
            yield

    def finish(self) -> None:
        """After the run: turn the events into spans."""
        if not self.on_cuda:
            return
        torch.cuda.synchronize(self.device)
        # An event's time is a float32 of milliseconds since another event: after a minute it is exact to 4
        # microseconds only, more than an asynchronous gap. So the event that times are taken from moves along.
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
            found = original()
            if found:
                self.timeline.add("host", "plan", self._launched, start, time.perf_counter())
            return found

        return prepare_next_batch

    def _generation_step(self, original: Callable) -> Callable:
        def generation_step(model) -> None:
            self._began = time.perf_counter()
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
            self.timeline.add("host", "launch", self._launched, self._began, start)
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
                self.timeline.add("host", "launch", self._launched, self._began, start)

        return retrieve_device_outputs

    def _results(self, original: Callable) -> Callable:
        def prepare_batch_update():
            start = time.perf_counter()
            result = original()
            self._read = time.perf_counter()
            self._committing = self._in_flight.popleft()
            # Async reads the last batch, whose tokens nobody wants, when its loop is told to stop. The loop may sleep
            # for 0.1 s before it notices, which is no part of the run.
            self._within_run = not self.all_answered
            if self._within_run:
                self.timeline.add("host", "wait", self._committing, start, self._read)
            self._note_step(result[0])
            return result

        return prepare_batch_update

    def _commit(self, original: Callable) -> Callable:
        def update_batch() -> None:
            original()
            if self._within_run:
                self.timeline.add("host", "commit", self._committing, self._read, time.perf_counter())

        return update_batch

    def _note_step(self, rows) -> None:
        """What the step was for, told by its requests before its tokens are added to them."""
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
                    self.first_token_s[state.request_id] = self._read
        self.timeline.add_step(self._committing, kind, tokens, wasted, len(rows), context)


def _part(owner, name: str):
    if getattr(owner, name, None) is None:
        raise _unknown_version(f"its {type(owner).__name__} has no {name}")
    return getattr(owner, name)


def _wrapped(owner, name: str, wrapper: Callable[[Callable], Callable]) -> contextlib.AbstractContextManager[None]:
    """Within it, `owner.name` is `wrapper(owner.name)`, for this one object."""
    return replaced(owner, name, wrapper(_part(owner, name)))


def _unknown_version(problem: str) -> RuntimeError:
    import transformers

    return RuntimeError(f"transformers {transformers.__version__} does not fit: {problem} ({KNOWN})")


def _bar(total: int, wanted: bool):
    from tqdm import tqdm

    return tqdm(total=total, unit=" requests", leave=False, disable=not wanted)


# ---- attention -----------------------------------------------------------------------------------------------------


def _choose_attention(attention: str, device: torch.device) -> tuple[str, str]:
    """(the attention to use, why nothing better)."""
    if attention not in ATTENTIONS:
        raise ValueError(f"attention is {attention!r}: allowed are {', '.join(map(repr, ATTENTIONS))}")
    no_flash, no_stand_in = _why_no_flash_attn(device), _why_no_stand_in(device)
    if attention == "flash_attention_2" and no_flash:
        raise ValueError(f"attention is 'flash_attention_2', but {no_flash}")
    if attention == "stand-in" and no_stand_in:
        raise ValueError(f"attention is 'stand-in', but {no_stand_in}")
    if attention != "auto":
        return attention, "as asked for"
    if not no_flash:
        return "flash_attention_2", ""
    if not no_stand_in:
        return "stand-in", no_flash
    return "sdpa", no_flash if no_flash == no_stand_in else f"{no_flash}; {no_stand_in}"


def _why_no_flash_attn(device: torch.device) -> str:
    from transformers.utils import is_flash_attn_2_available

    if device.type != "cuda":
        return "flash_attn and its stand-in need CUDA"
    return "" if is_flash_attn_2_available() else "flash_attn is not installed"


def _why_no_stand_in(device: torch.device) -> str:
    if device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        return "flash_attn and its stand-in need CUDA"
    if importlib.util.find_spec("triton") is None:
        return "its stand-in needs Triton, which is not installed"
    return ""


def _attention_functions():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def _paged_name(attention: str) -> str:
    """What continuous batching calls an attention: with a prefix until, after 5.17, the same function did for both."""
    prefixed = f"paged|{attention}"
    return prefixed if prefixed in _attention_functions() else attention


@contextlib.contextmanager
def _in_place_of_flash_attn(kernel: StandIn) -> Iterator[str]:
    """Within it, transformers finds `kernel` as an attention kernel, under the name that this gives.

    transformers looks a flash attention up by name and takes those that it does not know for kernels from the hub,
    which it loads with one function. Within this context that function answers for our name. All else, from the fast
    path for decoding to the arguments of the calls, is what transformers does with flash_attn."""
    from transformers import AttentionInterface, modeling_flash_attention_utils
    from transformers.integrations import hub_kernels

    functions = _attention_functions()
    flash = _paged_name("flash_attention_2")
    if flash not in functions or not hasattr(hub_kernels, "load_and_register_attn_kernel"):
        raise _unknown_version("it looks attention kernels up in another way")
    name = flash.replace("flash_attention_2", STAND_IN)
    AttentionInterface.register(name, functions[flash])

    def load(original):
        def load_and_register_attn_kernel(requested, *arguments, **options):
            return kernel if requested.endswith(STAND_IN) else original(requested, *arguments, **options)

        return load_and_register_attn_kernel

    # The functions last loaded are kept in global variables: put them back afterwards.
    loaded = ("_loaded_", "_flash_", "_pad_fn", "_unpad_fn", "_process_flash_kwargs_fn", "_process_with_")
    utils = vars(modeling_flash_attention_utils)
    before = {key: value for key, value in utils.items() if key.startswith(loaded)}
    with _wrapped(hub_kernels, "load_and_register_attn_kernel", load):
        try:
            yield name
        finally:
            utils.update(before)


class StandIn:
    """The functions that transformers looks for in flash_attn, on this package's Triton kernels. For models with full
    attention; one object for one batcher."""

    def __init__(self, max_batch_size: int, kv_heads: int, device: torch.device):
        # The decode kernel counts its finished parts here. Made before any CUDA graph, which then uses this memory.
        self._arrived = torch.zeros(max_batch_size * kv_heads, dtype=torch.int32, device=device)

    def flash_attn_func(self, *_, **__):
        raise RuntimeError("the stand-in for flash_attn serves continuous batching only")

    def flash_attn_with_kvcache(
        self, q, k_cache, v_cache, k, v, cache_seqlens, block_table, softmax_scale=None, causal=True,
        window_size=(-1, -1),
    ) -> torch.Tensor:  # fmt: skip
        """A decode step: store each row's new key and value, and attend to the whole row.

        q: [rows, 1, heads, dim]. k, v: [rows, 1, kv_heads, dim]. k_cache, v_cache: [blocks, block_size, kv_heads, dim],
        of the same strides. cache_seqlens: int32 [rows], each row's length before the new token; -1 where the row is
        padding. block_table: int32 [rows, max_blocks]. Returns [rows, 1, heads, dim].
        """
        scale = _check(q, softmax_scale, window_size)
        live = cache_seqlens + 1  # 0 for padding
        splits = splits_for(len(self._arrived))
        arguments = (block_table, live, cache_seqlens, scale, splits, self._arrived)
        return _decode(q[:, 0], k[:, 0], v[:, 0], k_cache, v_cache, *arguments)[:, None]

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=True,
        window_size=(-1, -1),
    ) -> torch.Tensor:  # fmt: skip
        """A step with parts of prompts: rows of several queries; their keys and values gathered, row after row.

        q: [N, heads, dim]. k, v: [M, kv_heads, dim]. cu_seqlens_q, cu_seqlens_k: int32 [rows + 1], where each row
        begins among the queries and among the keys; the queries are the last of the row's tokens. Rows may be empty,
        and N <= M larger than what the rows need. Returns [N, heads, dim].

        Nothing here waits for the device: neither the loop nor the capture of a CUDA graph is held up.
        """
        scale = _check(q, softmax_scale, window_size)
        count = cu_seqlens_q.to(torch.int32).diff()
        starts = cu_seqlens_k.to(torch.int32)
        # To the paged kernel the gathered keys are a cache with blocks of one token.
        tables = starts[:-1, None] + torch.arange(max_seqlen_k, dtype=torch.int32, device=q.device)
        first, position = cu_seqlens_q[:-1].to(torch.int32), starts.diff() - count
        return _prefill(q, k.contiguous(), v.contiguous(), tables, first, count, position, scale)


def _check(q, softmax_scale, window_size) -> float:
    if tuple(window_size) != (-1, -1):
        raise ValueError(f"window_size is {window_size!r}: the stand-in for flash_attn has full attention only")
    return q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale


# From transformers' layout of a cache, [blocks, block_size, kv_heads, dim], to that of `kernels`.


def _decode(query, key, value, keys, values, tables, live, position, scale, splits, arrived) -> torch.Tensor:
    from ...devices.cuda import kernels

    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    return kernels.decode(query, key, value, keys, values, tables, live, position, scale, splits, arrived)


def _prefill(query, keys, values, tables, first, count, position, scale) -> torch.Tensor:
    """keys, values: [M, kv_heads, dim], to which `tables` points token by token."""
    from ...devices.cuda import kernels

    # The kernel stores keys before it reads: here the first N of them, each onto itself.
    places = torch.arange(len(query), device=query.device)
    pools = keys[:, :, None], values[:, :, None]
    return kernels.prefill(query, keys, values, *pools, places, tables, first, count, position, scale)

"""transformers' own continuous batching, on the same requests and measured the same way.

    with TransformersBatcher(model, mode="async", max_batch_size=32, max_length=8208) as batcher:
        completions = batcher.run(requests)
    print(batcher.setting)
    print(batcher.timeline.summary())

It runs the `ContinuousBatchingManager` behind `model.generate_batch`, with the settings that make it fastest here.
During a run, small wrappers around the methods of its objects note when the host did what, and record a CUDA timing
event before and after each batch on the stream that computes it (`recorder.py`). The events are read after the run; the
loop waits for nothing that it would not have waited for anyway.

transformers is fast only with flash_attn, whose paged decode kernel reads the cache in place; with `sdpa` it gathers
and masks the whole cache, in every layer of every step. Where flash_attn is missing, this package's Triton kernels can
stand in for it, so that the two loops are compared and not two attentions (`attention="stand-in"`, `stand_in.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ...kv_cache import blocks_for
from ...measure.bandwidth import kv_heads_and_dim
from ...models.checks import check_decoder
from ...request import Completion, Request, RequestError, check_request, finish_reason
from ...timeline import Timeline
from ..workload import NO_REQUEST_SPAN, arrival_order
from .attention_choice import choose_attention, paged_name
from .parts import part, unknown_version
from .recorder import StepRecorder
from .stand_in import StandIn, in_place_of_flash_attn

PAUSE_S = 0.05
CACHED = "_cached_continuous_batching_manager"  # where a model keeps the manager of `persistent_manager=True`


class TransformersBatcher:
    """Serves requests with transformers' continuous batching. After each `run` the model is as it was before.

    model: a causal language model of transformers. On a CPU only mode "sync" works: transformers' asynchronous
        batching needs CUDA streams.
    mode: "sync" or "async".
    max_batch_size: the most requests in one step. max_length: the most tokens, prompt and output, of one request
        (default: the model's limit, at most 2048).
    attention: "sdpa", "flash_attention_2" (needs the package flash_attn), "stand-in" (this package's Triton kernels in
        place of flash_attn), or "auto": the first of flash_attention_2, stand-in and sdpa that works here.
    block_size: tokens in a block of the KV cache; flash_attn wants multiples of 256.
    prefill_tokens: the most prompt tokens in one step (default: 1024, or 256 with sdpa).
    compile_level: transformers' `default_compile_level`, 0 (no torch.compile, its default) to 3.

    Of a model that transformers has sharded over several ranks, each rank makes a batcher and calls `run` at the same
    time, with the same requests: rank 0 takes them and gives the answers, the others serve along and give none.

    `setting` says in one line what is used, and why nothing faster. `timeline` is that of the last run, with the lanes
    "host" (plan, launch, wait, commit) and "compute" (step).

    Raises ModelError for a model that cannot be served, ValueError for settings that make no sense or are not possible
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
        check_decoder(model)
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
        self.attention, reason = choose_attention(attention, self.device)
        if self.attention == "flash_attention_2" and block_size % 256:
            raise ValueError(f"block_size is {block_size}: flash_attn allows multiples of 256")

        self.model, self.mode = model, mode
        self.max_batch_size, self.max_length, self.vocab_size = max_batch_size, max_length, config.vocab_size
        self.timeline = self._new_timeline()
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # kept from run to run
        self._closed = ""

        # A sequence can become one token longer than allowed: async learns one step late that a request has ended.
        blocks_each = blocks_for(max_length + 1, block_size)
        num_blocks = max_batch_size * blocks_each
        if prefill_tokens is None:
            prefill_tokens = 256 if self.attention == "sdpa" else 1024
        heads, _ = kv_heads_and_dim(config)
        heads //= ranks_of(model)
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
            # The static input tensors have this size. So have the list of carry-over ids, which async builds anew in
            # Python in each step, and with sdpa the attention mask [prefill tokens, all tokens of the cache], which
            # async copies to the device in each step. So it is what prompts need to be computed well, and not 8192.
            "max_batch_tokens": min(self.max_batch_size + prefill_tokens, num_blocks * block_size),
            # A decode step is padded to a power of 2 rows, but to no more than this. So full batches are not padded.
            "max_requests_per_batch": self.max_batch_size,
            # By default new requests wait while less than 15 % of the cache is free. Here it has room for all of them.
            "safety_margin": 0.0,
            # To share the blocks of equal prompts, full blocks are hashed, which takes host time. This package does not
            # share blocks either.
            "allow_block_sharing": False,
            "use_async_batching": self.mode == "async",
            # None leaves the choice to transformers. With sdpa it uses no graphs: they would pad the keys and the mask
            # to thousands of tokens.
            "use_cuda_graph": True if self.on_cuda and flash else None,
            "default_compile_level": compile_level,
            # Blocks in a row of the block table. A request with more would not be on the fast path for decoding.
            "max_blocks_per_request": blocks_each if self.on_cuda and flash else None,
            # Tokens in a block: called block_size until it became page_size.
            "page_size" if "page_size" in known else "block_size": block_size,
        }
        if "auto_switch_to_flash" in known:
            options["auto_switch_to_flash"] = False  # the attention has been chosen already
        if missing := sorted(set(options) - known):
            raise unknown_version(f"its ContinuousBatchingConfig has no {', '.join(missing)}")
        generation = GenerationConfig(do_sample=False, eos_token_id=-1)  # -1: none; each request brings its own
        manager = self.model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=ContinuousBatchingConfig(**options)
        )
        for name in ("warmup", "start", "stop", "destroy", "add_request", "get_result", "is_running"):
            part(manager, name)
        resolved = part(manager, "continuous_batching_config")
        if self.attention == "stand-in":
            # transformers allows the fast path on CUDA only; the stand-in has it everywhere, so that a CPU can test it.
            resolved.max_blocks_per_request = blocks_each
        return manager

    @property
    def leads(self) -> bool:
        """Whether the requests are given to this rank; true of the only one."""
        return getattr(self.manager, "is_tp_driver", True)

    # ---- for callers -----------------------------------------------------------------------------------------

    def run(
        self, requests: list[Request], progress: bool = False, arrivals_s: Sequence[float] | None = None
    ) -> list[Completion]:
        """Serve all requests and return their completions, in the order of the requests. Starts a new `timeline`.

        arrivals_s: seconds from the beginning at which each request arrives (`workload.serve`); None: all at once.
        Raises RequestError (a ValueError), before anything is computed, for a request that cannot be served: it
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
                session = self._serve(requests, stops, progress, arrivals_s, order)
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt):
                self._closed = f"the batcher failed: {error}"
            raise
        session.recorder.finish()
        if not self.leads:
            return []
        return [session.completion(*each) for each in zip(range(len(requests)), requests, stops, strict=True)]

    def close(self) -> None:
        """Free the device's memory. A closed batcher takes no more requests."""
        if self.manager is not None:
            self._closed = self._closed or "the batcher is closed"
            self.manager.destroy()
            self.manager = None
            self._events.clear()
            gc.collect()  # the manager's objects refer to each other, and they hold the graphs and the cache
            if self.on_cuda:
                torch.cuda.empty_cache()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- behind them -----------------------------------------------------------------------------------------

    def _serve(self, requests, stops, progress, arrivals_s, order) -> _Session:
        """Serve the requests, submitted in this order of their indices. The session has all of their outputs."""
        manager, processor = self.manager, self.manager.batch_processor
        if processor is None:
            raise unknown_version("its manager has no batch_processor after warmup()")
        recorder = StepRecorder(self.timeline, processor, self.device, self.mode, self._events)
        bar = tqdm(total=len(requests), unit=" requests", leave=False, disable=not progress)
        session = _Session(manager, recorder, bar)
        while manager.get_result(timeout=0) is not None:
            pass  # left over from a run that was interrupted
        with recorder.hooks():
            manager.start()
            if not self.leads:
                session.follow()
                return session
            hard_stop = True
            try:
                start_s = time.perf_counter()
                for index in order:
                    if arrivals_s is not None:
                        session.serve_until(start_s + arrivals_s[index])
                    submitted_s = time.perf_counter() if arrivals_s is None else start_s + arrivals_s[index]
                    session.submit(index, requests[index], stops[index], submitted_s)
                recorder.ready.set()  # without arrivals, the loop plans its first batch only now, with all requests
                while len(session.outputs) < len(requests):
                    session.collect(timeout_s=1)
                recorder.all_answered = True
                hard_stop = False
            finally:
                recorder.ready.set()
                bar.close()
                # "keep" keeps the cache and the graphs for the next run. It also puts the manager on the model, from
                # where `_borrowed_model` takes it away again.
                manager.stop(block=True, keep_for_next_session=True, hard_stop=hard_stop)
        return session

    def _check(self, request: Request) -> frozenset[int]:
        """RequestError unless `request` can be served. Returns its stop tokens."""
        limited_by = f"max_length={self.max_length}"
        tokenizer = object()  # any object will do: stop strings are refused just below
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
        """Within this context, the model has the paged attention and is in eval mode. Afterwards all is as before."""
        model, cached = self.model, vars(self.model).pop(CACHED, None)
        training = [module for module in model.modules() if module.training]
        before = model.config._attn_implementation
        with contextlib.ExitStack() as stack:
            try:
                name = paged_name(self.attention)
                if self._stand_in is not None:
                    name = stack.enter_context(in_place_of_flash_attn(self._stand_in))
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
            *([f"{ranks_of(self.model)} ranks"] if ranks_of(self.model) > 1 else []),
            f"blocks of {block_size}",
            self.mode,
        ]
        return ", ".join(parts)


def ranks_of(model) -> int:
    """How many ranks share a model's weights."""
    meshes = (parameter.device_mesh for parameter in model.parameters() if hasattr(parameter, "device_mesh"))
    return next((mesh.size() for mesh in meshes), 1)


class _Session:
    """One run of transformers' manager: requests go in, outputs are collected. Requests have their index as their id.

    `outputs`: those that are finished, by id. `submitted_s`: when each request arrived, by id."""

    def __init__(self, manager, recorder: StepRecorder, bar: tqdm):
        self.manager, self.recorder, self.bar = manager, recorder, bar
        self.outputs: dict[str, Any] = {}
        self.submitted_s: dict[str, float] = {}

    def submit(self, index: int, request: Request, stop: frozenset[int], submitted_s: float) -> None:
        self.submitted_s[str(index)] = submitted_s
        request_id = self.manager.add_request(
            [int(token) for token in request.token_ids],
            request_id=str(index),
            max_new_tokens=request.max_new_tokens,
            eos_token_id=sorted(stop) if stop else -1,
        )
        if request_id is None:
            raise RuntimeError("transformers did not take a request: its manager is stopping")

    def collect(self, timeout_s: float) -> None:
        """Take one output, if one comes within this time."""
        output = self.manager.get_result(timeout=timeout_s)
        if output is not None and (output.is_finished() or output.error is not None):
            self.outputs[output.request_id] = output
            self.bar.update(1)
        elif output is None and not self.manager.is_running():
            raise RuntimeError("the loop of transformers ended early; it has logged why")

    def follow(self) -> None:
        """Serve along, on a rank that takes no requests, until the leader's loop stops."""
        self.recorder.ready.set()
        while self.manager.is_running():
            self.manager.get_result(timeout=PAUSE_S)  # rank 0 has the same, and gives it
        self.manager.stop(block=True, keep_for_next_session=True)

    def serve_until(self, due_s: float) -> None:
        """Until then the loop serves the requests that have arrived."""
        while (now := time.perf_counter()) < due_s:
            self.recorder.ready.set()
            if len(self.outputs) < len(self.submitted_s):
                self.collect(due_s - now)
            else:
                time.sleep(due_s - now)
                self.recorder.timeline.add(*NO_REQUEST_SPAN, now, time.perf_counter())

    def completion(self, index: int, request: Request, stop: frozenset[int]) -> Completion:
        """The answer to a request whose output is there."""
        output, submitted_s = self.outputs[str(index)], self.submitted_s[str(index)]
        tokens = [int(token) for token in output.generated_tokens]
        reason = None if output.error else finish_reason(tokens, request.max_new_tokens, stop)
        problem = None
        if reason is None:
            problem = RuntimeError(f"transformers gave up request {index}: {output.error or 'no reason given'}")
        first_s = self.recorder.first_token_s.get(str(index))
        return Completion(tokens, reason or "error", problem, submitted_s, first_s, output.lifespan[1])

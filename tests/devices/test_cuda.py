"""The same promises on CUDA's own streams and events: `python -m pytest -m cuda`, without anything of Jupyter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_model

from asyncbatch import AsyncBatcher, Request, SamplingParams, SyncBatcher, load_model
from asyncbatch.attention import NAME
from asyncbatch.devices import open_program
from asyncbatch.devices.cuda import device as cuda_device
from asyncbatch.measure import points_of, record_points
from asyncbatch.measure.points import DEVICE_LANE, PARTS

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPTIONS = dict(max_batch_size=4, block_size=4, prefill_tokens=16, max_length=64)


def workload(vocab_size: int, count: int = 11):
    """Different lengths, greedy and sampled, some with stop tokens."""
    generator = torch.Generator().manual_seed(5)
    requests = []
    for n in range(count):
        prompt = torch.randint(vocab_size, (1 + 5 * n % 37,), generator=generator).tolist()
        stop = torch.randint(vocab_size, (vocab_size // 8,), generator=generator).tolist() if n % 2 else ()
        sampling = SamplingParams(temperature=0.9, top_k=40, top_p=0.9, seed=n) if n % 3 else SamplingParams()
        requests.append(Request(prompt, 5 + n, sampling, stop_token_ids=stop))
    return requests


@pytest.fixture(scope="module", params=["tiny", "random:llama-1b"])
def model(request):
    if request.param == "tiny":
        return tiny_model("cuda")
    return load_model(request.param, device="cuda")[0]


@pytest.mark.parametrize(("num_blocks", "compile"), [(64, False), (14, False), (14, True)])
def test_sync_and_async_give_the_tokens_that_each_request_gets_alone(model, num_blocks, compile):
    """Bit for bit, in bfloat16 too, with and without preemption, compiled and not."""
    requests = workload(model.config.vocab_size)
    options = {**OPTIONS, "compile": compile}
    with SyncBatcher(model, **options) as batcher:
        alone = [batcher.run([request])[0] for request in requests]
    assert [c.error for c in alone] == [None] * len(requests)
    assert {c.finish_reason for c in alone} == {"stop", "length"}
    for batcher_class, num_slots in ((SyncBatcher, 1), (AsyncBatcher, 2), (AsyncBatcher, 3)):
        with batcher_class(model, num_slots=num_slots, num_blocks=num_blocks, **options) as batcher:
            together = batcher.run(requests)
            assert [c.error for c in together] == [None] * len(requests)
            assert [c.token_ids for c in together] == [c.token_ids for c in alone]
            assert len(batcher.device.program.graphs) == 6 * num_slots
            assert batcher.kv.num_free == num_blocks
            assert batcher.timeline.clock == "cuda"


def test_prefill_sizes_change_no_token_whoever_shares_the_step(model):
    """Chunks of several sizes, alone and among others, whichever loop, slots and pool."""
    vocabulary, generator = model.config.vocab_size, torch.Generator().manual_seed(7)
    lengths = [3, 9, 16, 17, 30, 33, 40, 12, 5]
    prompts = [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    requests = [Request(prompt, 12, stop_token_ids=()) for prompt in prompts]
    options = {**OPTIONS, "prefill_tokens": (8, 16, 32)}
    with SyncBatcher(model, **options) as batcher:
        alone = [batcher.run([request])[0].token_ids for request in requests]
        kinds = {(kind.passes, kind.tokens) for _, kind in batcher.device.program.graphs}
    assert kinds == {("decode", 0), *((passes, size) for passes in ("prefill", "mixed") for size in (8, 16, 32))}
    for batcher_class, slots, blocks in ((SyncBatcher, 1, 64), (AsyncBatcher, 2, 64), (AsyncBatcher, 3, 18)):
        with batcher_class(model, num_slots=slots, num_blocks=blocks, **options) as batcher:
            assert [c.token_ids for c in batcher.run(requests)] == alone


def test_two_batchers_whose_steps_run_at_the_same_time_do_not_disturb_each_other():
    """They have everything on the device to themselves, cuBLAS's workspace too. Where they shared it the GPU hung."""
    model = load_model("random:llama-0.6b", device="cuda")[0]
    requests = [Request([1 + n] * 16, 96, stop_token_ids=()) for n in range(32)]
    options = dict(max_batch_size=32, max_length=128, compile=True)
    with AsyncBatcher(model, **options) as one, AsyncBatcher(model, **options) as other:
        alone = [c.token_ids for c in one.run(requests)]
        handles = [[batcher.submit(request) for request in requests] for batcher in (one, other)]
        while any(handle.completion is None for handle in handles[0] + handles[1]):
            one.turn()
            other.turn()
        for own in handles:
            assert [handle.token_ids for handle in own] == alone


@pytest.mark.parametrize("compile", [False, True])
def test_greedy_tokens_equal_generate(compile):
    model = tiny_model("cuda")
    prompts = [list(range(n, n + 3 + n % 5)) for n in range(1, 12)]
    with AsyncBatcher(model, compile=compile, **OPTIONS) as batcher:
        completions = batcher.run([Request(p, 20, stop_token_ids=()) for p in prompts])
        assert [c.error for c in completions] == [None] * len(prompts)
        ours = [c.token_ids for c in completions]
    implementation = model.config._attn_implementation
    for prompt, tokens in zip(prompts, ours, strict=True):
        output = model.generate(torch.tensor([prompt], device="cuda"), max_new_tokens=20, do_sample=False)
        assert tokens == output[0, len(prompt) :].tolist()
    assert implementation != NAME  # the caller's model is as it was


@pytest.mark.parametrize("batcher_class", [SyncBatcher, AsyncBatcher])
def test_nothing_in_the_loop_makes_the_host_wait_but_the_one_event(model, batcher_class, monkeypatch):
    """torch raises at any hidden synchronization (`.item()`, pageable copies) while the mode is "error"."""
    requests = workload(model.config.vocab_size, 6)
    with batcher_class(model, **OPTIONS) as batcher:
        batcher.run(requests)
        waits = []
        wait = batcher.wait
        monkeypatch.setattr(batcher, "wait", lambda slot: (waits.append(slot.step), wait(slot)))
        torch.cuda.set_sync_debug_mode("error")
        try:
            completions = batcher.run(requests)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert [c.error for c in completions] == [None] * len(requests)
        assert waits == list(range(batcher.timeline.summary().steps))


@pytest.mark.parametrize(("batcher_class", "slots"), [(SyncBatcher, 1), (SyncBatcher, 2), (AsyncBatcher, 2)])
def test_the_device_spans_lie_on_the_hosts_clock_and_in_order(model, batcher_class, slots, monkeypatch):
    monkeypatch.setattr(cuda_device, "ORIGIN_S", 0.002)  # the origin moves every few steps
    with batcher_class(model, num_slots=slots, **OPTIONS) as batcher:
        batcher.run(workload(model.config.vocab_size, 8))
        spans = {(lane, step): (start, end) for lane, _, step, start, end in batcher.timeline.spans if lane != "host"}
        host = {(name, step): (start, end) for lane, name, step, start, end in batcher.timeline.spans if lane == "host"}
        steps = batcher.timeline.summary().steps
    slack = 2e-4  # seconds: the event clock and the host's are tied together once, at the start
    for step in range(steps):
        copy_in, compute, copy_out = (spans[lane, step] for lane in ("H2D", "compute", "D2H"))
        assert host["launch", step][0] <= copy_in[0] + slack
        assert copy_in[1] <= compute[0] + 1e-5
        assert compute[1] <= copy_out[0] + 1e-5
        assert copy_out[1] <= host["wait", step][1] + slack
        assert step == 0 or spans["compute", step - 1][1] <= compute[0] + 1e-5


@pytest.mark.parametrize("batcher_class", [SyncBatcher, AsyncBatcher])
def test_the_parts_of_a_step_are_told_apart_inside_its_graph(model, batcher_class, monkeypatch):
    monkeypatch.setattr(cuda_device, "ORIGIN_S", 0.002)
    with batcher_class(model, parts=True, **OPTIONS) as batcher:
        assert batcher.device.program.graphs
        batcher.run(workload(model.config.vocab_size, 8))  # other steps have used the same events
        with record_points(batcher):
            batcher.run(workload(model.config.vocab_size, 8))
        steps = {step: end - start for lane, _, step, start, end in batcher.timeline.spans if lane == "compute"}
        parts = {step: {} for step in steps}
        for lane, name, step, start, end in batcher.timeline.spans:
            if lane == DEVICE_LANE:
                parts[step][name] = end - start
        medians = {point.name: point.median_ms for point in points_of(batcher.timeline) if point.where == "device"}
    for step, seconds in steps.items():
        assert tuple(parts[step]) == PARTS
        assert sum(parts[step].values()) == pytest.approx(seconds, abs=2e-6)
    assert set(medians) == {"copy in", *PARTS, "copy out"}
    assert medians["carry-over"] < medians["forward"]
    with batcher_class(model, **OPTIONS) as batcher, record_points(batcher):
        batcher.run(workload(model.config.vocab_size, 2))
        assert {p.name for p in points_of(batcher.timeline) if p.where == "device"} == {"copy in", "step", "copy out"}


class Writes:
    """`one` and `two` write a number on the device after some long work; `get` copies it to pinned host memory."""

    def __init__(self, model, *, host):
        self.host, self.data = host, torch.zeros(1, device="cuda")
        self.matrix = torch.randn(8192, 8192, device="cuda")

    def run(self, command, slot):
        if command == "get":
            self.host.copy_(self.data, non_blocking=True)
        else:
            for _ in range(10):
                self.matrix @ self.matrix
            self.data.fill_({"one": 1.0, "two": 2.0}[command])


def test_an_event_orders_two_streams_and_without_it_the_copy_comes_too_early():
    host = torch.zeros(1).pin_memory()
    device = open_program(tiny_model("cuda"), Writes, num_slots=2, host=host)
    _, compute, copies = device.streams
    event = device.event()
    for command in ("one", "two"):  # the first time kernels are loaded, which can wait for the device
        compute.launch(command, 0)
        copies.launch("get", 1)
        compute.synchronize()
        copies.synchronize()
    compute.launch("one", 0)
    copies.launch("get", 1)
    copies.synchronize()
    assert float(host) == 2.0  # no wait, so it saw what was there before
    compute.synchronize()
    compute.launch("two", 0)
    compute.record_event(event)
    copies.wait_event(event)
    copies.launch("get", 1)
    copies.synchronize()
    assert float(host) == 2.0
    assert event.query()
    device.close()


@pytest.mark.parametrize("batcher_class", [SyncBatcher, AsyncBatcher])
def test_a_step_that_fails_fails_its_requests_and_leaves_a_usable_batcher(batcher_class, monkeypatch):
    model = tiny_model("cuda")
    request = Request([1, 2], 8, stop_token_ids=())
    with batcher_class(model, **OPTIONS) as batcher:
        expected = batcher.run([request])[0].token_ids
        assert len(expected) == 8
        original = type(batcher).launch

        def launch(slot):
            if slot.step == 2:
                slot.command = "nonsense/greedy/extra"
            original(batcher, slot)

        monkeypatch.setattr(batcher, "launch", launch)
        completion = batcher.run([request])[0]
        assert completion.finish_reason == "error"
        assert "failed on the device" in str(completion.error)
        assert batcher.kv.num_free == batcher.kv.num_blocks
        monkeypatch.undo()
        assert batcher.run([request])[0].token_ids == expected


def test_small_steps_have_graphs_of_their_own():
    model = tiny_model("cuda")
    requests = workload(model.config.vocab_size)
    with AsyncBatcher(model, batch_sizes=(1, 2), **OPTIONS) as batcher:
        graphs = batcher.device.program.graphs
        assert {kind.rows for _, kind in graphs} == {1, 2, 4}
        used = set()
        launch = batcher.launch
        batcher.launch = lambda slot: (used.add(slot.command), launch(slot))
        completions = batcher.run(requests)
    assert [c.error for c in completions] == [None] * len(requests)
    assert {kind.rows for kind in used} == {1, 2, 4}
    with pytest.raises(ValueError, match="batch_sizes"):
        AsyncBatcher(model, batch_sizes=(1, 8), **OPTIONS)


def test_a_pool_that_does_not_fit_is_refused_with_the_numbers_and_a_default_one_fits():
    model = tiny_model("cuda")
    free, _ = torch.cuda.mem_get_info()
    block = 2 * 2 * 2 * 4 * 8 * 4  # keys and values, layers, heads, tokens, dim, bytes
    with pytest.raises(MemoryError, match=f"num_blocks is {free // block}: .* GiB .* at most "):
        SyncBatcher(model, num_blocks=free // block, **OPTIONS)
    with SyncBatcher(model, **OPTIONS) as batcher:
        assert batcher.kv.num_blocks == 4 * 16


def test_out_of_memory_in_a_step_fails_its_requests_and_leaves_a_usable_batcher(monkeypatch):
    model = tiny_model("cuda")
    request = Request([1, 2], 8, stop_token_ids=())
    with AsyncBatcher(model, **OPTIONS) as batcher:
        expected = batcher.run([request])[0].token_ids
        program = batcher.device.program
        run, commands = program.run, []

        def greedy_run(command, slot):
            commands.append(command)
            if getattr(command, "passes", "") == "decode" and len(commands) > 8:
                torch.empty(2**50, device="cuda")
            run(command, slot)

        monkeypatch.setattr(program, "run", greedy_run)
        completion = batcher.run([request])[0]
        assert completion.finish_reason == "error"
        assert "out of memory" in str(completion.error)
        assert completion.token_ids == expected[: len(completion.token_ids)]
        assert batcher.kv.num_free == batcher.kv.num_blocks
        monkeypatch.undo()
        assert batcher.run([request])[0].token_ids == expected


BROKEN = """
import torch
from support.tiny import tiny_model
from asyncbatch import AsyncBatcher, Request, SyncBatcher
from asyncbatch.request import RequestError

model = tiny_model("cuda")
for batcher_class in (MODE,):
    batcher = batcher_class(model, max_batch_size=4, block_size=4, prefill_tokens=16, max_length=64)
    requests = [Request([1, 2, n], 9, stop_token_ids=()) for n in range(6)]
    run, program, count = batcher.device.program.run, batcher.device.program, []
    def breaking(command, slot):
        count.append(command)
        if len(count) == 14:  # an index beyond the end: found on the device, later
            torch.zeros(3, device="cuda")[torch.full((2,), 10**6, device="cuda")]
        run(command, slot)
    program.run = breaking
    completions = batcher.run(requests)
    assert [c.finish_reason for c in completions] == ["error"] * 6, completions
    assert all("Start Python" in str(c.error) for c in completions), completions[0].error
    assert batcher.kv.num_free == batcher.kv.num_blocks
    try:
        batcher.run(requests)
    except RequestError as error:
        assert "lost its device" in str(error)
    else:
        raise AssertionError("a batcher without a device took requests")
    batcher.close()
print("as it should be")
"""


@pytest.mark.parametrize("mode", ["SyncBatcher", "AsyncBatcher"])
def test_an_error_of_cuda_ends_every_request_with_it_and_the_batcher_says_that_it_is_lost(mode):
    here = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    command = [sys.executable, "-c", BROKEN.replace("MODE", mode)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "as it should be" in done.stdout


def test_the_sanitizer_finds_no_missing_wait():
    """TORCH_CUDA_SANITIZER sees device tensors, not host buffers and graphs: so without graphs here."""
    here = Path(__file__).parents[1]
    script = """
from asyncbatch.devices.cuda.runner import CudaRunner
CudaRunner._capture = lambda self: {}
from support.tiny import tiny_model
from asyncbatch import AsyncBatcher, Request
with AsyncBatcher(tiny_model("cuda"), max_batch_size=4, block_size=4, prefill_tokens=16, max_length=64) as batcher:
    done = batcher.run([Request([1, 2, n], 9, stop_token_ids=()) for n in range(6)])
assert [len(c.token_ids) for c in done] == [9] * 6, done
"""
    path = os.pathsep.join([str(here), str(here.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "TORCH_CUDA_SANITIZER": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "CSAN" not in done.stderr, done.stderr[-3000:]
    assert "data race" not in done.stderr, done.stderr[-3000:]

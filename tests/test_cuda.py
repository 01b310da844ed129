"""The same promises on CUDA's own streams and events. Where only torch, transformers and pytest are installed:

python -m pytest -c /dev/null --rootdir . --noconftest tests/test_cuda.py
"""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from asyncbatch import AsyncBatcher, Request, SamplingParams, SyncBatcher, load_model
from asyncbatch.attention import NAME
from asyncbatch.streams import open_device

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


@pytest.mark.parametrize("num_blocks", [64, 14])
def test_sync_and_async_give_the_tokens_that_each_request_gets_alone(model, num_blocks):
    """Bit for bit, in bfloat16 too, with and without preemption."""
    requests = workload(model.config.vocab_size)
    with SyncBatcher(model, **OPTIONS) as batcher:
        alone = [batcher.run([request])[0] for request in requests]
    assert [c.error for c in alone] == [None] * len(requests)
    assert {c.finish_reason for c in alone} == {"stop", "length"}
    for batcher_class, num_slots in ((SyncBatcher, 1), (AsyncBatcher, 2), (AsyncBatcher, 3)):
        with batcher_class(model, num_slots=num_slots, num_blocks=num_blocks, **OPTIONS) as batcher:
            together = batcher.run(requests)
            assert [c.error for c in together] == [None] * len(requests)
            assert [c.token_ids for c in together] == [c.token_ids for c in alone]
            assert len(batcher.device.program.graphs) == 6 * num_slots
            assert batcher.kv.num_free == num_blocks
            assert batcher.timeline.clock == "cuda"


def test_greedy_tokens_equal_generate():
    model = tiny_model("cuda")
    prompts = [list(range(n, n + 3 + n % 5)) for n in range(1, 12)]
    with AsyncBatcher(model, **OPTIONS) as batcher:
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


def test_the_device_spans_lie_on_the_hosts_clock_and_in_order(model):
    with AsyncBatcher(model, **OPTIONS) as batcher:
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
    device = open_device(tiny_model("cuda"), Writes, num_slots=2, host=host)
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

"""The promise of the package: both loops give each request the tokens that it gets alone, bit for bit."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.serving import OPTIONS, alone, requests
from support.tiny import tiny_model

from asyncbatch import AsyncBatcher, Request, SyncBatcher, load_model
from asyncbatch.config import Config
from asyncbatch.devices.virtual import Costs
from asyncbatch.request import RequestError


@settings(max_examples=40, deadline=None)
@given(
    st.lists(requests, min_size=1, max_size=7),
    st.sampled_from([(SyncBatcher, 1), (AsyncBatcher, 1), (AsyncBatcher, 2), (AsyncBatcher, 3)]),
    st.integers(0, 8),
)
def test_every_request_gets_its_own_tokens_bit_for_bit_and_every_block_comes_back(workload, kind, spare):
    """Greedy and sampled, stops anywhere, and a pool so small that requests are preempted and computed again."""
    batcher_class, num_slots = kind
    num_blocks = max(-(-(len(r.token_ids) + r.max_new_tokens) // 4) for r in workload) + spare
    with batcher_class(tiny_model(), num_slots=num_slots, num_blocks=num_blocks, **OPTIONS) as batcher:
        together = batcher.run(workload)
        assert batcher.kv.num_free == num_blocks
        summary = batcher.timeline.summary()
    assert [c.error for c in together] == [None] * len(workload)
    expected = [alone(request) for request in workload]
    assert [c.token_ids for c in together] == [c.token_ids for c in expected]
    assert [c.finish_reason for c in together] == [c.finish_reason for c in expected]
    early = sum(
        c.finish_reason == "stop" and len(c.token_ids) < r.max_new_tokens
        for c, r in zip(together, workload, strict=True)
    )
    assert summary.wasted_tokens <= early * (num_slots - 1)
    assert summary.tokens == sum(len(c.token_ids) for c in together)


def test_preemption_happens_and_changes_nothing():
    workload = [Request([n] * 6, 20, stop_token_ids=()) for n in range(1, 4)]
    with AsyncBatcher(tiny_model(), num_blocks=12, **OPTIONS) as batcher:
        handles = [batcher.submit(request) for request in workload]
        together = [handle.result() for handle in handles]
        assert sum(handle._state.num_preemptions for handle in handles) > 0
    assert [c.token_ids for c in together] == [alone(request).token_ids for request in workload]


def test_greedy_tokens_equal_generate():
    model = tiny_model()
    prompts = [list(range(n, n + 3 + n % 5)) for n in range(1, 12)]
    with AsyncBatcher(model, **OPTIONS) as batcher:
        ours = [c.token_ids for c in batcher.run([Request(p, 20, stop_token_ids=()) for p in prompts])]
    for prompt, tokens in zip(prompts, ours, strict=True):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
        assert tokens == theirs
    assert len({tuple(tokens) for tokens in ours}) > 5  # the model does not say the same to everything


THINGS = "gravity|a prime number|an island|the sea|a library|rain|a queue|ice|a novel|the moon".split("|")  # noqa: SIM905
PROMPTS = [f"What is {thing}?" for thing in THINGS] + [f"Write a sentence about {thing}." for thing in THINGS]


def test_the_embedded_model_writes_what_transformers_generate_writes():
    """Greedy, 20 prompts. Where they part, the two best logits must be nearly equal: other shapes round differently."""
    model, tokenizer = load_model()
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, return_dict=False)
        for p in PROMPTS
    ]
    with AsyncBatcher(model, max_batch_size=8) as batcher:
        ours = batcher.run([Request(ids, 12) for ids in chats])
    padded = tokenizer.pad({"input_ids": chats}, padding_side="left", return_tensors="pt")
    output = model.generate(
        **padded, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    near_ties = 0
    for row, completion in enumerate(ours):
        theirs = output.sequences[row, padded["input_ids"].shape[1] :].tolist()
        theirs = theirs[: theirs.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in theirs else theirs
        if completion.token_ids != theirs:
            place = next(i for i, (a, b) in enumerate(zip(completion.token_ids, theirs, strict=False)) if a != b)
            logits = output.logits[place][row]
            assert abs(logits[completion.token_ids[place]] - logits[theirs[place]]) < 1e-3
            near_ties += 1
    assert near_ties <= 2


# ---- what a caller can do --------------------------------------------------------------------------------------------


@pytest.fixture(params=[SyncBatcher, AsyncBatcher])
def batcher(request):
    with request.param(tiny_model(), **OPTIONS) as batcher:
        yield batcher


def test_a_bad_request_fails_alone(batcher):
    good = Request([1, 2, 3], 5, stop_token_ids=())
    completions = batcher.run([good, Request([]), Request([1], 500), "text", good])
    assert [c.finish_reason for c in completions] == ["length", "error", "error", "error", "length"]
    assert isinstance(completions[1].error, RequestError)
    assert "at most 64 fit (max_length=64)" in str(completions[2].error)
    assert completions[0].token_ids == completions[4].token_ids == alone(good).token_ids
    with pytest.raises(RequestError, match="empty"):
        batcher.submit(Request([]))


def test_stream_gives_the_same_tokens_as_they_come(batcher):
    request = Request([5, 6, 7], 9, stop_token_ids=())
    other = batcher.submit(Request([8] * 10, 4, stop_token_ids=()))
    tokens, lengths = [], []
    for token in batcher.stream(request):
        tokens.append(token)
        lengths.append(len(other.token_ids))
    assert tokens == alone(request).token_ids
    assert lengths[0] < lengths[-1] == 4  # the other request was served meanwhile


def test_leaving_a_stream_cancels_its_request(batcher):
    stream = batcher.stream(Request([5, 6, 7], 40, stop_token_ids=()))
    next(stream)
    stream.close()
    other = Request([1], 5, stop_token_ids=())
    assert batcher.run([other])[0].token_ids == alone(other).token_ids
    assert batcher.kv.num_free == batcher.kv.num_blocks
    with pytest.raises(RequestError, match="empty"):
        batcher.stream(Request([]))


def test_cancel_keeps_what_was_generated(batcher):
    handle = batcher.submit(Request([5, 6, 7], 40, stop_token_ids=()))
    while len(handle.token_ids) < 4:
        batcher._turn()
    assert batcher.cancel(handle)
    completion = handle.result()
    assert completion.finish_reason == "cancelled"
    assert (
        completion.token_ids == alone(Request([5, 6, 7], 40, stop_token_ids=())).token_ids[: len(completion.token_ids)]
    )
    assert not batcher.cancel(handle)
    with pytest.raises(RequestError, match="cancel takes a handle"):
        batcher.cancel("first")


def test_a_request_cancelled_before_it_started_has_no_tokens(batcher):
    handle = batcher.submit(Request([5], 40))
    batcher.cancel(handle)
    batcher.cancel(handle)
    assert handle.result().finish_reason == "cancelled"
    assert handle.result().token_ids == []
    assert handle.result().first_token_s is None


def test_requests_may_come_from_other_threads(batcher):
    workload = [Request([n, n + 1], 6, stop_token_ids=()) for n in range(8)]
    results = {}

    def serve(n):
        results[n] = batcher.submit(workload[n]).result()

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)
    assert [results[n].token_ids for n in range(8)] == [alone(request).token_ids for request in workload]


class _Letters:
    def decode(self, ids):
        return "".join(chr(33 + i) for i in ids)


@pytest.mark.parametrize("batcher_class", [SyncBatcher, AsyncBatcher])
def test_a_stop_string_ends_a_request_with_the_token_that_completes_it(batcher_class):
    request = Request([5, 6, 7], 20, stop_token_ids=())
    text = _Letters().decode(alone(request).token_ids)
    stop = text[7:10]
    end = text.index(stop) + 3
    with batcher_class(tiny_model(), tokenizer=_Letters(), **OPTIONS) as batcher:
        completion = batcher.run([Request([5, 6, 7], 20, stop_token_ids=(), stop_strings=["~~~~", stop])])[0]
    assert completion.finish_reason == "stop"
    assert _Letters().decode(completion.token_ids) == text[:end]


def test_times_are_in_order(batcher):
    completion = batcher.run([Request([1, 2], 5, stop_token_ids=())])[0]
    assert completion.submitted_s < completion.first_token_s < completion.finished_s


def test_a_closed_batcher_says_so_and_ends_what_was_under_way():
    batcher = AsyncBatcher(tiny_model(), **OPTIONS)
    handle = batcher.submit(Request([1, 2], 30, stop_token_ids=()))
    batcher._turn()
    batcher.close()
    batcher.close()
    assert handle.completion.finish_reason == "cancelled"
    for use in (lambda: batcher.submit(Request([1])), lambda: batcher.run([Request([1])])):
        with pytest.raises(RequestError, match="closed"):
            use()


def test_an_interrupt_ends_everything_and_leaves_a_usable_batcher(batcher, monkeypatch):
    request = Request([1, 2], 8, stop_token_ids=())
    calls = []

    def interrupted(slot):
        calls.append(slot)
        raise KeyboardInterrupt

    monkeypatch.setattr(batcher, "launch", interrupted)
    handle = batcher.submit(request)
    with pytest.raises(KeyboardInterrupt):
        batcher.run([request])
    monkeypatch.undo()
    assert calls
    assert handle.completion.finish_reason == "cancelled"
    assert batcher.kv.num_free == batcher.kv.num_blocks
    assert batcher.run([request])[0].token_ids == alone(request).token_ids


def test_a_step_that_fails_on_the_device_fails_its_requests_and_no_others(batcher, monkeypatch):
    original = type(batcher).launch
    failing = []

    def launch(slot):
        if slot.step == 2:
            slot.command = "nonsense/greedy/extra"
            failing.extend(row.state.number for row in slot.plan.rows)
        original(batcher, slot)

    monkeypatch.setattr(batcher, "launch", launch)
    workload = [Request([n, n + 1], 10, stop_token_ids=()) for n in range(1, 8)]
    completions = batcher.run(workload)
    assert failing
    for number, (completion, request) in enumerate(zip(completions, workload, strict=True)):
        if number in failing:
            assert completion.finish_reason == "error"
            assert "failed on the device" in str(completion.error)
        else:
            assert completion.token_ids == alone(request).token_ids
    assert batcher.kv.num_free == batcher.kv.num_blocks


def test_a_device_that_dies_ends_all_requests_with_the_error_and_the_next_batcher_gets_a_new_one(monkeypatch):
    model = copy.deepcopy(tiny_model())  # with a device process of its own
    request = Request([1, 2], 8, stop_token_ids=())
    batcher = AsyncBatcher(model, **OPTIONS)
    launch = batcher.launch

    def dying(slot):
        if slot.step == 3:
            batcher.device.process.process.kill()
        launch(slot)

    monkeypatch.setattr(batcher, "launch", dying)
    completions = batcher.run([request, request])
    assert [c.finish_reason for c in completions] == ["error", "error"]
    assert "device process ended" in str(completions[0].error)
    with pytest.raises(RequestError, match="lost its device"):
        batcher.submit(request)
    batcher.close()
    with SyncBatcher(model, **OPTIONS) as other:
        assert other.run([request])[0].token_ids == alone(request).token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_batch_size=0), "max_batch_size is 0"),
        (dict(num_slots=0), "num_slots is 0"),
        (dict(block_size=-1), "block_size is -1"),
        (dict(num_blocks=2.5), "num_blocks is 2.5"),
        (dict(max_length=100_000), "max_length is 100000: the model allows at most 256"),
        (dict(prefill_tokens="x"), "prefill_tokens is 'x'"),
        (dict(host_work_s=-1), "host_work_s is -1"),
        (dict(step_s=float("nan")), "step_s is nan"),
        (dict(clock=Costs), "clock is <class"),
        (dict(batch_sizes=iter((1, 9))), r"batch_sizes is \(1, 9\)"),
    ],
)
def test_limits_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AsyncBatcher(tiny_model(), **options)


@pytest.mark.parametrize("leave", ["close the stream", "drop the stream", "cancel the handle"])
@pytest.mark.parametrize("kind", [SyncBatcher, AsyncBatcher])
def test_a_run_after_somebody_left_begins_a_new_timeline(kind, leave):
    request = Request([1, 2, 3], 12, stop_token_ids=())
    with kind(tiny_model(), **OPTIONS) as batcher:
        stream = batcher.stream(request)
        next(stream)
        before = batcher.timeline
        if leave == "close the stream":
            stream.close()
        elif leave == "drop the stream":
            del stream
        else:
            batcher.cancel(stream._handle)
        assert batcher.run([request])[0].token_ids == alone(request).token_ids
        assert batcher.timeline is not before
        assert [step.step for step in batcher.timeline.steps][0] == 0
        assert batcher.kv.num_free == batcher.kv.num_blocks


def test_batch_sizes_may_come_one_by_one_and_are_kept_as_they_were():
    sizes = [4, 1]
    config = Config.of(tiny_model(), batch_sizes=sizes)
    sizes.append(2)
    assert Config.of(tiny_model(), batch_sizes=iter((4, 1))).shape.batch_sizes == config.shape.batch_sizes == (1, 4)


# ---- the shape of the two loops --------------------------------------------------------------------------------------


def spans_by_step(batcher):
    found = {}
    for lane, name, step, start, end in batcher.timeline.spans:
        found[step, lane, name] = (start, end)
    return found


@pytest.mark.parametrize("clock", [None, Costs()], ids=["real", "virtual"])
@pytest.mark.parametrize("batcher_class", [SyncBatcher, AsyncBatcher])
def test_the_synchronous_host_never_works_while_the_device_does(batcher_class, clock):
    """And the asynchronous one prepares each step while the device computes the one before. In real time a busy machine
    may wake it too late for that."""
    with batcher_class(tiny_model(), step_s=0.01, clock=clock, **OPTIONS) as timed:
        timed.run([Request([n], 10, stop_token_ids=()) for n in range(3)])
        found = spans_by_step(timed)
        steps = timed.timeline.summary().steps
    assert steps == 10
    overlaps = 0
    for step in range(1, steps):
        before = found[step - 1, "compute", "step"]
        fill = found[step, "host", "fill"]
        overlaps += fill[0] < before[1]
        assert found[step, "compute", "step"][0] >= found[step, "H2D", "copy_in"][1]
        assert found[step, "D2H", "copy_out"][0] >= found[step, "compute", "step"][1]
        assert found[step, "compute", "step"][0] >= before[1]
    if timed.mode == "sync":
        assert overlaps == 0
    elif clock is not None:
        assert overlaps == steps - 1


def test_the_timed_device_gives_the_same_tokens_in_both_loops():
    workload = [Request([3, n], 12, stop_token_ids={5, 6, 7}) for n in range(9)]
    results = []
    for batcher_class in (SyncBatcher, AsyncBatcher):
        with batcher_class(tiny_model(), step_s=0.0, **OPTIONS) as batcher:
            results.append([c.token_ids for c in batcher.run(workload)])
            assert "timed" in batcher.timeline.clock
    assert results[0] == results[1]
    assert len({tuple(tokens) for tokens in results[0]}) == 9

"""transformers' own continuous batching, and what is measured of it.

Without CUDA it runs synchronously and eagerly; the stand-in for flash_attn then runs with a plain reference in place of
its kernels (test_peers_stand_in.py has the kernels themselves, in Triton's interpreter).
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.peers import BATCH, LAYERS, MAX_LENGTH, OPTIONS, generate, reference_decode, reference_prefill
from support.tiny import tiny_model
from transformers.integrations import hub_kernels

from asyncbatch import Request, SamplingParams, load_model
from asyncbatch.profile.peers import attention_choice, stand_in
from asyncbatch.profile.peers.batcher import TransformersBatcher
from asyncbatch.profile.peers.recorder import StepRecorder
from asyncbatch.timeline import Timeline


@pytest.fixture(scope="module")
def reference():
    """The stand-in without Triton and CUDA; gives the number of calls."""
    calls = {"decode": 0, "prefill": 0}

    def counted(name, function):
        def call(*arguments):
            calls[name] += 1
            return function(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_choice, "_why_no_stand_in", lambda device: "")
        patch.setattr(stand_in, "_decode", counted("decode", reference_decode))
        patch.setattr(stand_in, "_prefill", counted("prefill", reference_prefill))
        yield calls


@pytest.fixture(scope="module", params=["sdpa", "stand-in", "stand-in, padded"])
def batcher(request, reference):
    """Padded: the sizes of a step are rounded up, as they are where CUDA graphs are used."""
    with TransformersBatcher(
        tiny_model(), mode="sync", attention=request.param.split(",")[0], **OPTIONS
    ) as open_batcher:
        open_batcher.manager.batch_processor.model_runner.pad_inputs = "padded" in request.param
        yield open_batcher


@pytest.fixture(scope="module")
def sdpa():
    with TransformersBatcher(tiny_model(), mode="sync", attention="sdpa", **OPTIONS) as open_batcher:
        yield open_batcher


TOKENS = st.integers(0, 96)
REQUESTS = st.lists(
    st.builds(
        Request,
        st.lists(TOKENS, min_size=1, max_size=40),
        st.integers(1, 24),
        stop_token_ids=st.one_of(st.just(()), st.none(), st.sets(TOKENS, max_size=12)),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.generate))  # shrinking takes minutes
@given(requests=REQUESTS)
def test_tokens_are_those_of_generate_and_every_step_is_accounted_for(batcher, requests):
    model = tiny_model()
    completions = batcher.run(requests)
    for request, completion in zip(requests, completions, strict=True):
        assert completion.error is None
        assert completion.token_ids == generate(model, request)
        stopped = completion.token_ids[-1] in (request.stop_token_ids or ())
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert completion.submitted_s <= completion.first_token_s <= completion.finished_s

    timeline = batcher.timeline
    numbers = list(range(len(timeline.steps)))
    assert [step.step for step in timeline.steps] == numbers
    assert sum(step.tokens for step in timeline.steps) == sum(len(c.token_ids) for c in completions)
    for step in timeline.steps:
        assert step.wasted == 0
        assert 1 <= step.rows <= BATCH
        if step.kind == "decode":
            assert step.tokens == step.rows
    # What the last query of each row attends to: the decode steps of a request have its prompt and its tokens so far.
    decodes = sum(s.context for s in timeline.steps if s.kind == "decode")
    expected = sum(
        len(r.token_ids) + n for r, c in zip(requests, completions, strict=True) for n in range(1, len(c.token_ids))
    )
    mixed = sum(s.context for s in timeline.steps if s.kind == "prefill")
    assert decodes <= expected <= decodes + mixed
    for lane, name in (("compute", "step"), ("host", "plan"), ("host", "launch"), ("host", "wait"), ("host", "commit")):
        spans = [span for span in timeline.spans if (span.lane, span.name) == (lane, name)]
        assert [span.step for span in spans] == numbers
        assert all(span.start <= span.end for span in spans)
        assert all(a.end <= b.start for a, b in zip(spans, spans[1:], strict=False))


@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 5, 2]])
def test_steps_of_a_batch_that_starts_together(batcher, lengths):
    """One step for all prompts, then one token a row and step; contexts are known exactly."""
    requests = [Request(list(range(1, 1 + n)), 7, stop_token_ids=()) for n in lengths]
    batcher.run(requests)
    steps = batcher.timeline.steps
    assert [step.kind for step in steps] == ["prefill"] + ["decode"] * 6
    assert [step.tokens for step in steps] == [3] * 7
    assert [step.context for step in steps] == [sum(lengths) + 3 * n for n in range(7)]
    assert batcher.timeline.clock == "host"
    assert "_cached_continuous_batching_manager" not in vars(batcher.model)
    assert batcher.timeline.summary().host_ms_per_step > 0


def test_decode_steps_of_the_stand_in_take_the_paged_path(batcher, reference):
    if batcher.attention == "sdpa":
        pytest.skip("only the stand-in has it")
    before = dict(reference)
    batcher.run([Request([1 + n, 5, 9], 6, stop_token_ids=()) for n in range(5)])
    kinds = [step.kind for step in batcher.timeline.steps]
    assert reference["decode"] - before["decode"] == LAYERS * kinds.count("decode") > 0
    assert reference["prefill"] - before["prefill"] == LAYERS * kinds.count("prefill") > 0


def kernel_state():
    """What the stand-in changes in transformers' modules for the time of a run."""
    utils = vars(transformers.modeling_flash_attention_utils)
    names = ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn")
    return hub_kernels.load_and_register_attn_kernel, [utils[name] for name in names]


AT_FIRST = kernel_state()


def wrapped_methods(batcher) -> set[str]:
    processor = batcher.manager.batch_processor
    owners = (processor, processor.model_runner, processor.inputs_and_outputs)
    return {name for owner in owners for name in vars(owner) if callable(getattr(type(owner), name, None))}


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_transformers_are_as_before(batcher, fails):
    model = tiny_model()
    own = object()
    model.train()
    model.lm_head.eval()
    vars(model)["_cached_continuous_batching_manager"] = own
    try:
        attributes = set(vars(model))
        with contextlib.ExitStack() as stack:
            if fails:
                stack.enter_context(fault(batcher))
            batcher.run([Request([1, 2], 3)])
        assert model.config._attn_implementation == "sdpa"
        assert model.training
        assert model.model.layers[0].training
        assert not model.lm_head.training
        assert set(vars(model)) == attributes
        assert model._cached_continuous_batching_manager is own
        assert wrapped_methods(batcher) == set()
        assert kernel_state() == AT_FIRST
    finally:
        del model._cached_continuous_batching_manager
        model.eval()


@contextlib.contextmanager
def fault(batcher, after: int = 0):
    """The model's forward fails from its call number `after` on."""
    calls = iter(range(10**6))

    def hook(*_):
        if next(calls) >= after:
            raise RuntimeError("the GPU fell off")

    handle = batcher.model.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_a_failing_step_ends_every_request_with_an_error_and_the_next_run_works(sdpa):
    requests = [Request([n, 2], 9, stop_token_ids=()) for n in range(5)]
    with fault(sdpa, after=4):
        completions = sdpa.run(requests)
    assert {c.finish_reason for c in completions} == {"error"}
    assert all("the GPU fell off" in str(c.error) for c in completions)
    assert [c.token_ids for c in sdpa.run(requests)] == [generate(sdpa.model, r) for r in requests]


def test_a_run_after_an_interrupted_one(sdpa, monkeypatch):
    """What was under way is dropped, and nothing of it turns up in the next run."""
    requests = [Request([n, 2], 9, stop_token_ids=()) for n in range(5)]
    get_result, calls = sdpa.manager.get_result, iter(range(10))

    def interrupted(timeout):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return get_result(timeout=timeout)

    with monkeypatch.context() as patch:
        patch.setattr(sdpa.manager, "get_result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sdpa.run(requests)
    assert not sdpa.manager.is_running()
    others = [Request([n, 50], 4, stop_token_ids=()) for n in range(5)]
    assert [c.token_ids for c in sdpa.run(others)] == [generate(sdpa.model, r) for r in others]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([1], 4, SamplingParams(temperature=0.5)), "temperature is 0.5: here only 0"),
        (Request([1], 4, stop_strings=["x"]), "stop_strings is"),
        (Request([], 4), "token_ids is empty"),
        (Request([1], MAX_LENGTH), "together 65"),
        (Request([97], 4), "vocabulary has 0 to 96"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(sdpa, request_, message):
    with pytest.raises(ValueError, match=message):
        sdpa.run([Request([1, 2], 2), request_])
    assert len(sdpa.run([Request([1, 2], 2, stop_token_ids=())])[0].token_ids) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="fast"), "mode is 'fast': allowed are 'sync' and 'async'"),
        (dict(mode="async"), "mode is 'async' and the model is on cpu"),
        (dict(mode="sync", attention="eager"), "attention is 'eager': allowed are 'auto'"),
        (dict(mode="sync", attention="flash_attention_2"), "need CUDA"),
        (dict(mode="sync", max_batch_size=0), "max_batch_size is 0"),
        (dict(mode="sync", block_size=2), "block_size is 2: allowed are whole numbers from 4"),
        (dict(mode="sync", prefill_tokens=True), "prefill_tokens is True"),
        (dict(mode="sync", max_length=257), "max_length is 257: the model allows at most 256"),
        (dict(mode="sync", compile_level=4), "compile_level is 4"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        TransformersBatcher(tiny_model(), **options)


def test_setting_says_what_is_used_and_why(sdpa, monkeypatch):
    assert f"transformers {transformers.__version__}, sdpa" in sdpa.setting
    assert "sync" in sdpa.setting
    monkeypatch.setattr(attention_choice, "_why_no_flash_attn", lambda device: "flash_attn is not installed")
    monkeypatch.setattr(attention_choice, "_why_no_stand_in", lambda device: "no Triton")
    assert attention_choice.choose_attention("auto", None) == ("sdpa", "flash_attn is not installed; no Triton")
    monkeypatch.setattr(attention_choice, "_why_no_stand_in", lambda device: "")
    assert attention_choice.choose_attention("auto", None) == ("stand-in", "flash_attn is not installed")
    monkeypatch.setattr(attention_choice, "_why_no_flash_attn", lambda device: "")
    assert attention_choice.choose_attention("auto", None) == ("flash_attention_2", "")


def test_nothing_to_do_and_nothing_after_closing():
    batcher = TransformersBatcher(tiny_model(), mode="sync", attention="sdpa", **OPTIONS)
    assert batcher.run([]) == []
    assert batcher.timeline.spans == []
    batcher.close()
    batcher.close()
    with pytest.raises(ValueError, match="closed"):
        batcher.run([Request([1], 1)])


def test_another_version_without_a_part_that_is_needed(sdpa, monkeypatch):
    runner = sdpa.manager.batch_processor.model_runner
    monkeypatch.delattr(type(runner), "compute_batch")
    recorder = StepRecorder(Timeline(), sdpa.manager.batch_processor, torch.device("cpu"), "sync", [])
    message = (
        f"transformers {transformers.__version__} does not fit: its ModelRunner has no compute_batch .*5.17 to 5.24"
    )
    with pytest.raises(RuntimeError, match=message), recorder.hooks():
        pass
    assert wrapped_methods(sdpa) == set()


# ---- CUDA ----------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attention", ["stand-in", "sdpa"])
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("name", ["tiny", "random:llama-1b"])
def test_on_cuda(name, mode, attention):
    model = tiny_model("cuda") if name == "tiny" else load_model(name, device="cuda")[0]
    generator = torch.Generator().manual_seed(1)
    lengths, vocab = (1, 9, 30, 4, 17), model.config.vocab_size
    prompts = [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]
    requests = [Request(prompt, 6 + n, stop_token_ids=()) for n, prompt in enumerate(prompts)]
    options = {**OPTIONS, "block_size": 16}
    with TransformersBatcher(model, mode=mode, attention=attention, **options) as batcher:
        runs = [batcher.run(requests) for _ in range(2)]
        timeline, before = batcher.timeline, model.config._attn_implementation
    assert before == "sdpa"
    for completions in runs:
        assert [c.error for c in completions] == [None] * len(requests)
        if name == "tiny":  # in float32 nothing is near enough to a tie to fall the other way
            assert [c.token_ids for c in completions] == [generate(model, r) for r in requests]
        else:
            assert [len(c.token_ids) for c in completions] == [r.max_new_tokens for r in requests]
    assert timeline.clock == "cuda"
    assert sum(step.tokens for step in timeline.steps) == sum(r.max_new_tokens for r in requests)
    assert (sum(step.wasted for step in timeline.steps) > 0) == (mode == "async")
    _, steps, starts, ends = timeline.lane("compute")
    assert steps.tolist() == [step.step for step in timeline.steps]
    assert (starts < ends).all()
    assert (ends[:-1] <= starts[1:] + 1e-6).all()
    assert 0 < timeline.summary().device_active <= 1

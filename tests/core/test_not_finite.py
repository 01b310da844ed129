"""Logits that are nan or infinite end their own request with an error, and nobody else's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.gpt2 import generated, tiny_gpt2

from asyncbatch import AsyncBatcher, Request, SamplingParams, SyncBatcher
from asyncbatch.request import NO_TOKEN
from asyncbatch.sampling import greedy, sample

OPTIONS = {"max_batch_size": 3, "block_size": 4, "max_length": 32, "prefill_tokens": 8}
BAD = 50  # a token whose embedding is nan


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", [SyncBatcher, AsyncBatcher])
def test_a_request_whose_logits_are_not_finite_fails_alone(kind, temperature, bad):
    model = tiny_gpt2()
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # not tied to the embedding any more
        model.transformer.wte.weight[BAD] = bad
    sampling = SamplingParams(temperature=temperature, seed=3)
    good, late = (Request([1, 2, n], 9, stop_token_ids=()) for n in (3, 4))
    requests = [good, Request([1, BAD], 9, sampling, stop_token_ids=()), late]
    with kind(model, **OPTIONS) as batcher:
        first, failed, last = batcher.run(requests)
        assert batcher.kv.num_free == batcher.kv.num_blocks
    assert (failed.finish_reason, failed.token_ids) == ("error", [])
    assert "logits after 2 tokens are nan or infinite" in str(failed.error)
    for request, completion in ((good, first), (late, last)):
        assert BAD not in completion.token_ids
        assert completion.token_ids == generated(model, request.token_ids, 9)


def test_it_may_come_late_and_keeps_the_tokens_before_it():
    model = tiny_gpt2()
    request = Request([1, 2, 3], 9, stop_token_ids=())
    expected = generated(model, request.token_ids, 9)
    place = next(i for i in range(2, 9) if expected[i] not in [*request.token_ids, *expected[:i]])
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.transformer.wte.weight[expected[place]] = float("nan")
    for kind in (SyncBatcher, AsyncBatcher):
        with kind(model, **OPTIONS) as batcher:
            completion = batcher.run([request])[0]
        assert (completion.finish_reason, completion.token_ids) == ("error", expected[: place + 1])


@pytest.mark.parametrize("width", [12, 64, 97])
def test_which_rows_have_no_token(width):
    logits = torch.randn(7, width, generator=torch.Generator().manual_seed(0))
    logits[1, 5], logits[2, -1] = float("nan"), float("inf")
    logits[3], logits[4, 3] = -float("inf"), -float("inf")  # all forbidden; one forbidden
    logits[5] = float("nan")
    fields = {
        "temperature": torch.ones(7),
        "top_k": torch.zeros(7, dtype=torch.int32),
        "top_p": torch.ones(7),
        "uniform": torch.full((7,), 0.5),
    }
    for tokens in (greedy(logits), sample(logits, fields)):
        assert [row for row in range(7) if int(tokens[row]) == NO_TOKEN] == [1, 2, 3, 5]
    assert greedy(logits)[[0, 4, 6]].tolist() == logits[[0, 4, 6]].argmax(-1).tolist()


def test_top_p_of_one_cuts_nothing_from_a_vocabulary_of_128256_tokens():
    """The token that the distribution function gives, its sums taken by NumPy in float64. (Those of float32 pass 1
    while 10,188 of these tokens are still to come.)"""
    logits = torch.tensor(3 * np.random.default_rng(0).normal(size=(1, 128_256)).astype(np.float32))
    probabilities, order = logits.softmax(-1).sort(descending=True, stable=True)
    sums = probabilities[0].numpy().astype(np.float64).cumsum()
    for uniform in (0.5, 0.99, 1 - 2**-16, 1 - 2**-20, 1 - 2**-24):
        fields = {
            "temperature": torch.ones(1),
            "top_k": torch.zeros(1, dtype=torch.int32),
            "top_p": torch.ones(1),
            "uniform": torch.tensor([uniform], dtype=torch.float32),
        }
        expected = order[0, np.searchsorted(sums, uniform * sums[-1], side="right")]
        assert sample(logits, fields)[0] == expected

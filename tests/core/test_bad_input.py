"""What a caller gets wrong is one class of error, says what was given and what is allowed, and disturbs nobody."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asyncbatch import AsyncBatcher, Request, SamplingParams
from asyncbatch.devices.virtual import Costs
from asyncbatch.models.toy import VOCABULARY, toy_llama
from asyncbatch.ordering.toy import toy_tokens, use_toy_model
from asyncbatch.request import RequestError

GOOD = Request([1, 2, 3], 5, stop_token_ids=())


def request(ids=(1, 2), limit=4, **options):
    sampling = {name: options.pop(name) for name in ("temperature", "top_k", "top_p", "seed") if name in options}
    return Request(list(ids) if isinstance(ids, tuple) else ids, limit, SamplingParams(**sampling), **options)


NAN, INF = float("nan"), float("inf")
# What is wrong: (the request, what the message says was given, what it says is allowed)
CASES = {
    "empty prompt": (request(()), "empty", "at least one token"),
    "token beyond the vocabulary": (request((1, VOCABULARY)), str(VOCABULARY), f"0 to {VOCABULARY - 1}"),
    "negative token": (request((-1,)), "-1", f"0 to {VOCABULARY - 1}"),
    "boolean token": (request((True,)), "True", f"0 to {VOCABULARY - 1}"),
    "float token": (request((1.5,)), "1.5", f"0 to {VOCABULARY - 1}"),
    "text token": (request(("a",)), "'a'", f"0 to {VOCABULARY - 1}"),
    "missing token": (request((None,)), "None", f"0 to {VOCABULARY - 1}"),
    "nested prompt": (request(([1, 2],)), "[1, 2]", f"0 to {VOCABULARY - 1}"),
    "text prompt": (request("hello"), "hello", "list of token numbers"),
    "no prompt": (request(None), "None", "list of token numbers"),
    "tensor prompt": (request(torch.tensor([1, 2])), "Tensor", "list of token numbers"),
    "two-dimensional prompt": (request(np.ones((2, 2), int)), "(2, 2)", "list of token numbers"),
    "prompt longer than allowed": (request((1,) * 65), "65", "at most 64"),
    "prompt and output longer than allowed": (request((1,) * 60, 10), "70", "at most 64"),
    "no new tokens": (request(limit=0), "0", "from 1"),
    "negative new tokens": (request(limit=-3), "-3", "from 1"),
    "half a token": (request(limit=1.5), "1.5", "from 1"),
    "boolean limit": (request(limit=True), "True", "from 1"),
    "huge limit": (request(limit=10**30), "10000", "at most 64"),
    "temperature nan": (request(temperature=NAN), "nan", "0 (greedy)"),
    "temperature infinite": (request(temperature=INF), "inf", "0 (greedy)"),
    "temperature negative": (request(temperature=-1.0), "-1.0", "0 (greedy)"),
    "top_p zero": (request(top_p=0.0), "0.0", "above 0"),
    "top_p above one": (request(top_p=1.1), "1.1", "at most 1"),
    "top_p nan": (request(top_p=NAN), "nan", "at most 1"),
    "top_k negative": (request(top_k=-1), "-1", "from 0"),
    "top_k not whole": (request(top_k=2.5), "2.5", "from 0"),
    "seed negative": (request(seed=-1), "-1", "from 0"),
    "seed too large": (request(seed=2**63), str(2**63), "2**63 - 1"),
    "stop token beyond the vocabulary": (request(stop_token_ids=(999,)), "999", f"0 to {VOCABULARY - 1}"),
    "stop tokens as one number": (request(stop_token_ids=7), "7", "list or set"),
    "one stop string": (request(stop_strings="end"), "end", "list of strings"),
    "empty stop string": (request(stop_strings=[""]), "''", "at least one character"),
    "stop strings without a tokenizer": (request(stop_strings=["end"]), "end", "tokenizer="),
    "sampling of another type": (Request([1], 2, {"temperature": 1}), "dict", "SamplingParams"),
    "no request at all": ([1, 2, 3], "list", "a Request"),
}


@pytest.fixture
def batcher():
    sizes = dict(max_batch_size=4, block_size=4, max_length=64, prefill_tokens=16)
    with AsyncBatcher(toy_llama(), clock=Costs(), step_s=0.0, **sizes) as made:
        use_toy_model(made)
        yield made


@pytest.mark.parametrize("name", CASES)
def test_a_bad_request_is_refused_before_it_is_queued_and_the_good_one_beside_it_is_served(batcher, name):
    bad, given, allowed = CASES[name]
    for call in (batcher.submit, batcher.stream):
        with pytest.raises(RequestError) as caught:
            call(bad)
        assert given in str(caught.value)
        assert allowed in str(caught.value)
        assert len(str(caught.value)) < 400
        assert not batcher._handles
        assert not batcher._inbox
    before, wrong, after = batcher.run([GOOD, bad, GOOD])
    assert wrong.finish_reason == "error"
    assert isinstance(wrong.error, RequestError)
    assert wrong.token_ids == []
    assert before.token_ids == after.token_ids == toy_tokens(GOOD)
    assert batcher.kv.num_free == batcher.kv.num_blocks


def test_handles_that_are_unknown_or_another_batchers_are_refused_and_a_second_cancel_says_so(batcher):
    sizes = dict(max_batch_size=4, block_size=4, max_length=64, prefill_tokens=16)
    with AsyncBatcher(toy_llama(), clock=Costs(), step_s=0.0, **sizes) as other:
        foreign = other.submit(GOOD)
        for wrong, given in ((foreign, "another batcher"), (7, "int 7"), (None, "None")):
            with pytest.raises(RequestError, match=given):
                batcher.cancel(wrong)
    handle = batcher.submit(GOOD)
    assert batcher.cancel(handle)
    assert not batcher.cancel(handle)
    assert handle.result().finish_reason == "cancelled"
    assert not batcher.cancel(handle)


@pytest.mark.parametrize("call", ["submit", "run", "stream"])
def test_a_closed_batcher_takes_nothing_more(batcher, call):
    batcher.close()
    batcher.close()
    with pytest.raises(RequestError, match="closed"):
        getattr(batcher, call)([GOOD] if call == "run" else GOOD)


@pytest.mark.parametrize("wrong", ["a text", 7, None])
def test_run_wants_a_list_of_requests(batcher, wrong):
    with pytest.raises(RequestError, match="list of Requests"):
        batcher.run(wrong)

"""The rules that end a request, the random numbers of a token, and what a caller is told about a bad request."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbatch import Request, SamplingParams
from asyncbatch.request import RequestError, check_request, contains_stop_string, finish_reason, token_numbers
from asyncbatch.sampling import uniforms


def test_a_request_stops_on_a_stop_token_and_at_its_limit():
    assert finish_reason([], 3, {9}) is None
    assert finish_reason([1, 2], 3, {9}) is None
    assert finish_reason([1, 9], 3, {9}) == "stop"
    assert finish_reason([1, 2, 3], 3, {9}) == "length"
    assert finish_reason([1, 2, 9], 3, {9}) == "stop"
    assert finish_reason([9, 1], 3, {9}) is None  # only the newest token counts: the ones before it were judged before


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=50), st.integers(0, 2**31))
def test_a_tokens_random_number_depends_on_its_seed_and_position_only(seeds, position):
    seeds = np.array(seeds, np.uint64)
    together = uniforms(seeds, np.full(len(seeds), position))
    alone = [uniforms(seed[None], np.array([position]))[0] for seed in seeds]
    assert together.tolist() == alone
    assert together.dtype == np.float32
    assert ((together >= 0) & (together < 1)).all()


@pytest.mark.parametrize("axis", ["seed", "position"])
def test_random_numbers_are_uniform_along_both_axes(axis):
    count = 20_000
    run, fixed = np.arange(count), np.full(count, 3)
    values = uniforms(run, fixed) if axis == "seed" else uniforms(fixed, run)
    histogram = np.histogram(values, bins=20, range=(0, 1))[0]
    # chi-square with 19 degrees of freedom: above 60 with probability 4e-6
    assert ((histogram - count / 20) ** 2 / (count / 20)).sum() < 60
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03


class _BytesTokenizer:
    """One token is one byte, and like some real ones it trims the space before the first word."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace").lstrip(" ")


@given(st.text("ab é", max_size=30), st.lists(st.text("ab é", min_size=1, max_size=5), min_size=1, max_size=3))
def test_a_stop_string_is_found_at_the_token_that_completes_it(text, stops):
    data = list(text.encode())
    tokenizer = _BytesTokenizer()
    expected = next((n for n in range(1, len(data) + 1) if any(s.encode() in bytes(data[:n]) for s in stops)), None)
    found = next((n for n in range(1, len(data) + 1) if contains_stop_string(data[:n], stops, tokenizer)), None)
    if not text.startswith(" ") and not any(s.startswith(" ") for s in stops):
        assert found == expected


GOOD = dict(token_ids=[1, 2], max_new_tokens=4)
BAD_REQUESTS = [
    (dict(token_ids=[]), "empty"),
    (dict(token_ids="hello"), "tokenizer"),
    (dict(token_ids=5), "list of token numbers, not int"),
    (dict(token_ids=[[1, 2], [3]]), r"token_ids\[0\] is \[1, 2\]"),
    (dict(token_ids=np.array(3)), "list of token numbers, not ndarray"),
    (dict(token_ids=[1, 99]), r"token_ids\[1\] is 99.*0 to 9"),
    (dict(token_ids=[-1]), r"token_ids\[0\] is -1"),
    (dict(token_ids=[1.5]), "1.5"),
    (dict(token_ids=[True]), "True"),
    (dict(token_ids=[1] * 30), "30 tokens.*at most 32 fit.*the pool"),
    (dict(max_new_tokens=0), "max_new_tokens is 0.*from 1"),
    (dict(max_new_tokens=-3), "max_new_tokens is -3"),
    (dict(max_new_tokens=2.0), "max_new_tokens is 2.0"),
    (dict(max_new_tokens=31), "together 33.*at most 32"),
    (dict(sampling={"temperature": 1}), "must be a SamplingParams, not dict"),
    (dict(sampling=SamplingParams(temperature=-1)), "temperature is -1"),
    (dict(sampling=SamplingParams(temperature=float("nan"))), "temperature is nan"),
    (dict(sampling=SamplingParams(temperature=float("inf"))), "temperature is inf"),
    (dict(sampling=SamplingParams(top_k=-1)), "top_k is -1"),
    (dict(sampling=SamplingParams(top_k=1.5)), "top_k is 1.5"),
    (dict(sampling=SamplingParams(top_p=0)), "top_p is 0"),
    (dict(sampling=SamplingParams(top_p=1.1)), "top_p is 1.1"),
    (dict(sampling=SamplingParams(seed=-1)), "seed is -1"),
    (dict(sampling=SamplingParams(seed="x")), "seed is 'x'"),
    (dict(stop_token_ids=[10]), "stop_token_ids has 10"),
    (dict(stop_strings="end"), "list of strings, not one string"),
    (dict(stop_strings=[""]), "at least one character"),
    (dict(stop_strings=["end"]), "give the batcher a tokenizer"),
]


@pytest.mark.parametrize(("change", "message"), BAD_REQUESTS)
def test_a_bad_request_is_refused_with_what_was_given_and_what_is_allowed(change, message):
    with pytest.raises(RequestError, match=message):
        check_request(Request(**{**GOOD, **change}), vocab_size=10, max_length=32, limited_by="the pool: 2 blocks")


def test_good_requests_pass():
    for request in (Request([0]), Request(np.array([1, 2])), Request((9,), 31, stop_token_ids=[3], stop_strings=["x"])):
        check_request(request, vocab_size=10, max_length=66, limited_by="", tokenizer=object())
    with pytest.raises(RequestError, match="must be a Request, not list"):
        check_request([1, 2], vocab_size=10, max_length=32, limited_by="")


class Padded:
    """Token n is the character n; numbers from 1000 on are beyond the tokenizer and have no text."""

    def decode(self, ids):
        return "".join(chr(n) for n in ids if n < 1000)


@given(st.lists(st.integers(0, 40), min_size=4, max_size=4), st.integers(0, 30))
def test_a_stop_string_is_found_whatever_tokens_without_text_lie_between(gaps, before):
    ids = [120] * before
    for letter, gap in zip("STOP", gaps, strict=True):
        assert not contains_stop_string([*ids, 1001], ["STOP"], Padded())
        ids += [ord(letter), *[1000] * (gap if letter != "P" else 0)]
    assert contains_stop_string(ids, ["no", "STOP"], Padded())
    assert not contains_stop_string([*ids[:-1], ord("Q")], ["STOP"], Padded())


def test_a_stop_string_inside_a_long_last_token_is_found():
    class Words:
        def decode(self, ids):
            return "".join({0: "ST", 1: "OP, and so on for a long while", 2: ""}[n] for n in ids)

    assert contains_stop_string([0, 2, 2, 2, 2, 2, 2, 2, 2, 1], ["STOP"], Words())


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (None, ()), (3, (3,)), (np.int64(3), (3,)), ([3, 4], (3, 4)), ([[3], [4, 5]], (3, 4, 5)),
        ((np.int32(3), [4]), (3, 4)), (np.array([[3, 4]]), (3, 4)), ([], ()), ({3}, (3,)),
    ],
)  # fmt: skip
def test_token_numbers_come_in_every_shape_that_configs_have(ids, expected):
    assert token_numbers("eos_token_id", ids) == expected
    assert all(type(number) is int for number in token_numbers("eos_token_id", ids))


@pytest.mark.parametrize("ids", ["</s>", 3.0, [None, 2.5], {"a": 1}, True])
def test_what_is_no_token_number_is_refused_with_its_name(ids):
    with pytest.raises(RequestError, match="eos_token_id has"):
        token_numbers("eos_token_id", ids)

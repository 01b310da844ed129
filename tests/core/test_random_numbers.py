"""The random number of a token: a function of all of its seed and of its position, the same on every machine."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbatch.sampling import greedy, sample, uniforms

SEEDS = st.integers(0, 2**64 - 1)
POSITIONS = np.arange(16)


def number_of(seed: int, position: int) -> float:
    """The finalizer of SplitMix64 over both numbers, in Python's whole numbers."""
    whole = 2**64
    x = (seed * 0x9E3779B97F4A7C15) % whole ^ ((position + 1) * 0xD1B54A32D192ED03) % whole
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % whole
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % whole
    x ^= x >> 31
    return (x >> 40) / 2**24


@given(st.lists(st.tuples(SEEDS, st.integers(0, 2**31)), min_size=1, max_size=20))
def test_a_random_number_is_what_the_written_rule_gives(pairs):
    seeds, positions = np.array([seed for seed, _ in pairs], np.uint64), np.array([place for _, place in pairs])
    assert uniforms(seeds, positions).tolist() == [number_of(*pair) for pair in pairs]


@given(SEEDS, st.integers(0, 63))
def test_every_bit_of_the_seed_counts(seed, bit):
    one, other = (uniforms(np.full(16, s, np.uint64), POSITIONS) for s in (seed, seed ^ 1 << bit))
    assert (one != other).sum() >= 15


@given(SEEDS)
def test_every_position_has_a_number_of_its_own_the_first_one_too(seed):
    numbers = uniforms(np.full(16, seed, np.uint64), POSITIONS)
    assert len(set(numbers.tolist())) >= 15
    other = uniforms(np.full(1, seed ^ 1, np.uint64), POSITIONS[:1])
    assert uniforms(np.full(1, seed, np.uint64), POSITIONS[:1]) != other, "position 0 does not hide the seed"


def fields(rows: int, **values):
    told = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "uniform": 0.0} | values
    return {name: torch.as_tensor(value).expand(rows) for name, value in told.items()}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 80), st.data())
def test_of_equal_logits_the_first_is_most_likely_and_sampling_goes_through_them_in_order(size, data):
    chosen = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    logits = torch.full((1, size), -30.0)
    logits[0, chosen] = 30.0
    assert greedy(logits).tolist() == chosen[:1]
    uniform = data.draw(st.integers(0, 2**10 - 1)) / 2**10
    token = sample(logits, fields(1, uniform=torch.tensor(uniform))).item()
    place = uniform * len(chosen)
    if abs(place - round(place)) > 1e-3:
        assert token == chosen[int(place)]


@given(st.integers(0, 4), st.data())
def test_top_p_keeps_as_few_as_together_reach_it_and_top_k_so_many(power, data):
    """Of 2**n equal logits each has an exact share. The largest random number picks the last token that is kept."""
    size = 2**power
    kept, most = data.draw(st.integers(1, size)), data.draw(st.integers(0, size))
    nearly_one = torch.tensor(1 - 2.0**-24)
    token = sample(torch.zeros(1, size), fields(1, uniform=nearly_one, top_p=torch.tensor(kept / size), top_k=most))
    assert token.tolist() == [min(kept, most or size) - 1]


def test_a_number_just_at_the_end_of_a_tokens_share_is_the_next_ones():
    numbers = torch.arange(8) / 8
    assert sample(torch.zeros(8, 8), fields(8, uniform=numbers)).tolist() == list(range(8))


def test_of_very_many_tokens_none_is_lost_to_rounding():
    size = 100_003
    number = torch.arange(1, 64, dtype=torch.float32) / 64
    tokens = sample(torch.zeros(63, size), fields(63, uniform=number))
    assert (tokens - (number * size).floor()).abs().max() <= 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 80), st.integers(1, 5), st.data())
def test_only_a_row_that_is_all_finite_or_forbidden_in_part_has_a_token(size, rows, data):
    logits = torch.randn(rows, size, generator=torch.Generator().manual_seed(size))
    expected = logits.argmax(-1)
    for row in range(rows):
        spoilt = data.draw(st.sampled_from(["no", "nan", "inf", "all forbidden", "one forbidden"]))
        place = data.draw(st.integers(0, size - 1))
        if spoilt in ("nan", "inf"):
            logits[row, place] = float(spoilt)
        elif spoilt == "all forbidden":
            logits[row] = -torch.inf
        elif spoilt == "one forbidden":
            logits[row, place] = -torch.inf
        finite = logits[row][logits[row] != -torch.inf]
        good = len(finite) > 0 and bool(finite.isfinite().all())
        expected[row] = logits[row].argmax() if good else -1
    assert greedy(logits).tolist() == expected.tolist()
    temperature = torch.tensor([float(row % 2) for row in range(rows)])
    sampled = sample(logits, fields(rows, temperature=temperature, top_k=torch.tensor(1)))
    assert sampled.tolist() == expected.tolist(), "the one token that top_k=1 leaves"
    assert sampled.dtype == greedy(logits).dtype == torch.int32


def test_a_row_of_padding_with_all_fields_zero_gives_a_token():
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    nothing = fields(3, temperature=torch.tensor([0.0, 1.0, 0.0]), top_p=torch.tensor([0.0, 1.0, 0.0]))
    assert sample(logits, nothing)[[0, 2]].tolist() == greedy(logits)[[0, 2]].tolist()

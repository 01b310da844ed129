"""Sampling follows the probabilities that the parameters leave, and nothing beside the row's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbatch.devices.cuda.runner import matrix_products_by_cublaslt
from asyncbatch.sampling import sample

VOCABULARY = 12


def fields_for(rows):
    """rows: (temperature, top_k, top_p, uniform)"""
    temperature, top_k, top_p, uniform = zip(*rows, strict=True)
    return {
        "temperature": torch.tensor(temperature, dtype=torch.float32),
        "top_k": torch.tensor(top_k, dtype=torch.int32),
        "top_p": torch.tensor(top_p, dtype=torch.float32),
        "uniform": torch.tensor(uniform, dtype=torch.float32),
    }


def allowed(logits, temperature, top_k, top_p):
    """Token to probability, by the definitions of top_k and top_p, in float64 NumPy."""
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = []
    for token in order[: top_k or None]:
        kept.append(token)
        if p[kept].sum() >= top_p:
            break
    result = np.zeros_like(p)
    result[kept] = p[kept] / p[kept].sum()
    return result


parameters = st.tuples(
    st.sampled_from([0.2, 0.7, 1.0, 3.0]), st.integers(0, VOCABULARY + 2), st.sampled_from([0.1, 0.35, 0.7, 0.9, 1.0])
)


@settings(max_examples=60, deadline=None)
@given(parameters, st.integers(0, 1000))
def test_the_frequencies_are_the_probabilities_that_top_k_and_top_p_leave(parameters, seed):
    logits = np.random.default_rng(seed).normal(size=VOCABULARY).astype(np.float32) * 2
    count = 2000
    uniform = (np.arange(count) + 0.5) / count  # evenly spread numbers give the distribution itself
    tokens = sample(torch.tensor(np.tile(logits, (count, 1))), fields_for([(*parameters, u) for u in uniform]))
    frequencies = np.bincount(tokens.numpy(), minlength=VOCABULARY) / count
    expected = allowed(logits, *parameters)
    # A sum of probabilities that meets top_p to the last float32 bit may keep one token more or less.
    near_tie = abs(frequencies - expected).max() > 2 / count and parameters[2] < 1.0
    if near_tie:
        expected = min(
            (allowed(logits, *parameters[:2], parameters[2] + shift) for shift in (-1e-6, 1e-6)),
            key=lambda e: abs(frequencies - e).max(),
        )
    assert abs(frequencies - expected).max() <= 2 / count


@given(st.lists(parameters, min_size=2, max_size=6), st.integers(0, 1000), st.data())
@settings(max_examples=40, deadline=None)
def test_a_row_does_not_depend_on_the_rows_beside_it(parameters, seed, data):
    logits = torch.randn(len(parameters), VOCABULARY, generator=torch.Generator().manual_seed(seed))
    rows = [(*p, data.draw(st.floats(0, 1, exclude_max=True, width=32))) for p in parameters]
    together = sample(logits, fields_for(rows))
    order = data.draw(st.permutations(range(len(rows))))
    assert sample(logits[list(order)], fields_for([rows[i] for i in order])).tolist() == together[list(order)].tolist()


def test_temperature_zero_takes_the_most_likely_token_whatever_else_is_set():
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(0))
    rows = [(0.0, k, p, 0.99) for k, p in ((0, 1.0), (3, 0.5), (1, 1.0), (5, 0.1))]
    assert torch.equal(sample(logits, fields_for(rows)), logits.argmax(-1).to(torch.int32))


def test_the_largest_uniform_number_still_gives_a_token_that_is_kept():
    logits = torch.zeros(1, 50_000)
    token = sample(logits, fields_for([(1.0, 40_000, 1.0, 1 - 2**-24)]))
    assert 0 <= int(token) < 40_000


@pytest.mark.parametrize("has_it", [True, False])
def test_the_callers_choice_of_a_blas_library_comes_back_whatever_happens(has_it, monkeypatch):
    now = ["the caller's"]

    def preferred(library=None):
        if library == "cublaslt" and not has_it:
            raise RuntimeError("PyTorch has not been compiled with cuBLASLt")
        now.append(library or now[-1])
        return now[-1]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred)

    def capture():
        assert now[-1] == ("cublaslt" if has_it else "the caller's")
        raise MemoryError

    with pytest.raises(MemoryError), matrix_products_by_cublaslt():
        capture()
    assert now[-1] == "the caller's"

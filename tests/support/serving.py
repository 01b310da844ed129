"""What tests of serving share: small limits, any request that a batcher may get, and the answer it gets alone."""

from __future__ import annotations

import functools

from hypothesis import strategies as st
from support.tiny import tiny_model

from asyncbatch import Completion, Request, SamplingParams, SyncBatcher

VOCABULARY = 97
OPTIONS = dict(max_batch_size=3, block_size=4, prefill_tokens=8, max_length=64)

samplings = st.one_of(
    st.just(SamplingParams()),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.7, 1.0, 1.5]),
        top_k=st.sampled_from([0, 5, 20]),
        top_p=st.sampled_from([0.8, 1.0]),
        seed=st.integers(0, 2**63 - 1),
    ),
)
requests = st.builds(
    Request,
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20),
    max_new_tokens=st.integers(1, 12),
    sampling=samplings,
    stop_token_ids=st.sets(st.integers(0, VOCABULARY - 1), max_size=10),
)


@functools.cache
def alone_batcher() -> SyncBatcher:
    """The batcher of `alone`, opened at its first call."""
    return SyncBatcher(tiny_model(), **OPTIONS)


def alone(request: Request) -> Completion:
    """The completion that a request gets when a synchronous batcher serves it by itself. All others must equal it."""
    return alone_batcher().run([request])[0]

"""Virtual clocks and kinds of batchers for tests that hold whatever the times are: hypothesis strategies."""

from __future__ import annotations

from hypothesis import strategies as st

from asyncbatch import AsyncBatcher, SyncBatcher
from asyncbatch.devices.virtual import Costs

seconds = st.one_of(st.just(0.0), st.floats(1e-6, 1e-2))
costs = st.builds(
    Costs, plan=seconds, fill=seconds, launch=seconds, commit=seconds, copy_in=seconds, step=seconds, copy_out=seconds,
    jitter=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 9),
)  # fmt: skip
# A batcher's class and its number of slots.
kinds = st.sampled_from([(SyncBatcher, 1), (AsyncBatcher, 1), (AsyncBatcher, 2), (AsyncBatcher, 3)])

"""transformers' own continuous batching serves what it can serve, whether or not this package can."""

from __future__ import annotations

import pytest
from support.peers import OPTIONS, generate
from support.windows import sliding_mistral

from asyncbatch import Request
from asyncbatch.models import ModelError, check_model
from asyncbatch.profile.peers.batcher import TransformersBatcher
from tools.served import tiny_model

REQUESTS = [Request([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], 9, stop_token_ids=()), Request([2], 12, stop_token_ids=())]


def test_transformers_serves_a_sliding_window():
    model = sliding_mistral(window=4)
    expected = [generate(model, request) for request in REQUESTS]
    assert expected != [generate(sliding_mistral(window=64), request) for request in REQUESTS]
    with TransformersBatcher(model, mode="sync", attention="sdpa", **OPTIONS) as batcher:
        assert [completion.token_ids for completion in batcher.run(REQUESTS)] == expected


def test_what_only_this_package_cannot_serve_is_not_refused():
    """Its rope would depend on neighbours here. There it does too, and that is for transformers to say."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny_model("llama", rope_parameters=rope)
    with pytest.raises(ModelError, match="longest row"):
        check_model(model)
    with TransformersBatcher(model, mode="sync", attention="sdpa", **OPTIONS) as batcher:
        assert batcher.setting


@pytest.mark.parametrize("kind", ["bart", "bloom"])
def test_what_neither_can_serve_is_refused_with_the_reason(kind):
    with pytest.raises(ModelError, match=f"{kind}.*AttentionInterface"):
        TransformersBatcher(tiny_model(kind), mode="sync", attention="sdpa", **OPTIONS)

"""A model over two ranks: the same tokens as in one process, whatever a caller does. Real processes, gloo."""

from __future__ import annotations

import pytest
from support.on_ranks import requests, serve, use
from support.workers import forked_ranks

from asyncbatch import SyncBatcher, load_model
from asyncbatch.measure.ranks import serve_on_ranks
from asyncbatch.pictures.ranks import plot_ranks
from asyncbatch.ranks.launch import on_ranks


@pytest.fixture(scope="module", autouse=True)
def _forked():
    with forked_ranks():
        yield


@pytest.fixture(scope="module")
def told():
    return on_ranks(2, serve, 2)


@pytest.fixture(scope="module")
def alone():
    model, _ = load_model("random:tiny", device="cpu", progress=False)
    with SyncBatcher(model, max_batch_size=4, num_blocks=24) as batcher:
        return use(batcher)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_tokens_of_one_process(told, alone, mode):
    served, wanted = dict(told[0][mode]), dict(alone)
    tokens, others = served.pop("cancelled tokens"), wanted.pop("cancelled tokens")
    most = max(tokens, others, key=len)
    assert tokens == most[: len(tokens)]
    assert others == most[: len(others)]
    assert served == wanted
    assert served["stopped"][1] == "stop"
    assert served["cancelled"] == (True, False, "cancelled")
    assert served["numbers"] == 0  # `run` began a new timeline, and numbered its steps anew


def test_all_ranks_did_the_same(told):
    for mode in ("sync", "async"):
        assert told[0]["digest", mode] == told[1]["digest", mode]
        assert told[0]["steps", mode] == told[1]["steps", mode] != []
        for of_rank in told:
            steps, seconds = zip(*of_rank["in collectives", mode], strict=True)
            assert list(steps) == of_rank["steps", mode]
            assert all(second > 0 for second in seconds)


def test_a_rank_knows_its_place(told):
    assert [of_rank["place"] for of_rank in told] == [(0, 0, 0, 1, True), (1, 1, 0, 1, False)]
    assert [of_rank["gathered"] for of_rank in told] == [[0, 10], None]
    assert [of_rank["shared"] for of_rank in told] == ["of rank 0", "of rank 0"]
    texts = {of_rank["difference"] for of_rank in told}
    assert len(texts) == 1
    text = texts.pop()
    assert "the same size of batch" in text
    assert "has 4" in text
    assert "rank 1" in text
    assert "has 5" in text


def test_only_the_leader_takes_requests(told):
    assert "takes the requests" in told[1]["refusal"]
    assert "call follow()" in told[1]["refusal"]
    assert "refusal" not in told[0]


def test_a_notebook_starts_two_ranks_and_shows_both(alone):
    served = serve_on_ranks(2, requests()[:2], mode="sync", max_batch_size=4)
    assert [(c.token_ids, c.finish_reason) for c in served[0].completions] == alone["first"][:2]
    assert served[1].completions == []
    assert [rank.rank for rank in served] == [0, 1]
    for rank in served:
        assert [step.step for step in rank.timeline.steps] == list(rank.collective_s)
    figure = plot_ranks([rank.timeline for rank in served])
    assert [track.name for track in figure.tracks] == ["rank 0", "rank 1"]

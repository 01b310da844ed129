"""The layers that ranks share, against the whole layer: real gloo, one thread a rank."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from asyncbatch.models.messages import ModelError
from asyncbatch.ranks import collectives
from asyncbatch.ranks.collectives import PATIENCE, Gathered, Group, SharedEmbedding, Summed, all_of, share_of
from asyncbatch.ranks.local import _check_heads, _check_style, _style

_names = itertools.count()


@pytest.fixture(scope="module")
def groups():
    """For 1, 2 and 3 ranks: the group of each rank, in one process. (A group's name says its rank, so that all fit.)"""
    made = {}
    for size in (1, 2, 3):
        store, name = dist.HashStore(), f"test/{next(_names)}"

        def one(rank, size=size, store=store, name=name):
            group = Group(f"{name}/{rank}", rank, size, "", 0)
            group.join(dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, size, PATIENCE))
            return group

        with ThreadPoolExecutor(size) as pool:
            made[size] = list(pool.map(one, range(size)))
    return made


def on_all(groups, work):
    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(work, groups))


@given(rows=st.integers(0, 50), size=st.integers(1, 8))
def test_shares_are_those_of_torch(rows, size):
    shares = [share_of(rows, Group(f"share/{size}/{rank}", rank, size, "", 0)) for rank in range(size)]
    parts = [list(part) for part in torch.arange(rows).chunk(size)] if rows else []
    parts += [[]] * (size - len(parts))
    assert [list(range(*share)) for share in shares] == parts


@settings(max_examples=25)
@given(size=st.sampled_from([1, 2, 3]), outputs=st.integers(3, 20), tokens=st.integers(1, 5), seed=st.integers(0, 99))
def test_a_layer_in_parts_is_the_whole_layer(groups, size, outputs, tokens, seed):
    torch.manual_seed(seed)
    inputs = 6  # each rank has as many
    whole = nn.Linear(inputs, outputs)
    x, ids = torch.randn(1, tokens, inputs), torch.randint(0, outputs, (2, tokens))
    embedding = nn.Embedding(outputs, 4)

    @torch.inference_mode()
    def one(group):
        first, end = share_of(inputs, group)
        by_columns = copy.deepcopy(whole)
        by_columns.weight = nn.Parameter(whole.weight[:, first:end].clone())
        summed = Summed(by_columns, group)(x[..., first:end].clone())
        first, end = share_of(outputs, group)
        by_rows = nn.Linear(inputs, end - first, bias=False)
        by_rows.weight = nn.Parameter(whole.weight[first:end].clone())
        gathered = Gathered(by_rows, outputs, group)(x)
        shared = copy.deepcopy(embedding)
        shared.weight = nn.Parameter(embedding.weight[first:end].clone())
        shared.__class__, shared.group, shared.first = SharedEmbedding, group, first
        return summed, gathered, shared(ids)

    results = on_all(groups[size], one)
    with torch.inference_mode():
        wanted = whole(x), nn.functional.linear(x, whole.weight), embedding(ids)
    for of_rank in results:
        for got, want in zip(of_rank, wanted, strict=True):
            torch.testing.assert_close(got, want)
        assert all(torch.equal(got, first) for got, first in zip(of_rank, results[0], strict=True))  # the same bits


def test_numbers_of_all_ranks(groups):
    told = on_all(groups[3], lambda group: all_of([group.rank, 10 * group.rank], group, torch.device("cpu")))
    assert told == [[[0, 0], [1, 10], [2, 20]]] * 3


def test_seconds_in_collectives_count_the_waiting(groups):
    before, late = collectives.Counter.seconds, threading.Event()

    def one(group):
        if group.rank == 1:
            late.wait(0.2)  # (nobody sets it)
        all_of([1], group, torch.device("cpu"))

    on_all(groups[2], one)
    assert collectives.Counter.seconds - before > 0.1  # rank 0 waited for rank 1


def test_a_group_travels():
    group = Group("travels", 1, 2, "127.0.0.1", 4711)
    collectives._groups.pop("travels")
    assert pickle.loads(pickle.dumps(group)) == group
    assert collectives._groups["travels"] == group
    assert copy.deepcopy(group) == group


def test_styles_are_found_by_name():
    plan = {"model.layers.*.mlp.up_proj": "colwise", "lm_head": "colwise_gather_output", "model.layers.3.x": "rowwise"}
    assert _style("model.layers.17.mlp.up_proj", plan) == "colwise"
    assert _style("model.layers.3.x", plan) == "rowwise"
    assert _style("model.layers.3", plan) is None


@pytest.mark.parametrize(
    ("layer", "style", "said"),
    [
        (nn.Linear(2, 2), "moe_tp_experts", "sharded as 'moe_tp_experts'; served are colwise"),
        (nn.Linear(2, 2), None, "sharded as None"),
        (nn.LayerNorm(2), "colwise", "is a LayerNorm"),
        (nn.Linear(2, 2), "rowwise", "its weight is whole"),
        (nn.Linear(2, 2), "embedding_rowwise", "is a Linear"),
    ],
)
def test_a_layer_that_is_sharded_in_another_way_is_refused(layer, style, said):
    with pytest.raises(ModelError, match="its layer model.x") as caught:
        _check_style("model.x", style, layer)
    assert said in str(caught.value)


@pytest.mark.parametrize(("heads", "kv_heads", "name"), [(9, 3, "num_attention_heads"), (8, 1, "num_key_value_heads")])
def test_heads_that_ranks_cannot_share_are_refused(heads, kv_heads, name):
    config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads)
    config.get_text_config = lambda **_: config
    with pytest.raises(ModelError, match=name):
        _check_heads(SimpleNamespace(config=config), 2)
    _check_heads(SimpleNamespace(config=config), 1)

"""Of which models a floor is told: those of which a step reads all weights, and all keys and values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from asyncbatch.measure.bandwidth import weight_bytes
from asyncbatch.measure.steps import Steps
from asyncbatch.profile.conditions import ModelFacts
from asyncbatch.profile.floors import floor_numbers
from asyncbatch.profile.machine import model_facts
from asyncbatch.profile.page import page
from asyncbatch.profile.report import Floor, Report, Run
from asyncbatch.profile.text import notes
from asyncbatch.timeline import Timeline
from tools.served import WINDOW, tiny_model

LAYERS = dict(num_hidden_layers=2)


@pytest.mark.parametrize(
    ("kind", "elements", "window", "experts"),
    [  # elements of keys and values of one token in all layers, counted by hand from the settings
        ("llama", 2 * 2 * (8 + 8), None, None),  # two key-value heads of 8
        ("mistral", 2 * 2 * (8 + 8), WINDOW, None),
        ("qwen3_moe", 2 * 2 * (8 + 8), None, True),
        ("deepseek_v3", None, None, True),
    ],
)
def test_what_a_model_reads_is_seen_by_running_it(kind, elements, window, experts):
    model = tiny_model(kind, **LAYERS)
    config = model.config
    if elements is None:  # a key has a part with positions and one without, and a value is another size
        elements = (
            2 * config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
        )
        assert config.head_dim != config.qk_nope_head_dim + config.qk_rope_head_dim, "else the settings would do"
    facts = model_facts(model)
    assert facts.kv_bytes_per_token == elements * torch.float32.itemsize
    assert (facts.window, facts.experts) == (window, experts)


@pytest.mark.parametrize(
    ("kind", "sees"),
    [("llama", None), ("mistral", WINDOW), ("qwen2", WINDOW), ("gemma2", WINDOW), ("gpt2", None),
     ("phimoe", WINDOW), ("granitemoe", None)],
)  # fmt: skip
def test_where_a_model_cannot_be_run_to_see_it_its_settings_tell_the_window(kind, sees):
    """Such as one that ranks share."""
    model = tiny_model(kind)
    assert model_facts(model).window == model_facts(model, tp=2).window == sees


def test_every_embedding_gives_rows_only():
    """GPT-2 has one of positions, gemma3n one of each layer."""
    for kind, tables in (("gpt2", ("wpe",)), ("gemma3n_text", ("embed_tokens_per_layer",))):
        model = tiny_model(kind)
        read = {name: p for name, p in model.named_parameters() if not any(f"{table}." in name for table in tables)}
        assert len(read) == len(list(model.parameters())) - len(tables)
        assert weight_bytes(model) == sum(p.nbytes for p in read.values()), kind


def steps(rows=2, context=40.0, count=16):
    ones = np.ones(count)
    return Steps(
        before_us=0,
        after_us=0,
        kind=np.array(["decode"] * count),
        device_us=100 * ones,
        gap_us=ones,
        host_us=ones,
        rows=np.full(count, rows),
        context=np.full(count, context),
        tokens=np.full(count, rows),
        wasted=0 * ones,
    )


@pytest.mark.parametrize(
    ("facts", "longest", "reason"),
    [
        (ModelFacts(weight_bytes=100, kv_bytes_per_token=2), 10**6, None),
        (ModelFacts(weight_bytes=100, kv_bytes_per_token=2, window=64), 64, None),
        (ModelFacts(weight_bytes=100, kv_bytes_per_token=2, window=64), 65, "the newest 64 tokens only"),
        (ModelFacts(weight_bytes=100, kv_bytes_per_token=2, experts=True), 1, "some experts only"),
    ],
)
def test_where_less_may_be_read_no_floor_is_told_and_why_is_said(facts, longest, reason):
    floor = floor_numbers(steps(), 1.0, facts, 1e6, longest)
    assert (floor == Floor()) == (reason is not None)
    if reason is None:
        assert floor.floor_s == pytest.approx(16 * (100 + 40 * 2) / 1e6)
    run = Run(engine="asyncbatch", mode="sync", model="m", prompt_tokens=longest - 1, new_tokens=1, floor=floor)
    runs = (run, replace(run, mode="async"), replace(run, prompt_tokens=1, floor=None))
    report = Report(runs=runs, models={"m": facts})
    said = [line for line in notes(report) if "floor" in line]
    assert len(said) == (reason is not None)
    assert all(line.startswith("m: no floor is told, since ") and str(reason) in line for line in said)
    html = page(report, [Timeline()] * len(runs))
    assert html.count("no floor is told, since") == len(said)
    assert all(f"{line}." in html for line in said), "the page says it, too"

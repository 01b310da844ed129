"""`tools/step_kernels.py` says where a step's time goes on a GPU. What it makes of the profiler's traces is tested on
made-up ones, by hand, and on one that an H200 gave."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import tiny_model

from asyncbatch.devices.padding import PaddedRunner
from asyncbatch.scheduler import StepKind
from asyncbatch.slot import StepShape
from tools import step_kernels
from tools.step_table import (
    MARK,
    Group,
    Origin,
    Product,
    Ran,
    matched,
    origins,
    product_of,
    replays,
    step_table,
    table_text,
)

TRACE = Path(__file__).parents[1] / "profile" / "traces" / "asyncbatch-async.json.gz"


def event(cat: str, name: str, ts: float, dur: float, **args) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def replay(correlation: int, start: float, kernels: list[tuple[str, str, float, float]]) -> list[dict]:
    """The events of one replay: its launch, and (category, name, start, length) of what ran, from `start` on."""
    ran = [event(cat, name, start + at, dur, correlation=correlation) for cat, name, at, dur in kernels]
    return [event("cuda_runtime", "cudaGraphLaunch", start - 9, 4, correlation=correlation), *ran]


# Two layers' worth of a step, in microseconds: an all-reduce runs beside the second product.
STEP = [
    ("gpu_memset", "Memset (Unknown)", 0.0, 1.0),
    ("kernel", "triton_poi_fused_where_0", 2.0, 1.0),  # carry-over
    ("kernel", "nvjet_tst_A", 3.0, 10.0),
    ("kernel", "splitKreduce", 13.5, 0.5),
    ("kernel", "_decode", 15.0, 4.0),
    ("kernel", "nvjet_tst_A", 19.0, 20.0),
    ("kernel", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 30.0, 12.0),
    ("kernel", "triton_red_fused_rms_norm_1", 42.0, 2.0),
    ("kernel", "triton_red_fused_argmax_2", 46.0, 3.0),  # sampling
]


def eager_trace() -> dict:
    """The same step without its graph: parts, operators with sizes, and each kernel's own launch."""
    bf16 = ["c10::BFloat16", "c10::BFloat16", ""]
    around = [
        event("user_annotation", MARK + "carry-over", 100, 20),
        event("user_annotation", MARK + "model", 120, 60),
        event("user_annotation", MARK + "sampling", 180, 20),
        event("cpu_op", "aten::mm", 130, 5, **{"Input Dims": [[4, 100], [100, 300]], "Input type": bf16}),
        event("cpu_op", "asyncbatch::paged_attention", 140, 5, **{"Input Dims": [[4, 8, 16]]}),
        event("cpu_op", "aten::mm", 150, 5, **{"Input Dims": [[4, 300], [300, 50]], "Input type": bf16}),
        event("cpu_op", "aten::add", 160, 5, **{"Input Dims": [[4, 100], [4, 100]]}),
    ]
    launched = [110, 112, 131, 133, 142, 151, 161, 162, 185]
    kernels = []
    for number, ((cat, name, at, dur), moment) in enumerate(zip(STEP, launched, strict=True), 1):
        name = "Memset (Device)" if cat == "gpu_memset" else name
        kernels.append(event("cuda_runtime", "cudaLaunchKernel", moment, 1, correlation=number))
        kernels.append(event(cat, name, 1000 + 10 * at, dur, correlation=number))
    return {"traceEvents": [*reversed(kernels), *around]}


def test_a_step_by_hand():
    events = replay(7, 1000.0, STEP) + replay(8, 2000.0, [(*one[:3], 2 * one[3] if one[1] == "_decode" else one[3])
                                                          for one in STEP])  # fmt: skip
    table = step_table(*replays({"traceEvents": events}), origins(eager_trace()), 2e9, 1e12, attention_bytes=5000)
    assert {group.name: (group.count, group.us, group.floor_us) for group in table.groups} == {
        "product [4, 300] x [300, 50]": (1, pytest.approx(20), pytest.approx(15)),  # 300 * 50 numbers of 2 bytes
        "collectives": (1, pytest.approx(12), None),
        "product [4, 100] x [100, 300]": (2, pytest.approx(10.5), pytest.approx(30)),  # two kernels of one product
        "attention, decode rows": (1, pytest.approx(6), pytest.approx(2.5)),  # 4 us, and 8
        "sampling": (1, pytest.approx(3), None),
        "norms, rotary embedding, activations, additions (Inductor)": (1, pytest.approx(2), None),
        "carry-over": (1, pytest.approx(1), None),
        "copies": (1, pytest.approx(1), None),
    }
    assert [group.us for group in table.groups] == sorted((group.us for group in table.groups), reverse=True)
    assert table.kernels_us == pytest.approx(55.5)
    # Nothing runs from 1 to 2, 13 to 13.5, 14 to 15 and 44 to 46; the longer attention overlaps the second product.
    assert (table.gaps, table.gaps_us, table.longest_gap_us) == (4, pytest.approx(4.5), pytest.approx(2))
    assert (table.step_us, table.busy_us) == (pytest.approx(49), pytest.approx(44.5))
    assert (table.replays, table.left_out, table.unmatched) == (2, 0, ())
    text = table_text(table, events_us=60.0)
    assert "something ran for 44.5 us" in text
    assert "60.0" in text
    assert "told by their names" not in text


def test_arithmetic_is_the_floor_where_it_takes_longer():
    assert Product(4, 100, 300, 2).floor_us(2e9, 1e12) == pytest.approx(30)  # 60,000 bytes
    assert Product(4, 100, 300, 2).floor_us(2e9, 1e9) == pytest.approx(240)  # 240,000 operations
    assert Product(4, 100, 300, 2, batch=3).floor_us(2e9, 1e9) == pytest.approx(720)
    assert Product(4, 100, 300, 0).floor_us(2e9, 1e9) is None


def test_replays_of_which_the_profiler_lost_kernels_are_left_out():
    events = replay(7, 1000.0, STEP) + replay(8, 2000.0, STEP[:-1]) + replay(9, 3000.0, STEP)
    whole, left_out = replays({"traceEvents": events})
    assert ([len(one) for one in whole], left_out) == ([9, 9], 1)
    table = step_table(whole, left_out, [], 2e9, 1e12)
    assert len(table.unmatched) == 8  # all but the memset
    assert "1 replays are left out" in table_text(table)
    assert "8 ran otherwise without the graph, and are told by their names: " in table_text(table)
    lost = replay(7, 1000.0, STEP) + replay(8, 2000.0, STEP[:3]) + replay(9, 3000.0, STEP[:5]) + replay(10, 4000.0, [])
    with pytest.raises(ValueError, match="1 of 4 replays have the same"):
        replays({"traceEvents": lost})
    with pytest.raises(ValueError, match="no launch of a graph"):
        replays({"traceEvents": lost[1:9]})


def test_without_the_other_trace_names_tell():
    """The groups of a kernel that is known by its name only."""
    table = step_table(
        [[Ran(name, i, i + 1, 1, cat == "kernel") for i, (cat, name, *_) in enumerate(STEP)]], 0, [], 1, 1
    )
    assert {group.name: group.count for group in table.groups} == {
        "copies": 1,
        "norms, rotary embedding, activations, additions (Inductor)": 2,
        "product by nvjet_tst_A": 2,
        "product by splitKreduce": 1,
        "attention, decode rows": 1,
        "collectives": 1,
        "sampling": 1,
    }
    assert all(group.floor_us is None for group in table.groups)


def test_half_of_the_replays_must_be_whole():
    """A graph of which nothing was seen at all is lost too, however often that is so."""
    two, lost = replay(7, 1000.0, STEP) + replay(8, 2000.0, STEP), [replay(n, 1000.0 * n, []) for n in (9, 10, 11)]
    whole, left_out = replays({"traceEvents": two + lost[0] + lost[1]})
    assert ([len(one) for one in whole], left_out) == ([9, 9], 2)
    with pytest.raises(ValueError, match="lost kernels"):
        replays({"traceEvents": [*two, *lost[0], *lost[1], *lost[2]]})
    with pytest.raises(ValueError, match="0 of 3 replays"):
        replays({"traceEvents": [*lost[0], *lost[1], *lost[2]]})


@pytest.mark.parametrize(
    ("name", "sizes", "types", "product"),
    [
        ("aten::mm", [[3, 5], [5, 7], [3, 7]], ["c10::Half", "c10::Half", "c10::Half"], Product(3, 5, 7, 2)),
        ("aten::baddbmm", [[3, 7], [2, 3, 5], [2, 5, 7]], ["double"] * 3, Product(3, 5, 7, 8, batch=2)),
        ("aten::mm", [[3, 5], [5, 7]], ["float", "c10::Float8_e4m3fn"], Product(3, 5, 7, 1)),  # of the second factor
        ("aten::mm", [[3, 5], [5, 7]], ["", "signed char"], Product(3, 5, 7, 0)),
        ("aten::mm", [[3, 5], [5, 7]], [], Product(3, 5, 7, 0)),
        ("aten::mm", [[3, 5]], [], None),
        ("aten::addmm", [[7], [3, 5]], [], None),
        ("aten::mm", [[], []], [], None),
        ("aten::bmm", [[2, 3, 5], [5, 7]], [], None),
        ("aten::bmm", [[1, 2, 3, 5], [1, 2, 5, 7]], [], None),
        ("aten::add", [[3, 5], [3, 5]], [], None),
    ],
)
def test_what_is_a_product_and_of_which_sizes(name, sizes, types, product):
    assert product_of(event("cpu_op", name, 0, 1, **{"Input Dims": sizes, "Input type": types})) == product
    assert product_of(event("cpu_op", name, 0, 1)) is None


names = st.lists(st.sampled_from("abc"), max_size=12)


@given(names, names)
def test_kernels_of_one_name_are_matched_in_order_or_not_at_all(replayed, eager):
    ran = [Ran(name, i, i + 1, 1) for i, name in enumerate(replayed)]
    found = matched(ran, [(Ran(name, i, i + 1, i), Origin("model", call=i)) for i, name in enumerate(eager)])
    for name in "abc":
        calls = [origin and origin.call for one, origin in zip(ran, found, strict=True) if one.name == name]
        places = [i for i, other in enumerate(eager) if other == name]
        assert calls == (places if len(places) == len(calls) else [None] * len(calls))


def test_torch_notes_sizes_as_they_are_read_here(tmp_path):
    """The profiler of this torch, on the CPU: the sizes and the type of a product are where they are looked for."""
    a, b, c = torch.zeros(3, 5), torch.zeros(5, 7), torch.zeros(2, 3, 5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        torch.mm(a, b, out=torch.empty(3, 7))
        torch.addmm(torch.zeros(7), a, b)
        torch.bmm(c, c.transpose(1, 2))
        torch.nn.functional.linear(a.bfloat16(), b.t().bfloat16())
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    found = [product for one in events if one.get("ph") == "X" and (product := product_of(one))]
    assert found == [Product(3, 5, 7, 4), Product(3, 5, 7, 4), Product(3, 5, 3, 4, batch=2), Product(3, 5, 7, 2)]


def test_a_trace_of_an_h200():
    """0.6B, 4 rows, not compiled: the steps of a run, 1 with a chunk and 9 without. Counted apart, event by event."""
    trace = json.loads(gzip.decompress(TRACE.read_bytes()))
    whole, left_out = replays(trace)
    assert (len(whole), left_out) == (9, 1)
    table = step_table(whole, left_out, [], 4.2e12, 7e14)
    launches = {one.launch for replayed in whole for one in replayed}
    events = [one for one in trace["traceEvents"] if one.get("args", {}).get("correlation") in launches]
    events = [one for one in events if one["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    assert table.kernels_us == pytest.approx(sum(one["dur"] for one in events) / 9)
    counts = {group.name: group.count for group in table.groups}
    layers = 28
    assert counts["attention, decode rows"] == layers
    assert counts["copies"] == 2
    products = {name: count for name, count in counts.items() if name.startswith("product by")}
    # Seven products a layer and the logits; one of them leaves its sums to a second kernel.
    assert sum(products.values()) == 8 * layers + 1
    starts_ends = [(min(one["ts"] for one in each), max(one["ts"] + one["dur"] for one in each))
                   for launch in launches
                   for each in [[one for one in events if one["args"]["correlation"] == launch]]]  # fmt: skip
    assert table.step_us == pytest.approx(sum(end - start for start, end in starts_ends) / 9)
    assert table.busy_us + table.gaps_us == pytest.approx(table.step_us)
    assert table.busy_us == pytest.approx(table.kernels_us, abs=0.1)  # one stream, and times are rounded


@pytest.mark.parametrize(
    "kind",
    [StepKind("decode", True, 3), StepKind("mixed", False, 3, 8), StepKind("prefill", False, 3, 8)],
    ids=["decode", "mixed", "prefill"],
)
def test_the_inputs_are_those_of_such_a_step(kind):
    """A runner takes them: each row attends to as many tokens as it should, in blocks that no other row has."""
    model = tiny_model()
    shape = StepShape(3, 1, 4, num_blocks=20, max_length=24, prefill_sizes=(8,))
    host = [(torch.zeros(shape.num_inputs, dtype=torch.int32), torch.zeros(3, dtype=torch.int32))]
    runner = PaddedRunner(model, shape=shape, host=host)
    seen = []
    batch_of = runner._batch

    def watched(fields, places, first, count, decode):
        batch = batch_of(fields, places, first, count, decode)
        seen.append((decode, [(part[1], part[1] + part[2], part[3].tolist()) for part in batch.parts]))
        return batch

    runner._batch = watched
    step_kernels.fill_inputs(shape, runner.inputs[0], kind, context=17, vocab_size=model.config.vocab_size)
    with torch.inference_mode():
        runner.run(kind, 0)
    lengths = {decode: [part[:2] for part in parts] for decode, parts in seen}
    rows = {
        "decode": {True: 3 * [(1, 17)]},
        "mixed": {True: 2 * [(1, 17)], False: [(8, 8)]},
        "prefill": {False: [(8, 8)]},
    }
    assert lengths == rows[kind.passes]
    blocks = [block for _, parts in seen for part in parts for block in part[2]]
    assert len(set(blocks)) == len(blocks)
    assert 0 not in blocks
    with pytest.raises(ValueError, match="3 rows of 7 blocks do not fit into the pool of 20"):
        step_kernels.fill_inputs(shape, runner.inputs[0], kind, context=27, vocab_size=50)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize(("kind", "passes"), [(StepKind("decode", False, 3), 1), (StepKind("mixed", True, 3, 8), 2)])
def test_the_step_without_its_graph_tells_its_parts_and_products(kind, passes, monkeypatch):
    """A real trace, of a step on the CPU, where products are operators too but launch nothing."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    model = tiny_model()
    shape = StepShape(3, 1, 4, num_blocks=20, max_length=24, prefill_sizes=(8,))
    host = [(torch.zeros(shape.num_inputs, dtype=torch.int32), torch.zeros(3, dtype=torch.int32))]
    runner = PaddedRunner(model, shape=shape, host=host)
    step_kernels.fill_inputs(shape, runner.inputs[0], kind, 17, model.config.vocab_size)
    trace = step_kernels.traced_eagerly(runner, kind)
    assert "_mark" not in vars(runner)
    events = [one for one in trace["traceEvents"] if one.get("ph") == "X"]
    marks = [one for one in events if one["name"].startswith(MARK) and one["cat"] == "user_annotation"]
    marks.sort(key=lambda one: one["ts"])
    assert [one["name"].removeprefix(MARK) for one in marks] == ["carry-over", "model", "sampling"]
    begin, end = marks[1]["ts"], marks[1]["ts"] + marks[1]["dur"]
    products = [product_of(one) for one in events if begin <= one["ts"] < end]
    linear = [one for one in model.modules() if isinstance(one, torch.nn.Linear)]
    found = sorted((one.inputs, one.outputs) for one in products if one and one.batch == 1)
    assert found == sorted([(one.in_features, one.out_features) for one in linear] * passes)


def test_what_a_preset_fills_in():
    def options(**given):
        return step_kernels.of_preset(
            step_kernels.argparse.Namespace(**dict.fromkeys(("model", "rows", "context", "preset")) | given)
        )

    assert vars(options(rows=8)) == dict(model="random:llama-8b", rows=8, context=33, preset=None)
    long = options(preset="long", rows=16)
    assert (long.model, long.rows, long.context) == ("random:llama-8b", 16, 2048 + 64)
    # The mean of a log-normal is its median times exp(sigma squared / 2).
    assert options(preset="mixed").context == pytest.approx(512 * 1.377 + 256 * 1.197 / 2, rel=0.03)


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert step_kernels.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["decode", "mixed", "prefill"])
def test_on_a_gpu(kind, tmp_path, capsys):
    """Every product of a step is found: 28 layers of four, and the logits, once a pass that the step has."""
    found = tmp_path / "found.json"
    command = ["--model", "random:llama-0.6b", "--rows", "8", "--context", "100", "--kind", kind, "--json", str(found)]
    assert step_kernels.main(command) == 0
    table = json.loads(found.read_text())
    assert "the step, by events" in capsys.readouterr().out
    assert (table["left_out"], table["unmatched"]) == (0, [])
    groups = [Group(**group) for group in table["groups"]]
    assert sum(group.count for group in groups if group.name.startswith("product ")) >= 28 * 4 + 1
    assert any(group.name == "attention, decode rows" for group in groups) == (kind != "prefill")
    assert table["busy_us"] + table["gaps_us"] == pytest.approx(table["step_us"])

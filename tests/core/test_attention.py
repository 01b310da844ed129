"""Each way of paged attention against attention written out: each row over its own tokens, wherever they lie.

The Triton kernels run here too: without a GPU, conftest.py has Triton interpret them."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import tiny_model

from asyncbatch.attention import Batch, attend_on_cpu, paged_attention
from asyncbatch.devices.buffers import host_buffers
from asyncbatch.devices.cuda.attention import attend_on_cuda
from asyncbatch.devices.cuda.runner import CudaRunner
from asyncbatch.runner import Runner
from asyncbatch.scheduler import StepKind
from asyncbatch.slot import StepShape

BLOCK, MAX_BLOCKS = 4, 6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


needs_triton = pytest.mark.skipif(not has_triton(), reason="needs the package triton")


def written_out(query, keys, values, scaling, softcap=None, sinks=None):
    """query [heads, dim] over keys, values [tokens, kv_heads, dim], one head at a time, in float64."""
    group = query.shape[0] // keys.shape[1]
    out = []
    for head in range(query.shape[0]):
        k, v = keys[:, head // group].double(), values[:, head // group].double()
        scores = k @ query[head].double() * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        weights = scores.exp()
        total = weights.sum() + (0 if sinks is None else sinks[head].double().exp())
        out.append(weights @ v / total)
    return torch.stack(out)


class Case:
    """Random rows of (tokens in the cache already, new tokens) in scattered blocks. Where nothing was written there is
    nan: whoever reads it shows. asked: what else the layer asks for, some of value_dim, window, softcap and sinks."""

    def __init__(
        self, rows, seed, kv_heads=2, group=3, dim=8, padding=0, device="cpu", dtype=torch.float32, asked=None
    ):
        generator = torch.Generator().manual_seed(seed)
        asked = asked or {}
        self.rows, self.dim = rows, asked.get("value_dim", dim)
        self.window, self.softcap = asked.get("window", 0), asked.get("softcap")
        random = lambda *size: torch.randn(*size, generator=generator).to(device, dtype)  # noqa: E731
        num_blocks = MAX_BLOCKS * len(rows)
        self.keys, self.values = (
            torch.full((num_blocks + 1, kv_heads, BLOCK, size), torch.nan, device=device, dtype=dtype)
            for size in (dim, self.dim)
        )
        order = torch.randperm(num_blocks, generator=generator) + 1
        self.tables = order.view(len(rows), MAX_BLOCKS).int()
        total = sum(new for _, new in rows) + padding
        self.query = random(total, kv_heads * group, dim)
        self.key, self.value = random(total, kv_heads, dim), random(total, kv_heads, self.dim)
        self.sinks = random(kv_heads * group) if asked.get("sinks") else None
        places, self.parts, self.histories, first = [], [], [], 0
        for (cached, new), own in zip(rows, self.tables.tolist(), strict=True):
            history = [(own[p // BLOCK], p % BLOCK) for p in range(cached + new)]
            for block, place in history[:cached]:
                self.keys[block, :, place] = random(kv_heads, dim)
                self.values[block, :, place] = random(kv_heads, self.dim)
            self.parts.append((first, new, cached, torch.tensor(own[: -(-(cached + new) // BLOCK)])))
            places += [block * BLOCK + place for block, place in history[cached:]]
            self.histories += [history[: cached + i + 1] for i in range(new)]
            first += new
        on_device = lambda values: torch.tensor(values, dtype=torch.int32, device=device)  # noqa: E731
        counts = [[p[i] for p in self.parts] for i in range(3)]
        self.batch = Batch(
            torch.tensor(places + [0] * padding, device=device),
            self.tables.to(device),
            *(on_device(c) for c in counts),
            attend_on_cuda,  # the kernels, which Triton interprets where there is no GPU
        )

    def attend(self, layout):
        """Call it as a model's layer does. `layout` says how the model lays out N tokens: [N, 1] or [1, N]."""
        layer = types.SimpleNamespace(paged_pools=(self.keys, self.values), paged_window=self.window)
        tokens = len(self.query)
        shape = (tokens, 1) if layout == "decode" else (1, tokens)
        laid = [x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in (self.query, self.key, self.value)]
        options = dict(paged=self.batch, scaling=0.3, softcap=self.softcap, s_aux=self.sinks)
        output, weights = paged_attention(layer, *laid, None, **options)
        assert weights is None
        assert output.shape == (*shape, self.query.shape[1], self.dim)
        return output.reshape(tokens, self.query.shape[1], self.dim)

    def check(self, output, tolerance=1e-5):
        for token, history in enumerate(self.histories):
            k = torch.stack([self.keys[block, :, place] for block, place in history])
            v = torch.stack([self.values[block, :, place] for block, place in history])
            assert torch.equal(k[-1], self.key[token])  # the new key was written where the table says
            assert torch.equal(v[-1], self.value[token])
            k, v = k[-self.window :], v[-self.window :]  # (all of them where it is 0)
            expected = written_out(self.query[token], k, v, 0.3, self.softcap, self.sinks)
            assert (output[token].double() - expected).norm() <= tolerance * expected.norm() + 1e-12


ROW = st.tuples(st.integers(0, 17), st.integers(1, 6))
SEED = st.integers(0, 2**31)
# What a layer asks for beside plain attention: all of it may come together. Windows shorter and longer than a row.
ASKED = st.fixed_dictionaries(
    {},
    optional={
        "value_dim": st.sampled_from([4, 24]),
        "window": st.integers(1, 25),
        "softcap": st.sampled_from([0.5, 30.0]),
        "sinks": st.just(True),
    },
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=4), SEED, st.integers(0, 3), ASKED)
def test_on_a_cpu_each_row_attends_to_its_own_tokens(rows, seed, padding, asked):
    case = Case(rows, seed, padding=padding, asked=asked)
    case.batch.attend, case.batch.parts = attend_on_cpu, case.parts
    output = case.attend("prefill")
    case.check(output)
    assert not output[len(case.histories) :].any()  # padding gets zeros


@contextlib.contextmanager
def small_tiles():
    """Tiles of 16 keys and 4 tokens, and no least size of a split, so that short rows have several of each."""
    from asyncbatch.devices.cuda import kernels

    tiling = kernels.tiling
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "tiling", lambda *given: {**tiling(*given), "TILE": 16})
        patch.setattr(kernels, "query_tile", lambda *given: 4)
        patch.setattr(kernels, "least_split", lambda splits: 1)
        yield


@needs_triton
@settings(max_examples=25, deadline=None)
@given(
    st.lists(ROW, min_size=1, max_size=4), SEED, st.integers(0, 9), st.sampled_from([1, 3]), st.sampled_from([8, 24]),
    ASKED,
)  # fmt: skip
def test_the_prefill_kernel_attends_from_each_token_to_its_row_up_to_itself(rows, seed, padding, group, dim, asked):
    case = Case(rows, seed, group=group, dim=dim, padding=padding, device=DEVICE, asked=asked)
    with small_tiles():
        output = case.attend("prefill")
    case.check(output)
    assert not output[len(case.histories) :].any()  # padding gets zeros


@needs_triton
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 23), min_size=1, max_size=4), SEED, st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 3]),
    st.sampled_from([8, 24]), ASKED, st.data(),
)  # fmt: skip
def test_the_decode_kernel_joins_its_splits_and_leaves_rows_alone_that_do_not_decode(
    cached, seed, splits, group, dim, asked, data
):
    case = Case([(n, 1) for n in cached], seed, group=group, dim=dim, device=DEVICE, asked=asked)
    dead = data.draw(st.sets(st.integers(0, len(cached) - 1)))
    case.batch.count[list(dead)] = 0
    case.batch.splits = splits
    case.batch.arrived = torch.zeros(len(cached) * 2, dtype=torch.int32, device=DEVICE)
    with small_tiles():
        before = case.keys.clone()
        output = case.attend("decode")
        assert not case.batch.arrived.any()  # ready for the next layer
    for row in sorted(dead):
        assert not output[row].any()
        own = case.tables[row].long()
        assert torch.equal(case.keys[own].nan_to_num(9.0), before[own].nan_to_num(9.0))
        case.histories[row] = None
    rows = [row for row in range(len(cached)) if row not in dead]
    case.histories = [case.histories[row] for row in rows]
    case.query, case.key, case.value = case.query[rows], case.key[rows], case.value[rows]
    case.check(output[rows])


EVERYTHING = {"value_dim": 4, "window": 18, "softcap": 1.0, "sinks": True}


@needs_triton
@pytest.mark.parametrize("asked", [{}, EVERYTHING])
def test_a_row_of_the_decode_kernel_is_bitwise_the_same_alone_and_among_others(asked):
    cached = [21, 3, 0, 14]

    def attend(live):
        case = Case([(n, 1) for n in cached], seed=3, device=DEVICE, asked=asked)
        case.batch.count[[row for row in range(4) if row not in live]] = 0
        case.batch.splits, case.batch.arrived = 4, torch.zeros(8, dtype=torch.int32, device=DEVICE)
        with small_tiles():
            return case.attend("decode")

    together = attend(range(4))
    for row in range(4):
        assert torch.equal(attend([row])[row], together[row])


@pytest.mark.parametrize("asked", [{}, {"window": 4}, EVERYTHING])
@pytest.mark.parametrize("count", [1, 5])
def test_on_a_cpu_a_row_is_bitwise_the_same_alone_and_among_others(count, asked):
    def attend(chosen):
        case = Case([(3, count)] * 3, seed=1, asked=asked)
        case.batch.attend, case.batch.parts = attend_on_cpu, [case.parts[row] for row in chosen]
        return case.attend("prefill")

    together = attend(range(3))
    for row in range(3):
        part = slice(row * count, (row + 1) * count)
        assert torch.equal(attend([row])[part], together[part])


class KernelRunner(Runner):
    """A runner on the CPU that attends with the kernels all the same, interpreted."""

    splits = 4

    def _batch(self, *arguments, **named):
        self.arrived = torch.zeros(self.shape.max_batch_size * 2, dtype=torch.int32)
        return CudaRunner._batch(self, *arguments, **named)


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the runner uses the kernels itself: see test_cuda.py")
def test_a_model_that_attends_with_the_kernels_generates_what_generate_does():
    model = tiny_model()
    shape = StepShape(max_batch_size=3, num_slots=1, block_size=4, num_blocks=40, max_length=40, prefill_sizes=(16,))
    runner = KernelRunner(model, shape=shape, host=host_buffers(shape, on_cuda=False))
    fields = shape.fields(runner.inputs[0])
    fields["tables"][1] = torch.randperm(40)[:10].int() + 1
    fields["prefill_row"][:] = 1
    prompt = list(range(5, 16))
    fields["prefill_count"][1], fields["prefill_id"][:11] = 11, torch.tensor(prompt)
    fields["prefill_position"][:11] = torch.arange(11)
    with torch.inference_mode():
        runner.run(StepKind("prefill", False, 3, 16), 0)
        tokens = [int(runner.outputs[0, 1])]
        fields["prefill_count"][1], fields["decodes"][1], fields["carry"][:] = 0, 1, torch.tensor([-1, 1, -1])
        for position in range(11, 30):
            fields["position"][1] = position
            runner.run(StepKind("decode", False, 3), 0)
            tokens.append(int(runner.outputs[0, 1]))
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, 11:]
    assert tokens == expected.tolist()

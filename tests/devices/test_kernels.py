"""The kernels compile for GPUs that are not here, from a T4 up, and fit into their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

# Compute capability, KiB of shared memory that a program may have, dtype, sizes of keys and of values, and whether
# there are a window, a softcap and sinks, or the softcap alone; into how many parts a context is cut. A T4 has no
# bfloat16.
TARGETS = [
    (75, 64, "float16", 128, 128, False, 8), (75, 64, "float16", 256, 256, True, 8),
    (75, 64, "float32", 64, 64, False, 8), (80, 163, "bfloat16", 128, 128, False, 8),
    (86, 99, "bfloat16", 256, 256, True, 8), (86, 99, "float32", 128, 128, False, 8),
    (90, 227, "bfloat16", 128, 128, False, 8), (90, 227, "bfloat16", 192, 128, False, 8),
    (90, 227, "bfloat16", 64, 64, True, 8), (90, 227, "bfloat16", 64, 64, "softcap", 8),
    (90, 227, "bfloat16", 128, 128, False, 64),
]  # fmt: skip

COMPILE = """
import json, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from asyncbatch.devices.cuda import kernels

SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
WEIGHTS = ("q", "new_k", "new_v", "k_pool", "v_pool", "out")
INTS = ("tables", "live_rows", "position", "first", "count", "arrived")
results = []
for capability, kib, name, dim, value_dim, asked, splits in json.loads(sys.argv[1]):
    dtype, shared = getattr(torch, name), 1024 * kib
    sizes, wide = kernels.sizes_of(torch.empty(1, 1, dim), torch.empty(1, 1, value_dim))
    queries = kernels.query_tile(4, wide, shared)
    for kernel, constants, tiling in (
        (kernels._decode, dict(GROUP=4, M=16, **kernels.splitting(splits)), kernels.tiling(wide, dtype, shared)),
        (kernels._prefill, dict(ROWS_2=32, TILE_Q=queries, GROUP=4, M=kernels.power_of_2(4 * queries, 16)),
         kernels.tiling(wide, dtype, shared // 2)),
    ):
        options = {key: tiling.pop(key) for key in ("num_warps", "num_stages")}
        constants = {**constants, **tiling, **sizes, "BLOCK": 16, "WINDOW": 0, "SOFTCAP": 0.0, "sinks": None}
        if asked:
            constants["SOFTCAP"] = 72.0
        if asked is True:
            constants["WINDOW"] = 1000
            del constants["sinks"]
        pointers = {**{n: SHORT[name] for n in WEIGHTS}, **{n: "i32" for n in INTS}, "parts": "fp32", "logs": "fp32"}
        pointers["sinks"] = SHORT[name]
        signature, aligned = {}, {}
        for index, argument in enumerate(kernel.arg_names):
            if argument in constants:
                signature[argument] = "constexpr"
            elif argument in pointers:
                signature[argument] = "*" + pointers[argument]
            else:
                signature[argument] = "fp32" if argument == "scale" else "i32"
            if argument not in constants and argument != "scale":
                aligned[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        results.append([made.metadata.shared, shared, "mma" in made.asm["ptx"], len(made.asm["ptx"])])
print(json.dumps(results))
"""


def test_the_kernels_compile_for_other_gpus_and_fit_into_their_shared_memory():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, json.dumps(TARGETS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == 2 * len(TARGETS)
    for (needed, there, uses_matrix_units, _), target in zip(
        results, [t for t in TARGETS for _ in range(2)], strict=True
    ):
        assert needed <= there, target
        # (Triton multiplies without matrix units on a T4: slower, but decoding waits for memory in any case.)
        assert uses_matrix_units or target[2] == "float32" or target[0] < 80, target
    # With many parts (a small batch) the kernel is no longer: once it took 26 s of compiling instead of 3.
    few, many = (results[2 * TARGETS.index((90, 227, "bfloat16", 128, 128, False, splits))][3] for splits in (8, 64))
    assert many < 1.1 * few


@given(st.integers(1, 5000), st.integers(1, 64))
def test_a_tile_is_the_next_power_of_two(number, least):
    from asyncbatch.devices.cuda.kernels import power_of_2

    size = power_of_2(number, least)
    assert size & (size - 1) == 0
    assert max(number, least) <= size < 2 * max(number, least)


@given(st.sampled_from([16, 64, 128, 256, 512]), st.sampled_from([torch.float16, torch.float32]), st.integers(48, 256))
def test_tiles_in_flight_fit_into_the_shared_memory(dim, dtype, kib):
    from asyncbatch.devices.cuda.kernels import tiling

    chosen = tiling(dim, dtype, kib * 1024)
    bytes_in_flight = chosen["num_stages"] * 2 * chosen["TILE"] * dim * dtype.itemsize
    assert bytes_in_flight <= kib * 1024 or (chosen["TILE"], chosen["num_stages"]) == (16, 1)
    assert chosen["TILE"] >= 16

"""Two GPUs share a model: the same tokens as on one, by graphs that hold the collectives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("how", ["eager", "compile"])
def test_the_tokens_of_one_gpu(how):
    script = ROOT / "tests" / "support" / "ranks_on_gpus.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command, str(script), "random:tiny", how], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    told = json.loads(line.removeprefix("TOLD "))
    assert told["graphs"] > 0
    assert told["sync"] == told["async"] == told["alone"]
    greedy = range(0, 6, 2)
    assert [told["sync"][i][0] for i in greedy] == [told["first"][i] for i in greedy]
    assert told["digests"][0] == told["digests"][1]

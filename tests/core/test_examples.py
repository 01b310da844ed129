"""The tokens and the virtual-clock times of every committed example, to the last digit (see `support/examples.py`)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from support.examples import CASES, LOOPS, example

RECORDED = json.loads(gzip.decompress(Path(__file__).with_name("examples.json.gz").read_bytes()))


@pytest.mark.parametrize("mode", LOOPS)
@pytest.mark.parametrize("name", CASES)
def test_tokens_and_times_are_those_that_were_recorded(name, mode):
    now, then = json.loads(json.dumps(example(name, mode))), RECORDED[f"{name}, {mode}"]
    for key in then:
        assert now[key] == then[key], f"{key} differ"

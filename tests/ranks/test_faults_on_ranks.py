"""A rank that fails while it serves: all end, with one message, and what was finished is kept. Real processes."""

from __future__ import annotations

import json

import pytest
from support.on_ranks import fail
from support.workers import forked_ranks

from asyncbatch.ranks.errors import RankError
from asyncbatch.ranks.launch import on_ranks

WORDS = {
    "stop": ["rank 1"],
    "memory": ["rank 1", "failed", "MemoryError: no 3 GB are left"],
}


@pytest.fixture(scope="module", autouse=True)
def _forked():
    with forked_ranks():
        yield


@pytest.mark.parametrize("how", sorted(WORDS))
def test_a_rank_that_fails_ends_all(how, tmp_path):
    with pytest.raises(RankError):
        on_ranks(2, fail, how, str(tmp_path))
    told = [line for text in stderr(tmp_path) for line in text.splitlines() if line.startswith("asyncbatch: ")]
    assert len(told) == 1
    assert all(word in told[0] for word in WORDS[how]), told
    cause, finished = json.loads((tmp_path / "kept-0").read_text())
    assert len(finished) == 1
    assert len(finished[0]) == 4
    assert cause in told[0]
    if (tmp_path / "served").exists():
        assert (tmp_path / "served").read_text().startswith("error: ")


def stderr(folder):
    """Of both ranks."""
    return [(folder / f"stderr-{rank}").read_text() for rank in (0, 1)]


def test_other_versions_are_refused(tmp_path):
    with pytest.raises(RankError) as caught:
        on_ranks(2, fail, "version", str(tmp_path))
    assert "the same torch" in str(caught.value)
    assert "has 1.13" in str(caught.value)

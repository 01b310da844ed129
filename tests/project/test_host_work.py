"""`tools/host_work.py` compares what the loops cost the host, now and at an earlier commit."""

from __future__ import annotations

import io
import json
import subprocess

import pytest

from asyncbatch import Timeline
from tools import host_work


def test_the_host_work_of_a_decode_step_by_hand():
    timeline = Timeline("async")
    for step, (plan, commit) in enumerate([(1.0, 2.0), (3.0, 3.0), (5.0, 1.0), (90.0, 90.0)]):
        timeline.add("host", "plan", step, 100.0 * step, 100.0 * step + 1e-3 * plan)
        timeline.add("host", "wait", step, 100.0 * step + 1, 100.0 * step + 9)
        timeline.add("compute", "step", step, 100.0 * step, 100.0 * step + 50)
        timeline.add("host", "commit", step, 100.0 * step + 10, 100.0 * step + 10 + 1e-3 * commit)
        timeline.add_step(step, "prefill" if step == 3 else "decode", 1, 0)
    assert host_work.host_ms(timeline) == {name: pytest.approx(ms) for name, ms in
                                           (("plan", 3.0), ("commit", 2.0), ("total", 6.0))}  # fmt: skip

    median, tenth = host_work.median_and_tenth(timeline)
    assert (median, tenth) == (pytest.approx(6.0), pytest.approx(3.0 + 0.2 * 3.0))  # of 3, 6 and 6


def test_two_codes_are_compared_pair_by_pair():
    """A machine that is three times as slow for a while meets both codes of a pair, and changes no ratio."""
    before, after = [1.0, 3.0, 1.0, 1.0, 1.0], [0.5, 1.5, 0.6, 0.5, 0.4]
    assert host_work.compared(before, after) == (1.0, 0.5, pytest.approx(0.5), (pytest.approx(0.5), pytest.approx(0.5)))


def test_the_process_of_a_code_answers_each_line(monkeypatch, capsys):
    monkeypatch.setattr(host_work, "NEW_TOKENS", 3)
    monkeypatch.setattr("sys.stdin", io.StringIO("2\n2\n1\n"))
    host_work.serve()
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 3
    for answer in answers:
        assert list(answer) == ["sync", "async"]
        assert all(0 < tenth <= median for median, tenth in answer.values())


def test_a_commit_that_git_does_not_know(capsys, monkeypatch):
    if subprocess.run(["git", "rev-parse"], cwd=host_work.ROOT, capture_output=True, check=False).returncode:
        pytest.skip("this is no clone")
    assert host_work.main(["no-such-commit"]) == 2
    assert "no-such-commit" in capsys.readouterr().err


def test_the_package_of_a_commit_is_unpacked(tmp_path):
    if subprocess.run(["git", "rev-parse"], cwd=host_work.ROOT, capture_output=True, check=False).returncode:
        pytest.skip("this is no clone")
    host_work.unpack("HEAD", tmp_path)
    assert (tmp_path / "asyncbatch" / "__init__.py").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["asyncbatch"]

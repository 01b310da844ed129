"""A batcher goes on measuring after its overhead was measured, two methods are compared on one run, and after Ctrl-C
there is still a report."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_model

from asyncbatch import AsyncBatcher, Request, SyncBatcher, profile
from asyncbatch import traces as traces_module
from asyncbatch.crosscheck import KINETO_TOKENS, kineto, kineto_result, overhead

REQUESTS = [Request([1, 2, 3], 6, stop_token_ids=())] * 3


@pytest.mark.parametrize("loop", [SyncBatcher, AsyncBatcher])
def test_overhead_runs_in_turns_and_leaves_a_batcher_that_measures(loop, monkeypatch):
    with loop(tiny_model(), max_batch_size=2) as batcher:
        seen, run = [], batcher.run

        def watched(*arguments):
            completions = run(*arguments)
            lanes = {span.lane for span in batcher.timeline.spans}
            seen.append(("compute" in lanes, "points" in lanes))
            return completions

        monkeypatch.setattr(batcher, "run", watched)
        found = overhead(batcher, batcher, REQUESTS, pairs=3)
        assert seen == [(False, False), (True, True), (True, True), (False, False), (False, False), (True, True)]
        assert len(found["pairs"]) == 3
        assert found["share"] == sorted(found["pairs"])[1]
        batcher.run(REQUESTS)
        assert seen[-1] == (True, False)


def test_overhead_can_compare_with_another_batcher():
    with SyncBatcher(tiny_model(), max_batch_size=2) as measuring, SyncBatcher(tiny_model(), max_batch_size=2) as plain:
        found = overhead(measuring, plain, REQUESTS, pairs=4)
        assert len(found["pairs"]) == 4
        assert measuring.timeline.summary().steps == 12
        assert {span.lane for span in measuring.timeline.spans} >= {"compute", "points"}
        assert plain.timeline.spans == []
        plain.run(REQUESTS)
        assert "compute" in {span.lane for span in plain.timeline.spans}


def test_kineto_compares_both_methods_over_the_same_steps(monkeypatch):
    written = []

    class Profile:
        """As torch.profiler.profile, which has nothing to see here."""

        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def export_chrome_trace(self, path):
            written.append(path)

    def asked(trace, start_s, end_s):
        assert (start_s, end_s) == (1.0, 4.0), "from the end of the first step to the end of the last"
        return 0.5

    trace = SimpleNamespace(
        steps=np.array([[0.0, 1.0], [2.0, 4.0]]), graph_launches=(2, 8), num_kernels=10, step_active=0.7
    )
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(traces_module, "read_trace", lambda path: trace)
    monkeypatch.setattr(traces_module, "busy_in", asked)
    with SyncBatcher(tiny_model(), max_batch_size=2) as batcher:
        long = [Request([1, 2], KINETO_TOKENS + 20, stop_token_ids=())]
        found = kineto(batcher, long)
        assert batcher.timeline.summary().tokens == KINETO_TOKENS
        active = batcher.timeline.summary().device_active
        assert found["event_active"] == pytest.approx(active, abs=0.2)
        assert (found["busy"], found["kernels"], len(written)) == (0.5, 10, 1)
        with pytest.raises(ValueError, match="--kineto needs a run of two steps or more"):
            kineto(batcher, [Request([1, 2], 1)])


@pytest.mark.parametrize(
    ("busy", "active", "launches", "kernels", "steps", "said"),
    [
        (0.95, 0.96, (10, 900), 1000, 10, ["10 graph replays, 900 of 1000 kernels in them"]),
        (0.90, 0.99, (10, 900), 1000, 9, ["DISAGREE by more than 2 points: between the kernels"]),
        (
            0.85,
            0.97,
            (10, 900),
            1000,
            10,
            ["to its last one, 92.50%: 4.5 points less", "the other 7.5 points are gaps"],
        ),
        (0.02, 0.99, (10, 0), 5, 10, ["did not see into the graphs", "DISAGREE"]),
        (0.95, 0.96, None, 1000, 10, ["does not say which kernels came from graph replays"]),
    ],
)
def test_two_methods_are_compared_in_words(busy, active, launches, kernels, steps, said):
    trace = SimpleNamespace(graph_launches=launches, num_kernels=kernels, steps=range(10), step_active=0.925)
    found = kineto_result(busy, active, trace, steps)
    assert found["differs"] is ("DISAGREE" in found["note"]) is (active - busy > 0.02)
    assert found["step_active"] == (0.925 if steps == 10 else None)
    assert all(words in found["note"] for words in said)


@pytest.mark.parametrize("ended", ["first run", "second run"])
def test_ctrl_c_ends_early_with_a_report_on_what_ran(ended, monkeypatch, capsys, tmp_path):
    class Stopped(SyncBatcher):
        runs = 0

        def run(self, *arguments):
            self.runs += 1
            return super().run(*arguments)

        def commit(self, slot):
            # The warm-up is the first run.
            if self.runs == (2 if ended == "first run" else 3) and slot.plan.step == 9:
                raise KeyboardInterrupt
            super().commit(slot)

    monkeypatch.setitem(profile.BATCHERS, "sync", Stopped)
    arguments = "--model random:tiny --mode sync --batch-size 2 --requests 2 --new-tokens 20 --repeats 3 --json"
    assert profile.main([*arguments.split(), "--out", str(tmp_path)]) == 130
    out, error = capsys.readouterr()
    (run,) = json.loads(out)["runs"]
    assert run["interrupted"] is (ended == "first run")
    assert run["steps"] == (9 if ended == "first run" else 20)
    assert run["tokens"] == 2 * run["steps"]
    assert "interrupted; the report is about what ran" in error
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(out)
    assert (tmp_path / "report.html").exists()

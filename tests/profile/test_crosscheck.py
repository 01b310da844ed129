"""A batcher goes on measuring after its overhead was measured, two methods are compared on one run, and after Ctrl-C
there is still a report."""

from __future__ import annotations

import itertools
import json
import statistics
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import tiny_model

from asyncbatch import AsyncBatcher, Request, SyncBatcher, Timeline
from asyncbatch.profile import cli, crosscheck
from asyncbatch.profile import turns as turns_module
from asyncbatch.profile.crosscheck import KINETO_TOKENS, kineto, kineto_result, overhead
from asyncbatch.profile.traces import read as traces_module
from asyncbatch.profile.traces.coverage import Coverage

REQUESTS = [Request([1, 2, 3], 6, stop_token_ids=())] * 3


@pytest.mark.parametrize("loop", [SyncBatcher, AsyncBatcher])
def test_overhead_measures_with_one_batcher_and_nothing_with_the_other(loop, monkeypatch):
    monkeypatch.setattr(crosscheck, "PAIRS", 1)
    with loop(tiny_model(), max_batch_size=2) as measuring, loop(tiny_model(), max_batch_size=2) as plain:
        found = overhead(measuring, plain, REQUESTS)
        assert found.share == statistics.median(found.pairs)
        assert measuring.timeline.summary().steps == 12
        assert {span.lane for span in measuring.timeline.spans} >= {"compute", "points"}
        assert plain.timeline.spans == plain.timeline.steps == []
        for batcher in (measuring, plain):  # and afterwards both do as they always do
            batcher.run(REQUESTS)
            lanes = {span.lane for span in batcher.timeline.spans}
            assert "compute" in lanes
            assert "points" not in lanes


class Turns:
    """Just enough of a batcher: its turns take the times that `seconds(turn)` says, and it ends after 45."""

    def __init__(self, clock, seconds, order):
        self.clock, self.seconds, self.order = clock, seconds, order
        self.slots, self.device, self.timeline = [0, 1], SimpleNamespace(now=clock.now), Timeline()
        self.done, self.handles = 0, []

    def run(self, requests):
        assert requests == []
        self.done, self.handles = 0, []

    def submit(self, request):
        self.handles.append(SimpleNamespace(completion=None))
        return self.handles[-1]

    def turn(self):
        if self.done == 45:
            return False
        self.order.append(self)
        self.clock.time += self.seconds(self.done)
        self.done += 1
        if self.done == 45:
            for handle in self.handles:
                handle.completion = SimpleNamespace(error=None)
        return True


@given(st.floats(0.9, 1.1), st.floats(0, 0.01))
@settings(deadline=None)
def test_overhead_is_told_though_later_steps_take_longer_and_a_stretch_begins_slowly(cost, drift):
    clock, order = SimpleNamespace(time=0.0), []
    clock.now = lambda: clock.time

    def plain_s(turn):
        return (1 + drift * turn) * (7 if turn % crosscheck.STRETCH < 3 else 1)

    measuring = Turns(clock, lambda turn: cost * plain_s(turn), order)
    plain = Turns(clock, plain_s, order)
    with mock.patch.object(crosscheck.time, "perf_counter", clock.now):
        found = overhead(measuring, plain, REQUESTS)
    assert found.share == pytest.approx(cost - 1, abs=1e-9)
    assert found.ms_per_step == pytest.approx(1e3 * (cost - 1), rel=45 * drift + 1e-6, abs=1e-9)
    assert order.count(measuring) == order.count(plain) == len(order) / 2
    # In turns, and which of them begins a pair changes too: two stretches of the same one at most.
    assert max(len(list(turns)) for _, turns in itertools.groupby(order)) == 2 * crosscheck.STRETCH


def test_requests_that_are_too_short_tell_no_overhead(monkeypatch):
    monkeypatch.setattr(crosscheck, "ENOUGH_S", 0.1)
    with SyncBatcher(tiny_model(), max_batch_size=2) as measuring, SyncBatcher(tiny_model(), max_batch_size=2) as plain:
        assert overhead(measuring, plain, [Request([1], 1)]) is None


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
        steps=np.array([[0.0, 1.0], [2.0, 4.0]]),
        graph_launches=(2, 8),
        num_kernels=10,
        step_active=0.7,
        coverage=Coverage(),
        collectives_in_steps_s=[0.25, 0.5],
    )
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(traces_module, "read_trace", lambda path, graphs: trace)
    monkeypatch.setattr(traces_module, "busy_in", asked)
    with SyncBatcher(tiny_model(), max_batch_size=2) as batcher:
        long = [Request([1, 2], KINETO_TOKENS + 20, stop_token_ids=())]
        found, in_collectives = kineto(batcher, long)
        assert batcher.timeline.summary().tokens == KINETO_TOKENS
        active = batcher.timeline.summary().device_active
        assert found.event_active == pytest.approx(active, abs=0.2)
        assert (found.busy, found.kernels, len(written)) == (0.5, 10, 1)
        assert in_collectives == {}, "the trace has two steps, and the run has more"
        with pytest.raises(ValueError, match="--kineto needs a run of two steps or more"):
            kineto(batcher, [Request([1, 2], 1)])
        trace.coverage = Coverage(True, {"graph launches": 9}, {"graph launches": 4})
        written.clear()
        lost, in_collectives = kineto(batcher, long)
        assert batcher.timeline.summary().tokens == KINETO_TOKENS // 16, "with fewer and fewer steps"
        assert (lost.busy, lost.differs, len(written)) == (None, None, 3)
        assert "4 of 9 graph launches have no event of the device" in lost.note
        assert in_collectives == {}
        trace.coverage = Coverage()
        written.clear()
        _, in_collectives = kineto(batcher, [Request([1, 2], 2, stop_token_ids=())], all_of=lambda one: False)
        assert (in_collectives, len(written)) == ({0: 0.25, 1: 0.5}, 3), "another rank's trace is not complete"


def test_each_replay_of_a_graph_is_numbered_by_its_kind_and_what_is_launched_eagerly_is_not():
    with SyncBatcher(tiny_model(), max_batch_size=2) as batcher, crosscheck._replays(batcher) as graphs:
        assert graphs is None, "no graphs on the CPU"
    ran = []
    slots = {(0, "mixed"), (1, "mixed"), (0, "decode"), (1, "decode")}
    program = SimpleNamespace(graphs=dict.fromkeys(sorted(slots)), run=lambda *command: ran.append(command))
    with crosscheck._replays(SimpleNamespace(device=SimpleNamespace(program=program))) as graphs:
        for command in (("copy_in", 0), ("mixed", 0), ("prefill", 1), ("decode", 1), ("decode", 0), ("mixed", 1)):
            program.run(*command)
    mixed, decode, *others = graphs
    assert (mixed != decode, others) == (True, [decode, mixed])
    assert min(graphs) == 1
    assert len(ran) == 6


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
    assert found.differs is ("DISAGREE" in found.note) is (active - busy > 0.02)
    assert found.step_active == (0.925 if steps == 10 else None)
    assert all(words in found.note for words in said)


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

    monkeypatch.setitem(turns_module.BATCHERS, "sync", Stopped)
    arguments = "--model random:tiny --mode sync --batch-size 2 --requests 2 --new-tokens 20 --repeats 3 --json"
    assert cli.main([*arguments.split(), "--out", str(tmp_path)]) == 130
    out, error = capsys.readouterr()
    (run,) = json.loads(out)["runs"]
    assert run["interrupted"] is (ended == "first run")
    assert run["steps"] == (9 if ended == "first run" else 20)
    assert run["tokens"] == 2 * run["steps"]
    assert "interrupted; the report is about what ran" in error
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(out)
    assert (tmp_path / "report.html").exists()

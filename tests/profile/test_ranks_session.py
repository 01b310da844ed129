"""The profiling script under torchrun, as far as one process can tell: what is refused, whose clock counts, what is
drawn and recorded. (test_ranks_torchrun.py has real ranks.)"""

from __future__ import annotations

import io
import queue
import shlex
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.ranks import made_run, measured_by, report_on, shared_model
from support.recordings import SESSION, row_of

from asyncbatch.measure.recording import Recording
from asyncbatch.profile import rank_options, together
from asyncbatch.profile.console import muted, tell
from asyncbatch.profile.machine import device_name
from asyncbatch.profile.options import parse_arguments
from asyncbatch.profile.page import page
from asyncbatch.profile.rank_options import own_rank, processes, refuse_for_ranks, words_of_torchrun
from asyncbatch.profile.rank_pictures import collective_spans, plot_runs, write_traces
from asyncbatch.profile.together import ALONE, Together
from asyncbatch.timeline import load_trace

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "here",
            "MASTER_PORT": "1"}  # fmt: skip


# ---- the command line ---------------------------------------------------------------------------------------------


def test_only_torchrun_makes_several_processes():
    assert (processes(TORCHRUN), own_rank(TORCHRUN)) == (4, 1)
    other = {name: value for name, value in TORCHRUN.items() if name != "TORCHELASTIC_RUN_ID"}
    assert (processes(other), own_rank(other)) == (1, 0), "a scheduler of jobs sets some of these, too"
    assert (processes({}), own_rank({})) == (1, 0)
    assert processes({**TORCHRUN, "WORLD_SIZE": "1"}) == 1


def test_a_report_tells_how_many_processes_torchrun_started():
    assert words_of_torchrun(TORCHRUN) == ("--nproc-per-node", "4")
    two_machines = {**TORCHRUN, "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    assert words_of_torchrun(two_machines) == ("--nnodes", "2", "--nproc-per-node", "8")


def test_without_torchrun_the_command_to_type_is_told():
    command = ["--tp", "2", "--model", "my model", "--requests", "5"]
    with pytest.raises(ValueError, match="--tp 2: 2 processes share the model, and torchrun starts them") as caught:
        refuse_for_ranks(parse_arguments(command), 1)
    told = shlex.split(str(caught.value).splitlines()[1])
    assert told == ["torchrun", "--nproc-per-node", "2", "-m", "asyncbatch.profile", *command]
    refuse_for_ranks(parse_arguments(["--tp", "1"]), 1)


@pytest.mark.parametrize(
    ("words", "size", "problem"),
    [
        ("--tp 3", 4, "3 is no divisor of 4"),
        ("--trace t.json", 2, "--trace cannot be had under torchrun with 2 processes: it measures nothing"),
        ("--compare a b", 2, "--compare cannot be had"),
        ("--emulate h200-llama-8b", 2, "--emulate cannot be had"),
        ("--tp 2 --step-ms 5", 2, "would not meet in collectives"),
        ("--preset headline", 2, "--preset cannot be had"),
        ("--overhead", 2, "--overhead cannot be had"),
        ("--engine transformers", 2, "with --tp 2 it serves beside this package"),
        ("--engine transformers --tp 2", 4, "with --tp 4 it serves beside this package"),
        ("--device cuda:1", 2, "say cuda and not cuda:1"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason(words, size, problem):
    with pytest.raises(ValueError, match=problem):
        refuse_for_ranks(parse_arguments(words.split()), size)


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ("", 2),
        ("--tp 2 --engine asyncbatch,transformers --kineto --record x --out o", 2),
        ("--tp 2 --arrivals poisson:5", 8),
        ("--step-ms 5", 4),
        ("--device cuda --mode async --budget-s 9 --host-work-ms 3", 2),
    ],
)
def test_everything_else_can_be_had(words, size):
    refuse_for_ranks(parse_arguments(words.split()), size)


def test_a_model_on_the_cpu_cannot_be_shared_beside_gpus(monkeypatch):
    monkeypatch.setattr(rank_options.torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES= hides them"):
        refuse_for_ranks(parse_arguments(["--tp", "2", "--device", "cpu"]), 2)
    refuse_for_ranks(parse_arguments(["--device", "cpu"]), 2)


def test_a_rank_that_does_not_speak_puts_its_name_before_warnings(monkeypatch, capsys):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with muted(3):
        tell("not this")
        print("nor that")
        print("a warning\nof two lines", file=sys.stderr)
        sys.stderr.write("50 %\r100 %\n")
        sys.stderr.write("no whole line")
    assert stream.getvalue() == "rank 3: a warning\nrank 3: of two lines\nrank 3: 100 %\n"
    assert capsys.readouterr().out == ""


# ---- whose clock --------------------------------------------------------------------------------------------------


class World:
    """Two ranks as two threads."""

    def __init__(self, rank, exchange):
        self.rank, self.size, self.tp, self.tp_rank, self.replica, self.replicas = rank, 2, 2, rank, 0, 1
        self.leads, self.exchange = rank == 0, exchange

    def share(self, thing):
        if self.rank == 0:
            self.exchange[0].put(thing)
            return thing
        return self.exchange[0].get(timeout=60)

    def gather(self, thing):
        if self.rank == 1:
            self.exchange[1].put(thing)
            return None
        return [thing, self.exchange[1].get(timeout=60)]


@pytest.mark.parametrize(
    ("ahead_s", "places"), [(1000.0, ("one", "two")), (-3.5, ("one", "two")), (0.0, ("one", "one"))]
)
def test_the_clock_of_another_machine_is_put_on_rank_0s(monkeypatch, ahead_s, places):
    of_thread = threading.local()
    monkeypatch.setattr(together, "this_place", lambda: places[of_thread.rank])
    clock = SimpleNamespace(
        perf_counter=lambda: time.perf_counter() + ahead_s * of_thread.rank, sleep=time.sleep
    )  # fmt: skip
    monkeypatch.setattr(together, "time", clock)
    exchange, found = (queue.Queue(), queue.Queue()), {}

    def join(rank):
        of_thread.rank = rank
        found[rank] = Together(World(rank, exchange))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (found[0].offset_s, found[0].clock_error_s) == (0.0, None)
    if places[0] == places[1]:
        assert (found[1].offset_s, found[1].clock_error_s) == (0.0, None)
    else:
        assert abs(found[1].offset_s + ahead_s) <= found[1].clock_error_s, "known to within what is said"


def test_a_run_is_moved_as_a_whole():
    (_, one) = shared_model("sync")
    moved = one.moved(-2.5, 1e-4)
    assert moved.clock_error_s == 1e-4
    assert moved.timeline.origin == pytest.approx(one.timeline.origin - 2.5)
    assert moved.timeline.summary().idle == pytest.approx(one.timeline.summary().idle)
    assert moved.shortened().timeline.spans == moved.timeline.spans
    one.timeline.add("points", "schedule", 0, 100.0, 100.001)
    assert {span.lane for span in one.shortened().timeline.spans} == {"host", "compute"}


def test_one_process_has_nobody_to_ask():
    assert (ALONE.share(3), ALONE.gather(3), ALONE.all_of(True), ALONE.all_of(False)) == (3, [3], True, False)


# ---- drawn, and recorded ------------------------------------------------------------------------------------------


def test_each_rank_is_drawn_with_its_waiting_at_the_end_of_its_steps():
    runs = [shared_model("sync"), shared_model("async", begins_ms=(0.0, 1.0), at_s=200.0)]
    spans = collective_spans(runs[0])
    first = spans[0][0]  # rank 0's step 0 ends at 100.01; of the 4 ms in collectives it waits for 3
    assert (first.step, first.arrived, first.began, first.ended) == pytest.approx((0, 100.006, 100.009, 100.01))
    assert spans[1][0].began == pytest.approx(spans[1][0].arrived), "the slowest waits for nobody"
    figure = plot_runs([ranks[0].timeline for ranks in runs], runs)
    assert [track.name for track in figure.tracks] == ["sync, rank 0", "sync, rank 1", "async, rank 0", "async, rank 1"]
    assert [track.origin for track in figure.tracks] == pytest.approx([100, 100, 200, 200])
    about, _ = figure.packed()
    assert [lane["lane"] for lane in about["lanes"]] == ["host", "compute"]
    assert "37.5 % waits" in about["tracks"][0]["caption"]
    assert collective_spans(shared_model("sync", collectives_ms=None)) == {}
    # A run of which only rank 0 is left, since another was lost, stands beside the others.
    figure = plot_runs([ranks[0].timeline for ranks in runs], [runs[0], ()])
    assert [track.name for track in figure.tracks] == ["sync, rank 0", "sync, rank 1", "async"]


def test_a_page_of_ranks_says_what_the_picture_cannot():
    runs = [shared_model("sync")]
    shown = page(report_on(measured_by(runs, "sync")), [runs[0][0].timeline], runs)
    assert "it stands at the step&#39;s end, added up" in shown or "it stands at the step's end, added up" in shown
    assert "sync: ranks; in collectives and waiting are shares of a decode step" in shown


def test_the_trace_has_all_ranks_of_a_run_on_one_clock(tmp_path):
    late = shared_model("sync")
    late = (late[0], replace(late[1], timeline=made_run("sync", 3.0, at_s=100.5)))
    write_traces(tmp_path / "trace.json", [late[0].timeline], [late])
    found = load_trace(tmp_path / "trace.json")
    assert [one.label for one in found] == ["sync, rank 0", "sync, rank 1"]
    assert found[1].spans == late[1].timeline.spans
    events = [event for event in __import__("json").loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    starts = [min(event["ts"] for event in events if event["ph"] == "X" and event["pid"] == pid) for pid in (1, 2)]
    assert starts == pytest.approx([0.0, 0.5e6]), "both from the beginning of the run"


def recording_of_ranks():
    ranks = [shared_model(mode, steps=5, at_s=0.0) for mode in ("sync", "async")]
    rows = [row_of(group[0].timeline, batch=2) for group in ranks]
    report = {**SESSION, "runs": rows, "workload": {"tp": 2, "replicas": 1}}
    return Recording.from_runs("two", report, [group[0].timeline for group in ranks],
                               [[one.steps for one in group] for group in ranks])  # fmt: skip


def test_a_recording_has_the_times_of_each_rank_and_emulates_rank_0(tmp_path):
    recording = recording_of_ranks()
    recording.save(tmp_path / "two.json")
    again = Recording.load(tmp_path / "two.json")
    run = again.runs[1]
    assert (run["tp"], run["replicas"]) == (2, 1)
    assert [rank["rank"] for rank in run["ranks"]] == [0, 1]
    assert run["ranks"][0]["collectives_us"] == [4000] * 5
    assert "steps" not in run["ranks"][0], "they are the run's own"
    assert run["ranks"][1]["steps"]["device_us"] == [7000] * 5
    assert run["ranks"][1]["totals"]["idle"] == pytest.approx(0.3)
    times = again.step_times(2)
    assert times("decode", 8) == pytest.approx(8e-3), "rank 0's step, with the 4 ms that it is in collectives"
    name = device_name(again.stand_in_model(), None, again)
    assert "one of 2 ranks that share a model, its collectives included; 2 GPUs" in name
    whole = Recording({**again.data, "runs": [{k: v for k, v in run.items() if k not in ("tp", "replicas", "ranks")}]})
    assert whole.of_ranks == ""


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda rank: rank["totals"].update(idle=0.1), "rank 1: idle is stated as 0.1"),
        (lambda rank: rank["collectives_us"].pop(), "rank 1: 4 times in collectives for 5 steps"),
        (lambda rank: rank.pop("tp_rank"), "rank 1: tp_rank missing"),
        (lambda rank: rank.pop("steps"), "rank 1: 'steps'"),
    ],
)
def test_a_recording_whose_ranks_do_not_fit_is_refused(change, problem):
    recording = recording_of_ranks()
    change(recording.runs[0]["ranks"][1])
    with pytest.raises(ValueError, match=problem):
        recording.check()

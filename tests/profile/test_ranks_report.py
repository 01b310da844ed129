"""The report on several ranks, against numbers that were worked out by hand: idle by rank, waiting, the sentences."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.ranks import made_run, measured_by, report_on, shared_model

from asyncbatch.measure.percentile import median_lies_within
from asyncbatch.profile.conditions import ModelFacts
from asyncbatch.profile.page import page
from asyncbatch.profile.place import Place
from asyncbatch.profile.rank_times import RankTimes, Waits, lasting_until_all_are_done, without_waiting
from asyncbatch.profile.report import Report
from asyncbatch.profile.terminal import plain, sections
from asyncbatch.profile.text import table
from asyncbatch.request import Completion

jsonschema = pytest.importorskip("jsonschema")
SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text(encoding="utf-8"))


def both_modes():
    """Six pairs of runs. In turns, rank 1's host is 1 ms later in each step, and rank 0 waits for it; overlapped,
    nobody waits, and the exchange of 1 ms is all."""
    sync = [shared_model("sync") for _ in range(6)]
    other = [shared_model("async", begins_ms=(0.0, 0.0), ends_ms=7.0, collectives_ms=(1.0, 1.0)) for _ in range(6)]
    return measured_by(sync, "sync"), measured_by(other, "async")


def test_ranks_are_told_one_by_one_and_the_run_is_their_mean():
    run = report_on(*both_modes()).runs[0]
    # Periods of 10 ms; rank 0 computes for 8 of them, rank 1 for 7.
    assert [one.idle for one in run.ranks] == pytest.approx([0.2, 0.3])
    assert [one.host_ms_per_step for one in run.ranks] == pytest.approx([2, 3])
    assert [one.device_ms_per_step for one in run.ranks] == pytest.approx([8, 7])
    assert (run.idle, run.host_ms_per_step, run.device_ms_per_step) == pytest.approx((0.25, 2.5, 7.5))
    # The same tokens on both ranks are not twice as many.
    assert (run.tokens, run.steps, run.measured_steps) == (82, 41, 40)
    assert run.wall_s == pytest.approx(0.41)
    assert [one.requests for one in run.ranks] == [4, None]


def test_of_the_time_in_collectives_the_least_is_the_exchange_and_the_rest_is_waiting():
    run = report_on(*both_modes()).runs[0]
    # 40 decode steps. Rank 0 is in collectives for 4 ms of 8, of which it waits 3; rank 1 for 1 ms of 7.
    assert [one.collectives_s for one in run.ranks] == pytest.approx([0.16, 0.04])
    assert [one.waiting_s for one in run.ranks] == pytest.approx([0.12, 0.0])
    assert [one.in_collectives for one in run.ranks] == pytest.approx([4 / 8, 1 / 7])
    assert [one.waiting for one in run.ranks] == pytest.approx([3 / 8, 0.0])
    (slowest,) = run.slowest
    assert (slowest.rank, slowest.replica, slowest.seen_in) == (1, 0, "collectives")
    assert (slowest.share, slowest.waiting_ms_per_step, slowest.transfer_ms_per_step) == pytest.approx((3 / 8, 3, 1))


def test_of_four_ranks_the_share_is_the_mean_over_those_that_wait():
    ranks = shared_model("sync", begins_ms=(2, 2, 2, 2), collectives_ms=(3.0, 1.0, 2.0, 4.0))
    (slowest,) = report_on(measured_by([ranks], "sync"), tp=4).runs[0].slowest
    assert slowest.rank == 1
    assert slowest.share == pytest.approx((2 / 8 + 1 / 8 + 3 / 8) / 3)
    assert slowest.waiting_ms_per_step == pytest.approx(2)


def test_where_nobody_timed_collectives_the_shortest_step_began_last():
    ranks = shared_model("sync", collectives_ms=None)
    run = report_on(measured_by([ranks], "sync")).runs[0]
    (slowest,) = run.slowest
    assert (slowest.rank, slowest.seen_in, slowest.transfer_ms_per_step) == (1, "step lengths", None)
    assert slowest.share == pytest.approx(1 / 8), "8 ms of rank 0 beside 7 of rank 1"
    assert [one.collectives_s for one in run.ranks] == [None, None]
    # One more run under a profiler knows the kernels, and counts in its place.
    profiled = [replace(one, kernels=True) for one in shared_model("sync")]
    run = report_on(measured_by([ranks], "sync", profiled)).runs[0]
    assert (run.slowest[0].seen_in, run.slowest[0].transfer_ms_per_step) == ("kernels of collectives", pytest.approx(1))
    assert [one.waiting for one in run.ranks] == pytest.approx([3 / 8, 0.0])


def test_only_steps_that_all_ranks_have_are_compared():
    ranks = shared_model("sync")
    ranks[1].timeline.steps = ranks[1].timeline.steps[:-3]
    waits = Waits.of(ranks)
    assert waits.device_s.shape == (2, 37)
    assert Waits.of(ranks[:1]) is None


# ---- sentences ----------------------------------------------------------------------------------------------------


def test_the_first_sentences_are_true_of_ranks_and_the_same_everywhere():
    report = report_on(*both_modes())
    idle, why, waits, first, gain, believe = report.sentences
    assert idle == (
        "The synchronous loop leaves the devices idle for 25.0% of the time, the mean over 2 ranks; rank 1's, the "
        "most, for 30.0%, measured over 40 of 41 steps."
    )
    assert why.startswith("Why rank 0's device is idle, by who could mend it: the host's code 100%")
    assert waits == (
        "The slowest is rank 1: for it the other ranks wait 37.5% of their decode steps, 3.000 ms each; the "
        "collectives of a step take 1.000 ms without that."
    )
    assert first.startswith("Eliminate this first, on every rank: schedule (")
    # 41 steps of 10 ms beside 41 of 7; of six pairs.
    low, high, _ = median_lies_within([410 / 287] * 6)
    assert f"{410 / 287:.3f}x as fast (between {low:.3f}x and {high:.3f}x, 97% sure, 6 pairs of runs)" in gain
    assert "predicted from the synchronous run of rank 0:" in gain
    assert believe.startswith(("Nothing speaks against", "Prediction and measurement disagree"))
    text, shown = table(report), page(report, [])
    for sentence in report.sentences:
        assert sentence in text
        assert sentence.replace("'", "&#39;") in shown.replace("&#x27;", "&#39;")
    assert text.count("2 ranks; idle and times of a step are means over them") == 2


def test_waiting_for_a_rank_is_the_loops_doing_and_disturbs_no_pair():
    """Rank 0's steps take 8 ms in turns and 7 overlapped, as it waits for rank 1 in the one and not in the other. On
    rank 1 they take 7 ms in both: nothing else kept the machine busy."""
    sync, other = both_modes()
    (comparison,) = report_on(sync, other).comparisons
    assert comparison.device_ratios == pytest.approx([1.0] * 6)
    alone = [replace(one, ranks=[]) for one in (sync, other)]
    assert report_on(*alone).comparisons[0].device_ratios == pytest.approx([7 / 8] * 6), "as for rank 0 by itself"
    ranks = sync.ranks[0]
    assert without_waiting(ranks[0].timeline, ranks).summary().wall_s == ranks[0].timeline.summary().wall_s


def test_where_nobody_waits_no_rank_is_named():
    ranks = shared_model("sync", begins_ms=(2.0, 2.0), collectives_ms=(1.0, 1.01))
    report = report_on(measured_by([ranks], "sync"))
    assert report.waits == (
        "No rank keeps the others waiting: 0.1% of their decode steps, 0.010 ms each; the collectives of a step take "
        "1.000 ms without that."
    )


# ---- replicas -----------------------------------------------------------------------------------------------------


def two_replicas():
    """Replica 0 answers 3 requests in 41 steps, replica 1 one in 21; nothing is shared."""
    long, short = made_run("sync", 2.0), made_run("sync", 4.0, steps=21)
    return (
        RankTimes(0, 0, 0, "here", long, requests=3),
        RankTimes(1, 1, 0, "here", short, requests=1),
    )


def test_of_replicas_tokens_and_steps_are_all_and_the_time_is_that_of_the_last():
    ranks = two_replicas()
    run = report_on(measured_by([ranks], "sync"), tp=1, replicas=2).runs[0]
    assert (run.tokens, run.steps, run.measured_steps, run.decode_steps) == (2 * 62, 62, 60, 60)
    assert run.tokens_per_s == pytest.approx(124 / 0.41)
    assert run.idle == pytest.approx((0.2 + 0.4) / 2)
    assert run.slowest == ()
    assert [one.waiting_s for one in run.ranks] == [None, None]
    report = report_on(measured_by([ranks], "sync"), tp=1, replicas=2)
    assert "measured over 60 of 62 steps." in report.idleness, "the first of each replica has no period"
    assert report.waits == (
        "2 replicas answered 3, 1 requests; the first to be done had nothing to do for the last 49% of the run."
    )


def test_rank_0_waits_for_the_last_replica_and_the_wall_time_says_so():
    long, short = made_run("sync", 2.0), made_run("sync", 2.0, steps=21)
    ranks = (RankTimes(0, 0, 0, "here", short, requests=1), RankTimes(1, 1, 0, "here", long, requests=3))
    lasting_until_all_are_done(short, ranks)
    assert short.summary().wall_s == pytest.approx(0.41)
    run = report_on(measured_by([ranks], "sync"), tp=1, replicas=2).runs[0]
    assert run.wall_s == pytest.approx(0.41)
    assert [one.wall_s for one in run.ranks] == pytest.approx([0.21, 0.41]), "a rank's own ends with its last step"
    assert run.idle == pytest.approx(0.2), "and it is no idle time between steps"


# ---- floors, JSON -------------------------------------------------------------------------------------------------


def test_floors_are_of_one_ranks_part_with_the_sums_between_ranks():
    facts = ModelFacts("bfloat16", weight_bytes=10**9, kv_bytes_per_token=10**6, flops_per_token=10**9,
                       collectives_s=1e-3)  # fmt: skip
    place = Place("a GPU", bandwidth=1e12, models={"smollm2": facts}, matmul=1e15)
    answers = [Completion([1] * 5, "length") for _ in range(4)]
    ranks = shared_model("sync")
    one = measured_by([ranks], "sync", completions=answers, batch_size=2)
    one.prompts = (10,) * 4
    run = report_on(one, place=place).runs[0]
    # 41 steps read 1 GB, 1 ms, and 2 rows * (step + 1) tokens of 1 MB, 1 us each; and each has 1 ms of sums.
    assert run.floor_s == pytest.approx(41 * 2e-3 + 1e-6 * 2 * 41 * 42 / 2)
    # Two rows, four requests of 5 tokens: 8 decode steps. The prompts take one reading of the weights.
    floor = run.request_floor
    context = 4 * sum(10 + n for n in range(1, 5))
    assert (floor.decode_steps, floor.collectives_s) == (8, pytest.approx(8e-3))
    assert floor.floor_s == pytest.approx(8 * 1e-3 + context * 1e-6 + 1e-3 + 8e-3)
    # Two replicas with one rank each share the four requests: half as many steps.
    facts = replace(facts, collectives_s=None)
    two = measured_by([two_replicas()], "sync", completions=answers, batch_size=2)
    two.prompts = (10,) * 4
    run = report_on(two, tp=1, replicas=2, place=replace(place, models={"smollm2": facts})).runs[0]
    assert (run.request_floor.decode_steps, run.request_floor.collectives_s) == (4, None)
    assert run.request_floor.floor_s == pytest.approx(4e-3 + context / 2 * 1e-6 + 1e-3)
    assert run.floor_s == pytest.approx(41e-3 + 1e-6 * 2 * 41 * 42 / 2), "of the replica that has most to do"


def test_the_report_is_as_the_schema_says_and_reads_back():
    sync, other = both_modes()
    sync.runs[-1][0].label = "sync"
    ranks = [replace(one, clock_error_s=2e-4 if one.rank else None) for one in shared_model("sync")]
    sync.ranks = [tuple(ranks)] * 6
    sync.runs = [(ranks[0].timeline, [])] * 6
    data = report_on(sync, other).to_json() | {"device": "d", "model": "m"}
    problems = [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(data)]
    assert problems == []
    assert (data["workload"]["tp"], data["workload"]["replicas"]) == (2, 1)
    assert json.dumps(Report.from_json(data).to_json()) == json.dumps(data)
    note = "Rank 1 read another clock than rank 0, on another machine"
    assert note in table(Report.from_json(data))
    assert note in page(Report.from_json(data), [])


def test_a_run_of_one_process_says_nothing_of_ranks():
    run = made_run("sync", 2.0)
    one = measured_by([(RankTimes(0, 0, 0, "here", run),)], "sync")
    one.ranks = []
    report = report_on(one, tp=None, replicas=None)
    assert "ranks" not in report.runs[0].to_json()
    assert "rank" not in table(report)
    assert [section.title for section in sections(report) if "rank" in section.title] == []


def test_the_terminal_has_a_line_for_each_rank():
    made = sections(report_on(*both_modes()))
    lines = plain(made[0])
    assert lines[0].startswith("sync: ranks;")
    assert lines[2].split() == ["0", "0", "20.00%", "2.000", "ms", "8.000", "ms", "50.0%", "37.5%", "4", "0.410", "s"]
    assert lines[3].split() == ["1", "0", "30.00%", "3.000", "ms", "7.000", "ms", "14.3%", "0.0%", "-", "0.410", "s"]

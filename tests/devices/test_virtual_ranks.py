"""Ranks on the virtual clock: times as computed by hand, and by a replay that is written apart; tokens of one rank."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbatch import AsyncBatcher, Request, SyncBatcher
from asyncbatch.devices.all_reduces import AllReduces, DisagreementError
from asyncbatch.devices.virtual import Costs
from asyncbatch.devices.virtual_ranks import VirtualRanks
from asyncbatch.measure.law import idle_share, step_on_ranks, step_time
from asyncbatch.models.toy import toy_llama
from asyncbatch.ordering.toy import use_toy_model
from asyncbatch.request import RequestError
from asyncbatch.streams import DeviceError
from asyncbatch.timeline import Timeline

MODEL, MS = toy_llama(), 1e-3
KINDS = {"sync": SyncBatcher, "async": AsyncBatcher}
NOTHING = Costs(plan=0, fill=0, launch=0, commit=0, copy_in=0, step=0, copy_out=0)


def open_ranks(kind: str, costs: list[Costs], all_reduces: AllReduces, **options):
    """(the ranks, a batcher for each)"""
    ranks = VirtualRanks(len(costs), all_reduces)
    sizes = {"max_batch_size": 2, "block_size": 4, "max_length": 64, "prefill_tokens": 8, "step_s": 0.0} | options
    batchers = [KINDS[kind](MODEL, clock=ranks.clock(rank, each), **sizes) for rank, each in enumerate(costs)]
    ranks.turn = [batcher.turn for batcher in batchers]
    return ranks, batchers


def serve(kind: str, costs: list[Costs], all_reduces: AllReduces, steps: int = 6, **options):
    """(the ranks, the timeline of each, the tokens of each) after one request of so many steps."""
    ranks, batchers = open_ranks(kind, costs, all_reduces, **options)
    handles = [batcher.submit(Request([5], steps, stop_token_ids=())) for batcher in batchers]
    while any([turn() for turn in ranks.turn]):
        pass
    for batcher in batchers:
        batcher.close()
    return ranks, [batcher.timeline for batcher in batchers], [handle.token_ids for handle in handles]


def lane(timeline: Timeline, name: str) -> np.ndarray:
    """[start, end] of each span of that name, in ms."""
    return np.array([(1e3 * start, 1e3 * end) for _, each, _, start, end in timeline.spans if each == name])


def near(values):
    return pytest.approx(np.array(values, float), abs=1e-9, rel=1e-9)


# ---- by hand ---------------------------------------------------------------------------------------------------------

# The host of rank 0 plans for 1 ms, that of rank 1 for 3 ms; all else on the hosts takes no time. A step is 1 ms, an
# all-reduce of 0.5 ms, and 1 ms.
BY_HAND = [replace(NOTHING, plan=1 * MS, step=2 * MS), replace(NOTHING, plan=3 * MS, step=2 * MS)]


def test_the_synchronous_loop_of_two_ranks_as_computed_by_hand():
    ranks, (fast, slow), _ = serve("sync", BY_HAND, AllReduces(1, 0.5 * MS), steps=3)
    assert lane(fast, "step") == near([(1, 5.5), (6.5, 11), (12, 16.5)])
    assert lane(slow, "step") == near([(3, 5.5), (8.5, 11), (14, 16.5)])
    assert np.array([one.arrived for one in ranks.exchanges]) / MS == near([(2, 4), (7.5, 9.5), (13, 15)])
    assert np.array([one[3:] for one in ranks.exchanges]) / MS == near([(4, 4.5), (9.5, 10), (15, 15.5)])
    # Of the 11 ms of the two decode steps rank 0 plans for 2 and waits in all-reduces for 4; rank 1 plans for 6.
    assert fast.summary().idle == pytest.approx(2 / 11)
    assert slow.summary().idle == pytest.approx(6 / 11)


def test_the_asynchronous_loop_of_two_ranks_as_computed_by_hand():
    ranks, (fast, slow), _ = serve("async", BY_HAND, AllReduces(1, 0.5 * MS), steps=4)
    assert lane(fast, "step") == near([(1, 5.5), (5.5, 8.5), (8.5, 11.5), (11.5, 14.5)])
    assert lane(slow, "step") == near([(3, 5.5), (6, 8.5), (9, 11.5), (12, 14.5)])  # the host takes 3 ms
    assert lane(fast, "launch") == near([(1, 1), (2, 2), (6.5, 6.5), (9.5, 9.5)])  # two ahead, then it waits
    assert lane(slow, "launch") == near([(3, 3), (6, 6), (9, 9), (12, 12)])
    assert fast.summary().idle == 0
    assert slow.summary().idle == pytest.approx(1.5 / 9)


def test_a_step_that_decodes_and_prefills_has_the_all_reduces_of_both():
    ranks, batchers = open_ranks("sync", [replace(NOTHING, step=5 * MS)] * 2, AllReduces(2, 1 * MS, width=7))
    first = [batcher.submit(Request([5, 6], 4, stop_token_ids=())) for batcher in batchers]
    ranks.turn[0]()
    for batcher in batchers:
        batcher.submit(Request([1] * 5, 1, stop_token_ids=()))
    while any([turn() for turn in ranks.turn]):
        pass
    assert [one.steps[0] for one in ranks.exchanges] == [0, 0, 1, 1, 1, 1, 2, 2, 3, 3]
    kind = next(kind for kind in batchers[0].shape.kinds if kind.passes == "mixed" and not kind.sampled)
    assert AllReduces(2, width=7).of(kind) == 2 * [("decode", (2, 7))] + 2 * [("prefill", (8, 7))]
    assert lane(batchers[1].timeline, "step")[1] == near((7, 16))  # 5 + 4 ms
    assert [handle.completion.finish_reason for handle in first] == ["length"] * 2


# ---- a replay, written apart -----------------------------------------------------------------------------------------


def replayed(kind: str, slots: int, costs: list[Costs], count: int, seconds: float, steps: int):
    """(launched, starts, ends of the steps, arrivals at each all-reduce), by step and rank: plain sums and maxima."""
    all_ranks = range(len(costs))
    host, in_end, step_end, out_end = ([0.0] * len(costs) for _ in range(4))
    launched, starts, ends, outs, arrivals = [], [], [], [], []
    for number in range(steps):
        for r in all_ranks:
            host[r] += costs[r].plan + costs[r].fill + costs[r].launch
            in_end[r] = max(in_end[r], host[r]) + costs[r].copy_in
        launched.append(list(host))
        starts.append([max(step_end[r], in_end[r]) for r in all_ranks])
        now = list(starts[-1])
        for _ in range(count):
            now = [now[r] + costs[r].step / (count + 1) for r in all_ranks]
            arrivals.append(now)
            now = [max(now) + seconds] * len(costs)
        step_end = [now[r] + costs[r].step / (count + 1) for r in all_ranks]
        out_end = [max(out_end[r], step_end[r]) + costs[r].copy_out for r in all_ranks]
        ends.append(step_end)
        outs.append(out_end)
        if number >= slots - 1:
            for r in all_ranks:
                host[r] = max(host[r], outs[number - slots + 1][r]) + costs[r].commit
    return launched, starts, ends, arrivals


seconds = st.one_of(st.just(0.0), st.floats(1e-6, 1e-2))
any_costs = st.builds(
    Costs, plan=seconds, fill=seconds, launch=seconds, commit=seconds, copy_in=seconds, step=seconds, copy_out=seconds
)
loops = st.sampled_from([("sync", 1), ("async", 1), ("async", 2), ("async", 3)])


@settings(max_examples=25, deadline=None)
@given(loops, st.lists(any_costs, min_size=2, max_size=4), st.integers(1, 3), seconds)
def test_all_times_are_those_of_the_replay_and_every_moment_of_a_rank_has_its_place(loop, costs, count, took):
    kind, slots = loop
    ranks, timelines, tokens = serve(kind, costs, AllReduces(count, took), num_slots=slots)
    launched, starts, ends, arrivals = replayed(kind, slots, costs, count, took, 6)
    for rank, timeline in enumerate(timelines):
        steps = lane(timeline, "step")
        assert steps == near(1e3 * np.array([starts, ends])[:, :, rank].T)
        assert lane(timeline, "launch")[:, 1] == near(1e3 * np.array(launched)[:, rank])
        # A step is what it computes, what it waits for, and what it exchanges.
        for step, (start, end) in enumerate(steps):
            inside = [one for one in ranks.exchanges if one.steps[rank] == step]
            waits = sum(one.began - one.arrived[rank] for one in inside)
            assert end - start == pytest.approx(1e3 * (costs[rank].step + waits + count * took), abs=1e-9)
    assert np.array([one.arrived for one in ranks.exchanges]) == near(arrivals)
    assert all(one.began == max(one.arrived) for one in ranks.exchanges)
    assert all(one == tokens[0] for one in tokens)
    # However fast its host is, a rank is never more than its slots ahead of another.
    for step in range(slots, 6):
        assert min(launched[step]) >= max(launched[step - slots]) - 1e-12


def test_a_fast_host_runs_ahead_by_its_slots_and_no_further():
    for slots in (1, 2, 3):
        costs = [replace(NOTHING, plan=0.1 * MS, step=1 * MS), replace(NOTHING, plan=9 * MS, step=1 * MS)]
        _, (fast, slow), _ = serve("async", costs, AllReduces(), steps=8, num_slots=slots)
        fast_at, slow_at = (lane(each, "launch")[:, 1] for each in (fast, slow))
        ahead = [sum(at < moment for at in fast_at) - number for number, moment in enumerate(slow_at)]
        assert max(ahead) == slots
        assert ahead[2] == slots


# ---- laws ------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(1e-5, 1e-2), min_size=2, max_size=4), st.floats(1e-4, 1e-2), st.floats(0, 1e-3))
def test_every_rank_s_host_delay_adds_up_to_the_slowest_in_sync_and_is_hidden_in_async(hosts, device_s, took):
    costs = [replace(NOTHING, plan=each, step=device_s / len(hosts)) for each in hosts]
    step_s = step_on_ranks(device_s, len(hosts), 2, took)
    _, timelines, _ = serve("sync", costs, AllReduces(2, took))
    for host_s, timeline in zip(hosts, timelines, strict=True):
        period = max(hosts) + step_s
        assert np.diff(lane(timeline, "step")[:, 1]) == near([1e3 * period] * 5)
        assert timeline.summary().idle == pytest.approx(host_s / period)  # the rest of its delay is in its step
    _, timelines, _ = serve("async", costs, AllReduces(2, took), steps=12)
    period = step_time(max(hosts), step_s)  # hidden, unless the slowest host takes longer than the step
    for timeline in timelines:
        ends = lane(timeline, "step")[:, 1]
        assert (ends[11] - ends[3]) / 8 == pytest.approx(1e3 * period)


@pytest.mark.parametrize(("all_reduces", "seconds", "grows"), [(2, 0.1, True), (2, 0.9, True), (2, 1.1, False)])
def test_the_idle_share_grows_with_the_ranks_while_their_exchange_costs_less_than_it_saves(all_reduces, seconds, grows):
    """4 ms on one rank, 2 ms on each of two: they save 2 ms, and pay for two all-reduces."""
    idle = []
    for size in (1, 2):
        costs = [replace(NOTHING, plan=1 * MS, step=4 * MS / size)] * size
        _, timelines, _ = serve("sync", costs, AllReduces(all_reduces, seconds * MS))
        idle.append(timelines[0].summary().idle)
        law = idle_share(1 * MS, step_on_ranks(4 * MS, size, all_reduces, seconds * MS))
        assert idle[-1] == pytest.approx(law)
        assert [timeline.summary().idle for timeline in timelines] == pytest.approx([law] * size)
    assert (idle[1] > idle[0]) == grows
    assert idle[0] == pytest.approx(0.2)


@settings(max_examples=10, deadline=None)
@given(loops, any_costs)
def test_ranks_that_exchange_nothing_are_devices_of_their_own(loop, costs):
    kind, slots = loop
    sizes = {"max_batch_size": 2, "block_size": 4, "max_length": 64, "prefill_tokens": 8, "step_s": 0.0}
    with KINDS[kind](MODEL, clock=costs, num_slots=slots, **sizes) as batcher:
        batcher.run([Request([5], 6, stop_token_ids=())])
    for size, all_reduces in ((1, AllReduces()), (2, AllReduces(0))):
        ranks, timelines, _ = serve(kind, [costs] * size, all_reduces, num_slots=slots)
        assert not ranks.exchanges
        for timeline in timelines:
            assert timeline.spans == batcher.timeline.spans
            assert timeline.steps == batcher.timeline.steps


# ---- faults and bad input --------------------------------------------------------------------------------------------


def test_a_step_that_fails_on_one_rank_fails_on_all():
    ranks, batchers = open_ranks("async", [Costs()] * 2, AllReduces())
    for batcher in batchers:
        use_toy_model(batcher)
    program = batchers[1].device.program
    share, calls = program.share, iter(range(100))

    def breaks(*args):
        if next(calls) == 2:
            raise ZeroDivisionError("on purpose")
        return share(*args)

    program.share = breaks
    handles = [batcher.submit(Request([5], 6, stop_token_ids=())) for batcher in batchers]
    while any([turn() for turn in ranks.turn]):
        pass
    for handle in handles:
        assert handle.completion.finish_reason == "error"
        assert "ZeroDivisionError: on purpose" in str(handle.completion.error)
        assert len(handle.token_ids) == 2


def test_after_a_disagreement_nothing_is_launched_and_closing_ends_at_once():
    ranks, batchers = open_ranks("async", [Costs()] * 2, AllReduces())
    batchers[0].submit(Request([5], 6, stop_token_ids=()))
    batchers[0].turn()  # two steps may be under way
    with pytest.raises(DisagreementError, match="rank 1 launches no more steps: it has launched none"):
        batchers[0].turn()
    with pytest.raises(DeviceError, match="do not go on: the ranks disagree"):
        batchers[1].device.streams[1].launch("copy_in", 0)
    with pytest.raises(RequestError, match="lost its device: the ranks do not go on"):
        batchers[0].submit(Request([5], 6))
    for batcher in batchers:
        batcher.close()


def test_what_makes_no_sense_is_refused():
    ranks = VirtualRanks(2)
    for make, words in (
        (lambda: VirtualRanks(0), "size is 0: allowed are whole numbers from 1"),
        (lambda: ranks.clock(2), "rank is 2: allowed are 0 to 1"),
        (lambda: AllReduces(count=-1), "count is -1, allowed are whole numbers from 0"),
        (lambda: AllReduces(width=True), "width is True"),
        (lambda: AllReduces(seconds=-1e-3), "seconds is -0.001, allowed are seconds from 0"),
        (lambda: AllReduces(seconds=lambda shape: -1.0).took((4, 64)), r"seconds gave -1.0 for \(4, 64\)"),
        (
            lambda: ranks.clock(0).open_device(None, 1, 0.0) and ranks.clock(0).open_device(None, 1, 0.0),
            "has a batcher",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            make()

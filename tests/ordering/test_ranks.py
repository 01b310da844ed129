"""Ranks agree on what comes in, and give the tokens of one rank; those that do not are found, and told apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asyncbatch.devices.all_reduces import AllReduces, DisagreementError
from asyncbatch.devices.virtual import Costs
from asyncbatch.models.toy import VOCABULARY, toy_llama
from asyncbatch.ordering.rank_faults import RANK_FAULTS, rank_trial
from asyncbatch.ordering.ranks import RankServing, may_apply
from asyncbatch.ordering.toy import toy_tokens
from asyncbatch.request import Request, SamplingParams

MODEL, MS = toy_llama(), 1e-3
FAST = Costs(plan=0.4 * MS, fill=0.3 * MS, launch=0.1 * MS, commit=0.2 * MS, copy_in=0, step=2 * MS, copy_out=0)
SLOW = Costs(plan=1.4 * MS, fill=0.3 * MS, launch=0.1 * MS, commit=0.2 * MS, copy_in=0, step=2 * MS, copy_out=0)
FIRST = [Request([1, 2, 3, 4, 5], 12, stop_token_ids=()), Request([7, 8], 16, stop_token_ids=())]
NEW = Request([9] * 20, 6, stop_token_ids=())


def serving(mode="async", costs=(FAST, SLOW), **options) -> RankServing:
    return RankServing(len(costs), mode, list(costs), AllReduces(2, 0.1 * MS), model=MODEL, **options)


# ---- those that agree ------------------------------------------------------------------------------------------------

seconds = st.floats(1e-5, 3e-3)
costs = st.builds(
    Costs, plan=seconds, fill=seconds, launch=seconds, commit=seconds, copy_in=seconds, step=seconds, copy_out=seconds
)
samplings = st.one_of(st.just(SamplingParams()), st.builds(SamplingParams, st.just(1.0), seed=st.integers(0, 99)))
some = st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=20)
requests = st.builds(Request, some, st.integers(1, 9), samplings, st.sets(st.integers(0, VOCABULARY - 1), max_size=20))
later = st.lists(st.tuples(st.floats(0, 0.05), st.one_of(requests, st.integers(0, 5))), max_size=5)


def same_steps(ranks: RankServing) -> bool:
    """A step in flight when nobody waits any more gives no token. A rank that hears of the end a turn later than the
    others has still committed it."""
    steps = [timeline.steps for timeline in ranks.timelines]
    shortest = min(map(len, steps))
    late = [step for each in steps for step in each[shortest:]]
    return all(each[:shortest] == steps[0][:shortest] for each in steps) and not any(step.tokens for step in late)


# With these, rank 1 hears of the end a turn later than rank 0.
LATE = [
    Costs(2.7 * MS, 2.3 * MS, 2 * MS, 2 * MS, copy_in=1.2 * MS, step=0.18 * MS, copy_out=2 * MS),
    Costs(3 * MS, 1.5 * MS, 1.2 * MS, 0.9 * MS, copy_in=0.06 * MS, step=2 * MS, copy_out=0),
]
ENDS_EARLY = [Request([1], 1, stop_token_ids=()), Request([51, 114, 245, 229], 8, stop_token_ids={36, 87})]


@settings(max_examples=25, deadline=None)
@example(LATE, "async", 0.0, ENDS_EARLY, [])
@given(st.lists(costs, min_size=1, max_size=3), st.sampled_from(["sync", "async"]), st.floats(0, 5e-3),
       st.lists(requests, max_size=4), later)  # fmt: skip
def test_whatever_comes_in_all_ranks_do_the_same_and_give_the_tokens_of_one(each, mode, message_s, first, come):
    ranks = serving(mode, each, message_s=message_s)
    answers = ranks.serve(first, come)
    news = sorted((one for one in come), key=lambda one: one[0])
    expected = [toy_tokens(request) for request in [*first, *(what for _, what in news if isinstance(what, Request))]]
    for of_rank in answers:
        for tokens, completion in zip(expected, of_rank, strict=True):
            assert completion is not None
            cancelled = completion.finish_reason == "cancelled"
            assert completion.token_ids == tokens[: len(completion.token_ids) if cancelled else None]
        assert [one.token_ids for one in of_rank] == [one.token_ids for one in answers[0]]
        assert [one.finish_reason for one in of_rank] == [one.finish_reason for one in answers[0]]
    leader = ranks.hosts[0]
    assert len(leader.applied) == len(come)
    assert all(host.applied == leader.applied for host in ranks.hosts)
    assert same_steps(ranks)
    for message in ranks.messages:
        assert all(leader.applied[one.number] == one.sent + 1 for one in message.news)
    assert all(host.batcher.kv.num_free == host.batcher.kv.num_blocks for host in ranks.hosts)


def test_the_agreement_is_beside_the_step_and_a_message_that_takes_longer_is_waited_for():
    """The first news is sent for step 5. With 0.5 ms its way is hidden; a message of 5 ms lasts longer than a step."""
    ends = []
    for message_s in (0.0, 0.5 * MS, 5 * MS):
        ranks = serving(costs=(FAST, FAST), message_s=message_s)
        ranks.serve(FIRST)
        ends.append(ranks.timelines[1].summary().wall_s)
    assert ends[0] == ends[1] < ends[2]


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("order", [(1, 0), (2, 1, 0), (1, 2, 0)])
def test_it_does_not_matter_whose_turn_is_asked_for(mode, order):
    """One host is turned until it has nothing left to do; the others get their turns only when it waits for them."""
    costs = (FAST, SLOW, FAST)[: len(order)]
    usual, ranks = serving(mode, costs), serving(mode, costs)
    usual.serve(FIRST, [(8 * MS, NEW), (20 * MS, 0)])
    ranks.inbox = [(8 * MS, NEW), (20 * MS, 0)]
    for host in ranks.hosts:
        for request in FIRST:
            host.submit(request)
    for rank in order:
        while ranks.hosts[rank].turn():
            pass
    assert [host.applied for host in ranks.hosts] == [host.applied for host in usual.hosts]
    assert [timeline.spans for timeline in ranks.timelines] == [timeline.spans for timeline in usual.timelines]


# ---- those that do not -----------------------------------------------------------------------------------------------

RULES = {
    "at once": (lambda news, planning: True, True),
    "as it is sent": (lambda news, planning: planning == news.sent, True),
    "two steps later": (lambda news, planning: planning == news.sent + 2, False),
    "from the next step on": (lambda news, planning: planning > news.sent, False),
    "in every third step": (lambda news, planning: planning % 3 == 0, True),
}


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_right_if_all_ranks_say_yes_in_the_same_step(name, mode):
    rule, fails = RULES[name]
    fail = []
    for when in (7.2, 8.0, 9.1, 10.3, 12.4, 14.5, 16.6):  # (a message may come in time by chance)
        try:
            ranks = serving(mode, rule=rule)
            ranks.serve(FIRST, [(when * MS, NEW)])
            assert ranks.hosts[0].applied == ranks.hosts[1].applied
            assert len(ranks.hosts[0].applied) == 1
        except DisagreementError as error:
            fail.append(error.hangs)
    assert bool(fail) == fails
    assert all(fail)


def test_a_deadlock_is_told_with_rank_step_and_what_each_wanted():
    ranks = serving(rule=lambda news, planning: True)
    with pytest.raises(DisagreementError) as found:
        ranks.serve(FIRST, [(8 * MS, NEW)])
    told, digests = str(found.value), [one.digest for one in found.value.wanted]
    assert told.splitlines() == [
        "the ranks disagree: a deadlock",
        "rank 0 is at all-reduce 8: number 1 of 4 of its step 4 (mixed/greedy/4/16), 4 x 64 values, requests "
        f"[0, 1, 2], plan {digests[0]}",
        "rank 1 is at all-reduce 8: number 1 of 2 of its step 4 (decode/greedy/4), 4 x 64 values, requests [0, 1], "
        f"plan {digests[1]}",
        "The sizes differ, now or later in the step. GPUs match all-reduces by their order alone: they would hang, or "
        "add up what does not belong together.",
        "Apply what comes in (a request, a cancellation) before the same step on every rank.",
    ]
    assert found.value.ranks == [1]
    assert found.value.hangs
    assert digests[0] != digests[1]


def test_silent_corruption_is_found_before_a_wrong_sum_is_made():
    ranks = serving()
    ranks.hosts[0].rule = lambda news, planning: planning == news.sent
    with pytest.raises(DisagreementError, match="silent corruption") as found:
        ranks.serve(FIRST, [(8 * MS, 0)])
    one, other = found.value.wanted
    assert one.shape == other.shape
    assert (one.requests, other.requests) == ((1,), (0, 1))
    assert "the tokens are wrong, without an error" in str(found.value)
    assert {one.steps for one in ranks.ranks.exchanges} == {(step, step) for step in range(one.step)}


def test_of_three_ranks_the_one_that_differs_is_named():
    for odd in range(3):
        ranks = serving(costs=(FAST, SLOW, FAST))
        rule = (lambda news, planning: planning == news.sent) if odd == 0 else (lambda news, planning: False)
        ranks.hosts[odd].rule = rule
        with pytest.raises(DisagreementError) as found:
            ranks.serve(FIRST, [(8 * MS, NEW)])
        assert found.value.ranks == [odd]


@pytest.mark.parametrize("fault", RANK_FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found_by_the_checker_and_without_it_hangs_or_gives_wrong_tokens(fault):
    for seed, mode in ((0, "async"), (1, "sync"), (2, "async")):
        watched = rank_trial(fault, seed, mode=mode, model=MODEL)
        assert watched.by in ("hang", "corruption"), watched
        unwatched = rank_trial(fault, seed, check=False, mode=mode, model=MODEL)
        assert unwatched.by in ("hang", "tokens"), unwatched
    assert rank_trial(fault, 3, size=3, model=MODEL).by in ("hang", "corruption")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_without_a_fault_nothing_is_found(size):
    for seed in range(4):
        for check in (True, False):
            finding = rank_trial(None, seed, check, size, ("sync", "async")[seed % 2], MODEL)
            assert not finding.by, finding


def test_the_faults_stand_in_the_docs():
    docs = (Path(__file__).parents[2] / "docs" / "faults.md").read_text(encoding="utf-8")
    for fault in RANK_FAULTS:
        assert f"| {fault.name} | {fault.symptom} |" in docs


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="mode is 'both': allowed are 'sync', 'async'"):
        serving("both")
    with pytest.raises(ValueError, match="costs are those of 1 ranks: there are 2"):
        RankServing(2, costs=[FAST], model=MODEL)
    assert may_apply.__doc__

"""Notebook 08's capstone: the board ranks by what was measured, proves that tokens are unchanged, and says what is
wrong with a policy that cannot be."""

from __future__ import annotations

import math
import random

import pytest

from asyncbatch.lessons import scoreboard
from asyncbatch.lessons.scoreboard import REFERENCES, WORKLOAD, board, first_come, longest_first
from asyncbatch.ordering.toy import toy_tokens


def test_the_workload_is_what_was_drawn():
    draw = random.Random(0).lognormvariate
    drawn = [(round(draw(math.log(32), 0.8)), round(draw(math.log(16), 0.6))) for _ in range(40)]
    assert list(WORKLOAD) == drawn


def lines_of(text):
    return [line.strip() for line in text.splitlines()]


def test_the_planted_weakness_is_last_and_the_order_is_that_of_the_speeds():
    scores = scoreboard.references()
    assert list(scores) == list(REFERENCES)
    assert min(scores, key=lambda name: scores[name].tokens_per_s) == "whole batches"
    ranked = [line.split(".")[1].split("  ")[0].strip() for line in lines_of(board())[1:]]
    assert ranked == sorted(scores, key=lambda name: -scores[name].tokens_per_s)
    assert all(score.unchanged for score in scores.values())


def test_a_policy_of_the_learner_s_is_ranked_and_shares_a_place_with_its_equal():
    told = lines_of(board(lambda waiting, running, free: sorted(waiting, key=lambda one: -one.new)[:free]))
    assert told[1].startswith("1. YOURS")
    assert told[1].split()[2:] == told[2].split()[4:]  # the same figures as "longest answer first"
    better = lines_of(board(lambda waiting, running, free: sorted(waiting, key=lambda o: -o.new - o.prompt / 8)[:free]))
    assert better[1].startswith("1. YOURS")
    assert float(better[1].split()[2].replace(",", "")) > float(told[1].split()[2].replace(",", ""))


def stands_still(waiting, running, free):
    return []


def twice(waiting, running, free):
    return waiting[:1] * 2


def not_a_list(waiting, running, free):
    return free


def somebody_running(waiting, running, free):
    return running[:1] or waiting[:1]


def stops(waiting, running, free):
    return waiting[99]


def forever(waiting, running, free):
    while True:
        pass


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (stands_still, "the loop would stand still for ever"),
        (twice, "it gave the requests [0, 0]: allowed is each at most once"),
        (not_a_list, "it gave 8: allowed is a list of requests"),
        (somebody_running, "allowed is each at most once, and only from `waiting`"),
        (stops, "it stopped with IndexError"),
        (forever, "a loop in it does not end"),
        (lambda waiting, running, free: ..., "it is not written yet"),
    ],
    ids=lambda one: getattr(one, "__name__", None),
)
def test_a_policy_that_cannot_serve_has_no_rank_and_hears_why(policy, words):
    told = lines_of(board(policy))
    assert told[-1].startswith("YOURS has no rank: ")
    assert words in told[-1]
    assert len(told) == 2 + len(REFERENCES)
    assert words in scoreboard.draw({"yours": policy}).title


def test_more_than_free_rows_are_not_let_in():
    assert scoreboard.serve(lambda waiting, running, free: waiting).tokens_per_s == pytest.approx(
        scoreboard.serve(first_come).tokens_per_s
    )


def test_rows_are_never_more_than_there_are_and_every_request_is_served():
    score = scoreboard.serve(longest_first)
    assert score.spans.keys() == set(range(len(WORKLOAD)))
    for moment in (start for start, _ in score.spans.values()):
        assert sum(start <= moment < stop for start, stop in score.spans.values()) <= scoreboard.ROWS


def test_tokens_that_were_damaged_are_seen(monkeypatch):
    """The proof is a comparison: with one other token in the reference it fails."""
    monkeypatch.setattr(scoreboard, "toy_tokens", lambda request: [*toy_tokens(request)[:-1], 0])
    assert not scoreboard.serve(first_come).unchanged


def test_the_speed_is_tokens_over_the_time_of_the_last_one():
    score = scoreboard.serve(first_come)
    end_ms = max(stop for _, stop in score.spans.values())
    assert sum(new for _, new in WORKLOAD) / score.tokens_per_s == pytest.approx(1e-3 * end_ms, rel=0.01)

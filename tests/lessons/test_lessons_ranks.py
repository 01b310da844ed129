"""Notebook 08's ranks: what it prints is the law, and a rule is right in whatever words."""

from __future__ import annotations

import pytest
from support.wrong.beyond import from_the_next_step_on

from asyncbatch.lessons import ranks, teach
from asyncbatch.measure.law import idle_share, step_on_ranks, step_time
from asyncbatch.models.toy import VOCABULARY


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_is_printed_is_the_law(size):
    step_s = step_on_ranks(6e-3, size, 2, 0.2e-3)
    sync, other = (ranks.serve(mode, size) for mode in ("sync", "async"))
    assert sync.step_ms == pytest.approx(1e3 * (2e-3 + step_s))
    assert sync.idle == pytest.approx([idle_share(2e-3, step_s)] * size)
    assert other.step_ms == pytest.approx(1e3 * step_time(2e-3, step_s))
    assert str(sync).startswith(f"{size} rank{'s' * (size > 1)}, sync: {sync.step_ms:.2f} ms a step, idle ")
    assert [tokens for served in (sync, other) for tokens in served.tokens] == [sync.tokens[0]] * (2 * size)
    assert [len(tokens) for tokens in sync.tokens[0]] == [24, 24]
    assert all(0 <= token < VOCABULARY for tokens in sync.tokens[0] for token in tokens)


def test_a_slow_host_costs_both_ranks_the_same():
    served = ranks.serve("async", host_ms=(2, 6))
    assert served.idle == pytest.approx([0, 1 - 3.4 / 6])
    assert served.waits == pytest.approx([1 - 3.4 / 6, 0])
    assert served.ahead == 2
    assert ranks.serve("sync", host_ms=(2, 6)).waits == pytest.approx([4 / 9.4, 0])
    with pytest.raises(ValueError, match=r"host_ms is \(2, 6, 1\): for 2 ranks it takes one number, or one a rank"):
        ranks.serve("async", host_ms=(2, 6, 1))


def test_the_picture_has_the_ranks_and_their_all_reduces():
    figure = ranks.draw("async", host_ms=(2, 6))
    assert [track.name for track in figure.tracks] == ["rank 0", "rank 1"]
    assert figure.title == "async, host work 2 ms and 6 ms a step"
    assert [len(track.layers["moves"][0]) for track in figure.tracks] == [48, 48]  # 24 steps, two all-reduces each
    assert len(figure.tracks[0].layers["held"][0]) >= 20
    assert not len(figure.tracks[1].layers["held"][0])


def test_a_right_rule_in_other_words_is_right(capsys):
    assert teach.check("may_apply", from_the_next_step_on) is from_the_next_step_on
    assert "right in all 5 cases" in capsys.readouterr().out
    assert teach.check("may_apply", lambda news, planning: ...) is ranks.may_apply
    assert "not attempted yet" in capsys.readouterr().out


def test_what_came_of_a_rule_is_told_in_the_checker_s_words():
    assert ranks.try_rule(lambda news, planning: True).startswith("the ranks disagree: a deadlock\nrank 0 is at ")
    assert ranks.try_rule(ranks.may_apply).endswith("on both ranks before step 6; 3 of 3 answers are right")
    assert ranks.try_rule(lambda news, planning: False).endswith("on no rank; 2 of 3 answers are right")


def test_the_table_of_two_gpus_has_every_measured_row():
    lines = ranks.measured().splitlines()
    assert len(lines) == 1 + len(ranks.MEASURED)
    for line, (gpus, *numbers, tokens) in zip(lines[1:], ranks.MEASURED, strict=True):
        assert line.startswith(gpus + " ")
        assert [float(word) for word in line.split() if word.replace(".", "").isdigit()] == numbers
        assert line.endswith(f"{tokens:,}")

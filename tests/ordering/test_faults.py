"""Every fault is found on every run, by the checker or by what comes out; and without a fault nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbatch.models.toy import VOCABULARY, toy_llama
from asyncbatch.ordering.faults import FAULTS
from asyncbatch.ordering.rank_faults import RANK_FAULTS
from asyncbatch.ordering.toy import next_token
from asyncbatch.ordering.trials import main, trial, workload

SEEDS = range(20)
MODEL = toy_llama()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found_on_every_seed(fault):
    for seed in SEEDS:
        finding = trial(fault, seed, model=MODEL)
        assert finding.by, f"seed {seed}: {finding.detail}"


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_without_a_fault_nothing_is_found(slots):
    for seed in SEEDS:
        finding = trial(None, seed, slots=slots, model=MODEL)
        assert not finding.by, f"seed {seed}: {finding.detail}"


def test_the_checker_proves_faults_that_the_tokens_do_not_show():
    proved = [fault for fault in FAULTS if trial(fault, 0, model=MODEL).by == "checker"]
    assert len(proved) >= 8
    assert any(not trial(fault, 0, model=MODEL, check_races=False).by for fault in proved)


def test_each_fault_is_told_in_two_sentences_and_stands_in_the_docs():
    docs = (Path(__file__).parents[2] / "docs" / "faults.md").read_text(encoding="utf-8")
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 16
    for fault in FAULTS:
        assert fault.explain().count(". ") == 1
        assert f"| {fault.name} | {fault.symptom} |" in docs


def test_the_command_says_whether_all_were_found(capsys):
    assert main(["--seeds", "1", "--explain"]) == 0
    output = capsys.readouterr().out
    assert "Every fault was found in every run." in output
    assert all(output.count(fault.name) >= 2 for fault in (*FAULTS, *RANK_FAULTS))
    assert "| (no fault) |  | 0 of 1 | 0 of 1 | 0 of 1 |" in output


tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=12)


@given(tokens, st.data())
def test_the_toy_model_sees_every_token_of_its_context_and_their_order(context, data):
    other = list(context)
    place = data.draw(st.integers(0, len(context) - 1))
    other[place] = (other[place] + data.draw(st.integers(1, VOCABULARY - 1))) % VOCABULARY
    # A checksum may agree by chance; over many continuations it must not.
    tails = [[n] * (n % 3) for n in range(40)]
    same = sum(next_token(context + tail, None) == next_token(other + tail, None) for tail in tails)
    assert same < len(tails) // 2


def test_workloads_hold_what_the_faults_need():
    for seed in SEEDS:
        requests = workload(seed)
        assert any(request.sampling.temperature > 0 for request in requests)
        assert any(request.stop_token_ids for request in requests)
        assert len(requests) > 4

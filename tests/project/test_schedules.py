"""`tools/schedules.py` says what another schedule would bring: its simulation against hand-computed steps, the loop on
the virtual clock, and what was measured."""

from __future__ import annotations

import statistics
from collections import Counter

import pytest
import torch
from support.tiny import tiny_model

from asyncbatch import AsyncBatcher, Request, SamplingParams
from asyncbatch.devices.virtual import Costs
from asyncbatch.measure.percentile import p99
from asyncbatch.profile.draws import Lengths
from tools import schedules
from tools.schedules import POLICIES, Policy, StepCosts, simulate

SIMPLE = StepCosts(decode_ms=1, token_ms=0.1, uneven=0.5, chunk_ms={4: 10.0}, loaded=1.0, pair_ms=0.01)


def request(prompt: int, new: int) -> Request:
    return Request([1] * prompt, new, stop_token_ids=())


def test_one_request_by_hand():
    found = simulate([request(3, 3)], Policy((4,), 4), SIMPLE, rows=1)
    # A chunk of 3 tokens that see 1.5 keys each on average, then the new tokens attend to 4 and to 5.
    assert found.first_s == [pytest.approx(10.045e-3)]
    assert found.total_s == pytest.approx(10.045e-3 + 1.4e-3 + 1.5e-3)
    assert found.pause_s == pytest.approx(1.5e-3)
    assert (found.decode_s, found.prefill_s) == (pytest.approx(2.9e-3), pytest.approx(10.045e-3))
    assert found.passes == Counter(prefill=1, decode=2)
    assert found.padded == pytest.approx(4 / 3)


@pytest.mark.parametrize("hidden", [0.0, 0.5, 1.0])
def test_a_mixed_step_by_hand(hidden):
    found = simulate([request(4, 3), request(4, 2)], Policy((4,), 4, hidden), SIMPLE, rows=2)
    first = 10.08
    second = first + 10.08 + (1 - hidden) * 1.5  # the other's chunk, and a row that attends to 5
    third = second + 1 + 0.1 * (6 + 5 + 0.5 * 1)  # rows of 6 and 5: half of what 5 lacks to 6
    assert found.first_s == [pytest.approx(1e-3 * first), pytest.approx(1e-3 * second)]
    assert found.total_s == pytest.approx(1e-3 * third)
    assert found.pause_s == pytest.approx(1e-3 * (second - first))
    assert found.passes == Counter(prefill=1, mixed=1, decode=1)
    assert found.padded == 1.0


def test_longest_first_is_only_another_order():
    requests = [request(2, 2), request(2, 9), request(2, 5)]
    ordered = [requests[1], requests[2], requests[0]]
    assert simulate(requests, Policy(longest_first=True), SIMPLE, 2) == simulate(ordered, Policy(), SIMPLE, 2)


@pytest.mark.parametrize("seed", range(3))
def test_the_steps_are_those_of_the_asynchronous_loop(seed):
    """As many steps of each kind as a batcher takes on the virtual clock, and first tokens in the same steps."""
    generator = schedules.np.random.default_rng(seed)
    draws = [Lengths.parse("1-40").draw(generator, 12), Lengths.parse("1-20").draw(generator, 12)]
    requests = [request(prompt, new) for prompt, new in zip(*draws, strict=True)]
    still = dict(plan=0.0, fill=0.0, launch=0.0, commit=0.0, copy_in=0.0, copy_out=0.0)
    options = dict(max_batch_size=4, max_length=64, prefill_tokens=(8, 16), step_s=0.0)
    with AsyncBatcher(tiny_model(), clock=Costs(step=1.0, **still), **options) as batcher:
        answers = batcher.run(requests)
        kinds = Counter(step.kind for step in batcher.timeline.steps)
    # Each step takes a second of prefill, or of decode beside which prefill takes none.
    each = StepCosts(1000, 0.0, 0.0, {8: 1000.0}, 1.0, 0.0)
    found = simulate(requests, Policy((8, 16), 16, hidden=1.0), each, rows=4)
    assert found.passes["decode"] == kinds["decode"]
    assert found.passes["mixed"] + found.passes["prefill"] == kinds["prefill"]
    assert found.total_s == pytest.approx(sum(kinds.values()))
    assert found.first_s == pytest.approx([one.first_token_s - one.submitted_s for one in answers])


@pytest.mark.parametrize(("name", "first_s", "p99_s"), [("long", 2.249, 4.327), ("mixed", 3.409, 8.244)])
def test_today_takes_what_was_measured(name, first_s, p99_s):
    """Two of the costs were chosen so that both totals fit. The first tokens were not looked at for that."""
    found = simulate(schedules.requests_of(name), POLICIES["today"])
    assert found.total_s == pytest.approx(schedules.MEASURED_S[name], rel=0.01)
    assert statistics.median(found.first_s) == pytest.approx(first_s, rel=0.05)
    assert p99(found.first_s) == pytest.approx(p99_s, rel=0.05)


def test_what_docs_say_of_other_schedules():
    """No order of steps brings what was asked for; less than what decode steps leave cannot be had by any."""
    mixed, long = (schedules.requests_of(name) for name in ("mixed", "long"))
    serial = [name for name, policy in POLICIES.items() if not policy.hidden and not policy.longest_first]
    assert min(simulate(mixed, POLICIES[name]).total_s for name in serial) > 13.0
    assert [name for name in serial if simulate(long, POLICIES[name]).total_s < 5.0] == ["nolimit"]
    assert simulate(long, POLICIES["beside"]).total_s < 5.0
    assert simulate(mixed, POLICIES["most"]).total_s > 12.5


def test_what_cannot_be_measured_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert schedules.main(["--measure", "today,beside"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        schedules.main(["--measure", "today,nolimit"])
    assert "'nolimit' is none of today, sizes" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_passes_beside_each_other_give_the_same_tokens(compile):
    """Bit for bit, with chunks of prompts beside decode rows in most steps, greedy and sampled."""
    model = tiny_model("cuda")
    sampling = SamplingParams(temperature=0.9, top_k=40, seed=7)
    requests = [Request([n % 50] * (1 + 7 * n % 40), 9, sampling if n % 2 else SamplingParams(), stop_token_ids=())
                for n in range(24)]  # fmt: skip
    options = dict(max_batch_size=4, block_size=4, prefill_tokens=(8, 16), max_length=64, compile=compile)
    tokens = []
    for kind in (AsyncBatcher, schedules.BesideBatcher):
        with kind(model, **options) as batcher:
            tokens += [[one.token_ids for one in batcher.run(requests)] for _ in range(3)]
    assert all(each == tokens[0] for each in tokens)

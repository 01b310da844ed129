"""What a run serves and when it arrives: lengths, arrivals, prompts files, and serving over time with either engine."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import types

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.clocks import costs, kinds
from support.prompts import SMALL, TOKENS, Words, workload_of, written
from support.recordings import example
from support.reports import call_script
from support.serving import OPTIONS, alone, requests
from support.tiny import tiny_model

from asyncbatch import AsyncBatcher, Completion, Request, SyncBatcher, load_model
from asyncbatch.devices.virtual import Costs
from asyncbatch.models.toy import toy_llama
from asyncbatch.ordering.toy import toy_tokens, use_toy_model
from asyncbatch.profile import session as profile
from asyncbatch.profile import turns
from asyncbatch.profile.draws import Arrivals, Lengths, arrival_times
from asyncbatch.profile.options import parse_arguments
from asyncbatch.profile.peers.batcher import TransformersBatcher
from asyncbatch.profile.prompts import PromptFile
from asyncbatch.profile.report import Latency, MedianAndP99
from asyncbatch.profile.workload import TOPICS, Sizes, latency, make_requests, most_context, serve_over_time
from asyncbatch.request import RequestError
from asyncbatch.streams import DeviceError


@pytest.fixture(scope="module")
def tiny():
    return load_model("random:tiny")[0]


@pytest.fixture
def call(capsys, monkeypatch, tiny):
    """Run the script in this process: (exit status, standard output, standard error)."""
    load = load_model
    monkeypatch.setattr(
        profile, "load_model", lambda name, **kw: (tiny, None) if name == "random:tiny" else load(name, **kw)
    )

    return functools.partial(call_script, capsys)


# ---- lengths ---------------------------------------------------------------------------------------------------------

medians = st.floats(1, 5000)
sigmas = st.floats(0, 5)
distributions = st.one_of(
    st.integers(1, 200).map(str),
    st.tuples(st.integers(1, 200), st.integers(0, 100)).map(lambda pair: f"{pair[0]}-{pair[0] + pair[1]}"),
    st.builds("lognormal:{}:{}".format, medians, sigmas),
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64", Lengths(64, 64)),
        (64, Lengths(64, 64)),
        ("7-7", Lengths(7, 7)),
        ("16-128", Lengths(16, 128)),
        ("1-1000000000", Lengths(1, 10**9)),
        ("lognormal:64:0.5", Lengths(1, None, 64.0, 0.5)),
        ("lognormal:1.5:0", Lengths(1, None, 1.5, 0.0)),
    ],
)
def test_lengths_are_read(text, expected):
    assert Lengths.parse(text) == expected
    assert Lengths.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "1.5", "nan", "128-16", "0-4", "16-", "-16", "16--32", "1-2-3", "9" * 11, "²", "lognormal",
     "lognormal:64", "lognormal:64:0.5:1", "lognormal:0.5:1", "lognormal:64:-1", "lognormal:64:6", "lognormal:nan:1",
     "lognormal:64:nan", "lognormal:inf:1", "lognormal:a:b", "normal:64:0.5", "uniform:1:2"],
)  # fmt: skip
def test_other_lengths_are_refused_with_what_is_allowed(text):
    with pytest.raises(ValueError, match="16-128: uniform between them") as caught:
        Lengths.parse(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(distributions, st.integers(0, 2**31), st.integers(1, 40), st.integers(0, 300))
def test_drawn_lengths_keep_their_bounds_and_depend_on_the_seed_alone(text, seed, count, spare):
    lengths = Lengths.parse(text)
    most = lengths.needed + spare
    first, second = (lengths.draw(np.random.default_rng(seed), count, most) for _ in range(2))
    assert first == second
    assert len(first) == count
    assert all(type(one) is int for one in first)
    assert all(lengths.lowest <= one <= (lengths.highest or most) <= most for one in first)
    if lengths.fixed:
        assert set(first) == {lengths.lowest}
    each = [most - one % 2 for one in range(count)]  # a limit of its own for each
    if spare:
        drawn = lengths.draw(np.random.default_rng(seed), count, each)
        assert drawn == [min(a, b) if lengths.highest is None else a for a, b in zip(first, each, strict=True)]


def test_distributions_are_what_they_are_called():
    generator = np.random.default_rng(0)
    drawn = Lengths.parse("3-6").draw(generator, 4000)
    assert sorted(set(drawn)) == [3, 4, 5, 6]
    assert all(900 < drawn.count(length) < 1100 for length in (3, 4, 5, 6))
    logs = np.log(Lengths.parse("lognormal:500:0.5").draw(generator, 4000))
    assert np.median(logs) == pytest.approx(math.log(500), abs=0.05)
    assert logs.std() == pytest.approx(0.5, abs=0.03)
    assert set(Lengths.parse("lognormal:12:0").draw(generator, 50)) == {12}


# ---- arrivals --------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-3, 1e5), st.integers(0, 2**31), st.integers(1, 60))
def test_poisson_arrivals_rise_from_zero_and_depend_on_seed_and_rate_alone(rate, seed, count):
    times = Arrivals(rate).times(count, seed)
    assert times == arrival_times(f"poisson:{rate!r}", count, seed) == Arrivals(rate).times(count + 9, seed)[:count]
    assert len(times) == count
    assert times[0] == 0.0
    assert all(a <= b < math.inf for a, b in zip(times, times[1:], strict=False))
    assert Arrivals(2 * rate).times(count, seed) == pytest.approx([one / 2 for one in times])


def test_the_rate_is_requests_per_second_and_all_at_once_is_zero():
    assert Arrivals(50.0).times(5001, 0)[-1] == pytest.approx(100, rel=0.05)
    assert arrival_times("all", 3, 7) == [0.0, 0.0, 0.0]
    assert arrival_times("poisson:3", 0, 7) == []
    assert [str(Arrivals.parse(text)) for text in ("all", "poisson:50.0", "poisson:0.25")] == [
        "all", "poisson:50", "poisson:0.25",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "none", "poisson", "poisson:", "poisson:0", "poisson:-1", "poisson:nan", "poisson:inf", "poisson:x",
             "poisson:1:2", "poisson:1e9", "burst:4"]
)  # fmt: skip
def test_other_arrivals_are_refused_with_what_is_allowed(text):
    with pytest.raises(ValueError, match="allowed are all, or poisson:RATE") as caught:
        Arrivals.parse(text)
    assert repr(text) in str(caught.value)


# ---- requests --------------------------------------------------------------------------------------------------------


def shape(made):
    return [(len(request.token_ids), request.max_new_tokens) for request in made]


def test_fixed_prompts_are_the_seeds(tiny):
    workload = workload_of(*SMALL, "--requests", 5, "--prompt-tokens", 7, "--new-tokens", 6, "--seed", 3)
    made = make_requests(workload, tiny, None)
    expected = np.random.default_rng(3).integers(0, 256, (5, 7)).tolist()
    assert [request.token_ids for request in made] == expected
    assert all((request.max_new_tokens, request.stop_token_ids) == (6, ()) for request in made)


@settings(max_examples=60, deadline=None)
@given(distributions, distributions, st.integers(0, 99), st.integers(1, 20))
def test_requests_fit_the_model_whatever_is_drawn_or_are_refused(prompt, new, seed, count):
    model = types.SimpleNamespace(
        config=types.SimpleNamespace(
            get_text_config=lambda: types.SimpleNamespace(vocab_size=256, max_position_embeddings=300)
        )
    )
    workload = workload_of(*SMALL, "--requests", count, "--prompt-tokens", prompt, "--new-tokens", new, "--seed", seed)
    prompts, news = Lengths.parse(prompt), Lengths.parse(new)
    if prompts.needed + news.needed > 300:
        with pytest.raises(
            ValueError, match=f"prompts of {prompts} tokens and {news} new ones: random:tiny allows 300"
        ):
            make_requests(workload, model, None)
        return
    made = make_requests(workload, model, None)
    assert len(made) == count
    assert all(request.stop_token_ids == () for request in made)
    for length, limit in shape(made):
        assert prompts.lowest <= length <= (prompts.highest or 300)
        assert news.lowest <= limit <= (news.highest or 300)
        assert length + limit <= 300
    sizes = Sizes.of(made)
    assert sizes.longest_prompt == max(length for length, _ in shape(made))
    assert sizes.new_tokens == max(limit for _, limit in shape(made))
    assert sizes.max_length == max(map(sum, shape(made)))


def test_each_draw_has_random_numbers_of_its_own(tiny):
    base = ["--requests", 9, "--prompt-tokens", "4-40", "--new-tokens", "lognormal:12:0.6"]

    def made(*more):
        return make_requests(workload_of(*SMALL, *base, *more), tiny, None)

    first = made()
    assert made() == first
    assert made("--arrivals", "poisson:3") == first
    other_new = made("--new-tokens", "1-9")
    assert [request.token_ids for request in other_new] == [request.token_ids for request in first]
    assert [limit for _, limit in shape(made("--prompt-tokens", 5))] == [limit for _, limit in shape(first)]
    assert shape(made("--seed", 1)) != shape(first)
    assert shape(made("--requests", 4)) == shape(first)[:4]
    alike = shape(made("--prompt-tokens", "1-500", "--new-tokens", "1-500"))
    assert all(length != limit for length, limit in alike), "long prompts do not ask for long answers"


def test_a_chat_model_gets_short_questions_that_it_may_end_by_itself(tiny):
    made = make_requests(workload_of(*SMALL, "--requests", 20, "--new-tokens", 5), tiny, Words())
    assert all(request.stop_token_ids is None for request in made)
    assert made[0].token_ids == [9, 4, 2, 5, 3, 4]  # Tell me about the sea.
    assert [request.token_ids for request in made[16:]] == [request.token_ids for request in made[:4]]
    assert len(TOPICS) == 16
    drawn = make_requests(workload_of(*SMALL, "--requests", 20, "--new-tokens", "2-5"), tiny, Words())
    assert all(request.stop_token_ids == () for request in drawn)
    with pytest.raises(ValueError, match="and 1020 new ones: random:tiny allows 1024"):
        make_requests(workload_of(*SMALL, "--new-tokens", 1020), tiny, Words())


def test_the_largest_context_of_a_step_is_that_of_the_longest_requests():
    same = [Request([1] * 16, 8)] * 5
    assert most_context(same, 3) == 3 * (16 + 8 - 1)
    assert most_context(same, 9) == 5 * (16 + 8 - 1)
    assert most_context([Request([1] * 2, 3), Request([1] * 9, 4), Request([1], 1)], 2) == 4 + 12


# ---- serving over time -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def toy(kind, times=None, **options):
    """A batcher on the virtual clock that serves the toy model: its tokens cost nothing and depend on all before."""
    with kind(toy_llama(), clock=times or COSTS, **{**OPTIONS, **options}) as batcher:
        use_toy_model(batcher)
        yield batcher


ONE_EACH = [Request([n + 1], 1, stop_token_ids=()) for n in range(3)]  # one step each
COSTS = Costs(plan=1e-3, fill=1e-3, launch=1e-3, commit=1e-3, copy_in=0.0, step=5e-3, copy_out=0.0)  # 9 ms a step
moments_of_arrival = st.lists(st.one_of(st.just(0.0), st.floats(0, 0.2)), min_size=5, max_size=5)


@settings(max_examples=60, deadline=None)
@given(st.lists(requests, min_size=1, max_size=5), kinds, costs, moments_of_arrival, st.integers(0, 8))
def test_tokens_and_order_are_those_of_each_alone_whenever_requests_arrive(workload, kind, times, moments, spare):
    num_blocks = max(-(-(len(r.token_ids) + r.max_new_tokens) // 4) for r in workload) + spare
    moments = moments[: len(workload)]
    with toy(kind[0], times, num_slots=kind[1], num_blocks=num_blocks, check_races=True) as batcher:
        found = serve_over_time(batcher, workload, moments)
        assert batcher.kv.num_free == num_blocks
        timeline = batcher.timeline
    assert [c.error for c in found] == [None] * len(workload)
    assert [c.token_ids for c in found] == [toy_tokens(request) for request in workload]
    assert not any(moments) or [c.submitted_s for c in found] == moments  # the virtual clock begins at 0
    assert all(c.submitted_s <= c.first_token_s <= c.finished_s for c in found)
    assert sum(step.tokens for step in timeline.steps) == sum(len(c.token_ids) for c in found)
    empty = [span for span in timeline.spans if span.name == "no request"]
    assert all((span.lane, span.step) == ("points", -1) for span in empty)
    for span in empty:
        assert span.start < span.end
        assert all(c.finished_s <= span.start or c.submitted_s >= span.end for c in found)
        others = [other for other in timeline.spans if other.lane != "points"]
        assert all(other.end <= span.start or other.start >= span.end for other in others)


@settings(max_examples=5, deadline=None, phases=(Phase.explicit, Phase.generate))  # a real model: shrinking takes long
@given(st.lists(requests, min_size=2, max_size=4), costs, st.integers(0, 99), st.floats(5, 2000))
def test_sync_and_async_give_the_same_tokens_under_poisson_arrivals(workload, times, seed, rate):
    moments = Arrivals(rate).times(len(workload), seed)
    found = []
    for batcher_class in (SyncBatcher, AsyncBatcher):
        with batcher_class(tiny_model(), clock=times, **OPTIONS) as batcher:
            found.append([c.token_ids for c in serve_over_time(batcher, workload, moments)])
    assert found[0] == found[1]
    assert all(found[0])


def spans_named(timeline, name):
    return [(round(span.start, 9), round(span.end, 9)) for span in timeline.spans if span.name == name]


@pytest.mark.parametrize("kind", [SyncBatcher, AsyncBatcher])
def test_without_a_request_the_loop_sleeps_until_the_next_and_notes_it(kind):
    with toy(kind) as batcher:
        found = serve_over_time(batcher, ONE_EACH, [0.0, 0.1, 0.3])
        assert spans_named(batcher.timeline, "no request") == [(0.009, 0.1), (0.109, 0.3)]
        assert [round(c.finished_s, 9) for c in found] == [0.008, 0.108, 0.308]
        assert spans_named(batcher.timeline, "step") == [(0.003, 0.008), (0.103, 0.108), (0.303, 0.308)]
        # The next run begins a timeline of its own, at the clock's time.
        (late,) = serve_over_time(batcher, ONE_EACH[:1], [0.05])
        assert spans_named(batcher.timeline, "no request") == [(0.309, 0.359)]
        assert round(late.submitted_s, 9) == 0.359
        # All at once is `run` itself.
        assert [c.token_ids for c in serve_over_time(batcher, ONE_EACH)] == [c.token_ids for c in found]
        assert spans_named(batcher.timeline, "no request") == []


def test_a_request_that_arrives_during_a_step_joins_the_next_one_and_waits_from_its_arrival():
    long = Request([1], 4, stop_token_ids=())
    with toy(SyncBatcher) as batcher:
        first, second = serve_over_time(batcher, [long, long], [0.0, 0.004])
    assert [step.rows for step in batcher.timeline.steps] == [1, 2, 2, 2, 1]
    assert second.submitted_s == 0.004
    assert [round(c.first_token_s, 9) for c in (first, second)] == [0.008, 0.017]
    assert latency([first, second]).first_token_ms == MedianAndP99(pytest.approx(10.5), pytest.approx(13))


def test_requests_are_answered_in_the_order_given_though_they_arrive_in_another():
    with toy(AsyncBatcher) as batcher:
        found = serve_over_time(batcher, ONE_EACH, [0.3, 0.0, 0.1])
    assert [round(c.finished_s, 9) for c in found] == [0.308, 0.008, 0.108]
    assert [c.token_ids for c in found] == [toy_tokens(request) for request in ONE_EACH]


def test_a_step_in_flight_for_nobody_is_committed_before_the_loop_sleeps():
    stops = Request([1], 9, stop_token_ids=toy_tokens(ONE_EACH[0]))
    with toy(AsyncBatcher) as batcher:
        serve_over_time(batcher, [stops, stops], [0.0, 0.5])
        timeline = batcher.timeline
    assert [(step.tokens, step.wasted) for step in timeline.steps] == [(1, 0), (0, 1)] * 2
    ((begin, end),) = spans_named(timeline, "no request")
    assert begin == spans_named(timeline, "commit")[1][1]
    assert end == 0.5


def test_a_bad_request_fails_alone_when_it_arrives():
    with toy(AsyncBatcher) as batcher:
        good, bad, after = serve_over_time(batcher, [ONE_EACH[0], Request([]), ONE_EACH[2]], [0.0, 0.1, 0.2])
    assert isinstance(bad.error, RequestError)
    assert bad.submitted_s == 0.1
    assert [c.token_ids for c in (good, after)] == [toy_tokens(r) for r in (ONE_EACH[0], ONE_EACH[2])]


@pytest.mark.parametrize("moments", [[0.1], [0.1, -1.0], [0.1, math.nan], [0.1, math.inf], [0.1, 0.2, 0.3]])
def test_bad_arrivals_are_refused_before_anything_is_served(moments):
    with toy(AsyncBatcher) as batcher:
        with pytest.raises(ValueError, match="arrivals_s has"):
            serve_over_time(batcher, ONE_EACH[:2], moments)
        assert not batcher.timeline.spans


@pytest.mark.parametrize("kind", [SyncBatcher, AsyncBatcher])
@pytest.mark.parametrize("where", ["wait_until", "step"])
def test_an_interrupt_while_it_waits_or_serves_leaves_the_batcher_empty(kind, where, monkeypatch):
    long = [Request([n + 1], 30, stop_token_ids=()) for n in range(3)]
    with toy(kind) as batcher:
        handle = batcher.submit(long[0])  # another caller's request: it ends too, as with `run`
        calls, owner = [], batcher.device if where == "wait_until" else batcher
        original = getattr(owner, where)

        def interrupted(*arguments):
            calls.append(arguments)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return original(*arguments)

        monkeypatch.setattr(owner, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            serve_over_time(batcher, long, [0.0, 0.05, 9.0])
        monkeypatch.undo()
        assert handle.completion.finish_reason == "cancelled"
        assert not batcher._handles
        assert batcher.kv.num_free == batcher.kv.num_blocks
        use_toy_model(batcher)
        assert [c.token_ids for c in serve_over_time(batcher, ONE_EACH, [0.0, 0.1, 0.1])] == list(
            map(toy_tokens, ONE_EACH)
        )


@pytest.mark.parametrize("kind", [SyncBatcher, AsyncBatcher])
def test_an_interrupted_sleep_on_the_host_clock_ends_everything(kind, monkeypatch):
    with kind(tiny_model(), **OPTIONS) as batcher:

        def interrupted(seconds):
            raise KeyboardInterrupt

        monkeypatch.setattr("asyncbatch.devices.real_time.time.sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            serve_over_time(batcher, ONE_EACH, [0.0, 100.0, 200.0])
        monkeypatch.undo()
        assert not batcher._handles
        assert [c.token_ids for c in batcher.run(ONE_EACH)] == [alone(request).token_ids for request in ONE_EACH]


def test_a_lost_device_ends_the_wait_for_more_requests(monkeypatch):
    with toy(AsyncBatcher) as batcher:

        def lost(slot):
            raise DeviceError("it is gone")

        monkeypatch.setattr(batcher, "launch", lost)
        with pytest.raises(RequestError, match="lost its device: it is gone"):
            serve_over_time(batcher, ONE_EACH, [0.0, 1e6, 2e6])
        assert batcher.device.now() < 1e6


@pytest.mark.parametrize("kind", [SyncBatcher, AsyncBatcher])
def test_a_turn_serves_what_is_under_way_and_says_when_there_is_nothing(kind):
    with toy(kind) as batcher:
        assert batcher.turn() is False
        assert not batcher.timeline.spans
        handles = [batcher.submit(request) for request in ONE_EACH]
        turns = 0
        while batcher.turn():
            turns += 1
        assert 1 <= turns <= 3
        assert [handle.completion.token_ids for handle in handles] == list(map(toy_tokens, ONE_EACH))
    with pytest.raises(RequestError, match="closed"):
        batcher.turn()


@pytest.mark.parametrize("kind", [SyncBatcher, AsyncBatcher])
def test_on_the_host_clock_requests_come_at_their_times_and_give_the_same_tokens(kind, capsys):
    moments = [0.0, 0.02, 0.02, 0.25]
    workload = [*ONE_EACH, Request([5, 6], 9, stop_token_ids=())]
    with kind(tiny_model(), **OPTIONS) as batcher:
        found = serve_over_time(batcher, workload, moments, progress=True)
        assert "4/4" in capsys.readouterr().err
        assert [c.token_ids for c in found] == [alone(request).token_ids for request in workload]
        start = found[0].submitted_s
        assert [c.submitted_s - start for c in found] == pytest.approx(moments)
        assert all(c.submitted_s < c.first_token_s <= c.finished_s for c in found)
        names, _, starts, ends = batcher.timeline.lane("points")
        assert set(names) == {"no request"}
        assert ends[-1] >= start + 0.25


def test_transformers_gets_its_requests_at_their_times_too():
    workload = [Request([n + 1, n + 2], 6, stop_token_ids=()) for n in range(4)]
    moments = [0.02, 0.5, 0.0, 0.02]
    limits = dict(max_batch_size=3, max_length=64, block_size=8, attention="sdpa")
    with TransformersBatcher(tiny_model(), mode="sync", **limits) as batcher:
        expected = [c.token_ids for c in serve_over_time(batcher, workload)]
        assert "points" not in {span.lane for span in batcher.timeline.spans}
        found = serve_over_time(batcher, workload, moments)
        assert [c.token_ids for c in found] == expected
        start = found[2].submitted_s
        assert [c.submitted_s - start for c in found] == pytest.approx(moments)
        assert all(c.submitted_s <= c.first_token_s <= c.finished_s for c in found)
        last = max((span for span in batcher.timeline.spans if span.name == "no request"), key=lambda span: span.end)
        assert (last.lane, last.step) == ("points", -1)
        assert last.end >= found[1].submitted_s
        steps = batcher.timeline.steps
        assert sum(step.tokens for step in steps) == 4 * 6
        with pytest.raises(ValueError, match="arrivals_s has 2 times for 4 requests"):
            batcher.run(workload, False, [0.0, 1.0])
        assert [c.token_ids for c in batcher.run(workload)] == expected, "a bad argument does not close it"


def test_an_interrupt_while_transformers_waits_for_an_arrival(monkeypatch):
    workload = [Request([n + 1, n + 2], 3, stop_token_ids=()) for n in range(2)]
    limits = dict(max_batch_size=3, max_length=64, block_size=8, attention="sdpa")
    with TransformersBatcher(tiny_model(), mode="sync", **limits) as batcher:

        def interrupted(seconds):
            raise KeyboardInterrupt

        monkeypatch.setattr("asyncbatch.profile.peers.batcher.time.sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            batcher.run(workload, False, [0.0, 100.0])
        monkeypatch.undo()
        assert [len(c.token_ids) for c in batcher.run(workload)] == [3, 3]


# ---- latency ---------------------------------------------------------------------------------------------------------


def test_latencies_are_from_the_arrival_and_ended_requests_count():
    def one(first, end, tokens, reason="length"):
        return Completion([1] * tokens, reason, None, 10.0, first, end)

    found = latency([one(10.5, 12.5, 5), one(11.0, 12.0, 2, "stop"), one(10.1, 10.1, 1),
                     one(10.2, 99.0, 3, "cancelled"), one(None, 99.0, 0, "error")])  # fmt: skip
    assert found.first_token_ms == MedianAndP99(pytest.approx(350), pytest.approx(1000))
    assert found.per_token_ms == MedianAndP99(pytest.approx(750), pytest.approx(1000))
    assert found.end_to_end_ms == MedianAndP99(pytest.approx(2000), pytest.approx(2500))
    nothing = MedianAndP99(None, None)
    assert latency([]) == Latency(nothing, nothing, nothing)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=250))
def test_p99_is_the_smallest_that_99_of_100_do_not_exceed(times):
    found = latency([Completion([1], "length", None, 0.0, time, time) for time in times]).first_token_ms.p99
    below = [sum(1e3 * other <= limit for other in times) for limit in (found, math.nextafter(found, -1))]
    assert below[0] >= 0.99 * len(times) > below[1]


# ---- the script ------------------------------------------------------------------------------------------------------


def test_distributions_and_arrivals_in_the_report_and_the_table(call, tmp_path):
    arguments = [*SMALL, "--requests", 7, "--prompt-tokens", "4-40", "--new-tokens", "lognormal:8:0.6",
                 "--arrivals", "poisson:100.0", "--out", tmp_path]  # fmt: skip
    status, out, _ = call(*arguments)
    assert status == 0
    report = json.loads((tmp_path / "report.json").read_text())
    asked = {key: report["workload"][key] for key in ("prompt_tokens", "new_tokens", "arrivals", "prompts")}
    assert asked == {
        "prompt_tokens": "4-40", "new_tokens": "lognormal:8:0.6", "arrivals": "poisson:100", "prompts": None,
    }  # fmt: skip
    made = make_requests(workload_of(*arguments), load_model("random:tiny")[0], None)
    for run in report["runs"]:
        assert run["tokens"] == sum(request.max_new_tokens for request in made), "each runs to its own length"
        assert run["new_tokens"] == max(request.max_new_tokens for request in made)
        assert run["prompt_tokens"] == max(len(request.token_ids) for request in made)
        for times in run["latency"].values():
            assert 0 < times["median"] <= times["p99"]
        assert run["latency"]["first_token_ms"]["median"] < run["latency"]["end_to_end_ms"]["median"]
    rows = {line[:20].strip(): line[20:].split() for line in out.splitlines()}
    for label, key in (("first token", "first_token_ms"), ("per token", "per_token_ms")):
        expected = [f"{run['latency'][key]['p99']:.1f}" for run in report["runs"]]
        assert rows[f"{label}, p99"] == [expected[0], "ms", expected[1], "ms"]
    assert "requests arrive over time (poisson:100)" in out
    assert (tmp_path / "timeline.png").exists()
    status, out, _ = call(*SMALL, "--requests", 2, "--new-tokens", 2)
    assert status == 0
    assert "first token" not in out
    assert "arrive over time" not in out


def test_a_file_of_tokens_is_served_once_and_named(call, tmp_path):
    path = written(tmp_path, "p.jsonl", TOKENS + '{"token_ids": [2, 3], "max_new_tokens": 9}\n')
    report = json.loads(call(*SMALL, "--prompts", path, "--new-tokens", 4, "--json")[1])
    assert {run["tokens"] for run in report["runs"]} == {4 + 9}
    assert {(run["requests"], run["prompt_tokens"], run["new_tokens"]) for run in report["runs"]} == {(2, 2, 9)}
    assert report["workload"]["prompts"] == str(path)
    assert report["workload"]["prompts_sha256"] == PromptFile.read(str(path)).sha256
    assert report["workload"]["requests"] == 2
    assert report["workload"]["prompt_tokens"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the peer runs asynchronously too")
def test_the_peer_serves_the_same_arrivals(call, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # with sdpa, as users have it: interpreted kernels take long
    arguments = ["--engine", "asyncbatch,transformers", "--mode", "sync", "--requests", 4, "--prompt-tokens", "2-9",
                 "--new-tokens", "2-6", "--arrivals", "poisson:60"]  # fmt: skip
    status, out, _ = call(*SMALL, *arguments, "--json")
    report = json.loads(out)
    assert status == 0
    assert report["failed"] == []
    ours, theirs = report["runs"]
    assert ours["tokens"] == theirs["tokens"]
    assert all(theirs["latency"][key]["median"] > 0 for key in theirs["latency"])


@pytest.fixture(scope="module")
def recording_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("recordings") / "made-up.json"
    example().save(path)
    return path


def test_an_emulated_device_takes_drawn_lengths_arrivals_and_tokens_from_a_file(call, recording_file, tmp_path):
    arguments = ["--emulate", recording_file, "--batch-size", 2, "--mode", "async"]
    report = json.loads(call(*arguments, "--new-tokens", "1-3", "--arrivals", "poisson:200", "--json")[1])
    assert report["workload"]["new_tokens"] == "1-3"
    assert {row["setting"] for row in report["recorded"]} == {"the whole run"}, "it is no beginning of the recorded run"
    path = written(tmp_path, "p.jsonl", TOKENS * 3)
    report = json.loads(call(*arguments, "--prompts", path, "--new-tokens", 3, "--json")[1])
    assert (report["runs"][0]["requests"], report["runs"][0]["tokens"]) == (3, 9)
    status, out, error = call(*arguments, "--prompts", written(tmp_path, "p.txt", "a sea"))
    assert (status, out) == (2, "")
    assert "has no tokenizer here" in error
    status, out, error = call(*arguments, "--prompts", path, "--new-tokens", "3000-3001")
    assert (status, out) == (2, "")
    assert "was recorded up to" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompts", "p.jsonl", "--prompt-tokens", "4"], "--prompts and --prompt-tokens were given: only one"),
        (["--preset", "sweep", "--new-tokens", "4-9"], "--preset is for requests of one length that are all there at "
         "the beginning: --new-tokens 4-9 cannot be had with it"),
        (["--preset", "headline", "--prompt-tokens", "lognormal:4:1"], "--prompt-tokens lognormal:4:1 cannot be had"),
        (["--preset", "headline", "--prompts", "p.jsonl"], "--prompts p.jsonl cannot be had"),
        (["--preset", "sweep", "--arrivals", "poisson:3"], "--arrivals poisson:3 cannot be had"),
        (["--record", "mine", "--out", "o", "--arrivals", "poisson:3"], "--record is for requests of one length"),
        (["--arrivals", "poisson"], "argument --arrivals: 'poisson' was given; allowed are all, or poisson:RATE"),
        (["--prompt-tokens", "9-3"], "argument --prompt-tokens: '9-3' was given; allowed are a whole number from 1"),
        (["--new-tokens", "normal:3:1"], "argument --new-tokens: 'normal:3:1' was given; allowed are"),
        (["--prompt-tokens", "4-1000", "--new-tokens", "5-25"], "prompts of 4-1000 tokens and 5-25 new ones: "
         "random:tiny allows 1024"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(call, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "p.jsonl", TOKENS)
    status, out, error = call(*SMALL, *arguments)
    assert (status, out) == (2, "")
    lines = [line for line in error.splitlines() if not line.startswith("usage:")]
    assert len(lines) == 1
    assert said in lines[0]


def test_the_help_groups_the_options_and_ends_with_examples_that_parse(call):
    status, out, _ = call("--help")
    assert status == 0
    groups = [line[:-1] for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups == ["options", "workload", "engine and loop", "device", "what to measure", "output", "examples"]
    assert "cut so that" in " ".join(out.split())
    examples = [line.split()[3:] for line in out.splitlines() if line.startswith("  python -m asyncbatch.profile")]
    assert len(examples) == 5
    for example_arguments in examples:
        parse_arguments(example_arguments)


def test_a_peer_is_judged_by_all_that_it_has_to_generate(tiny):
    made = [Request([1], 400, stop_token_ids=()), Request([1], 16, stop_token_ids=())]
    served = []

    class Slow:
        setting = "slow"

        def run(self, requests, progress=False):
            served.append([request.max_new_tokens for request in requests])
            self.timeline = types.SimpleNamespace(summary=lambda: types.SimpleNamespace(wall_s=1.0))
            return [Completion([], "length") for _ in requests]

    with pytest.raises(RuntimeError, match="it would take about 9 s"):  # 416 tokens at 48 a second
        turns.check_speed(Slow(), made, limit_s=1)
    assert served == [[32, 16]]

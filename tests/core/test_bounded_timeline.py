"""A timeline that keeps only its newest steps: its summary is that of all steps, and what it cannot know it refuses."""

from __future__ import annotations

import gc
import math
import statistics
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.serving import OPTIONS, requests
from support.tiny import tiny_model

from asyncbatch import AsyncBatcher, Request, SyncBatcher
from asyncbatch.config import Config
from asyncbatch.devices.virtual import Costs
from asyncbatch.measure.attribution import attribute
from asyncbatch.measure.point_recorder import record_points
from asyncbatch.measure.points import points_of
from asyncbatch.measure.simulate import costs_of, what_if
from asyncbatch.measure.steps import phase_medians_us, steps_from
from asyncbatch.pictures import plot
from asyncbatch.profile.diagnosis import device_ms
from asyncbatch.request import RequestError
from asyncbatch.timeline import Step, Timeline

WHOLE = 10**9
HALF = 8_000  # steps
KINDS = [(SyncBatcher, 1), (AsyncBatcher, 2), (AsyncBatcher, 5)]


def virtual(kind, slots=None, *, seed=0, **options):
    """A batcher on the virtual clock that computes nothing: every run of it is the same to the bit."""
    costs = Costs(jitter=0.9, seed=seed)
    return kind(tiny_model(), num_slots=slots, clock=costs, step_s=0.0, **{**OPTIONS, **options})


def serve(batcher, wanted: list[Request]) -> tuple[Timeline, list[list[int]]]:
    """Requests that are submitted, streamed and cancelled, in a timeline that no `run` begins."""
    handles = []
    for number, request in enumerate(wanted):
        if number % 3 == 1:
            stream = batcher.stream(request)
            next(stream, None)  # and is cancelled when the next is streamed
        handles.append(batcher.submit(request))
        if number % 3 == 2:
            batcher.cancel(handles[-2])
    tokens = [handle.result().token_ids for handle in handles]
    while batcher.turn():
        pass
    return batcher.timeline, tokens


def plain_summary(timeline: Timeline) -> dict[str, float]:
    """The summary of a whole timeline, in plain Python."""
    decode = {step.step for step in timeline.steps if step.kind == "decode"}
    active = period = 0.0
    before = None
    for span in sorted((span for span in timeline.spans if span.lane == "compute"), key=lambda span: span.start):
        if before is not None and span.step in decode:
            active += span.end - span.start
            period += span.end - before
        before = span.end
    wall = max(span.end for span in timeline.spans) - min(span.start for span in timeline.spans)
    tokens = sum(step.tokens for step in timeline.steps)
    share = active / period if period else None
    return {
        "wall_s": wall,
        "tokens": tokens,
        "tokens_per_s": tokens / wall,
        "steps": len(timeline.steps),
        "decode_steps": len(decode),
        "device_active": share,
        "idle": None if share is None else 1 - share,
        "wasted_tokens": sum(step.wasted for step in timeline.steps),
    }


def median_host_ms(timeline: Timeline, steps: list[Step]) -> float | None:
    """Of the host work of these steps, in plain Python."""
    of = {step.step: 0.0 for step in steps if step.kind == "decode"}
    for span in timeline.spans:
        if span.step in of and span.lane == "host" and span.name != "wait":
            of[span.step] += span.end - span.start
    return 1e3 * statistics.median(of.values()) if of else None


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(KINDS), st.integers(1, 12), st.lists(requests, min_size=1, max_size=8), st.integers(0, 99))
def test_its_summary_is_that_of_all_steps_to_the_bit(tmp_path_factory, kind, most, wanted, seed):
    with virtual(*kind, seed=seed, timeline=WHOLE) as batcher:
        whole, tokens = serve(batcher, wanted)
    with virtual(*kind, seed=seed, timeline=most) as batcher:
        cut, same_tokens = serve(batcher, wanted)
    assert tokens == same_tokens
    expected = whole.summary().as_dict()
    assert expected == {**plain_summary(whole), "host_ms_per_step": expected["host_ms_per_step"]}
    found = cut.summary().as_dict()
    assert cut.steps == whole.steps[-most:]
    assert cut.dropped == len(whole.steps) - len(cut.steps)
    assert found.pop("host_ms_per_step") == pytest.approx(median_host_ms(whole, cut.steps))
    assert found == {key: expected[key] for key in found}
    kept = {step.step for step in cut.steps}
    assert [span for span in cut.spans if span.step in kept] == [span for span in whole.spans if span.step in kept]
    assert len(cut.spans) <= 8 * (most + kind[1] - 1), "few of the steps that were dropped"
    gaps, kept_gaps = [gap for gap in whole.gaps() if gap.step in kept], cut.gaps()
    assert [gap.start for gap in gaps][-len(kept_gaps) :] == [gap.start for gap in kept_gaps] or not kept_gaps
    assert len(kept_gaps) >= len(gaps) - 1, "a gap is not known where the step before it is dropped"
    for gap, same in zip(reversed(gaps), reversed(kept_gaps[1:]), strict=False):
        assert same.host_s == pytest.approx(gap.host_s, abs=1e-12)
    path = tmp_path_factory.mktemp("traces") / "cut.json"
    cut.save(path)
    loaded = Timeline.load(path)
    assert loaded.summary().as_dict() == cut.summary().as_dict()
    assert (loaded.spans, loaded.steps, loaded.gaps()) == (cut.spans, cut.steps, cut.gaps())
    assert (loaded.dropped, loaded.most_steps, repr(loaded)) == (cut.dropped, most if cut.dropped else None, repr(cut))


def interrupted(slot):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("kind", "slots"), KINDS)
def test_steps_that_were_never_committed_are_dropped_with_those_around_them(kind, slots, monkeypatch):
    with virtual(kind, slots, timeline=2) as batcher:
        for _ in range(20):
            with monkeypatch.context() as patch:
                patch.setattr(batcher.device, "failure", interrupted)
                handle = batcher.submit(Request([1, 2], 6))
                with pytest.raises(KeyboardInterrupt):
                    handle.result()
            batcher.submit(Request([1, 2], 6)).result()
        timeline = batcher.timeline
    newest = timeline.steps[-1].step
    assert min(span.step for span in timeline.spans) > newest - 2 - slots
    assert timeline.totals.steps == timeline.dropped + len(timeline.steps) <= newest


@pytest.mark.parametrize(("kind", "slots"), KINDS)
def test_without_a_timeline_the_tokens_are_the_same_and_nothing_is_measured(kind, slots):
    wanted = [Request([1, 2, 3 + i], 9, stop_token_ids=[5 * i]) for i in range(7)]
    with virtual(kind, slots, timeline=WHOLE) as batcher:
        whole, tokens = serve(batcher, wanted)
    with virtual(kind, slots, timeline=False) as batcher:
        none, same_tokens = serve(batcher, wanted)
    assert tokens == same_tokens
    assert (none.spans, none.steps, none.gaps()) == ([], [], [])
    expected, found = whole.summary().as_dict(), none.summary().as_dict()
    counted = ("tokens", "steps", "decode_steps", "wasted_tokens")
    assert found == {key: expected[key] if key in counted else None for key in expected}
    assert "nan" in str(none.summary())


def test_a_run_begins_a_new_timeline_with_new_totals():
    with virtual(AsyncBatcher, timeline=3) as batcher:
        for _ in range(2):
            batcher.run([Request([1, 2], 8)])
            assert batcher.timeline.summary().steps == 8


READERS = {
    "attribute": attribute,
    "points": points_of,
    "costs": costs_of,
    "what if": what_if,
    "recording": steps_from,
    "phases": phase_medians_us,
    "device": device_ms,
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_who_needs_every_step_says_so(reader):
    with virtual(AsyncBatcher, timeline=4) as batcher:
        batcher.run([Request([1, 2], 4)])
        reader(batcher.timeline)
        batcher.run([Request([1, 2], 12)])
        with pytest.raises(ValueError, match="dropped 8 of 12: open the batcher with timeline=12"):
            reader(batcher.timeline)


@pytest.mark.parametrize("kept", [2, False])
def test_while_points_are_recorded_every_step_is_kept(kept):
    with virtual(SyncBatcher, timeline=kept) as batcher:
        batcher.run([Request([1, 2], 12)])
        with record_points(batcher):
            batcher.run([Request([1, 2], 12)])
        assert (batcher.timeline.dropped, len(batcher.timeline.steps)) == (0, 12)
        assert attribute(batcher.timeline).steps == 11
        batcher.submit(Request([1, 2], 5)).result()
        assert len(batcher.timeline.steps) == int(kept)


def test_a_picture_shows_what_is_kept_and_says_so():
    with virtual(AsyncBatcher, timeline=4) as batcher:
        batcher.run([Request([1, 2], 12)])
        (track,) = plot(batcher.timeline).tracks
    assert track.caption.endswith("the newest 4 of 12 steps")
    first = min(span.start for span in batcher.timeline.spans)
    assert track.end == max(span.end for span in batcher.timeline.spans) - first


@pytest.mark.parametrize(("given", "kept"), [(True, 100_000), (False, 0), (0, 0), (7, 7)])
def test_what_the_option_means(given, kept):
    assert Config.of(tiny_model(), timeline=given).timeline == kept


@pytest.mark.parametrize("given", [-1, 2.0, None, "all"])
def test_what_the_option_may_not_be(given):
    with pytest.raises(ValueError, match="timeline is .*: allowed are True, False and whole numbers from 0"):
        Config.of(tiny_model(), timeline=given)


def memory() -> tuple[int, int]:
    """(blocks that Python has allocated, bytes of all containers). The first counts every small object, the second
    what a list of the same few things takes."""
    gc.collect()
    return sys.getallocatedblocks(), sum(map(sys.getsizeof, gc.get_objects()))


def test_a_batcher_that_serves_for_ever_stays_as_small_as_it_is():
    """By submit and stream, with cancellations and bad requests, in two halves. What the second adds is what would be
    added for ever: less than 50 MB in 10 million steps."""
    with virtual(AsyncBatcher, timeline=50) as batcher:

        def serve_steps(count: int) -> tuple[int, int]:
            aim = batcher.timeline.totals.steps + count
            while batcher.timeline.totals.steps < aim:
                handles = [batcher.submit(Request([1 + i, 2], 12, stop_token_ids=[40 + i])) for i in range(6)]
                batcher.cancel(handles[3])
                stream = batcher.stream(Request([3, 4], 12))
                next(stream)
                stream.close()
                with pytest.raises(RequestError):
                    batcher.submit(Request([], 1))
                for handle in handles:
                    handle.result()
            return memory()

        serve_steps(1_000)  # what is made once
        blocks, sizes = zip(serve_steps(HALF), serve_steps(HALF), strict=True)
        timeline = batcher.timeline
    assert (blocks[1] - blocks[0]) * 512 / HALF * 1e7 < 25e6, blocks  # a block has at most 512 bytes
    assert (sizes[1] - sizes[0]) / HALF * 1e7 < 25e6, sizes
    assert timeline.dropped > 2 * HALF
    assert not math.isnan(timeline.summary().idle)

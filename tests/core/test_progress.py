"""The progress bar: tokens, and how idle the device was so far, without reading the timeline again and again."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.timelines import runs
from support.tiny import tiny_model

from asyncbatch import AsyncBatcher, Request, SyncBatcher
from asyncbatch.serving import _IdleSoFar
from asyncbatch.timeline import Timeline


class Counted(list):
    """A list that counts what is read from it, and refuses to be read as a whole."""

    reads = 0

    def __getitem__(self, index):
        found = list.__getitem__(self, index)
        self.reads += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self):
        raise AssertionError("the whole list was read")


@given(runs(), st.integers(1, 5))
def test_idle_so_far_is_the_summary_of_what_has_come_and_reads_everything_once(whole, often):
    growing = Timeline()
    growing.spans, growing.steps = Counted(), Counted()
    idle, last = _IdleSoFar(growing), None
    for number, step in enumerate(whole.steps):
        growing.spans += [span for span in whole.spans if span.step == step.step]
        growing.steps.append(step)
        if number % often == 0:
            last = idle()
            part = Timeline()
            part.spans, part.steps = growing.spans[:], growing.steps[:]
            growing.spans.reads -= len(part.spans)
            growing.steps.reads -= len(part.steps)
            expected = part.summary().as_dict()["idle"]
            assert last is None if expected is None else last == pytest.approx(max(0, expected), abs=1e-6)
    idle()
    assert (growing.spans.reads, growing.steps.reads) == (len(whole.spans), len(whole.steps)), "each exactly once"


def test_a_span_whose_step_is_not_noted_yet_waits_for_the_next_look():
    timeline = Timeline()
    idle = _IdleSoFar(timeline)
    for step in range(3):
        timeline.add("compute", "step", step, 10.0 * step, 10.0 * step + 5)
    for step in range(2):
        timeline.add_step(step, "decode", 1, 0)
    assert idle() == 0.5
    assert idle.spans == 2
    timeline.add_step(2, "prefill", 1, 0)
    assert idle() == 0.5
    assert idle.spans == 3


@pytest.mark.parametrize("batcher_class", [SyncBatcher, AsyncBatcher])
def test_the_bar_counts_every_token_and_says_idle_at_most_once_a_second(batcher_class, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **options):
            self.options, self.n, self.said, self.closed = options, 0, [], False
            bars.append(self)

        def update(self, tokens):
            self.n += tokens

        def set_postfix_str(self, text, refresh=True):
            self.said.append((text, batcher.timeline.summary().idle))

        def close(self):
            self.closed = True

    clock = itertools.count(100, 0.25)  # a quarter of a second for each turn of the loop
    monkeypatch.setattr("tqdm.tqdm", Bar)
    monkeypatch.setattr("asyncbatch.serving.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with batcher_class(tiny_model(), max_batch_size=2) as batcher:
        batcher.run([Request([1, 2], max_new_tokens=20)] * 2, progress=True)
    (bar,) = bars
    assert bar.options["unit"] == " tokens", "tqdm says tokens/s itself"
    assert (bar.n, bar.options["total"], bar.closed) == (40, 40, True)
    assert 0 < len(bar.said) <= next(clock) - 100, "seconds that have passed on this clock"
    assert [text for text, _ in bar.said] == [f"idle {100 * idle:.1f} %" for _, idle in bar.said]

"""The progress bar: tokens, and how idle the device was so far, without reading the timeline again and again."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from support.timelines import runs
from support.tiny import tiny_model

from asyncbatch import AsyncBatcher, Request, SyncBatcher
from asyncbatch.timeline import Timeline


@given(runs())
def test_the_share_so_far_is_at_every_step_the_summary_of_what_has_come(whole):
    growing = Timeline()
    for step in whole.steps:
        for span in whole.spans:
            if span.step == step.step:
                growing.add(*span)
        growing.add_step(*step)
        so_far, summary = growing.totals.active, growing.summary().device_active
        assert so_far == summary or (math.isnan(so_far) and math.isnan(summary))


@pytest.mark.parametrize("batcher_class", [SyncBatcher, AsyncBatcher])
@pytest.mark.parametrize("kept", [True, 3])
def test_the_bar_counts_every_token_and_says_idle_at_most_once_a_second(batcher_class, kept, monkeypatch):
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
    monkeypatch.setattr("asyncbatch.shown.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with batcher_class(tiny_model(), max_batch_size=2, timeline=kept) as batcher:
        batcher.run([Request([1, 2], max_new_tokens=20)] * 2, progress=True)
    (bar,) = bars
    assert bar.options["unit"] == " tokens", "tqdm says tokens/s itself"
    assert (bar.n, bar.options["total"], bar.closed) == (40, 40, True)
    assert 0 < len(bar.said) <= next(clock) - 100, "seconds that have passed on this clock"
    assert [text for text, _ in bar.said] == [f"idle {100 * idle:.1f} %" for _, idle in bar.said]


def test_a_bar_says_nothing_of_idle_time_that_was_not_measured(capfd, monkeypatch):
    clock = itertools.count(100, 2.0)
    monkeypatch.setattr("asyncbatch.shown.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with SyncBatcher(tiny_model(), max_batch_size=2, timeline=False) as batcher:
        batcher.run([Request([1, 2], max_new_tokens=20)] * 2, progress=True)
    assert "idle" not in capfd.readouterr().err

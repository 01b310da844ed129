"""Ranks as lanes: one time axis for all, and what a step spends at collectives inside it, told apart in three ways."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.timelines import steady_run

from asyncbatch.pictures.ranks import LOOKS, CollectiveSpan, plot_ranks
from asyncbatch.timeline import Timeline


def rank(late: float, steps: int = 8) -> tuple[Timeline, list[CollectiveSpan]]:
    """Steps of 10 ms. This rank begins each of them `late` seconds late, and arrives at its one collective, which for
    all ranks begins 5 ms into the 10 and takes 2 ms, 3 ms after it began."""
    timeline, spans = Timeline("async", "virtual"), []
    for step in range(steps):
        now = 70 + 10e-3 * step
        timeline.add("host", "plan", step, now + late - 1e-3, now + late)
        timeline.add("compute", "step", step, now + late, now + 9e-3)
        timeline.add_step(step, "prefill" if step == 0 else "decode", 4, 0)
        spans.append(CollectiveSpan(step, now + late + 3e-3, now + 5e-3, now + 7e-3))
    return timeline, spans


def two() -> tuple[tuple[Timeline, ...], tuple[list[CollectiveSpan], ...]]:
    return tuple(zip(rank(1e-3), rank(2e-3), strict=True))  # type: ignore[return-value]


def test_each_rank_has_a_host_and_a_compute_lane_on_one_time_axis():
    timelines, spans = two()
    figure = plot_ranks(timelines, spans, window=(0, 80e-3))
    main = figure.figure.axes[0]
    assert [tick.get_text() for tick in main.get_yticklabels()] == ["host", "compute"] * 2
    place = {text.get_text(): text.get_position()[1] for text in main.texts}
    assert place["rank 0"] < place["rank 1"]
    assert [track.steps[0][3] for track in figure.tracks] == pytest.approx([31e-3, 32e-3])  # not each from its own 0
    later = plot_ranks(timelines, spans, origins=[70.0, 70.001])
    assert [track.steps[0][3] for track in later.tracks] == pytest.approx([31e-3, 31e-3])


def test_waiting_and_exchange_are_parts_of_the_step_with_words_of_their_own():
    timelines, spans = two()
    figure = plot_ranks(timelines, spans, window=(10e-3, 20e-3))
    first = figure.tracks[0].layers
    assert {key: np.round(1e3 * (first[key][3] - first[key][2])[:2], 6).tolist() for key in first} == {
        "work": [1, 1], "wait": [], "prefill": [3, 2], "decode": [3, 2], "held": [1, 1], "moves": [2, 2],
    }  # fmt: skip
    assert "held" in figure.tracks[1].layers
    assert not len(figure.tracks[1].layers["held"][0]), "the last to arrive waits for nobody"
    words = [text.get_text() for text in figure.figure.axes[0].texts]
    assert words.count("waits") == 1
    assert words.count("all-reduce") == 2
    assert "of its steps 25.0 % all-reduce, 12.5 % waits for other ranks" in figure.tracks[0].caption
    assert "of its steps 28.6 % all-reduce, 0.0 % waits for other ranks" in figure.tracks[1].caption


@given(st.lists(st.lists(st.tuples(*[st.floats(0, 1)] * 3), max_size=5), min_size=1, max_size=6))
def test_whatever_the_collectives_the_parts_of_a_step_are_its_whole(parts):
    timeline, spans = Timeline(), []
    for step, each in enumerate(parts):
        timeline.add("compute", "step", step, now := 2.0 * step, now + 1.0)
        times = sorted(moment for three in each for moment in three)
        spans += [CollectiveSpan(step, *(now + t for t in times[i : i + 3])) for i in range(0, len(times), 3)]
    layers = plot_ranks([timeline], [spans[::-1]], window=(0, 2)).tracks[0].layers
    starts, ends = (np.concatenate([layers[key][i] for key in ("decode", "held", "moves")]) for i in (2, 3))
    assert float(np.sum(ends - starts)) == pytest.approx(len(parts))
    order = np.argsort(starts)
    assert (starts[order][1:] >= ends[order][:-1] - 1e-12).all()


def test_each_layer_can_be_told_apart_without_colour():
    assert len({(lane, hatch) for lane, _, _, hatch, _ in LOOKS.values()}) == len(LOOKS)
    assert len({words for *_, words in LOOKS.values()}) == len(LOOKS)


def test_the_widget_gets_two_lanes_a_rank_and_every_part():
    timelines, spans = two()
    figure = plot_ranks(timelines, spans)
    about, packed = figure.packed()
    assert [(lane["lane"], lane["words"]) for lane in about["lanes"]] == [("host", "host"), ("compute", "compute")]
    assert {layer["key"]: layer["hatch"] for layer in about["layers"]}["held"] == "x"
    assert {"step", "waits", "all-reduce", "plan"} == set(about["names"])
    assert len(packed) == 24 * (8 * (1 + 2 + 2) + 8 * (1 + 2 + 1))
    assert figure.widget.about["title"] == "rank 0, rank 1"


def test_without_collectives_the_steps_are_whole_and_ranks_may_have_names():
    figure = plot_ranks([steady_run("a"), steady_run("b")], names=["GPU 0", "GPU 1 of another machine"])
    assert [track.name for track in figure.tracks] == ["GPU 0", "GPU 1 of another machine"]
    assert all("all-reduce" not in track.caption for track in figure.tracks)
    assert len(figure.tracks[0].layers["decode"][0]) + len(figure.tracks[0].layers["prefill"][0]) == 100
    assert plot_ranks([Timeline(), steady_run("b")]).png().startswith(b"\x89PNG")
    assert plot_ranks([Timeline()]).png().startswith(b"\x89PNG")


def test_clocks_are_read_to_a_microsecond():
    spans = [CollectiveSpan(0, 0.5000001, 0.5, 0.6)]
    timeline = Timeline()
    timeline.add("compute", "step", 0, 0.0, 1.0)
    layers = plot_ranks([timeline], [spans]).tracks[0].layers
    assert not len(layers["held"][0])
    assert (layers["moves"][3] - layers["moves"][2]).tolist() == pytest.approx([0.1], abs=1e-6)


def test_bad_arguments_say_what_was_given():
    one = steady_run("a", 3)
    for arguments, options, words in (
        (([],), {}, "one a rank, and was given: nothing"),
        ((["a"],), {}, "one a rank, and was given: str"),
        (([one, one], [[]]), {}, "collectives has 1 entries for 2 ranks"),
        (([one, one],), {"names": ["a"]}, "names has 1 entries for 2 ranks"),
        (([one, one],), {"origins": [0, 1, 2]}, "origins has 3 entries for 2 ranks"),
        (([one],), {"window": (2, 1)}, "start < end"),
        (([one], [[CollectiveSpan(0, 2.0, 1.0, 3.0)]]), {}, "arrived <= began <= ended"),
        (([one], [[CollectiveSpan(0, 1.0, 3.0, 2.0)]]), {}, "arrived <= began <= ended"),
    ):
        with pytest.raises(ValueError, match=words):
            plot_ranks(*arguments, **options)

"""Pictures show what the timelines hold, in any environment, and compare equal from run to run."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.timelines import steady_run

from asyncbatch.pictures import Picture, TimelineFigure, figure, plot
from asyncbatch.pictures.picture import COLORS
from asyncbatch.pictures.timelines import HEIGHTS, LAYERS, label
from asyncbatch.timeline import LANES, Timeline

WIDGET = "application/vnd.jupyter.widget-view+json"


def pixels(picture: Picture) -> np.ndarray:
    """(height, width, 3) bytes of the picture as it is saved."""
    return np.asarray(Image.open(io.BytesIO(picture.png())).convert("RGB"))


def area(picture: Picture, color: str) -> int:
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels(picture).astype(int) - wanted).max(2) < 12).sum())


def test_the_filled_area_is_the_busy_time_however_many_spans_there_are():
    def blue(active: float) -> int:
        timeline = steady_run("x", 3000, active)
        timeline.steps = [step._replace(kind="decode") for step in timeline.steps]  # no hatch
        return area(plot(timeline, window=(0, np.inf)), COLORS["blue"])

    none = area(plot(Timeline()), COLORS["blue"])  # of the legend
    quarter, whole = blue(0.25) - none, blue(1.0) - none
    assert whole > 20_000
    assert quarter / whole == pytest.approx(0.25, abs=0.05)


def overlapped(steps: int) -> Timeline:
    """An asynchronous loop: while the device computes step N for 4 ms, the host commits N-1 and prepares N+1."""
    timeline = Timeline("async", "virtual")
    for step in range(steps):
        now = 70 + 4e-3 * step
        timeline.add("compute", "step", step, now, now + 4e-3)
        for name, of, length in (("commit", step - 1, 2), ("plan", step + 1, 4), ("fill", step + 1, 3)):
            timeline.add("host", name, of, now, now + length * 1e-4)
            now += length * 1e-4
        timeline.add("host", "wait", step, now, 70 + 4e-3 * (step + 1))
        timeline.add_step(step, "decode", 8, 0)
    return timeline


@pytest.mark.parametrize("steps", [5, 12, 100])
def test_the_default_picture_shows_two_or_three_steps_in_the_middle(steps):
    fig = plot(steady_run("sync", steps), steady_run("async", steps))
    low, high = fig.window
    assert 0.02 <= high - low <= 0.03
    assert low < 0.01 * steps / 2 < high
    assert plot(steady_run("short", 4)).window == (0, pytest.approx(0.0401)), "a short run is shown whole"


@pytest.mark.parametrize("steps", [12, 300])
def test_in_the_default_picture_the_hosts_blocks_are_named_and_the_next_plan_stands_beside_a_step(steps):
    fig = plot(overlapped(steps))
    main = fig.figure.axes[0]
    where = {text.get_text(): text.get_position()[0] for text in main.texts}
    low, high = (1e3 * moment for moment in fig.window)
    inside = [step for step in range(steps) if low < 4 * step and 4 * step + 4 < high]
    assert inside, "no whole step is seen"
    for step in inside:
        for name, of in (("plan", step + 1), ("fill", step + 1), ("wait", step)):
            assert 4 * step < where[f"{name} {of}"] < 4 * step + 4
        assert where[f"step {step}"] == pytest.approx(4 * step + 2)
    fig.figure.draw_without_rendering()
    lane = main.transData.transform([(0, 0), (0, HEIGHTS["host"])])
    for text in main.texts:  # upright words do not stand out of their lane
        if text.get_rotation() == 90:
            assert text.get_window_extent().height < abs(lane[1][1] - lane[0][1])
    assert sum(text.get_rotation() == 90 for text in main.texts) >= 3


def test_a_block_without_room_has_no_name():
    assert [label("host", "plan", 6, room) for room in (5, 20, 90)] == [("", 0), ("plan 6", 90), ("plan 6", 0)]
    assert [label("compute", "step", 12, room)[0] for room in (5, 25, 90)] == ["", "12", "step 12"]
    assert label("host", "commit", 147, 40) == ("commit", 90)
    assert label("host", "a name of somebody's own", 6, 40) == ("", 0)


def test_sync_is_above_async_on_one_time_axis_and_lanes_have_words():
    fig = plot(steady_run("sync"), steady_run("async", active=1.0), title="Two runs").figure
    main = fig.axes[0]
    place = {text.get_text(): text.get_position()[1] for text in main.texts}
    assert place["sync"] < place["async"]
    assert main.get_ylim()[0] > main.get_ylim()[1], "the first is at the top"
    words = [tick.get_text() for tick in main.get_yticklabels()]
    assert words == ["host", "H2D (copy in)", "compute", "D2H (copy out)"] * 2
    captions = [text.get_text() for text in main.texts if "device active" in text.get_text()]
    assert captions[0] == "device active 80.0 %, idle 20.0 %, 1 s in all, virtual clock"
    assert captions[1].startswith("device active 100.0 %, idle 0.0 %")
    texts = [text.get_text() for text in main.texts]
    assert texts.count("idle") >= 2
    assert "step 50" in texts
    assert "time since the run began" in main.get_xlabel()


def test_each_layer_can_be_told_apart_without_colour():
    looks = {(lane, hatch) for lane, _, _, hatch, _ in LAYERS.values()}
    assert len(looks) == len(LAYERS)


def test_labels_are_text_and_not_markup():
    timeline = steady_run(r"$\frac{<b>x</b>$" + " long" * 50, 30)
    timeline.clock = "\ud83d$\n"
    timeline.add("host", "$\\bad{$\ud83d", 3, 50.0, 50.1)
    fig = plot(timeline, title=r"$\sqrt{$", window=(0, 0.1))
    assert fig.png().startswith(b"\x89PNG")
    assert fig.title == r"$\sqrt{$"
    assert len(fig.widget.about["tracks"][0]["name"]) <= 40


def test_empty_and_single_timelines_can_be_drawn():
    for timeline in (Timeline(), steady_run("one", 1)):
        assert plot(timeline).png().startswith(b"\x89PNG")
    assert plot(steady_run("one", 1), window=(0, 0.005)).window == (0, 0.005)


def test_the_bundle_has_a_widget_a_png_and_a_text_that_never_changes():
    fig, again = plot(steady_run("sync"), steady_run("async")), plot(steady_run("sync", 50), steady_run("async", 70))
    bundle = fig._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "image/png", WIDGET}
    assert base64.b64decode(bundle["image/png"]) == fig.png()
    assert bundle["text/plain"] == again._repr_mimebundle_()["text/plain"] == "<TimelineFigure: sync, async>"
    assert bundle[WIDGET]["model_id"] == fig._repr_mimebundle_()[WIDGET]["model_id"], "shown twice is one widget"
    assert len(bundle["image/png"]) < 100_000, "notebooks are to stay small"


def test_without_anywidget_the_picture_is_left(monkeypatch):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    fig = plot(steady_run("sync"))
    assert fig.widget is None
    assert set(fig._repr_mimebundle_()) == {"text/plain", "image/png"}


def test_the_widget_gets_every_span_in_24_bytes():
    sync, async_ = steady_run("sync"), steady_run("async", 30)
    widget = plot(sync, async_).widget
    layout = np.dtype([("start", "<f8"), ("end", "<f8"), ("step", "<i4"), ("name", "<u2"), ("layer", "<u2")])
    rows = np.frombuffer(widget.spans, layout)
    assert layout.itemsize == 24
    layers = list(LAYERS)
    got, expected = [], []
    for row in rows:
        track, layer = divmod(int(row["layer"]), len(layers))
        lane = LAYERS[layers[layer]][0]
        got.append((track, lane, widget.about["names"][row["name"]], int(row["step"]), row["start"], row["end"]))
    for track, timeline in enumerate((sync, async_)):
        for lane, name, step, start, end in timeline.spans:
            expected.append((track, lane, name, step, start - 50, end - 50))
    assert sorted(got) == sorted(expected)
    prefills = [row for row in rows if layers[row["layer"] % len(layers)] == "prefill"]
    assert len(prefills) == 10 + 3


def unpacked(about, spans) -> dict[str, set]:
    """The spans on each lane, as (track, name, step, start, end)."""
    layout = np.dtype([("start", "<f8"), ("end", "<f8"), ("step", "<i4"), ("name", "<u2"), ("layer", "<u2")])
    found: dict[str, set] = {lane: set() for lane in LANES}
    for row in np.frombuffer(spans, layout).tolist():
        start, end, step, name, layer = row
        lane = LANES[about["layers"][layer % len(LAYERS)]["lane"]]
        found[lane].add((layer // len(LAYERS), about["names"][name], step, start, end))
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 700))
def test_of_too_many_spans_those_around_the_middle_are_kept_and_every_step_as_long_as_it_fits(sync, async_, most):
    fig = plot(steady_run("sync", sync), steady_run("async", async_, active=1.0))
    everything, (about, spans) = unpacked(*fig.packed()), fig.packed(most)
    some = unpacked(about, spans)
    assert sum(map(len, everything.values())) == fig.num_spans == 5 * (sync + async_)
    assert sum(map(len, some.values())) == len(spans) // 24 <= most
    if fig.num_spans <= most:
        assert some == everything
    if len(everything["compute"]) <= 0.8 * most:
        assert some["compute"] == everything["compute"]
    for lane, described in zip(LANES, about["lanes"], strict=True):
        if described["kept"] is None:
            assert some[lane] == everything[lane]
            continue
        low, high = described["kept"]
        assert 0 <= low <= high <= fig.end
        inside = {span for span in everything[lane] if span[3] < high - 1e-9 and span[4] > low + 1e-9 and low < high}
        assert inside <= some[lane] <= everything[lane]
        assert all(span[4] >= low - 1e-9 and span[3] <= high + 1e-9 for span in some[lane])


def test_figure_is_an_empty_picture_in_the_same_style(tmp_path):
    picture = figure(6, 2.5, title="Idle share")
    picture.axes.bar(["sync", "async"], [20, 1], color=[COLORS["vermillion"], COLORS["blue"]])
    assert picture._repr_mimebundle_()["text/plain"] == "<Picture: Idle share>"
    assert area(picture, COLORS["blue"]) > 100
    picture.savefig(tmp_path / "bars.png", dpi=50)
    assert Image.open(tmp_path / "bars.png").size == (300, 125)


def test_bad_arguments_say_what_was_given():
    with pytest.raises(ValueError, match="was given: list"):
        plot([steady_run("a"), steady_run("b")])
    with pytest.raises(ValueError, match="was given: nothing"):
        plot()
    with pytest.raises(ValueError, match=r"not \(2, 1\)"):
        plot(steady_run("a"), window=(2, 1))
    with pytest.raises(ValueError, match="outside the run"):
        plot(steady_run("a"), window=(70, 80))
    assert isinstance(plot(steady_run("a"), window=(-1, 80)), TimelineFigure)


def test_pictures_need_no_pyplot_and_timelines_no_matplotlib():
    code = """if True:
        import sys
        import asyncbatch
        assert "matplotlib" not in sys.modules
        import asyncbatch.pictures
        asyncbatch.pictures.plot(asyncbatch.Timeline()).png()
        assert not {"matplotlib.pyplot", "anywidget", "ipywidgets"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_strict_nbval_passes_a_figure_saved_with_or_without_its_widget(tmp_path, monkeypatch):
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    nbformat, client = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("nbval")
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": spec})
    source = (
        "import time\nfrom asyncbatch import Timeline\nfrom asyncbatch.pictures import plot\nt = Timeline('sync')\n"
    )
    source += "t = Timeline('sync')\nt.add('host', 'plan', 0, time.time(), time.time() + 1)\nplot(t)"
    notebook.cells = [nbformat.v4.new_code_cell(source)]
    client.NotebookClient(notebook).execute()
    (output,) = notebook.cells[0].outputs
    assert {"image/png", WIDGET} <= set(output.data)
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, tmp_path / "with.ipynb")
    del output.data[WIDGET]
    nbformat.write(notebook, tmp_path / "without.ipynb")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env"]
    ran = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ran.returncode == 0, ran.stdout
    assert "2 passed" in ran.stdout


def test_gaps_are_packed_with_what_the_host_did_in_most_of_them():
    timeline = Timeline("a", "virtual")
    for step, (plan, commit) in enumerate([(1, 0), (3, 1), (0, 2), (0, 0)]):
        start = 10.0 * step
        timeline.add("host", "plan", step, start, start + plan)
        timeline.add("host", "commit", step, start + plan, start + plan + commit)
        timeline.add("host", "wait", step, start + plan + commit, start + 4)
        timeline.add("compute", "step", step, start + 4, start + 10)
        timeline.add_step(step, "decode", 1, 0)
    about, _ = plot(timeline).packed()
    assert about["causes"] == ["plan", "commit"]
    # The first step has no gap before it, and before the last one the host only waited.
    assert about["tracks"][0]["gaps"] == {"steps": [1, 2], "causes": [0, 1], "percent": [75, 50]}
    told = [(2, "copy out late", 1.0), (3, "launched, not begun", 0.5)]
    about, _ = plot(timeline, timeline, causes=lambda _: told).packed()
    assert about["causes"] == ["copy out late", "launched, not begun"]
    assert [track["gaps"]["percent"] for track in about["tracks"]] == [[100, 50]] * 2
    assert plot(Timeline("empty")).packed()[0]["tracks"][0]["gaps"] == {"steps": [], "causes": [], "percent": []}

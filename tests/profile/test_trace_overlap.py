"""`--trace`, the first screen: does an engine overlap, why does its device wait, and what would overlapping bring?"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.make_trace import COPY_OUT, Trace, engine
from support.traces import read

from asyncbatch.profile.traces.read import read_trace

FOLDER = Path(__file__).parent / "traces"
QUESTIONS = ("How idle", "Why", "Overlapping", "To be believed")


def by_hand(waits: bool = True) -> Trace:
    """Four steps of 600 us, 1000 us apart. After each the copy of results ends 30 us late, the host comes back from its
    wait 10 us later, commits for 200 us, plans for 110 us, and launches; the first kernel begins 50 us after that."""
    trace = Trace()
    for at in range(0, 4_000_000, 1_000_000):
        launch = trace.call("cudaGraphLaunch", at, 40_000)
        trace.kernel("a", at + 50_000, 300_000, launch)
        trace.kernel("b", at + 350_000, 300_000, launch)
        copy = trace.call("cudaMemcpyAsync", at + 45_000, 5_000)
        trace.copy("Memcpy DtoH (Device -> Pinned)", at + 660_000, 20_000, copy, COPY_OUT)
        if waits:
            trace.call("cudaEventSynchronize", at + 60_000, 630_000)
        trace.host("python_function", "scheduler.py(9): commit", at + 690_000, 200_000)
        trace.host("python_function", "scheduler.py(7): plan", at + 890_000, 110_000)
    return trace


def test_a_gap_is_the_copy_then_the_host_then_what_was_launched_and_has_not_begun(tmp_path):
    overlap = read(by_hand(), tmp_path).overlap
    assert (overlap.pairs, overlap.ahead, overlap.overlaps) == (3, 0, False)
    assert overlap.launch_after_end_ms == pytest.approx(0.35)
    assert overlap.gap_ms == pytest.approx(0.4)
    assert overlap.parts_ms == pytest.approx(
        {"copy of results": 0.03, "host, until the launch": 0.32, "launched, not begun": 0.05}
    )
    assert overlap.causes == pytest.approx(
        {
            "scheduler.py(9): commit": 200 / 320,
            "scheduler.py(7): plan": 110 / 320,
            "cudaEventSynchronize (waiting)": 10 / 320,
        }
    )
    # The host works from the end of its wait (690) to the next wait (1060): 370 of 1000. The device's 600 are more.
    assert (overlap.period_ms, overlap.device_ms, overlap.host_ms) == pytest.approx((1.0, 0.6, 0.37))
    assert overlap.speedup == pytest.approx(1 / 0.6)


def test_the_first_screen_has_four_answers_in_their_order(tmp_path):
    text = str(read(by_hand(), tmp_path))
    screen = text.split("\n\n")[1]
    places = [screen.index(f"{question:<16}") for question in QUESTIONS]
    assert places == sorted(places)
    words = " ".join(screen.split())
    for part in (
        "Between its steps the device was idle for 40.00 % of the time (3 of 4 steps counted",
        "The launch of step N+1 comes 0.350 ms after the end of step N (median of 3), because of scheduler.py(9): "
        "commit (62 %) and scheduler.py(7): plan (34 %).",
        "A gap is 0.400 ms on average: 0.030 ms until the results are copied, 0.320 ms of the host until it launches, "
        "0.050 ms from the launch to the first kernel.",
        "This engine does not overlap: 0 of 3 steps were launched before the one before them had ended.",
        "Overlapped, its steps could be 1.67x as fast, at most. A step takes 1.00 ms: 0.600 ms on the device, and "
        "0.370 ms of work on the host; overlapped, it takes the longer of the two, the device's.",
        "All that was launched has events of the device: 4 graph launches and 4 copies. The clocks agree",
        "4 steps are few; record 20 or more.",
    ):
        assert part in words
    assert len(screen.splitlines()) < 24
    assert max(map(len, text.splitlines())) <= 110


def test_a_host_that_works_longer_than_the_device_is_the_limit(tmp_path):
    overlap = read(engine(kernels=3, steps=30), tmp_path).overlap
    assert overlap.device_ms == pytest.approx(0.122)
    assert overlap.host_ms > 0.45
    assert overlap.speedup == pytest.approx(overlap.period_ms / overlap.host_ms)


def test_where_no_wait_is_on_record_the_gain_is_not_told(tmp_path):
    trace = by_hand(waits=False)
    report = read(trace, tmp_path)
    assert (report.overlap.host_ms, report.overlap.speedup) == (None, None)
    assert "What overlapping would bring is not told: the launching thread has no wait" in " ".join(str(report).split())


def test_a_copy_whose_call_comes_back_after_it_is_a_wait(tmp_path):
    trace = by_hand(waits=False)
    for event in trace.events:
        if event["name"] == "cudaMemcpyAsync":
            event["dur"] = 645_000  # to 690, when the copy has ended
    assert read(trace, tmp_path).overlap.host_ms == pytest.approx(1 - 0.645)


def test_without_launches_it_says_what_the_host_did_in_the_gaps(tmp_path):
    trace = by_hand()
    trace.events = [event for event in trace.events if event["cat"] not in ("cuda_runtime", "gpu_memcpy")]
    report = read(trace, tmp_path)
    assert report.overlap is None
    words = " ".join(str(report).split())
    assert "Why The trace does not say when steps were launched. In the gaps the host was in scheduler.py(9)" in words
    assert "Overlapping Not told" in words


def test_where_steps_have_holes_they_are_named_too(tmp_path):
    """An engine that launches kernel by kernel, each after the one before has ended."""
    trace = Trace()
    for step in range(5):
        for kernel in range(4):
            at = 1000 * step + 200 * kernel
            launch = trace.call("cudaLaunchKernel", at, 90)
            trace.kernel("abcd"[kernel], at + 100, 30, launch)
        copy = trace.call("cudaMemcpyAsync", 1000 * step + 770, 150)
        trace.copy("Memcpy DtoH (Device -> Pageable)", 1000 * step + 780, 20, copy, COPY_OUT)
    words = " ".join(str(read(trace, tmp_path)).split())
    assert "More time is lost inside steps, where nothing ran for 0.003 ms: cudaLaunchKernel (5" in words


# ---- real engines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine_name", "predicted"), [("asyncbatch", 1.356), ("transformers", 1.597)])
def test_what_overlapping_brings_is_what_it_brought(engine_name, predicted):
    """The synchronous trace says what overlapping would bring, the asynchronous one of the same engine what it
    brought."""
    sync, overlapped = (read_trace(FOLDER / f"{engine_name}-{mode}.json.gz").overlap for mode in ("sync", "async"))
    assert (sync.overlaps, sync.ahead, sync.pairs) == (False, 0, 9)
    assert (overlapped.overlaps, overlapped.ahead) == (True, overlapped.pairs)
    assert overlapped.launch_after_end_ms < -2
    assert sync.launch_after_end_ms > 0.2
    assert sync.speedup == pytest.approx(predicted, abs=1e-3)
    assert sync.period_ms / overlapped.period_ms == pytest.approx(sync.speedup, rel=0.03)
    assert sum(sync.parts_ms.values()) == pytest.approx(sync.period_ms - sync.device_ms)

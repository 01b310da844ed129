"""`tools/bench.py --targets` holds the report of a preset to the speed that this package is to reach on a GPU, and
`--host-work` measures what the loops themselves cost."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from asyncbatch import Timeline
from asyncbatch.profile.diagnosis import Place, make_report
from asyncbatch.profile.measurement import Measurement
from asyncbatch.profile.options import parse_arguments
from asyncbatch.profile.report import ModelFacts, Report
from asyncbatch.profile.settings import settle
from asyncbatch.profile.workload import Sizes
from tools import bench

MODEL = "random:llama-8b"
FACTS = ModelFacts("bfloat16", weight_bytes=15 * 10**9, kv_bytes_per_token=131072)


def reported(preset: str, model: str, new_tokens: int, runs: list[tuple[str, Timeline]], place: Place) -> Report:
    """The report of made-up runs, (engine, timeline), on one workload of a preset at batch 32."""
    settings = settle(parse_arguments([]))
    workload = replace(settings.workloads[0], model=model, batch_size=32, requests=32, new_tokens=new_tokens)
    settings = replace(settings, preset=preset, model=model, workloads=(workload,))
    sizes = Sizes(longest_prompt=16, new_tokens=new_tokens, max_length=16 + new_tokens)
    measurements = [Measurement(workload, sizes, engine, made.label, runs=[(made, [])]) for engine, made in runs]
    return make_report(settings, measurements, place)[0]


def headline(host_s, device_share, peer_factor=1.5, new_tokens=8192) -> Report:
    """The report of a made-up headline: asynchronous, steps `device_share` times as long as their floor."""
    batch, steps, runs = 32, [], []
    for place in range(new_tokens):
        floor_s = (FACTS.weight_bytes + batch * (17 + place) * FACTS.kv_bytes_per_token) / 4e12
        steps.append(floor_s * device_share)
    for engine, factor in (("asyncbatch", 1), ("transformers", peer_factor)):
        timeline, now = Timeline("async", "cuda"), 0.0
        for place, device_s in enumerate(steps):
            timeline.add("host", "plan", place, now, now + host_s)
            timeline.add("compute", "step", place, now, now + device_s * factor)
            timeline.add_step(place, "decode", batch, 0, batch, batch * (17 + place))
            now += device_s * factor
        runs.append((engine, timeline))
    return reported("headline", MODEL, new_tokens, runs, Place("H200", bandwidth=4e12, models={MODEL: FACTS}))


def reached(report: Report) -> dict[str, bool | None]:
    return {one.what.split(", context")[0] + one.reach: one.reached for one in bench.targets(report)}


def test_the_targets_are_reached_or_not_as_the_numbers_say():
    near = headline(host_s=4e-4, device_share=1.1)
    assert set(reached(near).values()) == {True}
    own = near.runs[0]
    assert own.time_over_floor == pytest.approx(1.1)
    assert own.first_context.over_floor == pytest.approx(1.1, abs=1e-3)
    assert own.last_context.floor_ms == pytest.approx(1e3 * (15e9 + 32 * own.last_context.context * 131072) / 4e12)
    assert own.floor.kv_bytes_per_s == pytest.approx(4e12 / 1.1, rel=1e-3)
    text = bench.targets_table(bench.targets(near))
    assert "NOT REACHED" not in text
    assert text.count("  reached") == len(bench.targets(near)) == 8
    far = headline(host_s=6e-4, device_share=1.5, peer_factor=0.9)
    assert [what for what, is_reached in reached(far).items() if is_reached] == ["device active, async99.9 %"]
    assert "NOT REACHED" in bench.targets_table(bench.targets(far))


def test_a_shortened_headline_claims_nothing_about_the_whole():
    rows = bench.targets(headline(host_s=4e-4, device_share=1.0, new_tokens=256))
    short = {one.what: one.reached for one in rows}
    assert short["total, async"] is None
    assert short["total, async, over its floor"] is None
    assert [value for what, value in short.items() if what.startswith("decode step")] == [True, None]
    assert "no claim: another length" in bench.targets_table(rows)


def steps(mode: str, host_ms: float, device_ms: float, idle_ms: float) -> Timeline:
    """Ten decode steps: `idle_ms` between two of them, `host_ms` of host work in each."""
    made, period = Timeline(mode), device_ms + idle_ms
    for step in range(10):
        start = 1e-3 * step * period
        made.add("host", "plan", step, start, start + 1e-3 * host_ms)
        made.add("compute", "step", step, start, start + 1e-3 * device_ms)
        made.add_step(step, "decode", 1, 0)
    return made


def test_the_small_shape_is_held_to_its_target_where_the_law_allows_it():
    """Sync over async time of one made-up pair of runs; host and device times make the law's bound."""

    def small(host_ms, async_idle_ms):
        pair = (steps("sync", host_ms, 4, host_ms), steps("async", host_ms, 4, async_idle_ms))
        runs = [("asyncbatch", made) for made in pair]
        return bench.targets(reported("sweep", "random:llama-0.6b", 64, runs, Place("H200")))[-1]

    assert small(host_ms=2, async_idle_ms=0).reached is True
    assert small(host_ms=2, async_idle_ms=1).reached is False
    assert small(host_ms=1, async_idle_ms=0).reached is None
    assert small(host_ms=1, async_idle_ms=0).reach == "1.3x (law: 1.25x)"


def test_the_command_reads_a_report_and_prints_a_line_for_each_target(tmp_path, capsys):
    report = headline(host_s=4e-4, device_share=1.1, new_tokens=256)
    (tmp_path / "report.json").write_text(json.dumps(report.to_json()))
    assert bench.main(["--targets", str(tmp_path / "report.json")]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "speed to reach"
    assert [line[:44].strip() for line in lines] == [one.what for one in bench.targets(report)]
    assert "  reached" in lines[2]
    assert bench.main(["--targets", str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err == f"bench.py: --targets {tmp_path / 'none.json'}: No such file or directory\n"
    assert "no target" in bench.targets_table([])


def test_host_work_alone_is_measured_at_each_size_and_told_by_phase_at_some(monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROWS_IN_PHASES", (3,))
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    measure = bench.bench_host_work
    monkeypatch.setattr(bench, "bench_host_work", lambda: measure(rows=(1, 3), rounds=1, new_tokens=4))
    assert bench.main(["--host-work"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    told = [line[:46].strip() for line in lines]
    parts = ("total", "plan", "fill", "launch", "commit", "block tables, pruning (mean)")
    small, large = ([f"{mode}, {rows} rows: {part}" for part in parts] for mode, rows in (("sync", 3), ("async", 3)))
    assert told == ["sync, 1 rows: total", "async, 1 rows: total", *small, *large]
    assert all(float(line[46:].split()[0]) > 0 for line in lines)
    assert bench.ROWS == (1, 8, 32, 128, 256)

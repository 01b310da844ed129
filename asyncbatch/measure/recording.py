"""Recordings: what was measured on real GPUs, as small JSON files, and a timed device made from them.

    recording = Recording.load("h200-llama-8b")           # Recording.names() says which ones are shipped
    recording.step_s(batch_size=32, context=32 * 4096, kind="decode")     # seconds on that GPU
    SyncBatcher(recording.stand_in_model(), step_s=recording.step_times(32), max_batch_size=32)

A recording is one session of `python -m asyncbatch.profile --record NAME --out DIR` on one GPU: which engines and
models ran, with which versions, and for each run every step's time on the device, the idle gap before it, its host
work, rows, context and tokens. `steps.py` has the steps of a run, `recording_file.py` the keys of the file and how it
is checked. Of several ranks, a run's own steps are those of rank 0, which is what an emulated device repeats; `ranks`
has the others', and what each rank spent in collectives.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..devices.timed import StepTimes
from ..devices.virtual import HOST_PHASES, Costs
from ..shown.files import whole_file
from ..timeline import Timeline
from . import recording_file
from .steps import Steps, phase_medians_us, steps_from, steps_of, stored_form

BINS = 64  # points of the curve of device time against context: many enough to follow it, few enough for smooth medians


class RankSteps(NamedTuple):
    """A rank of a run that is recorded: its numbers, its timeline, and what each step spent in collectives (None where
    nobody timed them)."""

    rank: int
    replica: int
    tp_rank: int
    timeline: Timeline
    collective_s: Mapping[int, float] | None


class Recording:
    """One recorded session. `data` is the content of its JSON file; `recording_file.KEYS` lists all keys.

    `runs`: a dict for each engine, mode, model and batch size; `steps_of(run)` unpacks its steps. `data["failed"]` says
    why others are missing. `models[name]`: dtype, weight_bytes, kv_bytes_per_token, vocab_size and max_positions.
    """

    def __init__(self, data: dict[str, Any]):
        self.data = data

    def __repr__(self) -> str:
        return f"Recording({self.name!r}, {self.gpu['name']}, {len(self.runs)} runs)"

    @property
    def name(self) -> str:
        return self.data["name"]

    @property
    def gpu(self) -> dict[str, Any]:
        return self.data["gpu"]

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        return self.data["models"]

    @property
    def runs(self) -> list[dict[str, Any]]:
        return self.data["runs"]

    # ---- files -------------------------------------------------------------------------------------------------

    @staticmethod
    def names() -> list[str]:
        """The names of the recordings that come with the package."""
        folder = importlib.resources.files(__package__) / "recordings"
        if not folder.is_dir():
            return []
        return sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recording:
        """A shipped recording by its name, or one from a file. ValueError if there is none, or it fails `check`."""
        if str(name_or_path) in cls.names():
            folder = importlib.resources.files(__package__) / "recordings"
            text = (folder / f"{name_or_path}.json").read_text(encoding="utf-8")
        elif Path(name_or_path).is_file():
            text = Path(name_or_path).read_text(encoding="utf-8", errors="replace")
        else:
            known = ", ".join(cls.names()) or "none is shipped"
            raise ValueError(f"there is no recording {str(name_or_path)!r}; allowed: {known}, or the path of a file")
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{name_or_path} is no recording: not JSON ({error})") from None
        recording = cls(data)
        recording.check()
        return recording

    def save(self, path: str | Path) -> None:
        """Write the JSON file. ValueError if the recording does not pass `check`."""
        self.check()
        with whole_file(path) as beside:
            beside.write_text(recording_file.text_of(self.data), encoding="utf-8")

    @classmethod
    def from_runs(
        cls,
        name: str,
        report: dict[str, Any],
        timelines: Sequence[Timeline],
        ranks: Sequence[Sequence[RankSteps]] = (),
    ) -> Recording:
        """The recording of a session: `report` as `asyncbatch.profile` makes it on CUDA, and the timeline of each of
        its runs, in the same order; ranks: of each run all ranks, where there are several. ValueError if a run has
        steps that were not measured."""
        runs = [_stored_run(row, timeline) for row, timeline in zip(report["runs"], timelines, strict=True)]
        for run, group in zip(runs, ranks, strict=bool(ranks)):
            if group:
                conditions = report["workload"]
                run |= {"tp": conditions["tp"], "replicas": conditions["replicas"]}
                run["ranks"] = [_stored_rank(one) for one in group]
        data = {"schema": recording_file.SCHEMA, "name": name}
        keys = recording_file.KEYS["recording"][2:]
        data |= {key: report[key] for key in keys if key not in ("runs", "failed", "sha256")}
        data |= {"failed": list(report.get("failed", [])), "runs": runs}
        data = json.loads(recording_file.compact(data))  # plain JSON values only, as after loading
        recording = cls({**data, "sha256": recording_file.digest(data)})
        recording.check()
        return recording

    def check(self) -> None:
        """ValueError that names what is missing, or which total does not follow from the steps of its run."""
        recording_file.check(self.data)

    @property
    def of_ranks(self) -> str:
        """What has to be said of a recording of several ranks; empty for one GPU."""
        counts = {(run.get("tp", 1), run.get("replicas", 1)) for run in self.runs} - {(1, 1)}
        if not counts:
            return ""
        tp, replicas = max(counts)
        shared = f"one of {tp} ranks that share a model, its collectives included" if tp > 1 else "one replica"
        return f" ({shared}; {tp * replicas} GPUs)"

    # ---- the timed device --------------------------------------------------------------------------------------

    def main_run(self, model: str | None = None) -> dict[str, Any]:
        """The run of this package's asynchronous batcher with the widest range of contexts, among those with `model`,
        or among all. ValueError if there is none."""
        return max(self._own_runs(model), key=lambda run: np.ptp(steps_of(run).context))

    def _own_runs(self, model: str | None) -> list[dict[str, Any]]:
        runs = [run for run in self.runs if (run["engine"], run["mode"]) == ("asyncbatch", "async")]
        of_model = [run for run in runs if model in (None, run["model"])]
        if not of_model:
            have = ", ".join(dict.fromkeys(run["model"] for run in runs)) or "none"
            raise ValueError(
                f"{self.name} has no asynchronous run of {model or 'this package'}; recorded models: {have}"
            )
        return of_model

    def step_times(self, batch_size: int, model: str | None = None) -> StepTimes:
        """How long a step of `batch_size` rows took on the recorded GPU, for every context up to the largest recorded.

        The curve of device time against context comes from `main_run(model)`, in medians. For another batch size it is
        moved up or down to what that batch size took at its smallest context (linear between recorded batch sizes; a
        batch smaller than all recorded ones takes as long as the smallest). Every prefill step takes the median of the
        recorded ones. The largest context is that of the recorded workload, if its steps came within 5 % of it.
        ValueError for a batch size beyond the largest recorded one, or a model that was not recorded."""
        main = self.main_run(model)
        runs = {run["batch_size"]: run for run in self._own_runs(main["model"])}
        runs[main["batch_size"]] = main
        batches = sorted(runs)
        if not isinstance(batch_size, int) or not 1 <= batch_size <= batches[-1]:
            raise ValueError(
                f"batch size {batch_size!r}: {self.name} was recorded with {main['model']} at batch sizes "
                f"{', '.join(map(str, batches))}; allowed are 1 to {batches[-1]}"
            )
        curves = {batch: _curve(steps_of(run)) for batch, run in runs.items()}
        contexts, seconds = curves[main["batch_size"]]
        smallest = np.interp(batch_size, batches, [curves[batch][0][0] for batch in batches])
        base = np.interp(batch_size, batches, [curves[batch][1][0] for batch in batches])
        at_batch_size = seconds + base - np.interp(smallest, contexts, seconds)
        steps = steps_of(main)
        prefill = steps.device_us[steps.kind == "prefill"]
        if not len(prefill):
            raise ValueError(f"{self.name} has no prefill step of {main['model']}: it cannot time a whole run")
        prefill_s = 1e-6 * float(np.median(prefill))
        # Requests join one after another, so no step had all of them at their longest. A machine on which they join in
        # another order may come a little closer to that, and is not refused for it.
        most = int(steps.context.max())
        longest = min(main["requests"], main["batch_size"]) * (main["prompt_tokens"] + main["new_tokens"] - 1)
        most = max(most, min(longest, int(1.05 * most)))
        return StepTimes(self.name, contexts, np.maximum(at_batch_size, 0.0), prefill_s, most)

    def costs(self, batch_size: int, model: str | None = None) -> Costs:
        """The times of this GPU and its host, for the virtual clock.

        Steps take what `step_times` gives for their context; the host's parts take the medians of the asynchronous
        loop at the nearest recorded batch size. Copies were not timed and take 0 s; `dataclasses.replace` can change
        that. ValueError for a batch size or model that was not recorded; and later, when a batcher launches a step with
        more context than was recorded."""
        times, main = self.step_times(batch_size, model), self.main_run(model)
        runs = [main, *(run for run in self.runs if all(run[k] == main[k] for k in ("engine", "mode", "model")))]
        phases = min(runs, key=lambda run: abs(run["batch_size"] - batch_size))["phase_us"]
        host = {phase: 1e-6 * phases[phase] for phase in HOST_PHASES}
        return Costs(**host, copy_in=0.0, step=lambda work: times(work.kind, work.context), copy_out=0.0)

    def step_s(self, batch_size: int, context: int, kind: str = "decode", model: str | None = None) -> float:
        """Seconds of one step on the recorded GPU, as `step_times` derives them. context: tokens over all its rows.
        ValueError beyond what was recorded."""
        return self.step_times(batch_size, model)(kind, context)

    def stand_in_model(self, model: str | None = None):
        """A tiny Llama of a few MB with random weights, and with the vocabulary and the positions of a recorded model.
        A batcher on the timed device holds it in place of the real one: nothing is computed with it."""
        from ..models.toy import toy_llama

        facts = self.models[self.main_run(model)["model"]]
        return toy_llama(facts["vocab_size"], max_positions=facts["max_positions"], tied=True)


def _stored_run(row: dict[str, Any], timeline: Timeline) -> dict[str, Any]:
    """One of a recording's `runs`: what the report says of it, and its steps. ValueError if a step was not measured."""
    steps = steps_from(timeline)
    keys = (key for key in recording_file.KEYS["run"] if key not in ("totals", "phase_us", "steps"))
    run = {key: row[key] for key in keys}
    run["wall_s_of_each_run"] = [round(wall_s, 6) for wall_s in run["wall_s_of_each_run"]]
    return {**run, "totals": steps.totals(), "phase_us": phase_medians_us(timeline), "steps": stored_form(steps)}


def _stored_rank(one: RankSteps) -> dict[str, Any]:
    """One of a run's `ranks`. collectives_us: of each step, null where nobody timed them. The steps of rank 0 are the
    run's own."""
    steps, timed = steps_from(one.timeline), one.collective_s
    numbers = one.timeline.lane("compute")[1].tolist()
    rank: dict[str, Any] = {"rank": one.rank, "replica": one.replica, "tp_rank": one.tp_rank}
    rank["collectives_us"] = None if timed is None else [round(1e6 * timed.get(number, 0.0)) for number in numbers]
    if one.rank:
        rank |= {"totals": steps.totals(), "steps": stored_form(steps)}
    return rank


def _curve(steps: Steps) -> tuple[np.ndarray, np.ndarray]:
    """(contexts, seconds): the device time of full decode steps against their context, as at most `BINS` medians in
    order of context. float64 arrays of the same length. ValueError without any decode step."""
    decode = steps.kind == "decode"
    if not decode.any():
        raise ValueError("a run without a decode step says nothing about their times")
    full = np.flatnonzero(decode & (steps.rows == steps.rows[decode].max()))
    order = full[np.argsort(steps.context[full], kind="stable")]
    parts = np.array_split(order, min(BINS, len(order)))
    contexts = np.array([np.median(steps.context[part]) for part in parts])
    seconds = 1e-6 * np.array([np.median(steps.device_us[part]) for part in parts])
    contexts, first = np.unique(contexts, return_index=True)  # a context that fills several bins
    return contexts, seconds[first]

"""A session of the profiling script: it serves each workload with every engine and loop, and writes what came out."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from ..measure.bandwidth import copy_bandwidth, matmul_rate
from ..measure.recording import Recording
from ..models.load import load_model
from ..timeline import Timeline, save_trace
from .console import one_line, tell
from .diagnosis import Place, make_report
from .machine import device_name, free_memory, gpu_facts, is_on_cuda, model_facts
from .measurement import Measurement
from .options import Arguments, Settings, settle
from .prompts import PromptFile
from .report import OWN, Failure, Gpu, ModelFacts, Report
from .turns import Job, Key, Turns, failure
from .workload import Workload, make_requests, most_context


class Session:
    """What has been measured so far, workload by workload: `report` works at any time.

    ValueError for options that do not go together, or that need a GPU where there is none."""

    def __init__(self, arguments: Arguments):
        self.recording = None if arguments.emulate is None else Recording.load(arguments.emulate)
        self.settings: Settings = settle(arguments, self.recording)
        self.measurements: list[Measurement] = []
        self.failed: list[Failure] = []
        self.models: dict[str, ModelFacts] = {}
        self.loaded: tuple[str, Any, Any] | None = None  # name, model, tokenizer: workloads in a row share them
        self.device = ""
        self.gpu: Gpu | None = None
        self.bandwidth: float | None = None
        self.matmul: float | None = None

    # ---- measuring -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Measure every workload. In a preset one that fails is noted in `failed`, and the next one follows."""
        for workload in self.settings.workloads:
            try:
                self._measure(workload)
            except (ValueError, RuntimeError, OSError, MemoryError) as error:
                if not self.settings.preset:
                    raise
                self._note_failure(workload, OWN, ",".join(self.settings.modes), error)
            if self.settings.preset and self.settings.out is not None:
                self.write()

    def _measure(self, workload: Workload) -> None:
        job = self._prepare(workload)
        on_cuda = is_on_cuda(job.model)
        for group in self._groups(on_cuda):
            turns = Turns(self.settings, job)
            try:
                try:
                    turns.run(group)
                finally:
                    self.measurements += turns.measurements
                    self.failed += turns.failures
            except Exception as error:
                if not self.settings.preset:
                    raise
                self._note_failure(workload, *group[0], error)  # it could not be closed; go on with the next one
            if on_cuda:
                free_memory()

    def _groups(self, on_cuda: bool) -> list[list[Key]]:
        """Which engines and modes take turns.

        All of them, so that what changes on the machine meanwhile changes for all; but not where each needs much of a
        GPU's memory: then they follow each other."""
        keys = [(engine, mode) for engine in self.settings.engines for mode in self.settings.modes]
        alone = on_cuda and (len(self.settings.engines) > 1 or self.settings.preset)
        return [[key] for key in keys] if alone else [keys]

    def _prepare(self, workload: Workload) -> Job:
        """Load the model and make the requests. ValueError for requests that the model or the recording cannot take."""
        model, tokenizer = self._load(workload)
        if is_on_cuda(model):
            self._look_at_gpu(workload.model, model)
        self.device = device_name(model, self.settings.step_ms, self.recording)
        requests = make_requests(workload, model, tokenizer)
        if workload.prompt_file is not None:
            workload = self._noting_lines(workload, workload.prompt_file, len(requests))
        step_s: Any = None if self.settings.step_ms is None else 1e-3 * self.settings.step_ms
        if self.recording is not None:
            step_s = self.recording.step_times(workload.batch_size, workload.model)
            most = most_context(requests, workload.batch_size)
            if most > step_s.max_context:
                raise ValueError(
                    f"the emulated run would reach a context of {most} tokens over all rows of a step, and "
                    f"{self.recording.name} was recorded up to {step_s.max_context}: take a smaller --new-tokens or "
                    "--batch-size"
                )
        return Job(workload, model, requests, step_s)

    def _noting_lines(self, workload: Workload, file: PromptFile, served: int) -> Workload:
        """Say what was ignored and skipped in the prompts file, and let the report say what was served."""
        for note in file.notes():
            tell(note)
        skipped = tuple(file.skipped) if file.skip else None
        conditions = replace(self.settings.conditions, requests=served, skipped_lines=skipped)
        self.settings = replace(self.settings, conditions=conditions)
        return replace(workload, requests=served)

    def _load(self, workload: Workload) -> tuple[Any, Any]:
        """(model, tokenizer) of a workload."""
        if self.loaded is None or self.loaded[0] != workload.model:
            self.loaded = None
            free_memory()
            if self.recording is not None:
                model, tokenizer = self.recording.stand_in_model(workload.model), None
            else:
                # A timed device is the worker process, even where there is a GPU.
                where = None if self.settings.step_ms is None else "cpu"
                model, tokenizer = load_model(workload.model, seed=workload.seed, device=where)
            self.loaded = workload.model, model, tokenizer
        return self.loaded[1:]

    def _look_at_gpu(self, name: str, model) -> None:
        if self.bandwidth is None:
            place = next(model.parameters())
            self.gpu, self.bandwidth = gpu_facts(), copy_bandwidth(place.device)
            self.matmul = matmul_rate(place.device, place.dtype)
            tell(f"copy bandwidth: {self.bandwidth / 1e12:.3f} TB/s, matrix products: {self.matmul / 1e12:.0f} TFLOP/s")
        self.models[name] = model_facts(model)

    def _note_failure(self, workload: Workload, engine: str, mode: str, error: BaseException) -> None:
        self.failed.append(failure(workload, engine, mode, error))
        where = f"{workload.words} " if len(self.settings.workloads) > 1 else ""
        tell(f"{where}{engine} {mode} failed: {one_line(error)}")

    # ---- what came out ---------------------------------------------------------------------------------------------

    def report(self) -> tuple[Report, list[Timeline]]:
        """The report, and the timeline of each of its runs."""
        place = Place(self.device, self.gpu, self.bandwidth, self.models, self.recording, self.matmul)
        return make_report(self.settings, self.measurements, place, self.failed)

    def write(self, made: tuple[Report, list[Timeline]] | None = None) -> None:
        """Write report.json, the page, and, with --record, the recording. Without a preset also picture and trace; the
        long runs of a preset would make them huge. `made`: what `report` has returned already."""
        folder, (report, timelines) = self.settings.out, made or self.report()
        assert folder is not None
        record, preset = self.settings.record, self.settings.preset
        data = report.to_json()
        (folder / "report.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        if record and timelines:
            Recording.from_runs(record, data, timelines).save(folder / f"{record}.json")
        from .page import write_page  # matplotlib is needed for pictures only

        write_page(folder / "report.html", report, [] if preset else timelines)
        if timelines and not preset:
            from ..pictures import plot

            plot(*timelines, title=f"{report.model} on {report.device}").savefig(folder / "timeline.png")
            save_trace(folder / "trace.json", timelines)

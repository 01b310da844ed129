"""A session of the profiling script: it serves each workload with every engine and loop, and writes what came out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..measure.bandwidth import copy_bandwidth, matmul_rate
from ..measure.collectives import step_collectives_s
from ..measure.recording import Recording
from ..models.load import load_model
from ..ranks.local import LocalModels
from ..request import Request
from ..timeline import Timeline
from .console import one_line, tell, waiting
from .diagnosis import make_report
from .machine import device_name, free_memory, gpu_facts, is_on_cuda, model_facts
from .measurement import Measurement
from .options import Arguments
from .outputs import OutError, Output, write_all, write_json
from .place import Place
from .prompts import PromptFile
from .rank_options import words_of_torchrun
from .report import OWN, Failure, Gpu, ModelFacts, Report
from .settings import Settings, in_memory, settle
from .together import ALONE, Alone, in_words
from .turns import Job, Key, Turns, failure
from .workload import Workload, make_requests, most_context


class Given(NamedTuple):
    """What is in memory already: a model, its tokenizer, and what is served to it, as requests or as prompts (neither:
    what the options say). sha256: tells the requests or prompts from others."""

    model: Any
    tokenizer: Any = None
    requests: list[Request] | None = None
    prompts: PromptFile | None = None
    sha256: str = ""


class Session:
    """What has been measured so far, workload by workload: `report` works at any time. `given`: measure this, which is
    in memory already, and load nothing. ranks: this process among those that measure together; all of them run the same
    session, and rank 0 makes the report.

    ValueError for options that do not go together, or that need a GPU where there is none."""

    def __init__(self, arguments: Arguments, given: Given | None = None, ranks: Alone = ALONE):
        self.ranks = ranks
        self.recording = None if arguments.emulate is None else Recording.load(arguments.emulate)
        self.settings: Settings = settle(arguments, self.recording)
        if ranks.several:
            conditions = replace(self.settings.conditions, tp=ranks.tp, replicas=ranks.replicas)
            self.settings = replace(self.settings, conditions=conditions, processes=words_of_torchrun())
        self.given = given
        if given is not None and given.requests is not None:
            self.settings = in_memory(self.settings, len(given.requests), given.sha256, None)
        elif given is not None and given.prompts is not None:
            self.settings = in_memory(self.settings, len(given.prompts.lines), given.sha256, given.prompts)
        self.turns: Turns | None = None  # those that are under way, or the last ones
        self.interrupted = False
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
                try:
                    self.write()
                except OutError as error:  # the other workloads are still measured; the last attempt is the caller's
                    tell(str(error))

    def _measure(self, workload: Workload) -> None:
        job = self._prepare(workload)
        on_cuda, repeats = is_on_cuda(job.model), None
        for group in self._groups(on_cuda):
            self.turns = turns = Turns(self.settings, job, repeats, self.ranks)
            try:
                try:
                    turns.run(group)
                finally:
                    self.measurements += turns.measurements
                    self.failed += turns.failures
                    repeats = turns.repeats  # every engine and mode runs equally often
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
        given = self.given
        if given is not None:
            model, tokenizer = given.model, given.tokenizer
        else:
            with waiting(f"loading {workload.model}"):
                model, tokenizer = self._load(workload)
        if is_on_cuda(model):
            self._look_at_gpu(workload, model)
        self.device = device_name(model, self.settings.step_ms, self.recording) + in_words(self.ranks)
        with waiting("making the requests"):
            requests = given.requests if given and given.requests else make_requests(workload, model, tokenizer)
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
            if self.loaded is not None:  # its memory may be needed, and looking for it takes long
                self.loaded = None
                free_memory()
            if self.recording is not None:
                model, tokenizer = self.recording.stand_in_model(workload.model), None
            else:
                # A timed device is the worker process, even where there is a GPU.
                where = self.settings.device if self.settings.step_ms is None else "cpu"
                dtype = None if self.settings.dtype is None else getattr(torch, self.settings.dtype)
                model, tokenizer = load_model(
                    workload.model,
                    seed=workload.seed,
                    device=where,
                    dtype=dtype,
                    progress=self.ranks.speaks,
                    tp=self.ranks.tp,
                )
            self.loaded = workload.model, model, tokenizer
        return self.loaded[1:]

    def _look_at_gpu(self, workload: Workload, model) -> None:
        if self.bandwidth is None:
            place = next(model.parameters())
            with waiting("measuring the GPU's copies and matrix products"):
                self.gpu, self.bandwidth = gpu_facts(place.device), copy_bandwidth(place.device)
                self.matmul = matmul_rate(place.device, place.dtype)
            tell(f"copy bandwidth: {self.bandwidth / 1e12:.3f} TB/s, matrix products: {self.matmul / 1e12:.0f} TFLOP/s")
        self.models[workload.model] = facts = model_facts(model, self.ranks.tp)
        if self.ranks.tp > 1:
            collectives_s = step_collectives_s(LocalModels.of(model)[0], workload.batch_size)
            self.models[workload.model] = replace(facts, collectives_s=collectives_s)
            tell(f"the sums of a step between {self.ranks.tp} ranks: {1e3 * collectives_s:.3f} ms")

    def _note_failure(self, workload: Workload, engine: str, mode: str, error: BaseException) -> None:
        self.failed.append(failure(workload, engine, mode, error))
        where = f"{workload.words} " if len(self.settings.workloads) > 1 else ""
        tell(f"{where}{engine} {mode} failed: {one_line(error)}")

    def lost(self, error: Exception) -> dict[str, Any]:
        """A rank is lost, and with it what was under way: what has been measured until now goes into the report. From
        any thread. Returns the finished completions of the run that was under way, for JSON."""
        turns, mode = self.turns, ",".join(self.settings.modes)
        if turns is not None:
            known = [*self.measurements, *turns.measurements, *turns.so_far()]
            self.measurements = list({id(one): one for one in known}.values())
            mode = turns.serving[1] if turns.serving else mode
        workload = turns.job.workload if turns else self.settings.workloads[0]
        self.failed.append(failure(workload, OWN, mode, error))
        finished = [
            {"request": number, "token_ids": list(one.token_ids), "finish_reason": one.finish_reason}
            for number, one in enumerate(self.ranks.finished(error))
            if one is not None
        ]
        return {"error": str(error), "mode": mode, "finished": finished}

    # ---- what came out ---------------------------------------------------------------------------------------------

    def report(self) -> tuple[Report, list[Timeline]]:
        """The report, and the timeline of each of its runs."""
        with waiting("making the report"):
            return self._report()

    def _report(self) -> tuple[Report, list[Timeline]]:
        place = Place(self.device, self.gpu, self.bandwidth, self.models, self.recording, self.matmul)
        return make_report(self.settings, self.measurements, place, self.failed)

    def write(self, made: tuple[Report, list[Timeline]] | None = None) -> None:
        """Write report.json, the page, and, with --record, the recording. Without a preset also picture and trace; the
        long runs of a preset would make them huge. `made`: what `report` has returned already. OutError where a file
        cannot be written; the others are."""
        folder, (report, timelines) = self.settings.out, made or self.report()
        assert folder is not None
        record, preset = self.settings.record, self.settings.preset
        data = report.to_json()
        outputs = [Output("report.json", lambda path: write_json(path, data), measured=True)]
        ranks = [one.ranks_of(one.typical) for one in self.measurements]
        if record and timelines:
            recording = Recording.from_runs(record, data, timelines, [[one.steps for one in group] for group in ranks])
            outputs.append(Output(f"{record}.json", recording.save, measured=True))
        from .page import write_page  # matplotlib is needed for pictures only

        outputs.append(Output("report.html", lambda path: write_page(path, report, [] if preset else timelines, ranks)))
        if timelines and not preset:
            from .rank_pictures import plot_runs, write_traces

            title = f"{report.model} on {report.device}"
            outputs.append(Output("timeline.png", lambda path: plot_runs(timelines, ranks, title=title).savefig(path)))
            outputs.append(Output("trace.json", lambda path: write_traces(path, timelines, ranks)))
        with waiting(f"writing {folder}"):
            write_all(folder, outputs)

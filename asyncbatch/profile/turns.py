"""Batchers that serve one workload in turns: opened, warmed up, run several times, checked, and closed."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..base import BatcherBase
from ..batcher import AsyncBatcher, SyncBatcher
from ..measure.point_recorder import record_points
from ..measure.steps import steps_from
from ..request import Completion, Request
from ..timeline import Timeline
from .console import is_looked_at, one_line, tell, waiting
from .crosscheck import kineto, overhead
from .draws import arrival_times
from .machine import is_on_cuda
from .measurement import Measurement
from .options import FEWEST, MOST, each_of, sizes
from .rank_times import RankTimes, lasting_until_all_are_done
from .report import OWN, Failure, Overhead
from .settings import Settings
from .together import ALONE, Alone, Follower
from .workload import Sizes, Workload, serve_over_time

BATCHERS: dict[str, type[BatcherBase]] = {"sync": SyncBatcher, "async": AsyncBatcher}
WHOLE = 10**9  # steps of a timeline: every figure of the report is of all of them
PROBE_TOKENS = 32  # another engine first generates so many: would all of it take too long?
Key = tuple[str, str]  # engine, mode
Serve = Callable[[], tuple[Timeline, list[Completion]]]


@dataclass(frozen=True)
class Job:
    """A workload that is ready to be served: its requests, and the model that serves them. step_s: of a timed device,
    the seconds of a step, or the times of a recording's steps."""

    workload: Workload
    model: Any
    requests: list[Request]
    step_s: Any = None

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self.requests)


class Turns:
    """The batchers of one group, and what was measured with them.

    `measurements` and `failures` are complete when `run` has ended, and valid also where it ended with an exception. An
    engine that fails leaves the group and is noted in `failures`; a failure of this package itself is raised, but not
    in a preset, whose other results must stay. repeats: runs of each mode; None until the first ones have shown how
    many the budget allows. ranks: all of them do the same, at the same time."""

    def __init__(self, settings: Settings, job: Job, repeats: int | None = None, ranks: Alone = ALONE):
        self.settings, self.job, self.ranks = settings, job, ranks
        self.repeats = settings.repeats or repeats
        self.measurements: list[Measurement] = []
        self.failures: list[Failure] = []
        self._open: dict[Key, tuple[Any, Measurement]] = {}  # those that have not failed
        self._followers: dict[Key, Follower] = {}  # on a rank that does not lead
        self.serving: Key | None = None  # which one runs
        self._where = f"{job.workload.words} " if len(settings.workloads) > 1 else ""

    def run(self, group: Sequence[Key]) -> None:
        """Measure each engine and mode of `group`. Whatever happens, all batchers are closed."""
        with contextlib.ExitStack() as stack:
            for key in group:
                with self._noting_failure(key):
                    self._open[key] = self._opened(stack, key)
            for key in list(self._open):
                with self._noting_failure(key):
                    self._warm_up(key)
            began = time.monotonic()
            self._run_each(0)
            if self.repeats is None:
                self._keep_within_budget(time.monotonic() - began)
            for repeat in range(1, self.repeats or 1):
                self._run_each(repeat)
            for key in list(self._open):
                with self._noting_failure(key):
                    self._check(key)
            # Inside: what was measured stays, even if closing a broken device fails.
            self.measurements += [measurement for _, measurement in self._open.values()]

    def _run_each(self, repeat: int) -> None:
        # Every second time the other way round, so that neither mode always runs on the warmer machine.
        for key in list(self._open)[:: -1 if repeat % 2 else 1]:
            with self._noting_failure(key):
                self._run_once(key, repeat)

    def _keep_within_budget(self, seconds: float) -> None:
        """Settle how often each mode runs, after the first time took so long."""
        if not self._open:
            return
        keys = len(self.settings.engines) * len(self.settings.modes)  # of them some may be in another group
        budget_s = self.settings.budget_s
        self.repeats = self.ranks.share(repeats_within(budget_s, seconds * keys / len(self._open)))
        tell(f"{self._where}{self.repeats} runs of each: the first took {seconds:.1f} s, and --budget-s is {budget_s}")

    # ---- one batcher -----------------------------------------------------------------------------------------------

    def _opened(self, stack: contextlib.ExitStack, key: Key) -> tuple[Any, Measurement]:
        engine, mode = key
        with waiting(f"{self._who(key)}: starting the device"):
            batcher = open_batcher(engine, mode, self.settings, self.job)
            if engine == OWN and not self.ranks.leads:
                self._followers[key] = follower = Follower(batcher, self.ranks.fail)
                stack.push(follower.ended)
            else:
                stack.enter_context(batcher)
        measurement = Measurement(self.job.workload, self.job.sizes, engine, mode, self.settings.slots)
        measurement.prompts = tuple(len(request.token_ids) for request in self.job.requests)
        measurement.limits = tuple(request.max_new_tokens for request in self.job.requests)
        measurement.setting = getattr(batcher, "setting", None)
        if key[0] == OWN:
            measurement.setting = measurement.setting or padding_in_words(batcher)
            measurement.prefill_tokens = sizes(",".join(map(str, batcher.shape.prefill_sizes)))
        return batcher, measurement

    def _warm_up(self, key: Key) -> None:
        batcher, requests = self._open[key][0], self.job.requests
        few = [Request(r.token_ids, min(2, r.max_new_tokens)) for r in requests[: self.job.workload.batch_size]]
        with waiting(f"{self._who(key)}: warm-up"):
            self._together(key, lambda: self._run(batcher, few))
            if key[0] != OWN:
                check_speed(batcher, requests, self.settings.peer_limit_s, self.ranks)

    def _run(self, batcher, requests: list[Request], *options: Any) -> tuple[Timeline, list[Completion]]:
        serve: dict[str, Any] = {"serve": self.ranks.serve} if self.ranks.several else {}
        return run_once(batcher, requests, *options, **serve)

    def _together(self, key: Key, serve: Serve) -> tuple[Timeline, list[Completion], Sequence[RankTimes]]:
        """One run of all ranks. serve: serves, on a rank that leads, and on each rank of another engine. Returns this
        rank's timeline, the completions, and, on rank 0 of several, what each rank did."""
        if not self.ranks.several:
            return *serve(), ()
        return self.ranks.run(serve, self._followers.get(key), self._open[key][0])

    def _run_once(self, key: Key, repeat: int) -> None:
        batcher, measurement = self._open[key]
        workload, requests = self.job.workload, self.job.requests
        arrivals_s = arrival_times(workload.arrivals, len(requests), workload.seed)
        points = not (self.settings.preset or self.settings.record)  # others build on those runs: nothing slows them
        of_all = f" of {self.repeats}" if self.repeats else ""
        count, looked_at = f"run {repeat + 1}{of_all}", is_looked_at()
        if not looked_at:  # else a bar shows that it goes on; no thread may count seconds beside what is measured
            tell(f"{self._who(key)}: {count} ...")
        self.serving = key
        with self._keeping_what_ran():
            timeline, completions, ranks = self._together(
                key, lambda: self._run(batcher, requests, arrivals_s, looked_at, points and self.ranks.speaks)
            )
        lasting_until_all_are_done(timeline, ranks)
        steps_from(timeline)  # a ValueError now is better than a report that cannot be made
        measurement.runs.append((timeline, completions))
        measurement.ranks += [tuple(ranks)] if ranks else []
        tell(f"{self._who(key)}: {count}: {timeline.summary().wall_s:.2f} s")

    def _check(self, key: Key) -> None:
        """What measuring costs, and what another method says, if that was asked for."""
        batcher, measurement = self._open[key]
        if self.settings.overhead and key[0] == OWN:
            tell(f"{self._who(key)}: with and without measuring ...")
            measurement.overhead = self._overhead(batcher, key[1])
            if measurement.overhead is None:
                tell(f"{self._who(key)}: too few steps to tell what measuring costs; take more --new-tokens")
        if self.settings.kineto:
            tell(f"{self._who(key)}: once more under torch.profiler ...")
            all_of = self.ranks.all_of
            ranks: list[RankTimes] = []

            def serve(requests: list[Request]) -> Timeline:
                timeline, _, found = self._together(key, lambda: self._run(batcher, requests))
                ranks[:] = found
                return timeline

            measurement.kineto, in_collectives = kineto(batcher, self.job.requests, serve, all_of)
            each = self.ranks.gather(in_collectives) or []
            if all(each):
                measurement.profiled = tuple(
                    replace(one, collective_s=of_rank, kernels=True) for one, of_rank in zip(ranks, each, strict=False)
                )

    def _overhead(self, batcher, mode: str) -> Overhead | None:
        """What measuring with `batcher` costs, beside a batcher that measures nothing: on CUDA it records no timing
        events either, neither around a command nor inside of a step."""
        with open_batcher(OWN, mode, self.settings, self.job, measured=False) as plain:
            run_once(plain, self.job.requests)  # warm-up
            return overhead(batcher, plain, self.job.requests)

    # ---- what goes wrong -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _noting_failure(self, key: Key) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if key[0] == OWN and not self.settings.preset:
                raise
            self.ranks.failed(" ".join(key), error)
            _, measurement = self._open.pop(key, (None, None))
            if measurement is not None and measurement.runs:
                self.measurements.append(measurement)
            self.failures.append(failure(self.job.workload, *key, error))
            tell(f"{self._where}{' '.join(key)} failed: {one_line(error)}")

    @contextlib.contextmanager
    def _keeping_what_ran(self) -> Iterator[None]:
        """After Ctrl-C, keep what has been measured."""
        try:
            yield
        except KeyboardInterrupt:
            self.measurements += self.so_far()
            raise

    def so_far(self) -> list[Measurement]:
        """What has been measured in a group that is not complete; of an engine that has no whole run yet, the run that
        was ended."""
        if self.serving in self._open:
            batcher, measurement = self._open[self.serving]
            computed = [span for span in batcher.timeline.spans if span.lane == "compute"]
            if not measurement.runs and len(computed) > 1:
                measurement.runs.append((batcher.timeline, []))
                measurement.interrupted = True
        return [other for _, other in self._open.values() if other.runs]

    def _who(self, key: Key) -> str:
        return self._where + (" ".join(key) if len(self.settings.engines) > 1 else key[1])


def repeats_within(budget_s: float, round_s: float) -> int:
    """How often to run each mode within `budget_s`, where running each of them once takes `round_s`: 2 to 9 times."""
    return max(FEWEST, min(MOST, int(budget_s / round_s))) if round_s > 0 else MOST


def failure(workload: Workload, engine: str, mode: str, error: BaseException) -> Failure:
    return Failure(engine, mode, workload.model, workload.batch_size, one_line(error), workload.name)


def open_batcher(engine: str, mode: str, settings: Settings, job: Job, measured: bool = True):
    """A batcher for the job, not warm yet. Raises whatever the engine raises where it cannot serve the model here.

    measured: keep a whole timeline and, on CUDA, time the parts of a step too, which in a preset and for a recording is
    never done. False: measure nothing; all else is the same."""
    limits: dict[str, Any] = {"max_batch_size": job.workload.batch_size, "max_length": job.sizes.max_length}
    if engine != OWN:
        from .peers.batcher import TransformersBatcher  # only here: what it needs may not be installed

        return TransformersBatcher(job.model, mode=mode, **limits)
    if settings.compile:
        limits["compile"] = True
    parts = not (settings.preset or settings.record)
    limits["parts"] = parts and measured
    if settings.prefill_tokens is not None:
        limits["prefill_tokens"] = each_of(settings.prefill_tokens)
    # The events of a step's parts belong to its slot's graphs. With two slots those of one step can still be read while
    # the next one runs; with a single slot they would have to be read before, while the device waits.
    slots = settings.slots if mode == "async" else 2 if parts and is_on_cuda(job.model) else 1
    host_work_s = 1e-3 * settings.host_work_ms
    limits["timeline"] = WHOLE if measured else False
    return BATCHERS[mode](job.model, num_slots=slots, host_work_s=host_work_s, step_s=job.step_s, **limits)


def padding_in_words(batcher) -> str | None:
    """What a report says of a device's `padding`; None where no step is padded."""
    padding = getattr(getattr(batcher, "device", None), "padding", {})
    more = ", ".join(f"{rows} as {real}" for rows, real in sorted(padding.items()) if real != rows)
    return f"rows or prompt tokens of a step, padded to keep bits the same on this machine: {more}" if more else None


def run_once(
    batcher,
    requests: list[Request],
    arrivals_s: Sequence[float] | None = None,
    progress: bool = False,
    points: bool = False,
    serve: Callable[..., list[Completion]] = serve_over_time,
) -> tuple[Timeline, list[Completion]]:
    """One run: its timeline and its completions. `points`: with its latency points. `serve`: in place of
    `serve_over_time`. Raises a completion's error."""
    with record_points(batcher) if points else contextlib.nullcontext():
        completions = serve(batcher, requests, arrivals_s, progress)
    for completion in completions:
        if completion.error is not None:
            raise completion.error
    return batcher.timeline, completions


def check_speed(batcher, requests: list[Request], limit_s: int, ranks: Alone = ALONE) -> None:
    """RuntimeError if the requests would take longer than `limit_s` seconds, judged by their first tokens."""
    if max(request.max_new_tokens for request in requests) < 2 * PROBE_TOKENS:
        return
    short = [replace(r, max_new_tokens=min(PROBE_TOKENS, r.max_new_tokens)) for r in requests]
    whole, probed = (sum(r.max_new_tokens for r in each) for each in (requests, short))
    expected_s = ranks.share(run_once(batcher, short)[0].summary().wall_s * whole / probed)
    if expected_s > limit_s:
        setting, about_s = getattr(batcher, "setting", None) or "its setting", math.ceil(expected_s)
        raise RuntimeError(f"it would take about {about_s} s, and --peer-limit-s is {limit_s} ({setting})")

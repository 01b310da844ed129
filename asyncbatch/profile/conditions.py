"""Where a session ran, on what, and under which options: parts of a `report.Report`."""

from __future__ import annotations

from dataclasses import dataclass

from .record import Record


@dataclass(frozen=True)
class Gpu(Record):
    """The GPU as torch and its driver describe it."""

    name: str | None = None
    memory_gib: float | None = None
    driver: str | None = None
    compute_capability: str | None = None


@dataclass(frozen=True)
class ModelFacts(Record):
    """What the floor of a model is computed from, and which requests it takes. Of a model that ranks share, bytes and
    operations are one rank's part, and collectives_s are the seconds that the sums of a decode step take, alone.
    window: of the layer that sees the fewest tokens; experts: whether a token goes through some of them only."""

    LATER = ("flops_per_token", "collectives_s", "window", "experts")

    dtype: str | None = None
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    vocab_size: int | None = None
    max_positions: int | None = None
    flops_per_token: int | None = None
    collectives_s: float | None = None
    window: int | None = None
    experts: bool | None = None

    def no_floor(self, longest: int) -> str | None:
        """Why a step may read less than all weights and all keys and values, so that what is computed from them is no
        floor; None where it reads them all. longest: tokens of the longest request."""
        if self.experts:
            return "each token goes through some experts only, so that a step may read fewer weights than all"
        if self.window and self.window < longest:
            return f"some layers see the newest {self.window} tokens only, and requests have up to {longest}"
        return None


@dataclass(frozen=True)
class Conditions(Record):
    """The options under which all runs were made, as they were asked for: a distribution is text. None for what a
    preset leaves to each of its workloads. `workload` in JSON. repeats: runs of each mode; budget_s: where their number
    followed from how long the first ones took. tp: how many ranks share the model; replicas: how many times it is
    there; None of a run in one process."""

    LATER = ("skipped_lines", "dtype", "budget_s", "tp", "replicas")

    batch_size: int | None = None
    requests: int | None = None
    prompt_tokens: int | str | None = None
    new_tokens: int | str | None = None
    seed: int | None = None
    repeats: int | None = None
    budget_s: int | None = None
    slots: int | None = None
    host_work_ms: float | None = None
    step_ms: float | None = None
    arrivals: str | None = None
    prompts: str | None = None
    prompts_sha256: str | None = None
    skipped_lines: tuple[int, ...] | None = None
    dtype: str | None = None
    tp: int | None = None
    replicas: int | None = None

    @property
    def over_time(self) -> bool:
        """Whether requests arrive one after another, and are not all there at the beginning."""
        return self.arrivals not in (None, "all")

    @property
    def uneven(self) -> list[str]:
        """Names of the options by which requests differ in length, or are not all there at the beginning."""
        drawn = [name for name in ("prompt_tokens", "new_tokens") if isinstance(getattr(self, name), str)]
        return ["prompts"] * (self.prompts is not None) + drawn + ["arrivals"] * self.over_time

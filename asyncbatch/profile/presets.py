"""The presets of the profiling script: sets of workloads for a GPU, which both engines serve.

A preset has the defaults of options, and under "workloads" what is served. A sweep leaves lengths and the number of
requests to the options; the workloads of "workloads" have their own, and names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .report import OWN

ENGINES = (OWN, "transformers")


class Served(NamedTuple):
    """One workload of a preset. None for what the options say; and as many requests as the batch holds.

    name: what it is called in a report, if the preset has names. short: the word for it in --only."""

    model: str
    batch_size: int
    requests: int | None = None
    prompt_tokens: int | str | None = None
    new_tokens: int | str | None = None
    name: str | None = None
    short: str | None = None


_BOTH: dict[str, Any] = dict(engine=[*ENGINES], prompt_tokens=16, repeats=1, compile=True)
PRESETS: dict[str, dict[str, Any]] = {
    "headline": dict(_BOTH, workloads=[("random:llama-8b", 32)], new_tokens=8192),
    "sweep": dict(
        _BOTH,
        workloads=[(f"random:llama-{size}", batch) for size in ("0.6b", "1b", "8b") for batch in (1, 8, 32, 128)],
        new_tokens=512,
    ),
    "workloads": dict(
        _BOTH,
        workloads=[
            Served("random:llama-8b", 32, 32, 16, 8192, "headline", "headline"),
            Served("random:llama-8b", 32, 64, 2048, 128, "long prompts", "long"),
            Served("random:llama-8b", 32, 128, "lognormal:512:0.8", "lognormal:256:0.6", "mixed", "mixed"),
            Served("random:llama-0.6b", 256, 256, 64, 256, "0.6B, 256 rows", "small"),
        ],
    ),
}
# What the command line cannot say of workloads that have names, since the names tell it.
OF_NAMED = ("model", "batch_size", "requests", "prompt_tokens", "new_tokens", "prompts", "arrivals")
SHORT = ("headline", "long", "mixed", "small")


def served_by(preset: dict[str, Any], only: Sequence[str] | None = None) -> list[Served]:
    """The workloads of a preset; with `only` those of them that have these short names."""
    return [one for one in _all(preset) if only is None or one.short in only]


def has_names(preset: dict[str, Any]) -> bool:
    return any(one.name for one in _all(preset))


def _all(preset: dict[str, Any]) -> Iterator[Served]:
    return (Served(*one) for one in preset["workloads"])

"""Where the measurements of a session were made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..measure.recording import Recording
from .conditions import Gpu, ModelFacts


@dataclass(frozen=True)
class Place:
    """Where the measurements were made: device, GPU, its copy bandwidth, and the models that were on it, by name.
    recording: the one whose device was emulated. matmul: operations a second of the GPU's matrix products."""

    device: str
    gpu: Gpu | None = None
    bandwidth: float | None = None
    models: Mapping[str, ModelFacts] = field(default_factory=dict)
    recording: Recording | None = None
    matmul: float | None = None

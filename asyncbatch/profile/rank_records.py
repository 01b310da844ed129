"""What a report says of the ranks of a run: parts of a `report.Run`."""

from __future__ import annotations

from dataclasses import dataclass

from .record import Record

IN_COLLECTIVES, BY_LENGTH, BY_KERNELS = "collectives", "step lengths", "kernels of collectives"


@dataclass(frozen=True)
class RankRun(Record):
    """One rank in a run. requests: how many its replica answered; None of a rank that is no leader. wall_s: from its
    first span to the end of its last step.

    collectives_s: seconds of its decode steps in which it was in a collective, waiting_s: those of them in which it
    waited for another rank; in_collectives and waiting: the same as shares of its decode steps' time on the device.
    None where a model is not shared, or where that is not known. clock_error_s: how far its times may be off those of
    rank 0; None where both read the same clock."""

    rank: int = 0
    replica: int = 0
    tp_rank: int = 0
    machine: str | None = None
    requests: int | None = None
    wall_s: float | None = None
    tokens: int | None = None
    steps: int | None = None
    device_active: float | None = None
    idle: float | None = None
    host_ms_per_step: float | None = None
    device_ms_per_step: float | None = None
    collectives_s: float | None = None
    waiting_s: float | None = None
    in_collectives: float | None = None
    waiting: float | None = None
    clock_error_s: float | None = None


@dataclass(frozen=True)
class Slowest(Record):
    """The rank of a replica that the others wait for, in the decode steps.

    share: of the others' time on the device, what is waiting for it (the mean over them). waiting_ms_per_step,
    transfer_ms_per_step: of a step, the mean: the others' waiting, and what a step's collectives take without any
    waiting, None where that is not known. seen_in: where the waiting was seen, IN_COLLECTIVES (the loop timed each),
    BY_KERNELS (in one more run, under torch.profiler) or BY_LENGTH (a step ends on all ranks at the same time, so
    the shortest began last; what a rank waits for because another one computes longer is not seen so)."""

    replica: int = 0
    rank: int = 0
    share: float | None = None
    waiting_ms_per_step: float | None = None
    transfer_ms_per_step: float | None = None
    seen_in: str | None = None

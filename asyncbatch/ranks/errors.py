"""What is raised where a rank cannot go on."""

from __future__ import annotations

from ..streams import DeviceError


class RankError(DeviceError):
    """A rank cannot go on, and so none can. The message names the rank and the cause, and is the same on all ranks.

    rank: the one that is to blame; None where it is none of them (the store that connects them is gone)."""

    def __init__(self, message: str, rank: int | None = None):
        super().__init__(message)
        self.rank = rank

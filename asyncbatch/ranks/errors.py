"""What goes wrong between ranks."""

from ..streams import DeviceError


class RankError(DeviceError):
    """The ranks cannot go on together. The message names the rank and the cause."""

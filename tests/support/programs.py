"""Programs for a device, for the tests of streams: a worker process imports them by name."""

from __future__ import annotations

import os
import time

import torch


class Log:
    """Writes down in which order commands began and ended: `log` is shared, `count` entries of (slot, 0 or 1).

    "sleep:0.1" takes that long; "until:7" waits until `value` is 7, a minute at most; "fail" raises; "die" ends the
    process; "put:7" writes 7 to `value`; "get" copies `value` to `seen`.
    """

    def __init__(self, model, *, count, log, value, seen):
        self.count, self.log, self.value, self.seen = count, log, value, seen

    def write(self, slot: int, what: int) -> None:
        entry = int(self.count)
        self.log[entry] = torch.tensor([slot, what])
        self.count += 1

    def run(self, command: str, slot: int) -> None:
        name, _, argument = command.partition(":")
        self.write(slot, 0)
        if name == "sleep":
            time.sleep(float(argument))
        elif name == "until":
            end = time.monotonic() + 60
            while int(self.value) != int(argument):
                assert time.monotonic() < end, f"nobody wrote {argument}"
                time.sleep(1e-3)
        elif name == "fail":
            raise ValueError(f"planted in slot {slot}")
        elif name == "die":
            os._exit(3)
        elif name == "put":
            self.value.fill_(int(argument))
        elif name == "get":
            self.seen.copy_(self.value)
        self.write(slot, 1)

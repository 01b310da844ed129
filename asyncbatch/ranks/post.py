"""Things sent from one process to another through the store of torch.distributed, in its queues."""

from __future__ import annotations

import pickle
import struct
import threading
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError

PIECE = 1 << 20  # the store's server refuses values of 8 MiB and closes the connection
HEAD = struct.Struct("<i?")  # sender, and whether this is the last piece


class Letters:
    """One queue: any number of senders, one reader. A connection of its own: a reader blocks it."""

    def __init__(self, store: Any, name: str):
        if not store.has_extended_api():
            raise ValueError(f"a {type(store).__name__} has no queues: give a TCPStore, which torchrun makes")
        self._store, self._name = store.clone(), name
        self._store.set_timeout(timedelta(days=1))
        self._sending = threading.Lock()  # the pieces of one letter are not mixed with those of another
        self._pieces: dict[int, list[bytes]] = {}

    def send(self, sender: int, packed: bytes) -> None:
        """Of one sender the letters arrive in the order in which they were sent."""
        with self._sending:
            for start in range(0, max(len(packed), 1), PIECE):
                last = start + PIECE >= len(packed)
                self._store.queue_push(self._name, HEAD.pack(sender, last) + packed[start : start + PIECE])

    def receive(self) -> tuple[int, Any]:
        """(sender, thing) of the next letter, whenever it comes. (To a reader that gives up now and then, the store
        prints a warning each time.)"""
        while True:
            try:
                piece = self._store.queue_pop(self._name)
            except DistStoreError:  # nothing came for a day
                continue
            sender, last = HEAD.unpack_from(piece)
            self._pieces.setdefault(sender, []).append(piece[HEAD.size :])
            if last:
                return sender, pickle.loads(b"".join(self._pieces.pop(sender)))

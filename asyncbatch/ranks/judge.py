"""Who is to blame: from what the ranks say of themselves, once a second, to a verdict that names one rank and a cause.

No clock, no store, no process is asked here: `watch.py` brings what was read, and how much time counts since it was
read last. After a pause of this process (it was stopped, or the machine was busy) little of that time counts, so that
a rank is not called silent by one who did not listen.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from .neighbour import ENDED, STOPPED, Neighbour, this_place

JOINING_S = 300.0  # so long a rank may take to its first word: it still loads its libraries


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    count: grows with every word. group: the ranks of one group wait for each other at every step. phase: what its main
    thread is at, such as "serving"; "" while nothing is expected of it. allowance_s: so long the phase may go without
    progress. progress: a number that the main thread changes as it goes on. doing: what it does at this moment;
    a text that begins with "wait" means that it waits for others, or for the device. since_s: since when. left: it has
    ended as it should. ending: it cannot go on, and waits for the cause. place, pid, begun: its process
    (`neighbour.py`)."""

    count: int
    group: int = 0
    phase: str = ""
    allowance_s: float = 30.0
    progress: int = 0
    doing: str = ""
    since_s: float = 0.0
    left: bool = False
    ending: bool = False
    place: str = ""
    pid: int = 0
    begun: str = ""

    def packed(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def unpacked(cls, text: bytes) -> Beat:
        return cls(**json.loads(text))

    def words(self) -> str:
        if self.left:
            return "has left"
        if not self.phase:
            return "idle"
        doing = f": {self.doing}" if self.doing else ""
        return f"{self.phase} {self.progress}{doing} since {self.since_s:.0f} s"

    def neighbour(self) -> Neighbour | None:
        """Its process, if it is on this machine."""
        return Neighbour(self.pid, self.begun) if self.place and self.place == this_place() else None


@dataclass(frozen=True)
class Verdict:
    """text: the message, which names rank and cause. rank: who is to blame. gone: it cannot speak for itself."""

    text: str
    rank: int | None = None
    gone: bool = False

    def packed(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def unpacked(cls, text: bytes) -> Verdict:
        return cls(**json.loads(text))


class Judge:
    """names: what each rank is called in messages ("host-a, pid 4711"). timeout_s: a rank that says nothing for so long
    is gone."""

    def __init__(self, names: Sequence[str], timeout_s: float):
        self.names, self.timeout_s = names, timeout_s
        self.beats: dict[int, Beat] = {}  # the newest word of each rank
        self.silent_s = dict.fromkeys(range(len(names)), 0.0)
        self._still: dict[int, tuple[object, float]] = {}  # of each group: where its ranks stood, and for how long

    def who(self, rank: int) -> str:
        return f"rank {rank} ({self.names[rank]})"

    def look(self, beats: Mapping[int, Beat], passed_s: float) -> Verdict | None:
        """beats: what was read just now, of every rank that has said anything. passed_s: the time since the last look,
        as far as it counts."""
        for rank in range(len(self.names)):
            beat, before = beats.get(rank), self.beats.get(rank)
            heard = beat is not None and (before is None or beat.count != before.count)
            self.silent_s[rank] = 0.0 if heard else self.silent_s[rank] + passed_s
        self.beats.update(beats)
        return self._silent() or self._hanging(passed_s)

    def ended(self, left: Collection[int] = ()) -> Verdict | None:
        """A rank of this machine whose process has ended, though it did not say that it leaves. left: those who said
        so on another way."""
        for rank, beat in sorted(self.beats.items()):
            neighbour = beat.neighbour()
            if not beat.left and rank not in left and neighbour is not None and neighbour.state() == ENDED:
                why = "its process has ended without a word: it was killed, or it crashed"
                return Verdict(f"{self.who(rank)} is gone: {why}", rank, gone=True)
        return None

    def speaks(self, rank: int, patience_s: float) -> bool:
        """Whether a rank seems to be alive."""
        beat = self.beats.get(rank)
        return beat is not None and not beat.left and self.silent_s[rank] <= patience_s

    def _silent(self) -> Verdict | None:
        for rank, silent_s in self.silent_s.items():
            beat = self.beats.get(rank)
            limit = self.timeout_s if beat else max(self.timeout_s, JOINING_S)
            if silent_s < limit or (beat and beat.left):
                continue
            if beat is None:
                why = "it never came"
            elif (neighbour := beat.neighbour()) and neighbour.state() == STOPPED:
                why = f"its process is stopped (SIGSTOP); before, it was {beat.words()}"
            else:
                why = f"killed, stopped, or its machine lost; before, it was {beat.words()}"
            return Verdict(f"{self.who(rank)} is gone: no sign of life for {limit:g} s ({why})", rank, gone=True)
        return None

    def _hanging(self, passed_s: float) -> Verdict | None:
        for group in sorted({beat.group for beat in self.beats.values()}):
            ranks = {rank: beat for rank, beat in sorted(self.beats.items()) if beat.group == group and not beat.left}
            standing = [(rank, beat.phase, beat.progress) for rank, beat in ranks.items()]
            before, still_s = self._still.get(group, (None, 0.0))
            busy = any(beat.phase for beat in ranks.values())
            still_s = still_s + passed_s if busy and standing == before else 0.0
            self._still[group] = standing, still_s
            # (Where one has just fallen silent it may be gone, and one that ends will say why: nobody hangs then.)
            settled = all(self.silent_s[rank] < self.timeout_s / 4 and not beat.ending for rank, beat in ranks.items())
            if busy and settled:
                # The one that is furthest behind; among equals the one that does not wait for the others.
                rank = min(ranks, key=lambda one: (ranks[one].progress, ranks[one].doing.startswith("wait"), one))
                if still_s >= ranks[rank].allowance_s:
                    return Verdict(self._hangs(rank, group), rank)
        return None

    def _hangs(self, rank: int, group: int) -> str:
        beat = self.beats[rank]
        others = [
            f"rank {other}: {its.words()}"
            for other, its in sorted(self.beats.items())
            if its.group == group and other != rank
        ]
        return f"{self.who(rank)} hangs: no progress for {beat.allowance_s:g} s ({'; '.join([beat.words(), *others])})"

"""A large trace made of a real one, repeated: its text as it is, with later times and other correlation ids each time.

    python tests/support/repeat_trace.py TRACE.json.gz LARGE.json MEGABYTES

It is what docs/traces.md measures the speed of reading with.
"""

from __future__ import annotations

import gzip
import re
import sys
from pathlib import Path

TIME = re.compile(r'("ts": )(\d+)')
ID = re.compile(r'("(?:correlation|id)": )(\d+)')
GAP = 1000  # microseconds from the end of one repetition to the beginning of the next


def repeat(trace: Path, large: Path, megabytes: float) -> int:
    """Write a file of at least so many megabytes; how often the trace is in it."""
    text = gzip.decompress(trace.read_bytes()).decode()
    begin = text.index("[", text.index('"traceEvents"')) + 1
    end = text.rindex("]")
    head, events, tail = text[:begin], text[begin:end].rstrip(), text[end:]
    times = [int(time[2]) for time in TIME.finditer(events)]
    period = max(times) - min(times) + GAP
    ids = max(int(one[2]) for one in ID.finditer(events)) + 1
    count = 0
    with open(large, "w", encoding="utf-8") as file:
        file.write(head)
        while file.tell() < megabytes * 1e6:
            later, other = count * period, count * ids
            shifted = TIME.sub(lambda time, later=later: f"{time[1]}{int(time[2]) + later}", events)
            shifted = ID.sub(lambda one, other=other: f"{one[1]}{int(one[2]) + other if int(one[2]) else 0}", shifted)
            file.write((",\n" if count else "") + shifted)
            count += 1
        file.write(tail)
    return count


if __name__ == "__main__":
    print(repeat(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])), "times")

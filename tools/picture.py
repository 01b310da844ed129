"""Draw docs/timeline.png, the picture of the README: both loops on a recorded GPU (see asyncbatch/tour/replay.py).

python tools/picture.py            write it, and print what it shows
python tools/picture.py FILE.png   write it there
"""

from __future__ import annotations

import sys
from pathlib import Path

from asyncbatch.measure.recording import Recording
from asyncbatch.pictures import plot
from asyncbatch.tour.replay import RECORDING, WORDS, replay

PICTURE = Path(__file__).parent.parent / "docs" / "timeline.png"
NEW_TOKENS = 64


def main() -> int:
    target = Path(sys.argv[1]) if sys.argv[1:] else PICTURE
    timelines = replay(NEW_TOKENS)
    for timeline in timelines:
        print(f"{timeline.label}: idle {1 - timeline.summary().device_active:.1%}")
    plot(*timelines, title=f"{Recording.load(RECORDING).gpu['name']}, {WORDS}, as recorded").savefig(target)
    print(target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

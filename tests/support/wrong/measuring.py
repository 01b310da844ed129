"""Notebook 06: wrong answers to its exercises, as learners write them. Each has a fault of its own."""

from __future__ import annotations

import numpy as np


def never_waits(work, synchronize, now):
    start = now()
    work()
    return now() - start, now() - start


def looks_only_at_the_end(work, synchronize, now):
    synchronize()
    start = now()
    work()
    synchronize()
    return now() - start, now() - start


def forgets_earlier_work(work, synchronize, now):
    start = now()
    work()
    back = now() - start
    synchronize()
    return back, now() - start


def clock_before_the_wait(work, synchronize, now):
    start = now()
    synchronize()
    work()
    back = now() - start
    synchronize()
    return back, now() - start


def step_alone(work, synchronize, now):
    synchronize()
    start = now()
    work()
    back = now()
    synchronize()
    return back - start, now() - back


def clock_after_the_launch(work, synchronize, now):
    synchronize()
    work()
    start = now()
    back = now() - start
    synchronize()
    return back, now() - start


def one_number(work, synchronize, now):
    synchronize()
    start = now()
    work()
    synchronize()
    return now() - start


def as_they_are(starts, ends):
    return starts, ends


def first_to_last(starts, ends):
    return np.array([starts.min()]), np.array([ends.max()])


def _joined(starts, ends, touching=True, latest=max, in_order=True):
    pairs = list(zip(starts.tolist(), ends.tolist(), strict=True))
    stretches = []
    for start, end in sorted(pairs) if in_order else pairs:
        if stretches and (start < stretches[-1][1] or (touching and start == stretches[-1][1])):
            stretches[-1][1] = latest(stretches[-1][1], end)
        else:
            stretches.append([start, end])
    return np.array([pair[0] for pair in stretches]), np.array([pair[1] for pair in stretches])


def forgets_nested(starts, ends):
    return _joined(starts, ends, latest=lambda old, new: new)


def forgets_touching(starts, ends):
    return _joined(starts, ends, touching=False)


def forgets_to_sort(starts, ends):
    return _joined(starts, ends, in_order=False)


def busy_time_only(starts, ends):
    begins, stops = _joined(starts, ends)
    return (stops - begins).sum()


def without_padding(self, owners):
    return [self.table(owner) for owner in owners]


def sorted_by_owner(self, owners):
    return self._tables[[self._row[owner] for owner in sorted(owners)]]


def every_row(self, owners):
    return self._tables[[self._row[owner] for owner in sorted(self._row, key=[*owners, *self._row].index)]]


def block_by_block(self, owners):
    rows = []
    for owner in owners:
        row = [0] * self._tables.shape[1]
        for place, block in enumerate(self.table(owner)):
            row[place] = block
        rows.append(row)
    return np.array(rows, np.int32)


def padded_in_front(self, owners):
    return np.flip(self._tables[[self._row[owner] for owner in owners]], 1)


WRONG = {
    "time_work": (
        never_waits, looks_only_at_the_end, forgets_earlier_work, clock_before_the_wait, step_alone,
        clock_after_the_launch, one_number,
    ),
    "union": (as_they_are, first_to_last, forgets_nested, forgets_touching, forgets_to_sort, busy_time_only),
    "tables": (without_padding, sorted_by_owner, every_row, block_by_block, padded_in_front),
}  # fmt: skip

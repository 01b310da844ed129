"""Numbers that are drawn for each request: how many tokens it has (`Lengths`), and when it arrives (`Arrivals`).

A draw depends on the seed alone, and each kind of draw has random numbers of its own: asking for other arrivals does
not change the prompts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST = 10**9  # tokens of a length that may be asked for
PROMPT_LENGTHS, NEW_LENGTHS, ARRIVALS = 1, 2, 3  # beside the seed, what the random numbers of each draw depend on


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens, one for each request: whole numbers from `lowest` to `highest`, all equally likely. Where
    `highest` is None they are log-normal instead, with this `median` and `sigma`, rounded, at least `lowest`."""

    lowest: int
    highest: int | None
    median: float = 0.0
    sigma: float = 0.0

    @classmethod
    def parse(cls, argument: int | str) -> Lengths:
        """From a number, "16-128" or "lognormal:64:0.5" (median, sigma). ValueError for anything else."""
        text = str(argument)
        if match := re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", text):
            lowest, highest = int(match[1]), int(match[2] or match[1])
            if 1 <= lowest <= highest <= MOST:
                return cls(lowest, highest)
        elif (numbers := _numbers_after("lognormal", text, 2)) and 1 <= numbers[0] <= MOST and 0 <= numbers[1] <= 5:
            return cls(1, None, *numbers)
        raise ValueError(
            f"{text!r} was given; allowed are a whole number from 1 (64), two of them (16-128: uniform between them), "
            "or lognormal:MEDIAN:SIGMA (lognormal:64:0.5), MEDIAN from 1 and SIGMA from 0 to 5"
        )

    def __str__(self) -> str:
        if self.highest is None:
            return f"lognormal:{self.median:.15g}:{self.sigma:.15g}"
        return f"{self.lowest}" if self.fixed else f"{self.lowest}-{self.highest}"

    @property
    def fixed(self) -> bool:
        return self.lowest == self.highest

    @property
    def needed(self) -> int:
        """The tokens that a model must allow. A log-normal has no largest value: its draws are cut to fit the model."""
        return self.lowest if self.highest is None else self.highest

    def draw(self, generator: np.random.Generator, count: int, most: int | Sequence[int] = MOST) -> list[int]:
        """`count` numbers. A log-normal is cut at `most`: one limit for all of them, or one for each, from `needed`."""
        if self.highest is not None:
            return generator.integers(self.lowest, self.highest + 1, count).tolist()
        values = self.median * np.exp(self.sigma * generator.standard_normal(count))
        return np.clip(np.rint(values), self.lowest, most).astype(np.int64).tolist()


@dataclass(frozen=True)
class Arrivals:
    """When requests arrive: all at the beginning (`rate` None), or as a Poisson process of `rate` requests a second."""

    rate: float | None = None

    @classmethod
    def parse(cls, text: str) -> Arrivals:
        """From "all" or "poisson:RATE". ValueError for anything else."""
        if text == "all":
            return cls()
        if (numbers := _numbers_after("poisson", text, 1)) and 1e-4 <= numbers[0] <= 1e6:
            return cls(numbers[0])
        raise ValueError(
            f"{text!r} was given; allowed are all, or poisson:RATE (poisson:50), RATE requests per second from 0.0001 "
            "to 1000000"
        )

    def __str__(self) -> str:
        return "all" if self.rate is None else f"poisson:{self.rate:.15g}"

    def times(self, count: int, seed: int) -> list[float]:
        """Seconds from the beginning, in order, the first one 0. A larger `count` only adds times at the end."""
        if self.rate is None:
            return [0.0] * count
        gaps = np.random.default_rng([seed, ARRIVALS]).exponential(1 / self.rate, max(count - 1, 0))
        return [0.0, *np.cumsum(gaps).tolist()][:count]


def arrival_times(text: str, count: int, seed: int) -> list[float]:
    """`Arrivals.parse(text).times(count, seed)`."""
    return Arrivals.parse(text).times(count, seed)


def _numbers_after(name: str, text: str, count: int) -> list[float] | None:
    """The `count` numbers of "name:1:0.5", or None if `text` is not of this form."""
    first, *rest = text.split(":")
    try:
        numbers = [float(part) for part in rest]
    except ValueError:
        return None
    return numbers if first == name and len(numbers) == count else None

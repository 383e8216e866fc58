"""What interleaved measurements say: medians, spreads, and ratios that are no larger than their doubt."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


def median_and_deciles(values: list[float]) -> tuple[float, tuple[float, float]]:
    """The second is (10 %, 90 %), of a single value that value."""
    if len(values) < 2:
        return values[0], (values[0], values[0])
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), (tenths[0], tenths[-1])


@dataclass(frozen=True)
class Ratio:
    """How many times faster one way is than another, from steps that were measured in turns."""

    value: float
    low: float  # 10 % of the pairs of steps are below
    high: float  # and 10 % above

    @classmethod
    def of(cls, theirs: list[float], ours: list[float]) -> Ratio:
        """Of the n-th step of one to the n-th of the other, round by round: what slows the machine slows both."""
        value, (low, high) = median_and_deciles([a / b for a, b in zip(theirs, ours, strict=True)])
        return cls(value, low, high)

    @property
    def is_unclear(self) -> bool:
        """The spread holds a gain and a loss."""
        return self.low < 1 < self.high

    def __str__(self) -> str:
        text = f"{self.value:.2f}x"
        return f"{text} unclear ({self.low:.2f}–{self.high:.2f})" if self.is_unclear else text

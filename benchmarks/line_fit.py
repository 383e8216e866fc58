"""Straight lines through measurements, with what is known about their slopes."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """y = at_zero + slope * x, by least squares."""

    slope: float
    at_zero: float
    slope_error: float  # standard error; NaN where two points leave nothing to judge it by

    @classmethod
    def through(cls, xs: list[float], ys: list[float]) -> Line:
        """
        Raises:
            ValueError: fewer than two different x.
        """
        n, mean_x, mean_y = len(xs), sum(xs) / len(xs), sum(ys) / len(ys)
        spread = sum((x - mean_x) ** 2 for x in xs)
        if not spread:
            raise ValueError(f"a line needs two different x, got {xs}")
        slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
        at_zero = mean_y - slope * mean_x
        if n < 3:
            return cls(slope, at_zero, math.nan)
        residuals = sum((y - at_zero - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
        return cls(slope, at_zero, math.sqrt(residuals / (n - 2) / spread))

    def at(self, x: float) -> float:
        return self.at_zero + self.slope * x

    def crosses(self, other: Line) -> float | None:
        """The x where both are equal; None where they are parallel."""
        if self.slope == other.slope:
            return None
        return (other.at_zero - self.at_zero) / (self.slope - other.slope)

    def times_flatter(self, other: Line) -> tuple[float, float]:
        """other's slope over this one's, and its standard error (to first order)."""
        ratio = other.slope / self.slope
        return ratio, abs(ratio) * math.hypot(self.slope_error / self.slope, other.slope_error / other.slope)

"""What the measures have in common when they are summed up: a mean with its error, and a table."""

from __future__ import annotations

import math


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """And the standard error of the mean, nan for a single value."""
    mean = sum(values) / len(values) if values else math.nan
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its head."""
    head, *body = rows
    align = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, align, *body])

"""The five steps in Python floats (float64), one head, one position and one component at a time: no tensor arithmetic.

Written from the paper (arXiv 2312.04985, algorithm 1) and from the operator's interface, not from the reference, which
is tested against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Row = list[float]


@dataclass
class Head:
    """One batch row and KV head: queries [G][d], keys and values [S][d], valid [S]."""

    queries: list[Row]
    keys: list[Row]
    values: list[Row]
    valid: list[bool]
    scale: float
    softcap: float | None = None

    @property
    def valid_positions(self) -> list[int]:
        return [s for s, valid in enumerate(self.valid) if valid]

    def soften(self, x: float) -> float:
        return x if self.softcap is None else self.softcap * math.tanh(x / self.softcap)

    def components(self, r: int) -> list[int]:
        """Step 1."""
        magnitude = [sum(abs(query[i]) for query in self.queries) for i in range(len(self.queries[0]))]
        return sorted(range(len(magnitude)), key=lambda i: (-magnitude[i], i))[:r]

    def scores(self, r: int) -> list[dict[int, float]]:
        """Step 2: for each query of the group, the approximate softmax over the valid positions."""
        c = self.components(r)
        result = []
        for query in self.queries:
            kept, all_of_it = sum(abs(query[i]) for i in c), sum(abs(x) for x in query)
            tau = math.sqrt(kept / all_of_it) if all_of_it > 0 else 1.0
            tau = tau if tau > 0 else 1.0
            logits = {
                s: self.soften(sum(query[i] * self.keys[s][i] for i in c) * self.scale / tau)
                for s in self.valid_positions
            }
            result.append(softmax(logits))
        return result

    def budget(self, k: int, k_divisor: int | None) -> int:
        n = len(self.valid_positions)
        return min(n, max(k, n // k_divisor if k_divisor else 0))

    def window(self, k: int, k_divisor: int | None, local: int | None) -> list[int]:
        """The newest valid positions, forced in."""
        budget = self.budget(k, k_divisor)
        size = budget // 4 if local is None else min(local, budget)
        return self.valid_positions[len(self.valid_positions) - size :]

    def positions(self, r: int, k: int, k_divisor: int | None, local: int | None) -> list[int]:
        """Step 3, ascending."""
        scores, window = self.scores(r), self.window(k, k_divisor, local)
        others = [s for s in self.valid_positions if s not in set(window)]
        others.sort(key=lambda s: (-sum(row[s] for row in scores), s))
        return sorted(window + others[: self.budget(k, k_divisor) - len(window)])

    def output(self, r: int, positions: list[int], mean_value: bool | float) -> tuple[list[Row], Row]:
        """Steps 4 and 5 for given positions: output [G][d] and alpha [G]."""
        outputs, alphas = [], []
        n, head_dim = len(self.valid_positions), len(self.queries[0])
        if n == 0:
            return [[0.0] * head_dim for _ in self.queries], [1.0] * len(self.queries)
        mean = [sum(self.values[s][i] for s in self.valid_positions) / n for i in range(head_dim)]
        for query, scores in zip(self.queries, self.scores(r), strict=True):
            weights = softmax(
                {s: self.soften(dot(query, self.keys[s]) * self.scale) for s in positions},
            )
            y = [sum(weights[s] * self.values[s][i] for s in positions) for i in range(head_dim)]
            alpha = sum(scores[s] for s in positions)
            if mean_value is True or (mean_value is not False and alpha >= mean_value):
                y = [alpha * a + (1 - alpha) * b for a, b in zip(y, mean, strict=True)]
            outputs.append(y)
            alphas.append(alpha)
        return outputs, alphas

    def lse(self, positions: list[int]) -> Row:
        """Of each query, the logarithm of the summed exponentials of these positions' logits."""
        result = []
        for query in self.queries:
            logits = [self.soften(dot(query, self.keys[s]) * self.scale) for s in positions]
            highest = max(logits, default=-math.inf)
            result.append(highest + math.log(sum(math.exp(x - highest) for x in logits)) if logits else -math.inf)
        return result


def dot(a: Row, b: Row) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(logits: dict[int, float]) -> dict[int, float]:
    if not logits:
        return {}
    highest = max(logits.values())
    weights = {s: math.exp(x - highest) for s, x in logits.items()}
    total = sum(weights.values())
    return {s: weight / total for s, weight in weights.items()}

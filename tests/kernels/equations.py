"""The five steps in Python floats (float64), one head, one position and one component at a time: no tensor arithmetic.

Written from the paper (arXiv 2312.04985, algorithm 1) and from the operator's interface, not from the reference, which
is tested against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

Row = list[float]


@dataclass
class Head:
    """One batch row and KV head: queries [G][d], keys and values [S][d], valid [S]; index_keys [S][d]: what the index
    has for each key, where that is not the key itself."""

    queries: list[Row]
    keys: list[Row]
    values: list[Row]
    valid: list[bool]
    scale: float
    softcap: float | None = None
    index_keys: list[Row] = field(default_factory=list)

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
        c, keys = self.components(r), self.index_keys or self.keys
        result = []
        for query in self.queries:
            tau = self.temperature(query, c)
            logits = {
                s: self.soften(sum(query[i] * keys[s][i] for i in c) * self.scale / tau) for s in self.valid_positions
            }
            result.append(softmax(logits))
        return result

    def temperature(self, query: Row, c: list[int]) -> float:
        kept, all_of_it = sum(abs(query[i]) for i in c), sum(abs(x) for x in query)
        tau = math.sqrt(kept / all_of_it) if all_of_it > 0 else 1.0
        return tau if tau > 0 else 1.0

    def budget(self, k: int, k_divisor: int | None) -> int:
        n = len(self.valid_positions)
        return min(n, max(k, n // k_divisor if k_divisor else 0))

    def window(self, k: int, k_divisor: int | None, local: int | None) -> list[int]:
        """The newest valid positions, forced in."""
        budget = self.budget(k, k_divisor)
        size = budget // 4 if local is None else min(local, budget)
        return self.valid_positions[len(self.valid_positions) - size :]

    def positions(
        self,
        r: int,
        k: int,
        k_divisor: int | None,
        local: int | None,
        mass: float | None = None,
        k_min: int = 1,
    ) -> list[int]:
        """Step 3, ascending."""
        scores, window = self.scores(r), self.window(k, k_divisor, local)
        others = [s for s in self.valid_positions if s not in set(window)]
        others.sort(key=lambda s: (-sum(row[s] for row in scores), s))
        ranked, budget = window + others, self.budget(k, k_divisor)
        if mass is not None:
            least = max(len(window), min(k_min, len(ranked)))
            while least < budget and self.share(scores, ranked[:least]) < mass:
                least += 1
            budget = least
        return sorted(ranked[:budget])

    def share(self, scores: list[dict[int, float]], positions: list[int]) -> float:
        """Of the scores' sum over the group."""
        return math.fsum(row[s] for row in scores for s in positions) / len(scores)

    def output(
        self, r: int, positions: list[int], mean_value: bool | float, attended: Row | None = None
    ) -> tuple[list[Row], Row]:
        """Steps 4 and 5 for given positions: output [G][d] and alpha [G].

        attended: of each query, blended with in place of alpha."""
        outputs, alphas = [], []
        n, head_dim = len(self.valid_positions), len(self.queries[0])
        if n == 0:
            return [[0.0] * head_dim for _ in self.queries], [1.0] * len(self.queries)
        mean = [sum(self.values[s][i] for s in self.valid_positions) / n for i in range(head_dim)]
        for g, (query, scores) in enumerate(zip(self.queries, self.scores(r), strict=True)):
            weights = softmax(
                {s: self.soften(dot(query, self.keys[s]) * self.scale) for s in positions},
            )
            y = [sum(weights[s] * self.values[s][i] for s in positions) for i in range(head_dim)]
            alpha = sum(scores[s] for s in positions)
            share = alpha if attended is None else attended[g]
            if mean_value is True or (mean_value is not False and share >= mean_value):
                y = [share * a + (1 - share) * b for a, b in zip(y, mean, strict=True)]
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

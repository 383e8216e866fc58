"""The compared methods written out from their papers' definitions, one row and one head at a time, in plain Python
numbers. They share no code with the package: they are what it is compared with. (SparQ's own is tests/sparq/slow.py.)

A head is its keys and values, a list of S lists of d numbers; `valid` the positions that may be seen, ascending."""

from __future__ import annotations

import math

Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def softmax(logits: dict[int, float]) -> dict[int, float]:
    largest = max(logits.values())
    weights = {s: math.exp(x - largest) for s, x in logits.items()}
    total = math.fsum(weights.values())
    return {s: w / total for s, w in weights.items()}


def attention(q: Vector, keys: list[Vector], positions: list[int], scale: float) -> dict[int, float]:
    return softmax({s: dot(q, keys[s]) * scale for s in positions})


def attend(q: Vector, keys: list[Vector], values: list[Vector], positions: list[int], scale: float) -> Vector:
    weights = attention(q, keys, positions, scale)
    return [math.fsum(w * values[s][i] for s, w in weights.items()) for i in range(len(q))]


def mass(q: Vector, keys: list[Vector], valid: list[int], kept: list[int], scale: float) -> float:
    exact = attention(q, keys, valid, scale)
    return math.fsum(exact[s] for s in kept)


def largest(scores: dict[int, float], count: int) -> list[int]:
    return sorted(sorted(scores, key=lambda s: (-scores[s], s))[:count])


def summed(parts: list[dict[int, float]]) -> dict[int, float]:
    return {s: math.fsum(part[s] for part in parts) for s in parts[0]}


def oracle(queries: list[Vector], keys: list[Vector], valid: list[int], scale: float, k: int) -> list[int]:
    return largest(summed([attention(q, keys, valid, scale) for q in queries]), k)


def window(valid: list[int], k: int, sinks: int) -> list[int]:
    if len(valid) <= k:
        return valid
    return valid[:sinks] + valid[len(valid) - (k - sinks) :]


def quest(
    queries: list[Vector], keys: list[Vector], valid: list[int], scale: float, page: int, pages: int
) -> tuple[list[int], int]:
    """The positions kept, and the number of pages whose bounds were read."""
    members = [valid[i : i + page] for i in range(0, len(valid), page)]
    per_query = []
    for q in queries:
        bounds = {}
        for number, inside in enumerate(members):
            low = [min(keys[s][i] for s in inside) for i in range(len(q))]
            high = [max(keys[s][i] for s in inside) for i in range(len(q))]
            bounds[number] = math.fsum(max(x * a, x * b) for x, a, b in zip(q, low, high, strict=True)) * scale
            assert all(dot(q, keys[s]) * scale <= bounds[number] + 1e-9 for s in inside)
        per_query.append(softmax(bounds))
    scores = summed(per_query)
    last = len(members) - 1
    del scores[last]
    chosen = sorted([last, *largest(scores, pages - 1)])
    return [s for number in chosen for s in members[number]], len(members)


class H2O:
    """One KV head's heavy hitters."""

    def __init__(self) -> None:
        self.scores: dict[int, float] = {}
        self.evicted: set[int] = set()

    def see(self, weights: dict[int, float]) -> None:
        for s, weight in weights.items():
            self.scores[s] = self.scores.get(s, 0.0) + weight

    def prompt(self, queries: list[list[Vector]], keys: list[Vector], valid: list[int], scale: float) -> None:
        """queries: of each position, those of the group."""
        for s in valid:
            for q in queries[s]:
                self.see(attention(q, keys, [t for t in valid if t <= s], scale))

    def step(
        self, queries: list[Vector], keys: list[Vector], valid: list[int], scale: float, k: int, local: int
    ) -> list[int]:
        left = [s for s in valid if s not in self.evicted]
        while len(left) > k:
            recent = set(valid[len(valid) - local :])
            worst = min((s for s in left if s not in recent), key=lambda s: (self.scores.get(s, 0.0), -s))
            left.remove(worst)
            self.evicted.add(worst)
        for q in queries:
            self.see(attention(q, keys, left, scale))
        return left

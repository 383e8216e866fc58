"""The compared methods written out from their papers' definitions, one row and one head at a time, in plain Python
numbers. They share no code with the package: they are what it is compared with. (SparQ's own is tests/sparq/slow.py.)

A head is its keys and values, a list of S lists of d numbers; `valid` the positions that may be seen, ascending."""

from __future__ import annotations

import math
from collections.abc import Callable

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


def oracle_by_mass(
    queries: list[Vector], keys: list[Vector], valid: list[int], scale: float, mass: float, k: int
) -> list[int]:
    attention_of = [attention(q, keys, valid, scale) for q in queries]
    shares = {s: x / len(queries) for s, x in summed(attention_of).items()}
    ordered = sorted(valid, key=lambda s: (-shares[s], s))
    return sorted(ordered[: min(until(ordered, shares, mass), k)])


def window(valid: list[int], k: int, sinks: int) -> list[int]:
    if len(valid) <= k:
        return valid
    return valid[:sinks] + valid[len(valid) - (k - sinks) :]


def quest(
    queries: list[Vector], keys: list[Vector], valid: list[int], scale: float, page: int, pages: int
) -> list[int]:
    def bound(q: Vector, inside: list[Vector]) -> float:
        low, high = ([of(column) for column in zip(*inside, strict=True)] for of in (min, max))
        highest = math.fsum(max(x * a, x * b) for x, a, b in zip(q, low, high, strict=True))
        assert all(dot(q, key) <= highest + 1e-9 for key in inside)
        return highest * scale

    return best_pages(queries, keys, valid, page, pages, bound)


def best_pages(
    queries: list[Vector],
    keys: list[Vector],
    valid: list[int],
    page: int,
    pages: int,
    score: Callable[[Vector, list[Vector]], float],
    first: int = 0,
) -> list[int]:
    """The positions of so many pages: the newest, the first ones as far as there is room, and those that `score` gives
    most for a query and a page's keys."""
    members = [valid[i : i + page] for i in range(0, len(valid), page)]
    scores = summed(
        [softmax({n: score(q, [keys[s] for s in inside]) for n, inside in enumerate(members)}) for q in queries]
    )
    always = {len(members) - 1, *range(min(first, pages - 1))}
    others = {n: x for n, x in scores.items() if n not in always}
    chosen = sorted([*always, *largest(others, pages - len(always))])
    return [s for number in chosen for s in members[number]]


def pages_by_moments(
    queries: list[Vector],
    keys: list[Vector],
    valid: list[int],
    scale: float,
    page: int,
    pages: int,
    spread: str,
    first: int,
) -> list[int]:
    def score(q: Vector, inside: list[Vector]) -> float:
        means, deviations = [], []
        for column in zip(*inside, strict=True):
            means.append(math.fsum(column) / len(column))
            deviations.append(math.sqrt(math.fsum((x - means[-1]) ** 2 for x in column) / len(column)))
        if spread == "norm":
            deviation = math.sqrt(dot(deviations, deviations) / len(q))
            return (dot(q, means) + math.sqrt(dot(q, q)) * deviation / 2) * scale
        return (dot(q, means) + dot([abs(x) for x in q], deviations)) * scale

    return best_pages(queries, keys, valid, page, pages, score, first)


def until(ordered: list[int], shares: dict[int, float], mass: float) -> int:
    """How many of the positions, in this order, it takes for their shares to reach `mass`; all if they never do."""
    return next((n for n in range(1, len(ordered)) if math.fsum(shares[s] for s in ordered[:n]) >= mass), len(ordered))


def coded_run(run: list[float], bits: int, to_storage: Callable[[float], float]) -> list[float]:
    """What is left of one component of a group of positions, coded; lo and step are kept as `to_storage` makes them."""
    finite = [x for x in run if math.isfinite(x)] or [0.0]
    low = to_storage(min(finite))
    step = to_storage((max(finite) - min(finite)) / (2**bits - 1))
    codes = []
    for x in run:
        if step == 0 or math.isnan(x) or x == -math.inf:
            codes.append(0)
        elif x == math.inf:
            codes.append(2**bits - 1)
        else:
            codes.append(min(max(round((x - low) / step), 0), 2**bits - 1))  # round takes halves to the even one
    return [low + step * code for code in codes]


def coded(keys: list[Vector], seen: int, group: int, bits: int, to_storage: Callable[[float], float]) -> list[Vector]:
    """The first `seen` keys, those of whole groups as their codes have them."""
    rows = [list(row) for row in keys[:seen]]
    for start in range(0, seen - group + 1, group):
        for i in range(len(rows[0])):
            run = coded_run([keys[s][i] for s in range(start, start + group)], bits, to_storage)
            for s, x in zip(range(start, start + group), run, strict=True):
                rows[s][i] = x
    return rows


def sparq(
    queries: list[Vector],
    keys: list[Vector],
    values: list[Vector],
    valid: list[int],
    scale: float,
    *,
    r: int,
    k: int,
    local: int,
    mean_value: bool | float = True,
    bits: int | None = None,
    group: int = 256,
    mass: float | None = None,
    floor: int = 1,
    alpha: str = "paper",
) -> tuple[list[Vector], list[list[int]]]:
    """SparQ of a group of queries that share their positions, with an index in so many bits and a budget by mass: the
    outputs, and the positions read for each query."""
    size, n = len(queries[0]), len(valid)
    magnitude = [math.fsum(abs(q[i]) for q in queries) for i in range(size)]
    components = sorted(range(size), key=lambda i: (-magnitude[i], i))[:r]
    scored = keys if bits is None else coded(keys, valid[-1] + 1, group, bits, float)
    logits = []
    for q in queries:
        tau = math.sqrt(math.fsum(abs(q[i]) for i in components) / math.fsum(map(abs, q)))
        logits.append({s: math.fsum(q[i] * scored[s][i] for i in components) * scale / tau for s in valid})
    scores = [softmax(x) for x in logits]
    shares = {s: x / len(queries) for s, x in summed(scores).items()}

    count = min(k, n)
    window = valid[n - min(local, count) :]
    ordered = window + sorted((s for s in valid if s not in window), key=lambda s: (-shares[s], s))
    if mass is not None:
        count = min(max(until(ordered, shares, mass), floor), count)
    read = sorted(ordered[:count])

    mean = [math.fsum(values[s][i] for s in valid) / n for i in range(size)]
    outputs = []
    for q, approximate, share in zip(queries, logits, scores, strict=True):
        y = attend(q, keys, values, read, scale)
        a = math.fsum(share[s] for s in read)
        if alpha == "exact":
            exact = math.fsum(math.exp(dot(q, keys[s]) * scale) for s in read)
            a = exact / (exact + math.fsum(math.exp(approximate[s]) for s in valid if s not in read))
        blend = mean_value is True or (mean_value is not False and a >= mean_value)
        outputs.append([a * x + (1 - a) * m for x, m in zip(y, mean, strict=True)] if blend and count < n else y)
    return outputs, [read] * len(queries)


def rocket(
    queries: list[Vector], keys: list[Vector], valid: list[int], scale: float, page: int, pages: int, r: int
) -> list[int]:
    size = len(queries[0])
    magnitude = [math.fsum(abs(q[i]) for q in queries) for i in range(size)]
    components = sorted(range(size), key=lambda i: (-magnitude[i], i))[:r]
    bound = {i: max if math.fsum(q[i] for q in queries) >= 0 else min for i in components}

    def score(q: Vector, inside: list[Vector]) -> float:
        tau = math.sqrt(math.fsum(abs(q[i]) for i in components) / math.fsum(map(abs, q)))
        return math.fsum(q[i] * bound[i](key[i] for key in inside) for i in components) * scale / tau

    return best_pages(queries, keys, valid, page, pages, score)


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

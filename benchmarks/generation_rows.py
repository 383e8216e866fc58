"""What the generation benchmark reports, row by row."""

from __future__ import annotations

from dataclasses import dataclass

from turns import Ratio, median_and_deciles
from ways import OWN_CACHE, SPARQ, Way


@dataclass
class Result:
    """What one way was measured to do."""

    way: Way
    seconds: list[float]  # of each decode step, one token for every batch row
    first_token: float | None
    second_token: float | None
    cache_bytes: int
    parts: dict[str, float] | None

    @property
    def median(self) -> float:
        return median_and_deciles(self.seconds)[0]

    def json(self) -> dict[str, object]:
        median, deciles = median_and_deciles(self.seconds)
        return dict(
            seconds_per_token=median,
            deciles=deciles,
            steps=len(self.seconds),
            first_token_seconds=self.first_token,
            second_token_seconds=self.second_token,
            cache_bytes=self.cache_bytes,
            parts=self.parts,
        )


@dataclass
class Row:
    """All ways at one context, batch and dtype."""

    dtype: str
    context: int
    batch: int
    results: dict[str, Result]
    bytes_dense: float  # of K and V, per layer and token of the batch
    bytes_sparq: float
    mean_alpha: float | None
    dense_steps: dict[str, int]  # of SparQ's: why, and how many

    @property
    def best_stock(self) -> Result:
        return min((result for result in self.results.values() if result.way.is_stock), key=lambda r: r.median)

    def ratio(self, theirs: str, ours: str = SPARQ.name) -> Ratio:
        return Ratio.of(self.results[theirs].seconds, self.results[ours].seconds)

    def json(self) -> dict[str, object]:
        best = self.best_stock.way.name
        ratios = {name: vars(self.ratio(name)) for name in self.results if name != SPARQ.name}
        cache_gain = vars(self.ratio("stock dynamic", OWN_CACHE.name))
        own = {name: value for name, value in vars(self).items() if name != "results"}
        ways = {name: result.json() for name, result in self.results.items()}
        return dict(**own, ways=ways, best_stock=best, sparq_against=ratios, own_cache_against_dynamic=cache_gain)

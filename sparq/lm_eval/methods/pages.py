"""Pages of the cache, chosen by mean and standard deviation of their keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from sparq.lm_eval.methods.paged import Paged

PAGE = 8
SPREADS = ("norm", "dimension")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pages(Paged):
    """Small pages, scored by what their keys' first two moments say of the logits (after arXiv 2605.27740, which has
    pages of 8 or 16 positions).

    Of each page are kept the mean of the keys, and how far they spread: the standard deviation of component i is
    std_i = sqrt(mean((K_i − mean_i)²)), over the positions of the page. With `spread="norm"` it is one number for a
    page, std = sqrt(mean of std_i² over the components), and the score is q·mean + ½·‖q‖·std: where all components
    spread alike and independently, ‖q‖·std is the standard deviation of q·K. With `spread="dimension"` each component
    has its own, and the score is q·mean + Σ_i |q_i|·std_i. Scaled as logits are, the scores go through a softmax over
    the pages and are summed over the GQA group, as in `Quest`, and the newest page is always attended.

    d + 1 elements are read of each page's summary ("norm"), or 2·d ("dimension"), and 2·k·d of the positions attended.
    From `ratio`: k = S·(1/ratio − m/(2·d·page)) for m elements of a summary, rounded down to whole pages, one at least.

    Args:
        page: positions of a page, counted from the first valid one. None: 8 where `k` is given; else at least 8, and
            as many as it takes for the summaries to have no more than about half of the bytes: ratio ("norm"), or
            2·ratio ("dimension").
        first_pages: as of `Paged`. With 1 far less is lost where the first position is an attention sink.
        spread: "norm", one number for each page, or "dimension", one for each of its components.
    """

    spread: str = "norm"

    def __post_init__(self) -> None:
        if self.spread not in SPREADS:
            raise ValueError(f"spread must be one of {', '.join(SPREADS)}, got {self.spread!r}")
        Paged.__post_init__(self)
        if self.k is None and self.page_size <= self.ratio * self._share:
            raise ValueError(
                f"page must be larger than ratio times {self._share:g}, for the summaries of the pages alone read "
                f"{self._share:g}/page of the bytes: got page={self.page} and ratio={self.ratio}"
            )

    @property
    def _share(self) -> float:
        """What a summary has of the elements of a position in K and V; the one number of the norm left out."""
        return 0.5 if self.spread == "norm" else 1.0

    @property
    def page_size(self) -> int:
        if self.page is not None:
            return self.page
        return PAGE if self.k is not None else max(PAGE, math.ceil(2 * self._share * self.ratio))

    def summary_elements(self, head_dim: int) -> int:
        return head_dim + 1 if self.spread == "norm" else 2 * head_dim

    def _summarise(self, keys: Tensor) -> tuple[Tensor, ...]:
        mean = keys.mean(-2, keepdim=True)
        variance = (keys - mean).square().mean(-2)
        return mean.squeeze(-2), (variance.mean(-1, keepdim=True) if self.spread == "norm" else variance).sqrt()

    def _score(self, query: Tensor, summaries: tuple[Tensor, ...], scale: float) -> Tensor:
        mean, deviation = summaries
        weight = query.norm(dim=-1, keepdim=True) / 2 if self.spread == "norm" else query.abs()
        return (query @ mean.transpose(-1, -2) + weight @ deviation.transpose(-1, -2)) * scale

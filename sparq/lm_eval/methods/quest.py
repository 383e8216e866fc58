"""Pages of the cache, chosen by a bound on their logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from sparq.lm_eval.methods.paged import Paged

PAGE = 16  # the paper's


@dataclass(frozen=True, kw_only=True, slots=True)
class Quest(Paged):
    """Quest (Tang et al., arXiv 2406.10774): the pages whose keys could have the largest logits.

    Of each page of positions the smallest and the largest value of every component of K are kept; the sum over the
    components i of max(q_i·min_i, q_i·max_i) is at least the logit of any position of the page. The pages with the
    largest bounds are attended, the newest, which may be filled in part, always among them. The paper leaves two layers
    dense (`dense_layers=2`).

    The paper has one query head for each KV head. For a GQA group the scaled bounds go through a softmax over the pages
    and are summed over the group, as SparQ does with its scores: one set of pages for the group.

    2·d elements are read for the bounds of each page, and 2·k·d of the positions attended. From `ratio`: the bounds
    take 1/page of dense attention's bytes, so k = S·(1/ratio − 1/page), rounded down to whole pages, one at the least.

    Args:
        page: positions of a page, counted from the first valid one. None: 16, the paper's, where `k` is given; else
            2·ratio, at least 16, so that the bounds take no more than half of the bytes.
        first_pages: as of `Paged`.
    """

    def __post_init__(self) -> None:
        Paged.__post_init__(self)
        if self.k is None and self.page_size <= self.ratio:
            raise ValueError(
                f"page must be larger than ratio, for the bounds of the pages alone read 1/page of the bytes: got "
                f"page={self.page} and ratio={self.ratio}"
            )

    @property
    def page_size(self) -> int:
        if self.page is not None:
            return self.page
        return PAGE if self.k is not None else max(PAGE, math.ceil(2 * self.ratio))

    def summary_elements(self, head_dim: int) -> int:
        return 2 * head_dim

    def _summarise(self, keys: Tensor) -> tuple[Tensor, ...]:
        return keys.amin(-2), keys.amax(-2)

    def _score(self, query: Tensor, summaries: tuple[Tensor, ...], scale: float) -> Tensor:
        low, high = summaries
        # max(q·min, q·max) is q·max where q is positive, else q·min
        bound = query.clamp(min=0) @ high.transpose(-1, -2) + query.clamp(max=0) @ low.transpose(-1, -2)
        return bound * scale

"""Pages of the cache, chosen by bounds on few components."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparq.config import _check_int
from sparq.lm_eval.methods.paged import Paged


@dataclass(frozen=True, kw_only=True, slots=True)
class Rocket(Paged):
    """The second stage of RocketKV (Behnam et al., arXiv 2502.14051), hybrid sparse attention: `Quest` on the
    components of SparQ. The first stage, which evicts for good, is left out.

    Of each page are kept the smallest and the largest value of every component of K. A step reads them in the r
    components i with the largest Σ|q_i|, summed over the GQA group, and one of both alone: the largest where the
    group's Σq_i is not negative, else the smallest. The products of the query with these are softened for the
    components left out, as SparQ's approximate scores are, go through a softmax over the pages, and are summed over the
    group. The newest page, which may be filled in part, is always attended.

    r elements are read of each page's bounds, and 2·k·d of the positions attended. From `ratio`, as SparQ has it, half
    of the bytes for the choice and half for what is chosen: with page = sqrt(ratio), rounded up, r = d·page / ratio,
    rounded down; then k = S·(1/ratio − r/(2·d·page)), rounded down to whole pages, one at the least.

    Args:
        page: positions of a page, counted from the first valid one. None: sqrt(ratio), rounded up.
        first_pages: as of `Paged`.
        r: components of the bounds that are read, 1..head_dim. None: d·page / ratio, at least 1.
    """

    r: int | None = None

    def __post_init__(self) -> None:
        Paged.__post_init__(self)
        _check_int("r", self.r, 1, True)

    @property
    def page_size(self) -> int:
        return math.ceil(math.sqrt(self.ratio)) if self.page is None else self.page

    def summary_elements(self, head_dim: int) -> int:
        if self.r is None:
            return min(head_dim, max(1, int(head_dim * self.page_size / self.ratio)))
        if self.r > head_dim:
            raise ValueError(f"r must not be larger than the model's head_dim={head_dim}, got r={self.r}")
        return self.r

    def _summarise(self, keys: Tensor) -> tuple[Tensor, ...]:
        return keys.amin(-2), keys.amax(-2)

    def _score(self, query: Tensor, summaries: tuple[Tensor, ...], scale: float) -> Tensor:
        low, high = summaries
        magnitude = query.abs().sum(2, keepdim=True)  # [B, Hkv, 1, d]
        components = magnitude.argsort(dim=-1, descending=True, stable=True)
        components = components[..., : self.summary_elements(query.shape[-1])]
        taken = torch.zeros_like(magnitude, dtype=torch.bool).scatter(-1, components, True)
        partial = query.masked_fill(~taken, 0)
        largest = query.sum(2, keepdim=True) >= 0  # which of both is read
        logits = partial.masked_fill(~largest, 0) @ high.transpose(-1, -2)
        logits = logits + partial.masked_fill(largest, 0) @ low.transpose(-1, -2)
        tau = (partial.abs().sum(-1, keepdim=True) / query.abs().sum(-1, keepdim=True)).sqrt()
        return logits * scale / torch.where(tau > 0, tau, 1.0)  # an all-zero query divides 0 by 0

"""Pages of the cache, chosen by a bound on their logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from sparq_kernels.reference import masked_softmax
from torch import Tensor

from sparq.config import _check_int
from sparq.lm_eval.methods.method import Method, best

PAGE = 16  # the paper's


@dataclass(frozen=True, kw_only=True, slots=True)
class Quest(Method):
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
    """

    page: int | None = None

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        _check_int("page", self.page, 1, True)
        if self.k is None and self.page_size <= self.ratio:
            raise ValueError(
                f"page must be larger than ratio, for the bounds of the pages alone read 1/page of the bytes: got "
                f"page={self.page} and ratio={self.ratio}"
            )
        if self.k is not None and self.page_size > self.k:
            raise ValueError(f"page must not be larger than k, got page={self.page_size} and k={self.k}")

    @property
    def page_size(self) -> int:
        if self.page is not None:
            return self.page
        return PAGE if self.k is not None else max(PAGE, math.ceil(2 * self.ratio))

    def pages(self, valid: int) -> int:
        """How many pages of a row with `valid` positions are attended."""
        total = math.ceil(valid / self.page_size)
        if self.k is not None:
            return total if self.k >= valid else self.k // self.page_size
        wanted = valid * (self.page_size - self.ratio) / (self.ratio * self.page_size)
        return min(total, max(1, int(wanted / self.page_size)))

    def positions(self, valid: int, head_dim: int) -> int:
        missing = -valid % self.page_size  # of the newest page
        return max(0, self.pages(valid) * self.page_size - missing)

    def _select(self, query: Tensor, key: Tensor, logits: Tensor, valid: Tensor, scale: float, state: Any) -> Tensor:
        low, high, present = self._bounds(key, valid)
        # max(q·min, q·max) is q·max where q is positive, else q·min
        bound = query.clamp(min=0) @ high.transpose(-1, -2) + query.clamp(max=0) @ low.transpose(-1, -2)
        score = masked_softmax(bound * scale, present[:, None, None]).sum(2, keepdim=True)  # [B, Hkv, 1, pages]
        counts = valid.sum(-1)
        budget = torch.tensor([self.pages(n) for n in counts.tolist()], device=valid.device)
        last = torch.arange(present.shape[1], device=valid.device) == ((counts - 1) // self.page_size)[:, None]
        chosen = best(score, present[:, None, None], budget, forced=last[:, None, None])
        page_of = ((valid.cumsum(-1) - 1) // self.page_size).clamp(min=0)  # [B, S]
        of_position = chosen.gather(-1, page_of[:, None, None].expand(-1, chosen.shape[1], -1, -1))
        return of_position & valid[:, None, None]

    def _bounds(self, key: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Smallest and largest of K in each page, [B, Hkv, pages, d], and which pages a row has, bool [B, pages]."""
        positions = valid.sum(-1).tolist()
        counts = [math.ceil(n / self.page_size) for n in positions]
        low = key.new_zeros(len(counts), key.shape[1], max(counts), key.shape[3])
        high = torch.zeros_like(low)
        steps = len(counts) // key.shape[0]
        for row, pages in enumerate(counts):
            if row % steps == 0:  # the valid positions of the steps of a row are the first of the last one's
                most = valid[row + steps - 1]
                keys = key[row // steps] if most.all() else key[row // steps][:, most]  # [Hkv, n, d]
                full = keys.shape[1] // self.page_size
                paged = keys[:, : full * self.page_size].unflatten(1, (full, self.page_size))
                lows, highs = paged.amin(2), paged.amax(2)
            count = positions[row]
            whole = count // self.page_size
            low[row, :, :whole], high[row, :, :whole] = lows[:, :whole], highs[:, :whole]
            if pages > whole:  # the newest, filled in part
                rest = keys[:, whole * self.page_size : count]
                low[row, :, whole], high[row, :, whole] = rest.amin(1), rest.amax(1)
        present = torch.arange(max(counts), device=key.device) < torch.tensor(counts, device=key.device)[:, None]
        return low, high, present

    def _elements(self, kept: Tensor, valid: Tensor, query: Tensor) -> int:
        pages = sum(math.ceil(n / self.page_size) for n in valid.sum(-1).tolist())
        return 2 * query.shape[-1] * (pages * query.shape[1] + int(kept.sum()))

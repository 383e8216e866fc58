"""What methods have in common that choose whole pages of the cache, by a summary of each page's keys."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from sparq_kernels.reference import masked_softmax
from torch import Tensor

from sparq.config import _check_int
from sparq.lm_eval.methods.method import Method, best


@dataclass(frozen=True, kw_only=True, slots=True)
class Paged(Method):
    """The pages with the largest scores are attended, the newest, which may be filled in part, always among them.

    The scores of a page by the heads of a GQA group go through a softmax over the pages and are summed over the group,
    as SparQ does with its scores of positions: one set of pages for the group.

    Args:
        page: positions of a page, counted from the first valid one.
        first_pages: so many pages at the beginning are always attended, as far as the budget has room beside the
            newest one. There are the attention sinks (arXiv 2309.17453), which a mean over a page hides.
    """

    page: int | None = None
    first_pages: int = 0

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        _check_int("page", self.page, 1, True)
        _check_int("first_pages", self.first_pages, 0, False)
        if self.k is not None and self.page_size > self.k:
            raise ValueError(f"page must not be larger than k, got page={self.page_size} and k={self.k}")

    @property
    @abstractmethod
    def page_size(self) -> int:
        """`page`, or what stands for it where it is None."""

    @abstractmethod
    def summary_elements(self, head_dim: int) -> int:
        """Elements read of the summary of each page, for one KV head."""

    @abstractmethod
    def _summarise(self, keys: Tensor) -> tuple[Tensor, ...]:
        """The summaries [..., n] of pages of keys [..., positions, d]."""

    @abstractmethod
    def _score(self, query: Tensor, summaries: tuple[Tensor, ...], scale: float) -> Tensor:
        """Scores [B, Hkv, G, pages], as logits, of pages with such summaries [B, Hkv, pages, n]."""

    def pages(self, valid: int, head_dim: int) -> int:
        """How many pages of a row with `valid` positions are attended.

        Raises:
            ValueError: `ratio` does not even allow for the summaries.
        """
        total = math.ceil(valid / self.page_size)
        if self.k is not None:
            return total if self.k >= valid else self.k // self.page_size
        # All summaries and k positions have 2·S·d / ratio elements.
        whole = 2 * head_dim * self.page_size  # elements of a page of K and V
        left = whole - self.ratio * self.summary_elements(head_dim)
        if left <= 0:
            raise ValueError(
                f"page must be so large that the summaries of the pages, {self.summary_elements(head_dim)} elements "
                f"each, are less than 1/ratio of K and V: got page={self.page_size}, ratio={self.ratio} and a "
                f"head_dim of {head_dim}"
            )
        wanted = valid * left / (self.ratio * whole)
        return min(total, max(1, int(wanted / self.page_size)))

    def positions(self, valid: int, head_dim: int) -> int:
        missing = -valid % self.page_size  # of the newest page
        return max(0, self.pages(valid, head_dim) * self.page_size - missing)

    def _select(self, query: Tensor, key: Tensor, logits: Tensor, valid: Tensor, scale: float, state: Any) -> Tensor:
        summaries, present = self._summaries(key, valid)
        score = masked_softmax(self._score(query, summaries, scale), present[:, None, None]).sum(2, keepdim=True)
        counts = valid.sum(-1)
        budget = torch.tensor([self.pages(n, query.shape[-1]) for n in counts.tolist()], device=valid.device)
        number = torch.arange(present.shape[1], device=valid.device)
        forced = number == ((counts - 1) // self.page_size)[:, None]  # the newest
        forced |= number < (budget - 1).clamp(max=self.first_pages)[:, None]
        chosen = best(score, present[:, None, None], budget, forced=forced[:, None, None])
        page_of = ((valid.cumsum(-1) - 1) // self.page_size).clamp(min=0)  # [B, S]
        of_position = chosen.gather(-1, page_of[:, None, None].expand(-1, chosen.shape[1], -1, -1))
        return of_position & valid[:, None, None]

    def _summaries(self, key: Tensor, valid: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """The summaries of each row's pages, and which pages a row has, bool [B, pages]."""
        positions = valid.sum(-1).tolist()
        counts = [math.ceil(n / self.page_size) for n in positions]
        like = self._summarise(key[:1, :1, :1])
        summaries = tuple(key.new_zeros(len(counts), key.shape[1], max(counts), x.shape[-1]) for x in like)
        steps = len(counts) // key.shape[0]
        for row, pages in enumerate(counts):
            if row % steps == 0:  # the valid positions of the steps of a row are the first of the last one's
                most = valid[row + steps - 1]
                keys = key[row // steps] if most.all() else key[row // steps][:, most]  # [Hkv, n, d]
                full = keys.shape[1] // self.page_size
                paged = self._summarise(keys[:, : full * self.page_size].unflatten(1, (full, self.page_size)))
            count = positions[row]
            whole = count // self.page_size
            for summary, of_page in zip(summaries, paged, strict=True):
                summary[row, :, :whole] = of_page[:, :whole]
            if pages > whole:  # the newest, filled in part
                for summary, of_rest in zip(
                    summaries, self._summarise(keys[:, whole * self.page_size : count]), strict=True
                ):
                    summary[row, :, whole] = of_rest
        present = torch.arange(max(counts), device=key.device) < torch.tensor(counts, device=key.device)[:, None]
        return summaries, present

    def _elements(self, kept: Tensor, valid: Tensor, query: Tensor) -> int:
        pages = sum(math.ceil(n / self.page_size) for n in valid.sum(-1).tolist())
        head_dim = query.shape[-1]
        return self.summary_elements(head_dim) * pages * query.shape[1] + 2 * head_dim * int(kept.sum())

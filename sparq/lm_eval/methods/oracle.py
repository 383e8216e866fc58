"""The best that a choice of positions can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sparq_kernels.reference import masked_softmax
from torch import Tensor

from sparq.lm_eval.methods.method import Method, best, by_mass, check_mass


@dataclass(frozen=True, kw_only=True, slots=True)
class Oracle(Method):
    """The k positions with the largest exact attention, summed over the GQA group: an upper bound, not a method.

    It is the exact top-k of SparQ Attention (arXiv 2312.04985, section 3): finding these positions takes all of K,
    which is not counted. Bytes are those of the positions attended alone, 2·k·d elements per KV head; k = S / ratio.

    Args:
        mass: between 0 and 1, oracle top-p: the fewest positions whose exact attention, averaged over the group, has
            this sum; `k`, where it is given, is the most that these may be, and `ratio` says nothing. None: always k.
    """

    mass: float | None = None

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        check_mass(self.mass)

    def positions(self, valid: int, head_dim: int) -> int:
        if self.mass is not None and self.k is None:
            return valid
        return Method.positions(self, valid, head_dim)

    def _select(self, query: Tensor, key: Tensor, logits: Tensor, valid: Tensor, scale: float, state: Any) -> Tensor:
        attention = masked_softmax(logits, valid[:, None, None])  # [B, Hkv, G, S]
        budget = self._budget(valid, query.shape[-1])
        if self.mass is None:
            return best(attention.sum(2, keepdim=True), valid[:, None, None], budget)
        share = attention.mean(2, keepdim=True)
        return by_mass(share, valid[:, None, None], self.mass, torch.zeros_like(budget), budget)

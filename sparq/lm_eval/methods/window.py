"""Attention sinks and the most recent positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparq.config import _check_int
from sparq.lm_eval.methods.method import Method, newest


@dataclass(frozen=True, kw_only=True, slots=True)
class Window(Method):
    """The first positions and the most recent ones: LM-Infinite (arXiv 2308.16137), StreamingLLM (arXiv 2309.17453).

    RoPE stays as the model had it, as in SparQ's own comparison; the two papers renumber what is kept. k = S / ratio,
    and 2·k·d elements are read per KV head.

    Args:
        sinks: the first valid positions, fewer than `k`. SparQ's authors take 16. Where k comes from `ratio` they are
            half of k at the most.
    """

    sinks: int = 16

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        _check_int("sinks", self.sinks, 0, False)
        if self.k is not None and self.sinks >= self.k:
            raise ValueError(
                f"sinks must be smaller than k, which counts them and the current position: got sinks={self.sinks} "
                f"and k={self.k}"
            )

    def _select(self, query: Tensor, key: Tensor, logits: Tensor, valid: Tensor, scale: float, state: Any) -> Tensor:
        budget = self._budget(valid, query.shape[-1])
        sinks = budget.clamp(max=self.sinks)
        if self.k is None:
            sinks = torch.minimum(sinks, budget // 2)
        first = valid & (valid.cumsum(-1) <= sinks[:, None])
        kept = first | newest(valid, budget - sinks)
        return kept[:, None, None].expand(-1, key.shape[1], -1, -1)

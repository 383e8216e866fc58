"""The best that a choice of positions can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparq_kernels.reference import masked_softmax
from torch import Tensor

from sparq.lm_eval.methods.method import Method, best


@dataclass(frozen=True, kw_only=True, slots=True)
class Oracle(Method):
    """The k positions with the largest exact attention, summed over the GQA group: an upper bound, not a method.

    It is the exact top-k of SparQ Attention (arXiv 2312.04985, section 3): finding these positions takes all of K,
    which is not counted. Bytes are those of the positions attended alone, 2·k·d elements per KV head; k = S / ratio.
    """

    def _select(self, query: Tensor, key: Tensor, logits: Tensor, valid: Tensor, scale: float, state: Any) -> Tensor:
        attention = masked_softmax(logits, valid[:, None, None])  # [B, Hkv, G, S]
        return best(attention.sum(2, keepdim=True), valid[:, None, None], self._budget(valid, query.shape[-1]))

"""SparQ once more, with parts of it left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sparq_kernels.operator import mean_from
from sparq_kernels.reference import masked_softmax
from torch import Tensor

from sparq.config import SparqConfig
from sparq.lm_eval.methods.method import Attended, Method, best, exact_mass, finite_padding, newest, widened


@dataclass(frozen=True, kw_only=True, slots=True)
class SparqVariant(Method):
    """SparQ Attention (Ribar et al., arXiv 2312.04985, algorithm 1) and its ablations.

    k, ratio, r, local, mean_value and dense_layers are those of `SparqConfig`, with its rules and floors; with the
    other two as they are by default the result is that of `sparq.patch`. The mass reported is the exact attention of
    the positions read, as for every method here; what SparQ blends with is its estimate of it, as in `sparq.report`.

    Per KV head S·r + 2·k·d + 4·d elements are read. With `shared=False` the first two are read for each query head.

    Args:
        score_temperature: whether the approximate scores' softmax makes up for the components left out.
        shared: one set of components and positions for a GQA group. False: each query head has its own, as if the
            model had no GQA.
    """

    r: int | None = None
    local: int | None = None
    mean_value: bool | float = 0.5
    score_temperature: bool = True
    shared: bool = True

    def __post_init__(self) -> None:
        self.config  # noqa: B018  checks its knobs
        for name in ("score_temperature", "shared"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")

    @property
    def config(self) -> SparqConfig:
        """The same knobs for `sparq.patch`."""
        return SparqConfig(
            r=self.r,
            k=self.k,
            ratio=self.ratio,
            local=self.local,
            mean_value=self.mean_value,
            dense_layers=self.dense_layers,
            min_length=0,
        )

    def positions(self, valid: int, head_dim: int) -> int:
        return self.config.positions(valid)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor, scale: float, state: Any = None
    ) -> Attended:
        q, keys, values = widened(query), widened(key), finite_padding(value, valid)
        approximate = self._approximate(q, keys, valid, scale)  # [B, Hkv, G, S]
        kept = self._choose(approximate, valid, q.shape[-1])
        logits = q @ keys.transpose(-1, -2) * scale
        output = masked_softmax(logits, kept) @ values
        if self.mean_value is not False:
            count = valid.sum(-1)[:, None, None]  # [B, 1, 1]
            alpha = approximate.masked_fill(~kept, 0).sum(-1)  # [B, Hkv, G]
            alpha = torch.where(kept.sum(-1) >= count, 1.0, alpha)[..., None]
            mean = valid[:, None, None].to(values.dtype) @ values / count.clamp(min=1)[..., None]  # [B, Hkv, 1, d]
            blended = alpha * output + (1 - alpha) * mean
            output = torch.where(alpha < mean_from(self.mean_value), output, blended)
        mass = exact_mass(logits, kept, valid)
        return Attended(output.to(query.dtype), kept, mass, self._elements(kept, valid, query))

    attend_each = Method.attend_one_by_one

    def _approximate(self, query: Tensor, key: Tensor, valid: Tensor, scale: float) -> Tensor:
        """Steps 1 and 2: the scores by r components alone, [B, Hkv, G, S]."""
        magnitude = query.abs().sum(2, keepdim=True) if self.shared else query.abs()  # [B, Hkv, 1 or G, d]
        r = self.config.components(query.shape[-1])
        components = magnitude.argsort(dim=-1, descending=True, stable=True)[..., :r]
        taken = torch.zeros_like(magnitude, dtype=torch.bool).scatter(-1, components, True)
        partial = query.masked_fill(~taken, 0)
        logits = partial @ key.transpose(-1, -2) * scale
        if self.score_temperature:
            tau = (partial.abs().sum(-1, keepdim=True) / query.abs().sum(-1, keepdim=True)).sqrt()
            logits = logits / torch.where(tau > 0, tau, 1.0)  # an all-zero query divides 0 by 0
        return masked_softmax(logits, valid[:, None, None])

    def _choose(self, approximate: Tensor, valid: Tensor, head_dim: int) -> Tensor:
        """Step 3: the positions with the largest scores, the local window always among them."""
        budget = self._budget(valid, head_dim)
        local = budget // 4 if self.local is None else budget.clamp(max=self.local)
        score = approximate.sum(2, keepdim=True) if self.shared else approximate
        return best(score, valid[:, None, None], budget, forced=newest(valid, local)[:, None, None])

    def _select(self, query: Tensor, key: Tensor, logits: Tensor, valid: Tensor, scale: float, state: Any) -> Tensor:
        return self._choose(self._approximate(query, key, valid, scale), valid, query.shape[-1])

    def _elements(self, kept: Tensor, valid: Tensor, query: Tensor) -> int:
        batch, kv_heads, _, head_dim = query.shape
        scored = int(valid.sum()) * kv_heads * kept.shape[2]  # positions, for each set of components
        read = scored * self.config.components(head_dim) + 2 * head_dim * int(kept.sum())
        return read + 4 * head_dim * batch * kv_heads

"""What a step on a static cache sees: worked out on the device, where alone the cache's length is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparq.config import SparqConfig


@dataclass(frozen=True)
class StaticPlan:
    """As `step.Plan`, of the newest token; nothing here has been read back from the device."""

    length: Tensor  # [B] int64
    start: None
    mask: Tensor  # [B, S] bool, the valid positions: False beyond the length
    valid: Tensor  # [] int64, valid positions, summed over the batch
    read: Tensor  # [] int64, positions read in full, summed over the batch
    ignored_bias: Tensor | None  # [] bool, whether the mask had a bias; None: it surely has none
    dense_reason: str | None  # why the step must be dense, if it must

    @classmethod
    def make(
        cls, attention_mask: Tensor | None, length: Tensor, batch: int, capacity: int, config: SparqConfig
    ) -> StaticPlan:
        """The plan for a mask [B or 1, 1, Q, S] (bool, or 0 and large negative numbers) and a length int64 []."""
        valid = (torch.arange(capacity, device=length.device) < length).expand(batch, capacity)
        ignored_bias, reason = None, None
        if config.positions(capacity) == capacity:
            reason = "k covers the context"
        elif attention_mask is not None:
            if attention_mask.dim() != 4 or attention_mask.shape[1] != 1 or attention_mask.shape[3] < capacity:
                reason = "attention mask that is not [batch, 1, 1, length]"
            else:
                mask = attention_mask[:, 0, -1, :capacity].to(length.device)
                if mask.dtype != torch.bool:
                    masked_out = mask <= torch.finfo(mask.dtype).min / 2
                    ignored_bias = ((mask != 0) & ~masked_out).any()
                    mask = ~masked_out
                    if length.device.type == "cpu" and not torch.compiler.is_compiling():  # reading it costs nothing
                        reason = "attention mask with a bias" if bool(ignored_bias) else None
                        ignored_bias = None
                valid = valid & mask
        n = valid.sum(-1)
        read = n.clamp(max=config.min_k)
        if config.k_divisor is not None:
            read = torch.minimum(n, (n // config.k_divisor).clamp(min=config.min_k))
        return cls(length.expand(batch), None, valid.contiguous(), n.sum(), read.sum(), ignored_bias, reason)

    def counts(self, per_position: int, r: int, head_dim: int, alphas: int) -> Tensor:
        """What `Totals.sparse` adds, int64; per_position: bytes of one component in all KV heads."""
        one, batch = torch.ones_like(self.valid), self.length.shape[0]
        bytes_read = per_position * (self.valid * r + self.read * (2 * head_dim) + 4 * batch * head_dim)
        bytes_dense = self.valid * (per_position * 2 * head_dim)
        return torch.stack((one, self.valid, self.read, bytes_read, bytes_dense, one * alphas))

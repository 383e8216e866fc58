"""What a step on a static cache, or a compiled one, sees: worked out on the device, from which nothing is read back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparq import reasons
from sparq.config import SparqConfig
from sparq.devices import count_once


@dataclass(frozen=True, eq=False)
class StaticPlan:
    """As `step.Plan`, of the newest tokens; nothing here has been read back from the device."""

    length: Tensor  # [B] int64
    start: None
    mask: Tensor | None  # [B, S] bool, the valid positions: False beyond the length; None: all are
    row_counts: Tensor | None  # of the mask, int32 [B, Q, 2]; None: whoever needs them has to count
    valid: Tensor  # [] int64, positions that a query sees, summed over queries and the batch
    read: Tensor  # [] int64, positions read in full, summed likewise
    valid_once: Tensor  # [] int64, valid positions, summed over the batch
    ignored_bias: Tensor | None  # [] bool, whether the mask had a bias or was not causal; None: surely neither
    queries: int
    dense_reason: str | None  # why the step must be dense, if it must

    @classmethod
    def make(
        cls,
        attention_mask: Tensor | None,
        length: Tensor,
        batch: int,
        capacity: int,
        config: SparqConfig,
        queries: int = 1,
        later: int = 0,
        is_full: bool = False,
    ) -> StaticPlan:
        """The plan for a mask [B or 1, 1, Q >= queries + later, S] (bool, or 0 and large negative numbers) and a length
        int64 [], of `queries` tokens behind which the pass has `later` more, `length` included.
        is_full: the length is the capacity, as in a compiled step on a dynamic cache."""
        length = length - later if later else length
        unseen = torch.arange(queries - 1, -1, -1, device=length.device)  # new tokens that a query does not see
        before = torch.arange(capacity, device=length.device) < length - unseen[:, None]  # [queries, S]
        valid = before[-1].expand(batch, capacity)
        ignored_bias, reason = None, None
        if config.positions(capacity) == capacity:
            reason = reasons.COVERED
        elif attention_mask is not None:
            shape = attention_mask.shape
            if attention_mask.dim() != 4 or shape[1] != 1 or shape[2] < queries + later or shape[3] < capacity:
                reason = reasons.MASK_SHAPE
            else:
                rows = attention_mask[:, 0, -(queries + later) :, :capacity].to(length.device)
                doubts = []
                if rows.dtype != torch.bool:
                    masked_out = rows <= torch.finfo(rows.dtype).min / 2
                    doubts.append((reasons.MASK_BIAS, ((rows != 0) & ~masked_out).any()))
                    rows = ~masked_out
                if queries > 1 or later:
                    strange = (rows[:, :queries] != (rows[:, -1:] & before)).any()
                    doubts.append((reasons.MASK_ORDER, strange))
                if length.device.type == "cpu" and not torch.compiler.is_compiling():  # reading it costs nothing
                    reason = next((why for why, doubt in doubts if bool(doubt)), None)
                elif doubts:
                    ignored_bias = torch.stack([doubt for _, doubt in doubts]).any()
                valid = valid & rows[:, -1]
        n = (valid[:, None] & before).sum(-1)  # [B, queries]
        read = n.clamp(max=config.min_k)
        if config.k_divisor is not None:
            read = torch.minimum(n, (n // config.k_divisor).clamp(min=config.min_k))
        lengths, once = length.expand(batch), n[:, -1].sum()
        mask = None if is_full and attention_mask is None else valid.contiguous()
        counts = None if mask is None else count_once(mask, lengths, queries, config)
        return cls(lengths, None, mask, counts, n.sum(), read.sum(), once, ignored_bias, queries, reason)

    def counts(self, per_position: int, r: int, head_dim: int, alphas: int) -> Tensor:
        """What a `SparseStep` adds, int64; per_position: bytes of one component in all KV heads."""
        one, batch = torch.ones_like(self.valid), self.length.shape[0]
        new = 4 * batch * self.queries * head_dim
        bytes_read = per_position * (self.valid * r + self.read * (2 * head_dim) + new)
        bytes_dense = self.valid_once * (per_position * 2 * head_dim)
        return torch.stack((one, self.valid, self.read, bytes_read, bytes_dense, one * alphas))

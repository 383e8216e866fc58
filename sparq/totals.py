"""Counts of one layer that are kept on its device: a compiled graph can add to them, and no step waits for them."""

from __future__ import annotations

import torch
from torch import Tensor

from sparq.reasons import OTHER_REASON, REASONS

# What a sparse step adds, in this order; then come the doubts about a step, then a count for each reason.
SPARSE = ("sparse_steps", "positions_cached", "positions_read", "bytes_read", "bytes_dense", "alpha_count")
DOUBTS = ("other_sums", "ignored_biases")
SLOTS = (*SPARSE, *DOUBTS, *REASONS)


class Totals:
    """counts: int64 [len(SLOTS)].  alpha: float64 [] (float32 on MPS, which has no other), the sum of all α.  Both are
    added to in place, never replaced."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype  # of the layer's keys
        with torch.inference_mode(False):  # they outlive the block that they are made in
            self.counts = torch.zeros(len(SLOTS), dtype=torch.int64, device=device)
            precise = torch.float32 if device.type == "mps" else torch.float64
            self.alpha = torch.zeros((), dtype=precise, device=device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.counts)
            torch._dynamo.mark_static_address(self.alpha)

    def dense(self, reason: str, bytes_dense: int) -> None:
        self.counts[SLOTS.index(reason if reason in REASONS else OTHER_REASON)] += 1
        self.counts[SLOTS.index("bytes_read") : SLOTS.index("bytes_dense") + 1] += bytes_dense

    def sparse(self, counts: Tensor, alpha: Tensor, other_sum: Tensor | None, ignored_bias: Tensor | None) -> None:
        """counts: int64 [len(SPARSE)].  alpha: any shape.  The doubts: bool [], or None where there is none."""
        self.counts[: len(SPARSE)] += counts
        self.alpha += alpha.detach().sum(dtype=self.alpha.dtype)
        for slot, doubt in enumerate((other_sum, ignored_bias), len(SPARSE)):
            if doubt is not None:
                self.counts[slot] += doubt

    def to_dict(self) -> dict[str, int]:
        """The counts, read back from the device, by slot."""
        return dict(zip(SLOTS, self.counts.tolist(), strict=True))

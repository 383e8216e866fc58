"""Counts of one layer that are kept on its device: a compiled graph can add to them, and no step waits for them."""

from __future__ import annotations

from typing import NamedTuple

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
        # add_, not +=, which would copy what it has added to onto itself
        self.counts[SLOTS.index(reason if reason in REASONS else OTHER_REASON)].add_(1)
        self.counts[SLOTS.index("bytes_read") : SLOTS.index("bytes_dense") + 1].add_(bytes_dense)

    def to_dict(self) -> dict[str, int]:
        """The counts, read back from the device, by slot."""
        return dict(zip(SLOTS, self.counts.tolist(), strict=True))


class SparseStep(NamedTuple):
    """What one layer's sparse step adds to its totals."""

    layer: int
    alpha: Tensor
    counts: Tensor  # int64 [len(SPARSE)]
    mean_is_stale: Tensor | None  # the doubts: bool [], or None where there is none
    ignored_bias: Tensor | None


def add_sparse(totals: dict[int, Totals], steps: list[SparseStep]) -> None:
    """Of one pass: all layers in a few kernels, where a layer has made one step and their α are of one shape."""
    layers = [step.layer for step in steps]
    alphas = [step.alpha.detach() for step in steps]
    kinds = [(alpha.shape, alpha.device) for alpha in alphas]
    if len(steps) > 1 and (len(set(layers)) < len(layers) or kinds.count(kinds[0]) < len(kinds)):
        for step in steps:
            add_sparse(totals, [step])
        return
    own = [totals[layer] for layer in layers]
    torch._foreach_add_([each.counts[: len(SPARSE)] for each in own], [step.counts for step in steps])
    sums = torch.stack(alphas).flatten(1).sum(1, dtype=own[0].alpha.dtype)
    torch._foreach_add_([each.alpha for each in own], list(sums.unbind()))
    _add_doubts(own, [step.mean_is_stale for step in steps], SLOTS.index("other_sums"))
    _add_doubts(own, [step.ignored_bias for step in steps], SLOTS.index("ignored_biases"))


def _add_doubts(totals: list[Totals], doubts: list[Tensor | None], slot: int) -> None:
    slots, added = [], []
    for each, doubt in zip(totals, doubts, strict=True):
        if doubt is not None:
            slots.append(each.counts[slot])
            added.append(doubt)
    if added:
        torch._foreach_add_(slots, list(torch.stack(added).to(torch.int64).unbind()))

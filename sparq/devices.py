"""Where sparse steps can gain anything."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import sparq_kernels
import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparq.config import SparqConfig


@torch.compiler.assume_constant_result
def has_kernel(device_type: str, dtype: torch.dtype) -> bool:
    """Whether sparse steps on this device run a kernel; or else the plain PyTorch operator, which is slower than dense
    attention, because SPARQ_BACKEND=reference asks for it, or in float64, where nobody looks for speed."""
    return (
        dtype == torch.float64
        or os.environ.get("SPARQ_BACKEND") == "reference"
        or sparq_kernels.backend(device_type) != "reference"
    )


def can_read(device: torch.device) -> bool:
    """Whether Python may look at a tensor there. On a GPU it would wait for all work that has been queued, and a graph
    cannot."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


@torch.compiler.assume_constant_result
def _counts_apart(device_type: str) -> bool:
    return sparq_kernels.backend(device_type) == "triton"


def count_once(mask: Tensor, length: Tensor, queries: int, config: SparqConfig) -> Tensor | None:
    """What `sparq_kernels.decode` would count of the mask [B, S] in every layer, for all of them; None where that costs
    no kernel of its own."""
    if not _counts_apart(mask.device.type):
        return None
    visible, budget = sparq_kernels.Visible(length, mask=mask), config.budget(r=0)  # counting reads no components
    return sparq_kernels.count_valid(visible, budget, queries=queries)

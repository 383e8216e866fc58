"""Where sparse steps can gain anything."""

from __future__ import annotations

import os

import sparq_kernels
import torch


@torch.compiler.assume_constant_result
def has_kernel(device_type: str, dtype: torch.dtype) -> bool:
    """Whether sparse steps on this device run a kernel; or else the plain PyTorch operator, which is slower than dense
    attention, because SPARQ_BACKEND=reference asks for it, or in float64, where nobody looks for speed."""
    return (
        dtype == torch.float64
        or os.environ.get("SPARQ_BACKEND") == "reference"
        or sparq_kernels.backend(device_type) != "reference"
    )

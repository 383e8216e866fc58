"""Which implementation serves which device."""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType

import torch

from . import cpu


def backend(device: torch.device | str) -> str:
    """The implementation that serves a device: "cpp" (compiled for this CPU), "triton" (NVIDIA and AMD GPUs) or
    "reference" (plain PyTorch)."""
    kind = torch.device(device).type
    if kind == "cuda":
        return "reference" if triton_kernels() is None else "triton"
    return cpu.backend() if kind == "cpu" else "reference"


@functools.cache
def triton_kernels() -> ModuleType | None:
    """The GPU implementation, or None (with one warning) where Triton cannot be had."""
    if os.environ.get("SPARQ_BACKEND") == "reference":
        return None
    try:
        from . import gpu
    except ImportError as error:
        warnings.warn(
            f"sparq_kernels: no GPU kernels, the PyTorch reference runs instead (slower than dense attention). "
            f"Triton >= 3.6 is needed: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return gpu

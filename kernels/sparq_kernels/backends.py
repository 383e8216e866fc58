"""Which implementation serves which device."""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType

import torch

from . import cpu
from .requirements import supported


def backend(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """The implementation that serves a device: "cpp" (compiled for this CPU), "triton" (NVIDIA and AMD GPUs) or
    "reference" (plain PyTorch), which alone knows float64."""
    kind = torch.device(device).type
    if dtype == torch.float64:
        return "reference"
    if kind == "cuda":
        return "reference" if triton_kernels() is None else "triton"
    return cpu.backend() if kind == "cpu" else "reference"


@functools.cache
def triton_kernels() -> ModuleType | None:
    """The GPU implementation, or None (with one warning) where Triton cannot be had or is too old."""
    if os.environ.get("SPARQ_BACKEND") == "reference":
        return None
    try:
        import triton

        if not supported("triton").contains(triton.__version__, prereleases=True):
            raise ImportError(f"triton {triton.__version__} is installed")
        from . import gpu
    except ImportError as error:
        warnings.warn(
            "sparq_kernels: no GPU kernels. The operator runs the PyTorch reference, slower than dense attention, so "
            "that patched models stay dense. "
            f"Triton {supported('triton')} is needed (pip install 'sparq-attention[gpu]'): {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return gpu

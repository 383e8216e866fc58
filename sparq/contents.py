"""Whether anybody else holds, or has written into, the tensors of a cache."""

from __future__ import annotations

import torch
from torch import Tensor


def versions(*tensors: Tensor | None) -> tuple[int, ...]:
    """PyTorch's count of the writes into each tensor and its views; -1 where it keeps none (of inference tensors)."""
    return tuple(-1 if t is None or t.is_inference() else t._version for t in tensors)


def is_held_elsewhere(tensor: Tensor) -> bool:
    """Whether a tensor beside this one uses its memory: a view that was handed out, or what it is itself a view of."""
    return _uses(tensor) > _uses(torch.empty(0))


def _uses(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def normal_empty(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory of which PyTorch counts the writes, under `torch.inference_mode` too."""
    with torch.inference_mode(False):
        return torch.empty(*shape, dtype=dtype or like.dtype, device=like.device)

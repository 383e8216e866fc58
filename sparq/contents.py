"""Whether anybody else holds, or has written into, the tensors of a cache."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def versions(*tensors: Tensor | None) -> tuple[int, ...]:
    """PyTorch's count of the writes into each tensor and its views; -1 where it keeps none (of inference tensors)."""
    try:
        return tuple([-1 if t is None else t._version for t in tensors])
    except RuntimeError:  # one is an inference tensor
        return tuple([-1 if t is None or t.is_inference() else t._version for t in tensors])


def is_held_elsewhere(tensor: Tensor) -> bool:
    """Whether a tensor beside this one uses its memory: a view that was handed out, or what it is itself a view of."""
    return _uses(tensor) > _uses(torch.empty(0))


def _uses(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def outside_inference_mode() -> contextlib.AbstractContextManager:
    """What is made inside it is a normal tensor, of which PyTorch counts the writes, and which may be written in any
    mode. Autograd records nothing of inference tensors, so nothing else changes."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    return torch.inference_mode(False)

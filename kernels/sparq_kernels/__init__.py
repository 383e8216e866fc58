"""SparQ attention as a PyTorch operator.  Tensors in, tensors out: nothing here knows a model."""

from .layout import BLOCK, allocate_components, read_components, write_components
from .operator import DecodeOutput, backend, decode

__all__ = [
    "BLOCK",
    "DecodeOutput",
    "allocate_components",
    "backend",
    "decode",
    "read_components",
    "write_components",
]

"""SparQ attention as a PyTorch operator.  Tensors in, tensors out: nothing here knows a model."""

from .append import append
from .backends import backend
from .layout import BLOCK, allocate_components, read_components, write_components
from .operator import DecodeOutput, decode

__all__ = [
    "BLOCK",
    "DecodeOutput",
    "allocate_components",
    "append",
    "backend",
    "decode",
    "read_components",
    "write_components",
]

"""Dense attention of one new token on the CPU: PyTorch's ways, and a C++ kernel written with the same care as SparQ's.

That one is csrc/dense.cpp, with the vectors of SparQ's own kernel, by the same compiler and with the same flags.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from sparq_kernels import cpu
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from workload import Inputs, Shape

DENSE_ERROR = 3e-2  # two matrix products in bfloat16 round as much, and an opponent gets the benefit of the doubt
SOURCE = Path(__file__).parent / "csrc" / "dense.cpp"
ARGUMENTS = struct.Struct("@5P15qd")  # struct Arguments of dense.cpp


def packed(shape: Shape, x: Inputs) -> Tensor:
    query = x.query.reshape(shape.batch, shape.num_kv_heads, -1, shape.head_dim)
    return scaled_dot_product_attention(query, x.key, x.value)


def enable_gqa(shape: Shape, x: Inputs) -> Tensor:
    return scaled_dot_product_attention(x.query, x.key, x.value, enable_gqa=True)


def matmul(shape: Shape, x: Inputs) -> Tensor:
    query = x.query.reshape(shape.batch, shape.num_kv_heads, -1, shape.head_dim) * shape.head_dim**-0.5
    return torch.softmax(query @ x.key.transpose(-1, -2), dim=-1) @ x.value


TORCH_WAYS = {"SDPA packed": packed, "SDPA enable_gqa": enable_gqa, "matmul": matmul}


def exact(shape: Shape, x: Inputs) -> Tensor:
    """Softmax attention in float32, [B, Hq, 1, d]; row by row, as a whole float32 cache may not fit in memory."""
    rows = []
    for query, key, value in zip(x.query, x.key, x.value, strict=True):
        q = query.float().reshape(shape.num_kv_heads, -1, shape.head_dim) * shape.head_dim**-0.5
        rows.append(torch.softmax(q @ key.float().transpose(-1, -2), dim=-1) @ value.float())
    return torch.stack(rows).reshape(x.query.shape)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, length: Tensor) -> Tensor:
    """Softmax attention of one new token over the first `length` positions of each row, [B, Hq, 1, d].

    query: [B, Hq, 1, d]; key and value: [B, Hkv, S, d], of one dtype and contiguous in d; length: int64 [B], 1 to S.
    Raises ValueError for arguments that do not belong together, CompilerError where the kernel cannot be built.
    """
    batch, num_kv_heads, cached, head_dim = key.shape
    group = query.shape[1] // num_kv_heads
    if not (
        query.shape == (batch, num_kv_heads * group, 1, head_dim)
        and key.shape == value.shape
        and length.shape == (batch,)
        and query.dtype == key.dtype == value.dtype
        and query.dtype in cpu.DTYPE_CODES
        and length.dtype == torch.int64
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and length.is_contiguous()
    ):
        said = ", ".join(f"{x.dtype} {list(x.shape)}" for x in (query, key, value, length))
        raise ValueError(f"shapes, dtypes or strides do not belong together: {said}")
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    pointers = (x.data_ptr() for x in (query, key, value, length, output))
    sizes = (torch.get_num_threads(), batch, num_kv_heads, group, head_dim, cached)
    strides = (*query.stride()[:2], *key.stride()[:3], *value.stride()[:3])
    status = compiled()(ARGUMENTS.pack(*pointers, *sizes, *strides, cpu.DTYPE_CODES[query.dtype], head_dim**-0.5))
    if status == 3:
        raise ValueError(f"length must be 1 to {cached}, got {length.tolist()}")
    if status:
        raise MemoryError("not enough memory for the dense kernel's scratch")
    return output


@functools.cache
def compiled() -> Callable[[bytes], int]:
    library = ctypes.CDLL(str(build()))
    library.dense_arguments_size.restype = ctypes.c_int64
    assert library.dense_arguments_size() == ARGUMENTS.size, "dense.cpp's Arguments are not what is packed here"
    function = library.dense_attention
    function.argtypes = [ctypes.c_char_p]
    function.restype = ctypes.c_int64
    return function


def build() -> Path:
    """Path of the kernel's shared library; compiled if need be.  Raises CompilerError."""
    return cpu.build_library("dense", SOURCE, [SOURCE, cpu.SOURCES / "simd.h"], [f"-I{cpu.SOURCES}"])

"""Dense attention of one new token on the CPU: PyTorch's ways, and a C++ kernel written with the same care as SparQ's.

That one is csrc/dense.cpp, with the vectors of SparQ's own kernel, compiled and cached as sparq_kernels compiles that
one, by the same compiler and with the same flags. The operator has no use for it, so it is kept with the benchmark.
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


def dense_attention(query: Tensor, key: Tensor, value: Tensor, length: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention of one new token over the first `length` positions of each row, [B, Hq, 1, d].

    query: [B, Hq, 1, d]; key and value: [B, Hkv, S, d], all float32, bfloat16 or float16 and contiguous in d; length:
    int64 [B], 1 to S. scale: d^-1/2 unless given.
    Raises ValueError for arguments that do not belong together, CompilerError where the kernel cannot be built.
    """
    batch, num_heads, query_length, head_dim = query.shape
    _, num_kv_heads, cached, _ = key.shape
    fits = query_length == 1 and num_heads % num_kv_heads == 0 and key.shape == value.shape
    if not fits or (key.shape[0], key.shape[3]) != (batch, head_dim) or length.shape != (batch,):
        shapes = ", ".join(str(list(x.shape)) for x in (query, key, value, length))
        raise ValueError(f"shapes do not belong together: {shapes}")
    if not query.dtype == key.dtype == value.dtype or query.dtype not in cpu.DTYPE_CODES or length.dtype != torch.int64:
        raise ValueError("query, key and value must share float32, bfloat16 or float16; length must be int64")
    if not all(x.stride(-1) == 1 for x in (query, key, value)) or not length.is_contiguous():
        raise ValueError("head_dim must be contiguous, and length")
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    status = compiled()(
        ARGUMENTS.pack(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            length.data_ptr(),
            output.data_ptr(),
            torch.get_num_threads(),
            batch,
            num_kv_heads,
            num_heads // num_kv_heads,
            head_dim,
            cached,
            *query.stride()[:2],
            *key.stride()[:3],
            *value.stride()[:3],
            cpu.DTYPE_CODES[query.dtype],
            head_dim**-0.5 if scale is None else scale,
        )
    )
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

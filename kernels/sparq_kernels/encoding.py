"""Keys into the codes of the four-bit index (`layout.py` says how they lie)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cpu
from .arguments import DTYPES, check_devices, check_memory, check_required
from .backends import triton_kernels
from .declaration import define, parts_of, required_tensors
from .groups import Cached, wrong_group
from .layout import GROUP, check_index, find_codes, find_ranges


class EncodeArguments(NamedTuple):
    """One call, in the order of the operator's schema."""

    key: Tensor
    key_components: Tensor
    key_ranges: Tensor
    begin: int
    end: int


tensors_of, _ = parts_of(EncodeArguments)
REQUIRED = required_tensors(EncodeArguments)
WRITTEN = ("key_components", "key_ranges")
AT_ONCE = 8  # groups that PyTorch codes: their keys are widened to float32, or float64


def encode(cached: Cached, begin: int, end: int) -> None:
    """Code the groups of GROUP positions whose last position lies in [begin, end), in place; all of their keys must be
    there.  Codes of other groups stay as they are.

    cached: the storage, with key_ranges; value and value_sum are not looked at.
    Of a run of GROUP values of a component x: lo = min x, step = (max x - min x) / 15, both over what is finite and
    rounded to K's dtype; code = round((x - lo) * (1 / step)), ties to even, in 0 .. 15; 0 where step is 0 or x is NaN.
    Raises ValueError for a wrong shape, stride or range of positions, TypeError for a wrong dtype, before anything is
    written.
    """
    if not isinstance(cached, Cached):
        raise wrong_group("cached", cached, Cached)
    _encode_op(cached.key, cached.key_components, cached.key_ranges, begin, end)


def encode_default(call: EncodeArguments) -> None:
    """Plain PyTorch, for any device."""
    check_encode(call)
    check_memory(call, tensors_of)
    encode_groups(call.key, call.key_components, call.key_ranges, call.begin // GROUP, call.end // GROUP)


def encode_groups(key: Tensor, codes: Tensor, ranges: Tensor, first: int, last: int) -> None:
    """Code the groups [first, last) of keys that have been checked."""
    for begin in range(first, last, AT_ONCE):
        end = min(begin + AT_ONCE, last)
        keys = key[:, :, begin * GROUP : end * GROUP]
        found = find_ranges(keys)
        ranges[:, :, begin:end] = found
        codes[:, :, begin:end] = find_codes(keys, found)


def encode_cpu(call: EncodeArguments) -> None:
    if call.key is None or call.key.dtype == torch.float64 or cpu.kernel() is None:
        return encode_default(call)
    check_encode(call)
    check_memory(call, tensors_of)
    return cpu.encode(call)


def encode_cuda(call: EncodeArguments) -> None:
    gpu = triton_kernels()
    if gpu is None or call.key is None or call.key.dtype == torch.float64:
        return encode_default(call)
    check_encode(call)
    return gpu.encode(call)


def encode_fake(call: EncodeArguments) -> None:
    _check_tensors(call)


def check_encode(call: EncodeArguments) -> None:
    """Raise for what an implementation could not survive."""
    _check_tensors(call)
    key = call.key
    if key.dim() != 4:
        raise ValueError(f"key must be [B, Hkv, S, d], got {list(key.shape)}")
    if key.dtype not in DTYPES:
        raise TypeError(f"key must be float32, bfloat16, float16 or float64, got {key.dtype}")
    if key.stride(3) != 1 and key.shape[3] > 1:
        raise ValueError(f"key must be contiguous in its last axis, got strides {key.stride()}")
    check_index(key, call.key_components, call.key_ranges)
    if not 0 <= call.begin <= call.end <= key.shape[2]:
        raise ValueError(f"begin and end must be positions of key (0 to {key.shape[2]}), got {call.begin}, {call.end}")


def _check_tensors(call: Any) -> None:
    check_required(call, REQUIRED)
    check_devices(call, tensors_of, "key")


_encode_op = define(
    "encode",
    EncodeArguments,
    results=0,
    written=WRITTEN,
    default=encode_default,
    cpu=encode_cpu,
    cuda=encode_cuda,
    fake=encode_fake,
)

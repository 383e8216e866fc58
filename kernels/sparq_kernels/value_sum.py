"""A new token's value into the sum of V, once a mask has said whether the token counts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import check_devices, check_memory, check_once, check_required, layout_of
from .backends import triton_kernels
from .declaration import define, parts_of, required_tensors


class ExtendArguments(NamedTuple):
    """One call, in the order of the operator's schema."""

    value_sum: Tensor
    summed: Tensor
    value: Tensor
    valid: Tensor
    length: Tensor


tensors_of, _ = parts_of(ExtendArguments)
REQUIRED = required_tensors(ExtendArguments)


def extend_sum(value_sum: Tensor, summed: Tensor, value: Tensor, valid: Tensor, *, length: Tensor) -> None:
    """Add each row's newest value where it is valid, and note that it is in the sum; in place, on a GPU in one kernel.

    value_sum: [B, Hkv, d] float32.  summed: bool [B, capacity], the positions that it is the sum of.
    value: [B, Hkv, capacity, d], last axis contiguous.  valid: bool [B, capacity].
    length: int64 [B]: the newest position is `length - 1`; where that lies outside the storage nothing is done.
    Raises ValueError for a wrong shape, stride or device, TypeError for a wrong dtype.
    """
    _extend_op(value_sum, summed, value, valid, length)


def extend_default(call: ExtendArguments) -> None:
    """Plain PyTorch, for any device."""
    check_extending(call)
    value_sum, summed, value, valid, length = call
    newest = length - 1
    is_inside = (newest >= 0) & (newest < value.shape[2])
    newest = newest.clamp(0, value.shape[2] - 1)[:, None]  # [B, 1]
    is_valid = valid.gather(1, newest) & is_inside[:, None]
    rows = newest[:, None, :, None].expand(-1, value.shape[1], 1, value.shape[3])
    # masked_fill, not a product: padding may hold anything, NaN included
    value_sum.add_(value.gather(2, rows)[:, :, 0].masked_fill(~is_valid[:, :, None], 0))
    summed.scatter_(1, newest, torch.where(is_inside[:, None], is_valid, summed.gather(1, newest)))


def extend_cuda(call: ExtendArguments) -> None:
    gpu = triton_kernels()
    if gpu is None:
        return extend_default(call)
    return gpu.extend_sum(call, check_extending(call))


def extend_fake(call: ExtendArguments) -> None:
    pass


def check_extending(call: ExtendArguments) -> tuple[object, ...]:
    """Raise for what an implementation could not survive.  Returns the layout."""
    layout = layout_of(tensors_of(call))
    check_once(layout, _check_layout, call)
    if call.value.device.type == "cpu":
        check_memory(call, tensors_of)
    return layout


def _check_layout(call: ExtendArguments) -> None:
    check_required(call, REQUIRED)
    check_devices(call, tensors_of, "value")
    value = call.value
    if value.dim() != 4:
        raise ValueError(f"value must be [B, Hkv, capacity, d], got {list(value.shape)}")
    batch, heads, capacity, head_dim = value.shape
    wanted = {
        "value_sum": ((batch, heads, head_dim), torch.float32),
        "summed": ((batch, capacity), torch.bool),
        "valid": ((batch, capacity), torch.bool),
        "length": ((batch,), torch.int64),
    }
    for name, (shape, dtype) in wanted.items():
        tensor = getattr(call, name)
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    for name in ("value", "value_sum", "summed", "valid"):
        tensor = getattr(call, name)
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} must be contiguous in its last axis, got strides {tensor.stride()}")


_extend_op = define(
    "extend_sum",
    ExtendArguments,
    results=0,
    written=("value_sum", "summed"),
    default=extend_default,
    cuda=extend_cuda,
    fake=extend_fake,
)

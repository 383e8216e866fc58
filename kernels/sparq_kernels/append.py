"""One new token per row into everything a cache keeps: K rows, the index, V rows and the sum of V."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import (
    DTYPES,
    check_apart,
    check_devices,
    check_memory,
    check_once,
    check_required,
    check_writable,
    layout_of,
)
from .backends import triton_kernels
from .declaration import define, parts_of, required_tensors
from .encoding import EncodeArguments, encode_cpu, encode_default
from .groups import Cached, wrong_group
from .layout import BLOCK, GROUP, check_index


class AppendArguments(NamedTuple):
    """One call, in the order of the operator's schema."""

    key: Tensor
    value: Tensor
    key_components: Tensor
    value_sum: Tensor | None
    key_ranges: Tensor | None
    new_key: Tensor
    new_value: Tensor
    position: Tensor | None
    offset: int


tensors_of, _ = parts_of(AppendArguments)
REQUIRED = required_tensors(AppendArguments)
WRITTEN = ("key", "value", "key_components", "value_sum", "key_ranges")


def append(cached: Cached, new_key: Tensor, new_value: Tensor, position: int | Tensor) -> None:
    """Write a token's key and value into the storage, in place; on a GPU in one kernel that waits for nothing.

    cached: the storage.  Its S positions are all that there is room for, the new one among them; key_components must
        have room for as many; codes are written where the position is the last one of its group.  The value is added to
        value_sum, unless that is None.
    new_key, new_value: [B, Hkv, 1, d], the storage's dtype.
    position: where it goes: an int, or int64 [B] on the storage's device, one for each row.
    Raises ValueError for a wrong shape, stride, device or position, TypeError for a wrong dtype, RuntimeError for
    memory that cannot be written, before anything is written.  A tensor of positions on a GPU is not looked at: one
    outside the storage writes nothing.
    """
    if not isinstance(cached, Cached):
        raise wrong_group("cached", cached, Cached)
    if cached.block_table is not None:
        raise ValueError("cached must have no block_table: append_slots writes into pages")
    key, key_components, value, value_sum, key_ranges, _ = cached
    is_per_row = isinstance(position, Tensor)
    _append_op(
        key,
        value,
        key_components,
        value_sum,
        key_ranges,
        new_key,
        new_value,
        position if is_per_row else None,
        0 if is_per_row else position,
    )


def append_default(call: AppendArguments) -> None:
    """Plain PyTorch, for any device."""
    check_append(call)
    check_memory(call, tensors_of)
    new_key, new_value = call.new_key[:, :, 0], call.new_value[:, :, 0]  # [B, Hkv, d]
    if call.position is None:
        s: Any = call.offset
        call.key[:, :, s] = new_key
        call.value[:, :, s] = new_value
        if call.key_ranges is None:
            call.key_components[:, :, s // BLOCK, :, s % BLOCK] = new_key
        elif s % GROUP == GROUP - 1:
            _code(call, slice(None), s // GROUP)
    else:
        s = call.position + call.offset
        if s.device.type == "cpu" and not bool(((s >= 0) & (s < call.key.shape[2])).all()):
            raise ValueError(f"position must be in [0, {call.key.shape[2]}), got {s.tolist()}")
        b = torch.arange(len(s), device=s.device)
        call.key[b, :, s] = new_key
        call.value[b, :, s] = new_value
        if call.key_ranges is None:
            call.key_components[b, :, s // BLOCK, :, s % BLOCK] = new_key
        else:
            for row, position in enumerate(s.tolist()):
                if position % GROUP == GROUP - 1:
                    _code(call, slice(row, row + 1), position // GROUP)
    if call.value_sum is not None:
        call.value_sum.add_(new_value)


def _code(call: AppendArguments, rows: slice, group: int) -> None:
    assert call.key_ranges is not None
    parts = EncodeArguments(
        call.key[rows], call.key_components[rows], call.key_ranges[rows], group * GROUP, (group + 1) * GROUP
    )
    (encode_cpu if call.key.device.type == "cpu" else encode_default)(parts)


def append_cuda(call: AppendArguments) -> None:
    gpu = triton_kernels()
    if gpu is None:
        return append_default(call)
    return gpu.append(call, check_append(call))


def append_fake(call: AppendArguments) -> None:
    _check_tensors(call)  # one tensor on `meta` is enough for the dispatcher to come here


def check_append(call: AppendArguments) -> tuple[object, ...]:
    """Raise for a shape, dtype, device, stride or position that nothing could survive; freed memory is not looked for.

    Returns the layout, which is equal where all but addresses and position are.
    """
    layout = layout_of(tensors_of(call))
    check_once(layout, _check_layout, call)
    check_writable(call, WRITTEN)
    if call.position is None and not 0 <= call.offset < call.key.shape[2]:
        raise ValueError(f"position must be in [0, {call.key.shape[2]}), got {call.offset}")
    return layout


def _check_tensors(call: AppendArguments) -> None:
    check_required(call, REQUIRED)
    check_devices(call, tensors_of, "key")


def _check_layout(call: AppendArguments) -> None:
    _check_tensors(call)
    key = call.key
    if key.dim() != 4:
        raise ValueError(f"key must be [B, Hkv, capacity, d], got {list(key.shape)}")
    if key.dtype not in DTYPES:
        raise TypeError(f"key must be float32, bfloat16, float16 or float64, got {key.dtype}")
    batch, heads, _, head_dim = key.shape
    shapes = {"value": key.shape, "new_key": (batch, heads, 1, head_dim), "new_value": (batch, heads, 1, head_dim)}
    for name, shape in shapes.items():
        if getattr(call, name).shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(getattr(call, name).shape)}")
    for name in ("value", "new_key", "new_value"):
        tensor = getattr(call, name)
        if tensor.dtype != key.dtype:
            raise TypeError(f"{name} must have key's dtype {key.dtype}, got {tensor.dtype}")
    check_index(key, call.key_components, call.key_ranges)
    for name in ("key", "value"):
        if getattr(call, name).stride(3) != 1 and head_dim > 1:
            raise ValueError(f"{name} must be contiguous in its last axis, got strides {getattr(call, name).stride()}")
    if call.value_sum is not None:
        if call.value_sum.shape != (batch, heads, head_dim):
            raise ValueError(f"value_sum must be [{batch}, {heads}, {head_dim}], got {list(call.value_sum.shape)}")
        if call.value_sum.dtype != torch.float32 and not (call.value_sum.dtype == key.dtype == torch.float64):
            raise TypeError(f"value_sum must be float32 (or float64 with float64 keys), got {call.value_sum.dtype}")
        if call.value_sum.stride(2) != 1 and head_dim > 1:
            raise ValueError(f"value_sum must be contiguous in its last axis, got strides {call.value_sum.stride()}")
    if call.position is not None:
        if call.position.shape != (batch,):
            raise ValueError(f"position must be [{batch}], got {list(call.position.shape)}")
        if call.position.dtype != torch.int64:
            raise TypeError(f"position must be int64, got {call.position.dtype}")
    check_apart(call, WRITTEN)


_append_op = define(
    "append",
    AppendArguments,
    results=0,
    written=WRITTEN,
    default=append_default,
    cuda=append_cuda,
    fake=append_fake,
)

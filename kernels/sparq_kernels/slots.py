"""Tokens into the pages of a paged cache: K rows, the index, V rows, and what is kept of whole groups and pages."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu
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
from .encoding import encode_groups
from .groups import Cached, wrong_group
from .layout import GROUP, check_index


class SlotArguments(NamedTuple):
    """One call, in the order of the operator's schema."""

    key: Tensor
    value: Tensor
    key_components: Tensor
    value_sum: Tensor
    key_ranges: Tensor | None
    new_key: Tensor
    new_value: Tensor
    slots: Tensor


tensors_of, _ = parts_of(SlotArguments)
REQUIRED = required_tensors(SlotArguments)
WRITTEN = ("key", "value", "key_components", "value_sum", "key_ranges")


def append_slots(cached: Cached, new_key: Tensor, new_value: Tensor, slots: Tensor) -> None:
    """Write tokens of any rows into pages, in place: prompts and decode steps alike.

    cached: pages, as `Cached` describes them; its block_table is not looked at.
    new_key, new_value: [T, Hkv, d], the storage's dtype, any strides.
    slots: int64 [T], token t goes to slots[t] % N of page slots[t] // N; a negative one is skipped.  No slot twice.

    A token in the last slot of a page has the page's sum of V made anew of its rows, one in the last slot of a group of
    GROUP the group's codes.  So a page is a function of the keys and values in it, however they came: in one call or
    one by one, again after a draft was rejected, or for several rows that share it.
    Raises ValueError for a wrong shape, stride or slot, TypeError for a wrong dtype, RuntimeError for memory that
    cannot be written, before anything is written.  Slots on a GPU are not looked at: one outside the storage writes
    nothing.
    """
    if not isinstance(cached, Cached):
        raise wrong_group("cached", cached, Cached)
    _append_slots_op(
        cached.key,
        cached.value,
        cached.key_components,
        cached.value_sum,
        cached.key_ranges,
        new_key,
        new_value,
        slots,
    )


def append_slots_default(call: SlotArguments) -> None:
    """Plain PyTorch, for any device."""
    check_slots(call)
    check_memory(call, tensors_of)
    pages, _, size, _ = call.key.shape
    if call.slots.device.type == "cpu" and call.slots.numel() and int(call.slots.max()) >= pages * size:
        raise ValueError(f"slots must be below {pages * size}, which the pages have, got {call.slots.tolist()}")
    inside = (call.slots >= 0) & (call.slots < pages * size)
    slots, new_key, new_value = call.slots[inside], call.new_key[inside], call.new_value[inside]
    page, s = slots // size, slots % size
    call.key[page, :, s] = new_key
    call.value[page, :, s] = new_value
    full = page[s == size - 1]
    call.value_sum[full] = call.value[full].sum(2, dtype=call.value_sum.dtype)
    if call.key_ranges is None:
        call.key_components[page, :, 0, :, s] = new_key
        return
    for slot in slots[s % GROUP == GROUP - 1].tolist():
        p, group = slice(slot // size, slot // size + 1), slot % size // GROUP
        encode_groups(call.key[p], call.key_components[p], call.key_ranges[p], group, group + 1)


def append_slots_cpu(call: SlotArguments) -> None:
    if call.key is None or call.key.dtype == torch.float64 or cpu.kernel() is None:
        return append_slots_default(call)
    check_slots(call)
    check_memory(call, tensors_of)
    return cpu.append_slots(call)


def append_slots_cuda(call: SlotArguments) -> None:
    gpu = triton_kernels()
    if gpu is None or call.key is None or call.key.dtype == torch.float64:
        return append_slots_default(call)
    return gpu.append_slots(call, check_slots(call))


def append_slots_fake(call: SlotArguments) -> None:
    _check_tensors(call)


def check_slots(call: SlotArguments) -> tuple[object, ...]:
    """Raise for what an implementation could not survive.  Returns the layout."""
    layout = layout_of(tensors_of(call))
    check_once(layout, _check_layout, call)
    check_writable(call, WRITTEN)
    return layout


def _check_tensors(call: SlotArguments) -> None:
    check_required(call, REQUIRED)
    check_devices(call, tensors_of, "key")


def _check_layout(call: SlotArguments) -> None:
    _check_tensors(call)
    key, slots = call.key, call.slots
    if key.dim() != 4:
        raise ValueError(f"key must be [P, Hkv, N, d], got {list(key.shape)}")
    if key.dtype not in DTYPES:
        raise TypeError(f"key must be float32, bfloat16, float16 or float64, got {key.dtype}")
    if slots.dim() != 1:
        raise ValueError(f"slots must be [T], got {list(slots.shape)}")
    if slots.dtype != torch.int64:
        raise TypeError(f"slots must be int64, got {slots.dtype}")
    pages, heads, _, head_dim = key.shape
    shapes = {
        "value": key.shape,
        "value_sum": (pages, heads, head_dim),
        "new_key": (len(slots), heads, head_dim),
        "new_value": (len(slots), heads, head_dim),
    }
    for name, shape in shapes.items():
        tensor = getattr(call, name)
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        if name == "value_sum":
            continue
        if tensor.dtype != key.dtype:
            raise TypeError(f"{name} must have key's dtype {key.dtype}, got {tensor.dtype}")
    if call.value_sum.dtype != torch.float32 and not (call.value_sum.dtype == key.dtype == torch.float64):
        raise TypeError(f"value_sum must be float32 (or float64 with float64 keys), got {call.value_sum.dtype}")
    check_index(key, call.key_components, call.key_ranges, paged=True)
    for name in ("key", "value", "value_sum"):
        tensor = getattr(call, name)
        if tensor.stride(-1) != 1 and head_dim > 1:
            raise ValueError(f"{name} must be contiguous in its last axis, got strides {tensor.stride()}")
    check_apart(call, WRITTEN)


_append_slots_op = define(
    "append_slots",
    SlotArguments,
    results=0,
    written=WRITTEN,
    default=append_slots_default,
    cpu=append_slots_cpu,
    cuda=append_slots_cuda,
    fake=append_slots_fake,
)

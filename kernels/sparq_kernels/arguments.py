"""A call of the operator as one value, which implementations read, and every mistake in it answered in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .declaration import Part, parts_of, required_tensors
from .groups import Budget, Cached, Visible
from .layout import BLOCK, check_index
from .reference import max_positions

MAX_HEAD_DIM = 512
MAX_QUERY_LENGTH = 16  # beyond, reading the whole cache once is less than reading parts of it for every query
MAX_CACHED = 2**31 - BLOCK  # kernels count positions in 32 bits
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Arguments(NamedTuple):
    """One call, in the order of the operator's schema: the query, the fields of `Cached`, `Visible` and `Budget`, and
    the options of `operator.decode`.  Shapes and meaning as there."""

    query: Tensor
    key: Tensor
    key_components: Tensor
    value: Tensor
    value_sum: Tensor
    key_ranges: Tensor | None
    block_table: Tensor | None
    length: Tensor
    start: Tensor | None
    mask: Tensor | None
    counts: Tensor | None
    r: int
    k: int
    k_divisor: int | None
    local: int | None
    mass: float | None
    k_min: int
    dense_below: int
    scale: float | None
    softcap: float | None
    mean_from: float
    return_positions: bool

    @property
    def cached(self) -> Cached:
        return Cached(*(getattr(self, name) for name in Cached._fields))

    @property
    def visible(self) -> Visible:
        return Visible(*(getattr(self, name) for name in Visible._fields))

    @property
    def budget(self) -> Budget:
        return Budget(*(getattr(self, name) for name in Budget._fields))

    @property
    def softmax_scale(self) -> float:
        return self.query.shape[3] ** -0.5 if self.scale is None else self.scale

    @property
    def capacity(self) -> int:
        """The positions a row has room for."""
        return self.key.shape[2] * (1 if self.block_table is None else self.block_table.shape[1])

    @property
    def k_max(self) -> int:
        """The largest budget a row can have."""
        return max_positions(self.capacity, self.budget)

    def layout(self) -> tuple[object, ...]:
        """All that checks and launch choices depend on: equal layouts need them once."""
        return (*layout_of(tensors_of(self)), *options_of(self))


tensors_of, options_of = parts_of(Arguments)
REQUIRED = required_tensors(Arguments)


def layout_of(tensors: Iterable[Tensor | None]) -> tuple[object, ...]:
    """Shape, strides, dtype and device of each."""
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors])


def check_tensors(call: Arguments) -> None:
    """Raise where a tensor is missing, lies elsewhere, or query and key have no shapes to speak of.  One tensor on
    `meta` is enough for the dispatcher to ask for shapes only, so that is all the checking such a call gets."""
    query, key = call.query, call.key
    check_required(call, REQUIRED)
    if query.dim() != 4:
        raise ValueError(f"query must be [B, Hq, Q, d], got {list(query.shape)}")
    if key.dim() != 4:
        raise ValueError(f"key must be [B, Hkv, S, d], got {list(key.shape)}")
    if call.block_table is not None and call.block_table.dim() != 2:
        raise ValueError(f"block_table must be [B, pages], got {list(call.block_table.shape)}")
    check_devices(call, tensors_of, "query")


def check_required(call: Any, names: Iterable[str]) -> None:
    """Raise where one of these is None: the dispatcher lets that pass for a tensor."""
    for name in names:
        if getattr(call, name) is None:
            raise TypeError(f"{name} must be a tensor, got None")


def check_devices(call: Any, tensors_of: Part, leading: str) -> None:
    """Raise where a tensor lies elsewhere than the one called `leading`."""
    device = getattr(call, leading).device
    for name, tensor in zip(tensors_of(call._fields), tensors_of(call), strict=True):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {leading}'s device {device}, got {tensor.device}")


def check_arguments(call: Arguments) -> None:
    """Raise for a shape, dtype, device, stride or option that an implementation could not survive."""
    check_tensors(call)
    query, key, key_components, value, value_sum, key_ranges, block_table, *visible = tensors_of(call)
    length, start, mask, counts = visible
    r, k, k_divisor, local, mass, k_min, dense_below, scale, softcap, mean_from, _ = options_of(call)
    batch, num_heads, query_length, head_dim = query.shape
    num_kv_heads, cached = key.shape[1], call.capacity
    if not 1 <= query_length <= MAX_QUERY_LENGTH:
        wanted = f"1 to {MAX_QUERY_LENGTH} new tokens per row"
        raise ValueError(f"query must hold {wanted}, got {query_length}; prompts are dense attention")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"query must have a head_dim of 1 to {MAX_HEAD_DIM}, got {head_dim}")
    if cached > MAX_CACHED:
        raise ValueError(f"key must hold at most {MAX_CACHED:,} positions, got {cached:,}")
    rows = batch if block_table is None else key.shape[0]
    if min(batch, rows, cached) < 1:
        raise ValueError(f"key must hold at least one row and one position, got {list(key.shape)}")
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"query heads ({num_heads}) must be a multiple of key heads ({num_kv_heads})")
    if key.shape[0] != rows or key.shape[3] != head_dim:
        raise ValueError(f"key must be [{rows}, Hkv, S, {head_dim}] to match query, got {list(key.shape)}")
    if value.shape != key.shape:
        raise ValueError(f"value must have key's shape {list(key.shape)}, got {list(value.shape)}")
    if value_sum.shape != (rows, num_kv_heads, head_dim):
        raise ValueError(f"value_sum must be [{rows}, {num_kv_heads}, {head_dim}], got {list(value_sum.shape)}")
    if block_table is not None:
        check_table(block_table, batch)
        for name, tensor in (("start", start), ("mask", mask)):
            if tensor is not None:
                raise ValueError(f"{name} must be None with a block_table: rows of pages have no padding")

    dtype = query.dtype
    if dtype not in DTYPES:
        raise TypeError(f"query must be float32, bfloat16, float16 or float64, got {dtype}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must have query's dtype {dtype}, got {tensor.dtype}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} must be contiguous in its last axis, got strides {tensor.stride()}")
    check_index(key, key_components, key_ranges, paged=block_table is not None)
    if value_sum.dtype != torch.float32 and not (value_sum.dtype == dtype == torch.float64):
        raise TypeError(f"value_sum must be float32 (or float64 with float64 inputs), got {value_sum.dtype}")

    check_per_row(batch, length=length, start=start)
    if mask is not None:
        if mask.shape != (batch, cached):
            raise ValueError(f"mask must be [{batch}, {cached}], got {list(mask.shape)}")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
    if counts is not None:
        if mask is None:
            raise ValueError("counts must be None without a mask, which they would be of")
        if counts.shape != (batch, query_length, 2):
            raise ValueError(f"counts must be [{batch}, {query_length}, 2], got {list(counts.shape)}")
        if counts.dtype != torch.int32:
            raise TypeError(f"counts must be int32, got {counts.dtype}")
        if not counts.is_contiguous():
            raise ValueError(f"counts must be contiguous, got strides {counts.stride()}")

    if not 1 <= r <= head_dim:
        raise ValueError(f"r must be 1 to head_dim ({head_dim}), got {r}")
    check_budget(k, k_divisor, local)
    check_mass(mass, k_min, k)
    if dense_below < 0:
        raise ValueError(f"dense_below must not be negative, got {dense_below}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite or None, got {scale}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be a positive number or None, got {softcap}")
    if softcap is not None and not 1e-30 <= softcap <= 1e30:
        raise ValueError(f"softcap must be 1e-30 to 1e30, which float32 arithmetic can divide by, got {softcap}")
    if not mean_from >= 0:
        raise ValueError(f"mean_value must be True, False or the least alpha it is blended in with, got {mean_from}")


def check_table(block_table: Tensor, batch: int) -> None:
    """Raise for one that is not int32 [batch, pages]."""
    if block_table.shape[0] != batch:
        raise ValueError(f"block_table must be [{batch}, pages], got {list(block_table.shape)}")
    if block_table.dtype != torch.int32:
        raise TypeError(f"block_table must be int32, got {block_table.dtype}")
    if block_table.stride(1) != 1 and block_table.shape[1] > 1:
        raise ValueError(f"block_table must be contiguous in its last axis, got strides {block_table.stride()}")


def check_per_row(batch: int, **tensors: Tensor | None) -> None:
    """Raise for one that is not int64 [batch]."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != (batch,):
            raise ValueError(f"{name} must be [{batch}], got {list(tensor.shape)}")
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {tensor.dtype}")


_passed: set[tuple[object, ...]] = set()
MAX_PASSED = 4096


def check_once(layout: tuple[object, ...], check: Callable[[Any], None], call: Any) -> None:
    """`check(call)`, unless a call of that layout has passed it: every token but the rare one repeats one."""
    if (check, layout) not in _passed:
        check(call)
        if len(_passed) >= MAX_PASSED:
            _passed.clear()
        _passed.add((check, layout))


def check_budget(k: int, k_divisor: int | None, local: int | None) -> None:
    """Raise ValueError for a number that `decode` would not take."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if k_divisor is not None and k_divisor < 1:
        raise ValueError(f"k_divisor must be at least 1 or None, got {k_divisor}")
    if local is not None and not 0 <= local <= k:
        raise ValueError(f"local must be 0 to k ({k}) or None, got {local}")


def check_mass(mass: float | None, k_min: int, k: int) -> None:
    """Raise ValueError for a number that `decode` would not take."""
    if mass is not None and not 0 < mass < 1:
        raise ValueError(f"mass must lie between 0 and 1 or be None, got {mass}")
    if not 1 <= k_min <= k:
        raise ValueError(f"k_min must be 1 to k ({k}), got {k_min}")


def check_memory(call: Any, tensors_of: Part) -> list[int]:
    """Addresses, 0 for None.  Raises for a tensor whose storage was freed under it (`storage.resize_(0)`, as FSDP does)
    or lies askew (a view of foreign bytes): whoever reads it may die, PyTorch's own operators too."""
    tensors = tensors_of(call)
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    for at, address in enumerate(addresses):
        tensor = tensors[at]
        if tensor is None or (address and not address % 16):
            continue  # no element is larger
        name, size = tensors_of(call._fields)[at], tensor.dtype.itemsize
        if address == 0 and tensor.numel():
            raise RuntimeError(f"{name} {list(tensor.shape)} has no memory: its storage has been freed")
        if address % size:
            raise ValueError(f"{name} must lie at a multiple of its element's {size} bytes, got address {address:#x}")
    return addresses


def check_writable(call: Any, written: Iterable[str]) -> None:
    """Raise for a tensor that PyTorch would not let be written: it would find that when others were written already.
    Not of the layout, so of every call."""
    in_inference_mode = torch.is_inference_mode_enabled()
    for name in written:
        tensor = getattr(call, name)
        if tensor is not None and (tensor.requires_grad or (not in_inference_mode and tensor.is_inference())):
            _check_writable(name, tensor)


def _check_writable(name: str, tensor: Tensor) -> None:
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"{name} was made in inference mode and cannot be written outside of it")
    if tensor.requires_grad and torch.is_grad_enabled():
        owner = tensor if tensor._base is None else tensor._base
        if owner.is_leaf:
            raise RuntimeError(f"{name} is a leaf that requires a gradient and cannot be written")


def check_apart(call: Any, written: Iterable[str]) -> None:
    """Raise for a tensor that is to be written and has two elements at one address."""
    for name in written:
        tensor = getattr(call, name)
        if tensor is not None and _overlaps_itself(tensor):
            raise ValueError(f"{name} is written, so its elements must not share memory; got strides {tensor.stride()}")


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may lie at one address: every axis must step over all that the finer ones span."""
    span = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= span:
                return True
            span += stride * (size - 1)
    return False


def check_rows(call: Arguments) -> None:
    """Raise for values no row can have.  On the CPU only: elsewhere reading them would stall the device, and
    implementations clamp instead."""
    length, start, block_table = call.length, call.start, call.block_table
    if min(length.tolist()) < 0 or max(length.tolist()) > call.capacity:
        raise ValueError(f"length must be 0 to the {call.capacity} cached positions, got {length.tolist()}")
    if start is not None and min(start.tolist()) < 0:
        raise ValueError(f"start must not be negative, got {start.tolist()}")
    if block_table is None:
        return
    pages, _, size, _ = call.key.shape
    for row, (entries, n) in enumerate(zip(block_table.tolist(), length.tolist(), strict=True)):
        used = entries[: -(-n // size)]
        if used and not 0 <= min(used) <= max(used) < pages:
            raise ValueError(f"block_table must name pages of 0 to {pages - 1}, got {used} in row {row}")

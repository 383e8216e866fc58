"""The public operator: one SparQ decode step, one node to the dispatcher and to torch.compile."""

from __future__ import annotations

import math
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu
from .layout import BLOCK, num_blocks
from .reference import decode_reference, max_positions

MAX_HEAD_DIM = 512
MAX_PLANS = 4096  # a growing cache brings a new layout with every token
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


_plans: dict[tuple[object, ...], cpu.Plan] = {}


class DecodeOutput(NamedTuple):
    """output: [B, Hq, 1, d] in the query's dtype.  alpha: [B, Hq, 1] float32, the approximate score mass that was
    attended.  positions: [B, Hkv, 1, k_max] int64, ascending, unused slots -1; None unless asked for."""

    output: Tensor
    alpha: Tensor
    positions: Tensor | None


def decode(
    query: Tensor,
    key: Tensor,
    key_components: Tensor,
    value: Tensor,
    value_sum: Tensor,
    *,
    length: Tensor,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    r: int,
    k: int,
    k_divisor: int | None = None,
    local: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mean_value: bool = True,
    return_positions: bool = False,
) -> DecodeOutput:
    """SparQ attention of one new token (arXiv 2312.04985, algorithm 1; the group sums the scores, not the logits).

    query: [B, Hq, 1, d], after RoPE.  Hq = G * Hkv; heads of a group are neighbours.
    key, value: [B, Hkv, S, d], S the cached positions including the new one; last axis contiguous, other strides free.
    key_components: [B, Hkv, blocks, d, BLOCK], the same keys as written by `layout.write_components`.
    value_sum: [B, Hkv, d] float32 (float64 allowed with float64 inputs), the sum of V over exactly the valid positions.
    length: int64 [B], one past each row's last cached position, at most S.
    start: int64 [B], each row's first valid position; None means 0.
    mask: bool [B, S], False excludes a position; None allows all.
    r: components of the query used to score, 1 <= r <= d.
    k: positions attended in full, the local window included.  A row with n valid positions attends
        min(n, max(k, n // k_divisor)); without k_divisor min(n, k).
    local: newest valid positions that are always attended, at most k; None means a quarter of the row's budget.
    scale: multiplies q.K; None means d ** -0.5.
    softcap: logits x become softcap * tanh(x / softcap), approximate ones too; None means no cap.
    mean_value: blend in the mean of V by the score mass left out (step 5).
    return_positions: also give the chosen positions.

    query, key, key_components and value share a dtype: float32, bfloat16, float16 (float32 arithmetic) or float64.
    Ties, of components and of positions, go to the lower index.  A row without valid positions gives zeros and alpha 1.
    Raises ValueError for a wrong shape, stride, device or range, TypeError for a wrong dtype.

    >>> from sparq_kernels import allocate_components, decode, write_components
    >>> query, key = torch.ones(1, 2, 1, 4), torch.eye(4).expand(1, 1, 4, 4)
    >>> components = allocate_components(1, 1, 4, 4, torch.float32, "cpu")
    >>> write_components(components, key, 0)
    >>> length = torch.tensor([4])
    >>> decode(query, key, components, key, key.sum(2), length=length, r=2, k=1).output.shape
    torch.Size([1, 2, 1, 4])
    """
    output, alpha, positions = _decode_op(
        query,
        key,
        key_components,
        value,
        value_sum,
        length,
        start,
        mask,
        r,
        k,
        k_divisor,
        local,
        scale,
        softcap,
        mean_value,
        return_positions,
    )
    return DecodeOutput(output, alpha, positions if return_positions else None)


def decode_default(
    query: Tensor,
    key: Tensor,
    key_components: Tensor,
    value: Tensor,
    value_sum: Tensor,
    length: Tensor,
    start: Tensor | None,
    mask: Tensor | None,
    r: int,
    k: int,
    k_divisor: int | None,
    local: int | None,
    scale: float | None,
    softcap: float | None,
    mean_value: bool,
    return_positions: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the dispatcher calls on a device without a kernel of its own: the reference."""
    check_arguments(
        query, key, key_components, value, value_sum, length, start, mask, r, k, k_divisor, local, scale, softcap
    )
    if query.device.type == "cpu":
        check_rows(length, start, key)
    return decode_reference(
        query,
        key,
        key_components,
        value,
        value_sum,
        length,
        start,
        mask,
        r=r,
        k=k,
        k_divisor=k_divisor,
        local=local,
        scale=query.shape[3] ** -0.5 if scale is None else scale,
        softcap=softcap,
        mean_value=mean_value,
        return_positions=return_positions,
    )


def decode_cpu(
    query: Tensor,
    key: Tensor,
    key_components: Tensor,
    value: Tensor,
    value_sum: Tensor,
    length: Tensor,
    start: Tensor | None,
    mask: Tensor | None,
    r: int,
    k: int,
    k_divisor: int | None,
    local: int | None,
    scale: float | None,
    softcap: float | None,
    mean_value: bool,
    return_positions: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The C++ kernel, or the reference where it does not serve: float64, or no compiler."""
    required = (query, key, key_components, value, value_sum, length)
    if NoneType in map(type, required) or query.dtype == torch.float64 or cpu.kernel() is None:
        return decode_default(
            query,
            key,
            key_components,
            value,
            value_sum,
            length,
            start,
            mask,
            r,
            k,
            k_divisor,
            local,
            scale,
            softcap,
            mean_value,
            return_positions,
        )
    # The kernel reads rows of these three; elsewhere any strides will do.
    if query.dim() == 4 and query.stride(3) != 1:
        query = query.contiguous()
    if value_sum.dim() == 3 and value_sum.stride(2) != 1:
        value_sum = value_sum.contiguous()
    if mask is not None and mask.dim() == 2 and mask.stride(1) != 1:
        mask = mask.contiguous()

    # Every layer, and every token of a static cache, repeats a layout: it is checked once.
    signature = (
        *((x.shape, x.stride(), x.dtype, x.device) for x in required),
        None if start is None else (start.shape, start.stride(), start.dtype, start.device),
        None if mask is None else (mask.shape, mask.stride(), mask.dtype, mask.device),
        (r, k, k_divisor, local, scale, softcap, mean_value, return_positions),
    )
    plan = _plans.get(signature)
    if plan is None:
        check_arguments(
            query, key, key_components, value, value_sum, length, start, mask, r, k, k_divisor, local, scale, softcap
        )
        plan = cpu.plan(
            query,
            key,
            key_components,
            value,
            value_sum,
            length,
            start,
            mask,
            r=r,
            k=k,
            k_divisor=k_divisor,
            local=local,
            scale=query.shape[3] ** -0.5 if scale is None else scale,
            softcap=softcap,
            mean_value=mean_value,
            return_positions=return_positions,
        )
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        _plans[signature] = plan
    result = cpu.run(plan, query, key, key_components, value, value_sum, length, start, mask)
    if result is None:
        check_rows(length, start, key)
        raise RuntimeError("length or start changed while the operator ran")
    return result


def decode_fake(
    query: Tensor,
    key: Tensor,
    key_components: Tensor,
    value: Tensor,
    value_sum: Tensor,
    length: Tensor,
    start: Tensor | None,
    mask: Tensor | None,
    r: int,
    k: int,
    k_divisor: int | None,
    local: int | None,
    scale: float | None,
    softcap: float | None,
    mean_value: bool,
    return_positions: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    k_max = max_positions(key.shape[2], k, k_divisor) if return_positions else 0
    return (
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        query.new_empty(query.shape[:3], dtype=torch.float32),
        query.new_empty((query.shape[0], key.shape[1], query.shape[2], k_max), dtype=torch.int64),
    )


# Registered by hand: `custom_op` wraps every call in 20 us more of Python, and a model calls once per layer and token.
# Another device's kernel is one more `torch.library.impl`.
torch.library.define(
    "sparq_kernels::decode",
    "(Tensor query, Tensor key, Tensor key_components, Tensor value, Tensor value_sum, Tensor length, Tensor? start, "
    "Tensor? mask, SymInt r, SymInt k, SymInt? k_divisor, SymInt? local, float? scale, float? softcap, "
    "bool mean_value, bool return_positions) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("sparq_kernels::decode", "default", decode_default)
torch.library.impl("sparq_kernels::decode", "cpu", decode_cpu)
torch.library.register_fake("sparq_kernels::decode", decode_fake)
_decode_op = torch.ops.sparq_kernels.decode.default  # the overload itself: resolving it costs as much as the checks


def check_arguments(
    query: Tensor,
    key: Tensor,
    key_components: Tensor,
    value: Tensor,
    value_sum: Tensor,
    length: Tensor,
    start: Tensor | None,
    mask: Tensor | None,
    r: int,
    k: int,
    k_divisor: int | None,
    local: int | None,
    scale: float | None,
    softcap: float | None,
) -> None:
    """Raise for a shape, dtype, device, stride or option that an implementation could not survive."""
    required = {"query": query, "key": key, "key_components": key_components, "value": value, "value_sum": value_sum}
    for name, tensor in {**required, "length": length}.items():
        if tensor is None:  # the dispatcher lets that pass
            raise TypeError(f"{name} must be a tensor, got None")
    if query.dim() != 4:
        raise ValueError(f"query must be [B, Hq, 1, d], got {list(query.shape)}")
    if key.dim() != 4:
        raise ValueError(f"key must be [B, Hkv, S, d], got {list(key.shape)}")
    batch, num_heads, query_length, head_dim = query.shape
    num_kv_heads, cached = key.shape[1], key.shape[2]
    if query_length != 1:
        raise ValueError(f"query must hold one new token per row, got {query_length}; prompts are dense attention")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"query must have a head_dim of 1 to {MAX_HEAD_DIM}, got {head_dim}")
    if batch < 1 or cached < 1:
        raise ValueError(f"key must hold at least one row and one position, got {list(key.shape)}")
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"query heads ({num_heads}) must be a multiple of key heads ({num_kv_heads})")
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(f"key must be [{batch}, Hkv, S, {head_dim}] to match query, got {list(key.shape)}")
    if value.shape != key.shape:
        raise ValueError(f"value must have key's shape {list(key.shape)}, got {list(value.shape)}")
    blocks = num_blocks(cached)
    stored = key_components.shape
    if len(stored) != 5 or stored[:2] != key.shape[:2] or stored[2] < blocks or stored[3:] != (head_dim, BLOCK):
        wanted = f"[{batch}, {num_kv_heads}, at least {blocks}, {head_dim}, {BLOCK}]"
        raise ValueError(f"key_components must be {wanted}, got {list(stored)}")
    if value_sum.shape != (batch, num_kv_heads, head_dim):
        raise ValueError(f"value_sum must be [{batch}, {num_kv_heads}, {head_dim}], got {list(value_sum.shape)}")

    dtype, device = query.dtype, query.device
    if dtype not in DTYPES:
        raise TypeError(f"query must be float32, bfloat16, float16 or float64, got {dtype}")
    for name, tensor in (("key", key), ("key_components", key_components), ("value", value)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must have query's dtype {dtype}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on query's device {device}, got {tensor.device}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} must be contiguous in its last axis, got strides {tensor.stride()}")
    if key_components.stride(3) != BLOCK and head_dim > 1:
        raise ValueError(f"key_components must have contiguous blocks [d, {BLOCK}], got {key_components.stride()}")
    if value_sum.dtype != torch.float32 and not (value_sum.dtype == dtype == torch.float64):
        raise TypeError(f"value_sum must be float32 (or float64 with float64 inputs), got {value_sum.dtype}")
    if value_sum.device != device:
        raise ValueError(f"value_sum must be on query's device {device}, got {value_sum.device}")

    for name, per_row in (("length", length), ("start", start)):
        if per_row is None:
            continue
        if per_row.shape != (batch,):
            raise ValueError(f"{name} must be [{batch}], got {list(per_row.shape)}")
        if per_row.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {per_row.dtype}")
        if per_row.device != device:
            raise ValueError(f"{name} must be on query's device {device}, got {per_row.device}")
    if mask is not None:
        if mask.shape != (batch, cached):
            raise ValueError(f"mask must be [{batch}, {cached}], got {list(mask.shape)}")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        if mask.device != device:
            raise ValueError(f"mask must be on query's device {device}, got {mask.device}")

    if not 1 <= r <= head_dim:
        raise ValueError(f"r must be 1 to head_dim ({head_dim}), got {r}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if k_divisor is not None and k_divisor < 1:
        raise ValueError(f"k_divisor must be at least 1 or None, got {k_divisor}")
    if local is not None and not 0 <= local <= k:
        raise ValueError(f"local must be 0 to k ({k}) or None, got {local}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite or None, got {scale}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be a positive number or None, got {softcap}")


def check_rows(length: Tensor, start: Tensor | None, key: Tensor) -> None:
    """Raise for values no row can have.  On the CPU only: elsewhere reading them would stall the device, and
    implementations clamp instead."""
    if min(length.tolist()) < 0 or max(length.tolist()) > key.shape[2]:
        raise ValueError(f"length must be 0 to the {key.shape[2]} cached positions, got {length.tolist()}")
    if start is not None and min(start.tolist()) < 0:
        raise ValueError(f"start must not be negative, got {start.tolist()}")


def backend(device: torch.device | str) -> str:
    """The implementation that serves a device: "cpp" (compiled for this CPU) or "reference" (plain PyTorch)."""
    return cpu.backend() if torch.device(device).type == "cpu" else "reference"

"""A new token's key and value into all that a cache keeps of them."""

from __future__ import annotations

import triton
import triton.language as tl

from .encoding import BLOCK_SIZE, GROUP_SIZE, encode_group
from .rows import VARYING


@triton.jit(do_not_specialize=VARYING)
def append(
    new_key,
    new_key_batch,
    new_key_head,
    new_value,
    new_value_batch,
    new_value_head,
    keys,
    keys_batch,
    keys_head,
    keys_position,
    values,
    values_batch,
    values_head,
    values_position,
    components,
    components_batch,
    components_head,
    components_block,
    value_sum,
    sum_batch,
    sum_head,
    ranges,
    ranges_batch,
    ranges_head,
    position,
    position_stride,
    offset,
    capacity,
    Hkv,
    D: tl.constexpr,
    DP: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_SUM: tl.constexpr,
    CODED: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Grid (B * Hkv,).  A position outside the storage writes nothing."""
    n = tl.program_id(0).to(tl.int64)
    b, h = n // Hkv, n % Hkv
    s = n * 0 + offset
    if HAS_POSITION:
        s += tl.load(position + b * position_stride)
    d = tl.arange(0, DP)
    if (s >= 0) & (s < capacity):
        new_key += b * new_key_batch + h * new_key_head
        k = tl.load(new_key + d, mask=d < D, other=0.0)
        v = tl.load(new_value + b * new_value_batch + h * new_value_head + d, mask=d < D, other=0.0)
        keys += b * keys_batch + h * keys_head
        tl.store(keys + s * keys_position + d, k, mask=d < D)
        tl.store(values + b * values_batch + h * values_head + s * values_position + d, v, mask=d < D)
        components += b * components_batch + h * components_head
        if CODED:
            if s % GROUP_SIZE == GROUP_SIZE - 1:
                encode_group(
                    s // GROUP_SIZE,
                    keys + (s - (GROUP_SIZE - 1)) * keys_position,
                    keys_position,
                    new_key,  # not what has just been stored: other threads may not see it yet
                    components,
                    ranges + b * ranges_batch + h * ranges_head,
                    D,
                    AT_ONCE,
                )
        else:
            block = components + (s // BLOCK_SIZE) * components_block
            tl.store(block + d * BLOCK_SIZE + s % BLOCK_SIZE, k, mask=d < D)
        if HAS_SUM:
            total = value_sum + b * sum_batch + h * sum_head + d
            tl.store(total, tl.load(total, mask=d < D, other=0.0) + v.to(value_sum.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=VARYING)
def extend_sum(
    value_sum,
    sum_batch,
    sum_head,
    summed,  # uint8, as `valid`
    summed_batch,
    values,
    values_batch,
    values_head,
    values_position,
    valid,
    valid_batch,
    length,
    length_stride,
    capacity,
    Hkv,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Grid (B * Hkv,).  A row whose newest position lies outside the storage is left alone."""
    n = tl.program_id(0).to(tl.int64)
    b, h = n // Hkv, n % Hkv
    s = tl.load(length + b * length_stride) - 1
    if (s >= 0) & (s < capacity):
        counts = tl.load(valid + b * valid_batch + s) != 0
        d = tl.arange(0, DP)
        v = tl.load(values + b * values_batch + h * values_head + s * values_position + d, mask=d < D, other=0.0)
        total = value_sum + b * sum_batch + h * sum_head + d
        # chosen, not multiplied: what does not count may be NaN
        v = tl.where(counts, v.to(tl.float32), 0.0)
        tl.store(total, tl.load(total, mask=d < D, other=0.0) + v, mask=d < D)
        if h == 0:
            tl.store(summed + b * summed_batch + s, counts.to(tl.uint8))

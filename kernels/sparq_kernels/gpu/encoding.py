"""Keys into the codes of the four-bit index, each group of positions by one program, in one pass over K."""

from __future__ import annotations

import triton
import triton.language as tl

from ..layout import BLOCK, GROUP, LEVELS
from .rows import VARYING

GROUP_SIZE = tl.constexpr(GROUP)
RUN = tl.constexpr(GROUP // 2)  # bytes of a component's codes
BLOCK_SIZE = tl.constexpr(BLOCK)
HIGHEST_CODE = tl.constexpr(float(LEVELS))
# Added to a float32 that is at least 0 and below 2^22 it leaves the nearest integer in the last bits, ties to even.
ROUNDER = tl.constexpr(1.5 * 2**23)
ENCODE_WARPS = 4
ENCODE_BYTES = 64  # of a row of K, at once: the codes of all positions are held in registers


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """The nearest number of that dtype, ties to even, as float32; x is not negative."""
    if dtype == tl.bfloat16:  # by hand: Triton's interpreter cuts off
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return bits.to(tl.float32, bitcast=True)
    return x.to(dtype).to(tl.float32)


@triton.jit
def encode_group(
    group,
    rows,  # the group's keys but for the last one
    row_stride,
    last,  # the last key
    codes,  # this KV head's [groups, D, RUN]
    ranges,  # this KV head's [groups, D, 2]
    D: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Codes and ranges as `layout.find_codes` and `layout.find_ranges` make them, bit for bit."""
    s, j = tl.arange(0, GROUP_SIZE), tl.arange(0, RUN)
    codes += group * (D * RUN)
    ranges += group * (2 * D)
    for first in range(0, D, AT_ONCE):
        c = first + tl.arange(0, AT_ONCE)
        inside = c < D
        before = (s < GROUP_SIZE - 1)[:, None] & inside[None, :]
        x = tl.load(rows + s[:, None].to(tl.int64) * row_stride + c[None, :], mask=before, other=0.0).to(tl.float32)
        newest = tl.load(last + c, mask=inside, other=0.0).to(tl.float32)
        x = tl.where((s == GROUP_SIZE - 1)[:, None], newest[None, :], x)
        finite = tl.abs(x) < float("inf")  # false for NaN
        low = tl.min(tl.where(finite, x, float("inf")), 0)
        high = tl.max(tl.where(finite, x, float("-inf")), 0)
        some = low <= high
        low, high = tl.where(some, low, 0.0), tl.where(some, high, 0.0)
        step = _rounded(tl.div_rn(high - low, tl.zeros_like(low) + HIGHEST_CODE), ranges.dtype.element_ty)
        range_of = ranges + 2 * c
        tl.store(range_of, low.to(ranges.dtype.element_ty), mask=inside)
        tl.store(range_of + 1, step.to(ranges.dtype.element_ty), mask=inside)
        inverse = tl.where(step > 0, tl.div_rn(tl.zeros_like(step) + 1.0, step), 0.0)
        code = (x - low[None, :]) * inverse[None, :]
        code = tl.where(code > 0, tl.minimum(code, HIGHEST_CODE), 0.0)  # 0 for NaN; and keeps product and sum apart
        code = (code + ROUNDER).to(tl.int32, bitcast=True) & 15
        lower, upper = tl.split(tl.permute(tl.reshape(code, [2, RUN, AT_ONCE]), (1, 2, 0)))
        packed = (lower | (upper << 4)).to(tl.uint8)
        tl.store(codes + c[None, :] * RUN + j[:, None], packed, mask=inside[None, :])


@triton.jit(do_not_specialize=VARYING)
def encode(
    keys,
    keys_batch,
    keys_head,
    keys_position,
    codes,
    codes_batch,
    codes_head,
    ranges,
    ranges_batch,
    ranges_head,
    first,  # group
    groups,
    Hkv,
    D: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Grid (B * Hkv * groups,)."""
    n = tl.program_id(0).to(tl.int64)
    b, h, group = n // groups // Hkv, n // groups % Hkv, first + n % groups
    rows = keys + b * keys_batch + h * keys_head + group * GROUP_SIZE * keys_position
    encode_group(
        group,
        rows,
        keys_position,
        rows + (GROUP_SIZE - 1) * keys_position,
        codes + b * codes_batch + h * codes_head,
        ranges + b * ranges_batch + h * ranges_head,
        D,
        AT_ONCE,
    )

"""What every kernel has to know of a batch row: which positions are valid, how many to attend, where the window begins.

Lengths, starts and masks stay on the device: nothing here is ever read back.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFO = 8  # int32 values that `score` leaves for the kernels behind it, per KV head
BEGIN, END, COUNT, BUDGET, WINDOW = (tl.constexpr(i) for i in range(5))
ABOVE, CANDIDATES = (tl.constexpr(i) for i in range(5, 7))  # of the distributed selection
INFO_SIZE = tl.constexpr(INFO)
# Arguments of kernels that change from token to token, or between the layouts of one model's rows: compiling for their
# divisors would compile in the middle of generation.
VARYING = [
    "length_stride",
    "start_stride",
    "mask_stride",
    "position_stride",
    "offset",
    "capacity",
    "S",
    "k",
    "k_divisor",
]
VARYING += ["local", "k_max", "parts", "logits_chunks"]
CHUNK = tl.constexpr(256)  # logits and keys are stored in multiples of this many positions


@triton.jit
def bounds(b, length, length_stride, start, start_stride, S, HAS_START: tl.constexpr):
    """The first position that can be valid, and one past the last; clamped, so that no value of a tensor can lead
    outside the cache."""
    end = tl.minimum(tl.maximum(tl.load(length + b * length_stride), 0), S).to(tl.int32)
    begin = end * 0
    if HAS_START:
        begin = tl.minimum(tl.maximum(tl.load(start + b * start_stride), 0), end).to(tl.int32)
    return begin, end


@triton.jit
def budget_of(count, k, k_divisor, local):
    """How many of `count` valid positions are attended, and how many of these are the newest ones."""
    by_length = tl.where(k_divisor > 0, count // tl.maximum(k_divisor, 1), 0)
    budget = tl.minimum(count, tl.maximum(k, by_length))
    window = tl.where(local < 0, budget // 4, tl.minimum(local, budget))
    return budget, window


@triton.jit
def is_valid(s, begin, end, mask, HAS_MASK: tl.constexpr):
    """bool, the shape of `s`: positions between the bounds that the row's mask, if any, allows."""
    valid = (s >= begin) & (s < end)
    if HAS_MASK:
        valid &= tl.load(mask + s, mask=valid, other=0) != 0
    return valid


@triton.jit(do_not_specialize=VARYING)
def count_masked(
    counts,  # int32 [B, 2]: valid positions, and the first one of the window
    length,
    length_stride,
    start,
    start_stride,
    mask,
    mask_stride,
    S,
    k,
    k_divisor,
    local,
    HAS_START: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program for a batch row with a mask: without one, both numbers follow from the bounds."""
    b = tl.program_id(0)
    begin, end = bounds(b, length, length_stride, start, start_stride, S, HAS_START)
    row = mask + b.to(tl.int64) * mask_stride
    o = tl.arange(0, TILE)
    count = end * 0
    for tile in range(begin, end, TILE):
        count += tl.sum(is_valid(tile + o, begin, end, row, True).to(tl.int32), 0)
    _, window = budget_of(count, k, k_divisor, local)
    # Back from the end until the window is full.
    first, found, tile_end = end, end * 0, end
    while found < window:
        s = tile_end - TILE + o
        valid = is_valid(s, begin, end, row, True).to(tl.int32)
        in_tile = tl.sum(valid, 0)
        rank = found + in_tile - tl.cumsum(valid, 0)  # valid ones that are newer
        first = tl.minimum(first, tl.min(tl.where((valid > 0) & (rank < window), s, end), 0))
        found += in_tile
        tile_end -= TILE
    tl.store(counts + 2 * b, count)
    tl.store(counts + 2 * b + 1, first)


@triton.jit
def row_info(b, counts, begin, end, k, k_divisor, local, HAS_MASK: tl.constexpr):
    """Valid positions, budget, and the first position of the window."""
    if HAS_MASK:
        count = tl.load(counts + 2 * b)
        first = tl.load(counts + 2 * b + 1)
        budget, _ = budget_of(count, k, k_divisor, local)
    else:
        count = end - begin
        budget, window = budget_of(count, k, k_divisor, local)
        first = end - window
    return count, budget, first

"""What every kernel has to know of a query: which positions it sees, how many to attend, where the window begins.

Program n of a kernel works on batch row n // (Q * Hkv), new token n // Hkv % Q and KV head n % Hkv.

Lengths, starts and masks stay on the device: nothing here is ever read back.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFO = 10  # int32 values that `score` leaves for the kernels behind it, per KV head
BEGIN, END, LATER_END, COUNT, BUDGET, LEAST, WINDOW = (tl.constexpr(i) for i in range(7))
ABOVE, CANDIDATES, PREFIX = (tl.constexpr(i) for i in range(7, 10))  # of the distributed selection
INFO_SIZE = tl.constexpr(INFO)
# Arguments of kernels that change from token to token, or between the layouts of one model's rows: compiling for their
# divisors would compile in the middle of generation.
VARYING = ["table_stride", "length_stride", "start_stride", "mask_stride", "position_stride", "offset", "capacity"]
VARYING += ["Q", "S", "k", "k_divisor", "local", "k_max", "k_min", "dense_below", "parts", "logits_chunks"]
VARYING += ["first", "groups", "pages", "slots_stride", "tokens"]
CHUNK = tl.constexpr(256)  # logits and keys are stored in multiples of this many positions


@triton.jit
def bounds(b, i, length, length_stride, start, start_stride, Q, S, HAS_START: tl.constexpr):
    """The first position that query i of batch row b can see, one past the last, and one past the last of all queries;
    clamped, so that no value of a tensor can lead outside the cache."""
    later_end = tl.minimum(tl.maximum(tl.load(length + b * length_stride), 0), S).to(tl.int32)
    end = tl.maximum(later_end - (Q - 1 - i), 0).to(tl.int32)
    begin = end * 0
    if HAS_START:
        begin = tl.minimum(tl.maximum(tl.load(start + b * start_stride), 0), end).to(tl.int32)
    return begin, end, later_end


@triton.jit
def page_of(s, end, table, pages, BLOCK: tl.constexpr):
    """The page in which position `s` of a row lies, int64, the shape of `s`; of positions from `end` on any page: what
    the row's table has behind its last one is never looked up.  Clamped, as bounds are."""
    page = tl.load(table + s // BLOCK, mask=s < end, other=0)
    return tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)


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
    counts,  # int32 [B * Q, 2]: valid positions, and the first one of the window
    length,
    length_stride,
    start,
    start_stride,
    mask,
    mask_stride,
    Q,
    S,
    k,
    k_divisor,
    local,
    HAS_START: tl.constexpr,
    COUNT_TILE: tl.constexpr,
):
    """Grid (B * Q,), for rows with a mask: without one, both numbers follow from the bounds."""
    n = tl.program_id(0)
    b = n // Q
    begin, end, _ = bounds(b, n % Q, length, length_stride, start, start_stride, Q, S, HAS_START)
    row = mask + b.to(tl.int64) * mask_stride
    o = tl.arange(0, COUNT_TILE)
    count = end * 0
    for tile in range(begin, end, COUNT_TILE):
        count += tl.sum(is_valid(tile + o, begin, end, row, True).to(tl.int32), 0)
    _, window = budget_of(count, k, k_divisor, local)
    # Back from the end until the window is full.
    first, found, tile_end = end, end * 0, end
    while found < window:
        s = tile_end - COUNT_TILE + o
        valid = is_valid(s, begin, end, row, True).to(tl.int32)
        in_tile = tl.sum(valid, 0)
        rank = found + in_tile - tl.cumsum(valid, 0)  # valid ones that are newer
        first = tl.minimum(first, tl.min(tl.where((valid > 0) & (rank < window), s, end), 0))
        found += in_tile
        tile_end -= COUNT_TILE
    tl.store(counts + 2 * n, count)
    tl.store(counts + 2 * n + 1, first)


@triton.jit
def row_info(bi, counts, begin, end, k, k_divisor, local, k_min, dense_below, HAS_MASK: tl.constexpr):
    """Valid positions, budget, the fewest that are attended whatever their mass, and the first position of the window,
    for query `bi` = b * Q + i."""
    count = end - begin
    if HAS_MASK:
        # Clamped: whoever calls may have counted something else, and no value of a tensor may lead outside the cache.
        count = tl.minimum(tl.maximum(tl.load(counts + 2 * bi), 0), count)
    is_dense = count < dense_below
    budget, window = budget_of(count, tl.where(is_dense, count, k), k_divisor, local)
    least = tl.where(is_dense, count, tl.minimum(k_min, count))
    first = end - window
    if HAS_MASK:  # counted without `dense_below`: who attends everything needs no window
        first = tl.load(counts + 2 * bi + 1)
    return count, budget, least, first

"""Tokens into pages, in two launches: their rows and components, and then what is kept of whole pages and groups."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention import add_rows
from .encoding import GROUP_SIZE, encode_group
from .rows import VARYING


@triton.jit(do_not_specialize=VARYING)
def write_slots(
    new_key,
    new_key_token,
    new_key_head,
    new_value,
    new_value_token,
    new_value_head,
    keys,
    keys_page,
    keys_head,
    keys_position,
    values,
    values_page,
    values_head,
    values_position,
    components,
    components_page,
    components_head,
    slots,
    slots_stride,
    tokens,
    pages,
    Hkv,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CODED: tl.constexpr,
):
    """Grid (parts of ROWS tokens, times Hkv).  A slot outside the storage writes nothing."""
    n = tl.program_id(0).to(tl.int64)
    h, d = n % Hkv, tl.arange(0, DP)
    t = n // Hkv * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + t * slots_stride, mask=t < tokens, other=-1)
    page, s = slot // BLOCK, slot % BLOCK
    inside = ((slot >= 0) & (page < pages))[:, None] & (d < D)[None, :]
    new_key += h * new_key_head
    k = tl.load(new_key + (t * new_key_token)[:, None] + d[None, :], mask=inside, other=0.0)
    keys += h * keys_head
    tl.store(keys + (page * keys_page + s * keys_position)[:, None] + d[None, :], k, mask=inside)
    if not CODED:
        components += h * components_head
        # A warp has the same component of tokens that mostly come one behind the other: few sectors for each store.
        place = (d * BLOCK)[:, None] + (page * components_page + s)[None, :]
        tl.store(components + place, tl.trans(k), mask=tl.trans(inside))
    new_value += h * new_value_head
    v = tl.load(new_value + (t * new_value_token)[:, None] + d[None, :], mask=inside, other=0.0)
    values += h * values_head
    tl.store(values + (page * values_page + s * values_position)[:, None] + d[None, :], v, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def complete_pages(
    keys,
    keys_page,
    keys_head,
    keys_position,
    values,
    values_page,
    values_head,
    values_position,
    components,
    components_page,
    components_head,
    value_sum,
    sum_page,
    sum_head,
    ranges,
    ranges_page,
    ranges_head,
    slots,
    slots_stride,
    pages,
    Hkv,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    CODED: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Grid (tokens * Hkv,), behind `write_slots`: the sum of V of a page whose last slot a token is in, and the codes
    of a group of which that is so."""
    n = tl.program_id(0).to(tl.int64)
    h = n % Hkv
    slot = tl.load(slots + n // Hkv * slots_stride)
    page, s = slot // BLOCK, slot % BLOCK
    if (slot >= 0) & (page < pages):
        if s == BLOCK - 1:
            rows = values + page * values_page + h * values_head
            total = add_rows(tl.zeros([ROWS, DP], tl.float32), rows, values_position, 0, BLOCK, D, STAGES)
            d = tl.arange(0, DP)
            tl.store(value_sum + page * sum_page + h * sum_head + d, tl.sum(total, 0), mask=d < D)
        if CODED:
            last = keys + page * keys_page + h * keys_head + s * keys_position
            if s % GROUP_SIZE == GROUP_SIZE - 1:
                encode_group(
                    s // GROUP_SIZE,
                    last - (GROUP_SIZE - 1) * keys_position,
                    keys_position,
                    last,
                    components + page * components_page + h * components_head,
                    ranges + page * ranges_page + h * ranges_head,
                    D,
                    AT_ONCE,
                )

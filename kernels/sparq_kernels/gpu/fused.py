"""The whole step in one kernel, one program per KV head: for many heads and short rows.

With more heads than multiprocessors nothing needs to be split, and while one program selects, another one on the same
multiprocessor reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .attention import attend, store_results, sum_of_pages, sum_of_row
from .index import approximate
from .rows import CHUNK, VARYING, bounds, row_info
from .scoring import load_group
from .selection import budget_by_mass, keys_of, store_top
from .shape import Scratch, Shape, warps_for

WIDTH = 4096  # longest row: with 8192 keys one program would fill a multiprocessor
# In 16 bits, so that two programs fit on a multiprocessor. In float32 a limit makes ptxas put hundreds of bytes
# elsewhere.
REGISTERS = 128


class Sizes(NamedTuple):
    width: int  # keys that one program holds


def serves(shape: Shape) -> bool:
    """Where there are heads enough for every multiprocessor to have two programs."""
    return shape.N >= 2 * shape.units and shape.cached <= WIDTH


def sizes(shape: Shape) -> Sizes:
    return Sizes(WIDTH)


def arguments(shape: Shape, sizes: Sizes) -> dict[str, Any]:
    """Of this kernel, besides those that all have."""
    return {"TILE": shape.tile(warps_for(sizes.width)), "WIDTH": sizes.width}


def scratch(shape: Shape, sizes: Sizes) -> Scratch:
    return {}


def launches(shape: Shape, sizes: Sizes) -> Iterator[tuple[Any, tuple[int, ...], dict[str, Any]]]:
    """Kernel, grid and options."""
    few_registers = {"maxnreg": REGISTERS} if shape.itemsize == 2 and shape.GP <= 32 and not shape.amd else {}
    yield fused, (shape.N,), {"num_warps": warps_for(sizes.width), **few_registers}


@triton.jit(do_not_specialize=VARYING)
def fused(
    query,
    query_batch,
    query_head,
    query_position,
    key,
    key_batch,
    key_head,
    key_position,
    components,
    components_batch,
    components_head,
    components_block,
    ranges,
    ranges_batch,
    ranges_head,
    value,
    value_batch,
    value_head,
    value_position,
    value_sum,
    sum_batch,
    sum_head,
    table,
    table_stride,
    length,
    length_stride,
    start,
    start_stride,
    mask,
    mask_stride,
    counts,
    logits,
    positions,
    output,
    alpha_out,
    lse_out,
    read,
    Hkv,
    Q,
    S,
    k,
    k_divisor,
    local,
    k_max,
    k_min,
    dense_below,
    pages,
    logits_chunks,
    mass,
    scale,
    softcap,
    mean_from,
    G: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    RP: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
    CODED: tl.constexpr,
    CODE_DOT: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGED: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_MASS: tl.constexpr,
    MEAN_VALUE: tl.constexpr,
):
    """Grid (N = B * Q * Hkv,): rows of at most WIDTH positions."""
    n = tl.program_id(0).to(tl.int64)
    b, i, h = n // (Hkv * Q), n // Hkv % Q, n % Hkv
    begin, end, later_end = bounds(b, i, length, length_stride, start, start_stride, Q, S, HAS_START)
    count, budget, least, window = row_info(
        n // Hkv, counts, begin, end, k, k_divisor, local, k_min, dense_below, HAS_MASK
    )
    logits_stride = logits_chunks * CHUNK
    logits += n * G * logits_stride
    positions += n * k_max
    mask += b * mask_stride
    table += b * table_stride
    group = query + b * query_batch + h * (G * query_head) + i * query_position
    stored = b * 0 if PAGED else b  # pages are of all rows
    key += stored * key_batch + h * key_head
    value += stored * value_batch + h * value_head
    value_sum += stored * sum_batch + h * sum_head
    q = load_group(group, query_head, G, D, GP, DP)
    highest, total = approximate(
        q,
        group,
        query_head,
        key,
        key_position,
        key_batch,
        components + stored * components_batch + h * components_head,
        components_batch if PAGED else components_block,
        ranges + stored * ranges_batch + h * ranges_head,
        ranges_batch,
        logits,
        logits_stride,
        table,
        pages,
        mask,
        begin,
        end,
        begin // TILE,
        tl.cdiv(end, TILE),
        scale,
        softcap,
        G,
        D,
        R,
        GP,
        DP,
        RP,
        TILE,
        STAGES,
        DOT,
        CODED,
        CODE_DOT,
        BLOCK,
        PAGED,
        HAS_MASK,
        HAS_SOFTCAP,
    )
    M = tl.where(highest == float("-inf"), 0.0, highest)
    inverse = 1 / total
    tl.debug_barrier()  # logits are read by other threads than wrote them
    s = tl.arange(0, WIDTH)
    key_bits, in_window = keys_of(
        logits, logits_stride, s, begin, end, window, mask, M, inverse, G, GP, WIDTH, HAS_MASK
    )
    if HAS_MASS:
        budget = budget_by_mass(key_bits, in_window, budget, least, mass, 0, 0, G, False)
    store_top(key_bits, s, budget, positions)
    tl.debug_barrier()
    highest, total, alpha, y = attend(
        q,
        key,
        key_position,
        key_batch,
        value,
        value_position,
        value_batch,
        table,
        pages,
        logits,
        logits_stride,
        positions,
        budget * 0,
        budget,
        end,
        M,
        inverse,
        scale,
        softcap,
        G,
        D,
        GP,
        DP,
        ROWS,
        STAGES,
        DOT,
        BLOCK,
        PAGED,
        HAS_MASK,
        HAS_SOFTCAP,
    )
    if PAGED:
        values = sum_of_pages(
            value_sum,
            sum_batch,
            value,
            value_position,
            value_batch,
            table,
            pages,
            tl.where(budget < count, end, 0),
            0,
            D,
            DP,
            ROWS,
            1,
            STAGES,
            BLOCK,
        )
    else:
        values = sum_of_row(value_sum, value, value_position, mask, end, later_end, D, DP, HAS_MASK)
    first_result = (b * Hkv + h) * G * Q + i
    store_results(
        y / total[:, None],
        alpha,
        highest + tl.log2(total),
        values,
        count,
        budget,
        output + first_result * D,
        alpha_out + first_result,
        lse_out + first_result,
        read + (b * Hkv + h) * Q + i,
        Q,
        mean_from,
        D,
        G,
        MEAN_VALUE,
    )

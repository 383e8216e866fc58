"""Step 2 with either index, and the kernel that makes the approximate logits of a head's positions in parts."""

from __future__ import annotations

import triton
import triton.language as tl

from .coded import score_coded
from .rows import BEGIN, BUDGET, CHUNK, COUNT, END, INFO_SIZE, LATER_END, LEAST, VARYING, WINDOW, bounds, row_info
from .scoring import load_group, score_tiles


@triton.jit
def approximate(
    q,
    query,
    head_stride,
    key,
    key_stride,
    key_page,
    components,
    block_stride,
    ranges,
    ranges_page,
    logits,
    logits_stride,
    table,
    pages,
    mask,
    begin,
    end,
    first,
    last,
    scale,
    softcap,
    G: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    RP: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
    CODED: tl.constexpr,
    CODE_DOT: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Logits, maximum and sum of exponentials as of `scoring.score_tiles` and `coded.score_coded`."""
    # Triton shares the stages of a loop among loads that wait for each other. A tile that waits for its page is to be
    # as far ahead as one that need not.
    AHEAD: tl.constexpr = 2 * STAGES - 1 if PAGED else STAGES
    if CODED:
        highest, total = score_coded(
            q,
            query,
            head_stride,
            key,
            key_stride,
            key_page,
            components,
            block_stride,
            ranges,
            ranges_page,
            logits,
            logits_stride,
            table,
            pages,
            mask,
            begin,
            end,
            first,
            last,
            scale,
            softcap,
            G,
            D,
            R,
            GP,
            DP,
            RP,
            AHEAD,
            DOT,
            CODE_DOT,
            BLOCK,
            PAGED,
            HAS_MASK,
            HAS_SOFTCAP,
        )
    else:
        highest, total = score_tiles(
            q,
            query,
            head_stride,
            components,
            block_stride,
            logits,
            logits_stride,
            table,
            pages,
            mask,
            begin,
            end,
            first,
            last,
            scale,
            softcap,
            G,
            D,
            R,
            GP,
            DP,
            RP,
            TILE,
            AHEAD,
            DOT,
            BLOCK,
            PAGED,
            HAS_MASK,
            HAS_SOFTCAP,
        )
    return highest, total


@triton.jit(do_not_specialize=VARYING)
def score(
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
    table,
    table_stride,
    length,
    length_stride,
    start,
    start_stride,
    mask,
    mask_stride,
    counts,
    logits,  # float32 [N, G, logits_chunks * CHUNK]
    stats,  # float32 [N, 2, G, SPLITS]: each split's maximum and sum
    info,  # int32 [N, INFO]
    ticket,  # int32 [N], set to 0 for `gather`
    Hkv,
    Q,
    S,
    k,
    k_divisor,
    local,
    k_min,
    dense_below,
    pages,
    logits_chunks,
    scale,
    softcap,
    G: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    RP: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
    CODED: tl.constexpr,
    CODE_DOT: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGED: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Grid (N = B * Q * Hkv, SPLITS): each program scores an equal share of the row's tiles."""
    n = tl.program_id(0)
    split = tl.program_id(1)
    bi = n // Hkv
    b, i, h = (bi // Q).to(tl.int64), (bi % Q).to(tl.int64), (n % Hkv).to(tl.int64)
    begin, end, later_end = bounds(b, i, length, length_stride, start, start_stride, Q, S, HAS_START)
    if split == 0:
        count, budget, least, window = row_info(
            bi, counts, begin, end, k, k_divisor, local, k_min, dense_below, HAS_MASK
        )
        base = info + n * INFO_SIZE
        tl.store(base + BEGIN, begin)
        tl.store(base + END, end)
        tl.store(base + LATER_END, later_end)
        tl.store(base + COUNT, count)
        tl.store(base + BUDGET, budget)
        tl.store(base + LEAST, least)
        tl.store(base + WINDOW, window)
        tl.store(ticket + n, 0)
    group = query + b * query_batch + h * (G * query_head) + i * query_position
    first_tile = begin // TILE
    share = tl.cdiv(tl.cdiv(end, TILE) - first_tile, SPLITS)
    first = first_tile + split * share
    last = tl.minimum(first + share, tl.cdiv(end, TILE))
    highest = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    if first < last:
        q = load_group(group, query_head, G, D, GP, DP)
        stored = b * 0 if PAGED else b  # pages are of all rows
        highest, total = approximate(
            q,
            group,
            query_head,
            key + stored * key_batch + h * key_head,
            key_position,
            key_batch,
            components + stored * components_batch + h * components_head,
            components_batch if PAGED else components_block,
            ranges + stored * ranges_batch + h * ranges_head,
            ranges_batch,
            logits + n.to(tl.int64) * (G * logits_chunks * CHUNK),
            logits_chunks * CHUNK,
            table + b * table_stride,
            pages,
            mask + b * mask_stride,
            begin,
            end,
            first,
            last,
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
    g = tl.arange(0, GP)
    here = stats + n.to(tl.int64) * (2 * G * SPLITS) + g * SPLITS + split
    tl.store(here, highest, mask=g < G)
    tl.store(here + G * SPLITS, total, mask=g < G)

"""Steps 1 and 2: the query's largest components, and approximate logits for every position from these alone."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import is_valid, page_of
from .topk import NAN_BITS, NEVER

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST_LOGIT = tl.constexpr(-3.0e38)  # stands for -inf where differences are formed
COMPARED = tl.constexpr(16384)  # pairs of components at once
COMPONENTS_AT_ONCE = tl.constexpr(8)  # of a single query: loads in flight
LANE_LOGITS = tl.constexpr(4)  # that a thread has side by side, or more, of a single query
LANES = tl.constexpr(64)  # rows of the smallest product of four warps


@triton.jit
def load_group(query, head_stride, G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr):
    """The queries of one KV head, [GP, DP], zero where padded."""
    g, d = tl.arange(0, GP), tl.arange(0, DP)
    return tl.load(query + g[:, None] * head_stride + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def choose_components(q, D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, DP: tl.constexpr):
    """The r components with the largest sum of magnitudes, largest first [RP] (0 where padded), and tau [GP].

    Each one is compared with all others: a search would be a chain of reductions, and every program of `score` waits
    for it before it can read anything.
    """
    magnitude = tl.abs(q.to(tl.float32))
    AT_ONCE: tl.constexpr = min(DP, COMPARED // DP)
    d, some = tl.arange(0, DP), tl.arange(0, AT_ONCE)
    total = tl.sum(magnitude, 0)
    key = tl.where(total == total, total.to(tl.int32, bitcast=True), NAN_BITS)
    key = tl.where(d < D, key, NEVER - d)
    rank = tl.zeros([DP], tl.int32)
    for first in range(0, DP, AT_ONCE):
        other = first + some
        others = key if AT_ONCE == DP else tl.gather(key, other, 0)
        # Of two that are equal the earlier goes before.
        before = others[:, None] + (other[:, None] < d[None, :]).to(tl.int32) > key[None, :]
        rank += tl.sum(before.to(tl.int32), 0)
    slot = tl.arange(0, RP)
    chosen = (rank[None, :] == slot[:, None]) & (slot < R)[:, None]
    component = tl.sum(tl.where(chosen, d[None, :], 0), 1)
    tau = tl.sqrt(tl.sum(tl.where((rank < R)[None, :], magnitude, 0.0), 1) / tl.sum(magnitude, 1))
    return component, tl.where(tau > 0, tau, 1.0)  # an all-zero query divides 0 by 0


@triton.jit
def soften(x, softcap, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh(x / softcap), in base-2 units behind it either way."""
    if HAS_SOFTCAP:
        t = tl.exp2(tl.abs(x) * (-2 * LOG2E / softcap))
        tanh = (1 - t) / (1 + t)
        x = tl.where(x < 0, -tanh, tanh) * softcap
    return x * LOG2E


@triton.jit
def include(x, axis: tl.constexpr, highest, total):
    """Logits x, of which each lane has some along `axis`, in its maximum and its sum of exponentials relative to it."""
    new = tl.maximum(highest, tl.max(x, axis))
    total = total * tl.exp2(highest - new) + tl.sum(tl.exp2(x - tl.expand_dims(new, axis)), axis)
    return new, total


@triton.jit
def combine(highest, total):
    """Maximum (-inf if no logit was above the lowest) and sum of exponentials over the first axis."""
    M = tl.max(highest, 0)
    total = tl.sum(total * tl.exp2(highest - tl.expand_dims(M, 0)), 0)
    return tl.where(M > LOWEST_LOGIT, M, float("-inf")), total


@triton.jit
def score_tiles(
    q,  # [GP, DP]
    query,
    head_stride,
    components,  # this KV head's [blocks, D, BLOCK]: of its row or, where it has a table, of all rows
    block_stride,
    logits,  # this KV head's [G, logits_stride] float32, written from tile `first` to `last`
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
    BLOCK: tl.constexpr,
    PAGED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Base-2 logits of the tiles, and their maximum and sum of exponentials [GP].

    Maximum and sum are kept apart for each lane and brought together behind the loop: within it, nothing goes from
    thread to thread but the operands of the matrix product.
    """
    component, tau = choose_components(q, D, R, RP, DP)
    factor = scale / tau
    g, j = tl.arange(0, GP), tl.arange(0, RP)
    if GP == 1:
        # One query: a thread has the same positions of all components, so that their sum stays in it. A tile may be
        # several pages, each a row of it: components are then loaded one by one, for of two axes besides that of
        # positions Triton may share either among threads.
        RUN: tl.constexpr = min(TILE, BLOCK)
        AT_ONCE: tl.constexpr = COMPONENTS_AT_ONCE if RUN == TILE else 1
        factor = tl.sum(factor, 0)
        if AT_ONCE == 1:  # the same numbers, but held so that one of them is had without a barrier
            component = tl.gather(component, j, 0)
        q_c = tl.load(query + component, mask=j < R, other=0.0).to(tl.float32)
        some, o = tl.arange(0, AT_ONCE), tl.arange(0, RUN)
        each = tl.arange(0, TILE // RUN) * RUN
        highest = tl.full([TILE // LANE_LOGITS], LOWEST_LOGIT, tl.float32)
        total = tl.zeros([TILE // LANE_LOGITS], tl.float32)
        if PAGED:  # looked up one tile ahead
            page = page_of(first * TILE + each, end, table, pages, BLOCK)
        for tile in range(first, last):
            position = tile * TILE
            within = tl.multiple_of(position % BLOCK, RUN)  # older Tritons do not see it
            block = page if PAGED else (position // BLOCK + each * 0).to(tl.int64)
            runs = components + (block * block_stride + within)[:, None] + o[None, :]
            x = tl.zeros([TILE // RUN, RUN], tl.float32)
            for next_j in tl.range(0, RP, AT_ONCE, loop_unroll_factor=COMPONENTS_AT_ONCE // AT_ONCE):
                those = tl.gather(component, next_j + some, 0) * BLOCK
                # Never masked by position: storage is padded to whole blocks, and a mask would make these 2-byte loads.
                k_c = tl.load(runs[None, :, :] + those[:, None, None]).to(tl.float32)
                if RP > R:  # padded ones read the first component, which may be infinite
                    k_c = tl.where((next_j + some < R)[:, None, None], k_c, 0.0)
                x += tl.sum(tl.gather(q_c, next_j + some, 0)[:, None, None] * k_c, 0)
            x = soften(x * factor, softcap, HAS_SOFTCAP)
            s = (position + each)[:, None] + o[None, :]
            x = tl.where(is_valid(s, begin, end, mask, HAS_MASK), x, float("-inf"))
            tl.store(logits + s, x, mask=s < logits_stride)  # a tile may be wider than what storage is rounded up to
            highest, total = include(tl.reshape(x, [TILE // LANE_LOGITS, LANE_LOGITS]), 1, highest, total)
            if PAGED:
                page = page_of(position + TILE + each, end, table, pages, BLOCK)
        highest, total = combine(highest[:, None], total[:, None])
    else:
        # Positions are the rows of the product: its padding is in the columns, and half of that is dropped.
        GN: tl.constexpr = GP // 2 if G <= GP // 2 else GP
        of_group = query + g[None, :] * head_stride + component[:, None]
        q_c = tl.load(of_group, mask=(g < G)[None, :] & (j < R)[:, None], other=0.0)
        factor = tl.gather(factor, tl.arange(0, GN), 0)
        # The same numbers, but held as the loads want them: otherwise the pointers are rearranged again for every tile.
        component = tl.gather(component, j, 0)
        n, o = tl.arange(0, GN), tl.arange(0, TILE)
        runs = components + component[:, None] * BLOCK + o[None, :]
        highest = tl.full([LANES, GN], LOWEST_LOGIT, tl.float32)
        total = tl.zeros([LANES, GN], tl.float32)
        for tile in tl.range(first, last, num_stages=STAGES):
            position = tile * TILE
            within = tl.multiple_of(position % BLOCK, TILE)
            block = page_of(position, end, table, pages, BLOCK) if PAGED else (position // BLOCK).to(tl.int64)
            offset = block * block_stride + within
            k_c = tl.load(runs + offset) if R == RP else tl.load(runs + offset, mask=(j < R)[:, None], other=0.0)
            x = tl.dot(tl.trans(k_c.to(DOT)), q_c.to(DOT), input_precision="ieee")
            if GN < GP:
                x, _ = tl.split(tl.permute(tl.reshape(x, [TILE, 2, GN]), (0, 2, 1)))
            x = soften(x * factor[None, :], softcap, HAS_SOFTCAP)
            s = position + o
            x = tl.where(is_valid(s, begin, end, mask, HAS_MASK)[:, None], x, float("-inf"))
            tl.store(logits + n[None, :] * logits_stride + s[:, None], x, mask=(n < G)[None, :])
            highest, total = include(tl.reshape(x, [TILE // LANES, LANES, GN]), 0, highest, total)
        highest, total = combine(highest, total)
        if GN < GP:  # what is in the padding matters to nobody
            highest, total = tl.gather(highest, g % GN, 0), tl.gather(total, g % GN, 0)
    return highest, total

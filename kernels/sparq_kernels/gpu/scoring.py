"""Steps 1 and 2: the query's largest components, and approximate logits for every position from these alone."""

from __future__ import annotations

import triton
import triton.language as tl

from ..layout import BLOCK
from .rows import BEGIN, BUDGET, CHUNK, COUNT, END, INFO_SIZE, LATER_END, VARYING, WINDOW, bounds, is_valid, row_info
from .topk import NAN_BITS, NEVER, top

LOG2E = tl.constexpr(1.4426950408889634)
BLOCK_SIZE = tl.constexpr(BLOCK)


@triton.jit
def load_group(query, head_stride, G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr):
    """The queries of one KV head, [GP, DP], zero where padded."""
    g, d = tl.arange(0, GP), tl.arange(0, DP)
    return tl.load(query + g[:, None] * head_stride + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def choose_components(q, D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, DP: tl.constexpr):
    """The r components with the largest sum of magnitudes, ascending [RP] (0 where padded), and tau [GP]."""
    magnitude = tl.abs(q.to(tl.float32))
    d = tl.arange(0, DP)
    total = tl.sum(magnitude, 0)
    key = tl.where(total == total, total.to(tl.int32, bitcast=True), NAN_BITS)
    chosen, slot = top(tl.where(d < D, key, NEVER), R)
    one_hot = (slot[None, :] == tl.arange(0, RP)[:, None]) & chosen[None, :]
    component = tl.sum(tl.where(one_hot, d[None, :], 0), 1)
    tau = tl.sqrt(tl.sum(tl.where(chosen[None, :], magnitude, 0.0), 1) / tl.sum(magnitude, 1))
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
def score_tiles(
    q,  # [GP, DP]
    query,
    head_stride,
    components,  # this KV head's [blocks, D, BLOCK]
    block_stride,
    logits,  # this KV head's [G, logits_stride] float32, written from tile `first` to `last`
    logits_stride,
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
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Base-2 logits of the tiles, and their running maximum and sum of exponentials [GP]."""
    component, tau = choose_components(q, D, R, RP, DP)
    g, j, o = tl.arange(0, GP), tl.arange(0, RP), tl.arange(0, TILE)
    in_group = (g < G)[:, None]
    q_c = tl.load(query + g[:, None] * head_stride + component[None, :], mask=in_group & (j < R)[None, :], other=0.0)
    factor = (scale / tau)[:, None]
    # The same numbers, but held as the loads want them: otherwise the pointers are rearranged again for every tile.
    component = tl.gather(component, j, 0)
    runs = components + component[:, None] * BLOCK_SIZE + o[None, :]
    highest = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        position = tile * TILE
        within = tl.multiple_of(position % BLOCK_SIZE, TILE)  # older Tritons do not see it
        offset = (position // BLOCK_SIZE).to(tl.int64) * block_stride + within
        # Never masked by position: storage is padded to whole blocks, and a mask would make 2-byte loads of these.
        k_c = tl.load(runs + offset) if R == RP else tl.load(runs + offset, mask=(j < R)[:, None], other=0.0)
        if GP == 1:
            x = tl.sum(tl.trans(q_c).to(tl.float32) * k_c.to(tl.float32), 0)[None, :]
        else:
            x = tl.dot(q_c.to(DOT), k_c.to(DOT), input_precision="ieee")
        x = soften(x * factor, softcap, HAS_SOFTCAP)
        s = position + o
        x = tl.where(is_valid(s, begin, end, mask, HAS_MASK)[None, :], x, float("-inf"))
        tl.store(logits + g[:, None] * logits_stride + s[None, :], x, mask=in_group)
        new = tl.maximum(highest, tl.max(x, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # nothing valid yet: -inf - -inf would be NaN
        total = total * tl.exp2(highest - safe) + tl.sum(tl.exp2(x - safe[:, None]), 1)
        highest = new
    return highest, total


@triton.jit(do_not_specialize=VARYING)
def score(
    query,
    query_batch,
    query_head,
    query_position,
    components,
    components_batch,
    components_head,
    components_block,
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
        count, budget, window = row_info(bi, counts, begin, end, k, k_divisor, local, HAS_MASK)
        base = info + n * INFO_SIZE
        tl.store(base + BEGIN, begin)
        tl.store(base + END, end)
        tl.store(base + LATER_END, later_end)
        tl.store(base + COUNT, count)
        tl.store(base + BUDGET, budget)
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
        highest, total = score_tiles(
            q,
            group,
            query_head,
            components + b * components_batch + h * components_head,
            components_block,
            logits + n.to(tl.int64) * (G * logits_chunks * CHUNK),
            logits_chunks * CHUNK,
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
            HAS_MASK,
            HAS_SOFTCAP,
        )
    g = tl.arange(0, GP)
    here = stats + n.to(tl.int64) * (2 * G * SPLITS) + g * SPLITS + split
    tl.store(here, highest, mask=g < G)
    tl.store(here + G * SPLITS, total, mask=g < G)

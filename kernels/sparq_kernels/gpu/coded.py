"""Step 2 with the four-bit index: approximate logits of whole groups of positions from codes, of the last one from K.

With w = query * step of a component, a logit is

    sum of query * lo  +  sum of w * code  =  sum of (query * lo - 16 w)  +  sum of w * (16 + code).

The first sum is one number for each query and group.  The second is a matrix product: 16 + code is a bfloat16 whose last
bits are the code, so that nothing need be converted.  w becomes two numbers of eight digits, w = upper + lower, of each
of which there is a product; the first sum takes w to be what they are together.

So a logit is off by at most 31 sum |w - upper - lower| <= 31 * 2^-17 sum |w|, a hundredth of a step of each component,
and the rounding of float32 sums.  bfloat16 has float32's range: no step is too small or too large.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .encoding import BLOCK_GROUPS, GROUP_SIZE, RUN, RUN_STRIDE
from .rows import is_valid
from .scoring import LANES, LOWEST_LOGIT, choose_components, combine, include, soften

PRODUCT = tl.constexpr(8192)  # logits of a product, or less


@triton.jit
def keep_logits(
    x,  # [positions, GN]
    s,  # [positions]
    factor,
    logits,
    logits_stride,
    mask,
    begin,
    end,
    softcap,
    highest,
    total,
    G: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Products into logits, which are stored, and their part of the maximum and sum of each of LANES lanes."""
    T: tl.constexpr = x.shape[0]
    GN: tl.constexpr = x.shape[1]
    n = tl.arange(0, GN)
    x = soften(x * factor[None, :], softcap, HAS_SOFTCAP)
    x = tl.where(is_valid(s, begin, end, mask, HAS_MASK)[:, None], x, float("-inf"))
    tl.store(logits + n[None, :] * logits_stride + s[:, None], x, mask=(n < G)[None, :])
    return include(tl.reshape(x, [T // LANES, LANES, GN]), 0, highest, total)


@triton.jit
def load_range(range_of, group, j, D: tl.constexpr, R: tl.constexpr):
    """Least value and step of each chosen component in a group of positions."""
    range_of += group * (2 * D)
    low = tl.load(range_of, mask=j < R, other=0.0).to(tl.float32)
    return low, tl.load(range_of + 1, mask=j < R, other=0.0).to(tl.float32)


@triton.jit
def score_coded(
    q,  # [GP, DP]
    query,
    head_stride,
    key,  # this KV head's rows [S, D]
    key_stride,
    codes,  # this KV head's [blocks, D, BLOCK / 2]
    block_stride,
    ranges,  # this KV head's [groups, D, 2]
    logits,
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
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
    CODE_DOT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """As `scoring.score_tiles`, of tiles that are groups of positions; those from `end` // GROUP on are not coded."""
    component, tau = choose_components(q, D, R, RP, DP)
    GN: tl.constexpr = 1 if G == 1 else max(8, triton.next_power_of_2(G))
    N: tl.constexpr = max(16, 2 * GN)  # columns: the upper parts of GN weights, the lower ones, and zeros
    T: tl.constexpr = max(LANES, min(RUN, PRODUCT // N))  # bytes at once
    PIECES: tl.constexpr = RUN // T
    g, j, n = tl.arange(0, GP), tl.arange(0, RP), tl.arange(0, N)
    part = n // GN
    factor = tl.gather(scale / tau, tl.arange(0, GN), 0)
    of_group = query + (n % GN)[None, :] * head_stride + component[:, None]
    in_group = ((n % GN < G) & (part < 2))[None, :] & (j < R)[:, None]
    q_c = tl.load(of_group, mask=in_group, other=0.0)
    component = tl.gather(component, j, 0)  # the same numbers, but held as the loads want them
    highest = tl.full([LANES, GN], LOWEST_LOGIT, tl.float32)
    total = tl.zeros([LANES, GN], tl.float32)

    whole = tl.minimum(last, end // GROUP_SIZE)
    runs = codes.to(tl.pointer_type(tl.int32), bitcast=True)
    runs += component[:, None] * (RUN_STRIDE // 4) + tl.arange(0, T // 4)[None, :]
    o = tl.arange(0, T)
    o = (o & -4) + (o & 1) * 2 + (o >> 1 & 1)
    range_of = ranges + component * 2
    low, step = load_range(range_of, first, j, D, R)
    for piece in tl.range(first * PIECES, whole * PIECES, num_stages=STAGES):
        group = piece // PIECES
        place, block = (piece - group * PIECES) * T, group // BLOCK_GROUPS
        within = tl.multiple_of((group - block * BLOCK_GROUPS) * RUN + place, T)
        packed = tl.load(runs + (block.to(tl.int64) * (block_stride // 4) + within // 4))
        next_low, next_step = load_range(range_of, tl.minimum((piece + 1) // PIECES, whole - 1), j, D, R)
        w = q_c.to(tl.float32) * step[:, None]
        upper = w.to(CODE_DOT).to(tl.float32)
        lower = (w - upper).to(CODE_DOT).to(tl.float32)
        w = tl.where((part == 0)[None, :], upper, lower)
        base = tl.sum(tl.where((part == 0)[None, :], q_c.to(tl.float32) * low[:, None], 0.0) - 16 * w, 0)
        for half in tl.static_range(2):
            even = packed << 3 if half == 0 else packed >> 1
            odd = packed >> 5 if half == 0 else packed >> 9
            pairs = tl.join(even, odd) & 0x780078 | 0x41804180
            code = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)).to(tl.bfloat16, bitcast=True)
            code = tl.trans(tl.reshape(code, [RP, T]).to(CODE_DOT))
            x = tl.dot(code, w.to(CODE_DOT)) + base[None, :]
            x = tl.sum(tl.reshape(x, [T, N // GN, GN]), 1)
            s = group * GROUP_SIZE + half * RUN + place + o
            highest, total = keep_logits(
                x,
                s,
                factor,
                logits,
                logits_stride,
                mask,
                begin,
                end,
                softcap,
                highest,
                total,
                G,
                HAS_MASK,
                HAS_SOFTCAP,
            )
        low, step = next_low, next_step

    rest = tl.minimum(end, last * GROUP_SIZE)  # nothing, where another program has the last group
    o = tl.arange(0, LANES)
    rows = key + component[:, None]
    for position in range(tl.maximum(whole, first) * GROUP_SIZE, rest, LANES):
        s = position + o
        there = (j < R)[:, None] & (s < end)[None, :]
        k_c = tl.load(rows + s[None, :].to(tl.int64) * key_stride, mask=there, other=0.0)
        x = tl.dot(tl.trans(k_c.to(DOT)), tl.where((part == 0)[None, :], q_c, 0.0).to(DOT), input_precision="ieee")
        x = tl.sum(tl.reshape(x, [LANES, N // GN, GN]), 1)
        highest, total = keep_logits(
            x,
            s,
            factor,
            logits,
            logits_stride,
            mask,
            begin,
            end,
            softcap,
            highest,
            total,
            G,
            HAS_MASK,
            HAS_SOFTCAP,
        )
    highest, total = combine(highest, total)
    if GN < GP:  # what is in the padding matters to nobody
        highest, total = tl.gather(highest, g % GN, 0), tl.gather(total, g % GN, 0)
    return highest, total

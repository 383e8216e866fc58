"""Step 2 with the four-bit index: approximate logits of whole groups of positions from codes, of the last one from K.

With w = query * step of a component, a logit is

    sum of query * lo  +  sum of w * code  =  sum of (query * lo - 16 w)  +  sum of w * (16 + code).

The first sum is one number for each query and group.  The second is a matrix product: 16 + code is a bfloat16 whose
last bits are the code, so that nothing need be converted.  A weight becomes two bfloat16 with a column each, w = upper
+ lower, and both sums take it to be what these are together.  So a logit is off by at most

    15 sum of |w - upper - lower|  <=  15 * 2^-16 sum of |w|

and the rounding of float32 sums.  bfloat16 has float32's range: no step is too small or too large for it.  Of groups of
more than 32 queries, whose products fill the registers, w is `upper` alone, and what that loses at the middle of the
codes is added to the first sum: a logit is off by at most 7.5 * 2^-8 sum of |w|, as with weights of eight bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..layout import LEVELS
from .encoding import GROUP_SIZE, RUN
from .rows import is_valid, page_of
from .scoring import LANES, LOWEST_LOGIT, choose_components, combine, include, soften

MIDDLE = tl.constexpr(LEVELS / 2)  # of the codes
SPLIT_GROUP = tl.constexpr(32)
PRODUCT = tl.constexpr(4096)  # logits of a product, where groups are small


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
def load_range(
    range_of,
    ranges_page,
    group,
    end,
    table,
    pages,
    j,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGED: tl.constexpr,
):
    """Least value and step of each chosen component in a group of positions."""
    if PAGED:
        page = page_of(group * GROUP_SIZE, end, table, pages, BLOCK)
        range_of += page * ranges_page + group % (BLOCK // GROUP_SIZE) * (2 * D)
    else:
        range_of += group * (2 * D)
    low = tl.load(range_of, mask=j < R, other=0.0).to(tl.float32)
    return low, tl.load(range_of + 1, mask=j < R, other=0.0).to(tl.float32)


@triton.jit
def score_coded(
    q,  # [GP, DP]
    query,
    head_stride,
    key,  # this KV head's rows [S, D] or, where it has a table, pages of rows
    key_stride,
    key_page,
    codes,  # this KV head's [groups, D, RUN], or pages
    codes_page,
    ranges,  # this KV head's [groups, D, 2], or pages
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
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
    CODE_DOT: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """As `scoring.score_tiles`, of tiles that are groups of positions; those from `end` // GROUP on are not coded."""
    component, tau = choose_components(q, D, R, RP, DP)
    GN: tl.constexpr = 1 if G == 1 else max(8, triton.next_power_of_2(G))
    PARTS: tl.constexpr = 2 if GN <= SPLIT_GROUP else 1
    N: tl.constexpr = max(16, PARTS * GN)  # columns: the upper parts of GN weights, the lower ones, and zeros
    P: tl.constexpr = max(LANES, min(GROUP_SIZE, PRODUCT // N))  # positions at once
    T: tl.constexpr = P // 2  # bytes of these
    PIECES: tl.constexpr = GROUP_SIZE // P
    BLOCK_GROUPS: tl.constexpr = BLOCK // GROUP_SIZE
    g, j, n = tl.arange(0, GP), tl.arange(0, RP), tl.arange(0, N)
    part = n // GN
    factor = tl.gather(scale / tau, tl.arange(0, GN), 0)
    of_group = query + (n % GN)[None, :] * head_stride + component[:, None]
    in_group = ((n % GN < G) & (part < PARTS))[None, :] & (j < R)[:, None]
    q_c = tl.load(of_group, mask=in_group, other=0.0)
    component = tl.gather(component, j, 0)  # the same numbers, but held as the loads want them
    highest = tl.full([LANES, GN], LOWEST_LOGIT, tl.float32)
    total = tl.zeros([LANES, GN], tl.float32)

    whole = tl.minimum(last, end // GROUP_SIZE)
    runs = codes.to(tl.pointer_type(tl.int32), bitcast=True)
    runs += component[:, None] * (RUN // 4) + tl.arange(0, T // 4)[None, :]
    o = tl.arange(0, P)
    o = o // T * RUN + (o % T & -4) + (o & 1) * 2 + (o >> 1 & 1)  # positions as the codes come out
    range_of = ranges + component * 2
    low, step = load_range(range_of, ranges_page, first, end, table, pages, j, D, R, BLOCK, PAGED)
    for piece in tl.range(first * PIECES, whole * PIECES, num_stages=STAGES):
        group = piece // PIECES
        place = (piece - group * PIECES) * T
        # By blocks in a row too: with one product of the group Triton takes an eighth more registers.
        within = tl.multiple_of(group % BLOCK_GROUPS * (D * RUN) + place, T)
        if PAGED:
            stored = page_of(group * GROUP_SIZE, end, table, pages, BLOCK) * (codes_page // 4)
        else:
            stored = (group // BLOCK_GROUPS).to(tl.int64) * (BLOCK_GROUPS * D * RUN // 4)
        packed = tl.load(runs + (stored + within // 4))
        following = tl.minimum((piece + 1) // PIECES, whole - 1)
        next_low, next_step = load_range(range_of, ranges_page, following, end, table, pages, j, D, R, BLOCK, PAGED)
        w = q_c.to(tl.float32) * step[:, None]
        upper = w.to(tl.bfloat16).to(tl.float32)
        lower = (w - upper).to(tl.bfloat16).to(tl.float32)
        base = tl.where((part == 0)[None, :], q_c.to(tl.float32) * low[:, None], 0.0)
        if PARTS == 1:
            base += MIDDLE * (w - upper)
        w = tl.where((part == 0)[None, :], upper, lower)
        base -= 16 * w
        base = tl.sum(tl.reshape(tl.sum(base, 0), [N // GN, GN]), 0)
        # Two codes eight bits apart in a word of 32, and two such words, of the lower bits of bytes and of the higher.
        lower_bits = tl.join(packed << 3, packed >> 5)
        pairs = tl.join(lower_bits, tl.join(packed >> 1, packed >> 9)) & 0x780078 | 0x41804180
        pairs = tl.permute(pairs, (0, 3, 1, 2))
        code = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)).to(tl.bfloat16, bitcast=True)
        x = tl.dot(tl.trans(tl.reshape(code, [RP, P]).to(CODE_DOT)), w.to(CODE_DOT))
        x = tl.sum(tl.reshape(x, [P, N // GN, GN]), 1) + base[None, :]
        highest, total = keep_logits(
            x,
            group * GROUP_SIZE + place + o,
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

    begin_rest = tl.maximum(whole, first) * GROUP_SIZE
    rest = tl.minimum(end, last * GROUP_SIZE)  # nothing, where another program has the last group
    o = tl.arange(0, LANES)
    rows = key + component[:, None]
    if PAGED:  # all in one page, told by positions in the row
        rows += page_of(begin_rest, rest, table, pages, BLOCK) * key_page
        rows -= (begin_rest - begin_rest % BLOCK).to(tl.int64) * key_stride
    for position in range(begin_rest, rest, LANES):
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

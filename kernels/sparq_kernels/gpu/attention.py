"""Steps 4 and 5: attention over the chosen positions, split over programs, and the blend with the mean value."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import BUDGET, CHUNK, COUNT, INFO_SIZE, VARYING
from .scoring import load_group, soften
from .selection import normalisers


@triton.jit
def attend(
    q,  # [GP, DP]
    key,  # this KV head's rows [S, D]
    key_stride,
    value,
    value_stride,
    logits,
    logits_stride,
    positions,
    first,
    last,
    M,
    inverse,
    scale,
    softcap,
    G: tl.constexpr,
    D: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Over positions[first:last]: the maximum logit, the sum of exponentials and of approximate scores, [GP] each, and
    the weighted sum of values [GP, DP]."""
    g, d, i = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, ROWS)
    highest = tl.full([GP], float("-inf"), tl.float32)
    total, alpha = tl.zeros([GP], tl.float32), tl.zeros([GP], tl.float32)
    y = tl.zeros([GP, DP], tl.float32)
    # Slots behind the last read a row that is valid: other rows may hold NaN, and 0 * NaN is NaN.
    spare = tl.load(positions + first, mask=first < last, other=0)
    for slot in tl.range(first, last, ROWS, num_stages=STAGES):
        used = slot + i < last
        s = tl.load(positions + slot + i, mask=used, other=0)
        s = tl.where(used, s, spare)
        row = s.to(tl.int64)[:, None]
        if D == DP:
            k = tl.load(key + row * key_stride + d[None, :])
            v = tl.load(value + row * value_stride + d[None, :])
        else:
            k = tl.load(key + row * key_stride + d[None, :], mask=(d < D)[None, :], other=0.0)
            v = tl.load(value + row * value_stride + d[None, :], mask=(d < D)[None, :], other=0.0)
        if GP == 1:
            x = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[None, :]
        else:
            x = tl.dot(q.to(DOT), tl.trans(k.to(DOT)), input_precision="ieee")
        x = tl.where(used[None, :], soften(x * scale, softcap, HAS_SOFTCAP), float("-inf"))
        new = tl.maximum(highest, tl.max(x, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        correction = tl.exp2(highest - safe)
        weight = tl.exp2(x - safe[:, None])
        total = total * correction + tl.sum(weight, 1)
        y = y * correction[:, None]
        if GP == 1:
            y += tl.sum(tl.trans(weight) * v.to(tl.float32), 0)[None, :]
        elif DOT == tl.float32:
            y += tl.dot(weight, v.to(tl.float32), input_precision="ieee")
        else:  # in two halves, so that weights keep twice the digits of the values' dtype
            upper = weight.to(DOT)
            y += tl.dot(upper, v) + tl.dot((weight - upper.to(tl.float32)).to(DOT), v)
        highest = new
        x_hat = tl.load(
            logits + g[:, None] * logits_stride + s[None, :], mask=(g < G)[:, None] & used[None, :], other=float("-inf")
        )
        alpha += tl.sum(tl.exp2(x_hat - M[:, None]), 1) * inverse
    return highest, total, alpha, y


@triton.jit
def blend(y, alpha, value_sum, count, budget, D: tl.constexpr, MEAN_VALUE: tl.constexpr):
    """Output rows [X, DP] of rows `y` and their scores `alpha` [X], and alpha as reported."""
    d = tl.arange(0, y.shape[1])
    everything = budget >= count
    alpha = tl.where(everything, 1.0, alpha)
    if MEAN_VALUE:
        mean = tl.load(value_sum + d, mask=d < D, other=0.0) / tl.maximum(count, 1).to(tl.float32)
        y = tl.where(everything, y, alpha[:, None] * y + (1 - alpha[:, None]) * mean[None, :])
    return tl.where(count > 0, y, 0.0), alpha


@triton.jit
def store_output(output, alpha_out, y, alpha, D: tl.constexpr, G: tl.constexpr):
    g, d = tl.arange(0, y.shape[0]), tl.arange(0, y.shape[1])
    tl.store(
        output + g[:, None] * D + d[None, :], y.to(output.dtype.element_ty), mask=(g < G)[:, None] & (d < D)[None, :]
    )
    tl.store(alpha_out + g, alpha, mask=g < G)


@triton.jit
def _merge_head(
    g,
    partial,
    partial_y,
    value_sum,
    count,
    budget,
    active,
    output,
    alpha_out,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PARTS: tl.constexpr,
    MEAN_VALUE: tl.constexpr,
):
    part, d = tl.arange(0, PARTS), tl.arange(0, DP)
    at = partial + (part * G + g) * 3
    # Past the first-level cache, which other programs' stores do not reach.
    highest = tl.load(at, mask=part < active, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(at + 1, mask=part < active, other=0.0, cache_modifier=".cg")
    alpha = tl.load(at + 2, mask=part < active, other=0.0, cache_modifier=".cg")
    y = tl.load(
        partial_y + (part * G + g)[:, None] * DP + d[None, :],
        mask=(part < active)[:, None],
        other=0.0,
        cache_modifier=".cg",
    )
    M = tl.max(highest, 0)
    factor = tl.exp2(highest - tl.where(M == float("-inf"), 0.0, M))
    factor = tl.where(part < active, factor, 0.0)
    y = (tl.sum(y * factor[:, None], 0) / tl.sum(total * factor, 0))[None, :]
    y, alpha = blend(y, tl.sum(alpha, 0, keep_dims=True), value_sum, count, budget, D, MEAN_VALUE)
    store_output(output + g * D, alpha_out + g, y, alpha, D, 1)


@triton.jit(do_not_specialize=VARYING)
def gather(
    query,
    query_batch,
    query_head,
    key,
    key_batch,
    key_head,
    key_position,
    value,
    value_batch,
    value_head,
    value_position,
    value_sum,
    sum_batch,
    sum_head,
    logits,
    stats,
    info,
    ticket,
    positions,
    partial,  # float32 [N, PARTS, G, 3]: maximum, sum, alpha
    partial_y,  # float32 [N, PARTS, G, DP]
    output,  # [N, G, D]
    alpha_out,  # float32 [N, G]
    Hkv,
    k_max,
    logits_chunks,
    scale,
    softcap,
    G: tl.constexpr,
    D: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MEAN_VALUE: tl.constexpr,
):
    """Grid (N, PARTS): each program attends an equal share of the row's budget; the last one to finish merges."""
    n = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    b, h = n // Hkv, n % Hkv
    row = info + n * INFO_SIZE
    budget, count = tl.load(row + BUDGET), tl.load(row + COUNT)
    share = tl.cdiv(tl.cdiv(budget, PARTS), ROWS) * ROWS
    first = part * share
    if first < budget:
        M, inverse = normalisers(stats + n * (2 * G * SPLITS), G, GP, SPLITS)
        q = load_group(query + b * query_batch + h * (G * query_head), query_head, G, D, GP, DP)
        highest, total, alpha, y = attend(
            q,
            key + b * key_batch + h * key_head,
            key_position,
            value + b * value_batch + h * value_head,
            value_position,
            logits + n * G * (logits_chunks * CHUNK),
            logits_chunks * CHUNK,
            positions + n * k_max,
            first,
            tl.minimum(first + share, budget),
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
            HAS_SOFTCAP,
        )
        g, d = tl.arange(0, GP), tl.arange(0, DP)
        at = partial + ((n * PARTS + part) * G + g) * 3
        tl.store(at, highest, mask=g < G)
        tl.store(at + 1, total, mask=g < G)
        tl.store(at + 2, alpha, mask=g < G)
        at_y = partial_y + ((n * PARTS + part) * G + g)[:, None] * DP + d[None, :]
        tl.store(at_y, y, mask=(g < G)[:, None])
    tl.debug_barrier()  # all of this program's stores, before it says that it is done
    finished = tl.atomic_add(ticket + n, 1, sem="acq_rel", scope="gpu")
    if finished == PARTS - 1:
        active = tl.cdiv(budget, tl.maximum(share, 1))
        partial += n * (PARTS * G * 3)
        partial_y += n * (PARTS * G * DP)
        value_sum += b * sum_batch + h * sum_head
        output += n * (G * D)
        alpha_out += n * G
        merged = (partial, partial_y, value_sum, count, budget, active, output, alpha_out)
        if G <= 8:
            for g in tl.static_range(G):
                _merge_head(g, *merged, G, D, DP, PARTS, MEAN_VALUE)
        else:
            for g in range(G):
                _merge_head(g, *merged, G, D, DP, PARTS, MEAN_VALUE)

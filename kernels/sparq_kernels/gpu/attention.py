"""Steps 4 and 5: attention over the chosen positions, split over programs, and the blend with the mean value."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import BUDGET, CHUNK, COUNT, END, INFO_SIZE, LATER_END, VARYING, page_of
from .scoring import LOG2E, LOWEST_LOGIT, load_group, soften
from .selection import normalisers

MERGED = tl.constexpr(4096)  # values that a program merges at once


@triton.jit
def attend(
    q,  # [GP, DP]
    key,  # this KV head's rows [S, D] or, where it has a table, pages of rows
    key_stride,
    key_page,
    value,
    value_stride,
    value_page,
    table,
    pages,
    logits,
    logits_stride,
    positions,
    first,
    last,
    end,
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
    BLOCK: tl.constexpr,
    PAGED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Over positions[first:last], all below `end`: the maximum logit, the sum of exponentials and of approximate
    scores, [GP] each, and the weighted sum of values [GP, DP]."""
    g, d, i = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, ROWS)
    # Of one query each of the rows read at once has its own maximum and sums, brought together behind the loop: within
    # it, warps need not wait for each other.
    LANES: tl.constexpr = ROWS if GP == 1 else GP
    highest = tl.full([LANES], LOWEST_LOGIT, tl.float32)
    total, alpha = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    y = tl.zeros([LANES, DP], tl.float32)
    # The same numbers, but held as the loop wants them: the places they come in would rule it.
    if GP == 1:
        M, inverse = tl.max(M, 0), tl.max(inverse, 0)
        q = tl.gather(tl.sum(q.to(tl.float32), 0), d, 0)[None, :]
    # Slots behind the last read a row that is valid: other rows may hold NaN, and 0 * NaN is NaN.
    spare = tl.load(positions + first, mask=first < last, other=0)
    # Rows wait for positions, and with a table for their pages, too: a product's operands then need a stage more to be
    # as far ahead.
    AHEAD: tl.constexpr = STAGES + 1 if PAGED and GP > 1 else STAGES
    for slot in tl.range(first, last, ROWS, num_stages=AHEAD):
        used = slot + i < last
        s = tl.load(positions + slot + i, mask=used, other=0)
        s = tl.where(used, s, spare)
        if HAS_MASK:  # wrong counts may have promised more positions than were chosen, and left the last ones unwritten
            s = tl.minimum(tl.maximum(s, 0), end - 1)
        if PAGED:
            page, within = page_of(s, end, table, pages, BLOCK), (s % BLOCK).to(tl.int64)
            k_row, v_row = page * key_page + within * key_stride, page * value_page + within * value_stride
        else:
            k_row, v_row = s.to(tl.int64) * key_stride, s.to(tl.int64) * value_stride
        if D == DP:
            k = tl.load(key + k_row[:, None] + d[None, :])
            v = tl.load(value + v_row[:, None] + d[None, :])
        else:
            k = tl.load(key + k_row[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
            v = tl.load(value + v_row[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
        if GP == 1:
            x = tl.sum(q * k.to(tl.float32), 1)
            x = tl.where(used, soften(x * scale, softcap, HAS_SOFTCAP), float("-inf"))
            new = tl.maximum(highest, x)
            correction, weight = tl.exp2(highest - new), tl.exp2(x - new)
            total = total * correction + weight
            y = y * correction[:, None] + weight[:, None] * v.to(tl.float32)
            alpha += tl.exp2(tl.load(logits + s, mask=used, other=float("-inf")) - M) * inverse
        else:
            x = tl.dot(q.to(DOT), tl.trans(k.to(DOT)), input_precision="ieee")
            x = tl.where(used[None, :], soften(x * scale, softcap, HAS_SOFTCAP), float("-inf"))
            new = tl.maximum(highest, tl.max(x, 1))
            correction = tl.exp2(highest - new)
            weight = tl.exp2(x - new[:, None])
            total = total * correction + tl.sum(weight, 1)
            y = y * correction[:, None]
            if DOT == tl.float32:
                y += tl.dot(weight, v.to(tl.float32), input_precision="ieee")
            else:  # in two halves, so that weights keep twice the digits of the values' dtype
                upper = weight.to(DOT)
                y += tl.dot(upper, v) + tl.dot((weight - upper.to(tl.float32)).to(DOT), v)
            of_group = logits + g[:, None] * logits_stride + s[None, :]
            x_hat = tl.load(of_group, mask=(g < G)[:, None] & used[None, :], other=float("-inf"))
            alpha += tl.sum(tl.exp2(x_hat - M[:, None]), 1) * inverse
        highest = new
    if GP == 1:
        M_all = tl.max(highest, 0, keep_dims=True)
        factor = tl.exp2(highest - M_all)
        total, alpha = tl.sum(total * factor, 0, keep_dims=True), tl.sum(alpha, 0, keep_dims=True)
        y, highest = tl.sum(y * factor[:, None], 0, keep_dims=True), M_all
    return tl.where(highest > LOWEST_LOGIT, highest, float("-inf")), total, alpha, y


@triton.jit
def sum_of_row(
    value_sum,
    value,
    value_stride,
    mask,
    end,
    later_end,
    D: tl.constexpr,
    DP: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Sum of the values that a query sees, [DP]: that of the row counts those of later queries too."""
    d = tl.arange(0, DP)
    total = tl.load(value_sum + d, mask=d < D, other=0.0)
    for j in range(0, later_end - end):
        s = (end + j).to(tl.int64)
        seen = d < D
        if HAS_MASK:
            seen = seen & (tl.load(mask + s + d * 0) != 0)
        total -= tl.load(value + s * value_stride + d, mask=seen, other=0.0).to(tl.float32)
    return total


@triton.jit
def add_rows(total, rows, stride, first, last, D: tl.constexpr, STAGES: tl.constexpr):
    """`total` [X, DP], each of X rows of it with its share of the rows [first, last) added."""
    ROWS: tl.constexpr = total.shape[0]
    i, d = tl.arange(0, ROWS), tl.arange(0, total.shape[1])
    for row in tl.range(first, last, ROWS, num_stages=STAGES):
        there = (row + i < last)[:, None] & (d < D)[None, :]
        place = (row + i).to(tl.int64) * stride
        total += tl.load(rows + place[:, None] + d[None, :], mask=there, other=0.0).to(tl.float32)
    return total


@triton.jit
def sum_of_pages(
    value_sum,  # of this KV head, by page
    sum_page,
    value,
    value_stride,
    value_page,
    table,
    pages,
    end,
    part,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A part's share of the sum of the values below `end`, [DP]: of whole pages by their sums, of the last one by its
    rows."""
    i, d = tl.arange(0, ROWS), tl.arange(0, DP)
    total = tl.zeros([ROWS, DP], tl.float32)
    whole = end // BLOCK
    share = tl.cdiv(whole, PARTS)
    last = tl.minimum((part + 1) * share, whole)
    for first in range(part * share, last, ROWS):
        page = page_of((first + i) * BLOCK, last * BLOCK, table, pages, BLOCK)
        there = (first + i < last)[:, None] & (d < D)[None, :]
        total += tl.load(value_sum + (page * sum_page)[:, None] + d[None, :], mask=there, other=0.0)
    begin = whole * BLOCK
    rows = value + page_of(begin, end, table, pages, BLOCK) * value_page
    share = tl.cdiv(end - begin, PARTS)
    last = tl.minimum((part + 1) * share, end - begin)
    return tl.sum(add_rows(total, rows, value_stride, part * share, last, D, STAGES), 0)


@triton.jit
def store_results(
    y,  # [X, DP], X queries of a group
    alpha,  # [X]
    lse,  # [X], base 2
    total,  # [DP], of the values that it sees
    count,
    budget,
    output,
    alpha_out,
    lse_out,
    read,
    Q,
    mean_from,
    D: tl.constexpr,
    G: tl.constexpr,
    MEAN_VALUE: tl.constexpr,
):
    """Step 5, and the results of G query heads, each Q new tokens apart."""
    g, d = tl.arange(0, y.shape[0]), tl.arange(0, y.shape[1])
    everything = budget >= count
    alpha = tl.where(everything, 1.0, alpha)
    if MEAN_VALUE:
        mean = total / tl.maximum(count, 1).to(tl.float32)
        blended = alpha[:, None] * y + (1 - alpha[:, None]) * mean[None, :]
        y = tl.where((everything | (alpha < mean_from))[:, None], y, blended)
    y = tl.where(count > 0, y, 0.0)
    inside = (g < G)[:, None] & (d < D)[None, :]
    tl.store(output + g[:, None] * (Q * D) + d[None, :], y.to(output.dtype.element_ty), mask=inside)
    tl.store(alpha_out + g * Q, alpha, mask=g < G)
    tl.store(lse_out + g * Q, lse / LOG2E, mask=g < G)
    tl.store(read, budget)


@triton.jit
def share_of(budget, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """Positions that each part of a row attends; the last parts may have fewer, or none."""
    return tl.cdiv(tl.cdiv(budget, PARTS), ROWS) * ROWS


@triton.jit
def sum_parts(partial_sum, DP: tl.constexpr, PARTS: tl.constexpr):
    """What all parts of a row have summed, [DP]; read as `merge_parts` reads."""
    AT_ONCE: tl.constexpr = max(1, min(PARTS, MERGED // DP))
    d, some = tl.arange(0, DP), tl.arange(0, AT_ONCE)
    total = tl.zeros([AT_ONCE, DP], tl.float32)
    for first in range(0, PARTS, AT_ONCE):
        total += tl.load(partial_sum + (first + some)[:, None] * DP + d[None, :], cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def merge_parts(
    n,
    value,
    value_batch,
    value_head,
    value_position,
    value_sum,
    sum_batch,
    sum_head,
    mask,
    mask_stride,
    info,
    partial,
    partial_y,
    partial_sum,
    output,
    alpha_out,
    lse_out,
    read,
    Hkv,
    Q,
    mean_from,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PAGED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MEAN_VALUE: tl.constexpr,
):
    """The results of row n from what its parts have left."""
    b, i, h = n // (Hkv * Q), n // Hkv % Q, n % Hkv
    row = info + n * INFO_SIZE
    budget, count = tl.load(row + BUDGET), tl.load(row + COUNT)
    active = tl.cdiv(budget, tl.maximum(share_of(budget, PARTS, ROWS), 1))
    first_result = (b * Hkv + h) * G * Q + i
    if PAGED:
        values = sum_parts(partial_sum + n * (PARTS * DP), DP, PARTS)
    else:
        values = sum_of_row(
            value_sum + b * sum_batch + h * sum_head,
            value + b * value_batch + h * value_head,
            value_position,
            mask + b * mask_stride,
            tl.load(row + END),
            tl.load(row + LATER_END),
            D,
            DP,
            HAS_MASK,
        )
    partial += n * (PARTS * G * 3)
    partial_y += n * (PARTS * G * DP)
    # All heads at once, and of as many parts as registers hold. Read past the first-level cache, which other programs'
    # stores do not reach.
    GS: tl.constexpr = triton.next_power_of_2(G)
    AT_ONCE: tl.constexpr = max(1, min(PARTS, MERGED // (GS * DP)))
    g, d, part, some = tl.arange(0, GS), tl.arange(0, DP), tl.arange(0, PARTS), tl.arange(0, AT_ONCE)
    in_group = (g < G)[None, :]
    active_part = (part < active)[:, None] & in_group
    stats = partial + (part[:, None] * G + g[None, :]) * 3
    each = tl.load(stats, mask=active_part, other=float("-inf"), cache_modifier=".cg")
    M = tl.max(each, 0)
    M = tl.where(M == float("-inf"), 0.0, M)
    total = tl.load(stats + 1, mask=active_part, other=0.0, cache_modifier=".cg")
    alpha = tl.sum(tl.load(stats + 2, mask=active_part, other=0.0, cache_modifier=".cg"), 0)
    z = tl.sum(total * tl.exp2(each - M[None, :]), 0)
    y_part = tl.zeros([AT_ONCE, GS, DP], tl.float32)  # brought together behind the loop
    for first in range(0, active, AT_ONCE):
        place = first + some
        there = (place < active)[:, None] & in_group
        at = place[:, None] * G + g[None, :]
        highest = tl.load(partial + at * 3, mask=there, other=float("-inf"), cache_modifier=".cg")
        y_of = partial_y + at[:, :, None] * DP + d[None, None, :]
        y = tl.load(y_of, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
        y_part += y * tl.exp2(highest - M[None, :])[:, :, None]
    y = tl.sum(y_part, 0)
    store_results(
        y / z[:, None],
        alpha,
        M + tl.log2(z),
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


@triton.jit(do_not_specialize=VARYING)
def gather(
    query,
    query_batch,
    query_head,
    query_position,
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
    table,
    table_stride,
    mask,
    mask_stride,
    logits,
    stats,
    info,
    ticket,
    positions,
    partial,  # float32 [N, PARTS, G, 3]: maximum, sum, alpha
    partial_y,  # float32 [N, PARTS, G, DP]
    partial_sum,  # float32 [N, PARTS, DP], of pages of values
    output,  # [B, Hkv, G, Q, D]
    alpha_out,  # float32 [B, Hkv, G, Q]
    lse_out,  # the same
    read,  # int32 [B, Hkv, Q]
    Hkv,
    Q,
    k_max,
    pages,
    logits_chunks,
    scale,
    softcap,
    mean_from,
    G: tl.constexpr,
    D: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MEAN_VALUE: tl.constexpr,
    LAST_MERGES: tl.constexpr,
):
    """Grid (N, PARTS): each program attends an equal share of the row's budget.

    With LAST_MERGES the last one to finish merges.  On AMD `merge` does it, behind this kernel: a barrier there does
    not wait for the stores of other waves, so that an atomic after it says nothing of them (LLVM issues 160501 and
    161638).
    """
    n = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    b, i, h = n // (Hkv * Q), n // Hkv % Q, n % Hkv
    row = info + n * INFO_SIZE
    budget = tl.load(row + BUDGET)
    stored = b * 0 if PAGED else b  # pages are of all rows
    table += b * table_stride
    share = share_of(budget, PARTS, ROWS)
    first = part * share
    if first < budget:
        M, inverse = normalisers(stats + n * (2 * G * SPLITS), G, GP, SPLITS)
        q = load_group(query + b * query_batch + h * (G * query_head) + i * query_position, query_head, G, D, GP, DP)
        highest, total, alpha, y = attend(
            q,
            key + stored * key_batch + h * key_head,
            key_position,
            key_batch,
            value + stored * value_batch + h * value_head,
            value_position,
            value_batch,
            table,
            pages,
            logits + n * G * (logits_chunks * CHUNK),
            logits_chunks * CHUNK,
            positions + n * k_max,
            first,
            tl.minimum(first + share, budget),
            tl.load(row + END),
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
        g, d = tl.arange(0, GP), tl.arange(0, DP)
        at = partial + ((n * PARTS + part) * G + g) * 3
        tl.store(at, highest, mask=g < G)
        tl.store(at + 1, total, mask=g < G)
        tl.store(at + 2, alpha, mask=g < G)
        at_y = partial_y + ((n * PARTS + part) * G + g)[:, None] * DP + d[None, :]
        tl.store(at_y, y, mask=(g < G)[:, None])
    if PAGED and MEAN_VALUE:
        summed = sum_of_pages(
            value_sum + h * sum_head,
            sum_batch,
            value + h * value_head,
            value_position,
            value_batch,
            table,
            pages,
            tl.where(budget < tl.load(row + COUNT), tl.load(row + END), 0),
            part,
            D,
            DP,
            ROWS,
            PARTS,
            STAGES,
            BLOCK,
        )
        tl.store(partial_sum + (n * PARTS + part) * DP + tl.arange(0, DP), summed)
    if LAST_MERGES:
        tl.debug_barrier()  # all of this program's stores, before it says that it is done
        finished = tl.atomic_add(ticket + n, 1, sem="acq_rel", scope="gpu")
        if finished == PARTS - 1:
            merge_parts(
                n,
                value,
                value_batch,
                value_head,
                value_position,
                value_sum,
                sum_batch,
                sum_head,
                mask,
                mask_stride,
                info,
                partial,
                partial_y,
                partial_sum,
                output,
                alpha_out,
                lse_out,
                read,
                Hkv,
                Q,
                mean_from,
                G,
                D,
                DP,
                ROWS,
                PARTS,
                PAGED,
                HAS_MASK,
                MEAN_VALUE,
            )


@triton.jit(do_not_specialize=VARYING)
def merge(
    value,
    value_batch,
    value_head,
    value_position,
    value_sum,
    sum_batch,
    sum_head,
    mask,
    mask_stride,
    info,
    partial,
    partial_y,
    partial_sum,
    output,
    alpha_out,
    lse_out,
    read,
    Hkv,
    Q,
    mean_from,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PAGED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MEAN_VALUE: tl.constexpr,
):
    """Grid (N,), behind a `gather` whose last program does not merge."""
    merge_parts(
        tl.program_id(0).to(tl.int64),
        value,
        value_batch,
        value_head,
        value_position,
        value_sum,
        sum_batch,
        sum_head,
        mask,
        mask_stride,
        info,
        partial,
        partial_y,
        partial_sum,
        output,
        alpha_out,
        lse_out,
        read,
        Hkv,
        Q,
        mean_from,
        G,
        D,
        DP,
        ROWS,
        PARTS,
        PAGED,
        HAS_MASK,
        MEAN_VALUE,
    )

"""Step 3: the positions with the largest summed scores, exact and the same at every run.

Short rows (`select`): one program per KV head holds all its keys in registers.

Long rows, in three kernels that each split the row into parts, so that a single head fills the chip:
`histogram` turns logits into keys and counts them by their leading bits, `candidates` finds the bin that holds the k-th
key and compacts the keys in it, `choose` finds the k-th key among these and writes the positions. A bin is a quarter of
an octave wide, so the candidates are few unless scores tie; then the search takes longer and stays exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import ABOVE, BEGIN, BUDGET, CANDIDATES, CHUNK, END, INFO_SIZE, LEAST, PREFIX, VARYING, WINDOW, is_valid
from .topk import ALWAYS, NEVER, needed_for, split_by, threshold, top

BINS = 256
HISTOGRAM_SIZE = tl.constexpr(BINS)
# Leading bits kept: the exponent and two bits of the mantissa. Bins cover 64 octaves, 2^-59 to 2^5; scores sum to the
# group's size, so the k-th is hardly ever below, and above there is none.
SHIFT = tl.constexpr(21)
LOWEST = tl.constexpr((127 - 59) * 4)
KNOWN_ROUNDS = tl.constexpr((31 - SHIFT.value) // 2)  # of the search for the k-th key, once its bin is known


@triton.jit
def normalisers(stats, G: tl.constexpr, GP: tl.constexpr, SPLITS: tl.constexpr):
    """Maximum and reciprocal sum of a KV head's softmax, [GP], from what the splits of `score` left."""
    g, split = tl.arange(0, GP)[:, None], tl.arange(0, SPLITS)[None, :]
    at = stats + g * SPLITS + split
    highest = tl.load(at, mask=g < G, other=0.0)
    total = tl.load(at + G * SPLITS, mask=g < G, other=1.0)
    M = tl.max(highest, 1)
    M = tl.where(M == float("-inf"), 0.0, M)
    return M, 1 / tl.sum(total * tl.exp2(highest - M[:, None]), 1)


@triton.jit
def _add_score(score, logits, s, in_storage, g, M, inverse, GP: tl.constexpr):
    here = tl.arange(0, GP) == g
    x = tl.load(logits + s, mask=in_storage, other=0.0)
    M_g = tl.sum(tl.where(here, M, 0.0), 0)
    return score + tl.exp2(x - M_g) * tl.sum(tl.where(here, inverse, 0.0), 0)


@triton.jit
def keys_of(
    logits,
    logits_stride,
    s,
    begin,
    end,
    window,
    mask,
    M,
    inverse,
    G: tl.constexpr,
    GP: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """int32 [WIDTH]: the group's summed softmax as bits, ALWAYS in the window, NEVER where invalid; and what the window
    has of it."""
    score = tl.zeros([WIDTH], tl.float32)
    in_storage = s < logits_stride
    if G <= 4:  # more at a time would need more registers than there are
        for g in tl.static_range(G):
            score = _add_score(score, logits + g * logits_stride, s, in_storage, g, M, inverse, GP)
    else:
        for g in range(G):
            score = _add_score(score, logits + g * logits_stride, s, in_storage, g, M, inverse, GP)
    score = tl.where(score == score, score, 0.0)
    valid, in_window = is_valid(s, begin, end, mask, HAS_MASK), s >= window
    key = tl.where(in_window, ALWAYS, score.to(tl.int32, bitcast=True))
    return tl.where(valid, key, NEVER), tl.sum(tl.where(valid & in_window, score, 0.0), 0)


@triton.jit
def budget_by_mass(key, in_window, budget, least, mass, rest, number, G: tl.constexpr, HAS_REST: tl.constexpr):
    """How many of the keys hold the share `mass` of the scores' sum, with those in the window, which have `in_window`
    of it; at least `least`, at most the budget.  key, rest, number: as in `topk.needed_for`."""
    always = (key == ALWAYS).to(tl.int32)
    if HAS_REST:
        o = tl.arange(0, key.shape[0])
        for first in range(key.shape[0], number, key.shape[0]):
            more = tl.load(rest + first + o, mask=first + o < number, other=NEVER)
            always += (more == ALWAYS).to(tl.int32)
    window = tl.sum(always, 0)
    needed = window + needed_for(key, mass * G - in_window, rest, number, HAS_REST)
    return tl.minimum(tl.maximum(needed, least), budget)


@triton.jit
def store_top(key, s, budget, positions):
    chosen, slot = top(key, budget)
    tl.store(positions + slot, s, mask=chosen)


@triton.jit(do_not_specialize=VARYING)
def select(
    logits,
    stats,
    info,
    mask,
    mask_stride,
    positions,  # int32 [N, k_max], ascending
    Hkv,
    Q,
    k_max,
    logits_chunks,
    mass,
    G: tl.constexpr,
    GP: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_MASS: tl.constexpr,
):
    """Grid (N,): rows of at most WIDTH positions."""
    n = tl.program_id(0).to(tl.int64)
    row = info + n * INFO_SIZE
    logits_stride = logits_chunks * CHUNK
    M, inverse = normalisers(stats + n * (2 * G * SPLITS), G, GP, SPLITS)
    s = tl.arange(0, WIDTH)
    key, in_window = keys_of(
        logits + n * G * logits_stride,
        logits_stride,
        s,
        tl.load(row + BEGIN),
        tl.load(row + END),
        tl.load(row + WINDOW),
        mask + n // (Hkv * Q) * mask_stride,
        M,
        inverse,
        G,
        GP,
        WIDTH,
        HAS_MASK,
    )
    budget = tl.load(row + BUDGET)
    if HAS_MASS:
        budget = budget_by_mass(key, in_window, budget, tl.load(row + LEAST), mass, 0, 0, G, False)
        tl.store(row + BUDGET, budget)
    store_top(key, s, budget, positions + n * k_max)


@triton.jit
def _digit(key):
    return tl.minimum(tl.maximum((key >> SHIFT) - LOWEST, 0), HISTOGRAM_SIZE - 1)


@triton.jit(do_not_specialize=VARYING)
def histogram(
    logits,
    stats,
    info,
    mask,
    mask_stride,
    keys,  # int32 [N, logits_chunks * CHUNK]
    bin_counts,  # int32 [N, parts, BINS]
    window_scores,  # float32 [N, parts]: what a part's share of the window has of the scores
    Hkv,
    Q,
    logits_chunks,
    G: tl.constexpr,
    GP: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_MASS: tl.constexpr,
):
    """Grid (N, parts of WIDTH positions)."""
    n = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = info + n * INFO_SIZE
    logits_stride = logits_chunks * CHUNK
    M, inverse = normalisers(stats + n * (2 * G * SPLITS), G, GP, SPLITS)
    s = part * WIDTH + tl.arange(0, WIDTH)
    key, in_window = keys_of(
        logits + n * G * logits_stride,
        logits_stride,
        s,
        tl.load(row + BEGIN),
        tl.load(row + END),
        tl.load(row + WINDOW),
        mask + n // (Hkv * Q) * mask_stride,
        M,
        inverse,
        G,
        GP,
        WIDTH,
        HAS_MASK,
    )
    tl.store(keys + n * logits_stride + s, key, mask=s < logits_stride)
    if HAS_MASS:
        tl.store(window_scores + n * tl.num_programs(1) + part, in_window)
    # Invalid keys are counted with the lowest bin and taken out again.
    bins = tl.arange(0, HISTOGRAM_SIZE)
    count = tl.histogram(_digit(key), HISTOGRAM_SIZE)
    count -= tl.where(bins == 0, tl.sum((key == NEVER).to(tl.int32), 0), 0)
    tl.store(bin_counts + (n * tl.num_programs(1) + part) * HISTOGRAM_SIZE + bins, count)


@triton.jit(do_not_specialize=VARYING)
def candidates(
    info,
    keys,
    bin_counts,
    compact,  # int32 [N, logits_chunks * CHUNK]: the keys in the k-th key's bin, in order of position
    before,  # int32 [N, parts, 2]: keys in earlier parts, above that bin and in it
    parts,
    logits_chunks,
    WIDTH: tl.constexpr,
    PARTS_AT_ONCE: tl.constexpr,
):
    """Grid (N, parts)."""
    n = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = info + n * INFO_SIZE
    budget = tl.load(row + BUDGET)
    bins, i = tl.arange(0, HISTOGRAM_SIZE), tl.arange(0, PARTS_AT_ONCE)
    table = bin_counts + n * parts * HISTOGRAM_SIZE + i[:, None] * HISTOGRAM_SIZE + bins[None, :]
    total = tl.zeros([HISTOGRAM_SIZE], tl.int32)
    for first in range(0, parts, PARTS_AT_ONCE):
        total += tl.sum(tl.load(table + first * HISTOGRAM_SIZE, mask=(first + i < parts)[:, None], other=0), 0)
    at_least = tl.cumsum(total, 0, reverse=True)
    digit = tl.maximum(tl.sum((at_least >= budget).to(tl.int32), 0) - 1, 0)
    above = tl.sum(tl.where(bins > digit, total, 0), 0)
    above_before, inside_before = budget * 0, budget * 0
    for first in range(0, part, PARTS_AT_ONCE):
        earlier = tl.load(table + first * HISTOGRAM_SIZE, mask=(first + i < part)[:, None], other=0)
        above_before += tl.sum(tl.sum(tl.where((bins > digit)[None, :], earlier, 0), 1), 0)
        inside_before += tl.sum(tl.sum(tl.where((bins == digit)[None, :], earlier, 0), 1), 0)
    tl.store(before + (n * parts + part) * 2, above_before)
    tl.store(before + (n * parts + part) * 2 + 1, inside_before)
    if part == 0:
        tl.store(row + ABOVE, above)
        tl.store(row + CANDIDATES, tl.sum(tl.where(bins == digit, total, 0), 0))
        tl.store(row + PREFIX, tl.where(digit > 0, (digit + LOWEST) << SHIFT, 0))

    stride = logits_chunks * CHUNK
    s = part * WIDTH + tl.arange(0, WIDTH)
    key = tl.load(keys + n * stride + s, mask=s < stride, other=NEVER)
    inside = (_digit(key) == digit) & (key != NEVER)
    slot = inside_before + tl.cumsum(inside.to(tl.int32), 0) - 1
    tl.store(compact + n * stride + slot, key, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def choose(
    info,
    keys,
    compact,
    before,
    positions,  # int32 [N, k_max], ascending
    found,  # in their place, int32 [N, k_max], where `trim` is to choose among them
    found_keys,  # int32 [N, k_max]
    parts,
    k_max,
    logits_chunks,
    WIDTH: tl.constexpr,
    HAS_MASS: tl.constexpr,
):
    """Grid (N, parts): every program finds the threshold for itself, then writes its own part's positions."""
    n = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = info + n * INFO_SIZE
    number = tl.load(row + CANDIDATES)
    needed = tl.load(row + BUDGET) - tl.load(row + ABOVE)
    stride = logits_chunks * CHUNK
    o = tl.arange(0, WIDTH)
    compact += n * stride
    held = tl.load(compact + o, mask=o < number, other=NEVER)
    # The least key of the bin, whose leading bits all others in it share, but in the outermost two.
    prefix = tl.load(row + PREFIX)
    is_highest = prefix >> SHIFT == LOWEST + HISTOGRAM_SIZE - 1
    known = tl.where(is_highest | (prefix == 0), 0, KNOWN_ROUNDS)
    begin = tl.where(is_highest, 0, prefix)
    reached = tl.where(is_highest, -1, number)
    least = threshold(held, needed, begin, known, reached, compact, number, True)
    least = tl.maximum(least, prefix - 1)  # below are keys that were not among those compared

    # How many candidates of earlier parts are above the threshold, or equal to it.
    above_before = tl.load(before + (n * parts + part) * 2)
    inside_before = tl.load(before + (n * parts + part) * 2 + 1)
    packed = tl.zeros([WIDTH], tl.int64)
    ties = needed
    for first in range(0, number, WIDTH):
        key = tl.load(compact + first + o, mask=first + o < number, other=NEVER)
        earlier = first + o < inside_before
        packed += ((key > least) & earlier).to(tl.int64) + (((key == least) & earlier).to(tl.int64) << 32)
        ties -= tl.sum((key > least).to(tl.int32), 0)
    packed_before = tl.sum(packed, 0)
    above_before += (packed_before & 0xFFFFFFFF).to(tl.int32)
    equal_before = (packed_before >> 32).to(tl.int32)

    s = part * WIDTH + o
    key = tl.load(keys + n * stride + s, mask=s < stride, other=NEVER)
    # Bins are ordered as keys are, but the outermost ones hold a range of them: the key alone decides.
    chosen, slot = split_by(key, least, tl.maximum(ties - equal_before, 0))
    slot += above_before + tl.minimum(equal_before, ties)
    if HAS_MASS:
        tl.store(found + n * k_max + slot, s, mask=chosen)
        tl.store(found_keys + n * k_max + slot, key, mask=chosen)
    else:
        tl.store(positions + n * k_max + slot, s, mask=chosen)


@triton.jit(do_not_specialize=VARYING)
def trim(
    info,
    window_scores,
    found,
    found_keys,
    positions,
    parts,
    k_max,
    mass,
    G: tl.constexpr,
    HELD: tl.constexpr,
    PARTS_AT_ONCE: tl.constexpr,
):
    """Grid (N,): of the positions that `choose` has found as many as hold the mass, HELD of their keys in registers."""
    n = tl.program_id(0).to(tl.int64)
    row = info + n * INFO_SIZE
    number, end = tl.load(row + BUDGET), tl.load(row + END)
    i, o = tl.arange(0, PARTS_AT_ONCE), tl.arange(0, HELD)
    in_window = tl.zeros([PARTS_AT_ONCE], tl.float32)
    for first in range(0, parts, PARTS_AT_ONCE):
        in_window += tl.load(window_scores + n * parts + first + i, mask=first + i < parts, other=0.0)
    in_window = tl.sum(in_window, 0)
    found += n * k_max
    found_keys += n * k_max
    positions += n * k_max
    held = tl.load(found_keys + o, mask=o < number, other=NEVER)
    budget = budget_by_mass(held, in_window, number, tl.load(row + LEAST), mass, found_keys, number, G, True)
    tl.store(row + BUDGET, budget)
    zero = tl.zeros([], tl.int32)
    least = threshold(held, budget, zero, zero, zero - 1, found_keys, number, True)
    ties, taken = budget, zero
    for first in range(0, number, HELD):
        key = tl.load(found_keys + first + o, mask=first + o < number, other=NEVER)
        ties -= tl.sum((key > least).to(tl.int32), 0)
    for first in range(0, number, HELD):
        key = tl.load(found_keys + first + o, mask=first + o < number, other=NEVER)
        chosen, slot = split_by(key, least, ties)
        s = tl.load(found + first + o, mask=chosen, other=0)
        s = tl.minimum(tl.maximum(s, 0), end - 1)  # wrong counts leave some unwritten
        tl.store(positions + taken + slot, s, mask=chosen)
        equal = tl.minimum(tl.sum((key == least).to(tl.int32), 0), ties)
        taken += tl.sum((key > least).to(tl.int32), 0) + equal
        ties -= equal

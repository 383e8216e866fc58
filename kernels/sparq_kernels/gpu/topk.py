"""Exact top-k of a vector held in registers: no sort, no atomics, ties to the lower index.

A key is the bit pattern of a float32 that is not negative, so keys are ordered as the floats are; -1 never enters.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEVER = tl.constexpr(-1)
ALWAYS = tl.constexpr(0x7FFFFFFF)
FIELD = tl.constexpr((1 << 21) - 1)
MAX_KEYS = FIELD.value  # what a field can count
HIGHEST_BIT = tl.constexpr(1 << 30)  # of a key
ROUNDS = tl.constexpr(15)  # of two bits; then one is left
NAN_BITS = tl.constexpr(0x7FC00000)


@triton.jit
def threshold(key, k, prefix, known, reached, rest, number, HAS_REST: tl.constexpr):
    """What parts the k largest of int32 keys from the others (at least k of them are not NEVER): the k largest
    are those above it and, where these are fewer than k, the first of those equal to it.

    key: [WIDTH], in registers.  With HAS_REST, `number` keys in all: those from WIDTH on are read from `rest`, which
    points at the first of all, in every step.
    prefix: the leading bits of the k-th key as far as they are known, zeros behind them; known: how many rounds that
    spares, two bits each.  reached: how many keys are at least `prefix`, or -1 where nobody has counted.

    It is the k-th key itself, found two bits at a time: the counts of three candidates share one reduction, 21 bits
    each.  As soon as exactly k keys reach what is known of it, that less 1 will do, and lower bits are not looked at.
    """
    kth, i = prefix, known
    while (i < ROUNDS) & (reached != k):
        digit = 1 << (29 - 2 * i)
        one, two, three = kth | digit, kth | (digit + digit), kth | (3 * digit)
        counts = _reached(key, one, two, three)
        if HAS_REST:
            counts = _rest_reached(counts, rest, number, one, two, three)
        total = tl.sum(counts, 0)
        at_one, at_two = (total & FIELD).to(tl.int32), ((total >> 21) & FIELD).to(tl.int32)
        at_three = (total >> 42).to(tl.int32)
        kth = tl.where(at_three >= k, three, tl.where(at_two >= k, two, tl.where(at_one >= k, one, kth)))
        reached = tl.where(at_one >= k, at_one, reached)
        reached = tl.where(at_three >= k, at_three, tl.where(at_two >= k, at_two, reached))
        i += 1
    if reached == k:
        kth -= 1
    else:
        last = kth | 1
        counts = _reached(key, last, ALWAYS, ALWAYS)
        if HAS_REST:
            counts = _rest_reached(counts, rest, number, last, ALWAYS, ALWAYS)
        kth = tl.where((tl.sum(counts, 0) & FIELD).to(tl.int32) >= k, last, kth)
    return kth


@triton.jit
def _reached(key, one, two, three):
    """Which of three thresholds each key reaches, as counts in three fields of an int64."""
    ones = (key >= one).to(tl.int64)
    return ones + ((key >= two).to(tl.int64) << 21) + ((key >= three).to(tl.int64) << 42)


@triton.jit
def _rest_reached(counts, rest, number, one, two, three):
    o = tl.arange(0, counts.shape[0])
    for first in range(counts.shape[0], number, counts.shape[0]):
        key = tl.load(rest + first + o, mask=first + o < number, other=NEVER)
        counts += _reached(key, one, two, three)
    return counts


@triton.jit
def split_by(key, threshold, ties):
    """Which keys are above the threshold or among its first `ties` equals, and how many such keys precede each.

    Both counts share one scan, 16 bits each: at most 32767 keys.
    """
    above, equal = key > threshold, key == threshold
    packed = (above.to(tl.int32) << 16) | equal.to(tl.int32)
    before = tl.cumsum(packed, 0) - packed
    equal_before = before & 0xFFFF
    chosen = above | (equal & (equal_before < ties))
    return chosen, (before >> 16) + tl.minimum(equal_before, ties)


@triton.jit
def top(key, k):
    """The mask of the k largest keys, and each one's place among them in index order."""
    zero = tl.zeros([], tl.int32)
    least = threshold(key, k + zero, zero, zero, zero - 1, 0, 0, False)
    ties = k - tl.sum((key > least).to(tl.int32), 0)
    return split_by(key, least, ties)


@triton.jit
def needed_for(key, missing, rest, number, HAS_REST: tl.constexpr):
    """The fewest keys, from the largest down, whose scores add up to `missing`: 0 where that is nothing, more than any
    row has where all are too few or `missing` is no number.  What is ALWAYS chosen does not count.

    key, rest, number: as in `threshold`.  The last one needed is found bit by bit: the largest key of which those at
    least as large suffice.  Sums are made in the same order every time, so they fall as the bound rises.
    """
    last = tl.zeros([], tl.int32)
    bit = last + HIGHEST_BIT
    while bit > 0:
        enough = _sum_from(key, last | bit, rest, number, HAS_REST) >= missing
        last = tl.where(enough, last | bit, last)
        bit >>= 1
    reached = _reached(key, last, last + 1, ALWAYS)
    if HAS_REST:
        reached = _rest_reached(reached, rest, number, last, last + 1, ALWAYS)
    counts = tl.sum(reached, 0)
    always = (counts >> 42).to(tl.int32)
    above_last = ((counts >> 21) & FIELD).to(tl.int32) - always
    equal = (counts & FIELD).to(tl.int32) - always - above_last
    left = (missing - _sum_from(key, last + 1, rest, number, HAS_REST)) / last.to(tl.float32, bitcast=True)
    of_equal = tl.ceil(tl.minimum(left, equal.to(tl.float32))).to(tl.int32)
    needed = tl.where(last > 0, above_last + tl.maximum(of_equal, 1), FIELD)
    return tl.where(missing <= 0, 0, needed)


@triton.jit
def _sum_from(key, least, rest, number, HAS_REST: tl.constexpr):
    total = _scores_from(key, least)
    if HAS_REST:
        o = tl.arange(0, key.shape[0])
        for first in range(key.shape[0], number, key.shape[0]):
            total += _scores_from(tl.load(rest + first + o, mask=first + o < number, other=NEVER), least)
    return tl.sum(total, 0)


@triton.jit
def _scores_from(key, least):
    return tl.where((key >= least) & (key < ALWAYS), key.to(tl.float32, bitcast=True), 0.0)

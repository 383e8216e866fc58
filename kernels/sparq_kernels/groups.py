"""The operators' arguments that belong together, as the public functions take them.

A field that is added to a group is added to `arguments.Arguments` in the same place: there are the groups' fields in a
row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Cached(NamedTuple):
    """What is cached, and where it lies.

    key, value: [B, Hkv, S, d], S the cached positions including the new; last axis contiguous, other strides free.
    key_components: the index, by which positions are found: [B, Hkv, blocks, d, BLOCK], the same keys as written by
        `layout.write_components`; or with `key_ranges` uint8 [B, Hkv, groups, d, GROUP / 2], their four-bit codes as
        written by `encode`.
    value_sum: [B, Hkv, d] float32 (float64 allowed with float64 keys), the sum of V over exactly the valid positions.
        `decode` needs it; where it is None `append` leaves it to others to keep.
    key_ranges: [B, Hkv, groups, d, 2], the least value and the step of each run of codes, as written by `encode`; None:
        the index is not coded.
    block_table: int32 [B, pages], last axis contiguous: storage is in pages of N positions, which rows may share, and
        position s of row b lies at s % N of page block_table[b, s // N].  The tensors above then have a page where they
        have a row, and N for S and BLOCK: key and value [P, Hkv, N, d], key_components [P, Hkv, 1, d, N], value_sum
        [P, Hkv, d]; codes [P, Hkv, N / GROUP, d, GROUP / 2], key_ranges [P, Hkv, N / GROUP, d, 2].  N: 64, 128, ...
        2048, with codes 256 and more.  A row's last page need not be full: its sum is not read.  Entries behind it may
        be anything.
        `append_slots` writes.

    key, value, key_components (unless they are codes) and key_ranges share a dtype: float32, bfloat16, float16 (float32
    arithmetic) or float64.
    """

    key: Tensor
    key_components: Tensor
    value: Tensor
    value_sum: Tensor | None
    key_ranges: Tensor | None = None
    block_table: Tensor | None = None


class Visible(NamedTuple):
    """Which rows and positions are valid: those of start <= s < length that the mask allows.

    length: int64 [B], one past each row's last cached position, at most S.
    start: int64 [B], each row's first valid position; None means 0.
    mask: bool [B, S], False excludes a position; None allows all.
    counts: int32 [B, Q, 2], what `count_valid` gives for these rows, so that layers share it; None: `decode` counts.
    """

    length: Tensor
    start: Tensor | None = None
    mask: Tensor | None = None
    counts: Tensor | None = None


class Budget(NamedTuple):
    """How much of the cache a query reads.

    r: components of the query used to score, 1 <= r <= d.
    k: positions attended in full, the local window included.  A query that sees n valid positions attends
        min(n, max(k, n // k_divisor)); without k_divisor min(n, k).
    local: newest valid positions that are always attended, at most k; None means a quarter of the query's budget.
    mass: 0 < mass < 1, where the approximate scores say when to stop: a KV head attends, the local window first and
        then from the highest score down, as few positions as hold this share of the scores' sum over the group; at
        least k_min, the local window included, and at most what k and k_divisor say.  None: all that these say.
    dense_below: a query that sees fewer valid positions than this attends all of them.
    """

    r: int
    k: int
    k_divisor: int | None = None
    local: int | None = None
    mass: float | None = None
    k_min: int = 1
    dense_below: int = 0


def wrong_group(name: str, group: Any, kind: type) -> TypeError:
    """For a tuple of something else, or of another length, that stands where a group should."""
    got = f"a tuple of {len(group)}" if type(group) is tuple else type(group).__name__
    return TypeError(f"{name} must be a sparq_kernels.{kind.__name__}, got {got}")

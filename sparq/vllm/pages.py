"""How a page of vLLM's cache is divided: K and V, and behind them SparQ's index and the sum of V.

vLLM's cache of a layer is [pages, Hkv, N, C], N positions with C elements of K's dtype each. In its layout LBHNC the
N * C elements of a head are contiguous, and `state_content_bytes` of the spec says how many there are. A head's share:

    K [N, d], V [N, d]     on a CPU; on a GPU rows of both, [N, 2 d], as FlashAttention reads them
    index                  codes [N / GROUP, d, GROUP / 2] and their ranges [N / GROUP, d, 2]; or the components [d, N]
    sum of V [d]           float32, of a page that is full

All of it is a function of the K and V in the page. So prefix caching, chunks of prompts, drafts that are rejected and
preemption need nothing more, and whoever copies whole pages copies all of it.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from sparq_kernels import GROUP, Cached
from torch import Tensor

ALIGNMENT = 16  # bytes, which GPU kernels read at a time


class Region(NamedTuple):
    """Of a head's share of a page."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    begin: int  # bytes

    @property
    def end(self) -> int:
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.begin + (last + 1) * self.dtype.itemsize


class Regions(NamedTuple):
    """What `sparq_kernels.Cached` has of each page, but for the table."""

    key: Region
    key_components: Region
    value: Region
    value_sum: Region
    key_ranges: Region | None


def regions(page: int, head_dim: int, dtype: torch.dtype, index: str, interleaved: bool) -> Regions:
    """page: positions. interleaved: rows of K and V beside each other."""
    row = 2 * head_dim if interleaved else head_dim
    key = Region(dtype, (page, head_dim), (row, 1), 0)
    value = key._replace(begin=(head_dim if interleaved else page * head_dim) * dtype.itemsize)

    def behind(region: Region, dtype: torch.dtype, *shape: int) -> Region:
        strides = [*itertools.accumulate(reversed(shape[1:]), initial=1, func=lambda a, b: a * b)]
        return Region(dtype, shape, tuple(reversed(strides)), -(-region.end // ALIGNMENT) * ALIGNMENT)

    ranges = None
    if index == "int4":
        components = behind(value, torch.uint8, page // GROUP, head_dim, GROUP // 2)
        last = ranges = behind(components, dtype, page // GROUP, head_dim, 2)
    else:
        last = components = behind(value, dtype, 1, head_dim, page)
    return Regions(key, components, value, behind(last, torch.float32, head_dim), ranges)


def content_bytes(page: int, head_dim: int, dtype: torch.dtype, index: str) -> int:
    """Bytes for each position of a head: whole elements, and whole alignments for a page."""
    end = regions(page, head_dim, dtype, index, interleaved=False).value_sum.end
    each = math.lcm(dtype.itemsize, ALIGNMENT // math.gcd(page, ALIGNMENT))
    return -(-end // (page * each)) * each


def pages_of(kv_cache: Tensor, head_dim: int, index: str, interleaved: bool) -> Cached:
    """The cache of a layer [pages, Hkv, N, C] as the operator takes it, a table missing; no copy.

    Raises:
        ValueError: where the cache is not laid out for it.
    """
    pages, heads, page, content = kv_cache.shape
    size = kv_cache.element_size()
    if kv_cache.stride(3) != 1 or kv_cache.stride(2) != content:
        wanted = "the N * C elements of a head contiguous (layout LBHNC)"
        raise ValueError(f"kv_cache must have {wanted}, got strides {kv_cache.stride()}")
    needed = content_bytes(page, head_dim, kv_cache.dtype, index)
    if content * size < needed:
        raise ValueError(f"kv_cache must have {needed} bytes for each of {page} positions, got {content * size}")
    outer = [stride * size for stride in kv_cache.stride()[:2]]
    begin = kv_cache.storage_offset() * size

    def view(region: Region | None) -> Tensor | None:
        if region is None:
            return None
        each = region.dtype.itemsize
        strides = (*(stride // each for stride in outer), *region.strides)
        empty = torch.empty(0, dtype=region.dtype, device=kv_cache.device)
        return empty.set_(
            kv_cache.untyped_storage(), (begin + region.begin) // each, (pages, heads, *region.shape), strides
        )

    found = regions(page, head_dim, kv_cache.dtype, index, interleaved)
    key, components, value, value_sum, ranges = (view(region) for region in found)
    assert key is not None and components is not None and value is not None
    return Cached(key, components, value, value_sum, ranges)

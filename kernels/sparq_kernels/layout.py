"""Where the second copy of K lives: blocks of positions, component-major inside a block.

Step 2 of the algorithm reads r components of every cached key.  Out of rows [S, d] that gather would touch nearly every
memory sector, so K is kept a second time as ``[batch, num_kv_heads, blocks, head_dim, BLOCK]``: inside a block each
component is one contiguous run of BLOCK positions.  A block never moves when the cache grows, strides do not depend on
the capacity, and a table of blocks is all that paging would need.

The size of a block, measured on 2 cores of a Sapphire Rapids with 2 MB pages (65536 positions, 8 KV heads, 32 of 128
components; a plain linear read does 28 GB/s there): GB/s of the kernel's score phase, arithmetic included, and
milliseconds of the whole decode step with k = 512, float32 / bfloat16:

    block          256          512         1024         2048         4096
    GB/s   20.9 / 15.6  22.6 / 17.7  24.0 / 19.2  24.6 / 20.7  25.2 / 21.2
    ms     3.95 / 2.72  3.73 / 2.52  3.58 / 2.36  3.49 / 2.23  3.46 / 2.19

A cache is up to one block longer than it need be, and beyond 2048 little is left to gain.  Flat storage [d, capacity],
the limit of ever larger blocks, was read at 31 GB/s (with no arithmetic; blocks of 1024: 26.9 / 22.4), but every run
moves when it grows.  The CPU kernel serves any multiple of 256 (csrc/arguments.h has the same constant).
"""

from __future__ import annotations

import ctypes
import functools
import sys

import torch
from torch import Tensor

BLOCK = 2048
HUGE_PAGE = 2 << 20  # bytes
MADV_HUGEPAGE = 14


def num_blocks(positions: int) -> int:
    """Blocks needed to hold that many positions."""
    return -(-positions // BLOCK)


def allocate_components(
    batch: int,
    num_kv_heads: int,
    capacity: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Uninitialised component storage for ``capacity`` positions.

    Returns a tensor [batch, num_kv_heads, ceil(capacity / BLOCK), head_dim, BLOCK].
    Raises ValueError for a size below 1.
    """
    sizes = {"batch": batch, "num_kv_heads": num_kv_heads, "capacity": capacity, "head_dim": head_dim}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    components = torch.empty((batch, num_kv_heads, num_blocks(capacity), head_dim, BLOCK), dtype=dtype, device=device)
    prefer_huge_pages(components)
    return components


def prefer_huge_pages(tensor: Tensor) -> None:
    """Ask Linux to back a CPU tensor's memory with 2 MB pages; a wish, ignored wherever it cannot be granted.

    Reading a few runs of every block, or a few rows of a cache, touches a new 4 KB page almost every time, and finding
    each page's address costs as much as the read.
    """
    if torch.compiler.is_compiling() or type(tensor) is not Tensor:
        return  # no memory yet
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    begin = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // HUGE_PAGE * HUGE_PAGE
    if end > begin:
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_HUGEPAGE)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def write_components(components: Tensor, key: Tensor, position: int) -> None:
    """Store keys at positions [position, position + n), in place.

    components: [B, Hkv, blocks, d, BLOCK]; key: [B, Hkv, n, d], same dtype and device.
    Raises ValueError when the shapes do not belong together or the positions do not fit the storage.
    """
    batch, heads, blocks, head_dim, block = _check_components(components)
    if key.dim() != 4 or key.shape[0] != batch or key.shape[1] != heads or key.shape[3] != head_dim:
        raise ValueError(f"key must be [{batch}, {heads}, n, {head_dim}] to match components, got {list(key.shape)}")
    if key.dtype != components.dtype:
        raise ValueError(f"key has dtype {key.dtype}, components have {components.dtype}; they must be the same")
    end = position + key.shape[2]
    if position < 0 or end > blocks * block:
        raise ValueError(f"positions [{position}, {end}) do not fit components with room for {blocks * block}")

    if key.shape[2] == 1:  # a decode step: one strided copy
        components[:, :, position // block, :, position % block].copy_(key[:, :, 0])
        return
    cursor = position
    if cursor % block:
        cursor = min(end, (cursor // block + 1) * block)
        _write_within_block(components, key[:, :, : cursor - position], position)
    whole = (end - cursor) // block
    if whole:
        rows = key[:, :, cursor - position : cursor - position + whole * block]
        tiles = rows.unflatten(2, (whole, block)).transpose(-1, -2)  # [B, Hkv, whole, d, BLOCK]
        components[:, :, cursor // block : cursor // block + whole].copy_(tiles)
        cursor += whole * block
    if cursor < end:
        _write_within_block(components, key[:, :, cursor - position :], cursor)


def read_components(components: Tensor, length: int) -> Tensor:
    """The first ``length`` keys as rows [B, Hkv, length, d] (a copy): the inverse of `write_components`."""
    _, _, blocks, _, block = _check_components(components)
    if not 0 <= length <= blocks * block:
        raise ValueError(f"length must be in [0, {blocks * block}], got {length}")
    return components.transpose(-1, -2).flatten(2, 3)[:, :, :length].contiguous()


def _write_within_block(components: Tensor, key: Tensor, position: int) -> None:
    offset = position % BLOCK
    components[:, :, position // BLOCK, :, offset : offset + key.shape[2]].copy_(key.transpose(-1, -2))


def _check_components(components: Tensor) -> torch.Size:
    if components.dim() != 5 or components.shape[-1] != BLOCK:
        raise ValueError(f"components must be [B, Hkv, blocks, d, {BLOCK}], got {list(components.shape)}")
    return components.shape

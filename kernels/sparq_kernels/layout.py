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

Or K is kept in codes of four bits: a run of GROUP positions of a component has a least value and a step, and stands for
`lo + step * code`.  Only whole groups are coded; the keys of the last one are read from K itself, until its last
position arrives.  So nothing is coded twice, and a code depends on the keys of its group alone, not on how they
arrived.  The runs of a group lie side by side, as its ranges do, and not in blocks as components: a run every 1024
bytes falls into a few sets of the L1 cache only, and what is fetched early has little room there.  On 2 cores of a
Zen 5, with 65536 positions and 8 KV heads, 32 of 128 components of a head are scored in 107 instead of 116
microseconds.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys

import torch
from torch import Tensor

BLOCK = 2048
GROUP = 256  # positions that share a range; a divisor of BLOCK, and what the kernels score in one go
LEVELS = 15  # steps of a range
MIN_PAGE = 64  # positions of a page, where a cache is paged; the most is BLOCK
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
    _check_sizes(batch=batch, num_kv_heads=num_kv_heads, capacity=capacity, head_dim=head_dim)
    shape = (batch, num_kv_heads, num_blocks(capacity), head_dim, BLOCK)
    return empty(*shape, dtype=dtype, device=device)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def allocate_codes(
    batch: int,
    num_kv_heads: int,
    capacity: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Uninitialised storage for the codes of ``capacity`` positions and for their ranges.

    Returns uint8 [batch, num_kv_heads, ceil(capacity / GROUP), head_dim, GROUP / 2], and a tensor of K's dtype
    [batch, num_kv_heads, ceil(capacity / GROUP), head_dim, 2] with the least value and the step of each run of GROUP
    positions.  Byte j of a run has the code of its position j in the low four bits, that of j + GROUP / 2 in the high.
    Raises ValueError for a size below 1.
    """
    _check_sizes(batch=batch, num_kv_heads=num_kv_heads, capacity=capacity, head_dim=head_dim)
    groups = (batch, num_kv_heads, -(-capacity // GROUP), head_dim)
    codes = empty(*groups, GROUP // 2, dtype=torch.uint8, device=device)
    return codes, empty(*groups, 2, dtype=dtype, device=device)


def empty(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """As `torch.empty`; on a CPU Linux is asked to back it with pages of 2 MB, from its first byte on.

    The last page too, where at least half of it is used.  A wish, ignored wherever it cannot be granted.
    Reading a few runs of every group, or a few rows of a cache, touches a new 4 KB page almost every time, and finding
    each page's address costs as much as the read.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    is_plain = torch.compiler.is_compiling() or torch.device(device).type != "cpu"
    if is_plain or not sys.platform.startswith("linux") or nbytes < HUGE_PAGE:
        return torch.empty(shape, dtype=dtype, device=device)
    pages = (nbytes + HUGE_PAGE // 2) // HUGE_PAGE
    room = max(nbytes, pages * HUGE_PAGE) + HUGE_PAGE  # what is not used of it has no pages
    memory = torch.empty(room, dtype=torch.uint8, device=device)
    if type(memory) is not Tensor:
        return torch.empty(shape, dtype=dtype, device=device)  # there is no memory yet
    begin = -memory.data_ptr() % HUGE_PAGE
    address = ctypes.c_void_p(memory.data_ptr() + begin)
    _libc().madvise(address, ctypes.c_size_t(pages * HUGE_PAGE), MADV_HUGEPAGE)
    strides = torch.empty(shape, device="meta").stride()
    made = torch.empty(0, dtype=dtype, device=device)
    return made.set_(memory.untyped_storage(), begin // dtype.itemsize, shape, strides)


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


def find_ranges(key: Tensor) -> Tensor:
    """The least value and the step of each component of whole groups of keys [..., n * GROUP, d]: [..., n, d, 2].

    Values that are not finite stand outside of the range: padding may hold anything.
    """
    runs = key.unflatten(-2, (-1, GROUP))
    compute = torch.float64 if key.dtype == torch.float64 else torch.float32
    finite = runs.isfinite()
    low = torch.where(finite, runs, torch.inf).amin(-2).to(compute)
    high = torch.where(finite, runs, -torch.inf).amax(-2).to(compute)
    step = (high - low) / LEVELS
    both = torch.stack([low, step], -1).masked_fill(~finite.any(-2)[..., None], 0)
    return both.to(key.dtype)  # before codes are made with them: every device sees the same


def find_codes(key: Tensor, ranges: Tensor) -> Tensor:
    """The packed codes uint8 [..., n, d, GROUP / 2] of whole groups of keys [..., n * GROUP, d] in their ranges."""
    compute = torch.float64 if key.dtype == torch.float64 else torch.float32
    low, step = ranges.to(compute).unbind(-1)  # [..., n, d]
    runs = key.unflatten(-2, (-1, GROUP)).transpose(-1, -2).to(compute)  # [..., n, d, GROUP]
    inverse = torch.where(step > 0, 1 / step, 0)  # rounded once, and equally everywhere
    code = ((runs - low[..., None]) * inverse[..., None]).round().nan_to_num(nan=0).clamp(0, LEVELS).to(torch.uint8)
    first, second = code.chunk(2, -1)
    return first | (second << 4)


def read_codes(codes: Tensor, ranges: Tensor, groups: int) -> Tensor:
    """What the first `groups` of a coded index stand for, [B, Hkv, d, groups * GROUP]; computed in float32 or, with
    float64 ranges, in that."""
    compute = torch.float64 if ranges.dtype == torch.float64 else torch.float32
    packed = codes[:, :, :groups].transpose(2, 3)  # [B, Hkv, d, groups, GROUP / 2]
    code = torch.cat([packed & 15, packed >> 4], -1).to(compute)  # [B, Hkv, d, groups, GROUP]
    low, step = ranges[:, :, :groups].transpose(2, 3).to(compute).unbind(-1)  # [B, Hkv, d, groups]
    return (low[..., None] + step[..., None] * code).flatten(3)


def check_index(key: Tensor, components: Tensor, ranges: Tensor | None, paged: bool = False) -> None:
    """Raise where they are not the index of keys [B, Hkv, S, d], or of storage for as many.  `components` is the index
    itself where there are no ranges, else its codes.  paged: every row is a page, and its block is as large."""
    batch, heads, positions, head_dim = key.shape
    block = BLOCK
    if paged:
        block, least = positions, MIN_PAGE if ranges is None else GROUP
        if not least <= block <= BLOCK or BLOCK % block:
            index = "" if ranges is None else " with a coded index"
            wanted = f"{least} to {BLOCK} positions{index}, a power of two"
            raise ValueError(f"key must be in pages of {wanted}, got pages of {block}")

    def check(name: str, x: Tensor, runs: int, run: int) -> None:
        if x.dim() != 5 or x.shape[:2] != key.shape[:2] or x.shape[2] < runs or x.shape[3:] != (head_dim, run):
            wanted = f"[{batch}, {heads}, at least {runs}, {head_dim}, {run}]"
            raise ValueError(f"{name} must be {wanted}, got {list(x.shape)}")

    if ranges is None:
        check("key_components", components, -(-positions // block), block)
        if components.dtype != key.dtype:
            raise TypeError(f"key_components must have key's dtype {key.dtype}, got {components.dtype}")
        if components.stride(4) != 1 or (components.stride(3) != block and head_dim > 1):
            strides = components.stride()
            raise ValueError(f"key_components must have contiguous blocks [d, {block}], got strides {strides}")
        return
    for name, x, run in (("key_components", components, GROUP // 2), ("key_ranges", ranges, 2)):
        check(name, x, -(-positions // GROUP), run)
        if x.stride()[2:] != (run * head_dim, run, 1):
            raise ValueError(f"{name} must be contiguous in its last three axes, got strides {x.stride()}")
    if components.dtype != torch.uint8:
        raise TypeError(f"key_components must be codes (uint8), for there are key_ranges, got {components.dtype}")
    if ranges.dtype != key.dtype:
        raise TypeError(f"key_ranges must have key's dtype {key.dtype}, got {ranges.dtype}")


def _write_within_block(components: Tensor, key: Tensor, position: int) -> None:
    offset = position % BLOCK
    components[:, :, position // BLOCK, :, offset : offset + key.shape[2]].copy_(key.transpose(-1, -2))


def _check_components(components: Tensor) -> torch.Size:
    if components.dim() != 5 or components.shape[-1] != BLOCK:
        raise ValueError(f"components must be [B, Hkv, blocks, d, {BLOCK}], got {list(components.shape)}")
    return components.shape

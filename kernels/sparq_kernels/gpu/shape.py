"""What launch choices follow from: a call's shapes and the device's number of multiprocessors, nothing else.

Never a value on the device and never a trial run. So nothing waits for the GPU, a step can be captured in a CUDA graph,
and no token is spent on autotuning.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from ..arguments import Arguments
from ..layout import BLOCK, GROUP
from ..reference import max_positions
from .rows import CHUNK
from .scoring import LANES

TILE_BYTES = 16384  # of components per stage
MAX_LOGITS = 4096  # of a tile, of all queries of the group
STAGES = 3  # of 16-bit loads on NVIDIA
LOAD_BYTES = 16  # of one thread
ROW_BYTES, MAX_ROWS = 8192, 32  # of K, and of V, per stage

Scratch = dict[str, tuple[torch.dtype, int]]  # what a kernel calls it: dtype and elements


class Shape(NamedTuple):
    """Of one layout of arguments; capital letters are what kernels call the same."""

    batch: int
    num_kv_heads: int
    Q: int
    G: int
    D: int
    R: int
    cached: int  # positions, of a cache that is full to a chunk's end
    BLOCK: int  # positions of a block of the index: of a page, where there are pages
    PAGED: bool
    k_max: int
    itemsize: int
    amd: bool
    coded: bool  # the index is
    by_mass: bool  # the scores say how many positions are attended
    units: int  # multiprocessors

    @property
    def N(self) -> int:
        """KV heads, times new tokens, times rows."""
        return self.batch * self.Q * self.num_kv_heads

    @property
    def GP(self) -> int:
        """Matrix instructions want 16 rows; a single query is multiplied without them."""
        return 1 if self.G == 1 else max(16, triton.next_power_of_2(self.G))

    @property
    def DP(self) -> int:
        return max(16, triton.next_power_of_2(self.D))

    @property
    def RP(self) -> int:
        return max(16, triton.next_power_of_2(self.R))

    @property
    def chunks(self) -> int:
        """Of CHUNK positions, that logits and keys are stored in."""
        return triton.cdiv(self.cached, CHUNK.value)

    @property
    def rows(self) -> int:
        """Of K, and of V, that a program attends at once."""
        return rows_at_once(self.DP, self.itemsize)

    @property
    def stages(self) -> int:
        return stages_of(self.itemsize, self.amd)

    def tile(self, warps: int) -> int:
        """Positions that a program scores at once, or that share a range."""
        if self.coded:
            return GROUP
        if self.GP == 1:  # one load for each thread and component
            fitting = LOAD_BYTES // self.itemsize * 32 * warps
            if not self.PAGED:
                return min(BLOCK, fitting)
            return 2 * fitting if self.amd else fitting  # its warps are twice as wide, and components come one by one
        if self.itemsize == 4:  # multiplied without matrix instructions, from registers
            return LANES.value
        fitting = min(TILE_BYTES // (self.RP * self.itemsize), MAX_LOGITS // self.GP)
        return min(self.BLOCK, CHUNK.value, max(LANES.value, fitting))


def rows_at_once(padded_dim: int, itemsize: int) -> int:
    """Of K or V, that a program reads in one go."""
    return min(MAX_ROWS, max(16, ROW_BYTES // (padded_dim * itemsize)))


def stages_of(itemsize: int, amd: bool) -> int:
    """Of loops that read."""
    return STAGES if itemsize == 2 and not amd else 2


def shape_of(call: Arguments, cached: int, units: int) -> Shape:
    batch, num_heads, query_length, head_dim = call.query.shape
    num_kv_heads = call.key.shape[1]
    return Shape(
        batch=batch,
        num_kv_heads=num_kv_heads,
        Q=query_length,
        G=num_heads // num_kv_heads,
        D=head_dim,
        R=call.r,
        cached=cached,
        BLOCK=BLOCK if call.block_table is None else call.key.shape[2],
        PAGED=call.block_table is not None,
        k_max=max_positions(cached, call.budget),
        itemsize=call.query.element_size(),
        amd=torch.version.hip is not None,
        coded=call.key_ranges is not None,
        by_mass=call.mass is not None,
        units=units,
    )


def warps_for(width: int) -> int:
    """For kernels with a row or a part of it in registers: 16 keys a thread."""
    return max(1, width // 512)

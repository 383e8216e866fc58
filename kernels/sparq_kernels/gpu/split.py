"""The step in several kernels, each KV head by many programs: for long rows, and for few heads.

`score` makes the approximate logits of a head's positions in parts. `select` chooses among the keys of a whole row in
one program; of rows too long for that, `histogram`, `candidates` and `choose` do, in parts again, and where the scores'
mass says how many, `trim` leaves as many of the most that may be chosen. `gather` attends what was chosen in parts, and
the last part to end merges them; on AMD `merge` does, in a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton

from .attention import gather, merge
from .index import score
from .rows import CHUNK, INFO
from .selection import BINS, candidates, choose, histogram, select, trim
from .shape import Scratch, Shape, warps_for

# On each multiprocessor. Of `score` all must fit at once, or the last ones come alone; and each chooses the components
# for itself.
SCORE_PROGRAMS, GATHER_PROGRAMS = 2, 2
MAX_SPLITS = 64
SELECT_WIDTHS = (4096, 8192)  # longest rows of `select`: with 16384 keys a program had to spill
LONG_ROW = 1 << 18  # from here on parts of the distributed selection are 8192 positions, not 4096
TRIM_WIDTH = 4096  # most keys that `trim` holds: with 8192 it had to spill
HISTOGRAM_PARTS = 16  # that `candidates` reads at once


class Sizes(NamedTuple):
    distributed: bool  # whether a row's keys are more than one program holds
    width: int  # keys that one program holds: a row's, or those of its part
    splits: int  # programs per KV head of `score`
    parts: int  # programs per KV head of `gather`
    warps: int  # of `score` and `gather`


def serves(shape: Shape) -> bool:
    return True  # whatever no other variant does


def sizes(shape: Shape) -> Sizes:
    fitting = [width for width in SELECT_WIDTHS if shape.cached <= width]
    splits, parts = (_power_of_2_up_to(x * shape.units // shape.N) for x in (SCORE_PROGRAMS, GATHER_PROGRAMS))
    return Sizes(
        distributed=not fitting,
        width=fitting[0] if fitting else 4096 if shape.cached < LONG_ROW else 8192,
        splits=min(MAX_SPLITS, splits),
        parts=min(MAX_SPLITS, parts),
        warps=4 if shape.G <= 32 else 8,
    )


def arguments(shape: Shape, sizes: Sizes) -> dict[str, Any]:
    """Of these kernels, besides those that all have."""
    return {
        "parts": _row_parts(shape, sizes),
        "TILE": shape.tile(sizes.warps),
        "WIDTH": sizes.width,
        "SPLITS": sizes.splits,
        "PARTS": sizes.parts,
        "PARTS_AT_ONCE": HISTOGRAM_PARTS,
        "HELD": _held(sizes),
        "LAST_MERGES": not shape.amd,
    }


def scratch(shape: Shape, sizes: Sizes) -> Scratch:
    N, G, f32, i32 = shape.N, shape.G, torch.float32, torch.int32
    needed: Scratch = {
        "stats": (f32, N * 2 * G * sizes.splits),
        "info": (i32, N * INFO),
        "ticket": (i32, N),
        "partial": (f32, N * sizes.parts * G * 3),
        "partial_y": (f32, N * sizes.parts * G * shape.DP),
        "partial_sum": (f32, N * sizes.parts * shape.DP if shape.PAGED else 1),
    }
    if sizes.distributed:
        parts = _row_parts(shape, sizes)
        needed["keys"] = needed["compact"] = (i32, N * shape.chunks * CHUNK.value)
        needed["bin_counts"], needed["before"] = (i32, N * parts * BINS), (i32, N * parts * 2)
        most = N * shape.k_max if shape.by_mass else 1
        needed["found"], needed["found_keys"], needed["window_scores"] = (i32, most), (i32, most), (f32, N * parts)
    return needed


def launches(shape: Shape, sizes: Sizes) -> Iterator[tuple[Any, tuple[int, ...], dict[str, Any]]]:
    """Kernel, grid and options of each."""
    N = shape.N
    of_rows, of_keys = {"num_warps": sizes.warps}, {"num_warps": warps_for(sizes.width)}
    yield score, (N, sizes.splits), of_rows
    if sizes.distributed:
        parts = _row_parts(shape, sizes)
        for kernel in (histogram, candidates, choose):
            yield kernel, (N, parts), of_keys
        if shape.by_mass:
            yield trim, (N,), {"num_warps": 2 * warps_for(_held(sizes))}
    else:
        yield select, (N,), of_keys
    yield gather, (N, sizes.parts), of_rows
    if shape.amd:
        yield merge, (N,), of_rows


def _row_parts(shape: Shape, sizes: Sizes) -> int:
    """Programs that hold a row's keys together."""
    return triton.cdiv(shape.cached, sizes.width)


def _held(sizes: Sizes) -> int:
    """Keys that `trim` has in registers."""
    return min(sizes.width, TRIM_WIDTH)


def _power_of_2_up_to(number: int) -> int:
    return 1 << max(0, number.bit_length() - 1)

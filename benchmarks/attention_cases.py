"""What the attention benchmark measures on the CPU: which shapes at which contexts, and over how many copies."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from workload import Shape

CACHE_BYTES = 1_600_000_000  # of all dense copies together: several times any processor's cache
FEWEST_COPIES = 3
MEMORY_SHARE = 0.8  # of what is available
SHAPES = {  # query heads, KV heads, head_dim
    "llama-3.2-1b": (32, 8, 64),
    "llama-3-8b": (32, 8, 128),
    "llama-2-7b": (32, 32, 128),
    "pythia-1.4b": (16, 16, 128),
}
RATIO = 8.0  # the plugin's own default


@dataclass(frozen=True)
class Case:
    name: str  # of SHAPES
    shape: Shape

    def __str__(self) -> str:
        return f"{self.name} {self.shape}"


def sized(
    name: str, batch: int, context: int, ratio: float = RATIO, r: int | None = None, k: int | None = None
) -> Case:
    """r and k by the plugin's rule where they are not given."""
    heads, kv_heads, head_dim = SHAPES[name]
    r = r or min(head_dim, max(8, round(head_dim / ratio)))
    k = k or max(128, round(context / (2 * ratio)))
    return Case(name, Shape(batch, heads, kv_heads, head_dim, context, r, min(k, context)))


# The paper's r for Llama, at what an eighth of the bytes allows.
README = (
    sized("llama-3-8b", 1, 16384, r=32, k=256),
    sized("llama-2-7b", 1, 4096, r=32, k=128),
    sized("llama-3-8b", 4, 8192, r=32, k=256),
    sized("llama-3-8b", 1, 65536, r=32, k=512),
)
SWEEP = (
    *(sized("llama-3-8b", 1, context) for context in (1024, 4096, 16384, 65536, 131072)),
    *(sized("llama-3.2-1b", 1, context) for context in (1024, 4096, 16384, 65536, 131072, 1048576)),
    *(sized("llama-2-7b", 1, context) for context in (1024, 4096, 16384)),
    *(sized("pythia-1.4b", batch, 2048) for batch in (1, 8)),
)
QUICK = (sized("llama-3-8b", 1, 4096), README[0])


def chosen(args: argparse.Namespace) -> list[Case]:
    """The product of what the arguments name; without any, the README's cases and a sweep over contexts."""
    if not any((args.shapes, args.contexts, args.batches, args.r, args.k, args.ratio)):
        return list(QUICK if args.quick else README + SWEEP)
    grid = itertools.product(args.shapes or ["llama-3-8b"], args.batches or [1], args.contexts or [4096, 16384, 65536])
    return [sized(*place, args.ratio or RATIO, args.r, args.k) for place in grid]


def copies_that_fit(shape: Shape, itemsize: int, turns: int, memory: int | None, wanted: int | None = None) -> int:
    """Caches to walk over: `wanted`, or so many that together they are larger than any processor's cache, but no more
    than there are turns.  0 when the memory available (None: unknown) has no room for enough of them.

    One is enough where it is by itself larger than any processor's cache.
    """
    dense = shape.dense_elements * itemsize
    fewest = wanted or min(max(FEWEST_COPIES, -(-CACHE_BYTES // dense)), max(turns, FEWEST_COPIES))
    if memory is None:
        return fewest
    work = shape.dense_elements * 4  # the dense ways and the checks widen to float32
    room = int(MEMORY_SHARE * memory - work) // (dense * 3 // 2)  # K, V and the components
    if wanted is None and dense >= CACHE_BYTES:
        return max(0, min(fewest, room))
    return fewest if room >= fewest else 0


def walk(copies: int) -> Iterator[int]:
    """Copies in turn, for ever.  Each walk begins one further, so that no opponent keeps a share of the copies for
    itself; two copies simply alternate."""
    for turn in itertools.count():
        yield (turn + (turn // copies if copies > 2 else 0)) % copies

"""Bytes that caches of a model's shape take, stock and SparQ's.

    python benchmarks/memory.py --model llama-3.2-1b --contexts 4096 16384 65536

Real caches are filled, with zeros, and the bytes of their storage are counted: one layer, times as many as the model
has, which are alike. `used` is what the cached positions need, with either index. What is held has the slack that
storage is made or has grown with; SparQ's cache is counted in the two states that use leads to:

    prompt      filled at once, then indexed by a sparse step: the least slack
    growing     one token behind the last position there was room for: everything has just grown
"""

from __future__ import annotations

import itertools

import torch
from harness import Measured, Row, finish, parser_of, positive, progress
from models import SHAPES, Heads
from opponents import bytes_of
from sparq_kernels import GROUP
from tables import DYNAMIC, memory_grid, show
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache
from workload import DTYPES

from sparq.cache import upgrade
from sparq.index import KINDS


def measure(config: PreTrainedConfig, context: int, batch: int, dtype_name: str) -> Row:
    """Bytes of all layers, by kind of cache."""
    heads, layers, dtype = Heads.of(config), config.num_hidden_layers, DTYPES[dtype_name]

    def fill(cache: Cache, positions: int) -> None:
        states = torch.zeros(batch, heads.kv, positions, heads.head_dim, dtype=dtype)
        cache.update(states, states, 0)

    stock = DynamicCache(config=config)
    fill(stock, context)
    found = {DYNAMIC: bytes_of(stock)}
    del stock  # a long context's is large
    per_head = 2 * context * heads.head_dim * dtype.itemsize + 4 * heads.head_dim  # K, V, the sum of V in float32
    for kind in KINDS:
        own = DynamicCache(config=config)
        upgrade(own, kind)
        fill(own, context)
        layer = own.layers[0]
        layer.index()
        index = KINDS[kind].bytes_read(context, context % GROUP, heads.head_dim, dtype.itemsize)  # all of it
        found[f"{kind}, used"] = batch * heads.kv * (per_head + index)
        found[f"{kind}, prompt"] = bytes_of(own)
        capacity = layer._key_storage.shape[2]
        fill(own, capacity + 1 - context)
        layer.index()
        found[f"{kind}, growing"] = bytes_of(own)
    case = {"dtype": dtype_name, "cached": context, "batch": batch}
    return Row(case, {name: Measured(facts={"bytes": layers * held}) for name, held in found.items()})


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="llama-3.2-1b", choices=list(SHAPES))
    parser.add_argument("--contexts", type=positive, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=list(DTYPES))
    parser.add_argument("--batch", type=positive, default=1)
    args = parser.parse_args()
    config = SHAPES[args.model]()
    work = list(itertools.product(args.dtypes, args.contexts))
    rows = [measure(config, context, args.batch, dtype) for dtype, context in progress(work)]
    heads = Heads.of(config)
    shape = f"{config.num_hidden_layers} layers, {heads.kv} KV heads of {heads.head_dim}"
    print(f"{args.model}'s shape ({shape}), batch {args.batch}, {', '.join(args.dtypes)}")
    show(memory_grid(finish(args, rows)))


if __name__ == "__main__":
    main()

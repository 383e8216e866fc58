"""Bytes that caches of a model's shape take, stock and SparQ's.

    python benchmarks/memory.py --model llama-3.2-1b --contexts 4096 16384 65536

Real caches are filled, with zeros, and the bytes of their storage are counted: one layer, times as many as the model
has, which are alike. `used` is what the cached positions need. What is held has the slack that storage is made or
has grown with; SparQ's cache is counted in the two states that use leads to:

    prompt      filled at once, then indexed by a sparse step: the least slack
    growing     one token behind the last position there was room for: everything has just grown
"""

from __future__ import annotations

import torch
from harness import Measured, Row, document, parser_of, positive, progress_of, write_json
from models import SHAPES, Heads
from opponents import bytes_of
from tables import memory_grid, show
from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import Cache

from sparq.cache import upgrade


def fill(cache: Cache, positions: int, batch: int, heads: Heads, dtype: torch.dtype) -> None:
    states = torch.zeros(batch, heads.kv, positions, heads.head_dim, dtype=dtype)
    cache.update(states, states, 0)


def measure(config: PreTrainedConfig, context: int, batch: int, dtype: torch.dtype) -> Row:
    """Bytes of all layers, by kind of cache."""
    heads, layers = Heads.of(config), config.num_hidden_layers
    found = {}
    stock = {"stock dynamic": DynamicCache(config=config)}
    stock["stock static"] = StaticCache(config=config, max_cache_len=context)
    for name, cache in stock.items():
        fill(cache, context, batch, heads, dtype)
        found[name] = layers * bytes_of(cache)
    del stock, cache  # a long context's are large
    own = DynamicCache(config=config)
    upgrade(own)
    fill(own, context, batch, heads, dtype)
    layer = own.layers[0]
    layer.index()
    per_position = heads.kv * heads.head_dim * batch  # elements of K, of V, of a component copy
    used = layers * (3 * context * per_position * dtype.itemsize + per_position * 4)  # and the sum of V in float32
    found |= {"SparQ, used": used, "SparQ, prompt": layers * bytes_of(own)}
    capacity = layer._key_storage.shape[2]
    fill(own, capacity + 1 - context, batch, heads, dtype)
    layer.index()
    found["SparQ, growing"] = layers * bytes_of(own)
    case = {"dtype": str(dtype).removeprefix("torch."), "cached": context, "batch": batch}
    return Row(case, {name: Measured(facts={"bytes": held}) for name, held in found.items()})


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="llama-3.2-1b", choices=list(SHAPES))
    parser.add_argument("--contexts", type=positive, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=positive, default=1)
    args = parser.parse_args()
    config, rows = SHAPES[args.model](), []
    with progress_of(len(args.dtypes) * len(args.contexts)) as tick:
        for dtype in args.dtypes:
            for context in args.contexts:
                tick(f"{dtype}, {context:,} cached")
                rows.append(measure(config, context, args.batch, getattr(torch, dtype)))
    result = document(args, rows)
    heads = Heads.of(config)
    shape = f"{config.num_hidden_layers} layers, {heads.kv} KV heads of {heads.head_dim}"
    print(f"{args.model}'s shape ({shape}), batch {args.batch}, {', '.join(args.dtypes)}")
    show(memory_grid(result))
    print(
        "SparQ, used: half as much again as stock, for the component copy of K. After a prompt: rounded up to whole\n"
        "blocks. Just grown: one token behind the last position there was room for."
    )
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()

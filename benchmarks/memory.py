"""Bytes that caches of a model's shape take, stock and SparQ's.

    python benchmarks/memory.py --model llama-3.2-1b --contexts 4096 16384 65536

Real caches are filled, with zeros, and the bytes of their storage are counted: one layer, times as many as the model
has, which are alike. `used` is what the cached positions need. What is held has the slack that storage is made or
has grown with; SparQ's cache is counted in the two states that use leads to:

    prompt      filled at once, then indexed by a sparse step: the least slack
    growing     one token behind the last position there was room for: everything has just grown
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import machine
from model_options import positive
from model_shapes import SHAPES, Heads
from report import Grid, write_json
from rich.console import Console
from rich.progress import Progress
from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import Cache
from ways import bytes_of

from sparq.cache import upgrade


@dataclass(frozen=True)
class Row:
    """Bytes of all layers, by kind of cache."""

    dtype: str
    context: int
    batch: int
    bytes: dict[str, int]

    def ratio(self, kind: str) -> float:
        return self.bytes[kind] / self.bytes["stock dynamic"]


def fill(cache: Cache, positions: int, batch: int, heads: Heads, dtype: torch.dtype) -> None:
    states = torch.zeros(batch, heads.kv, positions, heads.head_dim, dtype=dtype)
    cache.update(states, states, 0)


def measure(config: PreTrainedConfig, context: int, batch: int, dtype: torch.dtype) -> Row:
    heads, layers = Heads.of(config), config.num_hidden_layers
    dynamic, static = DynamicCache(config=config), StaticCache(config=config, max_cache_len=context)
    found = {}
    for name, cache in (("stock dynamic", dynamic), ("stock static", static)):
        fill(cache, context, batch, heads, dtype)
        found[name] = layers * bytes_of(cache)
    del dynamic, static
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
    return Row(dtype=str(dtype).removeprefix("torch."), context=context, batch=batch, bytes=found)


def grid_of(rows: list[Row], model: str, config: PreTrainedConfig) -> Grid:
    kinds = list(rows[0].bytes)
    cells = [
        (
            row.dtype,
            f"{row.context:,}",
            *(
                f"{row.bytes[kind] / 2**20:,.0f}" + (f" ({row.ratio(kind):.2f}x)" if kind.startswith("SparQ") else "")
                for kind in kinds
            ),
        )
        for row in rows
    ]
    heads = Heads.of(config)
    shape = f"{config.num_hidden_layers} layers, {heads.kv} KV heads of {heads.head_dim}"
    title = f"MiB of a cache of {model}'s shape ({shape}), batch {rows[0].batch}"
    return Grid(title, ("dtype", "cached", *kinds), cells, left=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b", choices=list(SHAPES))
    parser.add_argument("--contexts", type=positive, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--json", type=Path, help="write rows, machine and settings there")
    args = parser.parse_args()
    config = SHAPES[args.model]()
    console = Console(width=130)
    cases = [(context, getattr(torch, dtype)) for dtype in args.dtypes for context in args.contexts]
    with Progress(console=console, transient=True) as progress:
        rows = [measure(config, context, args.batch, dtype) for context, dtype in progress.track(cases)]
    console.print(grid_of(rows, args.model, config).table())
    console.print(
        "SparQ, used: half as much again as stock, for the component copy of K. prompt: rounded up to whole blocks.\n"
        "growing: one token behind the last position there was room for, when everything has just grown."
    )
    if args.json:
        settings = {**vars(args), "json": None}
        write_json(args.json, dict(machine=machine(), settings=settings, rows=[asdict(row) for row in rows]))


if __name__ == "__main__":
    main()

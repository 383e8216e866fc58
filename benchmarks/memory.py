"""Bytes that caches of Llama-3.2-1B's shape take, stock and SparQ's.

    python benchmarks/memory.py --contexts 4096 16384 65536

Real caches are filled, with zeros, and the bytes of their storage are counted: one layer, times the model's 16, which
are alike. `used` is what the cached positions need; `allocated` what is held, with the slack that storage is made or
has grown with. SparQ's cache is counted in the two states that use leads to:

    prompt      filled at once, then indexed by a sparse step: the least slack
    growing     one token behind the last position there was room for: everything has just doubled
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import machine
from report import Grid, write_json
from rich.console import Console
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.cache_utils import Cache

from sparq.cache import SparqLayer, upgrade

LAYERS, HEADS, HEAD_DIM = 16, 8, 64  # Llama-3.2-1B; HEADS are KV heads
PER_POSITION = HEADS * HEAD_DIM  # elements of K, of V, of a component copy


@dataclass(frozen=True)
class Row:
    """Bytes of all layers, by kind of cache."""

    dtype: str
    context: int
    batch: int
    bytes: dict[str, int]

    def ratio(self, kind: str) -> float:
        return self.bytes[kind] / self.bytes["stock dynamic"]


def config_of_one_layer() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
    )


def fill(cache: Cache, positions: int, batch: int, dtype: torch.dtype) -> None:
    states = torch.zeros(batch, HEADS, positions, HEAD_DIM, dtype=dtype)
    cache.update(states, states, 0)


def bytes_of(cache: Cache) -> int:
    """Of all layers' storage, were there as many as the model has."""
    layer = cache.layers[0]
    if isinstance(layer, SparqLayer):
        return LAYERS * layer.allocated_bytes
    return LAYERS * (layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes())


def measure(context: int, batch: int, dtype: torch.dtype) -> Row:
    config = config_of_one_layer()
    dynamic, static = DynamicCache(config=config), StaticCache(config=config, max_cache_len=context)
    for cache in (dynamic, static):
        fill(cache, context, batch, dtype)
    own = DynamicCache(config=config)
    upgrade(own)
    fill(own, context, batch, dtype)
    rows_and_index = {}
    layer = own.layers[0]
    layer.index()
    rows_and_index["SparQ, prompt"] = bytes_of(own)
    capacity = layer._key_storage.shape[2]
    fill(own, capacity + 1 - context, batch, dtype)
    layer.index()
    rows_and_index["SparQ, growing"] = bytes_of(own)
    used = LAYERS * (3 * context * PER_POSITION * batch * dtype.itemsize + PER_POSITION * batch * 4)
    return Row(
        dtype=str(dtype).removeprefix("torch."),
        context=context,
        batch=batch,
        bytes={
            "stock dynamic": bytes_of(dynamic),
            "stock static": bytes_of(static),
            "SparQ, used": used,
            **rows_and_index,
        },
    )


def grid_of(rows: list[Row]) -> Grid:
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
    title = f"MiB of a cache of Llama-3.2-1B's shape ({LAYERS} layers, {HEADS} KV heads of {HEAD_DIM})"
    return Grid(title, ("dtype", "cached", *kinds), cells, left=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write rows, machine and settings there")
    args = parser.parse_args()
    rows = [measure(context, args.batch, getattr(torch, dtype)) for dtype in args.dtypes for context in args.contexts]
    console = Console(width=130)
    console.print(grid_of(rows).table())
    console.print(
        "SparQ, used: half as much again as stock, for the component copy of K. prompt: rounded up to whole blocks.\n"
        "growing: one token behind the last position there was room for, when everything has just doubled."
    )
    if args.json:
        settings = {**vars(args), "json": None}
        write_json(args.json, dict(machine=machine(), settings=settings, rows=[asdict(row) for row in rows]))


if __name__ == "__main__":
    main()

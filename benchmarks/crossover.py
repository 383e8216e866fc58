"""Where a sparse decode step begins to pay: what `SparqConfig.min_length=None` is chosen from.

    python benchmarks/crossover.py

Small models with the attention heads of real ones decode with the patch kept dense and with it sparse, turn by turn, at
growing contexts, through the whole path of a real step: hooks, cache, operator. For each shape the table shows the
microseconds of both per layer, and the first context from which sparse stays faster, also in bytes of K and V that a
dense step reads.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from generation import build_model, decode_times, filled_cache
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM

import sparq

LAYERS = 4
SHAPES = {  # query heads, KV heads, head_dim
    "bundled model": (4, 2, 64),
    "Llama-3.2-1B": (32, 8, 64),
    "Llama-3-8B": (32, 8, 128),
    "Llama-2-7B": (32, 32, 128),
}


def microseconds(model: LlamaForCausalLM, context: int, rounds: int, tokens: int) -> tuple[float, float]:
    """Of a dense and a sparse step, per layer, everything but attention included in both."""
    caches = [filled_cache(model, way, context, batch=1, room=0) for way in ("SparQ's cache", "SparQ")]
    seconds: list[list[float]] = [[], []]
    for round_ in range(rounds + 1):
        for min_length, cache, times in zip((1 << 30, 0), caches, seconds, strict=True):
            with sparq.patched(model, min_length=min_length):
                measured = decode_times(model, cache, 1, tokens)
            if round_:
                times += measured
    dense, sparse = (1e6 * statistics.median(times) / LAYERS for times in seconds)
    return dense, sparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()

    table = Table(title="µs per layer and token, dense / sparse (ratio=8)")
    for column in ("heads of", "dtype", *(f"{context:,}" for context in args.contexts), "pays from", "bytes there"):
        table.add_column(column, justify="right")
    for name, (heads, kv_heads, head_dim) in SHAPES.items():
        for dtype in args.dtypes:
            shape = dict(
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=LAYERS,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                head_dim=head_dim,
            )
            model = build_model(getattr(torch, dtype), shape)
            pairs = [microseconds(model, context, args.rounds, args.tokens) for context in args.contexts]
            pays = None
            for context, (dense, sparse) in reversed(list(zip(args.contexts, pairs, strict=True))):
                if sparse >= dense:
                    break
                pays = context
            per_position = 2 * kv_heads * head_dim * model.dtype.itemsize
            table.add_row(
                name,
                dtype,
                *(f"{dense:.0f} / {sparse:.0f}" for dense, sparse in pairs),
                "–" if pays is None else f"{pays:,}",
                "–" if pays is None else f"{pays * per_position / 2**20:.2f} MiB",
            )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()

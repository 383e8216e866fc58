"""Where a sparse decode step begins to pay: what `SparqConfig.min_length=None` is chosen from.

    python benchmarks/crossover.py

Small models with the attention heads of real ones decode with the patch kept dense and with it sparse, turn by turn, at
growing contexts, through the whole path of a real step: hooks, cache, operator. For each shape the table shows the
microseconds of both per layer, and the first context from which sparse stays faster, also in bytes of K and V that a
dense step reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import machine
from model_options import at_least_2, fill_in, positive
from model_shapes import Heads, from_config
from report import Grid, write_json
from rich.console import Console
from rich.progress import Progress
from transformers import LlamaConfig, PreTrainedModel
from turns import median_and_deciles
from ways import OWN_CACHE, SPARQ, make_runner, steps_of, take_turns

LAYERS = 4
SHAPES = {
    "bundled model": Heads(4, 2, 64),
    "Llama-3.2-1B": Heads(32, 8, 64),
    "Llama-3-8B": Heads(32, 8, 128),
    "Llama-2-7B": Heads(32, 32, 128),
}
FULL = dict(contexts=[256, 512, 1024, 2048, 4096, 8192], dtypes=["float32", "bfloat16"], rounds=4, tokens=16)
QUICK = dict(contexts=[512, 2048], dtypes=["float32"], rounds=2, tokens=6)


def build_narrow(heads: Heads, dtype: torch.dtype) -> PreTrainedModel:
    """A model that is next to nothing but attention."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads.query,
        num_key_value_heads=heads.kv,
        head_dim=heads.head_dim,
        max_position_embeddings=1 << 20,
    )
    return from_config(config, dtype)


def microseconds(model: PreTrainedModel, context: int, rounds: int, tokens: int) -> tuple[float, float]:
    """Of a dense and a sparse step, per layer, everything but attention included in both."""
    room = steps_of(rounds, tokens)
    runners = [
        make_runner(model, way, context, 1, room, dict(min_length=0), prefill=False) for way in (OWN_CACHE, SPARQ)
    ]
    take_turns(runners, rounds, tokens, lambda name: None)
    dense, sparse = (1e6 * median_and_deciles(runner.seconds)[0] / LAYERS for runner in runners)
    return dense, sparse


def pays_from(contexts: list[int], pairs: list[tuple[float, float]]) -> int | None:
    """The first context from which sparse stays faster, as far as was measured."""
    found = None
    for context, (dense, sparse) in sorted(zip(contexts, pairs, strict=True), reverse=True):
        if sparse >= dense:
            break
        found = context
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=positive, nargs="+")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=positive, help="of several the first is not counted")
    parser.add_argument("--tokens", type=at_least_2, help="decode steps of each way in each round")
    parser.add_argument("--json", type=Path, help="write rows, machine and settings there")
    parser.add_argument("--quick", action="store_true", help="less of everything: under a minute")
    args = parser.parse_args(arguments)
    fill_in(args, FULL, QUICK)
    return args


def main() -> None:
    args = parse()
    console = Console(width=150)
    rows: list[dict[str, object]] = []
    cells: list[tuple[str, ...]] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(SHAPES) * len(args.dtypes) * len(args.contexts))
        for name, heads in SHAPES.items():
            for dtype in args.dtypes:
                model = build_narrow(heads, getattr(torch, dtype))
                pairs = []
                for context in args.contexts:
                    progress.update(task, advance=1, description=f"{name}, {dtype}, {context:,} cached")
                    pairs.append(microseconds(model, context, args.rounds, args.tokens))
                pays = pays_from(args.contexts, pairs)
                there = None if pays is None else pays * 2 * heads.kv * heads.head_dim * model.dtype.itemsize
                cells.append(
                    (
                        name,
                        dtype,
                        *(f"{dense:.0f} / {sparse:.0f}" for dense, sparse in pairs),
                        "–" if pays is None else f"{pays:,}",
                        "–" if there is None else f"{there / 2**20:.2f} MiB",
                    )
                )
                rows.append(dict(heads=name, dtype=dtype, microseconds=pairs, pays_from=pays, bytes_there=there))
    columns = ("heads of", "dtype", *(f"{context:,}" for context in args.contexts), "pays from", "bytes there")
    console.print(Grid("µs per layer and token, dense / sparse (ratio=8)", columns, cells).table())
    if args.json:
        settings = {**vars(args), "json": None}
        write_json(args.json, dict(machine=machine(), settings=settings, rows=rows))


if __name__ == "__main__":
    main()

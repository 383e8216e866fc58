"""Where a sparse decode step begins to pay: what `SparqConfig.min_length=None` is chosen from.

    python benchmarks/crossover.py

Small models with the attention heads of real ones decode with the patch kept dense and with it sparse, turn by turn, at
growing contexts, through the whole path of a real step: hooks, cache, operator. For each shape the table shows the
microseconds of both per layer, and the first context from which sparse stays faster, also in bytes of K and V that a
dense step reads.
"""

from __future__ import annotations

import argparse

import torch
from harness import SPARQ, Measured, Row, at_least_2, document, fill_in, parser_of, positive, progress_of, write_json
from models import Heads, from_config
from opponents import OWN_CACHE, SPARQ_WAY, make_runner, steps_of, take_turns
from tables import crossover_grid, show
from transformers import LlamaConfig, PreTrainedModel

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


def measure(name: str, model: PreTrainedModel, context: int, rounds: int, tokens: int) -> Row:
    """A dense and a sparse step, everything but attention included in both."""
    room, knobs = steps_of(rounds, tokens), dict(min_length=0)
    runners = [make_runner(model, way, context, 1, room, knobs) for way in (OWN_CACHE, SPARQ_WAY)]
    take_turns(runners, rounds, tokens, lambda name: None)
    case = {"heads": name, "dtype": str(model.dtype).removeprefix("torch."), "cached": context, "batch": 1}
    return Row(case, {runner.way.name: Measured(runner.seconds) for runner in runners})


def pays_from(medians: dict[int, tuple[float, float]]) -> int | None:
    """The first context from which sparse stays faster, as far as was measured; medians of dense and sparse, by
    context."""
    found = None
    for context, (dense, sparse) in sorted(medians.items(), reverse=True):
        if sparse >= dense:
            break
        found = context
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--contexts", type=positive, nargs="+")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=positive, help="of several the first is not counted")
    parser.add_argument("--tokens", type=at_least_2, help="decode steps of each way in each round")
    parser.add_argument("--quick", action="store_true", help="less of everything: under a minute")
    args = parser.parse_args(arguments)
    fill_in(args, FULL, QUICK)
    return args


def main() -> None:
    args = parse()
    rows: list[Row] = []
    pays: list[dict[str, object]] = []
    with progress_of(len(SHAPES) * len(args.dtypes) * len(args.contexts)) as tick:
        for name, heads in SHAPES.items():
            for dtype in args.dtypes:
                model, medians = build_narrow(heads, getattr(torch, dtype)), {}
                for context in args.contexts:
                    tick(f"{name}, {dtype}, {context:,} cached")
                    rows.append(measure(name, model, context, args.rounds, args.tokens))
                    ways = rows[-1].ways
                    medians[context] = (ways[OWN_CACHE.name].median, ways[SPARQ].median)
                cached = pays_from(medians)
                there = cached and cached * 2 * heads.kv * heads.head_dim * model.dtype.itemsize
                pays.append({"heads": name, "dtype": dtype, "cached": cached, "bytes": there})
    result = document(args, rows, layers=LAYERS, **{"pays from": pays})
    show(crossover_grid(result))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()

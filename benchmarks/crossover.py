"""Where a sparse decode step begins to pay: what `SparqConfig.min_length=None` is chosen from.

    python benchmarks/crossover.py

Small models with the attention heads of real ones decode with the patch kept dense and with it sparse, turn by turn, at
growing contexts, through the whole path of a real step: hooks, cache, operator. For each shape the table shows the
microseconds of both per layer, and the first context from which sparse stays faster, also in bytes of K and V that a
dense step reads.
"""

from __future__ import annotations

import itertools

from harness import Measured, Row, finish, parser_of, positive, progress
from models import Heads, from_config
from opponents import OWN_CACHE, SPARQ_WAY, make_runner, steps_of, take_turns
from tables import crossover_grid, show
from transformers import LlamaConfig
from workload import DTYPES

LAYERS = 4
SHAPES = {
    "bundled model": Heads(4, 2, 64),
    "Llama-3.2-1B": Heads(32, 8, 64),
    "Llama-3-8B": Heads(32, 8, 128),
    "Llama-2-7B": Heads(32, 32, 128),
}


def narrow(heads: Heads) -> LlamaConfig:
    """A model that is next to nothing but attention."""
    return LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads.query,
        num_key_value_heads=heads.kv,
        head_dim=heads.head_dim,
        max_position_embeddings=1 << 20,
    )


def measure(name: str, dtype_name: str, context: int, rounds: int, tokens: int) -> Row:
    """A dense and a sparse step, everything but attention included in both."""
    heads, dtype = SHAPES[name], DTYPES[dtype_name]
    model, room = from_config(narrow(heads), dtype), steps_of(rounds, tokens)
    knobs = dict(min_length=0, mass=1.0)  # all k: random keys have no sharp attention
    runners = [make_runner(model, way, context, 1, room, knobs) for way in (OWN_CACHE, SPARQ_WAY)]
    take_turns(runners, rounds, tokens)
    case = {"heads": name, "dtype": dtype_name, "cached": context, "batch": 1}
    facts = {"dense_bytes": 2 * context * heads.kv * heads.head_dim * dtype.itemsize}
    return Row(case, {runner.way.name: Measured(runner.seconds) for runner in runners}, facts)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--contexts", type=positive, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=positive, default=4, help="of several the first is not counted")
    parser.add_argument("--tokens", type=positive, default=16, help="decode steps of each way in each round")
    args = parser.parse_args()
    work = list(itertools.product(SHAPES, args.dtypes, sorted(args.contexts)))
    rows = [measure(*case, args.rounds, args.tokens) for case in progress(work)]
    show(crossover_grid(finish(args, rows, layers=LAYERS)))


if __name__ == "__main__":
    main()

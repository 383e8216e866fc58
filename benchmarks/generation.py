"""Milliseconds per layer and token of `generate`, stock and with SparQ, on layers of a real model's shape.

    python benchmarks/generation.py --contexts 512 16384 65536 --dtypes float32 bfloat16

The model has the true layers of Llama-3.2-1B (hidden 2048, MLP 8192, 32 query and 8 KV heads of 64) with random
weights, only two of them, and a vocabulary of 256 so that nothing but the layers costs time. The cache is filled with
random keys and values instead of an hour of prefill; greedy `generate` then decodes from it, as a user would. Four ways
take turns, round after round, so that a drifting machine favours none:

    stock dynamic   transformers' `generate` as it is: DynamicCache, which copies the whole cache at every token
    stock static    the same with a preallocated StaticCache
    SparQ's cache   the patched model kept dense: what SparQ's cache gains without any sparsity
    SparQ           the patched model

The cost of the layers with next to no cache (16 positions), measured in the same rounds, stands beside them: SparQ does
not touch that part.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import sparq_kernels
import torch
from common import machine
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache, StoppingCriteriaList
from transformers.cache_utils import Cache

import sparq
from sparq.clock import DecodeClock

LAYERS = 2
WAYS = ("stock dynamic", "stock static", "SparQ's cache", "SparQ")
LAYERS_ALONE = "layers alone"
BARE_CONTEXT = 16


@dataclass(frozen=True)
class Row:
    """Milliseconds per layer and token: median and (10 %, 90 %) quantiles over all decode steps of all rounds."""

    dtype: str
    context: int
    batch: int
    milliseconds: dict[str, float]
    spread: dict[str, tuple[float, float]]
    bytes_dense: float  # of K and V, per layer and token
    bytes_sparq: float
    mean_alpha: float | None


LLAMA_3_2_1B = dict(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=LAYERS,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
)


def build_model(dtype: torch.dtype, shape: dict[str, int]) -> LlamaForCausalLM:
    """A Llama of this shape with random weights."""
    config = LlamaConfig(
        **shape,
        vocab_size=256,
        max_position_embeddings=1 << 20,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def filled_cache(model: LlamaForCausalLM, way: str, context: int, batch: int, room: int) -> Cache:
    """A cache of `context` random positions, with `room` more in a static one."""
    config = model.config
    static = way == "stock static"
    cache = StaticCache(config=config, max_cache_len=context + room) if static else DynamicCache(config=config)
    generator = torch.Generator().manual_seed(1)
    for layer in range(config.num_hidden_layers):
        shape = (batch, config.num_key_value_heads, context, config.head_dim)
        key, value = (torch.randn(shape, generator=generator).to(model.dtype) for _ in range(2))
        cache.update(key, value, layer)
    return cache


def decode_times(model: LlamaForCausalLM, cache: Cache, batch: int, tokens: int) -> list[float]:
    """Seconds of each of `tokens` decode steps of `generate`, which goes on from a filled cache."""
    clock = DecodeClock()
    prompt = torch.ones(batch, cache.get_seq_length() + 1, dtype=torch.long)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=tokens + 1,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return clock.decode_seconds()


def check_operator(model: LlamaForCausalLM, cache: Cache, config: sparq.SparqConfig) -> None:
    """Raise unless the operator agrees with the reference on this cache: a wrong kernel is not fast."""
    key, value = cache.layers[0].keys, cache.layers[0].values
    batch, heads, length, head_dim = key.shape
    components = sparq_kernels.allocate_components(batch, heads, length, head_dim, key.dtype, key.device)
    sparq_kernels.write_components(components, key, 0)
    query = torch.randn(batch, model.config.num_attention_heads, 1, head_dim).to(key.dtype)
    lengths = torch.full((batch,), length)
    knobs = dict(r=config.components(head_dim), k=config.min_k, k_divisor=config.k_divisor, local=config.local)
    value_sum = value.sum(2, dtype=torch.float32)
    fast = sparq_kernels.decode(query, key, components, value, value_sum, length=lengths, **knobs).output.float()
    slow = sparq_kernels.decode(
        *(tensor.double() for tensor in (query, key, components, value, value_sum)), length=lengths, **knobs
    ).output.float()
    error = float((fast - slow).norm() / slow.norm())
    if not error < (1e-4 if key.dtype == torch.float32 else 2e-2):
        raise SystemExit(f"the operator is wrong by {error:.1e} at context {length}, {key.dtype}: nothing is measured")


def measure(
    dtype: str, context: int, batch: int, knobs: dict, rounds: int, tokens: int, tick: Callable[[str], None]
) -> Row:
    model = build_model(getattr(torch, dtype), LLAMA_3_2_1B)
    room = rounds * (tokens + 2) + 1
    caches = {way: filled_cache(model, way, context, batch, room) for way in WAYS}
    caches[LAYERS_ALONE] = filled_cache(model, LAYERS_ALONE, BARE_CONTEXT, batch, room)
    check_operator(model, caches["stock dynamic"], sparq.SparqConfig(**knobs))
    times: dict[str, list[float]] = {way: [] for way in caches}
    for round_ in range(rounds):
        for way, cache in caches.items():
            tick(f"{dtype}, {context:,} positions, {way}")
            if way == "SparQ":
                with sparq.patched(model, **knobs):
                    seconds = decode_times(model, cache, batch, tokens)
                    report = sparq.report(model).total
            elif way == "SparQ's cache":
                with sparq.patched(model, dense_layers=LAYERS):
                    seconds = decode_times(model, cache, batch, tokens)
            else:
                seconds = decode_times(model, cache, batch, tokens)
            # The first round faults memory in and grows SparQ's cache once; later ones are what a long answer sees.
            if round_ or rounds == 1:
                times[way] += seconds
    steps = max(1, report.decode_steps)

    def per_layer(seconds: float) -> float:
        return 1000 * seconds / LAYERS

    deciles = {way: statistics.quantiles(values, n=10) for way, values in times.items()}
    return Row(
        dtype=dtype,
        context=context,
        batch=batch,
        milliseconds={way: per_layer(statistics.median(values)) for way, values in times.items()},
        spread={way: (per_layer(values[0]), per_layer(values[-1])) for way, values in deciles.items()},
        bytes_dense=report.bytes_dense / steps,
        bytes_sparq=report.bytes_read / steps,
        mean_alpha=report.mean_alpha,
    )


def table_of(rows: list[Row]) -> Table:
    table = Table(title="ms per layer and token, two layers of Llama-3.2-1B's shape, random weights and cache")
    for column in (
        "dtype",
        "cached",
        "batch",
        LAYERS_ALONE,
        *WAYS,
        "vs dynamic",
        "of it: cache",
        "of it: sparsity",
        "vs static",
        "bytes read",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        dynamic, static, dense, sparse = (row.milliseconds[way] for way in WAYS)
        table.add_row(
            row.dtype,
            f"{row.context:,}",
            str(row.batch),
            *(f"{row.milliseconds[way]:.1f}" for way in (LAYERS_ALONE, *WAYS)),
            f"{dynamic / sparse:.1f}x",
            f"{dynamic / dense:.1f}x",
            f"{dense / sparse:.1f}x",
            f"{static / sparse:.1f}x",
            f"{row.bytes_dense / row.bytes_sparq:.1f}x less",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 16384, 65536])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4, help="the first is not counted")
    parser.add_argument("--tokens", type=int, default=12, help="decode steps of each way in each round")
    parser.add_argument("--r", type=int)
    parser.add_argument("--k", type=int)
    parser.add_argument("--ratio", type=float, default=8)
    parser.add_argument("--json", type=Path, help="write rows, machine and settings there")
    args = parser.parse_args()

    console = Console(width=150)
    knobs = dict(r=args.r, k=args.k, ratio=args.ratio)
    rows = []
    with Progress(console=console, transient=True) as progress:
        steps = len(args.dtypes) * len(args.contexts) * args.rounds * (len(WAYS) + 1)
        task = progress.add_task("", total=steps)
        for dtype in args.dtypes:
            for context in args.contexts:
                rows.append(
                    measure(
                        dtype,
                        context,
                        args.batch,
                        knobs,
                        args.rounds,
                        args.tokens,
                        lambda what: progress.update(task, advance=1, description=what),
                    )
                )
    console.print(table_of(rows))
    console.print(
        "vs dynamic = cache x sparsity: SparQ's cache kept dense against stock's, then the same cache read sparsely.\n"
        "'layers alone' is the step with 16 cached positions: linear layers and Python, which SparQ does not touch."
    )
    if args.json:
        args.json.write_text(
            json.dumps(
                dict(machine=machine(), settings={**vars(args), "json": None}, rows=[asdict(row) for row in rows]),
                indent=1,
            )
        )


if __name__ == "__main__":
    main()

"""A prompt cache in a file against reading the prompt again, and its index made anew against one read from a file.

    python benchmarks/prompt_cache.py --model llama-3.2-1b --contexts 16384 65536

Seconds of `--layers` layers of the model's shape with random weights, which are alike; a question of 16 tokens follows
the context. Warm: the file lies in the operating system's memory. Cold: it was told to forget the file before each
turn, and the disk is read.

    read        with --read: the context computed by the model, once (else K and V are random)
    save        `sparq.save_cache`
    load        `sparq.load_cache` and the question, up to the first token: dense, it needs no index
    second      the token after that, the first sparse step; it makes the index of the whole context
    index made  the part of `second` that is the index
    index read  what would stand in its place: the same tensors, from safetensors into memory
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from harness import Measured, Row, Timing, finish, parser_of, positive, progress
from models import SHAPES, Heads, build
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, PreTrainedModel, StoppingCriteriaList
from workload import DTYPES

import sparq
from sparq import branches
from sparq.cache import upgrade
from sparq.cache_argument import generate_cache_name
from sparq.timing import DecodeClock

QUESTION = 16  # tokens


def forget(*paths: Path) -> None:
    """Let the operating system drop what it holds of the files."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def answer(model: PreTrainedModel, path: Path, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds from nothing to the first token, and from there to the second."""
    clock = DecodeClock()
    begin = time.perf_counter()
    cache, _ = sparq.load_cache(path, model, ids[0, :-QUESTION])
    with sparq.patched(model, min_length=0):
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=2,
            stopping_criteria=StoppingCriteriaList([clock]),
            **{generate_cache_name(): cache},
        )
        assert sparq.report(model).total.sparse_steps == len(cache.layers)
    return clock.times[0] - begin, clock.times[1] - clock.times[0]


def make_index(path: Path, model: PreTrainedModel) -> tuple[float, dict[str, torch.Tensor]]:
    """Seconds of making it, K and V being in memory, and its tensors."""
    cache, _ = sparq.load_cache(path, model)
    for layer in cache.layers:  # out of the file
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    upgrade(cache, "int4")
    begin = time.perf_counter()
    made = [layer.index() for layer in cache.layers]
    seconds = time.perf_counter() - begin
    names = ("components", "ranges", "value_sum")
    return seconds, {f"{i}.{name}": getattr(index, name) for i, index in enumerate(made) for name in names}


def read_index(path: Path) -> float:
    begin = time.perf_counter()
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  it is no dict
            file.get_tensor(name).clone()
    return time.perf_counter() - begin


def measure(model: PreTrainedModel, context: int, args: argparse.Namespace, folder: Path) -> Row:
    ids = torch.randint(1, model.config.vocab_size, (1, context + QUESTION))
    cache = DynamicCache(config=model.config)
    found: dict[str, list[float]] = {}
    if args.read:
        begin = time.perf_counter()
        branches.read(model, ids[0, :context].tolist(), cache)
        found["read"] = [time.perf_counter() - begin]
    else:
        heads = Heads.of(model.config)
        for i in range(len(cache.layers)):
            cache.update(*torch.randn(2, 1, heads.kv, context, heads.head_dim).to(model.dtype), i)
    path, index_path = folder / "cache", folder / "index"
    begin = time.perf_counter()
    sparq.save_cache(cache, ids[:, :context], path, model)
    found["save"] = [time.perf_counter() - begin]
    del cache
    save_file(make_index(path, model)[1], index_path)
    for state in ("warm", "cold"):
        for _ in range(args.rounds):
            seconds = {}
            for name in ("load", "index read"):
                if state == "cold":
                    forget(path, index_path)
                if name == "load":
                    seconds["load"], seconds["second"] = answer(model, path, ids)
                else:
                    seconds[name] = read_index(index_path)
            if state == "warm":
                seconds["index made"], _ = make_index(path, model)
            for name, value in seconds.items():
                found.setdefault(f"{name}, {state}", []).append(value)
    sizes = {"bytes": path.stat().st_size, "index_bytes": index_path.stat().st_size}
    case = {"dtype": args.dtype, "cached": context}
    return Row(case, {name: Measured(values) for name, values in found.items()}, sizes)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="llama-3.2-1b", choices=list(SHAPES))
    parser.add_argument("--contexts", type=positive, nargs="+", default=[16384, 65536])
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--layers", type=positive, default=2)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--read", action="store_true", help="read the context, too, which takes long")
    parser.add_argument("--folder", type=Path, help="where the files are written (default: the temporary folder)")
    args = parser.parse_args()
    subject = build(args.model, DTYPES[args.dtype], args.layers)
    rows = []
    for context in progress(args.contexts):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows.append(measure(subject.model, context, args, Path(folder)))
    print(f"{subject.layers} of {subject.layers_of} layers of {args.model}'s shape, {args.dtype}")
    for row in rows:
        size, index = row.facts["bytes"] / 2**20, row.facts["index_bytes"] / 2**20
        print(f"{row.case['cached']:,} tokens, {size:,.0f} MiB, an index would be {index:,.0f}; seconds:")
        for name, way in row.ways.items():
            timing = Timing.of(way.seconds)
            print(f"  {name:16} {timing.median:9.4f}  ({timing.low:.4f} to {timing.high:.4f})")
    finish(args, rows, **subject.described())


if __name__ == "__main__":
    main()

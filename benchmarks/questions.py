"""Questions about one context, one at a time against several: seconds per answer, the context being in the cache.

    python benchmarks/questions.py --model "$(python evals/smollm2.py)"
    python benchmarks/questions.py --model llama-3.2-1b --layers 4

A real model reads Python's documentation, a shape with random weights random tokens. Each question has 16 tokens and
an answer of `--tokens`, and all of them are answered, `--batches` at a time: the seconds are those of copying the
context for each, of reading the questions, and of the answers' tokens. Ways alternate, round by round.
"""

from __future__ import annotations

import argparse
import copy
import time
from pydoc_data.topics import topics
from typing import Any

import torch
from harness import SPARQ, STOCK, Measured, Row, Timing, finish, parser_of, positive, progress
from models import build, is_real
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, DynamicCache
from workload import DTYPES

import sparq
from sparq import branches

QUESTION = 16  # tokens
QUESTIONS = 8


def tokens_of(model: str, length: int, vocabulary: int) -> list[int]:
    if is_real(model):
        found = AutoTokenizer.from_pretrained(model)("\n".join(topics.values()))["input_ids"]
        return found[:length]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, vocabulary, (length,), generator=generator).tolist()


def prompts_of(args: argparse.Namespace, context: int, vocabulary: int) -> list[list[int]]:
    """They part right behind the context."""
    tokens = tokens_of(args.model, context + QUESTIONS * (QUESTION - 1), vocabulary)
    rest = tokens[context:]
    questions = [[10 + i, *rest[i * (QUESTION - 1) : (i + 1) * (QUESTION - 1)]] for i in range(QUESTIONS)]
    return [tokens[:context] + question for question in questions]


def measure(model: Any, prompts: list[list[int]], context: int, args: argparse.Namespace) -> list[Row]:
    cache = DynamicCache(config=model.config)
    branches.read(model, prompts[0][:context], cache)
    rows = {size: Row({"context": context, "batch": size}) for size in args.batches}
    options = dict(max_new_tokens=args.tokens, min_new_tokens=args.tokens)
    for turn in range(args.rounds + 1):
        for way in (STOCK, SPARQ):
            for size, row in rows.items():
                own = copy.deepcopy(cache)
                if way == SPARQ:
                    with sparq.patched(model, min_length=args.min_length):
                        seconds, found = timed(model, prompts, own, size, options)
                else:
                    seconds, found = timed(model, prompts, own, size, options)
                assert found.decode_tokens == QUESTIONS * (args.tokens - 1)
                if turn:  # the first warms up
                    row.ways.setdefault(way, Measured()).seconds.append(seconds / QUESTIONS)
                    row.facts[f"{way}, decode"] = found.decode_seconds / QUESTIONS
    return list(rows.values())


def timed(model: Any, prompts: list[list[int]], cache: Any, size: int, options: dict) -> tuple[float, Any]:
    begin = time.perf_counter()
    found = branches.generate(model, prompts, cache=cache, batch_size=size, **options)
    return time.perf_counter() - begin, found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="llama-3.2-1b", help="a shape of models.py, or a real model's folder")
    parser.add_argument("--layers", type=positive, help="of a shape (default: all)")
    parser.add_argument("--contexts", type=positive, nargs="+", default=[1024, 6144])
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 4, 8])
    parser.add_argument("--tokens", type=positive, default=32, help="of an answer")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--min-length", type=int, help="as SparQ has it")
    parser.add_argument("--rounds", type=positive, default=3)
    args = parser.parse_args()
    subject = build(args.model, DTYPES[args.dtype], args.layers)
    rows = []
    for context in progress(args.contexts):
        rows += measure(subject.model, prompts_of(args, context, subject.vocabulary), context, args)
    title = f"{subject.name}, {subject.layers} of {subject.layers_of} layers, {args.dtype}: seconds per answer"
    table = Table("context", "at a time", STOCK, SPARQ, title=title)
    for row in rows:
        timings = [Timing.of(row.ways[way].seconds) for way in (STOCK, SPARQ)]
        cells = [f"{timing.median:.2f} ({timing.low:.2f} to {timing.high:.2f})" for timing in timings]
        table.add_row(f"{row.case['context']:,}", str(row.case["batch"]), *cells)
    Console().print(table)
    finish(args, rows, **subject.described())


if __name__ == "__main__":
    main()

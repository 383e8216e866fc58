"""Time per token and tokens per second of `generate`, stock and with SparQ, and where the difference comes from.

    python benchmarks/generation.py --json generation.json
    python benchmarks/generation.py --contexts 512 16384 65536 --dtypes float32 bfloat16
    python benchmarks/generation.py --model llama-2-7b --layers 1 --batches 1 4 --profile
    python benchmarks/generation.py --model path/to/a/model --contexts 4000
    python benchmarks/generation.py --device cuda --graphs --all-layers --dtypes bfloat16
    python benchmarks/generation.py --gpu --device cuda --seconds 160 --json rows.json     (generation_gpu.py)

A named shape has the true layers of that model with random weights; `--layers` says how many of them (two, unless all
or other are asked for), and where layers are cut off, the vocabulary is cut to 256, so that nothing but the layers
costs time. Its cache is filled with random keys and values instead of an hour of prefill (`--prefill` computes a prompt
of random tokens instead, as is always done for a real model); greedy `generate` then decodes from it, as a user would.
The ways take turns, round after round, so that a drifting machine favours none:

    layers alone    the stock model with 16 cached positions: what nothing that makes attention faster can go below
    stock dynamic   transformers' `generate` as it is: DynamicCache, which copies the whole cache at every token
    stock static    the same with a preallocated StaticCache
    SparQ's cache   the patched model kept dense: what SparQ's cache gains without any sparsity
    SparQ           the patched model
    with --compile  stock and SparQ on a static cache under torch.compile (minutes of compiling on a CPU)
    with --graphs   stock and SparQ on a static cache, a CUDA graph of the model's own step replayed for each token

Before anything is measured the patched model has to give the stock model's logits where k covers the context, and the
operator the reference's output on a cache of the size measured.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import device_time
import generation_gpu
import torch
from agreement import check
from common import machine
from generation_rows import Result, Row
from generation_tables import grids
from model_options import add_model_arguments, build_subject, check_arguments, fill_in, knobs_of, positive, settings_of
from model_shapes import Subject, is_real
from report import write_json, write_markdown
from rich.console import Console
from rich.progress import Progress
from step_profile import profile
from ways import COMPILED_WAYS, GRAPHED_WAYS, SPARQ, WAYS, GraphRunner, Way, make_runner, steps_of, take_turns

import sparq

FULL = dict(dtypes=["float32", "bfloat16"], rounds=4, tokens=12)
FULL_SETTINGS = [(512, 1), (16384, 1), (65536, 1), (131072, 1), (16384, 8)]  # cached, batch
QUICK = dict(dtypes=["float32"], rounds=2, tokens=4)
QUICK_SETTINGS = [(8192, 1)]


def ways_of(args: argparse.Namespace) -> tuple[Way, ...]:
    return WAYS + (COMPILED_WAYS if args.compile else ()) + (GRAPHED_WAYS if args.graphs else ())


def measure(subject: Subject, context: int, batch: int, args: argparse.Namespace, tick: Callable[[str], None]) -> Row:
    knobs = knobs_of(args)
    dtype = str(subject.model.dtype).removeprefix("torch.")
    what = f"{dtype}, {context:,} cached, batch {batch}: "
    tick(what + "checking")
    check(subject.model, context, batch, knobs)
    room = steps_of(args.rounds, args.tokens) + (args.profile and args.tokens + 1) + 2  # 2: the first ones of a prompt
    runners = []
    for way in ways_of(args):
        tick(what + ("prefilling, " if args.prefill else "filling, ") + way.name)
        runners.append(make_runner(subject.model, way, context, batch, room, knobs, args.prefill))
    take_turns(runners, args.rounds, args.tokens, lambda name: tick(what + name))
    wrong = [
        f"{runner.way.name}: {runner.wrong}" for runner in runners if isinstance(runner, GraphRunner) and runner.wrong
    ]
    if wrong:
        raise SystemExit(f"wrong, so nothing was measured: {'; '.join(wrong)}")
    sparse = next(runner for runner in runners if runner.way is SPARQ)
    total = sparq.report(sparse.model).total
    steps = max(1, total.decode_steps)
    results = {}
    for runner in runners:
        parts = profile(runner, args.tokens) if args.profile and not runner.way.is_compiled else None
        results[runner.way.name] = Result(
            runner.way, runner.seconds, runner.first_token, runner.second_token, runner.cache_bytes, parts
        )
    read = (total.bytes_dense / steps, total.bytes_read / steps)
    return Row(dtype, context, batch, results, *read, total.mean_alpha, dict(total.dense_steps))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument(
        "--contexts", type=positive, nargs="+", help="cached tokens (default: 512 to 131072, and 16384 at batch 8)"
    )
    parser.add_argument("--batches", type=positive, nargs="+", help="of each context (default: 1)")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--prefill", action="store_true", help="compute the prompt (a real model always does)")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, on static caches")
    parser.add_argument("--graphs", action="store_true", help="also CUDA graphs, on static caches")
    parser.add_argument("--profile", action="store_true", help="one more round that shows where a step's time goes")
    parser.add_argument("--markdown", type=Path, help="write the tables there")
    lent = parser.add_argument_group("on a lent GPU")
    lent.add_argument("--gpu", action="store_true", help="rows of its own, the most important ones first")
    lent.add_argument("--seconds", type=positive, default=160, help="of --gpu, after which it stops by itself")
    lent.add_argument("--tiny", action="store_true", help="with --gpu: next to nothing, to try the command")
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    _check_device(parser, args)
    if args.gpu:
        fill_in(args, generation_gpu.FULL, generation_gpu.FULL)
        return args
    fill_in(args, FULL, QUICK)
    usual = QUICK_SETTINGS if args.quick else FULL_SETTINGS
    if args.contexts or args.batches:
        contexts = args.contexts or list(dict.fromkeys(context for context, _ in usual))
        args.settings = list(itertools.product(contexts, args.batches or [1]))
    else:
        args.settings = usual
    args.prefill = args.prefill or is_real(args.model)
    return args


def _check_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with one line about what does not go together."""
    if args.graphs and args.device == "cpu":
        parser.error("--graphs needs --device cuda")
    if args.profile and args.device != "cpu":
        parser.error("--profile needs --device cpu: its timers do not wait for a device")
    if args.tiny and not args.gpu:
        parser.error("--tiny needs --gpu")
    if args.gpu and args.device == "cpu" and not args.tiny:
        parser.error("--gpu on the CPU needs --tiny: the true shapes take hours there")


def main() -> None:
    args = parse()
    if args.gpu:
        raise SystemExit(0 if generation_gpu.run(args) else 1)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"no CUDA device: torch {torch.__version__} sees none; --device cpu measures on the CPU")
    console = Console(width=150)
    rows: list[Row] = []
    title, said = "", {}
    with Progress(console=console, transient=True) as progress:
        ways = len(ways_of(args))
        task = progress.add_task("", total=len(args.dtypes) * len(args.settings) * (1 + ways * (args.rounds + 1)))

        def tick(what: str) -> None:
            progress.update(task, advance=1, description=what)

        for dtype in args.dtypes:
            subject = build_subject(args, dtype, args.device)
            for context, batch in args.settings:
                rows.append(measure(subject, context, batch, args, tick))
                torch.compiler.reset()  # what was compiled has this row's shapes
            title, said = str(subject), subject.described()
            del subject  # one model in memory, not two
    tables = grids(rows, title)
    for grid in tables:
        console.print(grid.table())
    if args.markdown:
        write_markdown(args.markdown, tables)
    if args.json:
        facts = device_time.properties() if args.device == "cuda" else {}
        heading = dict(machine={**machine(), **facts}, model=said, settings=settings_of(args))
        write_json(args.json, dict(**heading, rows=[row.json() for row in rows]))


if __name__ == "__main__":
    main()

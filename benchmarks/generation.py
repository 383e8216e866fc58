"""Time per token and tokens per second of `generate`, stock and with SparQ, and where the difference comes from.

    python benchmarks/generation.py --json generation.json
    python benchmarks/generation.py --contexts 512 16384 65536 --dtypes float32 bfloat16
    python benchmarks/generation.py --model llama-2-7b --layers 1 --batches 1 4 --profile
    python benchmarks/generation.py --model path/to/a/model --contexts 4000
    python benchmarks/generation.py --scaling --json scaling.json
    python benchmarks/generation.py --device cuda --graphs --all-layers --dtypes bfloat16

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

`--scaling` lets stock's caches and SparQ decode at growing contexts (batch 1), then at growing batches. Straight lines
are fitted to the medians by least squares: their slopes, with standard errors, are what one more cached token and one
more row of the batch cost in each layer.

Before anything is measured the patched model has to give the stock model's logits where k covers the context, and the
operator the reference's output on a cache of the size measured.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import wraps
from typing import Any

import torch
from gpu_stages.clocks import Device
from harness import Line, Measured, Row, document, fill_in, parser_of, positive, progress_of, write_json
from models import (
    Subject,
    add_knobs,
    add_model_arguments,
    build_subject,
    check_arguments,
    is_real,
    knobs_of,
)
from opponents import (
    COMPILED_WAYS,
    DYNAMIC,
    GRAPHED_WAYS,
    SPARQ_WAY,
    STATIC,
    WAYS,
    GraphRunner,
    Runner,
    Way,
    check,
    make_runner,
    steps_of,
    take_turns,
)
from tables import generation_grid, parts_grid, show, slopes_grid, ways_grid
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sparq

FULL = dict(dtypes=["float32", "bfloat16"], rounds=4, tokens=12)
FULL_SETTINGS = [(512, 1), (16384, 1), (65536, 1), (131072, 1), (16384, 8)]  # cached, batch
QUICK = dict(dtypes=["float32"], rounds=2, tokens=4)
QUICK_SETTINGS = [(8192, 1)]
SCALING_WAYS = (DYNAMIC, STATIC, SPARQ_WAY)
SCALING = dict(contexts=[4096, 8192, 16384, 32768, 65536], batches=[1, 2, 4, 8], dtypes=["float32"], rounds=4, tokens=6)
QUICK_SCALING = dict(contexts=[2048, 4096, 8192], batches=[1, 2, 3], dtypes=["float32"], rounds=2, tokens=3)
BATCH_CONTEXT = 8192  # cached tokens of every row, where the batch grows
AXES = {"cached": ("1,000 cached tokens", 1000), "batch": ("row of the batch", 1)}  # unit, and how many are one
PARTS = ("attention", "cache update", "linear layers", "rest of the model", "generate")


def ways_of(args: argparse.Namespace) -> tuple[Way, ...]:
    if args.scaling:
        return SCALING_WAYS
    return WAYS + (COMPILED_WAYS if args.compile else ()) + (GRAPHED_WAYS if args.graphs else ())


def measure(subject: Subject, context: int, batch: int, args: argparse.Namespace, tick: Callable[[str], object]) -> Row:
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
    for runner in runners:
        if isinstance(runner, GraphRunner) and runner.wrong:
            raise SystemExit(f"wrong, so nothing was measured: {runner.way.name}: {runner.wrong}")
    sparse = next(runner for runner in runners if runner.way is SPARQ_WAY)
    total = sparq.report(sparse.model).total
    steps = max(1, total.decode_steps)
    row = Row({"dtype": dtype, "cached": context, "batch": batch})
    row.facts = dict(bytes_dense=total.bytes_dense / steps, bytes_sparq=total.bytes_read / steps)
    row.facts |= dict(mean_alpha=total.mean_alpha, dense_steps=dict(total.dense_steps))
    for runner in runners:
        facts: dict[str, Any] = {"cache_bytes": runner.cache_bytes}
        facts |= dict(zip(("first token s", "second s"), runner.first_tokens, strict=False))
        if args.profile and not runner.way.is_compiled:
            facts["parts"] = profile(runner, args.tokens)
        row.ways[runner.way.name] = Measured(runner.seconds, facts=facts)
    return row


def profile(runner: Runner, tokens: int) -> dict[str, float]:
    """Median seconds of a decode step of `generate`, by part (`PARTS`), from `tokens` steps that nothing else counts.

    `generate` is what is neither of the model's: choosing the token, stopping criteria, preparing inputs. The rest of
    the model is norms, activations, rotary positions, masks, residual sums, hooks and Python. The timers are a CPU's,
    where a call is over when it returns.
    """
    steps: list[dict[str, float]] = []
    timers = Timers()
    ended = time.perf_counter()
    forward = timers.around("rest of the model", runner.model.forward)

    @wraps(runner.model.forward)  # `generate` asks which arguments `forward` takes
    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal ended
        before = dict(timers.seconds)
        outside = time.perf_counter() - ended
        output = forward(*args, **kwargs)
        ended = time.perf_counter()
        taken = {part: timers.seconds[part] - before[part] for part in PARTS}
        steps.append({**taken, "generate": outside})
        return output

    implementation = runner.model.config.get_text_config(decoder=True)._attn_implementation
    with ExitStack() as undo:
        undo.enter_context(shadowed(runner.model, "forward", step))
        undo.enter_context(shadowed(runner.cache, "update", timers.around("cache update", runner.cache.update)))
        for module in runner.model.modules():
            if isinstance(module, nn.Linear):
                undo.enter_context(shadowed(module, "forward", timers.around("linear layers", module.forward)))
        attention = ALL_ATTENTION_FUNCTIONS[implementation]
        AttentionInterface.register(implementation, timers.around("attention", attention))
        undo.callback(AttentionInterface.register, implementation, attention)
        runner.decode(tokens)
    counted = steps[1:]  # `generate` sets itself up before the first
    return {part: statistics.median(step[part] for step in counted) for part in PARTS}


class Timers:
    """Seconds by part; a part that runs inside another one is counted as its own, and not as the other's."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inside: list[float] = []  # of each timer that runs: what timers within it have taken

    def around(self, part: str, function: Callable) -> Callable:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - started
                self.seconds[part] += taken - self._inside.pop()
                if self._inside:
                    self._inside[-1] += taken

        return timed


@contextmanager
def shadowed(holder: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of the instance in place of the method of its class."""
    setattr(holder, name, value)
    try:
        yield
    finally:
        delattr(holder, name)


def lines_of(rows: list[Row], layers: int) -> list[dict[str, Any]]:
    """Through the medians of the rows of each axis: ms per layer and unit of it."""
    found = []
    for axis, (unit, per) in AXES.items():
        for way in SCALING_WAYS:
            points = [
                (row.case[axis] / per, 1e3 * row.ways[way.name].median / layers)
                for row in rows
                if row.facts["axis"] == axis
            ]
            found.append({"axis": axis, "unit": unit, "way": way.name, **asdict(Line.through(points))})
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_model_arguments(parser)
    add_knobs(parser)
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
    parser.add_argument("--scaling", action="store_true", help="growing contexts, then growing batches, and the slopes")
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    if args.graphs and args.device == "cpu":
        parser.error("--graphs needs --device cuda")
    if args.profile and args.device != "cpu":
        parser.error("--profile needs --device cpu: its timers do not wait for a device")
    args.prefill = args.prefill or is_real(args.model)
    if args.scaling:
        fill_in(args, SCALING, QUICK_SCALING)
        if len(args.dtypes) > 1:
            parser.error("--scaling takes one of --dtypes")
        for name in ("contexts", "batches"):
            if len(set(getattr(args, name))) < 2:
                parser.error(f"--{name} must be at least two different numbers: they make a line")
        args.settings = [(context, 1) for context in args.contexts]
        args.settings += [(BATCH_CONTEXT, batch) for batch in args.batches]
        return args
    fill_in(args, FULL, QUICK)
    args.settings = QUICK_SETTINGS if args.quick else FULL_SETTINGS
    if args.contexts or args.batches:
        contexts = args.contexts or list(dict.fromkeys(context for context, _ in args.settings))
        args.settings = list(itertools.product(contexts, args.batches or [1]))
    return args


def main() -> None:
    args = parse()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"no CUDA device: torch {torch.__version__} sees none; --device cpu measures on the CPU")
    rows: list[Row] = []
    turns = 1 + len(ways_of(args)) * (args.rounds + 1)
    with progress_of(len(args.dtypes) * len(args.settings) * turns) as tick:
        for dtype in args.dtypes:
            subject = build_subject(args, dtype)
            for context, batch in args.settings:
                rows.append(measure(subject, context, batch, args, tick))
                torch.compiler.reset()  # what was compiled has this row's shapes
            title, said = str(subject), subject.described()
            del subject  # one model in memory, not two
    lines = {}
    if args.scaling:
        for number, row in enumerate(rows):
            row.facts["axis"] = "cached" if number % len(args.settings) < len(args.contexts) else "batch"
        lines = {"lines": lines_of(rows, said["layers"])}
    result = document(args, rows, model=said, **lines)
    if args.device == "cuda":
        result["machine"] |= Device().properties()
    print(title)
    show(ways_grid(result), generation_grid(result))
    if args.profile:
        show(parts_grid(result))
    if args.scaling:
        show(slopes_grid(result))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()

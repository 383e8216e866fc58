"""Time per token and tokens per second of `generate`, stock and with SparQ, and where the difference comes from.

    python benchmarks/generation.py --contexts 512 16384 65536 --dtypes float32 bfloat16 --json generation.json
    python benchmarks/generation.py --model llama-2-7b --layers 1 --batches 1 4 --profile
    python benchmarks/generation.py --model path/to/a/model --contexts 4000
    python benchmarks/generation.py --scaling --json scaling.json
    python benchmarks/generation.py --dtypes bfloat16 int8 --contexts 4096 65536 --compile
    python benchmarks/generation.py --device cuda --graphs --all-layers --dtypes bfloat16

A named shape has the true layers of that model with random weights, two unless all or other are asked for; where layers
are cut off, so is the vocabulary, to 256: nothing but the layers shall cost time. Its cache is filled with random keys
and values instead of an hour of prefill; a real model computes a prompt of random tokens, as `--prefill` does. Greedy
`generate` then decodes from it, as a user would. The ways take turns, so that a drifting machine favours none:

    layers alone    the stock model with 16 cached positions: what nothing that makes attention faster can go below
    stock dynamic   transformers' `generate` as it is: DynamicCache, which copies the whole cache at every token
    stock static    the same with a preallocated StaticCache
    SparQ's cache   the patched model kept dense: what SparQ's cache gains without any sparsity
    SparQ           the patched model
    with --compile  stock and SparQ on a static cache under torch.compile (minutes of compiling on a CPU)
    with --graphs   stock and SparQ on a static cache, a CUDA graph of the model's own step replayed for each token

`--scaling` lets stock's caches and SparQ decode at growing contexts (batch 1), then at growing batches. The slopes of
lines through the medians are what one more cached token and one more row of the batch cost in each layer.

Before anything is measured the patched model has to give the stock model's logits where k covers the context, and the
operator the reference's output on a cache of the size measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import opponents
import torch
from gpu_stages.clocks import Device
from harness import Measured, Row, finish, line_of, machine, parser_of, positive, progress
from models import SHAPES, Subject, build, is_real, quantize
from tables import generation_grid, model_title, parts_grid, show, slopes_grid, ways_grid
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from workload import DTYPES

import sparq
from sparq.index import KINDS

MEASURED_LAYERS = 2  # of a named shape
SETTINGS = [(512, 1), (16384, 1), (65536, 1), (131072, 1), (16384, 8)]  # cached, batch
SCALING_WAYS = (opponents.DYNAMIC, opponents.STATIC, opponents.SPARQ_WAY)
SCALING_CONTEXTS, SCALING_BATCHES = [4096, 8192, 16384, 32768, 65536], [1, 2, 4, 8]
BATCH_CONTEXT = 8192  # cached tokens of every row, where the batch grows
AXES = {"cached": ("1,000 cached tokens", 1000), "batch": ("row of the batch", 1)}  # unit, and how many are one
INT8 = "int8"  # of --dtypes: bfloat16, and of the linear layers' weights 8 bits
PARTS = ("attention", "cache update", "linear layers", "rest of the model", "generate")


def ways_of(args: argparse.Namespace) -> tuple[opponents.Way, ...]:
    if args.scaling:
        return SCALING_WAYS
    compiled = opponents.COMPILED_WAYS if args.compile else ()
    graphed = opponents.GRAPHED_WAYS if args.graphs else ()
    return opponents.WAYS + compiled + graphed


def knobs_of(args: argparse.Namespace) -> dict[str, Any]:
    return dict(r=args.r, k=args.k, ratio=args.ratio, index=args.index, mass=args.mass)


def subject_of(args: argparse.Namespace, dtype: str) -> Subject:
    layers = args.layers or (None if args.all_layers or is_real(args.model) else MEASURED_LAYERS)
    subject = build(args.model, torch.bfloat16 if dtype == INT8 else DTYPES[dtype], layers, args.device)
    if dtype == INT8:
        quantize(subject.model)
    return subject


def measure(subject: Subject, dtype: str, context: int, batch: int, args: argparse.Namespace) -> Row:
    model, knobs = subject.model, knobs_of(args)
    opponents.check(model, context, batch, knobs)
    room = opponents.steps_of(args.rounds + args.profile, args.tokens) + 2  # the first ones after a prompt
    runners = [opponents.make_runner(model, way, context, batch, room, knobs, args.prefill) for way in ways_of(args)]
    opponents.take_turns(runners, args.rounds, args.tokens)
    for runner in runners:
        if isinstance(runner, opponents.GraphRunner) and runner.wrong:
            raise SystemExit(f"wrong, so nothing was measured: {runner.way.name}: {runner.wrong}")
    shown = "bfloat16, int8 weights" if dtype == INT8 else dtype
    row = Row({"dtype": shown, "cached": context, "batch": batch})
    total = sparq.report(next(runner.model for runner in runners if runner.way is opponents.SPARQ_WAY)).total
    steps = max(1, total.decode_steps)
    row.facts = dict(bytes_dense=total.bytes_dense / steps, bytes_sparq=total.bytes_read / steps)
    row.facts |= dict(mean_alpha=total.mean_alpha, dense_steps=dict(total.dense_steps))
    for runner in runners:
        facts = {"cache_bytes": runner.cache_bytes, **runner.first_tokens}
        if args.profile and not runner.way.is_compiled:
            facts["parts"] = profile(runner, args.tokens)
        row.ways[runner.way.name] = Measured(runner.seconds, facts=facts)
    torch.compiler.reset()  # what was compiled has this row's shapes
    return row


def profile(runner: opponents.Runner, tokens: int) -> dict[str, float]:
    """Median seconds of a decode step of `generate`, by part (`PARTS`), from `tokens` steps that nothing else counts.

    `generate` is what is neither of the model's: choosing the token, stopping criteria, preparing inputs. The rest of
    the model is norms, activations, rotary positions, masks, residual sums, hooks and Python. The timers are a CPU's,
    where a call is over when it returns.
    """
    steps: list[dict[str, float]] = []
    timers = Timers()
    ended = time.perf_counter()
    whole = timers.around("rest of the model", runner.model.forward)

    @wraps(runner.model.forward)  # `generate` asks which arguments `forward` takes
    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal ended
        before = dict(timers.seconds)
        outside = time.perf_counter() - ended
        output = whole(*args, **kwargs)
        ended = time.perf_counter()
        taken = {part: timers.seconds[part] - before[part] for part in PARTS}
        steps.append({**taken, "generate": outside})
        return output

    implementation = runner.model.config.get_text_config(decoder=True)._attn_implementation
    with ExitStack() as undo:
        undo.enter_context(mock.patch.object(runner.model, "forward", step))
        update = timers.around("cache update", runner.cache.update)
        undo.enter_context(mock.patch.object(runner.cache, "update", update))
        for module in runner.model.modules():
            if isinstance(module, nn.Linear):
                forward = timers.around("linear layers", module.forward)
                undo.enter_context(mock.patch.object(module, "forward", forward))
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


def lines_of(rows: list[Row], layers: int) -> list[dict[str, Any]]:
    """Through the rows of each axis: ms per layer and unit of it."""
    found = []
    for axis, (unit, per) in AXES.items():
        of_axis = [row for row in rows if row.facts["axis"] == axis]
        for way in SCALING_WAYS:
            line = line_of(of_axis, way.name, axis, per, layers)
            found.append({"axis": axis, "unit": unit, "way": way.name, **line})
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--model", default="llama-3.2-1b", help=f"{', '.join(SHAPES)}, or a real model's folder or name")
    add("--layers", type=positive, help="keep the first of them only (default: 2; of a real model all)")
    add("--all-layers", action="store_true", help="of a named shape too, with its whole vocabulary")
    add("--contexts", type=positive, nargs="+", help="cached tokens (default: 512 to 131072, and 16384 at batch 8)")
    add("--batches", type=positive, nargs="+", help="of each context (default: 1)")
    dtypes = "default: float32 bfloat16; with --scaling float32. int8: weights of linear layers, the rest bfloat16"
    add("--dtypes", nargs="+", choices=[*DTYPES, INT8], help=dtypes)
    add("--rounds", type=positive, default=4, help="of several the first is not counted")
    add("--tokens", type=positive, help="decode steps of each way in each round (default: 12; with --scaling 6)")
    add("--r", type=positive, help="of SparqConfig, as k and ratio")
    add("--k", type=positive)
    add("--ratio", type=float, default=8)
    add("--index", choices=KINDS, default="int4")
    add("--mass", type=float, default=1.0, help="1.0 (the default here): all k; random keys have no sharp attention")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--prefill", action="store_true", help="compute the prompt (a real model always does)")
    add("--compile", action="store_true", help="also torch.compile, on static caches")
    add("--graphs", action="store_true", help="also CUDA graphs, on static caches")
    add("--profile", action="store_true", help="one more round that shows where a step's time goes")
    add("--scaling", action="store_true", help="growing contexts, then growing batches, and the slopes")
    args = parser.parse_args(arguments)
    if args.layers is not None and args.all_layers:
        parser.error("--layers and --all-layers exclude each other")
    if is_real(args.model) and "/" not in args.model and not Path(args.model).is_dir():
        parser.error(f"--model must be one of {', '.join(SHAPES)}, a folder, or owner/name, got {args.model!r}")
    try:
        sparq.SparqConfig(**knobs_of(args))
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    if args.graphs and args.device == "cpu":
        parser.error("--graphs needs --device cuda")
    if args.profile and args.device != "cpu":
        parser.error("--profile needs --device cpu: its timers do not wait for a device")
    args.prefill = args.prefill or is_real(args.model)
    args.dtypes = args.dtypes or (["float32"] if args.scaling else ["float32", "bfloat16"])
    if INT8 in args.dtypes:
        if args.device != "cpu" or args.profile:
            parser.error("--dtypes int8 needs --device cpu, and no --profile: it cannot see into compiled layers")
        if importlib.util.find_spec("torchao") is None:
            parser.error("--dtypes int8 needs torchao: pip install 'sparq-attention[int8]'")
    args.tokens = args.tokens or (6 if args.scaling else 12)
    if args.scaling:
        args.contexts, args.batches = args.contexts or SCALING_CONTEXTS, args.batches or SCALING_BATCHES
        if len(args.dtypes) > 1:
            parser.error("--scaling takes one of --dtypes")
        if min(len(set(args.contexts)), len(set(args.batches))) < 2:
            parser.error("--contexts and --batches must each be at least two different numbers: they make a line")
        args.settings = [(context, 1) for context in args.contexts]
        args.settings += [(BATCH_CONTEXT, batch) for batch in args.batches]
    elif args.contexts or args.batches:
        contexts = args.contexts or dict.fromkeys(context for context, _ in SETTINGS)
        args.settings = list(itertools.product(contexts, args.batches or [1]))
    else:
        args.settings = SETTINGS
    return args


def main() -> None:
    args = parse()
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit(f"no CUDA device: torch {torch.__version__} sees none; --device cpu measures on the CPU")
    rows: list[Row] = []
    for dtype in args.dtypes:
        subject = subject_of(args, dtype)
        rows += [measure(subject, dtype, *setting, args) for setting in progress(args.settings, dtype)]
        facts: dict[str, Any] = {"model": subject.described()}
        del subject  # one model in memory, not two
    if args.scaling:
        for number, row in enumerate(rows):
            row.facts["axis"] = "cached" if number < len(args.contexts) else "batch"
        facts["lines"] = lines_of(rows, facts["model"]["layers"])
    if on_gpu:
        facts["machine"] = machine() | Device().properties()
    result = finish(args, rows, **facts)
    print(model_title(result))
    show(ways_grid(result), generation_grid(result))
    if args.profile:
        show(parts_grid(result))
    if args.scaling:
        show(slopes_grid(result))


if __name__ == "__main__":
    main()

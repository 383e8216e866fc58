"""Milliseconds per layer and token of llama.cpp on the CPU, and of SparQ on the same weights, by cached positions.

    pip install llama-cpp-python gguf
    python benchmarks/llamacpp.py --contexts 512 4096 16384 65536 --dtypes float32 float16 --flash-attention on off

The model is the one of benchmarks/generation.py: true layers of Llama-3.2-1B with random weights, and a vocabulary of
256. llama.cpp loads it from a GGUF file, through the low-level interface of llama-cpp-python; weights and cache have
the dtype named. Unless its logits agree with those of transformers' LlamaForCausalLM, nothing is measured.

A step of llama.cpp is one `llama_decode` of one token; one of SparQ, what a user of `generate` waits for, with its
Python. llama.cpp runs in a process of its own and waits while SparQ runs, and the other way round: in every round each
way decodes a few tokens at each context. The first round is not counted. llama.cpp's cache is filled with the keys and
values of a few random tokens, moved to further and further positions, SparQ's with random numbers.

"Layers alone" is a step with 16 cached positions. The slope with the context, ms per layer per 1,000 cached positions,
is that of the line of least squares through the medians of every round, layers alone among them; its standard error is
that of the residuals, and so includes whatever is not a line. The same through the fastest step of every round stands
beside it: where other programs take turns on the same cores, medians measure those too. On a machine that is never idle
`--threads 1 --clock processor` takes the processor time of each process, which waiting for one's turn does not add to.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from agreement import check
from common import machine
from line_fit import Line
from llama_gguf import write_gguf
from model_shapes import build
from report import Grid, write_json
from rich.console import Console
from rich.progress import Progress
from transformers import LlamaForCausalLM
from ways import BARE_CONTEXT, Runner, make_runner
from ways import SPARQ as SPARQ_WAY

NEEDED = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}  # modules: packages
SPARQ = SPARQ_WAY.name
LLAMA_CPP = {True: "llama.cpp, flash", False: "llama.cpp, no flash"}
# Of the logits, relative, against float32 arithmetic on the same weights: llama.cpp rounds activations to the dtype of
# the weights before every product.
TOLERANCE = {"float32": 1e-2, "float16": 2e-2}
PROMPT = 48
CLOCKS = {"wall": "perf_counter", "processor": "process_time"}  # functions of the time module
WISHED = 5.0  # times the slope of SparQ

Times = dict[int, list[list[float]]]  # by context, of each counted round: milliseconds per layer of its steps


class LlamaCpp:
    """The worker's methods, called in its process; use it as a context manager."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("llamacpp_worker.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def __call__(self, name: str, **arguments: object) -> Any:
        print(json.dumps({"do": name, **arguments}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp ended with status {self.process.wait()} while asked to {name}")
        return json.loads(line)


@dataclass(frozen=True)
class Row:
    """Milliseconds per layer and token: median and (10 %, 90 %) quantiles over all counted steps."""

    dtype: str
    context: int
    milliseconds: dict[str, float]
    spread: dict[str, tuple[float, float]]
    fastest: dict[str, float]


@dataclass(frozen=True)
class Slope:
    """Milliseconds per layer per 1,000 cached positions, and the standard error of that."""

    value: float
    error: float

    def times(self, other: Slope) -> Slope:
        """How many times the other slope this is; the error to first order, of independent slopes."""
        ratio = self.value / other.value
        return Slope(ratio, abs(ratio) * math.hypot(self.error / self.value, other.error / other.value))

    def at_least(self, wished: float) -> str:
        """Whether it is, where two standard errors leave no doubt."""
        low, high = self.value - 2 * self.error, self.value + 2 * self.error
        return "yes" if low >= wished else "no" if high < wished else "open"

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.error:.1g}"


@dataclass(frozen=True)
class Result:
    """Of one dtype. `disagreement` is the relative error of llama.cpp's logits; slopes are those of the medians of the
    rounds and of their fastest steps."""

    dtype: str
    disagreement: dict[str, float]
    rows: list[Row]
    slopes: dict[str, Slope]
    fastest_slopes: dict[str, Slope]


def slope_of(points: Sequence[tuple[float, float]]) -> Slope:
    """Of the line of least squares through (positions, milliseconds); the error is NaN where nothing is left over."""
    line = Line.through([x / 1000 for x, _ in points], [y for _, y in points])
    return Slope(line.slope, line.slope_error)


def disagreement(model: LlamaForCausalLM, llama_cpp: LlamaCpp, flash: bool) -> float:
    """Relative error of llama.cpp's logits for a random prompt."""
    generator = random.Random(2)
    tokens = [generator.randrange(model.config.vocab_size) for _ in range(PROMPT)]
    theirs = torch.tensor(llama_cpp("logits", flash_attention=flash, tokens=tokens))
    with torch.no_grad():
        ours = copy.deepcopy(model).float()(torch.tensor([tokens])).logits[0]
    return float((theirs - ours).norm() / ours.norm())


def check_same_work(model: LlamaForCausalLM, llama_cpp: LlamaCpp, dtype: str, flash: bool) -> float:
    """The disagreement; raise if it is too large."""
    error = disagreement(model, llama_cpp, flash)
    if not error < TOLERANCE[dtype]:
        raise SystemExit(f"{LLAMA_CPP[flash]}, {dtype}: logits are wrong by {error:.1e}, nothing is measured")
    return error


def sparq_times(runner: Runner, tokens: int, clock: str) -> list[float]:
    """Seconds of each decode step of `generate` with SparQ, by the function `clock` of the time module."""
    # sparq.timing.DecodeClock, which the runner uses, reads perf_counter.
    with mock.patch.object(time, "perf_counter", getattr(time, clock)):
        return runner.decode(tokens)


def measure(
    dtype: str, args: argparse.Namespace, knobs: dict, llama_cpp: LlamaCpp, tick: Callable[[str], None]
) -> Result:
    model = build("llama-3.2-1b", getattr(torch, dtype), args.layers).model
    check(model, max(args.contexts), batch=1, knobs=knobs)
    contexts = sorted({BARE_CONTEXT, *args.contexts})
    flashes = [flag == "on" for flag in args.flash_attention]
    with tempfile.TemporaryDirectory() as folder:
        tick(f"{dtype}: GGUF file")
        path = Path(folder) / "model.gguf"
        write_gguf(model, path)
        room = contexts[-1] + args.tokens + 1
        llama_cpp("load", path=str(path), dtype=dtype, flash_attention=flashes, room=room, threads=args.threads)
    errors = {LLAMA_CPP[flash]: check_same_work(model, llama_cpp, dtype, flash) for flash in flashes}
    for context in contexts:
        for flash in flashes:
            tick(f"{dtype}: filling {LLAMA_CPP[flash]}, {context:,} positions")
            llama_cpp("fill", flash_attention=flash, length=context)
    room = (args.rounds + 1) * (args.tokens + 1)
    runners = {context: make_runner(model, SPARQ_WAY, context, 1, room, knobs, prefill=False) for context in contexts}
    times: dict[str, Times] = {
        way: {context: [] for context in contexts} for way in (*(LLAMA_CPP[flash] for flash in flashes), SPARQ)
    }
    clock = CLOCKS[args.clock]
    for round_ in range(args.rounds + 1):
        for context in contexts:
            tick(f"{dtype}: round {round_}, {context:,} positions")
            measured = {
                LLAMA_CPP[flash]: llama_cpp(
                    "times", flash_attention=flash, length=context, tokens=args.tokens, clock=clock
                )
                for flash in flashes
            }
            measured[SPARQ] = sparq_times(runners[context], args.tokens, clock)
            if round_:
                for way, seconds in measured.items():
                    times[way][context].append([1000 * second / args.layers for second in seconds])
    return Result(
        dtype=dtype,
        disagreement=errors,
        rows=[row_of(dtype, context, times) for context in contexts],
        slopes=slopes_of(times, statistics.median),
        fastest_slopes=slopes_of(times, min),
    )


def slopes_of(times: dict[str, Times], of_round: Callable[[list[float]], float]) -> dict[str, Slope]:
    return {
        way: slope_of([(context, of_round(steps)) for context, rounds in by_context.items() for steps in rounds])
        for way, by_context in times.items()
    }


def row_of(dtype: str, context: int, times: dict[str, Times]) -> Row:
    steps = {way: list(itertools.chain(*rounds[context])) for way, rounds in times.items()}
    deciles = {way: statistics.quantiles(values, n=10) for way, values in steps.items()}
    return Row(
        dtype=dtype,
        context=context,
        milliseconds={way: statistics.median(values) for way, values in steps.items()},
        spread={way: (values[0], values[-1]) for way, values in deciles.items()},
        fastest={way: min(values) for way, values in steps.items()},
    )


def times_grid(results: list[Result]) -> Grid:
    ways = list(results[0].slopes)
    theirs = [way for way in ways if way != SPARQ]
    cells = []
    for row in (row for result in results for row in result.rows):
        ms = row.milliseconds
        cells.append(
            (
                row.dtype,
                "layers alone" if row.context == BARE_CONTEXT else f"{row.context:,}",
                *(f"{ms[way]:.2f} ({row.spread[way][0]:.2f}–{row.spread[way][1]:.2f})" for way in ways),
                *(f"{ms[way] / ms[SPARQ]:.2f}x" for way in theirs),
            )
        )
    title = "ms per layer and token (10 %–90 % of the steps), layers of Llama-3.2-1B's shape"
    return Grid(title, ("dtype", "cached", *ways, *(f"{SPARQ} vs {way}" for way in theirs)), cells, left=1)


def slopes_grid(results: list[Result]) -> Grid:
    cells = []
    for result in results:
        kinds = {"median": result.slopes, "fastest": result.fastest_slopes}
        for (kind, slopes), way in itertools.product(kinds.items(), result.slopes):
            cell = (result.dtype, way, kind, str(slopes[way]))
            if way == SPARQ:
                cells.append((*cell, "", "", ""))
            else:
                ratio = slopes[way].times(slopes[SPARQ])
                cells.append((*cell, str(ratio), ratio.at_least(WISHED), f"{result.disagreement[way]:.0e}"))
    title = "Slope: ms per layer per 1,000 cached positions ± standard error"
    columns = ("dtype", "way", "steps", "slope", "times SparQ's", f">= {WISHED:g}x", "logits differ by")
    return Grid(title, columns, cells, left=3)


def missing() -> list[str]:
    """The packages to install."""
    return [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096, 16384, 65536])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"], choices=list(TOLERANCE))
    parser.add_argument("--flash-attention", nargs="+", default=["on", "off"], choices=["on", "off"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4, help="counted; one more goes ahead")
    parser.add_argument("--tokens", type=int, default=12, help="decode steps of each way in each round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of llama.cpp and of PyTorch")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="'processor' only with one thread")
    parser.add_argument("--r", type=int)
    parser.add_argument("--k", type=int)
    parser.add_argument("--ratio", type=float, default=8)
    parser.add_argument("--json", type=Path, help="write rows, machine and settings there")
    args = parser.parse_args()
    if min(args.contexts) <= BARE_CONTEXT:
        parser.error(f"contexts must be larger than the {BARE_CONTEXT} positions of 'layers alone'")
    if args.clock == "processor" and args.threads != 1:
        parser.error("the processor time of several threads is no measure of waiting: --threads 1")
    if packages := missing():
        print(f"not installed: pip install {' '.join(packages)}", file=sys.stderr)
        raise SystemExit(2)

    torch.set_num_threads(args.threads)
    console = Console(width=150)
    knobs = dict(r=args.r, k=args.k, ratio=args.ratio)
    load_before = os.getloadavg()
    results = []
    with Progress(console=console, transient=True) as progress:
        contexts = len({BARE_CONTEXT, *args.contexts})
        steps = len(args.dtypes) * (1 + contexts * (len(args.flash_attention) + args.rounds + 1))
        task = progress.add_task("", total=steps)

        def tick(what: str) -> None:
            progress.update(task, advance=1, description=what)

        for dtype in args.dtypes:
            with LlamaCpp() as llama_cpp:
                system = llama_cpp("system")
                results.append(measure(dtype, args, knobs, llama_cpp, tick))
    console.print(times_grid(results).table())
    console.print(slopes_grid(results).table())
    if args.json:
        result = dict(
            machine={**machine(), "load averages": [load_before, os.getloadavg()]},
            versions={package: version(package) for package in (*NEEDED.values(), "transformers")},
            llama_cpp_system=system,
            settings={**vars(args), "json": None},
            results=[asdict(result) for result in results],
        )
        write_json(args.json, result)


if __name__ == "__main__":
    main()

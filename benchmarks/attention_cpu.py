"""The attention benchmark on the CPU: all opponents take turns, one call at a time."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import time
from collections.abc import Callable

import sparq_kernels
import torch
from attention_cases import Case, chosen, copies_that_fit, walk
from attention_rows import KERNEL, REFERENCE, SPARQ, Row, Timing, main_grid, plot, problems, speed_grid
from common import available_memory, machine, streaming_read
from dense import CPU_WAYS, DENSE_ERROR, exact
from dense_cpu import dense_attention
from report import write_json, write_markdown
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sparq_kernels.cpu import CompilerError
from torch import Tensor
from workload import DTYPES, Inputs, Shape, disagreement, make_inputs, reference, relative_error, rounding, sparq

Call = Callable[[Shape, Inputs], Tensor]
TRIALS = 3  # turns of every way of PyTorch, before those that are clearly not its fastest are left out
CLEARLY_SLOWER = 1.3  # times the fastest
SECONDS = 8  # of one case's rounds, about, on a quiet machine ...
FEWEST_ROUNDS = 5  # ... unless these take longer
REFERENCE_TURNS = 2  # it is there for orientation only


def kernel(shape: Shape, x: Inputs) -> Tensor:
    return dense_attention(x.query, x.key, x.value, x.length)


def milliseconds(call: Call, shape: Shape, x: Inputs) -> float:
    started = time.perf_counter()
    call(shape, x)
    return (time.perf_counter() - started) * 1e3


def opponents_of(row: Row, x: Inputs) -> dict[str, Call]:
    """Whoever runs, PyTorch's ways first and SparQ last; what is wrong with an output is noted in the row."""
    shape = row.case.shape
    expected = exact(shape, x)
    opponents: dict[str, Call] = {}
    for name, call in {**CPU_WAYS, KERNEL: kernel}.items():
        try:
            error = relative_error(call(shape, x), expected)
        except (RuntimeError, CompilerError, MemoryError) as problem:
            row.unavailable[name] = str(problem).splitlines()[0]
            continue
        if not error < (rounding(x.query.dtype) if name == KERNEL else DENSE_ERROR):
            row.wrong[name] = f"output differs from attention in float32 by {error:.1e}"
        if name == KERNEL or name not in row.wrong:
            opponents[name] = call
    if (difference := disagreement(shape, x)) is not None:
        row.wrong[SPARQ] = difference
    return {**opponents, SPARQ: sparq}


def in_turns(opponents: dict[str, Call], shape: Shape, caches: list[Inputs], rounds: int) -> dict[str, list[float]]:
    """A B C A B C ..., each turn on the next copy."""
    times: dict[str, list[float]] = {name: [] for name in opponents}
    copies = walk(len(caches))
    for _ in range(rounds):
        for name, call in opponents.items():
            times[name].append(milliseconds(call, shape, caches[next(copies)]))
    return times


def one_after_the_other(opponents: dict[str, Call], shape: Shape, x: Inputs, rounds: int) -> dict[str, list[float]]:
    """A A A B B B ..., all on one cache, each from its third turn on."""
    return {name: [milliseconds(call, shape, x) for _ in range(rounds + 2)][2:] for name, call in opponents.items()}


@torch.no_grad()
def measure(case: Case, dtype_name: str, rounds: int, copies: int, alone: bool = False) -> Row:
    shape, row = case.shape, Row(case, dtype_name, copies)
    first = make_inputs(shape, DTYPES[dtype_name])
    opponents = opponents_of(row, first)
    caches = [first, *(first.copy() for _ in range(copies - 1))]
    some = list(itertools.islice(itertools.cycle(caches), TRIALS))
    streaming = streaming_read()

    ways = [name for name in CPU_WAYS if name in opponents]
    row.tried_ms = {name: min(milliseconds(opponents[name], shape, x) for x in some) for name in ways}
    for name, ms in row.tried_ms.items():
        if ms > CLEARLY_SLOWER * min(row.tried_ms.values()):
            del opponents[name]
    round_ms = sum(milliseconds(call, shape, first) for call in opponents.values())
    rounds = min(rounds, max(FEWEST_ROUNDS, int(SECONDS * 1e3 / round_ms)))
    if alone:
        times = one_after_the_other(opponents, shape, first, rounds)
    else:
        times = in_turns(opponents, shape, caches, rounds)
    times[REFERENCE] = [milliseconds(reference, shape, x) for x in some[:REFERENCE_TURNS]]
    row.streaming_gbs = max(streaming, streaming_read())

    size = first.key.element_size()
    for name, each in times.items():
        elements = shape.sparse_elements if name in (SPARQ, REFERENCE) else shape.dense_elements
        row.timings[name] = Timing(each, elements * size)
    return row


def fixed_cost(call: Call, calls: int = 2000) -> float:
    """Microseconds of a call that has next to nothing to compute."""
    shape = Shape(1, 1, 1, 16, 2, 4, 1)
    x = make_inputs(shape, torch.float32)
    times = sorted(milliseconds(call, shape, x) for _ in range(calls))
    return times[calls // 2] * 1e3


def fixed_costs() -> dict[str, float]:
    costs = {SPARQ: fixed_cost(sparq)}
    with contextlib.suppress(CompilerError):  # every row says so
        costs[KERNEL] = fixed_cost(kernel)
    return costs


def copies_of(case: Case, dtype_name: str, args: argparse.Namespace) -> int:
    """0 when the case does not fit into memory."""
    turns = args.rounds * (len(CPU_WAYS) + 2)
    return copies_that_fit(case.shape, DTYPES[dtype_name].itemsize, turns, available_memory(), args.copies)


def run(args: argparse.Namespace) -> bool:
    """Measure and report; whether SparQ and the dense kernel were right everywhere."""
    console = Console(width=200)
    console.print(f"operator: {sparq_kernels.backend('cpu')}, {torch.get_num_threads()} threads")
    settings = {
        name: str(value) if name in ("json", "markdown", "plot") else value for name, value in vars(args).items()
    }
    costs = fixed_costs()
    result = {
        "machine": machine(),
        "operator": sparq_kernels.backend("cpu"),
        "settings": settings,
        "fixed_cost_us": costs,
    }
    rows: list[Row] = []
    left_out: list[str] = []
    work = list(itertools.product(chosen(args), args.dtypes))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(work))
        for case, dtype_name in work:
            progress.update(task, description=f"{case} {dtype_name}")
            copies = copies_of(case, dtype_name, args)
            if copies:
                rows.append(measure(case, dtype_name, args.rounds, copies, alone=args.copies == 1))
            else:
                left_out.append(f"{case} {dtype_name}")
            progress.advance(task)
            if args.json:  # after every row: an interrupted run still has its rows
                write_json(args.json, {**result, "rows": [row.json() for row in rows], "left_out": left_out})

    grids = [main_grid(rows), speed_grid(rows)]
    for grid in grids:
        console.print(grid.table())
    console.print("unsure: the spreads of the two overlap, or the ratios of single rounds include 1")
    for problem in problems(rows):
        console.print(problem, highlight=False, markup=False)
    for case_and_dtype in left_out:
        console.print(f"left out, too large for this machine's memory: {case_and_dtype}", highlight=False, markup=False)
    console.print("fixed cost of a call: " + ", ".join(f"{name} {cost:.0f} µs" for name, cost in costs.items()))
    if args.markdown:
        write_markdown(args.markdown, grids)
    if args.plot and rows:
        plot(args.plot, [row.json() for row in rows])
    return not any({SPARQ, KERNEL} & row.wrong.keys() for row in rows)

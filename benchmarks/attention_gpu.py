"""The attention benchmark on a GPU: every dense way and SparQ, by eager calls and by CUDA graphs."""

from __future__ import annotations

import argparse
import itertools
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict

import device_time
import sparq_kernels
import torch
from common import machine
from dense import DENSE_ERROR, Call, Way, exact, gpu_ways, unprepared
from gpu_rows import MODES, Attempt, Case, Row, Timing, dense_grid, kernel_grid, main_grid, problems
from report import Grid, write_json, write_markdown
from rich.console import Console
from torch import Tensor
from workload import DTYPES, Inputs, Shape, disagreement, make_inputs, relative_error, rounding, sparq

CASES = (
    Case("S1", Shape(64, 32, 32, 128, 4096, 32, 128), 5.0),
    Case("S2", Shape(8, 32, 8, 128, 32768, 32, 256), 4.0),
    Case("S3", Shape(1, 32, 8, 128, 131072, 32, 1024), 2.7),
    Case("one row, 4k", Shape(1, 32, 8, 128, 4096, 32, 128), None),
    Case("one row, 16k", Shape(1, 32, 8, 128, 16384, 32, 256), 1.5),
    Case("one row, 32k", Shape(1, 32, 8, 128, 32768, 32, 256), None),
)
TIMES_CACHE = 4  # SparQ's reads of all copies together, in units of the device's cache
MEMORY_SHARE = 0.6  # of what is free, for all copies: the reference and the dense ways need the rest
CALLS = 16  # in one measurement, at least
SPARQ = Way("SparQ", unprepared(sparq))


def copies_for(shape: Shape, itemsize: int, cache: int, free: int) -> int:
    """So many that even the little which SparQ reads of each one has left the cache when its turn comes again; as many
    as fit in memory, at least one."""
    wanted = max(3, -(-TIMES_CACHE * cache // (shape.sparse_elements * itemsize)))
    one = shape.dense_elements * itemsize * 3 // 2  # K, V and the components
    return max(1, min(wanted, int(MEMORY_SHARE * free) // one))


def attempt(
    way: Way,
    shape: Shape,
    caches: list[Inputs],
    rounds: int,
    check: Callable[[Tensor], str | None],
    fastest: dict[str, float] | None = None,
) -> Attempt:
    """Times of one way, and whatever was wrong with it.  `check` says what is wrong with its output for the first
    cache, which all others are copies of.  `fastest`: times of the best so far, None to measure in any case."""
    result = Attempt(way.name)
    walks = -(-CALLS // len(caches))
    limit = fastest or {}
    try:
        with way.context():
            call, output = first_call(way, shape, caches[0], result.warnings)
            result.wrong = check(output)
            result.eager = Timing.of(
                lambda n: device_time.eager_times(call, caches, walks, n), rounds, limit.get("eager")
            )
            replay = device_time.Replay(call, caches, walks)
            replayed = replay_error(replay, output)
            result.graph = Timing.of(replay.times, rounds, limit.get("graph"))
            # Once more after many replays: an error that comes and goes is a race.
            result.wrong = result.wrong or replayed or replay_error(replay, output)
    except Exception as error:
        result.unavailable = ("" if result.eager is None else "as a CUDA graph: ") + reason(error)
        if way is SPARQ:
            traceback.print_exc()  # nobody expects it to fail, and the lent device is soon gone
    return result


def first_call(way: Way, shape: Shape, x: Inputs, warned: list[str]) -> tuple[Call, Tensor]:
    """The way's call and its output, and to `warned` what it warned of: SDPA's reasons for refusing are warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call = way.prepare(shape, x)
            return call, call(x).clone()
        finally:
            warned += dict.fromkeys(told(str(warning.message)) for warning in caught)


def replay_error(replay: device_time.Replay[Inputs], output: Tensor) -> str | None:
    for replayed in replay.outputs():
        error = relative_error(replayed, output)
        if not error < rounding(output.dtype):
            return f"graph replay differs from the eager call by {error:.1e}"
    return None


def reason(error: BaseException) -> str:
    """The error and, as a failed capture raises once more when it ends, the one that it began with."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    chain = [error] if first is error else [error, first]
    return "; first: ".join(f"{type(e).__name__}: {told(str(e))}" for e in chain)


def told(message: str) -> str:
    """One line, without the place in PyTorch's source."""
    lines = message.split("(Triggered internally")[0].strip().splitlines()
    return lines[0][:200] if lines else ""


@torch.no_grad()
def measure(case: Case, dtype_name: str, rounds: int, copies: int | None, copy_gbs: float, device: str = "cuda") -> Row:
    shape, dtype = case.shape, DTYPES[dtype_name]
    row = Row(case, dtype_name, sparq_kernels.backend(device), copy_gbs, dtype.itemsize, 0, Attempt(SPARQ.name))
    try:
        caches = cache_copies(shape, dtype, copies, device)
        row.copies = len(caches)
        row.sparq = attempt(SPARQ, shape, caches, rounds, lambda _: disagreement(shape, caches[0]))
        expected = exact(shape, caches[0])
        for way in gpu_ways(shape):
            best = {mode: timed[1].us for mode in MODES if (timed := row.fastest(mode))}
            row.dense.append(attempt(way, shape, caches, rounds, lambda out: dense_error(out, expected), best))
    except Exception as error:  # out of memory, or a device lost: the other rows and the report still matter
        row.sparq.unavailable = reason(error)
        traceback.print_exc()
    return row


def cache_copies(shape: Shape, dtype: torch.dtype, copies: int | None, device: str) -> list[Inputs]:
    if copies is None:
        copies = copies_for(shape, dtype.itemsize, device_time.cache_bytes(), device_time.free_bytes())
    first = make_inputs(shape, dtype, device)
    return [first, *(first.copy() for _ in range(copies - 1))]


def dense_error(output: Tensor, expected: Tensor) -> str | None:
    error = relative_error(output, expected)
    return None if error < DENSE_ERROR else f"differs from attention in float32 by {error:.1e}"


@torch.no_grad()
def kernels(case: Case, dtype_name: str, copies: int | None) -> list[device_time.Kernel]:
    caches = cache_copies(case.shape, DTYPES[dtype_name], copies, "cuda")
    return device_time.kernels(lambda x: sparq(case.shape, x), caches, -(-CALLS // len(caches)))


def line(row: Row) -> str:
    """What to watch while the rest is measured."""
    dense, ours, speedup = row.fastest("graph"), row.sparq.graph, row.speedup("graph")
    parts = [f"{row.case.name} {row.dtype}, {row.copies} copies:"]
    parts.append("no dense way" if dense is None else f"{dense[0]} {dense[1].us:.1f} µs,")
    parts.append("no SparQ" if ours is None else f"SparQ {ours.us:.1f} µs")
    parts.append(f"WRONG: {row.wrong}" if row.wrong else "" if speedup is None else f"{speedup:.1f}x")
    return " ".join(parts)


def run(args: argparse.Namespace) -> bool:
    """Measure and report; whether every row was right."""
    if not torch.cuda.is_available():
        raise SystemExit(f"no CUDA device: torch {torch.__version__} sees none; --device cpu measures on the CPU")
    console = Console(width=220)
    facts, operator, copy_gbs = device_time.properties(), sparq_kernels.backend("cuda"), device_time.copy_bandwidth()
    console.print(f"{facts['device']}, copies at {copy_gbs:.0f} GB/s; operator: {operator}")
    if operator == "reference":
        console.print("No kernel for this device: what runs is the plain PyTorch reference, so no speed-up is shown.")
    result: dict[str, object] = {
        "machine": {**machine(), **facts},
        "operator": operator,
        "copy_gbs": copy_gbs,
        "rounds": args.rounds,
    }

    chosen = list(itertools.product((CASES[index] for index in args.rows), args.dtypes))
    rows: list[Row] = []
    for case, dtype_name in chosen:
        rows.append(measure(case, dtype_name, args.rounds, args.copies, copy_gbs))
        console.print(line(rows[-1]), highlight=False, markup=False)
        result["rows"] = [row.json() for row in rows]
        if args.json:  # after every row: a lent machine may go before the last one
            write_json(args.json, result)

    grids: list[Grid] = [main_grid(rows), dense_grid(rows)]
    if args.profile:  # last: a profiler that has run may slow every launch after it
        profiles = []
        for case, dtype_name in chosen:
            try:
                found = kernels(case, dtype_name, args.copies)
            except Exception as error:
                traceback.print_exc()
                console.print(f"no profile of {case.name} {dtype_name}: {reason(error)}", markup=False)
                continue
            grids.append(kernel_grid(f"{case.name}: {case.shape} {dtype_name}, SparQ by kernel, per call", found))
            profiles.append({"case": case.name, "dtype": dtype_name, "kernels": [asdict(kernel) for kernel in found]})
        result["profile"] = profiles
    for grid in grids:
        console.print(grid.table())
    for problem in problems(rows):
        console.print(problem, highlight=False, markup=False)
    if args.json:
        write_json(args.json, result)
    if args.markdown:
        write_markdown(args.markdown, grids)
    return not any(row.wrong for row in rows)

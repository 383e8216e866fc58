"""The attention benchmark on a GPU: every dense way and SparQ, by CUDA graphs and by eager calls.

`attention.py --device cuda` runs it, and so does gpu.py, whose stage 4 it is.
"""

from __future__ import annotations

from stage import Stage, binaries

# isort: split
import argparse
import itertools
import math
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from types import ModuleType

import device_time
import host_time
import sparq_kernels
import torch
from common import machine
from dense import DENSE_ERROR, Call, Way, exact, gpu_ways, unprepared
from gpu_cases import CASES, PROFILED, TINY, Case
from gpu_rows import (
    MODES,
    NO_TIME,
    Attempt,
    Row,
    Timing,
    dense_grid,
    kernel_grid,
    kernels_grid,
    main_grid,
    missed_goals,
    problems,
)
from report import Grid, write_json, write_markdown
from rich.console import Console
from torch import Tensor
from workload import DTYPES, Inputs, Shape, disagreement, make_inputs, relative_error, rounding, sparq

TIMES_CACHE = 4  # SparQ's reads of all copies together, in units of the device's cache
MEMORY_SHARE = 0.6  # of what is free, for all copies: the reference and the dense ways need the rest
CALLS = 16  # in one measurement, at least
EAGER_SHARE = 3  # a third of the rounds: the claim is made of graphs
SHORTEST_ROW = 3.0  # seconds: with less left none is begun
GENEROUS = 2  # times its fair share of the time left that a row may take
PROFILING = 12.0  # seconds kept for it
SPARQ = Way("SparQ", unprepared(sparq))


def clock(device: str) -> ModuleType:
    return device_time if device == "cuda" else host_time


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
    device: str = "cuda",
) -> Attempt:
    """Times of one way, and whatever was wrong with it.  `check` says what is wrong with its output for the first
    cache, which all others are copies of.  `fastest`: times of the best so far, None to measure in any case."""
    result = Attempt(way.name)
    timer, walks = clock(device), -(-CALLS // len(caches))
    limit = fastest or {}
    try:
        with way.context():
            call, output = first_call(way, shape, caches[0], result.warnings)
            result.wrong = check(output)
            try:
                replay = timer.Replay(call, caches, walks)
                replayed = replay_error(replay, output)
                result.graph = Timing.of(replay.times, rounds, limit.get("graph"))
                # Once more after many replays: an error that comes and goes is a race.
                result.wrong = result.wrong or replayed or replay_error(replay, output)
            except Exception as error:
                result.unavailable = "as a CUDA graph: " + reason(error)
                if way is SPARQ:
                    traceback.print_exc()  # nobody expects it to fail, and the lent device is soon gone
            result.eager = Timing.of(
                lambda n: timer.eager_times(call, caches, walks, n), max(2, rounds // EAGER_SHARE), limit.get("eager")
            )
    except Exception as error:
        result.unavailable = "; ".join([*filter(None, [result.unavailable]), reason(error)])
        if way is SPARQ:
            traceback.print_exc()
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
def measure(
    case: Case,
    dtype_name: str,
    rounds: int,
    copies: int | None,
    copy_gbs: float,
    device: str = "cuda",
    ends: float = math.inf,
) -> Row:
    """`ends`: when no further dense way is begun, as time.monotonic has it; the first one is measured in any case."""
    shape, dtype = case.shape, DTYPES[dtype_name]
    row = new_row(case, dtype_name, copy_gbs, device)
    try:
        caches = cache_copies(shape, dtype, copies, device)
        row.copies = len(caches)
        row.sparq = attempt(SPARQ, shape, caches, rounds, lambda _: disagreement(shape, caches[0]), device=device)
        expected = exact(shape, caches[0])
        for way in gpu_ways(shape):
            if row.dense and time.monotonic() > ends:
                row.dense.append(Attempt(way.name, unavailable=NO_TIME))
                continue
            best = {mode: timed[1].us for mode in MODES if (timed := row.fastest(mode))}
            found = attempt(way, shape, caches, rounds, lambda out: dense_error(out, expected), best, device)
            row.dense.append(found)
    except Exception as error:  # out of memory, or a device lost: the other rows and the report still matter
        row.sparq.unavailable = reason(error)
        traceback.print_exc()
    return row


def new_row(case: Case, dtype_name: str, copy_gbs: float, device: str) -> Row:
    operator, itemsize = sparq_kernels.backend(device), DTYPES[dtype_name].itemsize
    return Row(case, dtype_name, operator, copy_gbs, itemsize, 0, Attempt(SPARQ.name))


def cache_copies(shape: Shape, dtype: torch.dtype, copies: int | None, device: str) -> list[Inputs]:
    if copies is None:
        timer = clock(device)
        copies = copies_for(shape, dtype.itemsize, timer.cache_bytes(), timer.free_bytes())
    first = make_inputs(shape, dtype, device)
    return [first, *(first.copy() for _ in range(copies - 1))]


def measured(
    chosen: list[tuple[Case, str]],
    rounds: int,
    copies: int | None,
    copy_gbs: float,
    device: str = "cuda",
    ends: float = math.inf,
) -> Iterator[Row]:
    """A row of each, those for which no time is left empty."""
    for index, (case, dtype_name) in enumerate(chosen):
        left = ends - time.monotonic()
        if left < SHORTEST_ROW:
            row = new_row(case, dtype_name, copy_gbs, device)
            row.sparq.unavailable = NO_TIME
            yield row
            continue
        share = GENEROUS * left / (len(chosen) - index)
        yield measure(case, dtype_name, rounds, copies, copy_gbs, device, time.monotonic() + min(left, share))


def dense_error(output: Tensor, expected: Tensor) -> str | None:
    error = relative_error(output, expected)
    return None if error < DENSE_ERROR else f"differs from attention in float32 by {error:.1e}"


@torch.no_grad()
def kernels(case: Case, dtype_name: str, copies: int | None, device: str = "cuda") -> list[device_time.Kernel]:
    caches = cache_copies(case.shape, DTYPES[dtype_name], copies, device)
    return clock(device).kernels(lambda x: sparq(case.shape, x), caches, -(-CALLS // len(caches)))


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
    for row in measured(chosen, args.rounds, args.copies, copy_gbs):
        rows.append(row)
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


def main() -> None:
    """Stage 4 of gpu.py."""
    stage = Stage.from_arguments(main.__doc__)
    timer, compiled = clock(stage.device), binaries()
    cases, dtypes = (TINY, ["float32"]) if stage.is_dry else (CASES, ["bfloat16", "float16"])
    rounds = 3 if stage.is_dry else 30
    copy_gbs = timer.copy_bandwidth()
    stage.save(
        machine={**machine(), **timer.properties()},
        operator=sparq_kernels.backend(stage.device),
        copy_gbs=copy_gbs,
        rounds=rounds,
    )
    chosen = [(case, dtype_name) for dtype_name in dtypes for case in cases]
    rows: list[Row] = []
    for row in measured(chosen, rounds, None, copy_gbs, stage.device, stage.ends - PROFILING):
        rows.append(row)
        print(line(row), flush=True)
        report(stage, rows, [])
    profiles: list[tuple[Case, str, list[device_time.Kernel]]] = []
    for case in TINY if stage.is_dry else PROFILED:  # last: a profiler that has run may slow every launch after it
        if stage.left() < SHORTEST_ROW:
            stage.content.setdefault("unprofiled", []).append(case.name)
            continue
        try:
            profiles.append((case, dtypes[0], kernels(case, dtypes[0], None, stage.device)))
        except Exception:
            traceback.print_exc()
            stage.content.setdefault("unprofiled", []).append(case.name)
        report(stage, rows, profiles)
    stage.save(compiled_here=binaries() - compiled)


def report(stage: Stage, rows: list[Row], profiles: list[tuple[Case, str, list[device_time.Kernel]]]) -> None:
    done = [row for row in rows if not row.is_left_out]
    stage.content["tables"] = []
    stage.add_tables(main_grid(rows))
    if profiles:
        stage.add_tables(kernels_grid(profiles))
    stage.add_tables(dense_grid(rows), printed=False)
    lines, missing = problems(rows), "No module named"
    absent = dict.fromkeys(
        way.name for row in rows for way in row.dense if way.unavailable and missing in way.unavailable
    )
    wrong = [text for text in lines if text.startswith("WRONG")]
    if stage.content["operator"] == "reference" and not stage.is_dry:
        wrong.append("no kernel for this device: what ran is the plain PyTorch reference")
    notes = [text for text in lines if not text.startswith("WRONG") and missing not in text]
    stage.save(
        rows=[row.json() for row in rows],
        profile=[
            {"case": case.name, "dtype": dtype_name, "kernels": [asdict(kernel) for kernel in found]}
            for case, dtype_name, found in profiles
        ],
        wrong=wrong,
        notes=[*missed_goals(rows), *notes, *([f"not installed: {', '.join(absent)}"] if absent else [])],
        said=f"{len(done)} of {len(rows)} rows, {sum(row.wrong is None for row in done)} of them right",
    )


if __name__ == "__main__":
    main()

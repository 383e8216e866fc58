"""The attention benchmark on the CPU: dense and sparse take turns, one call at a time."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import sparq_kernels
import torch
from common import machine, streaming_read
from dense import CPU_WAYS
from report import Grid, write_json, write_markdown
from rich.console import Console
from torch import Tensor
from workload import DTYPES, Inputs, Shape, disagreement, make_inputs, quantiles, sparq

CACHE_BYTES = 1_600_000_000  # of all dense copies together: several times any processor's cache
SHAPES = (
    Shape(1, 32, 8, 128, 16384, 32, 256),
    Shape(1, 32, 32, 128, 4096, 32, 128),
    Shape(4, 32, 8, 128, 8192, 32, 256),
    Shape(1, 32, 8, 128, 65536, 32, 512),
)


@dataclass(frozen=True)
class Row:
    """Milliseconds are medians, `spread` their (10 %, 90 %) quantiles; GB/s as `attention` says."""

    shape: str
    dtype: str
    correct: bool
    dense_way: str
    dense_ms: float
    dense_spread: tuple[float, float]
    dense_gbs: float
    sparq_ms: float
    sparq_spread: tuple[float, float]
    sparq_gbs: float
    streaming_gbs: float
    speedup: float | None
    bytes_ratio: float
    copies: int

    @property
    def streaming_share(self) -> float:
        return self.sparq_gbs / self.streaming_gbs


def milliseconds(call: Callable[[Shape, Inputs], Tensor], shape: Shape, x: Inputs) -> float:
    started = time.perf_counter()
    call(shape, x)
    return (time.perf_counter() - started) * 1e3


def measure(shape: Shape, dtype_name: str, rounds: int, copies: int | None) -> Row:
    first = make_inputs(shape, DTYPES[dtype_name])
    correct = disagreement(shape, first) is None
    size = first.key.element_size()
    if copies is None:
        copies = max(3, min(16, -(-CACHE_BYTES // (shape.dense_elements * size))))
    caches = [first.copy() for _ in range(copies)]
    streaming = streaming_read()

    trials = {name: min(milliseconds(call, shape, x) for x in caches[:3]) for name, call in CPU_WAYS.items()}
    dense_way = min(trials, key=lambda name: trials[name])
    dense_times: list[float] = []
    sparq_times: list[float] = []
    if copies == 1:
        for call, times in ((CPU_WAYS[dense_way], dense_times), (sparq, sparq_times)):
            times += [milliseconds(call, shape, caches[0]) for _ in range(rounds + 2)][2:]
    else:
        turns = itertools.cycle(range(copies))
        for _ in range(rounds):
            dense_times.append(milliseconds(CPU_WAYS[dense_way], shape, caches[next(turns)]))
            sparq_times.append(milliseconds(sparq, shape, caches[next(turns)]))
            if copies % 2 == 0 and len(dense_times) % (copies // 2) == 0:
                next(turns)  # an even number of copies would give each opponent its own half
    streaming = max(streaming, streaming_read())

    dense_ms, dense_spread = quantiles(dense_times)
    sparq_ms, sparq_spread = quantiles(sparq_times)
    return Row(
        shape=str(shape),
        dtype=dtype_name,
        correct=correct,
        dense_way=dense_way,
        dense_ms=dense_ms,
        dense_spread=dense_spread,
        dense_gbs=shape.dense_elements * size / dense_ms / 1e6,
        sparq_ms=sparq_ms,
        sparq_spread=sparq_spread,
        sparq_gbs=shape.sparse_elements * size / sparq_ms / 1e6,
        streaming_gbs=streaming,
        speedup=dense_ms / sparq_ms if correct else None,
        bytes_ratio=shape.dense_elements / shape.sparse_elements,
        copies=copies,
    )


def fixed_cost(calls: int = 2000) -> float:
    """Microseconds of a call that has next to nothing to compute."""
    shape = Shape(1, 1, 1, 16, 2, 4, 1)
    x = make_inputs(shape, torch.float32)
    times = sorted(milliseconds(sparq, shape, x) for _ in range(calls))
    return times[calls // 2] * 1e3


def grid_of(rows: list[Row]) -> Grid:
    return Grid(
        "Attention of one new token: dense against SparQ",
        ("shape", "dtype", "dense ms", "GB/s", "SparQ ms", "GB/s", "of streaming", "speed-up", "bytes say"),
        [
            (
                row.shape,
                row.dtype,
                f"{row.dense_ms:.2f} ({row.dense_spread[0]:.2f}–{row.dense_spread[1]:.2f})",
                f"{row.dense_gbs:.1f}",
                f"{row.sparq_ms:.3f} ({row.sparq_spread[0]:.3f}–{row.sparq_spread[1]:.3f})",
                f"{row.sparq_gbs:.1f}",
                f"{row.streaming_share:.0%} of {row.streaming_gbs:.1f}",
                "WRONG" if row.speedup is None else f"{row.speedup:.1f}x",
                f"{row.bytes_ratio:.1f}x",
            )
            for row in rows
        ],
    )


def run(args: argparse.Namespace) -> bool:
    """Measure and report; whether every row was right."""
    console = Console(width=130)
    console.print(f"operator: {sparq_kernels.backend('cpu')}, {torch.get_num_threads()} threads")
    cost = fixed_cost()
    rows = []
    for index, dtype_name in itertools.product(args.rows, args.dtypes):
        with console.status(f"{SHAPES[index]} {dtype_name}"):
            rows.append(measure(SHAPES[index], dtype_name, args.rounds, args.copies))
    grid = grid_of(rows)
    console.print(grid.table())
    console.print(f"fixed cost of a call: {cost:.0f} µs")
    if args.json:
        write_json(args.json, {"machine": machine(), "fixed_cost_us": cost, "rows": [asdict(row) for row in rows]})
    if args.markdown:
        write_markdown(args.markdown, [grid])
    return all(row.correct for row in rows)

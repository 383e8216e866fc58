"""Stage `attention`: one decode step, every dense way and SparQ, by CUDA graphs and by eager calls.

Dense is the fastest, in the same mode, of SDPA with each backend forced, two matrix products, and FlashAttention 2 and
3 and FlashInfer where installed, each only if its output is right. `graph`, CUDA graphs of all calls replayed and timed
with events, is the claim; `eager` is the wall clock, Python included. A graph's replays are queued back to back, so
ways take no turns here, and the speed-up is the ratio of their medians. Each index has rows of its own.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import sparq_kernels
import torch
from dense import DENSE_ERROR, exact
from gpu_stages.cases import MEASURED, PROFILED, TINY
from gpu_stages.clocks import Device, Graph, Kernel, clock_of
from gpu_stages.dense import Call, DenseWay, gpu_ways, unprepared
from gpu_stages.failures import NO_TIME, reason, told
from gpu_stages.stage import Stage, binaries
from harness import SPARQ, Measured, Row, Timing, machine
from tables import UNKNOWN, Grid
from torch import Tensor
from workload import DTYPES, Case, Inputs, Shape, disagreement, make_inputs, relative_error, rounding, sparq

TIMES_CACHE = 4  # SparQ's reads of all copies together, in units of the device's cache
MEMORY_SHARE = 0.6  # of what is free, for all copies: the reference and the dense ways need the rest
CALLS = 16  # in one measurement, at least
EAGER_SHARE = 3  # a third of the rounds: the claim is made of graphs
SCREENING_ROUNDS = 3
OUT_OF_THE_RUNNING = 3  # times the fastest: so slow a way is timed just a little
SHORTEST_ROW = 3.0  # seconds: with less left none is begun
GENEROUS = 2  # times its fair share of the time left that a row may take
PROFILING = 20.0  # seconds kept for it
SPARQ_WAY = DenseWay(SPARQ, unprepared(sparq))
MODES = ("eager", "graph")
NOT_INSTALLED = "No module named"


@dataclass
class Timed(Measured):
    """`seconds` are those of graph replays.  `missing` says why there are none, or none by graph."""

    eager: list[float] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # of the first call

    def of(self, mode: str) -> list[float]:
        return self.eager if mode == "eager" else self.seconds

    def json(self) -> dict[str, Any]:
        eager = {"eager": asdict(Timing.of(self.eager))} if self.eager else {}
        return {**super().json(), **eager, "warnings": self.warnings}


@dataclass
class AttentionRow(Row):
    """One shape in one dtype; `operator` is the implementation that served it."""

    ways: dict[str, Timed] = field(default_factory=dict)
    measured: Case = TINY[0]
    operator: str = ""
    copy_gbs: float = 0.0
    itemsize: int = 0
    copies: int = 0

    @property
    def name(self) -> str:
        return f"{self.case['name']} {self.case['dtype']}"

    @property
    def sparq(self) -> Timed:
        return self.ways[SPARQ]

    @property
    def dense(self) -> dict[str, Timed]:
        return {name: way for name, way in self.ways.items() if name != SPARQ}

    @property
    def is_left_out(self) -> bool:
        """There was no time for it."""
        return self.sparq.missing == NO_TIME

    @property
    def wrong(self) -> str | None:
        """Why there is no claim at all."""
        return None if self.is_left_out else self.sparq.wrong or self.sparq.missing

    @property
    def dense_bytes(self) -> int:
        return self.measured.shape.dense_elements * self.itemsize

    @property
    def sparq_bytes(self) -> int:
        return self.measured.shape.sparse_bytes(self.itemsize)

    def fastest_dense(self, mode: str) -> tuple[str, float] | None:
        """Its name and median."""
        right = {name: way.of(mode) for name, way in self.dense.items() if way.wrong is None}
        medians = [(name, statistics.median(seconds)) for name, seconds in right.items() if seconds]
        return min(medians, key=lambda pair: pair[1], default=None)

    def speedup(self, mode: str) -> float | None:
        """None where SparQ is wrong, runs without a kernel, or has nothing to be compared with."""
        dense, ours = self.fastest_dense(mode), self.sparq.of(mode)
        if self.wrong or self.operator == "reference" or dense is None or not ours:
            return None
        return dense[1] / statistics.median(ours)

    def json(self) -> dict[str, Any]:
        case = self.measured
        return {
            "case": self.case,
            "ways": {name: way.json() for name, way in self.ways.items()},
            "speedup": {mode: self.speedup(mode) for mode in MODES},
            "wrong": self.wrong,
            "goal": case.goal,
            "predicted": case.predicted,
            "operator": self.operator,
            "copies": self.copies,
            "dense_bytes": self.dense_bytes,
            "sparq_bytes": self.sparq_bytes,
        }


def copies_for(shape: Shape, itemsize: int, cache: int, free: int) -> int:
    """So many that even the little which SparQ reads of each one has left the cache when its turn comes again; as many
    as fit in memory, at least one."""
    wanted = max(3, -(-TIMES_CACHE * cache // shape.sparse_bytes(itemsize)))
    one = shape.dense_elements * itemsize * 3 // 2  # K, V and the components
    return max(1, min(wanted, int(MEMORY_SHARE * free) // one))


def cache_copies(shape: Shape, dtype: torch.dtype, device: str, clock: Device) -> list[Inputs]:
    copies = copies_for(shape, dtype.itemsize, clock.cache_bytes(), clock.free_bytes())
    first = make_inputs(shape, dtype, device)
    return [first, *(first.copy() for _ in range(copies - 1))]


def attempt(
    way: DenseWay,
    shape: Shape,
    caches: list[Inputs],
    rounds: int,
    check: Callable[[Tensor], str | None],
    clock: Device,
    fastest: dict[str, float] | None = None,
) -> Timed:
    """Times of one way, and whatever was wrong with it.  `check` says what is wrong with its output for the first
    cache, which all others are copies of.  `fastest`: medians of the best so far, None to measure in any case."""
    result = Timed()
    walks, limit = -(-CALLS // len(caches)), fastest or {}
    try:
        with way.context():
            call, output = first_call(way, shape, caches[0], result.warnings)
            result.wrong = check(output)
            try:
                graph = clock.graph(call, caches, walks)
                replayed = replay_error(graph, output)
                result.seconds = sampled(graph.times, rounds, limit.get("graph"))
                # Once more after many replays: an error that comes and goes is a race.
                result.wrong = result.wrong or replayed or replay_error(graph, output)
            except Exception as error:
                result.missing = "as a CUDA graph: " + reason(error)
            eager = max(2, rounds // EAGER_SHARE)
            result.eager = sampled(lambda n: clock.eager_times(call, caches, walks, n), eager, limit.get("eager"))
    except Exception as error:
        result.missing = "; ".join([*filter(None, [result.missing]), reason(error)])
    return result


def sampled(sample: Callable[[int], list[float]], rounds: int, fastest: float | None) -> list[float]:
    """`sample` gives so many times.  Whoever is far behind the fastest so far is sampled just a little."""
    if fastest is not None:
        times = sample(SCREENING_ROUNDS)
        if statistics.median(times) > OUT_OF_THE_RUNNING * fastest:
            return times
    return sample(rounds)


def first_call(way: DenseWay, shape: Shape, x: Inputs, warned: list[str]) -> tuple[Call, Tensor]:
    """The way's call and its output, and to `warned` what it warned of: SDPA's reasons for refusing are warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call = way.prepare(shape, x)
            return call, call(x).clone()
        finally:
            warned += dict.fromkeys(told(str(warning.message)) for warning in caught)


def replay_error(graph: Graph, output: Tensor) -> str | None:
    for replayed in graph.outputs():
        error = relative_error(replayed, output)
        if not error < rounding(output.dtype):
            return f"graph replay differs from the eager call by {error:.1e}"
    return None


def dense_error(output: Tensor, expected: Tensor) -> str | None:
    error = relative_error(output, expected)
    return None if error < DENSE_ERROR else f"differs from attention in float32 by {error:.1e}"


def new_row(case: Case, dtype_name: str, copy_gbs: float, device: str) -> AttentionRow:
    row = AttentionRow(case.described(dtype_name), {SPARQ: Timed()}, measured=case, copy_gbs=copy_gbs)
    row.operator, row.itemsize = sparq_kernels.backend(device), DTYPES[dtype_name].itemsize
    return row


@torch.no_grad()
def measure(
    case: Case, dtype_name: str, rounds: int, copy_gbs: float, device: str, clock: Device, ends: float = math.inf
) -> AttentionRow:
    """`ends`: when no further dense way is begun, as time.monotonic has it; the first one is measured in any case."""
    shape = case.shape
    row = new_row(case, dtype_name, copy_gbs, device)
    try:
        caches = cache_copies(shape, DTYPES[dtype_name], device, clock)
        row.copies = len(caches)
        row.ways[SPARQ] = attempt(SPARQ_WAY, shape, caches, rounds, lambda _: disagreement(shape, caches[0]), clock)
        expected = exact(shape, caches[0])
        for way in gpu_ways(shape):
            if row.dense and time.monotonic() > ends:
                row.ways[way.name] = Timed(missing=NO_TIME)
                continue
            best = {mode: found[1] for mode in MODES if (found := row.fastest_dense(mode))}
            check = lambda output: dense_error(output, expected)  # noqa: E731
            row.ways[way.name] = attempt(way, shape, caches, rounds, check, clock, best)
    except Exception as error:  # out of memory, or a device lost: the other rows and the report still matter
        row.sparq.missing = reason(error)
    return row


def all_measured(
    chosen: list[tuple[Case, str]], rounds: int, copy_gbs: float, device: str, clock: Device, ends: float
) -> Iterator[AttentionRow]:
    """A row of each, those for which no time is left empty."""
    for index, (case, dtype_name) in enumerate(chosen):
        left = ends - time.monotonic()
        if left < SHORTEST_ROW:
            row = new_row(case, dtype_name, copy_gbs, device)
            row.sparq.missing = NO_TIME
            yield row
            continue
        share = min(left, GENEROUS * left / (len(chosen) - index))
        yield measure(case, dtype_name, rounds, copy_gbs, device, clock, time.monotonic() + share)


@torch.no_grad()
def kernels(case: Case, dtype_name: str, device: str, clock: Device) -> list[Kernel]:
    caches = cache_copies(case.shape, DTYPES[dtype_name], device, clock)
    return clock.kernels(lambda x: sparq(case.shape, x), caches, -(-CALLS // len(caches)))


def main(stage: Stage) -> None:
    clock, compiled = clock_of(stage.device), binaries()
    chosen = [(case, "float32") for case in TINY] if stage.is_dry else MEASURED
    rounds = 3 if stage.is_dry else 30
    copy_gbs = clock.copy_bandwidth()
    stage.save(
        machine={**machine(), **clock.properties()},
        operator=sparq_kernels.backend(stage.device),
        copy_gbs=copy_gbs,
        settings={"rounds": rounds},
    )
    rows: list[AttentionRow] = []
    for row in all_measured(chosen, rounds, copy_gbs, stage.device, clock, stage.ends - PROFILING):
        rows.append(row)
        print(line(row), flush=True)
        report(stage, rows, {})
    profiles: dict[str, list[Kernel]] = {}
    for case in TINY if stage.is_dry else PROFILED:  # last: a profiler that has run may slow every launch after it
        why = NO_TIME
        if stage.left() > SHORTEST_ROW:
            try:
                profiles[case.name] = kernels(case, chosen[0][1], stage.device, clock)
                report(stage, rows, profiles)
                continue
            except Exception as error:
                why = reason(error)
        stage.content.setdefault("unprofiled", {})[case.name] = why
    stage.save(compiled_here=binaries() - compiled)


def report(stage: Stage, rows: list[AttentionRow], profiles: dict[str, list[Kernel]]) -> None:
    done = [row for row in rows if not row.is_left_out]
    by_kernel = [kernels_grid(profiles, rows[0].case["dtype"])] if profiles else []
    stage.set_tables(main_grid(rows), *by_kernel, hidden=(dense_grid(rows),))
    wrong = [f"WRONG: {row.name}: {row.wrong}" for row in rows if row.wrong]
    if stage.content["operator"] == "reference" and not stage.is_dry:
        wrong.append("no kernel for this device: what ran is the plain PyTorch reference")
    stage.save(
        rows=[row.json() for row in rows],
        profile={case: [asdict(kernel) for kernel in found] for case, found in profiles.items()},
        wrong=wrong,
        notes=notes(rows),
        said=f"{len(done)} of {len(rows)} rows, {sum(row.wrong is None for row in done)} of them right",
    )


def line(row: AttentionRow) -> str:
    """What to watch while the rest is measured."""
    dense, speedup = row.fastest_dense("graph"), row.speedup("graph")
    parts = [f"{row.name}, {row.copies} copies:", "no dense way" if dense is None else f"{dense[0]} {us(dense[1])} µs,"]
    parts.append(f"SparQ {us(row.sparq.median)} µs" if row.sparq.seconds else "no SparQ")
    parts.append(f"WRONG: {row.wrong}" if row.wrong else "" if speedup is None else f"{speedup:.1f}x")
    return " ".join(parts)


def notes(rows: list[AttentionRow]) -> list[str]:
    """What the grids do not say: which goals were missed and which ways are missing, the same reason told once."""
    lines = []
    for row in rows:
        goal, speedup = row.measured.goal, row.speedup("graph")
        if goal is not None and speedup is not None and speedup < goal:
            lines.append(f"goal missed: {row.name}: {speedup:.2f}x, not {goal:g}x")
    lines += dict.fromkeys(f"SparQ warned: {warning}" for row in rows for warning in row.sparq.warnings)
    absent, missing = {}, Counter[str]()
    for name, way in (pair for row in rows for pair in row.dense.items()):
        if way.missing and NOT_INSTALLED in way.missing:
            absent[name] = True
        elif why := way.wrong or way.missing:
            missing["; ".join([f"{name}: {why}", *way.warnings])] += 1
    lines += [f"not counted in {count} of {len(rows)} rows: {why}" for why, count in missing.items()]
    return lines + ([f"not installed: {', '.join(absent)}"] if absent else [])


def main_grid(rows: list[AttentionRow]) -> Grid:
    columns = (
        *("shape", "dtype", "dense, graph", "SparQ, graph", "GB/s (of copy)", "speed-up, graph", "goal", "bytes allow"),
        *("predicted, H100", "dense, eager", "SparQ, eager", "speed-up, eager"),
    )
    lines = []
    for row in rows:
        case, (eager, graph) = row.measured, (row.fastest_dense(mode) for mode in MODES)
        gbs = row.sparq_bytes / row.sparq.median / 1e9 if row.sparq.seconds else None
        lines.append(
            (
                f"{case.name}: {case.shape}",
                row.case["dtype"],
                UNKNOWN if graph is None else f"{with_spread(row.ways[graph[0]].seconds)} {graph[0]}",
                with_spread(row.sparq.seconds),
                UNKNOWN if gbs is None else f"{gbs:.0f} ({gbs / row.copy_gbs:.0%})",
                speedup_cell(row, "graph"),
                "" if case.goal is None else f"≥ {case.goal:g}x",
                f"{row.dense_bytes / row.sparq_bytes:.1f}x",
                "" if case.predicted is None else f"{case.predicted[1]:g} → {case.predicted[0]:g}",
                UNKNOWN if eager is None else us(eager[1]),
                median_us(row.sparq.eager),
                speedup_cell(row, "eager"),
            )
        )
    return Grid(
        "Attention of one new token on the GPU, µs per call: the fastest dense way against SparQ", columns, lines
    )


def dense_grid(rows: list[AttentionRow]) -> Grid:
    """Every dense way of every row."""
    names = list(dict.fromkeys(name for row in rows for name, way in row.dense.items() if way.eager or way.seconds))

    def cell(way: Timed | None) -> str:
        if way is None:
            return UNKNOWN
        return ("WRONG " if way.wrong else "") + f"{median_us(way.seconds)} / {median_us(way.eager)}"

    lines = [(row.case["shape"], row.case["dtype"], *(cell(row.dense.get(name)) for name in names)) for row in rows]
    return Grid("Dense ways, µs per call: graph / eager", ("shape", "dtype", *names), lines)


def kernels_grid(profiles: dict[str, list[Kernel]], dtype_name: str) -> Grid:
    """Of several shapes, side by side. PyTorch's own kernels, whose names are long, are one column."""
    every = [kernel.name for found in profiles.values() for kernel in found]
    names = list(dict.fromkeys(name for name in every if name.isidentifier()))
    rows = []
    for case, found in profiles.items():
        us_of = {name: 1e6 * sum(kernel.seconds for kernel in found if kernel.name == name) for name in names}
        total = 1e6 * sum(kernel.seconds for kernel in found)  # of what ran one after the other: gaps are not in it
        cells = (f"{us_of[name]:.1f}" if us_of[name] else UNKNOWN for name in names)
        launches = sum(kernel.launches for kernel in found)
        rest = (f"{total - sum(us_of.values()):.1f}", f"{total:.1f}", f"{launches:g}")
        rows.append((case, dtype_name, *cells, *rest))
    return Grid("SparQ by kernel, µs per call", ("shape", "dtype", *names, "others", "all", "launches"), rows)


def us(seconds: float) -> str:
    return f"{1e6 * seconds:.{1 if seconds < 1e-4 else 0}f}"


def median_us(seconds: list[float]) -> str:
    return us(statistics.median(seconds)) if seconds else UNKNOWN


def with_spread(seconds: list[float]) -> str:
    """With half the range from 10 to 90 %, in percent."""
    if not seconds:
        return UNKNOWN
    timing = Timing.of(seconds)
    return f"{us(timing.median)} ±{(timing.high - timing.low) / 2 / timing.median:.1%}"


def speedup_cell(row: AttentionRow, mode: str) -> str:
    if row.is_left_out:
        return NO_TIME
    if row.wrong:
        return "WRONG"
    if row.operator == "reference":
        return "no kernel"
    speedup = row.speedup(mode)
    return UNKNOWN if speedup is None else f"{speedup:.1f}x"

"""What the attention benchmark says of one shape on a GPU, and how rows are shown."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from device_time import Kernel
from gpu_cases import Case
from report import Grid
from workload import quantiles

MODES = ("eager", "graph")
SCREENING_ROUNDS = 3
OUT_OF_THE_RUNNING = 3  # times the fastest
NO_TIME = "no time"


@dataclass(frozen=True)
class Timing:
    """Microseconds of a call: the median, and the (10 %, 90 %) quantiles."""

    us: float
    spread: tuple[float, float]
    rounds: int

    @staticmethod
    def of(sample: Callable[[int], list[float]], rounds: int, fastest: float | None = None) -> Timing:
        """`sample` gives so many times.  Whoever is far behind the fastest so far is sampled just a little."""
        if fastest is not None:
            times = sample(SCREENING_ROUNDS)
            if statistics.median(times) > OUT_OF_THE_RUNNING * fastest:
                return Timing(statistics.median(times), (min(times), max(times)), len(times))
        times = sample(rounds)
        return Timing(*quantiles(times), rounds)


@dataclass
class Attempt:
    """One way's times.  `wrong` says how its output was wrong (its times are then worth nothing), `unavailable` why it
    has none, or none by graph."""

    name: str
    eager: Timing | None = None
    graph: Timing | None = None
    wrong: str | None = None
    unavailable: str | None = None
    warnings: list[str] = field(default_factory=list)  # of the first call

    def timing(self, mode: str) -> Timing | None:
        return self.eager if mode == "eager" else self.graph


@dataclass
class Row:
    """One shape in one dtype; `operator` is the implementation that served it."""

    case: Case
    dtype: str
    operator: str
    copy_gbs: float
    itemsize: int
    copies: int
    sparq: Attempt
    dense: list[Attempt] = field(default_factory=list)

    @property
    def is_left_out(self) -> bool:
        """There was no time for it."""
        return self.sparq.unavailable == NO_TIME

    @property
    def wrong(self) -> str | None:
        """Why there is no claim at all."""
        return None if self.is_left_out else self.sparq.wrong or self.sparq.unavailable

    @property
    def dense_bytes(self) -> int:
        return self.case.shape.dense_elements * self.itemsize

    @property
    def sparq_bytes(self) -> int:
        return self.case.shape.sparse_elements * self.itemsize

    def fastest(self, mode: str) -> tuple[str, Timing] | None:
        right = [(way.name, way.timing(mode)) for way in self.dense if way.wrong is None]
        timed = [(name, timing) for name, timing in right if timing is not None]
        return min(timed, key=lambda pair: pair[1].us, default=None)

    def speedup(self, mode: str) -> float | None:
        """None where SparQ is wrong, runs without a kernel, or has nothing to be compared with."""
        dense, sparq = self.fastest(mode), self.sparq.timing(mode)
        if self.wrong or self.operator == "reference" or dense is None or sparq is None:
            return None
        return dense[1].us / sparq.us

    def json(self) -> dict[str, object]:
        derived: dict[str, object] = {
            "shape": str(self.case.shape),
            "wrong": self.wrong,
            "dense_bytes": self.dense_bytes,
            "sparq_bytes": self.sparq_bytes,
            "bytes_ratio": self.dense_bytes / self.sparq_bytes,
        }
        for mode in MODES:
            dense, sparq = self.fastest(mode), self.sparq.timing(mode)
            derived[mode] = {
                "dense_way": dense and dense[0],
                "dense_gbs": dense and self.dense_bytes / dense[1].us / 1e3,
                "sparq_gbs": sparq and self.sparq_bytes / sparq.us / 1e3,
                "speedup": self.speedup(mode),
            }
        return {**asdict(self), **derived}


def main_grid(rows: list[Row]) -> Grid:
    columns = (
        "shape",
        "dtype",
        "dense, graph",
        "SparQ, graph",
        "GB/s (of copy)",
        "speed-up, graph",
        "goal",
        "bytes allow",
        "predicted, H100",
        "dense, eager",
        "SparQ, eager",
        "speed-up, eager",
    )
    return Grid(
        "Attention of one new token on the GPU, µs per call: the fastest dense way against SparQ",
        columns,
        [
            (
                f"{row.case.name}: {row.case.shape}",
                row.dtype,
                _dense(row),
                _microseconds(row.sparq.graph),
                _rate(row),
                _speedup(row, "graph"),
                "" if row.case.goal is None else f"≥ {row.case.goal:g}x",
                f"{row.dense_bytes / row.sparq_bytes:.1f}x",
                _predicted(row.case),
                _plain(None if (fastest := row.fastest("eager")) is None else fastest[1]),
                _plain(row.sparq.eager),
                _speedup(row, "eager"),
            )
            for row in rows
        ],
    )


def dense_grid(rows: list[Row]) -> Grid:
    """Every dense way of every row."""
    names = list(dict.fromkeys(way.name for row in rows for way in row.dense if way.eager or way.graph))
    return Grid(
        "Dense ways, µs per call: graph / eager",
        ("shape", "dtype", *names),
        [(str(row.case.shape), row.dtype, *(_both(row, name) for name in names)) for row in rows],
    )


def kernel_grid(title: str, found: list[Kernel]) -> Grid:
    total = sum(kernel.us for kernel in found)  # of what ran one after the other: gaps are not in it
    rows = [(k.name[:90], f"{k.launches:g}", f"{k.us:.2f}", f"{k.us / total:.0%}") for k in found]
    return Grid(
        title,
        ("kernel", "launches", "µs", "share"),
        [*rows, ("all", f"{sum(k.launches for k in found):g}", f"{total:.2f}", "")],
        left=1,
    )


def kernels_grid(profiles: list[tuple[Case, str, list[Kernel]]]) -> Grid:
    """The same of several shapes, side by side. PyTorch's own kernels, whose names are long, are one column."""
    names = list(
        dict.fromkeys(kernel.name for _, _, found in profiles for kernel in found if kernel.name.isidentifier())
    )
    rows = []
    for case, dtype, found in profiles:
        us = {name: sum(kernel.us for kernel in found if kernel.name == name) for name in names}
        total = sum(kernel.us for kernel in found)
        cells = (f"{us[name]:.1f}" if us[name] else "–" for name in names)
        launches = sum(kernel.launches for kernel in found)
        rows.append((case.name, dtype, *cells, f"{total - sum(us.values()):.1f}", f"{total:.1f}", f"{launches:g}"))
    return Grid("SparQ by kernel, µs per call", ("shape", "dtype", *names, "others", "all", "launches"), rows)


def missed_goals(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        speedup = row.speedup("graph")
        if row.case.goal is not None and speedup is not None and speedup < row.case.goal:
            lines.append(f"goal missed: {row.case.name} {row.dtype}: {speedup:.2f}x, not {row.case.goal:g}x")
    return lines


def problems(rows: list[Row]) -> list[str]:
    """What the grids do not say: why rows are wrong, and which ways are missing, the same reason told once."""
    lines = [f"WRONG: {row.case.name} {row.dtype}: {row.wrong}" for row in rows if row.wrong]
    lines += dict.fromkeys(f"SparQ warned: {warning}" for row in rows for warning in row.sparq.warnings)
    missing: Counter[str] = Counter()
    for way in (way for row in rows for way in row.dense):
        if reason := way.wrong or way.unavailable:
            missing["; ".join([f"{way.name}: {reason}", *way.warnings])] += 1
    return lines + [f"not counted in {count} of {len(rows)} rows: {reason}" for reason, count in missing.items()]


def _dense(row: Row) -> str:
    fastest = row.fastest("graph")
    return "–" if fastest is None else f"{_microseconds(fastest[1])} {fastest[0]}"


def _microseconds(timing: Timing | None) -> str:
    """With half the range from 10 to 90 %, in percent."""
    if timing is None:
        return "–"
    return f"{_plain(timing)} ±{(timing.spread[1] - timing.spread[0]) / 2 / timing.us:.1%}"


def _plain(timing: Timing | None) -> str:
    return "–" if timing is None else f"{timing.us:.{1 if timing.us < 100 else 0}f}"


def _rate(row: Row) -> str:
    if row.sparq.graph is None:
        return "–"
    gbs = row.sparq_bytes / row.sparq.graph.us / 1e3
    return f"{gbs:.0f} ({gbs / row.copy_gbs:.0%})"


def _predicted(case: Case) -> str:
    return "" if case.predicted is None else f"{case.predicted[1]:g} → {case.predicted[0]:g}"


def _speedup(row: Row, mode: str) -> str:
    if row.is_left_out:
        return NO_TIME
    if row.wrong:
        return "WRONG"
    if row.operator == "reference":
        return "no kernel"
    speedup = row.speedup(mode)
    return "–" if speedup is None else f"{speedup:.1f}x"


def _both(row: Row, name: str) -> str:
    way = next((way for way in row.dense if way.name == name), None)
    if way is None:
        return "–"
    return ("WRONG " if way.wrong else "") + f"{_plain(way.graph)} / {_plain(way.eager)}"

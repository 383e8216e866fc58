"""What the attention benchmark finds on the CPU: a row for each case and dtype, ratios, tables, a plot."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attention_cases import Case
from report import Grid
from workload import quantiles

KERNEL, SPARQ, REFERENCE = "C++ dense", "SparQ", "reference"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of every turn, in order, and the bytes that the algorithm has to read."""

    times: list[float]
    bytes: int

    @property
    def ms(self) -> float:
        return statistics.median(self.times)

    @property
    def spread(self) -> tuple[float, float]:
        return quantiles(self.times)[1]

    @property
    def gbs(self) -> float:
        return self.bytes / self.ms / 1e6

    def json(self) -> dict[str, object]:
        return {"ms": self.ms, "spread_ms": self.spread, "bytes": self.bytes, "gbs": self.gbs, "turns": len(self.times)}


@dataclass(frozen=True)
class Ratio:
    """How many times as fast; `low` and `high` are the (10 %, 90 %) quantiles of the ratios of single rounds, whose
    turns follow each other.  Not `sure` where the noise is larger than the claim: these include 1, or the two
    opponents' own spreads overlap."""

    value: float
    low: float
    high: float
    sure: bool

    @classmethod
    def of(cls, dense: Timing, ours: Timing) -> Ratio:
        rounds = [a / b for a, b in zip(dense.times, ours.times, strict=True)]
        low, high = quantiles(rounds)[1]
        apart = ours.spread[1] < dense.spread[0] or dense.spread[1] < ours.spread[0]
        return cls(dense.ms / ours.ms, low, high, apart and not low <= 1 <= high)

    def __str__(self) -> str:
        return f"{self.value:.1f}x ({self.low:.1f}–{self.high:.1f})" + ("" if self.sure else " unsure")


@dataclass
class Row:
    case: Case
    dtype: str
    copies: int
    streaming_gbs: float = 0.0
    timings: dict[str, Timing] = field(default_factory=dict)
    tried_ms: dict[str, float] = field(default_factory=dict)  # PyTorch's ways, before the slow ones were left out
    wrong: dict[str, str] = field(default_factory=dict)  # by opponent: how its output differs
    unavailable: dict[str, str] = field(default_factory=dict)  # by opponent: why it did not run

    @property
    def torch_way(self) -> str | None:
        """The fastest of PyTorch's own dense ways."""
        ways = [name for name in self.timings if name in self.tried_ms]
        return min(ways, key=lambda name: self.timings[name].ms, default=None)

    def ratio(self, opponent: str | None) -> Ratio | None:
        """Of SparQ over a dense opponent; None where either did not run or gave a wrong output."""
        names = {opponent, SPARQ}
        if opponent is None or not names <= self.timings.keys() or names & self.wrong.keys():
            return None
        return Ratio.of(self.timings[opponent], self.timings[SPARQ])

    @property
    def bytes_ratio(self) -> float:
        return self.case.shape.dense_elements / self.case.shape.sparse_elements

    def json(self) -> dict[str, object]:
        ratios = {"vs_torch": self.ratio(self.torch_way), "vs_kernel": self.ratio(KERNEL)}
        return {
            "name": self.case.name,
            **asdict(self.case.shape),
            "dtype": self.dtype,
            "copies": self.copies,
            "streaming_gbs": self.streaming_gbs,
            "timings": {
                name: {**timing.json(), "streaming_share": timing.gbs / self.streaming_gbs}
                for name, timing in self.timings.items()
            },
            "torch_way": self.torch_way,
            "torch_tried_ms": self.tried_ms,
            **{name: ratio and asdict(ratio) for name, ratio in ratios.items()},
            "bytes_ratio": self.bytes_ratio,
            "wrong": self.wrong,
            "unavailable": self.unavailable,
        }


def time_cell(row: Row, name: str | None) -> str:
    if name is None or name not in row.timings:
        return "–"
    timing = row.timings[name]
    low, high = timing.spread
    digits = max(1, 2 - math.floor(math.log10(max(timing.ms, 1e-3))))
    return f"{timing.ms:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def ratio_cell(row: Row, opponent: str | None) -> str:
    if {SPARQ, opponent} & row.wrong.keys():
        return "WRONG"
    ratio = row.ratio(opponent)
    return "–" if ratio is None else str(ratio)


def speed_cell(row: Row, name: str | None) -> str:
    if name is None or name not in row.timings:
        return "–"
    timing = row.timings[name]
    return f"{timing.bytes / 1e6:.1f} MB, {timing.gbs:.1f} ({timing.gbs / row.streaming_gbs:.0%})"


def main_grid(rows: list[Row]) -> Grid:
    columns = ("shape", "dtype", "PyTorch ms", "C++ dense ms", "SparQ ms", "reference ms")
    return Grid(
        "Attention of one new token: milliseconds, median (10–90 %), and how many times as fast SparQ is",
        (*columns, "vs PyTorch", "vs C++ dense", "bytes allow"),
        [
            (
                str(row.case),
                row.dtype,
                *(time_cell(row, name) for name in (row.torch_way, KERNEL, SPARQ)),
                f"{row.timings[REFERENCE].ms:.0f}" if REFERENCE in row.timings else "–",
                ratio_cell(row, row.torch_way),
                ratio_cell(row, KERNEL),
                f"{row.bytes_ratio:.1f}x",
            )
            for row in rows
        ],
    )


def speed_grid(rows: list[Row]) -> Grid:
    return Grid(
        "What was read: bytes, GB/s, and the fraction of what a plain sum over memory streams",
        ("shape", "dtype", "PyTorch", "C++ dense", "SparQ", "streaming GB/s", "PyTorch's fastest"),
        [
            (
                str(row.case),
                row.dtype,
                *(speed_cell(row, name) for name in (row.torch_way, KERNEL, SPARQ)),
                f"{row.streaming_gbs:.1f}",
                row.torch_way or "–",
            )
            for row in rows
        ],
    )


def problems(rows: list[Row]) -> list[str]:
    return [
        f"{row.case} {row.dtype}: {name}: {text}"
        for row in rows
        for name, text in (*row.wrong.items(), *row.unavailable.items())
    ]


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Time per step against context, from rows as `Row.json` gives them: a panel for each family of shapes (rows)
    and each dtype (columns); families of one or two contexts only where there are no others."""
    from matplotlib.figure import Figure

    def family(row: dict[str, Any]) -> str:
        return f"{row['name']}, batch {row['batch']}, r = {row['r']}"

    contexts_of: dict[str, set[int]] = {}
    for row in rows:
        contexts_of.setdefault(family(row), set()).add(row["cached"])
    families = [name for name, found in contexts_of.items() if len(found) > 2] or list(contexts_of)
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure(figsize=(5.5 * len(dtypes), 3.6 * len(families)), layout="constrained")
    panels = figure.subplots(len(families), len(dtypes), squeeze=False)
    for name, line in zip(families, panels, strict=True):
        for dtype, panel in zip(dtypes, line, strict=True):
            members = [row for row in rows if family(row) == name and row["dtype"] == dtype]
            members.sort(key=lambda row: row["cached"])
            for label in ("PyTorch", KERNEL, SPARQ, REFERENCE):
                points = []
                for row in members:
                    way = row["torch_way"] if label == "PyTorch" else label
                    if way in row["timings"] and way not in row["wrong"]:
                        points.append((row["cached"], row["timings"][way]))
                contexts = [context for context, _ in points]
                panel.plot(contexts, [timing["ms"] for _, timing in points], marker="o", markersize=3, label=label)
                if points and label != REFERENCE:  # of which there are too few turns to say
                    low, high = zip(*(timing["spread_ms"] for _, timing in points), strict=True)
                    panel.fill_between(contexts, low, high, alpha=0.15)
            panel.set(xscale="log", yscale="log", title=f"{name}, {dtype}", xlabel="cached", ylabel="ms per step")
            panel.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k")
            panel.set_xticks([row["cached"] for row in members], minor=False)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    panels[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)

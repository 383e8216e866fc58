"""What every benchmark does the same way: statistics, rows, JSON files, and what is said of the machine.

All times are seconds. README.md says how the numbers are to be read. PyTorch is imported only where it is needed:
gpu.py starts without it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

SPARQ = "SparQ"  # ways that are SparQ's begin with it, transformers' with the other
STOCK = "stock"
BARE_CONTEXT = 16  # cached positions, next to none: "layers alone"
T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Seconds: the median, and the values that 10 % and 90 % of `count` measurements are below."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Timing:
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), tenths[0], tenths[-1], len(values))


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one way is as another: of the ratios of their turns the median, and what 10 % and 90 %
    are below.  It is unclear where these hold a gain and a loss."""

    value: float
    low: float
    high: float
    unclear: bool

    @classmethod
    def of(cls, theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
        """Of the n-th of one to the n-th of the other; the time may have run out before the last turn of one."""
        ratios = Timing.of([a / b for a, b in zip(theirs, ours, strict=False)])
        return cls(ratios.median, ratios.low, ratios.high, ratios.low < 1 < ratios.high)


@dataclass
class Measured:
    """What one way was measured to do, or why it was not."""

    seconds: list[float] = field(default_factory=list)  # turn by turn
    wrong: str | None = None  # how its output is; the times are then worth nothing
    missing: str | None = None  # why there are no times
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def json(self) -> dict[str, Any]:
        timing = {"time": asdict(Timing.of(self.seconds))} if self.seconds else {}
        problems = {name: said for name in ("wrong", "missing") if (said := getattr(self, name)) is not None}
        return {**timing, **problems, **self.facts}


@dataclass
class Row:
    """All ways to do the same."""

    case: dict[str, Any]
    ways: dict[str, Measured] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def fastest(self, names: Iterable[str]) -> str | None:
        """Of those that were measured and are right."""
        ways = self.ways
        right = [name for name in names if name in ways and ways[name].seconds and not ways[name].wrong]
        return min(right, key=lambda name: ways[name].median, default=None)

    def ratio(self, theirs: str | None, ours: str | None = SPARQ) -> Ratio | None:
        """None where one of the two was not measured or is wrong."""
        if self.fastest([theirs or ""]) is None or self.fastest([ours or ""]) is None:
            return None
        return Ratio.of(self.ways[theirs or ""].seconds, self.ways[ours or ""].seconds)

    def json(self) -> dict[str, Any]:
        """With the ratios of everything that is SparQ's to everything else."""
        ratios: dict[str, dict[str, Any]] = {}
        for ours, theirs in itertools.permutations(self.ways, 2):
            if ours.startswith(SPARQ) and (ratio := self.ratio(theirs, ours)) is not None:
                ratios.setdefault(ours, {})[theirs] = asdict(ratio)
        ways = {name: way.json() for name, way in self.ways.items()}
        return {"case": self.case, "ways": ways, "ratios": ratios, **self.facts}


def line_of(rows: Iterable[Row], way: str, axis: str, per: int, layers: int) -> dict[str, float | None]:
    """Milliseconds per layer = at_zero + slope * case[axis] / per, by least squares through the rows' medians.

    `slope_error` is the slope's standard error; None where two points leave nothing to judge it by."""
    points = [(row.case[axis] / per, 1e3 * row.ways[way].median / layers) for row in rows]
    xs, ys = zip(*points, strict=True)
    slope, at_zero = statistics.linear_regression(xs, ys)
    error = None
    if len(points) > 2:
        residuals = sum((y - at_zero - slope * x) ** 2 for x, y in points)
        spread = sum((x - statistics.fmean(xs)) ** 2 for x in xs)
        error = math.sqrt(residuals / (len(points) - 2) / spread)
    return {"slope": slope, "at_zero": at_zero, "slope_error": error}


def finish(args: argparse.Namespace, rows: Iterable[Row], **facts: Any) -> dict[str, Any]:
    """What was found, written to --json: settings without paths of the machine, the machine, and the rows."""
    settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    if "model" in settings:
        settings["model"] = Path(settings["model"]).name
    result = {"settings": settings, "machine": machine(), **facts, "rows": [row.json() for row in rows]}
    if args.json:
        write_json(args.json, result)
    return result


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all: whoever writes after every row may be stopped while writing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)


def machine() -> dict[str, object]:
    """Processor, memory, threads and versions, as plain values for a JSON file."""
    import torch

    return {
        "processor": _first_value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": _first_value("/proc/meminfo", "MemTotal"),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "sparq commit": _commit(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, or None where the system does not say."""
    value = _first_value("/proc/meminfo", "MemAvailable")
    return None if value is None else int(value.split()[0]) * 1024


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def parser_of(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write rows, machine and settings there")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)


def progress(work: Sequence[T], what: str = "") -> Iterable[T]:
    """`work`, with a bar on stderr."""
    return track(work, description=what, console=Console(stderr=True), transient=True)


def _commit() -> str | None:
    """Of the checkout that this file belongs to, `-dirty` when it has changes."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _first_value(path: str, name: str) -> str | None:
    """The value of the first `name : value` line of a file under /proc, or None."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)

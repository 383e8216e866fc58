"""How the time of a decode step grows with the context and with the batch, dense and with SparQ.

    python benchmarks/scaling.py --plot scaling.png

Layers of a real model's shape decode from filled caches, as in `generation.py`, first at growing contexts (batch 1),
then at growing batches (`--batch-context` cached tokens in every row). Straight lines are fitted to the medians by
least squares: their slopes, with standard errors, are what one more cached token and one more row of the batch cost in
each layer, and where two lines cross is where SparQ begins to be faster, as far as both are straight.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from agreement import check
from common import machine
from line_fit import Line
from model_options import add_model_arguments, build_subject, check_arguments, fill_in, knobs_of, positive, settings_of
from model_shapes import Subject, is_real
from report import Grid, write_json
from rich.console import Console
from rich.progress import Progress
from turns import Ratio, median_and_deciles
from ways import DYNAMIC, SPARQ, STATIC, Runner, make_runner, steps_of, take_turns

WAYS = (DYNAMIC, STATIC, SPARQ)
FULL = dict(contexts=[4096, 8192, 16384, 32768, 65536], batches=[1, 2, 4, 8], batch_context=8192, rounds=4, tokens=6)
QUICK = dict(contexts=[2048, 4096, 8192], batches=[1, 2, 3], batch_context=4096, rounds=2, tokens=3)


@dataclass(frozen=True)
class Point:
    """Milliseconds per layer of every decode step counted, by way."""

    context: int
    batch: int
    milliseconds: dict[str, list[float]]

    def median(self, way: str) -> float:
        return median_and_deciles(self.milliseconds[way])[0]


@dataclass(frozen=True)
class Axis:
    """What grows, in which unit."""

    name: str
    unit: str
    per: float  # of what is counted in one unit
    label: str

    def x(self, point: Point) -> float:
        return (point.context if self.name == "context" else point.batch) / self.per


CONTEXT = Axis("context", "1,000 cached tokens", 1000, "1,000 cached tokens")
BATCH = Axis("batch", "row of the batch", 1, "rows of the batch")


def measure(subject: Subject, context: int, batch: int, args: argparse.Namespace, tick: Callable[[str], None]) -> Point:
    what = f"{context:,} cached, batch {batch}: "
    tick(what + "checking")
    check(subject.model, context, batch, knobs_of(args))
    room = steps_of(args.rounds, args.tokens) + 2
    runners: list[Runner] = []
    for way in WAYS:
        tick(what + way.name)
        runners.append(make_runner(subject.model, way, context, batch, room, knobs_of(args), is_real(args.model)))
    take_turns(runners, args.rounds, args.tokens, lambda name: tick(what + name))
    return Point(context, batch, {r.way.name: [1e3 * s / subject.layers for s in r.seconds] for r in runners})


def fit(points: list[Point], axis: Axis) -> dict[str, Line]:
    xs = [axis.x(point) for point in points]
    return {way.name: Line.through(xs, [point.median(way.name) for point in points]) for way in WAYS}


def point_grid(points: list[Point], title: str) -> Grid:
    rows = []
    for point in points:
        cells = []
        for way in WAYS:
            median, (low, high) = median_and_deciles(point.milliseconds[way.name])
            cells.append(f"{median:.2f} ({low:.2f}–{high:.2f})")
        ours = point.milliseconds[SPARQ.name]
        ratios = (str(Ratio.of(point.milliseconds[way.name], ours)) for way in (DYNAMIC, STATIC))
        rows.append((f"{point.context:,}", str(point.batch), *cells, *ratios))
    columns = ("cached", "batch", *(way.name for way in WAYS), "vs dynamic", "vs static")
    return Grid(f"ms per layer and token (10–90 %), {title}", columns, rows, left=0)


def slope_grid(lines: dict[str, Line], axis: Axis) -> Grid:
    ours = lines[SPARQ.name]
    rows = []
    for name, line in lines.items():
        against, crossing = "", ""
        if line is not ours:
            against = crossing = "unclear"  # a slope within two of its errors is no slope to divide by
            if all(one.slope > 0 and not one.slope < 2 * one.slope_error for one in (ours, line)):
                against = "{:.1f}x ± {:.1f}".format(*ours.times_flatter(line)).replace(" ± nan", "")
                crossing = describe_crossing(ours, line, axis)
        error = "" if math.isnan(line.slope_error) else f" ± {line.slope_error:.3f}"
        rows.append((name, f"{line.slope:.3f}{error}", f"{line.at_zero:.2f}", against, crossing))
    columns = ("way", f"ms per {axis.unit}", "ms at none", "SparQ flatter by", "SparQ faster")
    return Grid(f"Per layer and token, against the {axis.name}: slopes ± standard errors", columns, rows, left=1)


def describe_crossing(ours: Line, theirs: Line, axis: Axis) -> str:
    """Where the lines say that ours is below."""
    x = ours.crosses(theirs)
    if x is None or x <= 0:
        return "everywhere" if ours.at(1) < theirs.at(1) else "nowhere"
    side = "from" if ours.slope < theirs.slope else "up to"
    return f"{side} {axis.per * x:,.0f}" if axis is CONTEXT else f"{side} {x:.1f} rows"


def draw(path: Path, panels: list[tuple[Axis, list[Point], dict[str, Line]]], title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for plot, (axis, points, lines) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        xs = [axis.x(point) for point in points]
        for way, colour in zip(WAYS, ("tab:red", "tab:orange", "tab:blue"), strict=True):
            line = lines[way.name]
            known = [median_and_deciles(point.milliseconds[way.name]) for point in points]
            medians = [median for median, _ in known]
            errors = [[m - low for m, (low, _) in known], [high - m for m, (_, high) in known]]
            plot.errorbar(xs, medians, errors, fmt="o", color=colour, capsize=3)
            label = f"{way.name}: {line.slope:.3f} ms per {axis.unit}"
            plot.plot([0, max(xs)], [line.at(0), line.at(max(xs))], color=colour, label=label)
        plot.set(xlabel=axis.label, ylabel="ms per layer and token", ylim=(0, None))
        plot.legend()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--contexts", type=positive, nargs="+", help="cached tokens, at batch 1")
    parser.add_argument("--batches", type=positive, nargs="+")
    parser.add_argument("--batch-context", type=positive, help="cached tokens of every row, where the batch grows")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--plot", type=Path, help="draw points and lines there, a PNG")
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    fill_in(args, FULL, QUICK)
    for name in ("contexts", "batches"):
        if len(set(getattr(args, name))) < 2:
            parser.error(f"--{name} must be at least two different numbers: they make a line")
    return args


def main() -> None:
    args = parse()
    console = Console(width=150)
    subject = build_subject(args, args.dtype)
    title = f"{subject}, {args.dtype}"
    settings = [(CONTEXT, context, 1) for context in args.contexts]
    settings += [(BATCH, args.batch_context, batch) for batch in args.batches]
    points: dict[str, list[Point]] = {CONTEXT.name: [], BATCH.name: []}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(settings) * (1 + len(WAYS) * (args.rounds + 1)))
        for axis, context, batch in settings:
            point = measure(
                subject, context, batch, args, lambda what: progress.update(task, advance=1, description=what)
            )
            points[axis.name].append(point)
    panels = [(axis, points[axis.name], fit(points[axis.name], axis)) for axis in (CONTEXT, BATCH)]
    for axis, measured, lines in panels:
        console.print(point_grid(measured, title).table())
        console.print(slope_grid(lines, axis).table())
    if args.plot:
        draw(args.plot, panels, title)
    if args.json:
        results = {
            axis.name: dict(
                unit=f"ms per layer and {axis.unit}",
                points=[asdict(point) for point in measured],
                lines={name: described(line) for name, line in lines.items()},
            )
            for axis, measured, lines in panels
        }
        write_json(args.json, dict(machine=machine(), model=subject.described(), settings=settings_of(args), **results))


def described(line: Line) -> dict[str, float | None]:
    """JSON knows no NaN."""
    return {name: None if math.isnan(value) else value for name, value in asdict(line).items()}


if __name__ == "__main__":
    main()

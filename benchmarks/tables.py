"""The tables of all benchmarks, made from what they have written.

    python benchmarks/tables.py               # of results/*.json: results/tables.md and scaling.png
    python benchmarks/tables.py build/mine    # of the JSON files in another folder

Every program shows its rows by these functions. The README and the documents show some of the committed tables word for
word; a test compares them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import BARE_CONTEXT, SPARQ, STOCK
from rich.console import Console
from rich.markup import escape
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
# The first one is the README's.
MODELS = ("generation", "generation-r12", "generation-all-layers", "generation-llama-2-7b", "generation-pythia-1.4b")
PAPERS_R = 32  # of Llama; the other cases have the plugin's own ratio
GLANCE = (("float32", 16384, 1), ("float32", 65536, 1), ("float32", 131072, 1), ("bfloat16", 131072, 1))
GLANCE += (("bfloat16", 16384, 8),)
DYNAMIC, STATIC, OWN_CACHE, KERNEL, REFERENCE = (
    "stock dynamic",
    "stock static",
    "SparQ's cache",
    "C++ dense",
    "reference",
)
UNKNOWN = "–"
Content = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """The first `left` columns hold words and stand left, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    left: int = 2

    @classmethod
    def of(cls, table: Content) -> Grid:
        """As it was written to a JSON file."""
        return cls(table["title"], tuple(table["columns"]), [tuple(row) for row in table["rows"]], table["left"])

    def table(self) -> Table:
        table = Table(title=self.title)
        for index, name in enumerate(self.columns):
            table.add_column(name, justify="left" if index < self.left else "right")
        for row in self.rows:
            table.add_row(*(escape(cell.replace("**", "")) for cell in row))  # bold in Markdown alone
        return table

    def markdown(self) -> str:
        rule = ["---" if index < self.left else "---:" for index in range(len(self.columns))]
        lines = [list(self.columns), rule, *(list(row) for row in self.rows)]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    def titled_markdown(self) -> str:
        return f"**{self.title}**\n\n{self.markdown()}"


def show(*grids: Grid, width: int = 160) -> None:
    for grid in grids:
        Console(width=width).print(grid.table())


def ms(way: Content, layers: int = 1) -> float:
    return 1e3 * way["time"]["median"] / layers


def fastest(row: Content, names: Iterable[str]) -> str | None:
    ways = row["ways"]
    return min((n for n in names if is_right(ways.get(n))), key=lambda n: ways[n]["time"]["median"], default=None)


def is_right(way: Content | None) -> bool:
    return way is not None and "time" in way and "wrong" not in way


def times(ratio: Content | None, digits: int = 2) -> str:
    return UNKNOWN if ratio is None else f"{ratio['value']:.{digits}f}x" + " unclear" * ratio["unclear"]


def setting(row: Content) -> tuple[str, str, str]:
    case = row["case"]
    return case["dtype"], f"{case['cached']:,}", str(case["batch"])


def torch_way(row: Content) -> str | None:
    """The fastest of PyTorch's own dense ways."""
    return fastest(row, [name for name in row["ways"] if name not in (KERNEL, SPARQ, REFERENCE)])


def attention_grid(content: Content, rows: Iterable[Content]) -> Grid:
    lines = []
    for row in rows:
        ways, names = row["ways"], (torch_way(row), KERNEL, SPARQ)
        cells = [
            f"{ms(ways[n]):.2f} ({ways[n]['bytes'] / ms(ways[n]) / 1e6:.0f})"
            if n in ways and "time" in ways[n]
            else UNKNOWN
            for n in names
        ]
        for name in names[:2]:
            is_wrong = any("wrong" in ways.get(n, {}) for n in (name, SPARQ))
            ratio = row["ratios"].get(SPARQ, {}).get(name)
            bold = ratio and f"**{ratio['value']:.1f}x**" + " unclear" * ratio["unclear"]
            cells.append("WRONG" if is_wrong else bold or UNKNOWN)
        case = row["case"]
        lines.append((f"{case['name']} {case['shape']}", case["dtype"], *cells, f"{row['bytes_ratio']:.1f}x"))
    columns = ("shape", "dtype", "PyTorch", "C++ dense", "SparQ", "vs PyTorch", "vs C++", "bytes allow")
    return Grid("Attention of one new token: ms (GB/s of what has to be read)", columns, lines)


def generation_grid(content: Content, rows: list[Content] | None = None) -> Grid:
    """Milliseconds per layer and token, and where the gain comes from."""
    rows, said, settings = rows or content["rows"], content["model"], content["settings"]
    layers, ways = said["layers"], list(rows[0]["ways"])
    against = {
        "vs dynamic": (SPARQ, DYNAMIC),
        "of it: cache": (OWN_CACHE, DYNAMIC),
        "of it: sparsity": (SPARQ, OWN_CACHE),
        "vs static": (SPARQ, STATIC),
    }
    against = {title: pair for title, pair in against.items() if {*pair} <= {*ways}}
    lines = [
        (
            *setting(row),
            *(f"{ms(row['ways'][way], layers):.1f}" for way in ways),
            *(times(row["ratios"][ours][theirs]) for ours, theirs in against.values()),
        )
        for row in rows
    ]
    kept = f"{layers} of {said['layers_of']} layers" if layers < said["layers_of"] else "all layers, whole vocabulary"
    title = f"{said['name']}: ms per layer and token ({kept})"
    if settings["r"] and not settings["k"]:
        title += f", r = {settings['r']}, k = S / {2 * settings['ratio']:g}"
    return Grid(title, ("dtype", "cached", "batch", *ways, *against), lines, left=1)


def glance_grid(content: Content) -> Grid:
    """A few of these rows, without the ways between."""
    whole = generation_grid(content)
    names = ("dtype", "cached", "batch", DYNAMIC, STATIC, SPARQ, "vs dynamic", "vs static")
    places = [whole.columns.index(name) for name in names]
    shown = [(dtype, f"{cached:,}", str(batch)) for dtype, cached, batch in GLANCE]
    rows = [tuple(row[place] for place in places) for row in whole.rows if row[:3] in shown]
    return Grid(f"{whole.title}, at a glance", names, rows, left=1)


def ways_grid(content: Content) -> Grid:
    """Every way of every row, whole tokens, and the time to the first ones."""
    firsts, lines, said = ("first token s", "second s"), [], content["model"]
    for row in content["rows"]:
        best = fastest(row, [name for name in row["ways"] if name.startswith(STOCK)])
        for name, way in row["ways"].items():
            time = way["time"]
            ratio = row["ratios"].get(name, {}).get(best)
            lines.append(
                (
                    *setting(row),
                    name,
                    *(f"{way[first]:.2f}" if first in way else UNKNOWN for first in firsts),
                    f"{1e3 * time['median']:.1f}",
                    f"{1e3 * time['low']:.1f}–{1e3 * time['high']:.1f}",
                    f"{row['case']['batch'] / time['median']:,.1f}",
                    f"{way['cache_bytes'] / 2**20:,.0f}",
                    "best stock" if name == best else times(ratio),
                )
            )
    columns = ("dtype", "cached", "batch", "way", *firsts, "ms per token", "(10–90 %)", "tokens/s", "cache MiB")
    title = f"{said['name']}: whole tokens ({said['layers']} of {said['layers_of']} layers)"
    return Grid(title, (*columns, "vs best stock"), lines, left=4)


def parts_grid(content: Content) -> Grid:
    """Where a step's time goes, of the best stock way and of SparQ."""
    layers, rows = content["model"]["layers"], []
    for row in content["rows"]:
        ways = row["ways"]
        for way in (fastest(row, [n for n in ways if n.startswith(STOCK) and "parts" in ways[n]]), SPARQ):
            cells = (f"{1e3 * seconds / layers:.2f}" for seconds in ways[way]["parts"].values())
            rows.append((*setting(row), way, *cells))
    columns = ("dtype", "cached", "batch", "way", *content["rows"][0]["ways"][SPARQ]["parts"])
    return Grid(f"{content['model']['name']}: where a step's time goes, ms per layer", columns, rows, left=4)


def slopes_grid(content: Content) -> Grid:
    rows = []
    ours = {line["axis"]: line for line in content["lines"] if line["way"] == SPARQ}
    for line in content["lines"]:
        error = "" if line["slope_error"] is None else f" ± {line['slope_error']:.3f}"
        compared = ("", "") if line["way"] == SPARQ else lines_compared(ours[line["axis"]], line)
        rows.append((line["unit"], line["way"], f"{line['slope']:.3f}{error}", f"{line['at_zero']:.1f}", *compared))
    columns = ("one more", "way", "costs", "ms at none", "SparQ flatter", "SparQ faster")
    return Grid("One more of it costs, ms per layer and token", columns, rows)


def lines_compared(ours: Content, theirs: Content) -> tuple[str, str]:
    """How much flatter ours is, and from how much of it on, or up to how much, it is below."""
    if any(line["slope"] <= 2 * (line["slope_error"] or 0) for line in (ours, theirs)):
        return "unclear", "unclear"  # a slope within two of its errors is no slope to divide by
    flatter = f"{theirs['slope'] / ours['slope']:.1f}x"
    if ours["slope"] == theirs["slope"]:
        return flatter, UNKNOWN
    crossing = (theirs["at_zero"] - ours["at_zero"]) / (ours["slope"] - theirs["slope"])
    is_flatter = ours["slope"] < theirs["slope"]
    if crossing <= 0:
        return flatter, "everywhere" if is_flatter else "nowhere"
    return flatter, f"{'from' if is_flatter else 'up to'} {crossing:.1f}"


def llamacpp_grid(content: Content) -> Grid:
    rows, layers = [], content["settings"]["layers"]
    lines = {(line["dtype"], line["way"]): line for line in content["lines"]}
    for (dtype, way), line in lines.items():
        measured = [row for row in content["rows"] if row["case"]["dtype"] == dtype]
        cells = (f"{ms(row['ways'][way], layers):.1f}" for row in measured)
        cost = f"{1e3 * line['slope']:.0f} ± {1e3 * line['slope_error']:.0f}"
        rows.append((dtype, way, *cells, cost, f"{line['slope'] / lines[dtype, SPARQ]['slope']:.1f}x"))
    cached = [row["case"]["cached"] for row in measured]
    heads = ("layers alone" if positions == BARE_CONTEXT else f"{positions:,}" for positions in cached)
    columns = ("dtype", "way", *heads, "µs per 1,000 tokens more", "times SparQ's")
    threads = content["settings"]["threads"]
    return Grid(f"llama.cpp: ms per layer and token by cached tokens, {threads} threads", columns, rows)


def memory_grid(content: Content) -> Grid:
    rows = []
    for row in content["rows"]:
        held = {name: way["bytes"] for name, way in row["ways"].items()}
        kinds = ("SparQ, used", "SparQ, prompt", "SparQ, growing")
        cells = (f"{held[kind] / 2**20:,.0f} ({held[kind] / held[DYNAMIC]:.1f}x)" for kind in kinds)
        rows.append((f"{row['case']['cached']:,}", f"{held[DYNAMIC] / 2**20:,.0f}", *cells))
    columns = ("cached tokens", "stock", "SparQ, used", "held after a prompt", "held when it has just grown")
    return Grid("MiB of the cache", columns, rows, left=0)


def crossover_grid(content: Content) -> Grid:
    contexts = content["settings"]["contexts"]
    rows = []
    for line in content["pays from"]:
        case = {name: line[name] for name in ("heads", "dtype")}
        measured = [row["ways"] for row in content["rows"] if case.items() <= row["case"].items()]
        us = [[1e3 * ms(ways[name], content["layers"]) for name in (OWN_CACHE, SPARQ)] for ways in measured]
        cells = (f"{dense:.0f} / {sparse:.0f}" for dense, sparse in us)
        pays = line["cached"]
        there = (UNKNOWN, UNKNOWN) if pays is None else (f"{pays:,}", f"{line['bytes'] / 2**20:.2f} MiB")
        rows.append((*case.values(), *cells, *there))
    columns = ("heads of", "dtype", *(f"{context:,}" for context in contexts), "pays from", "bytes there")
    return Grid("µs per layer and token, dense / sparse (ratio=8)", columns, rows)


def gpu_grids(content: Content) -> Iterator[Grid]:
    """The first table of attention and of generation; `gpu-<card>.md` has all."""
    machine = content["machine"]
    for stage in ("attention", "generation"):
        for table in content.get(stage, {}).get("tables", [])[:1]:
            grid = Grid.of(table)
            yield replace(grid, title=f"{machine['device']}, torch {machine['torch']}: {grid.title}")


def read(name: str, results: Path = RESULTS) -> Content | None:
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def in_readme(results: Path = RESULTS) -> Iterator[Grid]:
    """The tables that the README shows."""
    if content := read(MODELS[0], results):
        yield glance_grid(content)


def in_docs(results: Path = RESULTS) -> Iterator[Grid]:
    """Those that docs/speed.md and docs/memory.md show."""
    if content := read("attention", results):
        yield attention_grid(content, [row for row in content["rows"] if row["case"]["r"] == PAPERS_R])
    if content := read(MODELS[0], results):
        yield generation_grid(content)
    if content := read("llamacpp", results):
        yield llamacpp_grid(content)
    if content := read("memory", results):
        yield memory_grid(content)
    for path in sorted(results.glob("gpu-*.json")):
        yield from gpu_grids(json.loads(path.read_text()))


def others(results: Path = RESULTS) -> Iterator[Grid]:
    if content := read("attention", results):
        yield attention_grid(content, [row for row in content["rows"] if row["case"]["r"] != PAPERS_R])
    for name in MODELS:
        content = read(name, results)
        if content and name != MODELS[0]:
            yield generation_grid(content)
        if content and content["settings"]["profile"]:
            yield parts_grid(content)
    if content := read("generation-compiled", results):
        yield ways_grid(content)
    if content := read("scaling", results):
        yield slopes_grid(content)


def everything(results: Path = RESULTS) -> str:
    parts = [
        "# Tables of speed",
        "Made by `python benchmarks/tables.py` of the JSON files beside it; `../README.md` says how to read them.",
    ]
    parts += [grid.titled_markdown() for grid in (*in_readme(results), *in_docs(results), *others(results))]
    return "\n\n".join(parts) + "\n"


def draw_scaling(path: Path, content: Content) -> None:
    from matplotlib.figure import Figure

    figure, layers = Figure(figsize=(11, 4.5), layout="constrained"), content["model"]["layers"]
    axes = {"cached": ("1,000 cached tokens", 1000), "batch": ("rows of the batch", 1)}
    for plot, (axis, (label, per)) in zip(figure.subplots(1, 2), axes.items(), strict=True):
        rows = [row for row in content["rows"] if row["axis"] == axis]
        xs = [row["case"][axis] / per for row in rows]
        lines = [line for line in content["lines"] if line["axis"] == axis]
        for line, colour in zip(lines, ("tab:red", "tab:orange", "tab:blue"), strict=True):
            known = [
                {name: 1e3 * row["ways"][line["way"]]["time"][name] / layers for name in ("median", "low", "high")}
                for row in rows
            ]
            errors = [[one["median"] - one["low"] for one in known], [one["high"] - one["median"] for one in known]]
            plot.errorbar(xs, [one["median"] for one in known], errors, fmt="o", color=colour, capsize=3)
            ends = [line["at_zero"], line["at_zero"] + line["slope"] * max(xs)]
            plot.plot(
                [0, max(xs)], ends, color=colour, label=f"{line['way']}: {line['slope']:.3f} ms per {line['unit']}"
            )
        plot.set(xlabel=label, ylabel="ms per layer and token", ylim=(0, None))
        plot.legend()
    model = content["model"]
    title = f"{model['name']}: {model['layers']} of {model['layers_of']} layers"
    if model["vocabulary"] < model["vocabulary_of"]:
        title += f", vocabulary of {model['vocabulary']:,} instead of {model['vocabulary_of']:,}"
    title += ", random weights" * model["random_weights"]
    figure.suptitle(f"{title}, {content['settings']['dtypes'][0]}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="default: benchmarks/results")
    folder = parser.parse_args().folder
    (folder / "tables.md").write_text(everything(folder))
    if content := read("scaling", folder):
        draw_scaling(folder / "scaling.png", content)


if __name__ == "__main__":
    main()

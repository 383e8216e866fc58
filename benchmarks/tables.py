"""The tables of all benchmarks, made from what they have written.

    python benchmarks/tables.py               # of results/*.json: results/tables.md and scaling.png
    python benchmarks/tables.py build/mine    # of the JSON files in another folder

Every program shows its rows by these functions. The README and the documents show some of the committed tables word for
word; a test compares them.
"""

from __future__ import annotations

import argparse
import json
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import BARE_CONTEXT, SPARQ, STOCK
from rich.console import Console
from rich.markup import escape
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PAPERS = {"r": 32, "head_dim": 128}  # of Llama; the other cases have the plugin's own ratio
GLANCE = (("float32", 16384, 1), ("float32", 65536, 1), ("float32", 131072, 1), ("bfloat16", 131072, 1))
GLANCE += (("bfloat16", 16384, 8),)
DYNAMIC, STATIC, OWN_CACHE = "stock dynamic", "stock static", "SparQ's cache"
KERNEL, REFERENCE = "C++ dense", "reference"  # the latter is in older JSON files
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


def show(*grids: Grid) -> None:
    for grid in grids:
        Console(width=160).print(grid.table())


def ms(way: Content, layers: int = 1) -> float:
    return 1e3 * way["time"]["median"] / layers


def fastest(row: Content, names: Iterable[str]) -> str | None:
    """Of those that were measured and are right."""
    ways = {name: row["ways"][name] for name in names}
    right = [name for name, way in ways.items() if "time" in way and "wrong" not in way]
    return min(right, key=lambda name: ways[name]["time"]["median"], default=None)


def times(ratio: Content | None) -> str:
    return UNKNOWN if ratio is None else f"{ratio['value']:.2f}x" + " unclear" * ratio["unclear"]


def setting(row: Content) -> tuple[str, str, str]:
    case = row["case"]
    return case["dtype"], f"{case['cached']:,}", str(case["batch"])


def model_title(content: Content) -> str:
    """The model, and what must be said about it."""
    said = content["model"]
    title = f"{said['name']}: {said['layers']} of {said['layers_of']} layers"
    if said["vocabulary"] < said["vocabulary_of"]:
        title += f", vocabulary of {said['vocabulary']:,} instead of {said['vocabulary_of']:,}"
    return title + ", random weights" * said["random_weights"]


def torch_way(row: Content) -> str | None:
    """The fastest of PyTorch's own dense ways."""
    return fastest(row, [name for name in row["ways"] if name not in (KERNEL, SPARQ, REFERENCE)])


def attention_grid(content: Content, is_shown: Callable[[Content], bool] = lambda case: True) -> Grid:
    lines = []
    for row in content["rows"]:
        case, ways, ratios = row["case"], row["ways"], row["ratios"].get(SPARQ, {})
        if not is_shown(case):
            continue
        names = (torch_way(row), KERNEL, SPARQ)
        cells = []
        for name in names:
            way = ways.get(name, {})
            cells.append(f"{ms(way):.2f} ({way['bytes'] / ms(way) / 1e6:.0f})" if "time" in way else UNKNOWN)
        for name in names[:2]:
            if any("wrong" in ways.get(one, {}) for one in (name, SPARQ)):
                cells.append("WRONG")
            elif name in ratios:
                cells.append(f"**{ratios[name]['value']:.1f}x**" + " unclear" * ratios[name]["unclear"])
            else:
                cells.append(UNKNOWN)
        lines.append((f"{case['name']} {case['shape']}", case["dtype"], *cells, f"{row['bytes_ratio']:.1f}x"))
    columns = ("shape", "dtype", "PyTorch", "C++ dense", "SparQ", "vs PyTorch", "vs C++", "bytes allow")
    return Grid("Attention of one new token: ms (GB/s of what has to be read)", columns, lines)


def papers_grid(content: Content) -> Grid:
    return attention_grid(content, lambda case: case.items() >= PAPERS.items())


def sweep_grid(content: Content) -> Grid:
    return attention_grid(content, lambda case: not case.items() >= PAPERS.items())


def generation_grid(content: Content) -> Grid:
    """Milliseconds per layer and token, and where the gain comes from."""
    rows, said, settings = content["rows"], content["model"], content["settings"]
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
            parts = ways[way]["parts"]
            rows.append((*setting(row), way, *(f"{1e3 * seconds / layers:.2f}" for seconds in parts.values())))
    columns = ("dtype", "cached", "batch", "way", *parts)
    return Grid(f"{content['model']['name']}: where a step's time goes, ms per layer", columns, rows, left=4)


def slopes_grid(content: Content) -> Grid:
    rows = []
    ours = {line["axis"]: line for line in content["lines"] if line["way"] == SPARQ}
    for line in content["lines"]:
        compared = ("", "") if line["way"] == SPARQ else lines_compared(ours[line["axis"]], line)
        rows.append((line["unit"], line["way"], slope(line, 1, 3), f"{line['at_zero']:.1f}", *compared))
    columns = ("one more", "way", "costs", "ms at none", "SparQ flatter", "SparQ faster")
    return Grid("One more of it costs, ms per layer and token", columns, rows)


def slope(line: Content, factor: int, digits: int) -> str:
    error = line["slope_error"]
    said = f"{factor * line['slope']:.{digits}f}"
    return said if error is None else f"{said} ± {factor * error:.{digits}f}"


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
        compared = f"{line['slope'] / lines[dtype, SPARQ]['slope']:.1f}x"
        rows.append((dtype, way, *cells, slope(line, 1000, 0), compared))
    cached = [row["case"]["cached"] for row in measured]
    heads = ("layers alone" if positions == BARE_CONTEXT else f"{positions:,}" for positions in cached)
    columns = ("dtype", "way", *heads, "µs per 1,000 tokens more", "times SparQ's")
    threads = content["machine"]["threads"]
    return Grid(f"llama.cpp: ms per layer and token by cached tokens, {threads} threads", columns, rows)


def linear_layers_grid(content: Content) -> Grid:
    layers, rows, lines = content["settings"]["layers"], content["rows"], []
    for name, way in rows[0]["ways"].items():
        if "missing" in way:
            lines.append((name, way["missing"], *(len(rows) * [UNKNOWN])))
        else:
            token, batch, prompt = (ms(row["ways"][name], layers) for row in rows)
            lines.append((name, f"{token:.1f}", f"{batch:.1f}", f"{prompt:.0f}", f"{way['error']:.2%}"))
    batch, prompt = rows[1]["case"]["batch"], rows[2]["case"]["tokens"]
    columns = ("weights", "a token", f"a batch of {batch}", f"a prompt of {prompt}", "output differs by")
    title = f"Linear layers alone, ms per layer, {content['machine']['vector instructions']}"
    return Grid(title, columns, lines, left=1)


def memory_grid(content: Content) -> Grid:
    rows = []
    for row in content["rows"]:
        held = {name: way["bytes"] for name, way in row["ways"].items()}
        states = ("int4, used", "int4, prompt", "int4, growing", "full, used", "full, prompt", "full, growing")
        cells = (f"{held[state] / 2**20:,.0f} ({held[state] / held[DYNAMIC]:.2f}x)" for state in states)
        rows.append((f"{row['case']['cached']:,}", f"{held[DYNAMIC] / 2**20:,.0f}", *cells))
    columns = ("cached tokens", "stock", "SparQ, used", "after a prompt", "just grown")
    columns += ("full index, used", "after a prompt", "just grown")
    return Grid("MiB of the cache", columns, rows, left=0)


def crossover_grid(content: Content) -> Grid:
    lines: dict[tuple[str, str], list[str]] = {}  # of each model and dtype, by growing contexts
    pays: dict[tuple[str, str], tuple[str, str]] = {}  # the first context from which sparse stays faster, and its bytes
    for row in content["rows"]:
        case = row["case"]
        key = (case["heads"], case["dtype"])
        dense, sparse = (1e3 * ms(row["ways"][name], content["layers"]) for name in (OWN_CACHE, SPARQ))
        lines.setdefault(key, []).append(f"{dense:.0f} / {sparse:.0f}")
        if sparse < dense:
            pays.setdefault(key, (f"{case['cached']:,}", f"{row['dense_bytes'] / 2**20:.2f} MiB"))
        else:
            pays.pop(key, None)
    contexts = dict.fromkeys(f"{row['case']['cached']:,}" for row in content["rows"])
    columns = ("heads of", "dtype", *contexts, "pays from", "bytes there")
    rows = [(*key, *cells, *pays.get(key, (UNKNOWN, UNKNOWN))) for key, cells in lines.items()]
    return Grid("µs per layer and token, dense / sparse (ratio=8)", columns, rows)


def read(folder: Path, name: str) -> Content | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


# Which tables are made of which file.
IN_README = {"generation": [glance_grid]}
IN_DOCS = {
    "attention": [papers_grid],
    "generation": [generation_grid],
    "llamacpp": [llamacpp_grid],
    "linear-layers": [linear_layers_grid],
    "generation-int8": [generation_grid],
    "memory": [memory_grid],
}
OTHERS = {
    "attention": [sweep_grid],
    "generation": [parts_grid],
    "generation-k64": [generation_grid],
    "generation-all-layers": [generation_grid],
    "generation-llama-2-7b": [generation_grid, parts_grid],
    "generation-pythia-1.4b": [generation_grid, parts_grid],
    "generation-compiled": [ways_grid],
    "scaling": [slopes_grid],
}


def made(wanted: dict[str, list[Callable[[Content], Grid]]], folder: Path = RESULTS) -> Iterator[Grid]:
    """The tables of those files that are there."""
    for name, grids in wanted.items():
        if content := read(folder, name):
            for grid in grids:
                if grid is not parts_grid or content["settings"]["profile"]:
                    yield grid(content)


def gpu_grids(folder: Path = RESULTS) -> Iterator[Grid]:
    """Of every card the first table of attention and of generation, for docs/speed.md; `gpu-<card>.md` has all."""
    for path in sorted(folder.glob("gpu-*.json")):
        content = json.loads(path.read_text())
        card = f"{content['machine']['device']}, torch {content['machine']['torch']}"
        for stage in ("attention", "generation"):
            for table in content.get(stage, {}).get("tables", [])[:1]:
                yield Grid.of({**table, "title": f"{card}: {table['title']}"})


def everything(folder: Path = RESULTS) -> str:
    parts = [
        "# Tables of speed",
        "Made by `python benchmarks/tables.py` of the JSON files beside it; `../README.md` says how to read them.",
    ]
    grids = (*made(IN_README, folder), *made(IN_DOCS, folder), *gpu_grids(folder), *made(OTHERS, folder))
    parts += [grid.titled_markdown() for grid in grids]
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
            times = [row["ways"][line["way"]]["time"] for row in rows]
            low, median, high = ([1e3 * time[name] / layers for time in times] for name in ("low", "median", "high"))
            errors = [list(map(operator.sub, median, low)), list(map(operator.sub, high, median))]
            plot.errorbar(xs, median, errors, fmt="o", color=colour, capsize=3)
            ends = [line["at_zero"], line["at_zero"] + line["slope"] * max(xs)]
            said = f"{line['way']}: {line['slope']:.3f} ms per {line['unit']}"
            plot.plot([0, max(xs)], ends, color=colour, label=said)
        plot.set(xlabel=label, ylabel="ms per layer and token", ylim=(0, None))
        plot.legend()
    figure.suptitle(f"{model_title(content)}, {content['settings']['dtypes'][0]}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="default: benchmarks/results")
    folder = parser.parse_args().folder
    (folder / "tables.md").write_text(everything(folder))
    if content := read(folder, "scaling"):
        draw_scaling(folder / "scaling.png", content)


if __name__ == "__main__":
    main()

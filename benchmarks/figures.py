"""The tables of speed of the README and the documents, made from what the benchmarks have written.

    python benchmarks/figures.py      # reads results/*.json, writes results/tables.md and results/attention.png

They show some of these tables word for word; a test compares them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from attention_cases import README, Case
from attention_rows import KERNEL, plot
from attention_rows import SPARQ as OPERATOR
from gpu_report import grid_of
from report import Grid
from turns import Ratio
from ways import BARE_CONTEXT, DYNAMIC, OWN_CACHE, SPARQ, STATIC, WAYS
from workload import Shape

RESULTS = Path(__file__).parent / "results"
# The first one is the README's.
MODELS = (
    "generation",
    "generation-r12",
    "generation-all-layers",
    "generation-llama-2-7b",
    "generation-pythia-1.4b",
)
Content = dict[str, Any]


def attention_grid(content: Content, cases: Iterable[Case]) -> Grid:
    rows = []
    for case, row in ((case_of(row), row) for row in content["rows"]):
        if case not in cases:
            continue
        timings = row["timings"]
        ratios = [
            "WRONG" if row["wrong"] else f"**{row[name]['value']:.1f}x**" + ("" if row[name]["sure"] else " unsure")
            for name in ("vs_torch", "vs_kernel")
        ]
        times = [
            f"{timings[name]['ms']:.2f} ({timings[name]['gbs']:.0f})" for name in (row["torch_way"], KERNEL, OPERATOR)
        ]
        rows.append((str(case), row["dtype"], *times, *ratios, f"{row['bytes_ratio']:.1f}x"))
    columns = ("shape", "dtype", "PyTorch", "C++ dense", "SparQ", "vs PyTorch", "vs C++", "bytes allow")
    return Grid("Attention of one new token: ms (GB/s of what has to be read)", columns, rows)


def case_of(row: Content) -> Case:
    return Case(row["name"], Shape(**{field: row[field] for field in Shape.__dataclass_fields__}))


def generation_grid(content: Content) -> Grid:
    """Milliseconds per layer and token, and where the gain comes from."""
    layers, rows = content["model"]["layers"], []
    ways = [way.name for way in WAYS]
    for row in content["rows"]:
        against = row["sparq_against"]
        ratios = (
            against[DYNAMIC.name],
            row["own_cache_against_dynamic"],
            against[OWN_CACHE.name],
            against[STATIC.name],
        )
        rows.append(
            (
                *setting(row),
                *(f"{1e3 * row['ways'][way]['seconds_per_token'] / layers:.1f}" for way in ways),
                *(short(Ratio(**ratio)) for ratio in ratios),
            )
        )
    said, settings = content["model"], content["settings"]
    kept = f"{layers} of {said['layers_of']} layers" if layers < said["layers_of"] else "all layers, whole vocabulary"
    title = f"{said['name']}: ms per layer and token ({kept})"
    if settings["r"] and not settings["k"]:
        title += f", r = {settings['r']}, k = S / {2 * settings['ratio']:g}"
    columns = ("dtype", "cached", "batch", *ways, "vs dynamic", "of it: cache", "of it: sparsity", "vs static")
    return Grid(title, columns, rows, left=1)


GLANCE = (("float32", 16384, 1), ("float32", 65536, 1), ("float32", 131072, 1), ("bfloat16", 131072, 1))
GLANCE += (("bfloat16", 16384, 8),)


def glance_grid(content: Content) -> Grid:
    """A few of these rows, without the ways between."""
    whole = generation_grid(content)
    names = ("dtype", "cached", "batch", DYNAMIC.name, STATIC.name, SPARQ.name, "vs dynamic", "vs static")
    places = [whole.columns.index(name) for name in names]
    shown = [setting(row) for row in content["rows"] if (row["dtype"], row["context"], row["batch"]) in GLANCE]
    rows = [tuple(row[place] for place in places) for row in whole.rows if row[:3] in shown]
    return Grid(f"{whole.title}, at a glance", names, rows, left=1)


def setting(row: Content) -> tuple[str, str, str]:
    return row["dtype"], f"{row['context']:,}", str(row["batch"])


def short(ratio: Ratio) -> str:
    return f"{ratio.value:.2f}x" + " unclear" * ratio.is_unclear


def ways_grid(content: Content) -> Grid:
    """Every way of every row, the compiled ones too, and the time to the first tokens."""
    rows = []
    for row in content["rows"]:
        for name, way in row["ways"].items():
            firsts = (way["first_token_seconds"], way["second_token_seconds"])
            cells = ("–" if seconds is None else f"{seconds:.2f}" for seconds in firsts)
            rows.append((*setting(row), name, *cells, f"{1e3 * way['seconds_per_token']:.1f}"))
    said = content["model"]
    title = f"{said['name']}: the prompt computed, and torch.compile ({said['layers']} of {said['layers_of']} layers)"
    columns = ("dtype", "cached", "batch", "way", "first token s", "second s", "ms per token")
    return Grid(title, columns, rows, left=4)


def parts_grid(content: Content) -> Grid:
    """Where a step's time goes, of the best stock way and of SparQ."""
    layers, rows = content["model"]["layers"], []
    for row in content["rows"]:
        for way in (row["best_stock"], SPARQ.name):
            parts = row["ways"][way]["parts"]
            cells = (f"{1e3 * seconds / layers:.2f}" for seconds in parts.values())
            rows.append((*setting(row), way, *cells))
    columns = ("dtype", "cached", "batch", "way", *content["rows"][0]["ways"][SPARQ.name]["parts"])
    return Grid(f"{content['model']['name']}: where a step's time goes, ms per layer", columns, rows, left=4)


def slopes_grid(content: Content) -> Grid:
    rows = []
    for axis, unit in (("context", "1,000 cached tokens"), ("batch", "row of the batch")):
        for way, line in content[axis]["lines"].items():
            rows.append((unit, way, f"{line['slope']:.3f} ± {line['slope_error']:.3f}", f"{line['at_zero']:.1f}"))
    return Grid("One more of it costs, ms per layer and token", ("one more", "way", "costs", "ms at none"), rows)


def llamacpp_grid(content: Content) -> Grid:
    rows = []
    for result in content["results"]:
        ways = list(result["slopes"])
        contexts = {row["context"]: row["milliseconds"] for row in result["rows"]}
        for way in ways:
            slope = result["slopes"][way]
            times = (f"{milliseconds[way]:.1f}" for milliseconds in contexts.values())
            ratio = slope["value"] / result["slopes"][SPARQ.name]["value"]
            cells = (f"{1e3 * slope['value']:.0f} ± {1e3 * slope['error']:.0f}", f"{ratio:.1f}x")
            rows.append((result["dtype"], way, *times, *cells))
    heads = ("layers alone" if context == BARE_CONTEXT else f"{context:,}" for context in contexts)
    columns = ("dtype", "way", *heads, "µs per 1,000 tokens more", "times SparQ's")
    threads = content["settings"]["threads"]
    return Grid(f"llama.cpp: ms per layer and token by cached tokens, {threads} threads", columns, rows)


def memory_grid(content: Content) -> Grid:
    rows = []
    for row in content["rows"]:
        stock = row["bytes"]["stock dynamic"]
        kinds = ("SparQ, used", "SparQ, prompt", "SparQ, growing")
        held = (f"{row['bytes'][kind] / 2**20:,.0f} ({row['bytes'][kind] / stock:.1f}x)" for kind in kinds)
        rows.append((f"{row['context']:,}", f"{stock / 2**20:,.0f}", *held))
    columns = ("cached tokens", "stock", "SparQ, used", "held after a prompt", "held when it has just grown")
    return Grid("MiB of the cache", columns, rows, left=0)


def gpu_grids(content: Content) -> Iterator[Grid]:
    """The first table of attention and of generation; `gpu-<card>.md` has all."""
    machine = content["machine"]
    for stage in ("attention", "generation"):
        for table in content.get(stage, {}).get("tables", [])[:1]:
            grid = grid_of(table)
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
        yield attention_grid(content, README)
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
        yield attention_grid(content, [case for row in content["rows"] if (case := case_of(row)) not in README])
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


def tables(results: Path = RESULTS) -> str:
    parts = [
        "# Tables of speed",
        "Made by `python benchmarks/figures.py` of the JSON files beside it; `../README.md` says how to read them.",
    ]
    parts += [
        f"**{grid.title}**\n\n{grid.markdown()}" for grid in (*in_readme(results), *in_docs(results), *others(results))
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (RESULTS / "tables.md").write_text(tables())
    if found := read("attention"):
        plot(RESULTS / "attention.png", found["rows"])

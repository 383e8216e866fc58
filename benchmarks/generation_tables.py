"""The generation benchmark's tables."""

from __future__ import annotations

from generation_rows import Result, Row
from report import Grid
from step_profile import PARTS
from turns import median_and_deciles
from ways import LAYERS_ALONE, OWN_CACHE, SPARQ

UNKNOWN = "–"


def grids(rows: list[Row], title: str) -> list[Grid]:
    found = [way_grid(rows, title), source_grid(rows)]
    if any(result.parts for row in rows for result in row.results.values()):
        found.append(parts_grid(rows))
    return found


def way_grid(rows: list[Row], title: str) -> Grid:
    """Every way of every row, against the best stock way there."""
    lines = []
    for row in rows:
        best = row.best_stock.way.name
        for name, result in row.results.items():
            against = "best stock" if name == best else str(row.ratio(best, name))
            lines.append((*_setting(row), name, *_numbers(row, result), UNKNOWN if result.way.bare else against))
    first = ("first token s", "second s") if any(r.first_token for row in rows for r in row.results.values()) else ()
    columns = ("dtype", "cached", "batch", "way", *first, "ms per token", "(10–90 %)", "tokens/s", "cache MiB")
    if not first:
        lines = [(*line[:4], *line[6:]) for line in lines]
    return Grid(title, (*columns, "vs best stock"), lines, left=4)


def _setting(row: Row) -> tuple[str, str, str]:
    return row.dtype, f"{row.context:,}", str(row.batch)


def _numbers(row: Row, result: Result) -> tuple[str, ...]:
    median, (low, high) = median_and_deciles(result.seconds)
    firsts = (UNKNOWN if s is None else f"{s:.2f}" for s in (result.first_token, result.second_token))
    return (
        *firsts,
        f"{1e3 * median:.1f}",
        f"{1e3 * low:.1f}–{1e3 * high:.1f}",
        f"{row.batch / median:,.1f}",
        f"{result.cache_bytes / 2**20:,.0f}",
    )


def source_grid(rows: list[Row]) -> Grid:
    """What the cache gains, what sparsity gains, and what the layers cost whatever attention does."""
    lines = []
    for row in rows:
        bare = row.results[LAYERS_ALONE.name].median
        lines.append(
            (
                *_setting(row),
                str(row.ratio("stock dynamic")),
                str(row.ratio("stock dynamic", OWN_CACHE.name)),
                str(row.ratio(OWN_CACHE.name)),
                str(row.ratio("stock static")),
                f"{bare / row.results[SPARQ.name].median:.0%}",
                f"{row.best_stock.median / bare:.1f}x",
                f"{row.bytes_dense / row.bytes_sparq:.1f}x less" if row.bytes_sparq else UNKNOWN,
            )
        )
    columns = (
        "dtype",
        "cached",
        "batch",
        "SparQ vs dynamic",
        "of it: cache",
        "of it: sparsity",
        "vs static",
        "layers alone, of SparQ's step",
        "free attention: vs best stock",
        "bytes read",
    )
    return Grid("Where the gain comes from", columns, lines, left=3)


def parts_grid(rows: list[Row]) -> Grid:
    """Milliseconds of a step, part by part."""
    lines = []
    for row in rows:
        for name, result in row.results.items():
            if result.parts is None:
                continue
            whole = sum(result.parts.values())
            cells = (f"{1e3 * result.parts[part]:.2f} ({result.parts[part] / whole:.0%})" for part in PARTS)
            lines.append((*_setting(row), name, *cells, f"{1e3 * whole:.2f}"))
    return Grid("Where a step's time goes, ms", ("dtype", "cached", "batch", "way", *PARTS, "all"), lines, left=4)

"""What pages cost: one decode step of attention on pages of N positions, in any order, against the same cache in a row.

    python benchmarks/pages.py --json benchmarks/results/pages.json

Llama-3-8B's heads. Turns alternate over several copies of the cache, as in attention.py; on pages the output is the
same but for the rounding of the mean value.
"""

from __future__ import annotations

import sys

import sparq_kernels
import torch
from attention import copies_that_fit, sized, timed, walk
from harness import SPARQ, Measured, Row, available_memory, finish, parser_of, positive, progress
from rich.console import Console
from rich.table import Table
from sparq_kernels import GROUP, Cached, append_slots
from sparq_kernels.layout import empty
from workload import DTYPES, Inputs, Shape, make_inputs, relative_error, rounding, sparq

SIZES = {"full": (64, 128, 256, 512, 2048), "int4": (256, 512, 2048)}
ROW = f"{SPARQ}, in a row"


class Paged:
    """Inputs whose cache lies in pages, one after the other in memory but in an order of their own."""

    def __init__(self, shape: Shape, x: Inputs, page: int) -> None:
        pages = -(-shape.cached // page)
        dtype, heads, d = x.key.dtype, shape.num_kv_heads, shape.head_dim
        key, value = (empty(pages, heads, page, d, dtype=dtype) for _ in range(2))
        ranges = None
        if shape.index == "full":
            components = empty(pages, heads, 1, d, page, dtype=dtype)
        else:
            components = empty(pages, heads, page // GROUP, d, GROUP // 2, dtype=torch.uint8)
            ranges = empty(pages, heads, page // GROUP, d, 2, dtype=dtype)
        sums = empty(pages, heads, d, dtype=torch.float32)
        table = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).int()[None]
        s = torch.arange(shape.cached)
        slots = table[0].long()[s // page] * page + s % page
        self.cached = Cached(key, components, value, sums, ranges, table)
        append_slots(self.cached, x.key[0].transpose(0, 1), x.value[0].transpose(0, 1), slots)
        self.x = x

    def decode(self, shape: Shape, _: object = None) -> torch.Tensor:
        _, visible, budget = self.x.groups(shape)
        return sparq_kernels.decode(self.x.query, self.cached, visible, budget).output


def measure(shape: Shape, dtype_name: str, rounds: int) -> Row:
    dtype = DTYPES[dtype_name]
    original = make_inputs(shape, dtype)
    copies = copies_that_fit(shape, dtype.itemsize, available_memory(), 3)
    rows = [original.copy() for _ in range(copies)]
    row = Row({"shape": str(shape), "index": shape.index, "dtype": dtype_name}, {ROW: Measured()})
    expected = sparq(shape, original)
    for page in SIZES[shape.index]:
        paged = [Paged(shape, x, page) for x in rows]
        error = relative_error(paged[0].decode(shape), expected)
        wrong = None if error < rounding(dtype) else f"output differs from that in a row by {error:.1e}"
        way = row.ways[f"{SPARQ}, pages of {page:,}"] = Measured(wrong=wrong)
        alone = Measured()
        for turn, i in zip(range(rounds), walk(copies), strict=False):
            pair = [(alone, sparq, rows[i]), (way, lambda s, p: p.decode(s), paged[i])]
            for measured, call, x in pair if turn % 2 else pair[::-1]:
                seconds = timed(call, shape, x)  # type: ignore[arg-type]
                if turn >= copies:
                    measured.seconds.append(seconds)
        way.facts["in_a_row"] = alone.median
        row.ways[ROW].seconds += alone.seconds
    return row


def main(arguments: list[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--contexts", type=positive, nargs="+", default=[16384, 65536])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=positive, default=60)
    args = parser.parse_args(arguments)
    cases = [
        (sized("llama-3-8b", 1, n, r=32, k=n // 64, index=index).shape, dtype)
        for index in SIZES
        for n in args.contexts
        for dtype in args.dtypes
    ]
    rows = [measure(*case, args.rounds) for case in progress(cases)]
    finish(args, rows)
    table = Table(title="Time on pages, over that of the same cache in a row")
    for name in ("shape", "dtype", *(f"{page:,}" for page in SIZES["full"])):
        table.add_column(name, justify="right")
    for row in rows:
        cells = []
        for page in SIZES["full"]:
            way = row.ways.get(f"{SPARQ}, pages of {page:,}")
            cells.append("" if way is None else "wrong" if way.wrong else f"{way.median / way.facts['in_a_row']:.2f}")
        table.add_row(row.case["shape"], row.case["dtype"], *cells)
    Console(width=110).print(table)
    return 1 if any(way.wrong for row in rows for way in row.ways.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""One decode step of attention: the SparQ operator against the fastest dense path PyTorch has for the same cache.

    python benchmarks/attention.py --json benchmarks/results/attention.json

Each shape first has its output compared with the plain PyTorch reference; where that fails, no ratio is printed. Dense
and sparse then take turns. Both walk over several copies of the cache, never the same one after the other, and enough
of them that none is still in the processor's cache when its turn comes again: in a model every layer has its own.
`--copies 1` reuses one cache instead, and each opponent runs alone, as kernels are often measured: on processors with a
large cache the bytes that SparQ reads then come from there, and its ratio looks better than a model will ever see.

Dense is the fastest, measured here, of scaled_dot_product_attention with the group packed into the query axis, with
enable_gqa, and of two matrix products around a softmax. GB/s counts what the algorithm has to read (dense 2 S d, SparQ
S r + 2 k d elements per KV head) over the whole call's time, Python included, beside what a plain sum over memory reads
in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import sparq_kernels
import torch
from common import machine, streaming_read
from rich.console import Console
from rich.table import Table
from sparq_kernels.layout import prefer_huge_pages
from sparq_kernels.reference import decode_reference
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

CACHE_BYTES = 1_600_000_000  # of all dense copies together: several times any processor's cache


@dataclass(frozen=True)
class Shape:
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    cached: int
    r: int
    k: int

    def __str__(self) -> str:
        return f"B={self.batch} {self.num_heads}/{self.num_kv_heads} S={self.cached} r={self.r} k={self.k}"

    @property
    def dense_elements(self) -> int:
        return self.batch * self.num_kv_heads * 2 * self.cached * self.head_dim

    @property
    def sparse_elements(self) -> int:
        return self.batch * self.num_kv_heads * (self.cached * self.r + 2 * self.k * self.head_dim)


SHAPES = (
    Shape(1, 32, 8, 128, 16384, 32, 256),
    Shape(1, 32, 32, 128, 4096, 32, 128),
    Shape(4, 32, 8, 128, 8192, 32, 256),
    Shape(1, 32, 8, 128, 65536, 32, 512),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Inputs:
    """One layer's cache and query."""

    query: Tensor
    key: Tensor
    components: Tensor
    value: Tensor
    value_sum: Tensor
    length: Tensor

    def copy(self) -> Inputs:
        """On pages as large as the plugin's cache asks for, dense and sparse alike."""
        copies = [torch.empty_like(x) for x in vars(self).values()]
        for new, old in zip(copies, vars(self).values(), strict=True):
            prefer_huge_pages(new)
            new.copy_(old)
        return Inputs(*copies)


@dataclass(frozen=True)
class Row:
    """Milliseconds are medians, `spread` their (10 %, 90 %) quantiles; GB/s as the module says."""

    shape: str
    dtype: str
    correct: bool
    dense_way: str
    dense_ms: float
    dense_spread: tuple[float, float]
    dense_gbs: float
    sparq_ms: float
    sparq_spread: tuple[float, float]
    sparq_gbs: float
    streaming_gbs: float
    speedup: float | None
    bytes_ratio: float
    copies: int

    @property
    def streaming_share(self) -> float:
        return self.sparq_gbs / self.streaming_gbs


def make_inputs(shape: Shape, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    rows = (shape.batch, shape.num_kv_heads, shape.cached, shape.head_dim)
    query = 2 * torch.randn(shape.batch, shape.num_heads, 1, shape.head_dim, generator=generator)
    key, value = (torch.randn(rows, generator=generator, dtype=torch.float32).to(dtype) for _ in range(2))
    components = sparq_kernels.allocate_components(*rows, dtype, "cpu")
    sparq_kernels.write_components(components, key, 0)
    length = torch.full((shape.batch,), shape.cached)
    return Inputs(query.to(dtype), key, components, value, value.float().sum(2), length)


def sparq(shape: Shape, x: Inputs) -> Tensor:
    out = sparq_kernels.decode(
        x.query, x.key, x.components, x.value, x.value_sum, length=x.length, r=shape.r, k=shape.k
    )
    return out.output


def packed(shape: Shape, x: Inputs) -> Tensor:
    query = x.query.reshape(shape.batch, shape.num_kv_heads, -1, shape.head_dim)
    return scaled_dot_product_attention(query, x.key, x.value)


def enable_gqa(shape: Shape, x: Inputs) -> Tensor:
    return scaled_dot_product_attention(x.query, x.key, x.value, enable_gqa=True)


def matmul(shape: Shape, x: Inputs) -> Tensor:
    query = x.query.reshape(shape.batch, shape.num_kv_heads, -1, shape.head_dim) * shape.head_dim**-0.5
    return torch.softmax(query @ x.key.transpose(-1, -2), dim=-1) @ x.value


DENSE = {"SDPA packed": packed, "SDPA enable_gqa": enable_gqa, "matmul": matmul}


def is_correct(shape: Shape, x: Inputs) -> bool:
    """Output and alpha equal the reference's up to the dtype's rounding, and so do nearly all positions: scores within
    rounding of the k-th may change places."""
    ours = sparq_kernels.decode(
        x.query,
        x.key,
        x.components,
        x.value,
        x.value_sum,
        length=x.length,
        r=shape.r,
        k=shape.k,
        return_positions=True,
    )
    output, alpha, positions = decode_reference(
        x.query,
        x.key,
        x.components,
        x.value,
        x.value_sum,
        x.length,
        None,
        None,
        r=shape.r,
        k=shape.k,
        k_divisor=None,
        local=None,
        scale=shape.head_dim**-0.5,
        softcap=None,
        mean_value=True,
        return_positions=True,
    )
    assert ours.positions is not None
    shared = [
        len(set(a.tolist()) & set(b.tolist())) / shape.k
        for a, b in zip(ours.positions.flatten(0, 2), positions.flatten(0, 2), strict=True)
    ]
    error = (ours.output.float() - output.float()).norm() / output.float().norm()
    limit = 1e-3 if x.query.dtype == torch.float32 else 1e-2
    return bool(error < limit and (ours.alpha - alpha).abs().max() < 1e-4 and min(shared) > 0.98)


def milliseconds(call: Callable[[Shape, Inputs], Tensor], shape: Shape, x: Inputs) -> float:
    started = time.perf_counter()
    call(shape, x)
    return (time.perf_counter() - started) * 1e3


def quantiles(times: list[float]) -> tuple[float, tuple[float, float]]:
    tenths = statistics.quantiles(times, n=10)
    return statistics.median(times), (tenths[0], tenths[-1])


def measure(shape: Shape, dtype_name: str, rounds: int, copies: int | None) -> Row:
    first = make_inputs(shape, DTYPES[dtype_name])
    correct = is_correct(shape, first)
    size = first.key.element_size()
    if copies is None:
        copies = max(3, min(16, -(-CACHE_BYTES // (shape.dense_elements * size))))
    caches = [first.copy() for _ in range(copies)]
    streaming = streaming_read()

    trials = {name: min(milliseconds(call, shape, x) for x in caches[:3]) for name, call in DENSE.items()}
    dense_way = min(trials, key=lambda name: trials[name])
    dense_times: list[float] = []
    sparq_times: list[float] = []
    if copies == 1:
        for call, times in ((DENSE[dense_way], dense_times), (sparq, sparq_times)):
            times += [milliseconds(call, shape, caches[0]) for _ in range(rounds + 2)][2:]
    else:
        turns = itertools.cycle(range(copies))
        for _ in range(rounds):
            dense_times.append(milliseconds(DENSE[dense_way], shape, caches[next(turns)]))
            sparq_times.append(milliseconds(sparq, shape, caches[next(turns)]))
            if copies % 2 == 0 and len(dense_times) % (copies // 2) == 0:
                next(turns)  # an even number of copies would give each opponent its own half
    streaming = max(streaming, streaming_read())

    dense_ms, dense_spread = quantiles(dense_times)
    sparq_ms, sparq_spread = quantiles(sparq_times)
    return Row(
        shape=str(shape),
        dtype=dtype_name,
        correct=correct,
        dense_way=dense_way,
        dense_ms=dense_ms,
        dense_spread=dense_spread,
        dense_gbs=shape.dense_elements * size / dense_ms / 1e6,
        sparq_ms=sparq_ms,
        sparq_spread=sparq_spread,
        sparq_gbs=shape.sparse_elements * size / sparq_ms / 1e6,
        streaming_gbs=streaming,
        speedup=dense_ms / sparq_ms if correct else None,
        bytes_ratio=shape.dense_elements / shape.sparse_elements,
        copies=copies,
    )


def fixed_cost(calls: int = 2000) -> float:
    """Microseconds of a call that has next to nothing to compute."""
    shape = Shape(1, 1, 1, 16, 2, 4, 1)
    x = make_inputs(shape, torch.float32)
    times = sorted(milliseconds(sparq, shape, x) for _ in range(calls))
    return times[calls // 2] * 1e3


def table_of(rows: list[Row]) -> Table:
    table = Table(title="Attention of one new token: dense against SparQ")
    for name in ("shape", "dtype", "dense ms", "GB/s", "SparQ ms", "GB/s", "of streaming", "speed-up", "bytes say"):
        table.add_column(name, justify="left" if name in ("shape", "dtype") else "right")
    for row in rows:
        table.add_row(
            row.shape,
            row.dtype,
            f"{row.dense_ms:.2f} ({row.dense_spread[0]:.2f}–{row.dense_spread[1]:.2f})",
            f"{row.dense_gbs:.1f}",
            f"{row.sparq_ms:.3f} ({row.sparq_spread[0]:.3f}–{row.sparq_spread[1]:.3f})",
            f"{row.sparq_gbs:.1f}",
            f"{row.streaming_share:.0%} of {row.streaming_gbs:.1f}",
            "WRONG" if row.speedup is None else f"{row.speedup:.1f}x",
            f"{row.bytes_ratio:.1f}x",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=range(len(SHAPES)), help="which shapes, from 0")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=30, help="turns of each opponent")
    parser.add_argument(
        "--copies", type=int, help="caches to walk over (default: more than any processor's cache holds)"
    )
    parser.add_argument("--json", type=Path, help="write rows and machine there")
    args = parser.parse_args()

    console = Console(width=130)
    console.print(f"operator: {sparq_kernels.backend('cpu')}, {torch.get_num_threads()} threads")
    cost = fixed_cost()
    rows = []
    for index, dtype_name in itertools.product(args.rows, args.dtypes):
        with console.status(f"{SHAPES[index]} {dtype_name}"):
            rows.append(measure(SHAPES[index], dtype_name, args.rounds, args.copies))
    console.print(table_of(rows))
    console.print(f"fixed cost of a call: {cost:.0f} µs")
    if args.json:
        result = {"machine": machine(), "fixed_cost_us": cost, "rows": [asdict(row) for row in rows]}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""One decode step of attention on the CPU: the SparQ operator against the fastest dense paths there are for its cache.

    python benchmarks/attention.py --json benchmarks/results/attention.json
    python benchmarks/attention.py --quick
    python benchmarks/attention.py --shapes llama-3.2-1b pythia-1.4b --contexts 4096 65536 --batches 1 4 --ratio 4

Each shape first has its output compared with the plain PyTorch reference, and each dense way's with attention in
float32; where that fails, no ratio is printed, and the program's exit status is 1. Dense and sparse walk over several
copies of the cache, never the same one after the other, and enough of them that none is still in the processor's cache
when its turn comes again: in a model every layer has its own.

All opponents take turns (A B C A B C), and there are two dense ones. *PyTorch* is the fastest, measured here, of
scaled_dot_product_attention with the group packed into the query axis, with enable_gqa, and of two matrix products
around a softmax. *C++ dense* is a kernel written for this benchmark with the same care as SparQ's (csrc/dense.cpp):
what sparsity gains over it is gained by reading less, not by better code. GB/s counts what the algorithm has to read
(dense 2 S d, SparQ S r + 2 k d elements per KV head) over the whole call's time, Python included, beside what a plain
sum over memory reads in the same run. Without --shapes, --contexts, --batches, --r, --k and --ratio the README's cases
are measured (r = 32), and a sweep over contexts at the plugin's own ratio of 8: about ten minutes on 2 cores. Cases too
large for the memory available are left out, and named. `--copies 1` reuses one cache instead, and each opponent runs
alone, as kernels are often measured: on processors with a large cache the bytes that SparQ reads then come from there,
and its ratio looks better than a model will ever see.

On a GPU it is `gpu.py --stages attention`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator

import sparq_kernels
import torch
from dense import DENSE_ERROR, TORCH_WAYS, dense_attention, exact
from harness import SPARQ, Measured, Row, available_memory, document, parser_of, progress_of, streaming_read, write_json
from sparq_kernels.cpu import CompilerError
from tables import KERNEL, REFERENCE, attention_grid, show
from torch import Tensor
from workload import DTYPES, Case, Inputs, Shape, disagreement, make_inputs, reference, relative_error, rounding, sparq

Call = Callable[[Shape, Inputs], Tensor]
CACHE_BYTES = 1_600_000_000  # of all dense copies together: several times any processor's cache
FEWEST_COPIES = 3
MEMORY_SHARE = 0.8  # of what is available
TRIALS = 3  # turns of every way of PyTorch, before those that are clearly not its fastest are left out
CLEARLY_SLOWER = 1.3  # times the fastest
SECONDS = 8  # of one case's rounds, about, on a quiet machine ...
FEWEST_ROUNDS = 5  # ... unless these take longer
REFERENCE_TURNS = 2  # it is there for orientation only
SHAPES = {  # query heads, KV heads, head_dim
    "llama-3.2-1b": (32, 8, 64),
    "llama-3-8b": (32, 8, 128),
    "llama-2-7b": (32, 32, 128),
    "pythia-1.4b": (16, 16, 128),
}
RATIO = 8.0  # the plugin's own default


def sized(
    name: str, batch: int, context: int, ratio: float = RATIO, r: int | None = None, k: int | None = None
) -> Case:
    """r and k by the plugin's rule where they are not given."""
    heads, kv_heads, head_dim = SHAPES[name]
    r = r or min(head_dim, max(8, round(head_dim / ratio)))
    k = k or max(128, round(context / (2 * ratio)))
    return Case(name, Shape(batch, heads, kv_heads, head_dim, context, r, min(k, context)))


# The paper's r for Llama, at what an eighth of the bytes allows.
README = (
    sized("llama-3-8b", 1, 16384, r=32, k=256),
    sized("llama-2-7b", 1, 4096, r=32, k=128),
    sized("llama-3-8b", 4, 8192, r=32, k=256),
    sized("llama-3-8b", 1, 65536, r=32, k=512),
)
SWEEP = (
    *(sized("llama-3-8b", 1, context) for context in (1024, 4096, 16384, 65536, 131072)),
    *(sized("llama-3.2-1b", 1, context) for context in (1024, 4096, 16384, 65536, 131072, 1048576)),
    *(sized("llama-2-7b", 1, context) for context in (1024, 4096, 16384)),
    *(sized("pythia-1.4b", batch, 2048) for batch in (1, 8)),
)
QUICK = (sized("llama-3-8b", 1, 4096), README[0])


def chosen(args: argparse.Namespace) -> list[Case]:
    """The product of what the arguments name; without any, the README's cases and a sweep over contexts."""
    if not any((args.shapes, args.contexts, args.batches, args.r, args.k, args.ratio)):
        return list(QUICK if args.quick else README + SWEEP)
    grid = itertools.product(args.shapes or ["llama-3-8b"], args.batches or [1], args.contexts or [4096, 16384, 65536])
    return [sized(*place, args.ratio or RATIO, args.r, args.k) for place in grid]


def copies_that_fit(shape: Shape, itemsize: int, turns: int, memory: int | None, wanted: int | None = None) -> int:
    """Caches to walk over: `wanted`, or so many that together they are larger than any processor's cache, but no more
    than there are turns.  0 when the memory available (None: unknown) has no room for enough of them.

    One is enough where it is by itself larger than any processor's cache.
    """
    dense = shape.dense_elements * itemsize
    fewest = wanted or min(max(FEWEST_COPIES, -(-CACHE_BYTES // dense)), max(turns, FEWEST_COPIES))
    if memory is None:
        return fewest
    work = shape.dense_elements * 4  # the dense ways and the checks widen to float32
    room = int(MEMORY_SHARE * memory - work) // (dense * 3 // 2)  # K, V and the components
    if wanted is None and dense >= CACHE_BYTES:
        return max(0, min(fewest, room))
    return fewest if room >= fewest else 0


def walk(copies: int) -> Iterator[int]:
    """Copies in turn, for ever.  Each walk begins one further, so that no opponent keeps a share of the copies for
    itself; two copies simply alternate."""
    for turn in itertools.count():
        yield (turn + (turn // copies if copies > 2 else 0)) % copies


def kernel(shape: Shape, x: Inputs) -> Tensor:
    return dense_attention(x.query, x.key, x.value, x.length)


def timed(call: Call, shape: Shape, x: Inputs) -> float:
    started = time.perf_counter()
    call(shape, x)
    return time.perf_counter() - started


def opponents_of(row: Row, shape: Shape, x: Inputs) -> dict[str, Call]:
    """Whoever runs, PyTorch's ways first and SparQ last; what is wrong with an output is noted in the row."""
    expected = exact(shape, x)
    opponents: dict[str, Call] = {}
    for name, call in {**TORCH_WAYS, KERNEL: kernel}.items():
        way = row.ways[name] = Measured(facts={"bytes": shape.dense_elements * x.key.element_size()})
        try:
            error = relative_error(call(shape, x), expected)
        except (RuntimeError, CompilerError, MemoryError) as problem:
            way.missing = str(problem).splitlines()[0]
            continue
        if not error < (rounding(x.query.dtype) if name == KERNEL else DENSE_ERROR):
            way.wrong = f"output differs from attention in float32 by {error:.1e}"
        if name == KERNEL or not way.wrong:
            opponents[name] = call
    for name in (SPARQ, REFERENCE):
        row.ways[name] = Measured(facts={"bytes": shape.sparse_elements * x.key.element_size()})
    row.ways[SPARQ].wrong = disagreement(shape, x)
    return {**opponents, SPARQ: sparq}


@torch.no_grad()
def measure(case: Case, dtype_name: str, rounds: int, copies: int, alone: bool = False) -> Row:
    """alone: all turns of one opponent on one cache, then those of the next, each from its third turn on."""
    shape = case.shape
    row = Row(case.described(dtype_name))
    first = make_inputs(shape, DTYPES[dtype_name])
    opponents = opponents_of(row, shape, first)
    caches = [first, *(first.copy() for _ in range(copies - 1))]
    some = list(itertools.islice(itertools.cycle(caches), TRIALS))
    streaming = streaming_read()

    tried = {name: min(timed(opponents[name], shape, x) for x in some) for name in TORCH_WAYS if name in opponents}
    for name, seconds in tried.items():
        if seconds > CLEARLY_SLOWER * min(tried.values()):
            del opponents[name]
    rounds = min(
        rounds, max(FEWEST_ROUNDS, int(SECONDS / sum(timed(call, shape, first) for call in opponents.values())))
    )
    if alone:
        for name, call in opponents.items():
            row.ways[name].seconds = [timed(call, shape, first) for _ in range(rounds + 2)][2:]
    else:
        turn = walk(len(caches))
        for _ in range(rounds):
            for name, call in opponents.items():
                row.ways[name].seconds.append(timed(call, shape, caches[next(turn)]))
    row.ways[REFERENCE].seconds = [timed(reference, shape, x) for x in some[:REFERENCE_TURNS]]
    bytes_ratio = shape.dense_elements / shape.sparse_elements
    streaming = max(streaming, streaming_read())
    row.facts = dict(copies=copies, streaming_gbs=streaming, bytes_ratio=bytes_ratio, tried=tried)
    return row


def fixed_cost(call: Call, calls: int = 2000) -> float:
    """Seconds of a call that has next to nothing to compute."""
    shape = Shape(1, 1, 1, 16, 2, 4, 1)
    x = make_inputs(shape, torch.float32)
    return sorted(timed(call, shape, x) for _ in range(calls))[calls // 2]


def fixed_costs() -> dict[str, float]:
    costs = {SPARQ: fixed_cost(sparq)}
    with contextlib.suppress(CompilerError):  # every row says so
        costs[KERNEL] = fixed_cost(kernel)
    return costs


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="heads of which models (default: llama-3-8b)")
    parser.add_argument("--contexts", type=int, nargs="+", help="cached positions (default: 4096 16384 65536)")
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument(
        "--ratio", type=float, help="r = head_dim / ratio, k = cached / (2 ratio), by the plugin's rule"
    )
    parser.add_argument("--r", type=int, help="components of the query, instead of --ratio's")
    parser.add_argument("--k", type=int, help="positions attended in full, instead of --ratio's")
    parser.add_argument("--rounds", type=int, help="turns of each opponent, fewer where they take long (default: 30)")
    parser.add_argument("--copies", type=int, help="caches to walk over (default: more than a processor's cache holds)")
    parser.add_argument("--quick", action="store_true", help="two cases and few rounds: under a minute")
    args = parser.parse_args(arguments)
    if args.rounds is None:
        args.rounds = 8 if args.quick else 30
    for name in ("rounds", "copies", "contexts", "batches", "ratio", "r", "k"):
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.r is not None and args.r > (smallest := min(SHAPES[name][2] for name in args.shapes or ["llama-3-8b"])):
        parser.error(f"--r must be at most {smallest}, the smallest head_dim of these shapes")
    return args


def main() -> None:
    args = parse()
    print(f"operator: {sparq_kernels.backend('cpu')}, {torch.get_num_threads()} threads")
    costs = fixed_costs()
    rows: list[Row] = []
    left_out: list[str] = []
    work = list(itertools.product(chosen(args), args.dtypes))
    turns = args.rounds * (len(TORCH_WAYS) + 2)
    with progress_of(len(work)) as tick:
        for case, dtype_name in work:
            tick(f"{case} {dtype_name}")
            itemsize = DTYPES[dtype_name].itemsize
            copies = copies_that_fit(case.shape, itemsize, turns, available_memory(), args.copies)
            if copies:
                rows.append(measure(case, dtype_name, args.rounds, copies, alone=args.copies == 1))
            else:
                left_out.append(f"{case} {dtype_name}")
            result = document(args, rows, operator=sparq_kernels.backend("cpu"), fixed_cost=costs, left_out=left_out)
            if args.json:  # after every row: an interrupted run still has its rows
                write_json(args.json, result)

    show(attention_grid(result, result["rows"]))
    for row in rows:
        for name, way in row.ways.items():
            if said := way.wrong or way.missing:
                print(f"{row.case['name']} {row.case['shape']} {row.case['dtype']}: {name}: {said}")
    for case_and_dtype in left_out:
        print(f"left out, too large for this machine's memory: {case_and_dtype}")
    streaming = max((row.facts["streaming_gbs"] for row in rows), default=0.0)
    print(f"a plain sum over memory reads {streaming:.1f} GB/s")
    print("fixed cost of a call: " + ", ".join(f"{name} {1e6 * cost:.0f} µs" for name, cost in costs.items()))
    sys.exit(any(row.ways[name].wrong for row in rows for name in (SPARQ, KERNEL)))


if __name__ == "__main__":
    main()

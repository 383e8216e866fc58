"""One decode step of attention on the CPU: the SparQ operator against the fastest dense paths there are for its cache.

    python benchmarks/attention.py --json benchmarks/results/attention.json
    python benchmarks/attention.py --shapes llama-3.2-1b pythia-1.4b --contexts 4096 65536 --batches 1 4 --ratio 4

Every output is checked first; where SparQ's or the C++ kernel's is wrong, there is no ratio, and the exit status is 1.
The opponents take turns (A B C A B C) and walk over several copies of the cache, enough of them that none is still in
the processor's cache when its turn comes again: in a model every layer has its own. `--copies 1` reuses one cache
instead, and each opponent runs alone, as kernels are often measured: SparQ's ratio then looks better than a model will
ever see.

*PyTorch* is the fastest, measured here, of its three ways; *C++ dense* a kernel written with the same care as SparQ's.
GB/s counts what the algorithm has to read (dense 2 S d, SparQ S r + 2 k d elements per KV head; of a four-bit index
half a byte an element) over the whole call's time, Python included. Without --shapes, --contexts, --batches, --r, --k
and --ratio the README's cases are measured (r = 32, either index), and a sweep over contexts at the plugin's own ratio
of 8: about twelve minutes on 2 cores. Cases too large for the memory available are left out, and named. On a GPU it is
`gpu.py --stages attention`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import timeit
from collections.abc import Callable, Iterator

import sparq_kernels
import torch
from dense import DENSE_ERROR, TORCH_WAYS, dense_attention, exact
from harness import SPARQ, Measured, Row, available_memory, finish, parser_of, positive, progress
from models import SHAPES, Heads
from sparq_kernels.cpu import CompilerError
from tables import KERNEL, attention_grid, show
from torch import Tensor
from workload import DTYPES, Case, Inputs, Shape, disagreement, make_inputs, relative_error, rounding, sparq

from sparq.config import SparqConfig
from sparq.index import KINDS

Call = Callable[[Shape, Inputs], Tensor]
CACHE_BYTES = 1_600_000_000  # of all dense copies together: several times any processor's cache
FEWEST_COPIES = 3  # of a cache smaller than that
MEMORY_SHARE = 0.8  # of what is available
TRIALS = 3  # turns of every way of PyTorch, before those that are clearly not its fastest are left out
CLEARLY_SLOWER = 1.3  # times the fastest
SECONDS = 8  # of one case's rounds, about, on a quiet machine ...
FEWEST_ROUNDS = 5  # ... unless these take longer
RATIO = 8  # the plugin's own default


def sized(
    name: str,
    batch: int,
    context: int,
    ratio: int = RATIO,
    r: int | None = None,
    k: int | None = None,
    index: str = "int4",
) -> Case:
    """r and k by the plugin's rule where they are not given; without a mass, which random keys say nothing about."""
    heads = Heads.of(SHAPES[name]())
    config = SparqConfig(ratio=ratio, r=r, k=k, index=index, mass=1.0)
    r, k = config.components(heads.head_dim), config.positions(context)
    return Case(name, Shape(batch, heads.query, heads.kv, heads.head_dim, context, r, k, index))


# The paper's r for Llama, by either index.
PLACES = (("llama-3-8b", 1, 16384, 256), ("llama-2-7b", 1, 4096, 128), ("llama-3-8b", 4, 8192, 256))
PLACES += (("llama-3-8b", 1, 65536, 1024),)
README = tuple(
    sized(name, batch, context, r=32, k=k, index=index)
    for index in ("int4", "full")
    for name, batch, context, k in PLACES
)
SWEEP = (
    *(sized("llama-3-8b", 1, context) for context in (1024, 4096, 16384, 65536, 131072)),
    *(sized("llama-3.2-1b", 1, context) for context in (1024, 4096, 16384, 65536, 131072, 1048576)),
    *(sized("llama-2-7b", 1, context) for context in (1024, 4096, 16384)),
    *(sized("pythia-1.4b", batch, 2048) for batch in (1, 8)),
)


def chosen(args: argparse.Namespace) -> list[Case]:
    """The product of what the arguments name; without any, the README's cases and a sweep over contexts."""
    if not any((args.shapes, args.contexts, args.batches, args.r, args.k, args.ratio)):
        return list(README + SWEEP)
    grid = itertools.product(args.shapes or ["llama-3-8b"], args.batches or [1], args.contexts or [4096, 16384, 65536])
    return [sized(*place, args.ratio or RATIO, args.r, args.k, args.index) for place in grid]


def copies_that_fit(shape: Shape, itemsize: int, memory: int | None, wanted: int | None = None) -> int:
    """Caches to walk over: `wanted`, or so many that together they are larger than any processor's cache; one is enough
    where it is so by itself. 0 when the memory available (None: unknown) has no room for them."""
    dense = shape.dense_elements * itemsize
    fewest = 1 if dense >= CACHE_BYTES else FEWEST_COPIES
    copies = wanted or max(fewest, -(-CACHE_BYTES // dense))
    needed = copies * dense * 3 // 2 + shape.dense_elements * 4  # K, V and components; what the checks widen to float32
    return copies if memory is None or needed <= MEMORY_SHARE * memory else 0


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


def streaming_read() -> float:
    """GB/s at which PyTorch sums a large contiguous tensor with all its threads: the best of several passes."""
    buffer = torch.ones(128 << 20)
    return buffer.nbytes / min(timeit.repeat(buffer.sum, number=1, repeat=8)) / 1e9


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
    row.ways[SPARQ] = Measured(facts={"bytes": shape.sparse_bytes(x.key.element_size())})
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
    streaming = streaming_read()

    some = list(itertools.islice(itertools.cycle(caches), TRIALS))
    tried = {name: min(timed(opponents[name], shape, x) for x in some) for name in TORCH_WAYS if name in opponents}
    for name, seconds in tried.items():
        if seconds > CLEARLY_SLOWER * min(tried.values()):
            del opponents[name]
    one_round = sum(timed(call, shape, first) for call in opponents.values())
    rounds = min(rounds, max(FEWEST_ROUNDS, int(SECONDS / one_round)))
    if alone:
        for name, call in opponents.items():
            row.ways[name].seconds = [timed(call, shape, first) for _ in range(rounds + 2)][2:]
    else:
        turn = walk(copies)
        for _ in range(rounds):
            for name, call in opponents.items():
                row.ways[name].seconds.append(timed(call, shape, caches[next(turn)]))
    itemsize = first.key.element_size()
    bytes_ratio = shape.dense_elements * itemsize / shape.sparse_bytes(itemsize)
    row.facts = dict(
        copies=copies, streaming_gbs=max(streaming, streaming_read()), bytes_ratio=bytes_ratio, tried=tried
    )
    return row


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="heads of which models (default: llama-3-8b)")
    parser.add_argument("--contexts", type=positive, nargs="+", help="cached positions (default: 4096 16384 65536)")
    parser.add_argument("--batches", type=positive, nargs="+", help="default: 1")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--ratio", type=positive, help="k = cached / (2 ratio), r accordingly: the plugin's rule")
    parser.add_argument("--index", choices=KINDS, default="int4", help="what positions are found by")
    parser.add_argument("--r", type=positive, help="components of the query, instead of --ratio's")
    parser.add_argument("--k", type=positive, help="positions attended in full, instead of --ratio's")
    parser.add_argument("--rounds", type=positive, default=30, help="turns of each, fewer where they take long")
    parser.add_argument("--copies", type=positive, help="caches (default: more than a processor's cache holds)")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    operator, left_out = sparq_kernels.backend("cpu"), []
    print(f"operator: {operator}, {torch.get_num_threads()} threads")
    rows: list[Row] = []
    for case, dtype_name in progress(list(itertools.product(chosen(args), args.dtypes))):
        copies = copies_that_fit(case.shape, DTYPES[dtype_name].itemsize, available_memory(), args.copies)
        if copies:
            rows.append(measure(case, dtype_name, args.rounds, copies, alone=args.copies == 1))
        else:
            left_out.append(f"{case} {dtype_name}")
        # After every row: an interrupted run still has its rows.
        result = finish(args, rows, operator=operator, left_out=left_out)
    show(attention_grid(result))
    for row in rows:
        for name, way in row.ways.items():
            if said := way.wrong or way.missing:
                print(f"{row.case['name']} {row.case['shape']} {row.case['dtype']}: {name}: {said}")
    for left in left_out:
        print(f"left out, too large for this machine's memory: {left}")
    streaming = max((row.facts["streaming_gbs"] for row in rows), default=0.0)
    print(f"a plain sum over memory reads {streaming:.1f} GB/s")
    sys.exit(any(row.ways[name].wrong for row in rows for name in (SPARQ, KERNEL)))


if __name__ == "__main__":
    main()

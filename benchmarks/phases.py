"""Where one decode step of attention on the CPU spends its time: what limits the speeds that attention.py measures.

    python benchmarks/phases.py

The README's cases by the four-bit index. *cold*: before every call another cache's turn comes, and 400 MB are read, as
the weights of a layer are in a model; *warm*: the same call again and again. Columns are microseconds: the whole call;
of it Python and PyTorch's dispatcher, everything outside the kernel; of the kernel each phase of one KV head, by the
average. Two threads work on different heads. The clock between phases costs a microsecond a head.
"""

from __future__ import annotations

import ctypes
import itertools
import statistics
from unittest import mock

import torch
from attention import PLACES, README, copies_that_fit, timed
from harness import available_memory, parser_of, positive
from sparq_kernels import cpu
from tables import Grid, show
from workload import DTYPES, Case, disagreement, make_inputs, sparq

PHASES = ("prepare", "score", "combine", "select", "attend", "merge")
COPIES = 4
THREADS = 2  # with more, eight heads are too few for whole ones to be shared out
WEIGHTS = 100 << 20  # floats


def instrumented() -> ctypes.CDLL:
    """The kernel, compiled so that it counts."""
    return cpu.load(cpu.build_library("instrumented CPU", cpu.SOURCE, cpu.FILES, ["-DSPARQ_PHASES"]))


def measure(case: Case, dtype_name: str, rounds: int, weights: torch.Tensor) -> list[list[float]]:
    """For cold and for warm calls, medians in microseconds: the call, Python, each phase of a head."""
    library, serving = instrumented(), cpu.kernel()
    assert serving is not None
    with mock.patch.object(cpu, "kernel", lambda: library):
        cpu.serve(library)
        try:
            return _measure(case, dtype_name, library, rounds, weights)
        finally:
            cpu.serve(serving)


@torch.no_grad()
def _measure(
    case: Case, dtype_name: str, library: ctypes.CDLL, rounds: int, weights: torch.Tensor
) -> list[list[float]]:
    shape, taken = case.shape, (ctypes.c_int64 * (len(PHASES) + 1))()
    first = make_inputs(shape, DTYPES[dtype_name])
    if wrong := disagreement(shape, first):
        raise SystemExit(f"{case} {dtype_name}: {wrong}")
    caches = [first, *(first.copy() for _ in range(COPIES - 1))]
    heads = shape.batch * shape.num_kv_heads
    found = []
    for is_cold in (True, False):
        turns = []
        for x in itertools.islice(itertools.cycle(caches if is_cold else caches[1:2]), rounds):
            if is_cold:
                weights.sum()
            library.sparq_take_phases(taken)
            seconds = timed(sparq, shape, x)
            library.sparq_take_phases(taken)
            *phases, kernel = (nanoseconds / 1e3 for nanoseconds in taken)
            turns.append([1e6 * seconds, 1e6 * seconds - kernel, *(phase / heads for phase in phases)])
        found.append([statistics.median(column) for column in zip(*turns, strict=True)])
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=positive, default=60)
    args = parser.parse_args()
    if cpu.kernel() is None:
        raise SystemExit("there is no CPU kernel here")
    torch.set_num_threads(THREADS)
    weights, rows = torch.ones(WEIGHTS), []
    for case, dtype_name in itertools.product(README[: len(PLACES)], ("float32", "bfloat16")):
        if not copies_that_fit(case.shape, DTYPES[dtype_name].itemsize, available_memory(), COPIES):
            print(f"left out, too large for this machine's memory: {case} {dtype_name}")
            continue
        for name, times in zip(("cold", "warm"), measure(case, dtype_name, args.rounds, weights), strict=True):
            rows.append((str(case), dtype_name, name, *(f"{time:.1f}" for time in times)))
    title = f"One decode step of attention, µs, {torch.get_num_threads()} threads"
    show(Grid(title, ("shape", "dtype", "", "call", "Python", *PHASES), rows, left=3))


if __name__ == "__main__":
    main()

"""One decode step of attention: the SparQ operator against the fastest dense path there is for the same cache.

    python benchmarks/attention.py --json benchmarks/results/attention.json
    python benchmarks/attention.py --device cuda --profile --json benchmarks/results/attention-gpu.json

Each shape first has its output compared with the plain PyTorch reference; where that fails, no ratio is printed, and
the program's exit status is 1. Dense and sparse walk over several copies of the cache, never the same one after the
other, and enough of them that none is still in the processor's cache when its turn comes again: in a model every layer
has its own.

On the CPU dense and sparse take turns. Dense is the fastest, measured here, of scaled_dot_product_attention with the
group packed into the query axis, with enable_gqa, and of two matrix products around a softmax. GB/s counts what the
algorithm has to read (dense 2 S d, SparQ S r + 2 k d elements per KV head) over the whole call's time, Python included,
beside what a plain sum over memory reads in the same run. `--copies 1` reuses one cache instead, and each opponent runs
alone, as kernels are often measured: on processors with a large cache the bytes that SparQ reads then come from there,
and its ratio looks better than a model will ever see.

On a GPU dense is the fastest, in the same mode, of SDPA with each backend forced, two matrix products, and
FlashAttention 2 and 3 and FlashInfer where installed, each only if its output is right. Modes: `graph`, CUDA graphs of
all calls replayed and timed with events, which is the claim; `eager`, the calls one after the other by the wall clock,
Python included. GB/s stands beside what a large copy moves in the same run. `--profile` adds the time of each of
SparQ's kernels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import attention_cpu
import attention_gpu
from workload import DTYPES


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments, with the device's own defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="ROCm is cuda too; default: cpu")
    parser.add_argument("--rows", type=int, nargs="+", help="which shapes, from 0 (default: all)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, help="default: float32 bfloat16 on the CPU, float16 bfloat16 on a GPU"
    )
    parser.add_argument("--rounds", type=int, default=30, help="turns of each opponent")
    parser.add_argument(
        "--copies", type=int, help="caches to walk over (default: more than any processor's cache holds)"
    )
    parser.add_argument("--profile", action="store_true", help="time each of SparQ's kernels too (--device cuda)")
    parser.add_argument("--json", type=Path, help="write rows and machine there")
    parser.add_argument("--markdown", type=Path, help="write the tables there as Markdown")
    args = parser.parse_args(arguments)
    gpu = args.device == "cuda"
    shapes = len(attention_gpu.CASES if gpu else attention_cpu.SHAPES)
    if args.rows is None:
        args.rows = list(range(shapes))
    if args.dtypes is None:
        args.dtypes = ["float16", "bfloat16"] if gpu else ["float32", "bfloat16"]
    if not all(0 <= row < shapes for row in args.rows):
        parser.error(f"--rows must be 0 to {shapes - 1} on this device")
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: the report gives quantiles")
    if args.copies is not None and args.copies < 1:
        parser.error("--copies must be at least 1")
    if args.profile and not gpu:
        parser.error("--profile needs --device cuda")
    return args


def main() -> None:
    args = parse()
    right = (attention_gpu if args.device == "cuda" else attention_cpu).run(args)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()

"""One decode step of attention: the SparQ operator against the fastest dense paths there are for the same cache.

    python benchmarks/attention.py --json benchmarks/results/attention.json --plot attention.png
    python benchmarks/attention.py --quick
    python benchmarks/attention.py --shapes llama-3.2-1b pythia-1.4b --contexts 4096 65536 --batches 1 4 --ratio 4
    python benchmarks/attention.py --device cuda --profile --json build/attention.json

Each shape first has its output compared with the plain PyTorch reference, and each dense way's with attention in
float32; where that fails, no ratio is printed, and the program's exit status is 1. Dense and sparse walk over several
copies of the cache, never the same one after the other, and enough of them that none is still in the processor's cache
when its turn comes again: in a model every layer has its own.

On the CPU all opponents take turns (A B C A B C), and there are two dense ones. *PyTorch* is the fastest, measured
here, of scaled_dot_product_attention with the group packed into the query axis, with enable_gqa, and of two matrix
products around a softmax. *C++ dense* is a kernel written for this benchmark with the same care as SparQ's
(csrc/dense.cpp): what sparsity gains over it is gained by reading less, not by better code. GB/s counts what the
algorithm has to read (dense 2 S d, SparQ S r + 2 k d elements per KV head) over the whole call's time, Python included,
beside what a plain sum over memory reads in the same run. A ratio is marked `unsure` where the noise is larger than the
claim. Without --shapes, --contexts, --batches, --r, --k and --ratio the README's cases are measured (r = 32), and a
sweep over contexts at the plugin's own ratio of 8: about ten minutes on 2 cores. Cases too large for the memory
available are left out, and named. `--copies 1` reuses one cache instead, and each opponent runs alone, as kernels are
often measured: on processors with a large cache the bytes that SparQ reads then come from there, and its ratio looks
better than a model will ever see.

On a GPU dense is the fastest, in the same mode, of SDPA with each backend forced, two matrix products, and
FlashAttention 2 and 3 and FlashInfer where installed, each only if its output is right. Modes: `graph`, CUDA graphs of
all calls replayed and timed with events, which is the claim; `eager`, the calls one after the other by the wall clock,
Python included. GB/s stands beside what a large copy moves in the same run. `--profile` adds the time of each of
SparQ's kernels.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import attention_cpu
import attention_gpu
from attention_cases import SHAPES
from workload import DTYPES

CPU_ONLY = ("shapes", "contexts", "batches", "ratio", "r", "k", "quick", "plot")
GPU_ONLY = ("rows", "profile")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments, with the device's own defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="ROCm is cuda too; default: cpu")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, help="default: float32 bfloat16 on the CPU, float16 bfloat16 on a GPU"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help="turns of each opponent, fewer on the CPU where they take long (default: 30; with --quick 8)",
    )
    parser.add_argument(
        "--copies", type=int, help="caches to walk over (default: more than any processor's cache holds)"
    )
    parser.add_argument("--json", type=Path, help="write rows, machine and settings there")
    parser.add_argument("--markdown", type=Path, help="write the tables there as Markdown")

    cpu = parser.add_argument_group("on the CPU", "what is measured is the product of these; default: see above")
    cpu.add_argument("--shapes", nargs="+", choices=SHAPES, help="heads of which models (default: llama-3-8b)")
    cpu.add_argument("--contexts", type=int, nargs="+", help="cached positions (default: 4096 16384 65536)")
    cpu.add_argument("--batches", type=int, nargs="+", help="default: 1")
    cpu.add_argument("--ratio", type=float, help="r = head_dim / ratio, k = cached / (2 ratio), by the plugin's rule")
    cpu.add_argument("--r", type=int, help="components of the query, instead of --ratio's")
    cpu.add_argument("--k", type=int, help="positions attended in full, instead of --ratio's")
    cpu.add_argument("--quick", action="store_true", help="two cases and few rounds: under a minute")
    cpu.add_argument("--plot", type=Path, help="draw time against context there, a PNG (needs matplotlib)")

    gpu = parser.add_argument_group("on a GPU")
    gpu.add_argument("--rows", type=int, nargs="+", help="which of its shapes, from 0 (default: all)")
    gpu.add_argument("--profile", action="store_true", help="time each of SparQ's kernels too")

    args = parser.parse_args(arguments)
    check(parser, args)
    if args.dtypes is None:
        args.dtypes = ["float16", "bfloat16"] if args.device == "cuda" else ["float32", "bfloat16"]
    if args.rounds is None:
        args.rounds = 8 if args.quick else 30
    if args.device == "cuda" and args.rows is None:
        args.rows = list(range(len(attention_gpu.CASES)))
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in GPU_ONLY if args.device == "cpu" else CPU_ONLY:
        if getattr(args, name) not in (None, False):
            parser.error(f"--{name} needs --device {'cuda' if args.device == 'cpu' else 'cpu'}")
    if args.rows and not all(0 <= row < len(attention_gpu.CASES) for row in args.rows):
        parser.error(f"--rows must be 0 to {len(attention_gpu.CASES) - 1} on this device")
    if args.rounds is not None and args.rounds < 2:
        parser.error("--rounds must be at least 2: the report gives quantiles")
    for name in ("copies", "contexts", "batches", "ratio", "r", "k"):
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.r is not None and args.r > (smallest := min(SHAPES[name][2] for name in args.shapes or ["llama-3-8b"])):
        parser.error(f"--r must be at most {smallest}, the smallest head_dim of these shapes")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")


def main() -> None:
    args = parse()
    right = (attention_gpu if args.device == "cuda" else attention_cpu).run(args)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()

"""Fuzzes the operators: `python tests/kernels/fuzz.py --cases 10000 [--sanitize]`.

Batches of cases run in processes of their own, so that one which kills its process is caught, named and can be made
again with `--recipe`. A wrong result, or an exception of a wrong kind, is shrunk and reported by hypothesis.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

MEMORY = 12 << 30  # bytes of address space: what asks for more is refused by the system, and no machine is exhausted
SECONDS = 900  # for one batch, sanitizers included
TARGETS = ("decode", "append", "append_slots")  # of fuzzing.RECIPES


def run_batch(command: list[str], note: Path, environment: dict[str, str] | None = None) -> str | None:
    """Run one batch; None, or what went wrong. The process leaves the recipe it is at in the file `note`."""
    note.write_text("")
    try:
        run = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        return f"{output}\nno end within {SECONDS} s; {_last(note)}"
    if run.returncode == 0:
        return None
    if run.returncode < 0:
        return f"{run.stdout}\nthe process died of {signal.Signals(-run.returncode).name}; {_last(note)}"
    return f"{run.stdout}\nexit status {run.returncode}; {_last(note)}"


def _last(note: Path) -> str:
    return f'the last recipe:\n  python tests/kernels/fuzz.py --recipe "{note.read_text()}"'


def batch_command(target: str, cases: int, seed: int, note: Path) -> list[str]:
    command = [sys.executable, str(Path(__file__)), "--batch", target, "--cases", str(cases), "--seed", str(seed)]
    return [*command, "--note", str(note)]


def batch(target: str, cases: int, seed: int, note: Path) -> None:
    """The cases of one process."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as seeded

    from tests.kernels.fuzzing import RECIPES

    @settings(
        max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
    )
    @seeded(seed)
    @given(RECIPES[target])
    def fuzz(recipe) -> None:  # type: ignore[no-untyped-def]
        note.write_text(repr(recipe))
        recipe.check()

    fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="of each operator")
    parser.add_argument("--per-process", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sanitize", action="store_true", help="with the sanitizers' build of the CPU kernel")
    parser.add_argument("--recipe", help="check this one, in this process")
    parser.add_argument("--batch", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--note", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.recipe or args.batch:
        import warnings

        import torch

        warnings.simplefilter(
            "ignore"
        )  # sparse tensors, non-writable memory: what is handed over is meant to be strange
        torch.set_num_threads(1)
        if "LD_PRELOAD" not in os.environ:  # AddressSanitizer reserves terabytes
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        if args.recipe:
            from tests.kernels import fuzzing

            eval(args.recipe, {**vars(fuzzing), "nan": float("nan"), "inf": float("inf")}).check()
        else:
            batch(args.batch, args.cases, args.seed, args.note)
        return 0

    failures = 0
    with tempfile.TemporaryDirectory(prefix="sparq-fuzz-") as directory:
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # calls are small, and many
        if args.sanitize:
            from tests.kernels.sanitize import instrumented

            environment |= instrumented(Path(directory))
        for target in TARGETS:
            started, done = time.perf_counter(), 0
            while done < args.cases:
                cases, seed = min(args.per_process, args.cases - done), args.seed + done
                note = Path(directory) / "recipe"
                failure = run_batch(batch_command(target, cases, seed, note), note, environment)
                if failure is not None:
                    failures += 1
                    print(f"{target}, seed {seed}: {failure}", file=sys.stderr, flush=True)
                done += cases
                print(f"{target}: {done:,} cases, {time.perf_counter() - started:.0f} s", flush=True)
    if failures:
        print(f"{failures} batches failed", file=sys.stderr)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())

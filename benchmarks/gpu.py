"""Prove, measure and compare on a GPU, in less than eight minutes: `make gpu`.

    python benchmarks/gpu.py                      # results to $OUT, or build/gpu
    python benchmarks/gpu.py --out results-here --stages kernels attention
    python benchmarks/gpu.py --device cpu         # a dry run: tiny sizes, nothing is measured

It needs a checkout and the libraries that SparQ needs, Triton and pytest, and neither network nor installation. Each
stage is a process of its own with a limit of its own; one that fails or is stopped leaves what it has written so far,
and the next one begins. `gpu.json` in the output folder holds everything, `gpu.md` all tables, `log.txt` what the
stages printed. Where a card was measured from a whole run, benchmarks/results/gpu-<card>.json and .md are written too.

The exit status is 1 if a test failed, an output was wrong, two replays differed, or a stage broke down.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gpu_report
from gpu_report import FAILED, MISSING, OK, OUT_OF_TIME, Outcome
from report import write_json
from rich.console import Console

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Stage:
    name: str
    about: str
    seconds: int
    program: str
    margin: int = 4  # seconds before the limit by which it should have ended by itself
    options: tuple[str, ...] = ()
    dry_options: tuple[str, ...] = ()  # on the CPU
    dry_environment: tuple[tuple[str, str], ...] = ()


DRY_PATIENCE = 4  # times a stage's limit: a busy machine takes long to import PyTorch, and nobody waits for a card
REFERENCE = (("SPARQ_BACKEND", "reference"),)  # a dry run measures nothing, and need not compile the CPU's kernel
STAGES = (
    Stage("device", "versions, card, copy bandwidth", 15, "gpu_device.py"),
    Stage("kernels", "compiled in parallel; registers", 50, "gpu_compile.py"),
    Stage("tests", "kernels and models against references", 110, "gpu_tests.py", 10),  # importing counts
    Stage("races", "replays compared bit for bit", 15, "gpu_races.py", dry_environment=REFERENCE),
    Stage("attention", "one decode step, all opponents", 120, "attention_gpu.py", dry_environment=REFERENCE),
    Stage("generation", "whole models, stock and SparQ", 160, "generation.py", 14, ("--gpu",), ("--tiny",)),
)


def run(stage: Stage, device: str, out: Path, environment: dict[str, str]) -> Outcome:
    """Start the stage, stop it at its limit, and read what it has written."""
    path, log = out / f"{stage.name}.json", out / "log.txt"
    path.unlink(missing_ok=True)
    if not (HERE / stage.program).exists():
        return Outcome(stage.name, MISSING, 0.0, stage.seconds, {}, f"there is no benchmarks/{stage.program}")
    command = [sys.executable, str(HERE / stage.program), *stage.options, "--device", device]
    command += ["--seconds", str(stage.seconds - stage.margin), "--json", str(path)]
    if device == "cpu":
        command += stage.dry_options
        environment = {**environment, **dict(stage.dry_environment)}
    started = time.monotonic()
    with log.open("ab") as printed:
        printed.write(f"\n== {stage.name}: {stage.about}\n".encode())
        printed.flush()
        begin = printed.tell()
        # A group of its own, that whatever the stage has started is stopped with it.
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, start_new_session=True
        )
        try:
            status = OK if process.wait(stage.seconds) == 0 else FAILED
        except subprocess.TimeoutExpired:
            status = OUT_OF_TIME
        finally:
            kill(process)
    seconds = time.monotonic() - started
    content = read(path)
    if content.get("timed_out"):  # it has stopped something itself
        status = OUT_OF_TIME
    path.unlink(missing_ok=True)  # gpu.json has it
    path.with_name(path.name + ".part").unlink(missing_ok=True)
    with log.open("rb") as printed:
        printed.seek(begin)
        lines = printed.read().decode(errors="replace").strip().splitlines()
    said = f"exit status {process.returncode}: {lines[-1] if lines else 'nothing printed'}" if status == FAILED else ""
    return Outcome(stage.name, status, seconds, stage.seconds, content, said)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Whatever the stage has started, in its group or, where the system tells, in one of its own; also after it has
    ended by itself."""
    for pid in descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver: no later stage gains by waiting
        process.wait(5)


def descendants(pid: int) -> list[int]:
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "pid (name) state parent ...", and a name may hold anything
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:  # grows while it is walked
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def environment_of(device: str, cache: str) -> dict[str, str]:
    """Of every stage. Nothing is installed: the checkout goes before whatever else has modules of these names."""
    environment = dict(os.environ)
    for name in ("TRITON_INTERPRET", "SPARQ_BACKEND"):
        environment.pop(name, None)
    folders = [ROOT, ROOT / "kernels", HERE, ROOT / "evals"]
    before = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, folders), *([before] if before else [])])
    environment.update(TRITON_CACHE_DIR=cache, HF_HUB_OFFLINE="1", PYTHONUNBUFFERED="1")
    if device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"  # threads of tiny calls only wait for each other
    return environment


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run of tiny sizes")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu"), help="default: $OUT"
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--commit", help="of this checkout, where git does not know it")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that its stage is stopped, too
    console = Console(width=None if sys.stdout.isatty() else gpu_report.WIDTH, highlight=False, markup=False)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "log.txt").write_text("")
    outcomes: list[Outcome] = []
    printed = 0
    with tempfile.TemporaryDirectory(prefix="sparq-gpu-", ignore_cleanup_errors=True) as cache:
        environment = environment_of(args.device, cache)
        for stage in STAGES:
            if stage.name not in args.stages:
                continue
            if args.device == "cpu":
                stage = replace(stage, seconds=DRY_PATIENCE * stage.seconds)
            outcomes.append(run(stage, args.device, args.out, environment))
            found = merged(outcomes, args.commit, cache)
            write_json(args.out / "gpu.json", found)
            console.print(gpu_report.stage_line(outcomes[-1]))
            printed += 1
            if outcomes[-1].content.get("no_device"):
                break  # nothing else could do anything
    markdown = gpu_report.markdown(found)
    (args.out / "gpu.md").write_text(markdown)
    if args.device == "cuda" and found.get("attention", {}).get("rows") and args.stages == [s.name for s in STAGES]:
        name = f"gpu-{gpu_report.slug(found['machine']['device'])}"
        try:
            write_json(RESULTS / f"{name}.json", found)
            (RESULTS / f"{name}.md").write_text(markdown)
        except OSError as error:
            console.print(f"benchmarks/results/{name}.json could not be written: {error.strerror}")
            printed += 1
    lines = gpu_report.report(found, gpu_report.LINES - printed)
    console.print("\n".join(lines), soft_wrap=True)
    sys.exit(1 if found["wrong"] else 0)


def merged(outcomes: list[Outcome], commit: str | None, cache: str) -> dict[str, Any]:
    """Everything so far, without this machine's paths."""
    machine: dict[str, Any] = {}
    for outcome in outcomes:
        machine = {**outcome.content.get("machine", {}), **machine}
    if commit:
        machine["sparq commit"] = commit
    result: dict[str, Any] = {
        "machine": machine,
        "stages": {one.name: {"status": one.status, "seconds": one.seconds, "limit": one.limit} for one in outcomes},
        "wrong": [line for outcome in outcomes for line in outcome.wrong()],
        **{outcome.name: outcome.content for outcome in outcomes},
    }
    text = json.dumps(result)
    paths = [str(ROOT), cache, str(Path.home())] + [sys.prefix] * (sys.prefix != sys.base_prefix)
    for path in sorted(paths, key=len, reverse=True):  # one may lie in another
        if len(path) > 1:
            text = text.replace(json.dumps(path + os.sep)[1:-1], "").replace(json.dumps(path)[1:-1], ".")
    return json.loads(text)


if __name__ == "__main__":
    main()

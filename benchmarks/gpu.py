"""Prove, measure and compare on a GPU, in less than eight minutes: `make gpu`.

    python benchmarks/gpu.py                      # results to $OUT, or build/gpu
    python benchmarks/gpu.py --out results-here --stages kernels attention
    python benchmarks/gpu.py --device cpu         # a dry run: tiny sizes, nothing is measured

It needs a checkout and the libraries that SparQ needs, Triton and pytest, and neither network nor installation. Each
stage (gpu_stages/) is a process of its own with a limit of its own; one that fails or is stopped leaves what it has
written so far, and the next one begins. `gpu.json` in the output folder holds everything, `gpu.md` all tables,
`log.txt` what the stages printed. Where a card was measured from a whole run, benchmarks/results/gpu-<card>.json and
.md are written too.

The exit status is 1 if a test failed, an output was wrong, two replays differed, or a stage broke down.
"""

from __future__ import annotations

from gpu_stages.stage import STAGES, Limits, Stage

# isort: split
import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_stages import report
from gpu_stages.report import FAILED, OK, OUT_OF_TIME, Outcome
from harness import write_json
from rich.console import Console

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
DRY_PATIENCE = 4  # times a stage's limit: a busy machine takes long to import PyTorch, and nobody waits for a card


def command(stage: Limits, device: str, path: Path) -> list[str]:
    """This program again, as one stage."""
    seconds = str(stage.seconds - stage.margin)
    program = [sys.executable, str(HERE / "gpu.py"), "--run-stage", stage.name]
    return [*program, "--device", device, "--seconds", seconds, "--json", str(path)]


def run(stage: Limits, device: str, out: Path, environment: dict[str, str]) -> Outcome:
    """Start the stage, stop it at its limit, and read what it has written."""
    path, log = out / f"{stage.name}.json", out / "log.txt"
    path.unlink(missing_ok=True)
    if device == "cpu" and stage.needs_no_kernel:  # a dry run measures nothing, and need not compile the CPU's kernel
        environment = {**environment, "SPARQ_BACKEND": "reference"}
    started = time.monotonic()
    with log.open("ab") as printed:
        printed.write(f"\n== {stage.name}: {stage.about}\n".encode())
        printed.flush()
        begin = printed.tell()
        # A group of its own, that whatever the stage has started is stopped with it.
        process = subprocess.Popen(
            command(stage, device, path),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            start_new_session=True,
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
        return json.loads(path.read_text())
    except FileNotFoundError:  # it had no time to write
        return {}


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


def keep(found: dict[str, Any], markdown: str, console: Console) -> None:
    """Under benchmarks/results; the checkout may be one that cannot be written."""
    name = f"gpu-{report.slug(found['machine']['device'])}"
    try:
        write_json(RESULTS / f"{name}.json", found)
        (RESULTS / f"{name}.md").write_text(markdown)
    except OSError as error:
        console.print(f"benchmarks/results/{name}.json could not be written: {error.strerror}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run of tiny sizes")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu"), help="default: $OUT"
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--commit", help="of this checkout, where git does not know it")
    # How it starts itself as a stage.
    for option, kind in (("--run-stage", str), ("--seconds", float), ("--json", Path)):
        parser.add_argument(option, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what it started is stopped, too
    if args.run_stage:
        importlib.import_module(f"gpu_stages.{args.run_stage}").main(Stage(args.device, args.seconds, args.json))
        return

    console = Console(width=None if sys.stdout.isatty() else report.WIDTH, highlight=False, markup=False)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "log.txt").write_text("")
    outcomes: list[Outcome] = []
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
            console.print(report.stage_line(outcomes[-1]))
            if outcomes[-1].content.get("no_device"):
                break  # nothing else could do anything
    markdown = report.markdown(found)
    (args.out / "gpu.md").write_text(markdown)
    if args.device == "cuda" and found.get("attention", {}).get("rows") and args.stages == names:
        keep(found, markdown, console)
    # One line less, for what could not be kept.
    console.print("\n".join(report.report(found, report.LINES - len(outcomes) - 1)), soft_wrap=True)
    sys.exit(1 if found["wrong"] else 0)


if __name__ == "__main__":
    main()

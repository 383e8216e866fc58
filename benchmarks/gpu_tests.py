"""The tests that need a GPU, in parallel processes and within a time limit, on a machine with nothing installed.

    python benchmarks/gpu_tests.py --device cuda --json tests.json --seconds 110
    python benchmarks/gpu_tests.py --device cpu --json tests.json           (a few tests: does the command work?)

They carry the marker `gpu`, and lie in the files named here: other test files import what such a machine lacks.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_tests_plugin
from model_options import positive
from report import write_json

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    "tests/sparq/test_gpu.py",
    "tests/sparq/test_compile.py",
    "tests/benchmarks/test_graphed.py",
    "tests/sparq/test_devices.py",
    "tests/sparq/test_generation.py",
    "tests/kernels/test_gpu.py",  # last: it has hundreds, with kernels of their own to compile
)
CPU_TESTS = ("tests/kernels/test_gpu.py", "tests/benchmarks/test_graphed.py")
CPU_NAMES = "(test_groups and cpu) or test_what_waits_is_noticed"
# A process holds half a gigabyte for its CUDA context and some for its tests, which are small, but for one that takes
# 40 GB and runs where there are 60.
PROCESSES = 8
SHOWN = 8  # failures that are printed; the file has all


def command(device: str, processes: int) -> list[str]:
    chosen = [*FILES, "-m", "gpu"] if device == "cuda" else [*CPU_TESTS, "-k", CPU_NAMES]
    # A file that imports what the machine lacks fails alone.
    options = ["-p", gpu_tests_plugin.__name__, "-p", "no:cacheprovider", "-q", "--tb=short"]
    options.append("--continue-on-collection-errors")
    if processes > 1:
        options += ["-n", str(processes), "--maxschedchunk", "1"]
    return [sys.executable, "-m", "pytest", *options, *chosen]


def environment(path: Path) -> dict[str, str]:
    """For pytest: the plugin can be imported, and processes side by side do not each take all cores to compile."""
    before = os.environ.get("PYTHONPATH")
    paths = [str(Path(__file__).parent), *([before] if before else [])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "2",
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
        gpu_tests_plugin.PATH: str(path),
    }


def run(device: str, path: Path, seconds: float, processes: int) -> dict[str, Any]:
    """Run the tests until they are done or the time is up; what is known then is returned, and in the file."""
    started = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # an older one would pass for this one's
    log = path.with_suffix(".log")
    with log.open("w") as output:
        pytest = subprocess.Popen(
            command(device, processes),
            cwd=ROOT,
            env=environment(path.resolve()),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = pytest.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            stop(pytest)
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else dict(passed=0, failed=[], skipped=[])
    if status is not None and (status not in (0, 1) or not path.exists()):  # neither all well nor tests that failed
        last = "\n".join(log.read_text().strip().splitlines()[-15:])
        known["failed"].append(dict(name="pytest", message=f"exit status {status}: {last}"))
    known |= dict(seconds=round(time.monotonic() - started, 2), timed_out=status is None)
    write_json(path, known)
    return known


def stop(pytest: subprocess.Popen) -> None:
    """With all its workers, which are in its session."""
    if pytest.poll() is None:
        os.killpg(pytest.pid, signal.SIGKILL)
        pytest.wait()


def lines(known: dict[str, Any], processes: int) -> list[str]:
    """What to print."""
    failed, skipped = known["failed"], known["skipped"]
    counts = f"{known['passed']} passed, {len(failed)} failed, {len(skipped)} skipped"
    end = " when the time was up" if known["timed_out"] else ""
    said = [f"GPU tests: {counts}{end}, {known['seconds']:.0f} s, {processes} processes"]
    for one in failed[:SHOWN]:
        said.append(f"FAILED {one['name']}: {(one['message'].splitlines() or [''])[0][:160]}")
    if len(failed) > SHOWN:
        said.append(f"and {len(failed) - SHOWN} more")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, required=True, help="rewritten after every test; pytest's words beside it")
    parser.add_argument("--seconds", type=positive, default=110)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and not leave pytest behind
    processes = min(PROCESSES, os.cpu_count() or 1) if args.device == "cuda" and find_spec("xdist") else 1
    known = run(args.device, args.json, args.seconds, processes)
    for line in lines(known, processes):
        print(line)
    sys.exit(bool(known["failed"] or known["timed_out"] or not known["passed"]))


if __name__ == "__main__":
    main()

"""Stage `tests`: the tests that need a GPU, in parallel processes, on a machine with nothing installed.

They carry the marker `gpu`, and lie in the files named here: other test files import what such a machine lacks. This
module is the stage and also the plugin of the pytest that it starts: what is known of the tests is in the stage's JSON
file after each of them. With pytest-xdist the process that hands out the tests hears of all of them; it alone writes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from harness import write_json

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "tests/sparq/test_gpu.py",
    "tests/sparq/test_compile.py",
    "tests/benchmarks/test_graph_step.py",
    "tests/sparq/test_devices.py",
    "tests/sparq/test_generation.py",
    "tests/kernels/test_gpu.py",  # last: it has hundreds, with kernels of their own to compile
)
CPU_TESTS = ("tests/kernels/test_gpu.py", "tests/benchmarks/test_graph_step.py")
CPU_NAMES = "(test_groups and cpu) or test_what_waits_is_noticed"
# A process holds half a gigabyte for its CUDA context and some for its tests, which are small, but for one that takes
# 40 GB and runs where there are 60.
PROCESSES = 12
PATH = "SPARQ_GPU_TESTS_JSON"  # environment variable of the plugin: where the file is
LONG = ("test_cuda_graphs",)  # Inductor compiles: each takes as long as many others
MESSAGE = 400  # characters of a failure that are kept


def command(device: str, processes: int) -> list[str]:
    chosen = [*FILES, "-m", "gpu"] if device == "cuda" else [*CPU_TESTS, "-k", CPU_NAMES]
    # A file that imports what the machine lacks fails alone.
    options = ["-p", "gpu_stages.tests", "-p", "no:cacheprovider", "-q", "--tb=short"]
    options.append("--continue-on-collection-errors")
    if processes > 1:
        options += ["-n", str(processes), "--maxschedchunk", "1"]
    return [sys.executable, "-m", "pytest", *options, *chosen]


def environment(path: Path) -> dict[str, str]:
    """For pytest: the plugin can be imported, and processes side by side do not each take all cores to compile."""
    before = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), *([before] if before else [])]),
        "OMP_NUM_THREADS": "2",
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
        PATH: str(path.resolve()),
    }


def run(device: str, path: Path, seconds: float, processes: int) -> dict[str, Any]:
    """Run the tests until they are done or the time is up; what is known then is returned, and in the file."""
    path.unlink(missing_ok=True)  # an older one would pass for this one's
    log = path.with_suffix(".log")
    with log.open("w") as output:
        tests = subprocess.Popen(
            command(device, processes),
            cwd=ROOT,
            env=environment(path),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = tests.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if tests.poll() is None:  # with all its workers, which are in its session
                os.killpg(tests.pid, signal.SIGKILL)
                tests.wait()
    known = json.loads(path.read_text()) if path.exists() else content(0, [], [])
    if status is not None and (status not in (0, 1) or not path.exists()):  # neither all well nor tests that failed
        last = "\n".join(log.read_text().strip().splitlines()[-15:])
        known = content(known["passed"], [*known["failed"], f"pytest: exit status {status}: {last}"], known["skipped"])
    known["timed_out"] = status is None
    write_json(path, known)
    return known


def content(passed: int, failed: list[str], skipped: list[str]) -> dict[str, Any]:
    """Of the JSON file. It counts as timed out until it is finished."""
    said = f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped"
    wrong = [f"failed: {line}" for line in failed]
    return dict(passed=passed, failed=failed, skipped=skipped, said=said, wrong=wrong, timed_out=True)


def main(stage: Any) -> None:
    processes = min(PROCESSES, os.cpu_count() or 1) if not stage.is_dry and find_spec("xdist") else 1
    known = run(stage.device, stage.path, stage.left(), processes)
    print(known["said"])
    sys.exit(bool(known["failed"] or known["timed_out"] or not known["passed"]))


class Record:
    """What has been heard of the tests so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.passed = 0
        self.failed: list[str] = []
        self.skipped: list[str] = []
        self.write()

    def write(self, finished: bool = False) -> None:
        write_json(self.path, content(self.passed, self.failed, self.skipped) | {"timed_out": not finished})

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            self.failed.append(f"{report.nodeid}: {_message(report)}")
        elif report.skipped:
            self.skipped.append(f"{report.nodeid}: {_reason(report)}")
        elif report.when == "call":
            self.passed += 1
        else:
            return
        self.write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self.pytest_runtest_logreport(report)

    def pytest_sessionfinish(self) -> None:
        self.write(finished=True)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and PATH in os.environ:
        config.pluginmanager.register(Record(Path(os.environ[PATH])))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that take long begin at once, no two of them on one worker: xdist hands out the first ones in pairs."""
    long = [item for item in items if getattr(item, "originalname", item.name) in LONG]
    others = iter([item for item in items if item not in long])

    def ordered() -> Iterator[pytest.Item]:
        for item in long:
            yield item
            yield from (other for other in [next(others, None)] if other is not None)
        yield from others

    items[:] = list(ordered())


def _message(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The error, without the way to it."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr) if crash is None else f"{Path(crash.path).name}:{crash.lineno}: {crash.message}"
    return text[-MESSAGE:] if crash is None else text[:MESSAGE]


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    place = report.longrepr
    return str(place[2] if isinstance(place, tuple) else place).removeprefix("Skipped: ")

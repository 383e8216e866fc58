"""The command that runs the GPU tests: what it selects, and that what is known of them survives whatever ends it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_stages import tests

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SAMPLE = """
import pytest

def test_right(): pass

def test_wrong(): assert 1 == 2, "not equal"

@pytest.mark.skipif(True, reason="not here")
def test_skipped(): pass

@pytest.fixture
def broken(): raise ValueError("no fixture")

def test_broken(broken): pass
"""


def pytest_on(path: Path, out: Path) -> int:
    command = [sys.executable, "-m", "pytest", "-p", "gpu_stages.tests", "-p", "no:cacheprovider", str(path)]
    environment = tests.environment(out)
    return subprocess.run(command, cwd=path.parent, env=environment, capture_output=True).returncode


def test_every_outcome_is_in_the_file(tmp_path: Path) -> None:
    sample, out = tmp_path / "test_sample.py", tmp_path / "tests.json"
    sample.write_text(SAMPLE)
    assert pytest_on(sample, out) == 1
    known = json.loads(out.read_text())
    assert known["passed"] == 1 and known["timed_out"] is False
    assert known["skipped"] == ["test_sample.py::test_skipped: not here"]
    wrong, broken = known["failed"]
    assert wrong.startswith("test_sample.py::test_wrong: ") and "not equal" in wrong
    assert broken.startswith("test_sample.py::test_broken: ") and "no fixture" in broken
    assert known["said"] == "1 passed, 2 failed, 1 skipped" and known["wrong"][0] == f"failed: {wrong}"


def test_a_file_that_cannot_be_imported_is_a_failure(tmp_path: Path) -> None:
    sample, out = tmp_path / "test_sample.py", tmp_path / "tests.json"
    sample.write_text("import a_library_that_is_not_there\n")
    pytest_on(sample, out)
    (failed,) = json.loads(out.read_text())["failed"]
    assert failed.startswith("test_sample.py: ") and "a_library_that_is_not_there" in failed


def test_what_was_known_when_it_was_killed_is_in_the_file(tmp_path: Path) -> None:
    sample, out = tmp_path / "test_sample.py", tmp_path / "tests.json"
    sample.write_text(
        "import os\ndef test_right(): pass\ndef test_dead(): os.kill(os.getpid(), 9)\ndef test_never(): pass\n"
    )
    assert pytest_on(sample, out) == -9
    known = json.loads(out.read_text())
    assert known["passed"] == 1 and known["timed_out"] is True


@pytest.mark.parametrize(
    ("body", "seconds", "expected"),
    [
        ("import time\ndef test_right(): pass\ndef test_slow(): time.sleep(600)\n", 6, (1, 0, True)),
        ("def test_right(): pass\n", 60, (1, 0, False)),
        ("import os\ndef test_dead(): os._exit(7)\n", 60, (0, 1, False)),
        ("", 60, (0, 1, False)),
    ],
    ids=["too slow", "right", "dies", "nothing there"],
)
def test_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, seconds: int, expected: tuple[int, int, bool]
) -> None:
    sample, out = tmp_path / "test_sample.py", tmp_path / "tests.json"
    sample.write_text(body)
    options = ["-p", "gpu_stages.tests", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(sample)]
    monkeypatch.setattr(tests, "command", lambda device, processes: command)
    monkeypatch.setattr(tests, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))  # as gpu.py sets it for its stages
    out.write_text('{"passed": 99}')  # of an earlier run
    known = tests.run("cpu", out, seconds, 1)
    assert json.loads(out.read_text()) == known
    assert (known["passed"], len(known["failed"]), known["timed_out"]) == expected
    if known["failed"]:
        assert known["failed"][0].startswith("pytest: exit status") and known["wrong"]


def test_every_file_with_a_test_for_the_gpu_is_run() -> None:
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"mark\.gpu\b(?! = )", path.read_text()) and path != Path(__file__).resolve()
    }
    assert marked == set(tests.FILES)


def test_long_tests_begin_apart_and_at_once() -> None:
    class Item:
        def __init__(self, name: str) -> None:
            self.name = name
            self.originalname = name.split("[")[0]

    names = ["a", "b", "test_cuda_graphs[llama]", "c", "test_cuda_graphs[gemma2]", "d"]
    items = [Item(name) for name in names]
    tests.pytest_collection_modifyitems(items)
    assert [item.name for item in items] == [names[2], "a", names[4], "b", "c", "d"]
    few = [Item(name) for name in names[2:5:2]]
    tests.pytest_collection_modifyitems(few)
    assert len(few) == 2


def test_the_files_exist_and_the_command_is_pytests() -> None:
    for device in ("cuda", "cpu"):
        command = tests.command(device, 8)
        files = [part for part in command if part.endswith(".py")]
        assert files and all((ROOT / file).is_file() for file in files)
        assert command[command.index("-n") + 1] == "8" and ("gpu" in command) is (device == "cuda")
    assert "-n" not in tests.command("cuda", 1)
    assert tests.environment(Path("out"))["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT / "benchmarks")

"""The examples answer right, as a stranger starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
KEYS = {"amber": "48213", "basalt": "70956", "cobalt": "31487"}  # of evals/demo.txt


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    if path.stem == "quickstart":
        assert lines[0].strip().startswith(KEYS["amber"])
        assert "mean α" in run.stdout and "8.0x" in run.stdout
    elif path.stem == "long_document":
        assert lines == [f"The pass key of {name} is {key}." for name, key in KEYS.items()]
    else:
        assert sum(KEYS["amber"] in line for line in lines) == 5  # dense, and at four ratios
        assert "1/8.0" in run.stdout


def test_all_examples_are_here() -> None:
    assert [path.stem for path in EXAMPLES] == ["compare_settings", "long_document", "quickstart"]

"""The benchmark of questions measures each way at each size of a batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_every_way_has_a_time(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    options = ["--layers=1", "--contexts=300", "--batches", "1", "3", "--tokens=3", "--rounds=2", "--min-length=0"]
    command = [sys.executable, str(ROOT / "benchmarks" / "questions.py"), *options, "--json", str(out)]
    run = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows] == [{"context": 300, "batch": 1}, {"context": 300, "batch": 3}]
    assert all(row["ways"][way]["time"]["median"] > 0 for row in rows for way in ("stock", "SparQ"))
    assert "seconds per answer" in run.stdout

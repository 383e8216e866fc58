"""The benchmark of prompt caches measures all that it names."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_every_part_has_a_time(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "prompt_cache.py"),
        "--contexts",
        "600",
        "--rounds",
        "2",
        "--read",
    ]
    run = subprocess.run([*command, "--json", str(out)], cwd=tmp_path, check=True, capture_output=True, text=True)
    (row,) = json.loads(out.read_text())["rows"]
    states = [f"{part}, {state}" for state in ("warm", "cold") for part in ("load", "second", "index read")]
    assert set(row["ways"]) == {"read", "save", "index made, warm", *states}
    assert all(way["time"]["median"] > 0 for way in row["ways"].values())
    assert row["bytes"] > 2 * 2 * 600 * 8 * 64 * 2 > row["index_bytes"]
    assert all(name in run.stdout for name in row["ways"])

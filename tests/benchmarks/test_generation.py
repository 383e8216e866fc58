"""The generation benchmark runs, and its rows hold together."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_generation_benchmark_writes_every_way(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "generation.py"), "--contexts", "300", "--dtypes", "bfloat16"]
    command += ["--rounds", "1", "--tokens", "3", "--json", str(out)]
    run = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "vs dynamic" in run.stdout
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert set(row["milliseconds"]) == {"layers alone", "stock dynamic", "stock static", "SparQ's cache", "SparQ"}
    assert all(value > 0 for value in row["milliseconds"].values())
    # 8 KV heads, K and V of 64 components in 2 bytes; the context grows by one at each of the 3 steps
    assert 300 * 8 * 2 * 64 * 2 < row["bytes_dense"] < 310 * 8 * 2 * 64 * 2
    assert result["machine"] and result["settings"]["rounds"] == 1

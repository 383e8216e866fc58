"""The memory benchmark counts what caches hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_bytes_of_every_cache(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--contexts", "2048", "3000", "--batch", "2"]
    run = subprocess.run([*command, "--json", str(out)], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "3,000" in run.stdout
    even, odd = (
        {name: way["bytes"] for name, way in row["ways"].items()} for row in json.loads(out.read_text())["rows"]
    )
    position = 16 * 2 * 8 * 64 * 2  # layers, batch rows, KV heads, head_dim, bytes of bfloat16
    summed = 2 * position  # of V, in float32

    def coded(positions: int) -> int:
        """A quarter of K, and two values for each group of 256."""
        return positions * position // 4 + positions // 256 * 2 * position

    assert even == {
        "stock dynamic": 2 * 2048 * position,
        "full, used": 3 * 2048 * position + summed,
        "full, prompt": 3 * 2048 * position + summed,
        "full, growing": 3 * 4096 * position + summed,
        "int4, used": 2 * 2048 * position + coded(2048) + summed,
        "int4, prompt": 2 * 2048 * position + coded(2048) + summed,
        "int4, growing": 2 * 4096 * position + coded(4096) + summed,
    }
    assert even["int4, used"] < 1.14 * even["stock dynamic"]
    assert odd["stock dynamic"] == 2 * 3000 * position
    assert odd["full, prompt"] == (2 * 3072 + 4096) * position + summed
    assert odd["int4, prompt"] == 2 * 3072 * position + coded(3072) + summed

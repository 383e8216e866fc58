"""Where sparse begins to pay."""

import json
import sys

import crossover
import pytest
from harness import SPARQ, Measured, Row
from models import Heads
from tables import OWN_CACHE, crossover_grid


@pytest.mark.parametrize(
    ("pairs", "expected"),
    (
        ([(1, 2), (3, 2), (5, 2)], "512"),
        ([(3, 2), (1, 2), (5, 2)], "1,024"),
        ([(3, 2), (3, 2), (5, 2)], "256"),
        ([(3, 2), (3, 2), (2, 2)], "–"),
    ),
)
def test_pays_from_where_sparse_stays_faster(pairs, expected):
    rows = []
    for context, (dense, sparse) in zip((256, 512, 1024), pairs, strict=True):
        ways = {OWN_CACHE: Measured([dense]), SPARQ: Measured([sparse])}
        rows.append(Row({"heads": "tiny", "dtype": "float32", "cached": context}, ways, {"dense_bytes": 1}).json())
    assert crossover_grid({"rows": rows, "layers": 1}).rows[0][-2] == expected


def test_crossover_from_end_to_end(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(crossover, "SHAPES", {"tiny": Heads(4, 2, 16)})
    out = tmp_path / "crossover.json"
    arguments = ["--contexts", "300", "--dtypes", "float32", "--rounds", "1", "--tokens", "2", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["crossover", *arguments])
    crossover.main()
    assert "pays from" in capsys.readouterr().out
    (row,) = json.loads(out.read_text())["rows"]
    assert row["case"]["heads"] == "tiny" and all(way["time"]["median"] > 0 for way in row["ways"].values())

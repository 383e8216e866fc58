"""Where sparse begins to pay."""

import json
import sys

import crossover
import pytest
from models import Heads


@pytest.mark.parametrize(
    ("pairs", "expected"),
    (
        ([(1, 2), (3, 2), (5, 2)], 512),
        ([(3, 2), (1, 2), (5, 2)], 1024),
        ([(3, 2), (3, 2), (5, 2)], 256),
        ([(3, 2), (3, 2), (2, 2)], None),
    ),
)
def test_pays_from_where_sparse_stays_faster(pairs, expected):
    assert crossover.pays_from(dict(zip([256, 512, 1024], pairs, strict=True))) == expected
    assert crossover.pays_from(dict(zip([1024, 512, 256], pairs[::-1], strict=True))) == expected


def test_crossover_from_end_to_end(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(crossover, "SHAPES", {"tiny": Heads(4, 2, 16)})
    out = tmp_path / "crossover.json"
    arguments = ["--contexts", "300", "--dtypes", "float32", "--rounds", "1", "--tokens", "2", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["crossover", *arguments])
    crossover.main()
    assert "pays from" in capsys.readouterr().out
    (row,) = json.loads(out.read_text())["rows"]
    assert row["case"]["heads"] == "tiny" and all(way["time"]["median"] > 0 for way in row["ways"].values())

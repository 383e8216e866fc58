"""The survey of ways to hold weights: every way that is installed is measured, and says how far off it is."""

import json
import sys

import linear_layers
import pytest

pytestmark = pytest.mark.slow


def test_every_way_is_measured_torchaos_too_or_said_to_be_missing(monkeypatch, capsys, tmp_path):
    for name in ("HIDDEN", "INTERMEDIATE"):
        monkeypatch.setattr(linear_layers, name, 128)
    monkeypatch.setattr(linear_layers, "KV", 32)
    monkeypatch.setattr(linear_layers, "PROMPT", 16)
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["linear_layers", "--layers", "1", "--rounds", "3", "--json", str(out)])
    linear_layers.main()
    assert "a prompt of 16" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [(row["case"]["batch"], row["case"]["tokens"]) for row in rows] == [(1, 1), (8, 1), (1, 16)]
    for row in rows:
        assert set(row["ways"]) == set(linear_layers.WAYS)
        for name, way in row["ways"].items():
            if "missing" not in way:
                assert way["time"]["count"] == 3 and way["error"] < (0.2 if "nf4" in name else 0.1), name
    ways = rows[0]["ways"]
    assert ways["float32"]["error"] == 0 and "time" in ways["torch dynamic int8, float32"]


def test_no_such_way(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["linear_layers", "--ways", "int3"])
    with pytest.raises(SystemExit):
        linear_layers.main()
    assert "--ways must begin one of float32, bfloat16" in capsys.readouterr().err

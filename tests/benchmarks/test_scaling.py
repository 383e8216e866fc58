"""Fitted slopes, on made-up and on measured times."""

import json
import math
import sys

import model_shapes
import pytest
import scaling
from line_fit import Line
from scaling import BATCH, CONTEXT, Point, describe_crossing, fit, slope_grid
from transformers import LlamaConfig


def test_a_line_is_found_with_its_error():
    exact = Line.through([1, 2, 5], [5, 7, 13])
    assert exact.slope == pytest.approx(2) and exact.at_zero == pytest.approx(3) and exact.slope_error < 1e-12
    assert exact.at(10) == pytest.approx(23)
    # by hand: residuals 1/6, -1/3, 1/6; their sum of squares 1/6 over one degree of freedom; x spread 2
    scattered = Line.through([0, 1, 2], [0, 0.5, 2])
    assert scattered.slope == pytest.approx(1) and scattered.at_zero == pytest.approx(-1 / 6)
    assert scattered.slope_error == pytest.approx(math.sqrt(1 / 6 / 2))
    assert math.isnan(Line.through([1, 2], [1, 2]).slope_error)
    with pytest.raises(ValueError, match="two different x"):
        Line.through([3, 3], [1, 2])


def test_lines_cross_and_compare():
    ours, theirs = Line(0.1, 10, 0.01), Line(0.4, 7, 0.02)
    assert ours.crosses(theirs) == pytest.approx(10) and ours.crosses(ours) is None
    ratio, error = ours.times_flatter(theirs)
    assert ratio == pytest.approx(4) and error == pytest.approx(4 * math.hypot(0.1, 0.05))


@pytest.mark.parametrize(
    ("ours", "axis", "expected"),
    (
        (Line(0.1, 10, 0), CONTEXT, "from 10,000"),
        (Line(0.5, 6, 0), CONTEXT, "up to 10,000"),
        (Line(0.1, 8.5, 0), BATCH, "from 5.0 rows"),
        (Line(0.1, 5, 0), CONTEXT, "everywhere"),
        (Line(0.6, 9, 0), CONTEXT, "nowhere"),
    ),
)
def test_where_sparq_is_faster(ours, axis, expected):
    assert describe_crossing(ours, Line(0.4, 7, 0), axis) == expected


def points(slope: float, wobble: float = 0.0) -> list[Point]:
    found = []
    for index, context in enumerate((4000, 8000, 16000, 32000)):
        off = wobble * (-1) ** index
        lines = {"stock dynamic": 2.0, "stock static": 0.4, "SparQ": slope}
        found.append(Point(context, 1, {way: [10 + per * context / 1000 + off] * 3 for way, per in lines.items()}))
    return found


def test_slopes_are_per_thousand_cached_tokens():
    lines = fit(points(0.05), CONTEXT)
    assert lines["SparQ"].slope == pytest.approx(0.05) and lines["stock static"].at_zero == pytest.approx(10)
    rows = {row[0]: row for row in slope_grid(lines, CONTEXT).rows}
    assert rows["stock static"][3] == "8.0x ± 0.0" and rows["SparQ"][3] == ""


def test_a_slope_within_its_error_claims_nothing():
    rows = {row[0]: row for row in slope_grid(fit(points(0.01, wobble=3), CONTEXT), CONTEXT).rows}
    assert rows["stock static"][3:] == ("unclear", "unclear")
    rows = {row[0]: row for row in slope_grid(fit(points(-0.1), CONTEXT), CONTEXT).rows}
    assert rows["stock static"][3:] == ("unclear", "unclear")


def test_scaling_from_end_to_end(monkeypatch, capsys, tmp_path):
    def tiny():
        return LlamaConfig(
            vocab_size=99,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )

    monkeypatch.setitem(model_shapes.SHAPES, "tiny", tiny)
    out, plot = tmp_path / "scaling.json", tmp_path / "new" / "scaling.png"
    arguments = ["--model", "tiny", "--quick", "--contexts", "200", "300", "400", "--batches", "1", "2"]
    arguments += ["--batch-context", "200", "--json", str(out), "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", ["scaling", *arguments])
    scaling.main()
    assert "ms per 1,000 cached tokens" in capsys.readouterr().out
    assert plot.read_bytes()[1:4] == b"PNG"
    result = json.loads(out.read_text())
    assert [point["context"] for point in result["context"]["points"]] == [200, 300, 400]
    assert [point["batch"] for point in result["batch"]["points"]] == [1, 2]
    assert set(result["context"]["lines"]) == {"stock dynamic", "stock static", "SparQ"}
    assert result["batch"]["lines"]["SparQ"]["slope_error"] is None  # two points
    assert result["settings"]["rounds"] == 2 and result["model"]["layers"] == 1 and str(tmp_path) not in out.read_text()


def test_one_point_is_no_line(capsys):
    with pytest.raises(SystemExit):
        scaling.parse(["--contexts", "512", "512"])
    assert "--contexts must be at least two different numbers" in capsys.readouterr().err

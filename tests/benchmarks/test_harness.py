"""The statistics that every benchmark has in common."""

import math

import pytest
from harness import Measured, Ratio, Row, Timing, line_of


def test_a_timing_is_median_and_deciles():
    assert Timing.of([float(n) for n in range(11)]) == Timing(5, 1, 9, 11)
    assert Timing.of([2.0]) == Timing(2, 2, 2, 1)


def test_turns_cancel_a_slow_machine():
    drift = [1.0, 2.0, 4.0, 8.0]
    assert Ratio.of([3 * wave for wave in drift], drift) == Ratio(3, 3, 3, False)
    assert Ratio.of([3 * wave for wave in drift], drift[:2]) == Ratio(3, 3, 3, False), "the time was up"


def test_a_ratio_within_the_noise_is_unclear():
    assert Ratio.of([20, 5, 22, 21], [10, 10, 40, 10]).unclear
    assert not Ratio.of([20, 21, 22, 21], [10, 10, 11, 10]).unclear
    slower = Ratio.of([10, 10, 11, 10], [20, 21, 22, 21])
    assert not slower.unclear and slower.value < 1, "a loss can be as certain as a gain"


def test_a_row_has_ratios_of_what_is_right_alone():
    ways = {"a": Measured([4.0, 6.0]), "b": Measured([1.0], wrong="differs"), "c": Measured(missing="no memory")}
    row = Row({"cached": 7}, {**ways, "SparQ": Measured([2.0, 3.0], facts={"bytes": 5})}, {"copies": 3})
    assert row.fastest("abc") == "a" and row.ratio("b") is row.ratio("c") is row.ratio("d") is row.ratio(None) is None
    found = row.json()
    assert found["case"] == {"cached": 7} and found["copies"] == 3 and found["ratios"]["SparQ"]["a"]["value"] == 2
    assert set(found["ratios"]) == {"SparQ"} and set(found["ratios"]["SparQ"]) == {"a"}
    assert found["ways"]["b"]["wrong"] == "differs" and found["ways"]["c"] == {"missing": "no memory"}
    assert found["ways"]["SparQ"]["time"]["median"] == 2.5 and found["ways"]["SparQ"]["bytes"] == 5


def line(*points):
    rows = [Row({"cached": 1000 * x}, {"SparQ": Measured([2e-3 * y])}) for x, y in points]
    return line_of(rows, "SparQ", "cached", 1000, layers=2)


def test_a_line_is_found_with_its_error_per_layer_and_unit():
    exact = line((1, 5), (2, 7), (5, 13))
    assert exact["slope"] == pytest.approx(2) and exact["at_zero"] == pytest.approx(3) and exact["slope_error"] < 1e-12
    # by hand: residuals 1/6, -1/3, 1/6; their sum of squares 1/6 over one degree of freedom; x spread 2
    scattered = line((0, 0), (1, 0.5), (2, 2))
    assert scattered["slope"] == pytest.approx(1) and scattered["at_zero"] == pytest.approx(-1 / 6)
    assert scattered["slope_error"] == pytest.approx(math.sqrt(1 / 6 / 2))
    assert line((1, 1), (2, 2))["slope_error"] is None

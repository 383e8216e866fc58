"""What the GPU benchmark reports, from made-up times."""

import json

import pytest
from device_time import Kernel
from gpu_cases import Case
from gpu_rows import Attempt, Row, Timing, dense_grid, kernel_grid, kernels_grid, main_grid, missed_goals, problems
from workload import Shape

CASE = Case("S2", Shape(8, 32, 8, 128, 32768, 32, 256), 4.0, (87, 365))


def timing(us):
    return Timing(us, (us - 1, us + 2), 30)


def row(sparq=None, operator="triton", case=CASE):
    dense = [
        Attempt("flash packed", timing(320), timing(300)),
        Attempt("flash gqa", timing(310), unavailable="as a CUDA graph: RuntimeError: no"),
        Attempt("cuDNN packed", timing(20), timing(10), wrong="differs from attention in float32 by 9.0e-01"),
        Attempt("FlashInfer", unavailable="ModuleNotFoundError: No module named 'flashinfer'", warnings=["and more"]),
    ]
    return Row(case, "bfloat16", operator, 4000.0, 2, 3, sparq or Attempt("SparQ", timing(100), timing(60)), dense)


def cells(grid):
    assert all(len(line) == len(grid.columns) for line in grid.rows)
    return [dict(zip(grid.columns, line, strict=True)) for line in grid.rows]


def test_speed_up_is_against_the_fastest_right_way_of_the_same_mode():
    assert row().fastest("graph")[0] == "flash packed" and row().speedup("graph") == 5.0
    assert row().fastest("eager")[0] == "flash gqa" and row().speedup("eager") == pytest.approx(3.1)
    (shown,) = cells(main_grid([row()]))
    assert shown["speed-up, graph"] == "5.0x" and shown["speed-up, eager"] == "3.1x" and shown["goal"] == "≥ 4x"
    assert shown["dense, graph"] == "300 ±0.5% flash packed" and shown["shape"].startswith("S2: B=8 32/8")
    assert (shown["dense, eager"], shown["SparQ, eager"], shown["predicted, H100"]) == ("310", "100", "365 → 87")
    # 64 KV heads of 32768 positions, r = 32 components and 2 * 256 rows of 128, in 2 bytes
    sparq_bytes = 64 * (32768 * 32 + 2 * 256 * 128) * 2
    assert row().sparq_bytes == sparq_bytes and shown["bytes allow"] == "7.5x"
    assert shown["GB/s (of copy)"] == f"{sparq_bytes / 60e3:.0f} ({sparq_bytes / 60e3 / 4000:.0%})"


@pytest.mark.parametrize(
    "sparq",
    (
        Attempt("SparQ", timing(100), timing(60), wrong="output differs"),
        Attempt("SparQ", timing(100), unavailable="as a CUDA graph: RuntimeError: capture"),
        Attempt("SparQ", unavailable="CompilationError: at 3:4"),
    ),
)
def test_a_wrong_row_has_no_ratio(sparq):
    bad = row(sparq)
    (shown,) = cells(main_grid([bad]))
    assert shown["speed-up, graph"] == shown["speed-up, eager"] == "WRONG"
    assert bad.json()["wrong"] and bad.json()["graph"]["speedup"] is bad.json()["eager"]["speedup"] is None
    assert problems([bad])[0] == f"WRONG: S2 bfloat16: {bad.wrong}"


def test_the_reference_is_not_called_sparq():
    (shown,) = cells(main_grid([row(operator="reference")]))
    assert shown["speed-up, graph"] == shown["speed-up, eager"] == "no kernel"
    assert row(operator="reference").json()["graph"]["speedup"] is None


def test_nothing_to_compare_with():
    empty = row()
    empty.dense = []
    (shown,) = cells(main_grid([empty]))
    assert shown["speed-up, graph"] == shown["dense, graph"] == shown["dense, eager"] == "–"
    json.dumps(empty.json())


def test_json_holds_every_way_and_why():
    data = json.loads(json.dumps(row().json()))
    assert data["shape"] == "B=8 32/8 S=32768 r=32 k=256" and data["case"]["goal"] == 4.0 and data["wrong"] is None
    ways = {way["name"]: way for way in data["dense"]}
    assert ways["FlashInfer"]["unavailable"].startswith("ModuleNotFoundError") and ways["FlashInfer"]["eager"] is None
    assert ways["cuDNN packed"]["wrong"] and ways["flash packed"]["graph"]["us"] == 300
    assert data["graph"]["dense_way"] == "flash packed" and data["graph"]["speedup"] == 5.0
    assert data["graph"]["sparq_gbs"] == pytest.approx(data["sparq_bytes"] / 60e3)


def test_all_dense_ways_are_shown_and_reasons_told_once():
    grid = dense_grid([row(), row()])
    (shown, _) = cells(grid)
    assert shown["flash packed"] == "300 / 320" and shown["flash gqa"] == "– / 310"
    assert shown["cuDNN packed"].startswith("WRONG") and "FlashInfer" not in grid.columns
    told = problems([row(), row()])
    assert "not counted in 2 of 2 rows: FlashInfer: ModuleNotFoundError: No module named 'flashinfer'; and more" in told
    assert len(told) == 3


def test_warnings_of_the_operator_are_shown():
    warned = row(Attempt("SparQ", timing(100), timing(60), warnings=["no compiler: slow"]))
    assert problems([warned, warned]).count("SparQ warned: no compiler: slow") == 1


def test_kernels_are_summed():
    grid = kernel_grid("title", [Kernel("score", 1, 30.0), Kernel("gather", 2, 10.0)])
    assert grid.rows[0] == ("score", "1", "30.00", "75%") and grid.rows[-1] == ("all", "3", "40.00", "")
    assert kernel_grid("title", []).rows == [("all", "0", "0.00", "")]


def test_kernels_of_several_shapes_stand_side_by_side():
    mine, torchs = Kernel("score", 1, 30.0), Kernel("void at::native::fill<int>(int)", 2, 4.0)
    grid = kernels_grid([(CASE, "bfloat16", [mine, torchs]), (CASE, "float16", [Kernel("fused", 1, 10.0)])])
    assert grid.columns == ("shape", "dtype", "score", "fused", "others", "all", "launches")
    assert grid.rows[0] == ("S2", "bfloat16", "30.0", "–", "4.0", "34.0", "3")
    assert grid.rows[1] == ("S2", "float16", "–", "10.0", "0.0", "10.0", "1")


def test_a_goal_that_was_missed_is_told():
    assert missed_goals([row()]) == []
    slow = row(Attempt("SparQ", timing(100), timing(100)))
    assert missed_goals([slow]) == ["goal missed: S2 bfloat16: 3.00x, not 4x"]
    assert missed_goals([row(Attempt("SparQ", timing(100), timing(100), wrong="differs"))]) == []


def test_whoever_is_far_behind_is_sampled_a_little():
    asked = []

    def sample(rounds):
        asked.append(rounds)
        return [50.0] * rounds

    assert Timing.of(sample, 20, fastest=10.0) == Timing(50.0, (50.0, 50.0), 3) and asked == [3]
    assert Timing.of(sample, 20, fastest=40.0).rounds == 20 and asked == [3, 3, 20]
    assert Timing.of(sample, 20).rounds == 20 and asked[3:] == [20]

"""The GPU benchmark on the CPU: everything but the device's clock and graphs, which are made up."""

import json
import time
import warnings

import pytest
import sparq_kernels
import torch
from dense import exact, matmul
from gpu_stages import attention, clocks
from gpu_stages.attention import (
    CALLS,
    SPARQ_WAY,
    AttentionRow,
    Timed,
    attempt,
    copies_for,
    dense_grid,
    kernels_grid,
    main_grid,
    measure,
    notes,
    sampled,
)
from gpu_stages.cases import coded
from gpu_stages.clocks import CallsAgain, Host, Kernel
from gpu_stages.dense import DenseWay, unprepared
from gpu_stages.failures import NO_TIME, OUT_OF_MEMORY, reason, told
from gpu_stages.stage import Stage
from harness import SPARQ
from workload import Case, Shape, make_inputs, shared_positions

SHAPE = Shape(1, 4, 2, 16, 96, 8, 12)
CASE = Case("tiny", SHAPE, 1.5)
H200_L2 = 60 << 20


class Made(Host):
    """A clock of which every replay takes 5 µs and a bit."""

    class Graph(CallsAgain):
        def times(self, rounds):
            self.outputs()
            return [(5 + index) / 1e6 for index in range(rounds)]

    def graph(self, call, caches, walks):
        return self.Graph(call, caches, walks)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other on a busy machine, call after call
    yield
    torch.set_num_threads(threads)


def row_of(dtype_name, **knobs):
    return measure(CASE, dtype_name, 4, 100.0, "cpu", Made(), **knobs)


@pytest.fixture
def caches():
    first = make_inputs(SHAPE, torch.bfloat16)
    return [first, first.copy(), first.copy()]


@pytest.mark.parametrize("case", dict.fromkeys(case for case, _ in attention.MEASURED), ids=lambda case: case.name)
def test_copies_outgrow_the_cache_and_fit_the_device(case):
    copies = copies_for(case.shape, 2, H200_L2, 139 << 30)
    assert 3 <= copies <= 256
    assert copies * case.shape.sparse_bytes(2) >= 4 * H200_L2, "even SparQ's own reads"
    assert copies * case.shape.dense_elements * 3 < 70e9
    one = case.shape.dense_elements * 3
    assert copies_for(case.shape, 2, H200_L2, free=one) == 1, "a small device does what it can"
    assert copies_for(case.shape, 2, H200_L2, free=4 * one) == 2


def test_a_row_compares_every_way_that_runs(monkeypatch):
    monkeypatch.setattr(sparq_kernels, "backend", lambda device: "triton")
    row = row_of("float32")
    assert row.wrong is None and row.copies == 3
    assert len(row.sparq.seconds) == 4 and len(row.sparq.eager) == 2, "the claim is made of graphs"
    ways = row.dense
    assert ways["flash packed"].seconds and ways["matmul"].eager and not ways["matmul"].wrong
    assert "RuntimeError" in ways["cuDNN packed"].missing and "No module" in ways["FlashInfer"].missing
    assert row.speedup("graph") == 1.0 and row.speedup("eager") > 0
    json.dumps(row.json())


def test_codes_have_rows_of_their_own():
    shape = Shape(1, 4, 2, 16, 600, 8, 12)
    full = Case("some/8", shape, 2.0, (1, 2))
    in_codes = coded(full)
    assert in_codes == Case("some/8 int4", Shape(1, 4, 2, 16, 600, 32, 12, "int4"))
    in_codes = coded(Case("some", shape))
    row = measure(in_codes, "float32", 4, 100.0, "cpu", Made())
    assert row.wrong is None and row.sparq.seconds
    assert row.sparq_bytes < AttentionRow({}, measured=full, itemsize=4).sparq_bytes
    (shown,) = cells(main_grid([row]))
    assert shown["shape"] == "some int4: B=1 4/2 S=600 r=8 k=12 int4" and not shown["goal"] + shown["predicted, H100"]


def test_either_index_is_measured_side_by_side():
    names = [f"{case.name} {dtype}" for case, dtype in attention.MEASURED]
    assert len(names) == len(set(names)) == 24 and names[:2] == ["S1 bfloat16", "S1 int4 bfloat16"]
    assert names[-1] == "S3 int4 float16" and "128k/8 int4 bfloat16" in names
    assert {case.name for case in attention.PROFILED} < {case.name for case, _ in attention.MEASURED}


def test_a_wrong_operator_gives_a_wrong_row(monkeypatch):
    right = sparq_kernels.decode

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        return out._replace(output=out.output * 1.1)

    monkeypatch.setattr(sparq_kernels, "decode", wrong)
    row = row_of("float16")
    assert "output differs from the reference by 1.0e-01" in row.wrong and row.speedup("graph") is None
    assert row.sparq.seconds, "its time still helps whoever mends it"


def test_an_operator_that_crashes_leaves_the_dense_times(monkeypatch, capsys):
    def crash(*args, **kwargs):
        raise RuntimeError("kernel fell over")

    monkeypatch.setattr(sparq_kernels, "decode", crash)
    row = row_of("float16")
    assert row.wrong == "RuntimeError: kernel fell over" and row.fastest_dense("graph")
    assert "Traceback" in capsys.readouterr().err


def test_a_case_that_does_not_fit_is_reported(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention, "make_inputs", full)
    row = row_of("float16")
    assert row.wrong == OUT_OF_MEMORY
    json.dumps(row.json())


def test_wrong_dense_output_does_not_count(caches):
    row = row_of("float16")
    expected = exact(SHAPE, caches[0])
    nan = DenseWay("nan", unprepared(lambda shape, x: matmul(shape, x) * float("nan")))
    off = DenseWay("off", unprepared(lambda shape, x: matmul(shape, x) * 1.05))
    for way in (nan, off):
        row.ways = {SPARQ: row.sparq, way.name: tried(way, caches, lambda out: attention.dense_error(out, expected))}
        assert "float32" in row.ways[way.name].wrong and row.fastest_dense("eager") is None


def tried(way, caches, check=lambda _: None, clock=None):
    return attempt(way, SHAPE, caches, 4, check, clock or Made())


def test_a_graph_that_computes_something_else_is_wrong(monkeypatch, caches):
    class Stale(CallsAgain):
        def outputs(self):
            return [*super().outputs()[:-1], torch.full((1, 4, 1, 16), float("nan"))]

    monkeypatch.setattr(Made, "Graph", Stale)
    assert "graph replay differs" in tried(SPARQ_WAY, caches).wrong


def test_an_error_that_appears_after_many_replays_is_wrong(monkeypatch, caches):
    class Race(CallsAgain):
        replays = 0

        def outputs(self):
            self.replays += 1
            return [output * self.replays for output in super().outputs()]

    monkeypatch.setattr(Made, "Graph", Race)
    assert "graph replay differs" in tried(SPARQ_WAY, caches).wrong


def test_a_way_that_cannot_be_captured_keeps_its_eager_time(monkeypatch, caches):
    def refuse(*args):
        try:
            raise ValueError("item() while capturing")
        except ValueError:
            raise RuntimeError("capture invalidated\nmore lines")  # noqa: B904

    monkeypatch.setattr(Made, "Graph", refuse)
    result = tried(DenseWay("matmul", unprepared(matmul)), caches)
    assert result.eager and not result.seconds
    assert result.missing == (
        "as a CUDA graph: RuntimeError: capture invalidated; first: ValueError: item() while capturing"
    )


def test_reasons_given_as_warnings_are_kept_once(caches):
    def refuse(shape, x):
        for _ in range(2):
            warnings.warn("head_dim too large (Triggered internally at a.cpp:3.)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    result = tried(DenseWay("picky", unprepared(refuse)), caches)
    assert result.missing == "RuntimeError: No available kernel. Aborting execution."
    assert result.warnings == ["head_dim too large"]


def test_whoever_has_no_time_says_so(monkeypatch):
    monkeypatch.setattr(sparq_kernels, "backend", lambda device: "triton")
    late, full = attention.all_measured([(CASE, "float16")] * 2, 4, 100.0, "cpu", Made(), time.monotonic() + 1e-3), []
    for row in late:
        assert row.is_left_out and row.wrong is None and row.speedup("graph") is None
        json.dumps(row.json())
        full.append(main_grid([row]).rows[0])
    assert [cells.count(NO_TIME) for cells in full] == [2, 2]

    row = row_of("float16", ends=time.monotonic())
    (name, first), *others = row.dense.items()
    assert first.seconds and {way.missing for _, way in others} == {NO_TIME}
    assert row.wrong is None and row.fastest_dense("graph")[0] == name


def test_positions_in_common_are_counted_once():
    ours, theirs = torch.tensor([[5, 1, 9, 9], [1, 2, 3, 4]]), torch.tensor([[9, 1, 2, 3], [5, 6, 7, 8]])
    assert shared_positions(ours, theirs).tolist() == [2, 0]
    generator = torch.Generator().manual_seed(0)
    many = [torch.stack([torch.randperm(60, generator=generator)[:40] for _ in range(8)]) for _ in range(2)]
    expected = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(*many, strict=True)]
    assert shared_positions(*many).tolist() == expected


def test_the_stage_is_whole_after_every_row(monkeypatch, tmp_path, capsys):
    """Stopped in its second row, it has its first; what was wrong and what was missed are told apart."""
    case = Case("tiny", SHAPE, 1e9, (1, 2))
    monkeypatch.setattr(attention, "TINY", (case, case))
    monkeypatch.setattr(attention, "clock_of", lambda device: Made())
    monkeypatch.setattr(sparq_kernels, "backend", lambda device: "triton")
    monkeypatch.setattr(attention, "kernels", lambda *args: [Kernel("score", 1, 12.5e-6)])
    path, on_device = tmp_path / "rows.json", attention.measure

    def stopped(*args):
        if path.exists() and "rows" in json.loads(path.read_text()):
            raise KeyboardInterrupt
        return on_device(*args)

    monkeypatch.setattr(attention, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        attention.main(Stage("cpu", 600, path))
    written = json.loads(path.read_text())
    assert written["said"] == "1 of 1 rows, 1 of them right" and written["wrong"] == []
    assert written["notes"][0].startswith("goal missed: tiny float32: 1.00x")
    assert written["notes"][-1].startswith("not installed: FlashAttention 2, ")
    assert [len(table["rows"]) for table in written["tables"]] == [1, 1]

    monkeypatch.setattr(attention, "measure", on_device)
    monkeypatch.setattr(attention, "TINY", (case, Case("other", SHAPE, None)))
    attention.main(Stage("cpu", 600, path))
    written = json.loads(path.read_text())
    main, kernels, dense = written["tables"]
    assert len(main["rows"]) == len(dense["rows"]) == len(kernels["rows"]) == 2
    assert main["printed"] and not dense["printed"] and "2 → 1" in main["rows"][0]
    assert kernels["rows"][0] == ["tiny", "float32", "12.5", "0.0", "12.5", "1"] and len(written["profile"]) == 2
    assert written["machine"]["torch"] == torch.__version__ and written["rows"][0]["speedup"]["graph"] == 1.0


def test_every_measurement_has_enough_calls(caches):
    calls = []
    count = DenseWay("count", unprepared(lambda shape, x: calls.append(x) or matmul(shape, x)))
    attempt(count, SHAPE, caches[:1], 4, lambda _: None, Host())
    assert len(calls) >= (4 + clocks.WARM_UP) * CALLS


def test_reason_and_told():
    assert reason(RuntimeError("")) == "RuntimeError: "
    assert told("  first\nsecond") == "first" and len(told("x" * 999)) == 200


LARGE = Case("S2", Shape(8, 32, 8, 128, 32768, 32, 256), 4.0, (87, 365))


def timed(eager=None, graph=None, **knobs):
    """Microseconds, of which the deciles are 1 less and 2 more."""
    return Timed(
        [us / 1e6 for us in (graph - 1, graph, graph + 2)] if graph else [],
        eager=[eager / 1e6] if eager else [],
        **knobs,
    )


def row(sparq=None, operator="triton", case=LARGE):
    ways = {
        SPARQ: sparq or timed(100, 60),
        "flash packed": timed(320, 300),
        "flash gqa": timed(310, missing="as a CUDA graph: RuntimeError: no"),
        "cuDNN packed": timed(20, 10, wrong="differs from attention in float32 by 9.0e-01"),
        "FlashInfer": Timed(missing="RuntimeError: pages", warnings=["and more"]),
        "FlashAttention 2": Timed(missing="ModuleNotFoundError: No module named 'flash_attn'"),
    }
    row = AttentionRow(case.described("bfloat16"), ways, measured=case)
    row.operator, row.copy_gbs, row.itemsize, row.copies = operator, 4000.0, 2, 3
    return row


def cells(grid):
    assert all(len(line) == len(grid.columns) for line in grid.rows)
    return [dict(zip(grid.columns, line, strict=True)) for line in grid.rows]


def test_speed_up_is_against_the_fastest_right_way_of_the_same_mode():
    assert row().fastest_dense("graph")[0] == "flash packed" and row().speedup("graph") == pytest.approx(5)
    assert row().fastest_dense("eager")[0] == "flash gqa" and row().speedup("eager") == pytest.approx(3.1)
    (shown,) = cells(main_grid([row()]))
    assert shown["speed-up, graph"] == "5.0x" and shown["speed-up, eager"] == "3.1x" and shown["goal"] == "≥ 4x"
    assert shown["dense, graph"] == "300 ±0.4% flash packed" and shown["shape"].startswith("S2: B=8 32/8")
    assert (shown["dense, eager"], shown["SparQ, eager"], shown["predicted, H100"]) == ("310", "100", "365 → 87")
    # 64 KV heads of 32768 positions, r = 32 components and 2 * 256 rows of 128, in 2 bytes
    sparq_bytes = 64 * (32768 * 32 + 2 * 256 * 128) * 2
    assert row().sparq_bytes == sparq_bytes and shown["bytes allow"] == "7.5x"
    assert shown["GB/s (of copy)"] == f"{sparq_bytes / 60e3:.0f} ({sparq_bytes / 60e3 / 4000:.0%})"


@pytest.mark.parametrize(
    "sparq",
    (
        timed(100, 60, wrong="output differs"),
        timed(100, missing="as a CUDA graph: RuntimeError: capture"),
        timed(missing="CompilationError: at 3:4"),
    ),
)
def test_a_wrong_row_has_no_ratio(sparq):
    bad = row(sparq)
    (shown,) = cells(main_grid([bad]))
    assert shown["speed-up, graph"] == shown["speed-up, eager"] == "WRONG"
    assert bad.json()["wrong"] and set(bad.json()["speedup"].values()) == {None}


def test_the_reference_is_not_called_sparq():
    (shown,) = cells(main_grid([row(operator="reference")]))
    assert shown["speed-up, graph"] == shown["speed-up, eager"] == "no kernel"
    assert row(operator="reference").json()["speedup"]["graph"] is None


def test_nothing_to_compare_with():
    empty = row()
    empty.ways = {SPARQ: empty.sparq}
    (shown,) = cells(main_grid([empty]))
    assert shown["speed-up, graph"] == shown["dense, graph"] == shown["dense, eager"] == "–"
    json.dumps(empty.json())


def test_json_holds_every_way_and_why():
    data = json.loads(json.dumps(row().json()))
    assert data["case"]["shape"] == "B=8 32/8 S=32768 r=32 k=256" and data["goal"] == 4.0 and data["wrong"] is None
    ways = data["ways"]
    assert ways["FlashInfer"] == {"missing": "RuntimeError: pages", "warnings": ["and more"]}
    assert ways["cuDNN packed"]["wrong"] and ways["flash packed"]["time"]["median"] == pytest.approx(300e-6)
    assert data["speedup"] == {"graph": pytest.approx(5), "eager": pytest.approx(3.1)}


def test_all_dense_ways_are_shown_and_reasons_told_once():
    grid = dense_grid([row(), row()])
    (shown, _) = cells(grid)
    assert shown["flash packed"] == "300 / 320" and shown["flash gqa"] == "– / 310"
    assert shown["cuDNN packed"].startswith("WRONG") and "FlashInfer" not in grid.columns
    told = notes([row(), row()])
    assert "not counted in 2 of 2 rows: FlashInfer: RuntimeError: pages; and more" in told
    assert told[-1] == "not installed: FlashAttention 2" and len(told) == 4


def test_warnings_of_the_operator_are_shown():
    warned = row(timed(100, 60, warnings=["no compiler: slow"]))
    assert notes([warned, warned]).count("SparQ warned: no compiler: slow") == 1


def test_kernels_of_several_shapes_stand_side_by_side():
    mine, torchs = Kernel("score", 1, 30e-6), Kernel("void at::native::fill<int>(int)", 2, 4e-6)
    grid = kernels_grid({"S2": [mine, torchs], "S3": [Kernel("fused", 1, 10e-6)]}, "bfloat16")
    assert grid.columns == ("shape", "dtype", "score", "fused", "others", "all", "launches")
    assert grid.rows[0] == ("S2", "bfloat16", "30.0", "–", "4.0", "34.0", "3")
    assert grid.rows[1] == ("S3", "bfloat16", "–", "10.0", "0.0", "10.0", "1")


def missed(row):
    return [text for text in notes([row]) if text.startswith("goal")]


def test_a_goal_that_was_missed_is_told():
    assert not missed(row())
    slow = row(timed(100, 100))
    assert missed(slow) == ["goal missed: S2 bfloat16: 3.00x, not 4x"]
    assert not missed(row(timed(100, 100, wrong="differs")))


def test_whoever_is_far_behind_is_sampled_a_little():
    asked = []

    def sample(rounds):
        asked.append(rounds)
        return [50.0] * rounds

    assert len(sampled(sample, 20, fastest=10.0)) == 3 and asked == [3]
    assert len(sampled(sample, 20, fastest=40.0)) == 20 and asked == [3, 3, 20]
    assert len(sampled(sample, 20, fastest=None)) == 20 and asked[3:] == [20]

"""The GPU benchmark on the CPU: everything but the device's clock and graphs, which are made up."""

import argparse
import json
import time
import warnings

import attention_gpu
import device_time
import pytest
import sparq_kernels
import torch
from attention_gpu import CALLS, SPARQ, attempt, copies_for, measure, reason, told
from dense import Way, exact, matmul, unprepared
from gpu_cases import Case
from gpu_rows import NO_TIME, main_grid
from stage import Stage
from workload import Shape, make_inputs, shared_positions

SHAPE = Shape(1, 4, 2, 16, 96, 8, 12)
CASE = Case("tiny", SHAPE, 1.5)
H200_L2 = 60 << 20


class EagerReplay:
    """A "graph" that simply calls again."""

    def __init__(self, call, caches, walks):
        self.calls = [(call, x) for _ in range(walks) for x in caches]

    def outputs(self):
        return [call(x) for call, x in self.calls]

    def times(self, rounds):
        self.outputs()
        return [5.0 + index for index in range(rounds)]


@pytest.fixture(autouse=True)
def no_device(monkeypatch):
    monkeypatch.setattr(attention_gpu, "clock", lambda device: device_time)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(device_time, "Replay", EagerReplay)
    monkeypatch.setattr(device_time, "cache_bytes", lambda: 1)
    monkeypatch.setattr(device_time, "free_bytes", lambda: 1 << 30)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other on a busy machine, call after call
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def caches():
    first = make_inputs(SHAPE, torch.bfloat16)
    return [first, first.copy(), first.copy()]


@pytest.mark.parametrize("case", attention_gpu.CASES, ids=lambda case: case.name)
def test_copies_outgrow_the_cache_and_fit_the_device(case):
    copies = copies_for(case.shape, 2, H200_L2, 139 << 30)
    assert 3 <= copies <= 128
    assert copies * case.shape.sparse_elements * 2 >= 4 * H200_L2, "even SparQ's own reads"
    assert copies * case.shape.dense_elements * 3 < 70e9
    one = case.shape.dense_elements * 3
    assert copies_for(case.shape, 2, H200_L2, free=one) == 1, "a small device does what it can"
    assert copies_for(case.shape, 2, H200_L2, free=4 * one) == 2


def test_a_row_compares_every_way_that_runs(monkeypatch):
    monkeypatch.setattr(sparq_kernels, "backend", lambda device: "triton")
    row = measure(CASE, "float32", rounds=4, copies=None, copy_gbs=100.0, device="cpu")
    assert row.wrong is None and row.copies == 3
    assert row.sparq.graph.rounds == 4 and row.sparq.eager.rounds == 2, "the claim is made of graphs"
    ways = {way.name: way for way in row.dense}
    assert ways["flash packed"].graph and ways["matmul"].eager and not ways["matmul"].wrong
    assert "RuntimeError" in ways["cuDNN packed"].unavailable and "No module" in ways["FlashInfer"].unavailable
    assert row.speedup("graph") == 1.0 and row.speedup("eager") > 0
    json.dumps(row.json())


def test_a_wrong_operator_gives_a_wrong_row(monkeypatch):
    right = sparq_kernels.decode

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        return out._replace(output=out.output * 1.1)

    monkeypatch.setattr(sparq_kernels, "decode", wrong)
    row = measure(CASE, "float16", rounds=4, copies=2, copy_gbs=100.0, device="cpu")
    assert "output differs from the reference by 1.0e-01" in row.wrong and row.speedup("graph") is None
    assert row.sparq.graph, "its time still helps whoever mends it"


def test_an_operator_that_crashes_leaves_the_dense_times(monkeypatch, capsys):
    def crash(*args, **kwargs):
        raise RuntimeError("kernel fell over")

    monkeypatch.setattr(sparq_kernels, "decode", crash)
    row = measure(CASE, "float16", rounds=4, copies=2, copy_gbs=100.0, device="cpu")
    assert row.wrong == "RuntimeError: kernel fell over" and row.fastest("graph")
    assert "Traceback" in capsys.readouterr().err


def test_a_case_that_does_not_fit_is_reported(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention_gpu, "make_inputs", full)
    row = measure(CASE, "float16", rounds=4, copies=2, copy_gbs=100.0, device="cpu")
    assert "out of memory" in row.wrong
    json.dumps(row.json())


def test_wrong_dense_output_does_not_count(caches):
    row = measure(CASE, "float16", rounds=4, copies=2, copy_gbs=100.0, device="cpu")
    expected = exact(SHAPE, caches[0])
    nan = Way("nan", unprepared(lambda shape, x: matmul(shape, x) * float("nan")))
    off = Way("off", unprepared(lambda shape, x: matmul(shape, x) * 1.05))
    row.dense = [
        attempt(way, SHAPE, caches, 4, lambda out: attention_gpu.dense_error(out, expected)) for way in (nan, off)
    ]
    assert all("float32" in way.wrong for way in row.dense) and row.fastest("eager") is None


def test_a_graph_that_computes_something_else_is_wrong(monkeypatch, caches):
    class Stale(EagerReplay):
        def outputs(self):
            return [*super().outputs()[:-1], torch.full((1, 4, 1, 16), float("nan"))]

    monkeypatch.setattr(device_time, "Replay", Stale)
    assert "graph replay differs" in attempt(SPARQ, SHAPE, caches, 4, lambda _: None).wrong


def test_an_error_that_appears_after_many_replays_is_wrong(monkeypatch, caches):
    class Race(EagerReplay):
        replays = 0

        def outputs(self):
            self.replays += 1
            return [output * self.replays for output in super().outputs()]

    monkeypatch.setattr(device_time, "Replay", Race)
    assert "graph replay differs" in attempt(SPARQ, SHAPE, caches, 4, lambda _: None).wrong


def test_a_way_that_cannot_be_captured_keeps_its_eager_time(monkeypatch, caches):
    def refuse(*args):
        try:
            raise ValueError("item() while capturing")
        except ValueError:
            raise RuntimeError("capture invalidated\nmore lines")  # noqa: B904

    monkeypatch.setattr(device_time, "Replay", refuse)
    result = attempt(Way("matmul", unprepared(matmul)), SHAPE, caches, 4, lambda _: None)
    assert result.eager and result.graph is None
    assert result.unavailable == (
        "as a CUDA graph: RuntimeError: capture invalidated; first: ValueError: item() while capturing"
    )


def test_reasons_given_as_warnings_are_kept_once(caches):
    def refuse(shape, x):
        for _ in range(2):
            warnings.warn("head_dim too large (Triggered internally at a.cpp:3.)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    result = attempt(Way("picky", unprepared(refuse)), SHAPE, caches, 4, lambda _: None)
    assert result.unavailable == "RuntimeError: No available kernel. Aborting execution."
    assert result.warnings == ["head_dim too large"]


def test_whoever_has_no_time_says_so(monkeypatch):
    monkeypatch.setattr(sparq_kernels, "backend", lambda device: "triton")
    late, full = attention_gpu.measured([(CASE, "float16")] * 2, 4, 2, 100.0, "cpu", ends=time.monotonic() + 1e-3), []
    for row in late:
        assert row.is_left_out and row.wrong is None and row.speedup("graph") is None
        json.dumps(row.json())
        full.append(main_grid([row]).rows[0])
    assert [cells.count(NO_TIME) for cells in full] == [2, 2]

    row = measure(CASE, "float16", 4, 2, 100.0, "cpu", ends=time.monotonic())
    first, *others = row.dense
    assert first.graph and {way.unavailable for way in others} == {NO_TIME}
    assert row.wrong is None and row.fastest("graph")[0] == first.name


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
    monkeypatch.setattr(attention_gpu, "TINY", (case, case))
    monkeypatch.setattr(sparq_kernels, "backend", lambda device: "triton")
    monkeypatch.setattr(device_time, "properties", lambda: {"device": "made up"})
    monkeypatch.setattr(device_time, "copy_bandwidth", lambda: 4000.0)
    monkeypatch.setattr(attention_gpu, "kernels", lambda *args: [device_time.Kernel("score", 1, 12.5)])
    path, on_device = tmp_path / "rows.json", attention_gpu.measure

    def stopped(*args):
        if path.exists() and "rows" in json.loads(path.read_text()):
            raise KeyboardInterrupt
        return on_device(*args)

    monkeypatch.setattr(attention_gpu, "measure", stopped)
    stage = Stage("cpu", 600, path)
    monkeypatch.setattr(attention_gpu.Stage, "from_arguments", lambda *args: stage)
    with pytest.raises(KeyboardInterrupt):
        attention_gpu.main()
    written = json.loads(path.read_text())
    assert written["said"] == "1 of 1 rows, 1 of them right" and written["wrong"] == []
    assert written["notes"][0].startswith("goal missed: tiny float32: 1.00x")
    assert written["notes"][-1].startswith("not installed: FlashAttention 2, ")
    assert [len(table["rows"]) for table in written["tables"]] == [1, 1]

    monkeypatch.setattr(attention_gpu, "measure", on_device)
    attention_gpu.main()
    written = json.loads(path.read_text())
    main, kernels, dense = written["tables"]
    assert len(main["rows"]) == len(dense["rows"]) == len(kernels["rows"]) == 2
    assert main["printed"] and not dense["printed"] and "2 → 1" in main["rows"][0]
    assert kernels["rows"][0] == ["tiny", "float32", "12.5", "0.0", "12.5", "1"] and len(written["profile"]) == 2


def test_every_measurement_has_enough_calls(caches):
    calls = []
    count = Way("count", unprepared(lambda shape, x: calls.append(x) or matmul(shape, x)))
    attempt(count, SHAPE, caches[:1], 4, lambda _: None)
    assert len(calls) >= (4 + device_time.WARM_UP) * CALLS


def test_reason_and_told():
    assert reason(RuntimeError("")) == "RuntimeError: "
    assert told("  first\nsecond") == "first" and len(told("x" * 999)) == 200


@pytest.mark.parametrize("operator", ("triton", "reference"))
def test_run_reports_everything(monkeypatch, tmp_path, capsys, operator):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sparq_kernels, "backend", lambda device: operator)
    monkeypatch.setattr(attention_gpu, "CASES", (CASE, Case("other", Shape(2, 2, 2, 16, 64, 8, 12), None)))
    monkeypatch.setattr(device_time, "properties", lambda: {"device": "made up", "L2 bytes": 1})
    monkeypatch.setattr(device_time, "copy_bandwidth", lambda: 4000.0)
    monkeypatch.setattr(attention_gpu, "kernels", lambda *args: [device_time.Kernel("score_kernel", 1, 12.5)])
    on_device = attention_gpu.measure
    monkeypatch.setattr(attention_gpu, "measure", lambda *args: on_device(*args[:5], "cpu"))
    args = argparse.Namespace(
        rows=[0, 1],
        dtypes=["float16", "bfloat16"],
        rounds=3,
        copies=None,
        profile=True,
        json=tmp_path / "rows.json",
        markdown=tmp_path / "rows.md",
    )
    assert attention_gpu.run(args) is True
    printed = capsys.readouterr().out
    assert (
        "made up, copies at 4000 GB/s" in printed and "score_kernel" in printed and "not counted in 4 of 4" in printed
    )
    assert ("no speed-up is shown" in printed) == (operator == "reference")
    result = json.loads((tmp_path / "rows.json").read_text())
    assert len(result["rows"]) == len(result["profile"]) == 4 and result["operator"] == operator
    assert result["machine"]["device"] == "made up" and result["machine"]["torch"] == torch.__version__
    assert all((row["graph"]["speedup"] is None) == (operator == "reference") for row in result["rows"])
    markdown = (tmp_path / "rows.md").read_text()
    assert "| tiny: B=1 4/2 S=96 r=8 k=12 | float16 |" in markdown and "| score_kernel | 1 | 12.50 | 100% |" in markdown
    assert ("no kernel" in markdown) == (operator == "reference")

"""The attention benchmark's command line, its CPU mode on tiny shapes, and what it says of noise."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import attention
import attention_cases
import attention_cpu
import pytest
import sparq_kernels
import torch
from attention_cases import CACHE_BYTES, README, SWEEP, Case, chosen, copies_that_fit, sized, walk
from attention_rows import KERNEL, REFERENCE, SPARQ, Ratio, Row, Timing, main_grid, plot
from sparq_kernels.cpu import CompilerError
from workload import Shape

ROOT = Path(__file__).parents[2]
TINY = (Case("tiny", Shape(1, 4, 2, 16, 96, 8, 12)), Case("tiny", Shape(2, 2, 2, 16, 64, 8, 12)))


def test_each_device_has_its_defaults():
    cpu, gpu = attention.parse([]), attention.parse(["--device", "cuda", "--profile"])
    assert cpu.dtypes == ["float32", "bfloat16"] and cpu.rows is None and not cpu.profile
    assert gpu.rows == list(range(9)) and gpu.dtypes == ["float16", "bfloat16"] and gpu.profile
    assert cpu.rounds == gpu.rounds == 30 and cpu.copies is gpu.copies is cpu.json is gpu.markdown is None
    assert attention.parse(["--quick"]).rounds == 8 and attention.parse(["--quick", "--rounds", "3"]).rounds == 3
    assert attention.parse(["--device", "cuda", "--rows", "5", "--dtypes", "float32"]).dtypes == ["float32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--rows", "0"], "--rows needs --device cuda"),
        (["--device", "cuda", "--rows", "-1"], "--rows must be 0 to 8"),
        (["--device", "cuda", "--contexts", "4096"], "--contexts needs --device cpu"),
        (["--device", "cuda", "--quick"], "--quick needs --device cpu"),
        (["--rounds", "1"], "--rounds must be at least 2"),
        (["--copies", "0"], "--copies must be at least 1"),
        (["--contexts", "4096", "0"], "--contexts must be at least 1"),
        (["--ratio", "0.5"], "--ratio must be at least 1"),
        (["--r", "65", "--shapes", "llama-3-8b", "llama-3.2-1b"], "--r must be at most 64"),
        (["--profile"], "--profile needs --device cuda"),
        (["--device", "tpu"], "invalid choice"),
        (["--shapes", "gpt-5"], "invalid choice"),
    ),
)
def test_bad_arguments_are_refused_in_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        attention.parse(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        attention.parse(["--plot", "out.png"])
    assert "pip install matplotlib" in capsys.readouterr().err


def test_arguments_choose_the_cases():
    assert chosen(attention.parse([])) == list(README + SWEEP)
    assert chosen(attention.parse(["--quick"])) == list(attention_cases.QUICK)
    grid = [
        "--shapes",
        "llama-3.2-1b",
        "llama-2-7b",
        "--contexts",
        "1024",
        "100",
        "--batches",
        "1",
        "4",
        "--ratio",
        "4",
    ]
    shapes = [case.shape for case in chosen(attention.parse(grid))]
    assert len(shapes) == 8 and shapes[0] == Shape(1, 32, 8, 64, 1024, 16, 128)
    assert shapes[-1] == Shape(4, 32, 32, 128, 100, 32, 100), "k is never more than there are"
    (only, *_) = chosen(attention.parse(["--r", "7", "--k", "9"]))
    assert only == Case("llama-3-8b", Shape(1, 32, 8, 128, 4096, 7, 9))


def test_copies_outgrow_the_cache_and_fit_into_memory():
    for case in README + SWEEP:
        copies = copies_that_fit(case.shape, 2, turns=10_000, memory=1 << 40)
        assert copies >= 3 and copies * case.shape.dense_elements * 2 >= CACHE_BYTES
    short, long = sized("llama-3-8b", 1, 1024).shape, sized("llama-3-8b", 1, 1 << 20).shape
    assert copies_that_fit(short, 2, turns=150, memory=None) == 150, "no copy is used twice: more would be in vain"
    assert copies_that_fit(short, 2, turns=150, memory=100 << 20) == 0, "too few would lie in the cache"
    one = long.dense_elements * 4 * 3 // 2
    assert copies_that_fit(long, 4, turns=150, memory=3 * one) == 1, "larger than any cache by itself"
    assert copies_that_fit(long, 4, turns=150, memory=one) == 0
    assert copies_that_fit(long, 4, turns=150, memory=one, wanted=1) == 0
    assert copies_that_fit(short, 4, turns=150, memory=1 << 40, wanted=1) == 1


@pytest.mark.parametrize("copies", (1, 2, 3, 4, 12))
def test_a_walk_never_stays_and_gives_every_opponent_every_copy(copies):
    steps = walk(copies)
    turns = [next(steps) for _ in range(3 * copies * copies)]
    assert copies == 1 or all(a != b for a, b in itertools.pairwise(turns))
    if copies > 2:
        assert all(set(turns[opponent::3]) == set(range(copies)) for opponent in range(3))


def timing(*times):
    return Timing(list(times), 1000)


def test_a_ratio_within_the_noise_is_unsure():
    clear = Ratio.of(timing(20, 21, 22, 21), timing(10, 10, 11, 10))
    assert (
        clear.sure and 2 <= clear.value < 2.2 and clear.low < clear.value <= clear.high and "unsure" not in str(clear)
    )
    assert not Ratio.of(timing(10, 11, 30, 9), timing(10, 10, 11, 10)).sure
    slower = Ratio.of(timing(10, 10, 11, 10), timing(20, 21, 22, 21))
    assert slower.sure and slower.value < 1, "a loss can be as certain as a gain"
    assert "unsure" in str(Ratio.of(timing(20, 5, 22, 21), timing(10, 10, 40, 10)))


def test_no_cuda_device_is_one_clear_line():
    command = [sys.executable, str(ROOT / "benchmarks" / "attention.py"), "--device", "cuda"]
    environment = {"PYTHONPATH": str(ROOT / "kernels"), "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 1 and not run.stdout
    (line,) = run.stderr.splitlines()
    assert line.startswith("no CUDA device")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other on a busy machine, call after call
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch, one_thread):
    monkeypatch.setattr(attention_cpu, "chosen", lambda args: list(TINY))
    monkeypatch.setattr(attention_cpu, "streaming_read", lambda: 20.0)
    monkeypatch.setattr(attention_cpu, "fixed_cost", lambda call: 25.0)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["attention.py", "--rounds", "4", "--copies", "3", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        attention.main()
    return stop.value.code


@pytest.mark.usefixtures("tiny")
def test_a_run_from_end_to_end(monkeypatch, tmp_path, capsys):
    out, table, image = tmp_path / "rows.json", tmp_path / "rows.md", tmp_path / "new" / "plot.png"
    assert run(monkeypatch, "--json", out, "--markdown", table, "--plot", image) == 0
    result = json.loads(out.read_text())
    assert set(result) == {"machine", "operator", "settings", "fixed_cost_us", "rows", "left_out"}
    assert {"torch", "transformers", "sparq commit", "processor"} <= set(result["machine"])
    assert result["settings"]["rounds"] == 4 and result["settings"]["json"] == str(out)
    assert result["fixed_cost_us"] == {SPARQ: 25.0, KERNEL: 25.0} and result["left_out"] == []
    assert len(result["rows"]) == 4
    for row in result["rows"]:
        assert {KERNEL, SPARQ, REFERENCE, row["torch_way"]} <= set(row["timings"]) and not row["wrong"]
        assert set(row["torch_tried_ms"]) == {"SDPA packed", "SDPA enable_gqa", "matmul"}
        assert set(row["vs_torch"]) == set(row["vs_kernel"]) == {"value", "low", "high", "sure"}
        ours = row["timings"][SPARQ]
        assert ours["bytes"] == row["timings"][KERNEL]["bytes"] / row["bytes_ratio"]
        assert ours["streaming_share"] == ours["gbs"] / 20 and ours["turns"] == 4
    printed = capsys.readouterr().out
    assert "vs C++ dense" in printed and "WRONG" not in printed and "WRONG" not in table.read_text()
    assert image.read_bytes().startswith(b"\x89PNG")


def scaled(call, factor):
    return lambda *args: call(*args) * factor


@pytest.mark.usefixtures("tiny")
def test_no_ratio_for_a_wrong_operator(monkeypatch, tmp_path, capsys):
    decode = sparq_kernels.decode
    monkeypatch.setattr(sparq_kernels, "decode", lambda *args, **knobs: broken(decode(*args, **knobs)))
    out = tmp_path / "rows.json"
    assert run(monkeypatch, "--json", out) == 1
    rows = json.loads(out.read_text())["rows"]
    assert all(row["vs_torch"] is row["vs_kernel"] is None and set(row["wrong"]) == {SPARQ} for row in rows)
    printed = capsys.readouterr().out
    assert printed.count("WRONG") == 2 * len(rows) and "alpha differs from the reference" in printed


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("factor", (1.02, float("nan")))
def test_no_ratio_for_a_wrong_dense_kernel(monkeypatch, tmp_path, capsys, factor):
    monkeypatch.setattr(attention_cpu, "dense_attention", scaled(attention_cpu.dense_attention, factor))
    out = tmp_path / "rows.json"
    assert run(monkeypatch, "--json", out) == 1
    rows = json.loads(out.read_text())["rows"]
    assert all(row["vs_torch"] and row["vs_kernel"] is None and set(row["wrong"]) == {KERNEL} for row in rows)
    assert capsys.readouterr().out.count("WRONG") == len(rows)


@pytest.mark.usefixtures("tiny")
def test_a_wrong_way_of_pytorch_does_not_count(monkeypatch, tmp_path):
    ways = attention_cpu.CPU_WAYS
    monkeypatch.setitem(ways, "SDPA packed", scaled(ways["SDPA packed"], 1.1))
    out = tmp_path / "rows.json"
    assert run(monkeypatch, "--json", out) == 0
    for row in json.loads(out.read_text())["rows"]:
        assert "SDPA packed" in row["wrong"] and row["torch_way"] != "SDPA packed" and row["vs_torch"]


@pytest.mark.usefixtures("tiny")
def test_without_a_compiler_the_rest_is_measured(monkeypatch, capsys):
    def fail(*args):
        raise CompilerError("there is no C++ compiler")

    monkeypatch.setattr(attention_cpu, "dense_attention", fail)
    monkeypatch.setattr(attention_cpu, "fixed_cost", lambda call: call(TINY[0].shape, None) if call is fail else 1.0)
    assert run(monkeypatch, "--dtypes", "float32") == 0
    printed = capsys.readouterr().out
    assert "C++ dense: there is no C++ compiler" in printed and "WRONG" not in printed


@pytest.mark.usefixtures("tiny")
def test_what_does_not_fit_into_memory_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(attention_cpu, "available_memory", lambda: 50_000)
    out = tmp_path / "rows.json"
    assert run(monkeypatch, "--json", out, "--dtypes", "float16") == 0
    result = json.loads(out.read_text())
    assert result["rows"] == [] and len(result["left_out"]) == 2
    assert "left out, too large for this machine's memory: tiny B=1 4/2 S=96" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_one_copy_lets_each_opponent_run_alone(monkeypatch):
    order = []
    sparq = attention_cpu.sparq
    monkeypatch.setattr(attention_cpu, "sparq", lambda *args: order.append(SPARQ) or sparq(*args))
    dense = attention_cpu.dense_attention
    monkeypatch.setattr(attention_cpu, "dense_attention", lambda *args: order.append(KERNEL) or dense(*args))
    row = attention_cpu.measure(TINY[0], "float32", rounds=4, copies=1, alone=True)
    assert order[-12:] == [KERNEL] * 6 + [SPARQ] * 6 and len(row.timings[SPARQ].times) == 4


def test_a_plot_leaves_wrong_and_missing_opponents_out(tmp_path):
    row = Row(TINY[0], "float32", 3, 20.0, {SPARQ: timing(1, 2), KERNEL: timing(3, 4)}, wrong={KERNEL: "differs"})
    plot(tmp_path / "plot.png", [row.json()])
    assert (tmp_path / "plot.png").exists()
    (cells,) = main_grid([row]).rows
    assert cells[2] == "–" and cells[-3:-1] == ("–", "WRONG")


def broken(out):
    return out._replace(alpha=out.alpha + torch.tensor(0.01))

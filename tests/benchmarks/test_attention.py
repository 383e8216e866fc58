"""The attention benchmark's command line, and its CPU mode on tiny shapes."""

import json
import subprocess
import sys
from pathlib import Path

import attention
import attention_cpu
import pytest
import sparq_kernels
import torch
from workload import Shape

ROOT = Path(__file__).parents[2]


def test_each_device_has_its_defaults():
    cpu, gpu = attention.parse([]), attention.parse(["--device", "cuda", "--profile"])
    assert cpu.rows == [0, 1, 2, 3] and cpu.dtypes == ["float32", "bfloat16"] and not cpu.profile
    assert gpu.rows == [0, 1, 2, 3, 4, 5] and gpu.dtypes == ["float16", "bfloat16"] and gpu.profile
    assert cpu.rounds == gpu.rounds == 30 and cpu.copies is gpu.copies is cpu.json is gpu.markdown is None
    assert attention.parse(["--device", "cuda", "--rows", "5", "--dtypes", "float32"]).dtypes == ["float32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--rows", "4"], "--rows must be 0 to 3"),
        (["--device", "cuda", "--rows", "-1"], "--rows must be 0 to 5"),
        (["--rounds", "1"], "--rounds must be at least 2"),
        (["--copies", "0"], "--copies must be at least 1"),
        (["--profile"], "--profile needs --device cuda"),
        (["--device", "tpu"], "invalid choice"),
    ),
)
def test_bad_arguments_are_refused_in_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        attention.parse(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


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


@pytest.mark.parametrize("right", (True, False))
@pytest.mark.usefixtures("one_thread")
def test_cpu_rows(monkeypatch, tmp_path, capsys, right):
    monkeypatch.setattr(attention_cpu, "SHAPES", (Shape(1, 4, 2, 16, 96, 8, 12), Shape(2, 2, 2, 16, 64, 8, 12)))
    monkeypatch.setattr(attention_cpu, "streaming_read", lambda: 20.0)
    decode = sparq_kernels.decode
    if not right:
        monkeypatch.setattr(sparq_kernels, "decode", lambda *args, **knobs: broken(decode(*args, **knobs)))
    out, table = tmp_path / "rows.json", tmp_path / "rows.md"
    command = ["attention.py", "--rounds", "4", "--copies", "2", "--json", str(out), "--markdown", str(table)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(attention.attention_cpu, "fixed_cost", lambda: 25.0)
    with pytest.raises(SystemExit) as stop:
        attention.main()
    assert stop.value.code == (0 if right else 1)
    result = json.loads(out.read_text())
    assert set(result) == {"machine", "fixed_cost_us", "rows"} and len(result["rows"]) == 4
    assert [row["correct"] for row in result["rows"]] == [right] * 4
    assert all((row["speedup"] is None) != right for row in result["rows"])
    assert ("WRONG" in capsys.readouterr().out) == ("WRONG" in table.read_text()) == (not right)


def broken(out):
    return out._replace(alpha=out.alpha + torch.tensor(0.01))

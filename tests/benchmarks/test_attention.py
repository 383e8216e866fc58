"""The attention benchmark's command line and its rows, on tiny shapes."""

import itertools
import json
import sys

import attention
import pytest
import sparq_kernels
import torch
from attention import CACHE_BYTES, README, SWEEP, chosen, copies_that_fit, sized, walk
from harness import SPARQ
from sparq_kernels.cpu import CompilerError
from tables import KERNEL, torch_way
from workload import Case, Shape

TINY = (Case("tiny", Shape(1, 4, 2, 16, 300, 8, 30, "int4")), Case("tiny", Shape(2, 2, 2, 16, 64, 8, 12)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--rounds", "0"], "argument --rounds: '0' must be an integer of at least 1"),
        (["--contexts", "4096", "0"], "argument --contexts: '0' must be an integer of at least 1"),
        (["--ratio", "0.5"], "argument --ratio: '0.5' must be an integer of at least 1"),
        (["--shapes", "gpt-5"], "invalid choice"),
    ),
)
def test_bad_arguments_are_refused_in_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        attention.parse(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_arguments_choose_the_cases():
    assert chosen(attention.parse([])) == list(README + SWEEP)
    grid = "--shapes llama-3.2-1b llama-2-7b --contexts 1024 100 --batches 1 4 --ratio 4"
    shapes = [case.shape for case in chosen(attention.parse(grid.split()))]
    assert len(shapes) == 8 and shapes[0] == Shape(1, 32, 8, 64, 1024, 64, 128, "int4")
    assert shapes[-1] == Shape(4, 32, 32, 128, 100, 128, 100, "int4"), "k is never more than there are"
    (only, *_) = chosen(attention.parse(["--r", "7", "--k", "9", "--index", "full"]))
    assert only == Case("llama-3-8b", Shape(1, 32, 8, 128, 4096, 7, 9))
    paper = ["--shapes", "llama-3.2-1b", "--contexts", "4096", "--index", "full"]
    assert chosen(attention.parse(paper))[0].shape == Shape(1, 32, 8, 64, 4096, 8, 256)
    with pytest.raises(ValueError, match="r must not be larger than the model's head_dim=64, got r=65"):
        chosen(attention.parse([*paper, "--r", "65"]))


def test_copies_outgrow_the_cache_and_fit_into_memory():
    for case in README + SWEEP:
        copies = copies_that_fit(case.shape, 2, memory=1 << 40)
        assert copies * case.shape.dense_elements * 2 >= CACHE_BYTES
    short, long = sized("llama-3-8b", 1, 1024).shape, sized("llama-3-8b", 1, 1 << 20).shape
    assert copies_that_fit(sized("llama-3-8b", 1, 131072).shape, 4, memory=None) == 3, "none follows itself"
    assert copies_that_fit(short, 2, memory=100 << 20) == 0, "too few would lie in the cache"
    assert copies_that_fit(long, 4, memory=None) == 1, "larger than any cache by itself"
    one = long.dense_elements * 4 * 3 // 2
    assert copies_that_fit(long, 4, memory=one) == copies_that_fit(long, 4, memory=one, wanted=1) == 0
    assert copies_that_fit(short, 4, memory=1 << 40, wanted=1) == 1


@pytest.mark.parametrize("copies", (1, 2, 3, 4, 12))
def test_a_walk_never_stays_and_gives_every_opponent_every_copy(copies):
    steps = walk(copies)
    turns = [next(steps) for _ in range(3 * copies * copies)]
    assert copies == 1 or all(a != b for a, b in itertools.pairwise(turns))
    if copies > 2:
        assert all(set(turns[opponent::3]) == set(range(copies)) for opponent in range(3))


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other on a busy machine, call after call
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch, one_thread):
    monkeypatch.setattr(attention, "chosen", lambda args: list(TINY))
    monkeypatch.setattr(attention, "streaming_read", lambda: 20.0)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["attention.py", "--rounds", "4", "--copies", "3", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        attention.main()
    return stop.value.code


@pytest.mark.usefixtures("tiny")
def test_a_run_from_end_to_end(monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.json"
    assert run(monkeypatch, "--json", out) == 0
    result = json.loads(out.read_text())
    assert set(result) == {"machine", "operator", "settings", "rows", "left_out"}
    assert {"torch", "transformers", "sparq commit", "processor"} <= set(result["machine"])
    assert result["settings"]["rounds"] == 4 and str(tmp_path) not in out.read_text()
    assert len(result["rows"]) == 4 and result["left_out"] == []
    for row in result["rows"]:
        ways, ratios = row["ways"], row["ratios"][SPARQ]
        assert {KERNEL, torch_way(row)} <= set(ratios) and not any("wrong" in way for way in ways.values())
        assert set(row["tried"]) == {"SDPA packed", "SDPA enable_gqa", "matmul"}
        assert ways[SPARQ]["bytes"] == ways[KERNEL]["bytes"] / row["bytes_ratio"] and ways[SPARQ]["time"]["count"] == 4
    printed = capsys.readouterr().out
    assert "vs C++" in printed and "WRONG" not in printed and "memory reads 20.0 GB/s" in printed


def wrong_in(row):
    return {name for name, way in row["ways"].items() if "wrong" in way}


def scaled(call, factor):
    return lambda *args: call(*args) * factor


@pytest.mark.usefixtures("tiny")
def test_no_ratio_for_a_wrong_operator(monkeypatch, tmp_path, capsys):
    decode = sparq_kernels.decode
    monkeypatch.setattr(sparq_kernels, "decode", lambda *args, **knobs: broken(decode(*args, **knobs)))
    out = tmp_path / "rows.json"
    assert run(monkeypatch, "--json", out) == 1
    rows = json.loads(out.read_text())["rows"]
    assert all(not row["ratios"].get(SPARQ) and wrong_in(row) == {SPARQ} for row in rows)
    printed = capsys.readouterr().out
    assert printed.count("WRONG") == 2 * len(rows) and "alpha differs from the reference" in printed


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("factor", (1.02, float("nan")))
def test_no_ratio_for_a_wrong_dense_kernel(monkeypatch, tmp_path, capsys, factor):
    monkeypatch.setattr(attention, "dense_attention", scaled(attention.dense_attention, factor))
    out = tmp_path / "rows.json"
    assert run(monkeypatch, "--json", out) == 1
    rows = json.loads(out.read_text())["rows"]
    assert all(torch_way(row) in row["ratios"][SPARQ] and wrong_in(row) == {KERNEL} for row in rows)
    assert not any(KERNEL in row["ratios"][SPARQ] for row in rows)
    assert capsys.readouterr().out.count("WRONG") == len(rows)


@pytest.mark.usefixtures("tiny")
def test_a_wrong_way_of_pytorch_does_not_count(monkeypatch, tmp_path):
    ways = attention.TORCH_WAYS
    monkeypatch.setitem(ways, "SDPA packed", scaled(ways["SDPA packed"], 1.1))
    out = tmp_path / "rows.json"
    assert run(monkeypatch, "--json", out) == 0
    for row in json.loads(out.read_text())["rows"]:
        assert wrong_in(row) == {"SDPA packed"} and torch_way(row) in row["ratios"][SPARQ]


@pytest.mark.usefixtures("tiny")
def test_without_a_compiler_the_rest_is_measured(monkeypatch, capsys):
    def fail(*args):
        raise CompilerError("there is no C++ compiler")

    monkeypatch.setattr(attention, "dense_attention", fail)
    assert run(monkeypatch, "--dtypes", "float32") == 0
    printed = capsys.readouterr().out
    assert "C++ dense: there is no C++ compiler" in printed and "WRONG" not in printed


@pytest.mark.usefixtures("tiny")
def test_what_does_not_fit_into_memory_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(attention, "available_memory", lambda: 50_000)
    out = tmp_path / "rows.json"
    assert run(monkeypatch, "--json", out, "--dtypes", "float16") == 0
    result = json.loads(out.read_text())
    assert result["rows"] == [] and len(result["left_out"]) == 2
    assert "left out, too large for this machine's memory: tiny B=1 4/2 S=300" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_one_copy_lets_each_opponent_run_alone(monkeypatch):
    order = []
    sparq = attention.sparq
    monkeypatch.setattr(attention, "sparq", lambda *args: order.append(SPARQ) or sparq(*args))
    dense = attention.dense_attention
    monkeypatch.setattr(attention, "dense_attention", lambda *args: order.append(KERNEL) or dense(*args))
    row = attention.measure(TINY[0], "float32", rounds=4, copies=1, alone=True)
    assert order[-12:] == [KERNEL] * 6 + [SPARQ] * 6 and len(row.ways[SPARQ].seconds) == 4


def broken(out):
    return out._replace(alpha=out.alpha + torch.tensor(0.01))

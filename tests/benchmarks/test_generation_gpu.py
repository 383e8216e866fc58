"""`generation.py --gpu`, on the CPU: its rows, what it leaves out and why, and that a wrong answer is no speed-up."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import generation
import generation_gpu
import graphed
import model_shapes
import pytest
import torch
from generation_gpu import GPU_WAYS, LARGE, NO_TIME, OUT_OF_MEMORY, ROWS, SMALL, Cell, Clock, Row
from model_shapes import Heads
from ways import GRAPHED, SPARQ_GRAPHED, STATIC, GraphRunner, Runner, Way, make_runner

WAYS = {
    "stock dynamic",
    "stock static",
    "stock static, graph",
    "SparQ's cache",
    "SparQ dynamic",
    "SparQ static, graph",
}


@pytest.fixture(autouse=True)
def quick_and_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(generation_gpu, "TINY_ROWS", [(generation_gpu.TINY, 300, 2)])
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, dict]]:
    def call(*arguments: str) -> tuple[int, dict]:
        out = tmp_path / "rows.json"
        given = ["--gpu", "--device", "cpu", "--tiny", "--tokens", "3", "--json", str(out), *arguments]
        monkeypatch.setattr(sys, "argv", ["generation", *given])
        with pytest.raises(SystemExit) as stop:
            generation.main()
        assert str(tmp_path) not in out.read_text()
        return stop.value.code, json.loads(out.read_text())

    return call


def test_every_way_is_measured(run: Callable, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_gpu, "TINY_ROWS", [(generation_gpu.TINY, 300, 2), (generation_gpu.TINY, 200, 1)])
    code, result = run()
    assert code == 0 and len(capsys.readouterr().out.splitlines()) == len(result["rows"]) == 2
    for row in result["rows"]:
        assert set(row["ways"]) == WAYS and row["wrong"] is row["unchecked"] is None
        for way in row["ways"].values():
            assert way["steps"] == 2 * 3 and way["seconds_per_token"] > 0 and way["missing"] is None
            assert way["cache_bytes"] > 0 and way["peak_bytes"] is None
        assert row["sparse_steps"] > 0 and not row["dense_steps"] and 0 < row["mean_alpha"] <= 1
        seconds = {name: way["seconds_per_token"] for name, way in row["ways"].items()}
        assert row["best_stock"] == min((name for name in WAYS if name.startswith("stock")), key=seconds.get)
        assert row["best_sparq"] == min(("SparQ dynamic", "SparQ static, graph"), key=seconds.get)
        assert row["speedup"] is None if result["operator"] == "reference" else row["speedup"]["value"] > 0
    times, memory = result["tables"]
    assert len(times["rows"]) == len(memory["rows"]) == 2 and set(times["columns"]) > WAYS
    assert all(len(line) == len(table["columns"]) for table in (times, memory) for line in table["rows"])


def test_what_there_is_no_time_for_is_said(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_gpu, "TINY_ROWS", [(generation_gpu.TINY, 300, 2), (generation_gpu.TINY, 200, 1)])
    now = time.monotonic()
    turns: list[str] = []

    def make(model: object, way: Way, *args: object, **kwargs: object) -> object:
        turns.append(way.name)
        return make_runner(model, way, *args, **kwargs)

    monkeypatch.setattr(generation_gpu, "make_runner", make)
    monkeypatch.setattr(generation_gpu.time, "monotonic", lambda: now + 100 * (len(turns) > 2))
    code, result = run("--seconds", "50")
    first, second = result["rows"]
    assert code == 0 and len(turns) == 3
    missing = [name for name, way in first["ways"].items() if way["missing"] == NO_TIME]
    assert set(missing) == WAYS - set(turns) and first["speedup"] is None
    assert {way["missing"] for way in second["ways"].values()} == {NO_TIME}
    assert result["tables"][0]["rows"][1].count(NO_TIME) == len(WAYS)


@pytest.mark.parametrize("where", ["filling", "capture"])
def test_out_of_memory_is_a_cell_and_the_rest_goes_on(
    run: Callable, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Once, because the others' caches lie there: they are given up. Then, because it does not fit alone."""
    tries: list[bool] = []

    def full(*args: object) -> None:
        tries.append(True)
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError as error:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from error

    def make(model: object, way: Way, *args: object, **kwargs: object) -> object:
        if way is GRAPHED:
            full()
        return make_runner(model, way, *args, **kwargs)

    if where == "filling":
        monkeypatch.setattr(generation_gpu, "make_runner", make)
    else:
        replayed = graphed.replayed
        monkeypatch.setattr(
            graphed, "replayed", lambda step: full() if "sparq" not in implementation(step) else replayed(step)
        )
    code, result = run()
    assert code == 0 and len(tries) == 2 * len(result["rows"])
    for row in result["rows"]:
        assert row["ways"][GRAPHED.name]["missing"] == OUT_OF_MEMORY and not row["are_caches_kept"]
        others = [way for name, way in row["ways"].items() if name != GRAPHED.name]
        assert all(way["steps"] == 6 and way["missing"] is None for way in others)
        assert row["speedup"] is not None or result["operator"] == "reference"  # the best that fits is the best


def implementation(step: graphed.Step) -> str:
    return step.model.config._attn_implementation


def test_caches_that_do_not_fit_side_by_side_take_turns(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make(model: object, way: Way, *args: object, **kwargs: object) -> object:
        made.append(way.name)
        return make_runner(model, way, *args, **kwargs)

    monkeypatch.setattr(generation_gpu, "make_runner", make)
    monkeypatch.setattr(generation_gpu, "fits", lambda *args: False)
    code, result = run()
    names = [way.name for way in GPU_WAYS]
    assert code == 0 and made == [*names, *names[::-1]]
    assert all(way["steps"] == 6 for row in result["rows"] for way in row["ways"].values())
    assert not any(row["are_caches_kept"] for row in result["rows"])


def test_a_way_that_fails_is_no_opponent(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is there a speed-up over stock's best, when nobody knows what that would have been."""

    def make(model: object, way: Way, *args: object, **kwargs: object) -> object:
        if way is STATIC:
            raise ValueError("no such cache\nat all")
        return make_runner(model, way, *args, **kwargs)

    monkeypatch.setattr(generation_gpu, "make_runner", make)
    monkeypatch.setattr(generation_gpu, "_told", set())
    code, result = run()
    assert code == 0 and all(row["speedup"] is None for row in result["rows"])
    assert all(row["ways"]["stock static"]["missing"] == "ValueError: no such cache" for row in result["rows"])


@pytest.mark.parametrize("what", ["operator", "model", "graph"])
def test_a_wrong_answer_is_no_speed_up(run: Callable, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    if what == "graph":
        monkeypatch.setattr(graphed, "replay_error", lambda *args: "it differs")
    else:
        monkeypatch.setattr(generation_gpu, f"wrong_{what}", lambda *args: "it differs")
    code, result = run()
    assert code == 1
    for row in result["rows"]:
        assert row["wrong"].endswith("it differs") and row["speedup"] is None
    assert all("WRONG" in " ".join(line) for line in result["tables"][0]["rows"])
    (told,) = result["wrong"]
    assert told.startswith("tiny, 300 cached, batch 2: ") and told.endswith("it differs")


def test_a_check_that_there_is_no_memory_for(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generation_gpu, "wrong_operator", full)
    code, result = run()
    assert code == 0
    assert all(row["unchecked"] == OUT_OF_MEMORY and row["speedup"] is None for row in result["rows"])


def test_the_rows_are_those_that_matter() -> None:
    assert set(ROWS) == {(m, c, b) for m in (LARGE, SMALL) for c in (4096, 16384, 65536, 131072) for b in (1, 8)}
    assert len(ROWS) == len(set(ROWS)) and set(ROWS[:2]) == {(LARGE, 65536, 1), (LARGE, 131072, 1)}
    config = model_shapes.SHAPES[LARGE]()
    assert Heads.of(config) == Heads(32, 8, 128) and config.num_hidden_layers == 32 and not config.tie_word_embeddings
    parameters = config.vocab_size * config.hidden_size * 2 + 32 * (
        config.hidden_size * (2 * 4096 + 2 * 1024) + 3 * config.hidden_size * config.intermediate_size
    )
    assert parameters == pytest.approx(8.03e9, rel=1e-3)


def test_the_best_that_was_measured() -> None:
    row = Row("m", "bfloat16", 4096, 1, "triton", sparse_steps=1)
    for name, seconds in zip(row.cells, (4.0, 1.0, 3.0, 2.0, 5.0, 0.5), strict=True):
        row.cells[name].seconds = [seconds] * 3
    assert row.best_stock.way is GRAPHED and row.best_sparq.way is SPARQ_GRAPHED  # a dense cache is neither
    assert row.speedup.value == 3.0
    row.cells[GRAPHED.name] = Cell(GRAPHED, missing=OUT_OF_MEMORY)
    assert row.speedup.value == 4.0
    row.cells[STATIC.name] = Cell(STATIC, missing=NO_TIME)
    assert row.speedup is None
    row.cells[STATIC.name] = Cell(STATIC, [5.0])
    assert row.speedup.value == 4.0
    row.operator = "reference"
    assert row.speedup is None
    row.operator, row.sparse_steps = "triton", 0
    assert row.speedup is None


def test_the_clock_leaves_room_for_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(generation_gpu.time, "monotonic", lambda: now[0])
    clock = Clock(100)
    assert clock.suffices()
    now[0] = 30.0
    clock.note(0.0)  # one that took 30 s, compiling
    assert clock.suffices()
    now[0] = 45.0
    assert not clock.suffices()
    for _ in range(2 * len(GPU_WAYS)):
        clock.note(44.0)  # it has become faster
    assert clock.suffices()


@pytest.mark.parametrize("way", [GRAPHED, SPARQ_GRAPHED])
def test_a_graph_runner_has_room_for_what_it_does(way: Way) -> None:
    model = model_shapes.from_config(generation_gpu.tiny(), torch.float32)
    runner = make_runner(model, way, context=256, batch=2, room=20, knobs=generation_gpu.TINY_KNOBS, prefill=False)
    assert isinstance(runner, GraphRunner) and len(runner.decode(13)) == 13 and len(runner.decode(7)) == 7
    assert int(runner.cache.get_seq_length()) == runner.cache.layers[0].max_cache_len and runner.wrong is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--graphs"], "--graphs needs --device cuda"),
        (["--device", "cuda", "--profile"], "--profile needs --device cpu"),
        (["--tiny"], "--tiny needs --gpu"),
        (["--gpu"], "--gpu on the CPU needs --tiny"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        generation.parse(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_graphs_are_ways_of_the_ordinary_benchmark() -> None:
    args = generation.parse(["--device", "cuda", "--graphs", "--dtypes", "float16"])
    assert {GRAPHED, SPARQ_GRAPHED} < set(generation.ways_of(args)) and args.dtypes == ["float16"]
    assert isinstance(args, argparse.Namespace) and not {GRAPHED} & set(generation.ways_of(generation.parse([])))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [["--gpu"], []])
def test_no_gpu_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["generation", "--device", "cuda", *arguments])
    with pytest.raises(SystemExit, match="no CUDA device"):
        generation.main()


def test_a_way_far_behind_is_timed_just_a_little(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, others = GraphRunner.decode, Runner.decode
    # A second more for the others, too: on a busy machine one of them may be far behind by itself.
    monkeypatch.setattr(GraphRunner, "decode", lambda self, tokens: [100 + s for s in decode(self, tokens)])
    monkeypatch.setattr(Runner, "decode", lambda self, tokens: [1 + s for s in others(self, tokens)])
    _, result = run("--tokens", "5")
    (row,) = result["rows"]
    steps = {name: way["steps"] for name, way in row["ways"].items()}
    assert steps == {name: 2 * (generation_gpu.FEW if name.endswith("graph") else 5) for name in WAYS}
    assert row["best_stock"] in ("stock dynamic", "stock static") and row["best_sparq"] == "SparQ dynamic"

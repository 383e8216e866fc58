"""Stage `generation`, on the CPU: its rows, what it leaves out and why, and that a wrong answer is no speed-up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import models
import pytest
import torch
from gpu_stages import generation, graph_step
from gpu_stages.generation import GPU_WAYS, LARGE, NO_TIME, OUT_OF_MEMORY, ROWS, SMALL, ModelRow, TimeLeft
from gpu_stages.stage import Stage
from harness import Measured
from models import Heads
from opponents import GRAPHED, SPARQ_GRAPHED, STATIC, GraphRunner, Runner, Way, make_runner

pytestmark = pytest.mark.slow

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
    monkeypatch.setattr(generation, "TINY_ROWS", [(generation.TINY, 300, 2)])
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict]:
    def call(seconds: float = 600, tokens: int = 3) -> dict:
        out = tmp_path / "rows.json"
        monkeypatch.setattr(generation, "TOKENS", tokens)
        stage = Stage("cpu", seconds, out)
        stage.ends = time.monotonic() + seconds
        generation.main(stage)
        return json.loads(out.read_text())

    return call


def test_every_way_is_measured(run: Callable, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "TINY_ROWS", [(generation.TINY, 300, 2), (generation.TINY, 200, 1)])
    result = run()
    assert len(capsys.readouterr().out.splitlines()) == len(result["rows"]) == 2
    for row in result["rows"]:
        assert set(row["ways"]) == WAYS and row["wrong"] is row["unchecked"] is None
        for way in row["ways"].values():
            assert way["time"]["count"] == 2 * 3 and way["time"]["median"] > 0 and "missing" not in way
            assert way["cache_bytes"] > 0 and "peak_bytes" not in way
        assert row["sparse_steps"] > 0 and not row["dense_steps"] and 0 < row["mean_alpha"] <= 1
        seconds = {name: way["time"]["median"] for name, way in row["ways"].items()}
        assert row["best_stock"] == min((name for name in WAYS if name.startswith("stock")), key=seconds.get)
        assert row["best_sparq"] == min(("SparQ dynamic", "SparQ static, graph"), key=seconds.get)
        assert row["speedup"] is None if row["operator"] == "reference" else row["speedup"]["value"] > 0
    times, memory = result["tables"]
    assert len(times["rows"]) == len(memory["rows"]) == 2 and set(times["columns"]) > WAYS
    assert all(len(line) == len(table["columns"]) for table in (times, memory) for line in table["rows"])


def test_what_there_is_no_time_for_is_said(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "TINY_ROWS", [(generation.TINY, 300, 2), (generation.TINY, 200, 1)])
    now = time.monotonic()
    turns: list[str] = []

    def make(model: object, way: Way, *args: object, **kwargs: object) -> object:
        turns.append(way.name)
        return make_runner(model, way, *args, **kwargs)

    monkeypatch.setattr(generation, "make_runner", make)
    monkeypatch.setattr(generation.time, "monotonic", lambda: now + 100 * (len(turns) > 2))
    result = run(seconds=50)
    first, second = result["rows"]
    assert len(turns) == 3
    missing = [name for name, way in first["ways"].items() if way.get("missing") == NO_TIME]
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
        monkeypatch.setattr(generation, "make_runner", make)
    else:
        replayed = graph_step.replayed
        monkeypatch.setattr(
            graph_step, "replayed", lambda step: full() if "sparq" not in implementation(step) else replayed(step)
        )
    result = run()
    assert len(tries) == 2 * len(result["rows"])
    for row in result["rows"]:
        assert row["ways"][GRAPHED.name]["missing"] == OUT_OF_MEMORY and not row["are_caches_kept"]
        others = [way for name, way in row["ways"].items() if name != GRAPHED.name]
        assert all(way["time"]["count"] == 6 and "missing" not in way for way in others)
        assert row["speedup"] is not None or row["operator"] == "reference"  # the best that fits is the best


def implementation(step: graph_step.Step) -> str:
    return step.model.config._attn_implementation


def test_caches_that_do_not_fit_side_by_side_take_turns(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make(model: object, way: Way, *args: object, **kwargs: object) -> object:
        made.append(way.name)
        return make_runner(model, way, *args, **kwargs)

    monkeypatch.setattr(generation, "make_runner", make)
    monkeypatch.setattr(generation, "fits", lambda *args: False)
    result = run()
    names = [way.name for way in GPU_WAYS]
    assert made == [*names, *names[::-1]]
    assert all(way["time"]["count"] == 6 for row in result["rows"] for way in row["ways"].values())
    assert not any(row["are_caches_kept"] for row in result["rows"])


def test_a_way_that_fails_is_no_opponent(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is there a speed-up over stock's best, when nobody knows what that would have been."""

    def make(model: object, way: Way, *args: object, **kwargs: object) -> object:
        if way is STATIC:
            raise ValueError("no such cache\nat all")
        return make_runner(model, way, *args, **kwargs)

    monkeypatch.setattr(generation, "make_runner", make)
    result = run()
    assert all(row["speedup"] is None for row in result["rows"])
    assert all(row["ways"]["stock static"]["missing"] == "ValueError: no such cache" for row in result["rows"])


@pytest.mark.parametrize("what", ["operator", "model", "graph"])
def test_a_wrong_answer_is_no_speed_up(run: Callable, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    if what == "graph":
        monkeypatch.setattr(graph_step, "replay_error", lambda *args: "it differs")
    else:
        monkeypatch.setattr(generation, f"wrong_{what}", lambda *args: "it differs")
    result = run()
    for row in result["rows"]:
        assert row["wrong"].endswith("it differs") and row["speedup"] is None
    assert all("WRONG" in " ".join(line) for line in result["tables"][0]["rows"])
    (told,) = result["wrong"]
    assert told.startswith("tiny, 300 cached, batch 2: ") and told.endswith("it differs")


def test_a_check_that_there_is_no_memory_for(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generation, "wrong_operator", full)
    result = run()
    assert all(row["unchecked"] == OUT_OF_MEMORY and row["speedup"] is None for row in result["rows"])


def test_the_rows_are_those_that_matter() -> None:
    assert set(ROWS) == {(m, c, b) for m in (LARGE, SMALL) for c in (4096, 16384, 65536, 131072) for b in (1, 8)}
    assert len(ROWS) == len(set(ROWS)) and set(ROWS[:2]) == {(LARGE, 65536, 1), (LARGE, 131072, 1)}
    config = models.SHAPES[LARGE]()
    assert Heads.of(config) == Heads(32, 8, 128) and config.num_hidden_layers == 32 and not config.tie_word_embeddings
    parameters = config.vocab_size * config.hidden_size * 2 + 32 * (
        config.hidden_size * (2 * 4096 + 2 * 1024) + 3 * config.hidden_size * config.intermediate_size
    )
    assert parameters == pytest.approx(8.03e9, rel=1e-3)


def test_the_best_that_was_measured() -> None:
    row = ModelRow({}, operator="triton", sparse_steps=1)
    for way, seconds in zip(GPU_WAYS, (4.0, 1.0, 3.0, 2.0, 5.0, 0.5), strict=True):
        row.ways[way.name].seconds = [seconds] * 3
    assert (row.best_stock, row.best_sparq) == (GRAPHED.name, SPARQ_GRAPHED.name)  # a dense cache is neither
    assert row.speedup.value == 3.0
    row.ways[GRAPHED.name] = Measured(missing=OUT_OF_MEMORY)
    assert row.speedup.value == 4.0
    row.ways[STATIC.name] = Measured(missing=NO_TIME)
    assert row.speedup is None
    row.ways[STATIC.name] = Measured([5.0])
    assert row.speedup.value == 4.0
    row.operator = "reference"
    assert row.speedup is None
    row.operator, row.sparse_steps = "triton", 0
    assert row.speedup is None


def test_the_clock_leaves_room_for_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(generation.time, "monotonic", lambda: now[0])
    clock = TimeLeft(100)
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
    model = models.from_config(generation.tiny(), torch.float32)
    runner = make_runner(model, way, context=256, batch=2, room=20, knobs=generation.TINY_KNOBS)
    assert isinstance(runner, GraphRunner) and len(runner.decode(13)) == 13 and len(runner.decode(7)) == 7
    assert int(runner.cache.get_seq_length()) == runner.cache.layers[0].max_cache_len and runner.wrong is None


def test_a_way_far_behind_is_timed_just_a_little(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, others = GraphRunner.decode, Runner.decode
    # A second more for the others, too: on a busy machine one of them may be far behind by itself.
    monkeypatch.setattr(GraphRunner, "decode", lambda self, tokens: [100 + s for s in decode(self, tokens)])
    monkeypatch.setattr(Runner, "decode", lambda self, tokens: [1 + s for s in others(self, tokens)])
    result = run(tokens=5)
    (row,) = result["rows"]
    steps = {name: way["time"]["count"] for name, way in row["ways"].items()}
    assert steps == {name: 2 * (generation.FEW if name.endswith("graph") else 5) for name in WAYS}
    assert row["best_stock"] in ("stock dynamic", "stock static") and row["best_sparq"] == "SparQ dynamic"

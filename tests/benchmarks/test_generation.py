"""The whole-model benchmark: its checks, its rows and its command line, on tiny models."""

import importlib.util
import json
import sys

import generation
import models
import opponents
import pytest
import sparq_kernels
import torch
from harness import Measured, Row
from opponents import DYNAMIC, LAYERS_ALONE, OWN_CACHE, SPARQ_WAY, STATIC, bytes_of, make_runner, take_turns, twin
from tables import generation_grid, ways_grid
from transformers import GPTNeoXConfig, LlamaConfig

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
pytestmark = pytest.mark.slow


def tiny_llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )


def tiny_neox() -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch):
    monkeypatch.setitem(models.SHAPES, "tiny-llama", tiny_llama)
    monkeypatch.setitem(models.SHAPES, "tiny-neox", tiny_neox)


@pytest.fixture
def run(monkeypatch, capsys):
    def call(module, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        module.main()
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("name", ("tiny-llama", "tiny-neox"))
def test_every_way_is_measured_and_every_part_of_a_step(run, tmp_path, name):
    out = tmp_path / "rows.json"
    shown = run(
        generation,
        *("--model", name, "--contexts", "300", "--batches", "2", "--dtypes", "float32", "--rounds", "2"),
        *("--tokens", "3", "--profile", "--json", str(out)),
    )
    title = f"{name}: 2 of 3 layers, vocabulary of 256 instead of 300, random weights"
    assert title in " ".join(shown.split())
    result = json.loads(out.read_text())
    assert result["machine"] and result["settings"]["rounds"] == 2 and str(tmp_path) not in out.read_text()
    assert result["model"]["layers"] == 2 and result["model"]["layers_of"] == 3
    (row,) = result["rows"]
    assert set(row["ways"]) == {"layers alone", "stock dynamic", "stock static", "SparQ's cache", "SparQ"}
    for way in row["ways"].values():
        assert way["time"]["count"] == 3 and 0 < way["time"]["low"] <= way["time"]["median"] <= way["time"]["high"]
        assert "first token s" not in way
        assert all(way["parts"][part] > 0 for part in ("attention", "cache update", "linear layers", "generate"))
    assert set(row["ratios"]["SparQ"]) == set(row["ways"]) - {"SparQ"}


@needs_torchao
def test_int8_weights_are_measured_beside_plain_ones(run, tmp_path):
    out = tmp_path / "rows.json"
    run(
        generation,
        *("--model", "tiny-llama", "--contexts", "300", "--dtypes", "bfloat16", "int8", "--rounds", "2"),
        *("--tokens", "2", "--json", str(out)),
    )
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"]["dtype"] for row in rows] == ["bfloat16", "bfloat16, int8 weights"]
    assert all(way["time"]["count"] == 2 for row in rows for way in row["ways"].values())


@needs_torchao
def test_the_linear_layers_of_an_int8_model_and_of_its_twin_are_compiled():
    model = models.build("tiny-llama", torch.bfloat16, layers=2).model
    models.quantize(model)
    for one in (model, twin(model)):
        linear = [module for module in one.modules() if isinstance(module, torch.nn.Linear)]
        assert len(linear) == 2 * 7 + 1 and all(module._compiled_call_impl is not None for module in linear)
        assert {type(module.weight).__name__ for module in linear} == {"Int8Tensor"}


def test_int8_without_torchao_is_one_clear_line(monkeypatch, capsys):
    monkeypatch.setattr(generation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        generation.parse(["--dtypes", "int8"])
    assert "--dtypes int8 needs torchao: pip install" in capsys.readouterr().err


def test_a_real_model_is_prefilled_and_its_place_stays_private(run, tmp_path):
    model = models.build("tiny-llama", torch.float32, layers=None).model
    model.save_pretrained(tmp_path / "folder")
    out = tmp_path / "rows.json"
    run(
        generation,
        *("--model", str(tmp_path / "folder"), "--contexts", "200", "--dtypes", "bfloat16", "--rounds", "1"),
        *("--tokens", "2", "--json", str(out)),
    )
    result = json.loads(out.read_text())
    assert result["model"]["name"] == result["settings"]["model"] == "folder" and str(tmp_path) not in out.read_text()
    assert result["model"]["layers"] == result["model"]["layers_of"] == 3 and not result["model"]["random_weights"]
    ways = result["rows"][0]["ways"].values()
    assert all(way["first token s"] > 0 and way["second s"] > 0 for way in ways)


def test_settings_are_what_was_asked_for():
    demo = generation.parse(["--contexts", "65536", "--dtypes", "bfloat16", "--rounds", "2", "--tokens", "8"])
    assert demo.settings == [(65536, 1)] and demo.dtypes == ["bfloat16"] and not demo.prefill
    assert (demo.rounds, demo.tokens) == (2, 8)
    assert generation.parse(["--contexts", "16384", "65536"]).dtypes == ["float32", "bfloat16"]
    assert generation.parse(["--model", "owner/name"]).prefill
    assert {(512, 1), (131072, 1), (16384, 8)} < set(generation.parse([]).settings)
    assert generation.parse(["--contexts", "7", "9", "--batches", "2"]).settings == [(7, 2), (9, 2)]
    assert len(generation.parse(["--batches", "2", "3"]).settings) == 8
    scaling = generation.parse(["--scaling"])
    assert scaling.dtypes == ["float32"] and (scaling.rounds, scaling.tokens, len(scaling.settings)) == (4, 6, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--contexts", "0"], "must be an integer of at least 1"),
        (["--layers", "2", "--all-layers"], "exclude each other"),
        (["--model", "llama-9"], "--model must be one of"),
        (["--ratio", "0.5"], "ratio must be"),
        (["--dtypes", "int4"], "invalid choice"),
    ),
)
def test_bad_arguments_are_refused_in_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        generation.parse(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_a_wrong_operator_prints_no_ratio(monkeypatch, capsys, tmp_path):
    right = sparq_kernels.decode

    def wrong(query, *args, **kwargs):
        output = right(query, *args, **kwargs)
        return output if query.dtype == torch.float64 else output._replace(output=output.output * 1.01)

    monkeypatch.setattr(sparq_kernels, "decode", wrong)
    out = tmp_path / "rows.json"
    arguments = ["--model", "tiny-llama", "--contexts", "300", "--dtypes", "float32", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["generation", *arguments])
    with pytest.raises(SystemExit, match=r"nothing is measured: the operator differs from the reference by 1\.0e-02"):
        generation.main()
    assert "vs" not in capsys.readouterr().out and not out.exists()


@pytest.mark.parametrize("name", ("tiny-llama", "tiny-neox"))
def test_a_wrong_patch_is_found(monkeypatch, name):
    model = models.build(name, torch.float32, layers=2).model
    assert opponents.wrong_model(model) is None
    monkeypatch.setattr(
        "sparq.attention.dense_attention", lambda *a, **k: (torch.zeros(a[2].shape).transpose(1, 2), None)
    )
    assert "logits differ" in opponents.wrong_model(model)


def test_twins_share_weights_and_nothing_else():
    model = models.build("tiny-llama", torch.float32, layers=2).model
    other = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    other.set_attn_implementation("eager")
    assert other.model is not model.model and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("way", (DYNAMIC, STATIC, OWN_CACHE, SPARQ_WAY, LAYERS_ALONE))
def test_a_runner_goes_on_from_its_own_cache(way):
    model = models.build("tiny-llama", torch.float32, layers=2).model
    runner = make_runner(model, way, context=256, batch=2, room=20, knobs=dict(min_length=0))
    held = 16 if way.bare else 256
    assert int(runner.cache.get_seq_length()) == held
    take_turns([runner], rounds=3, tokens=2)
    assert len(runner.seconds) == 4 and int(runner.cache.get_seq_length()) == held + 9
    position = 2 * 2 * 2 * 16 * 4  # layers, batch rows, KV heads, head_dim, bytes
    assert runner.cache_bytes == bytes_of(runner.cache) >= 2 * (held + 9) * position
    if way in (OWN_CACHE, SPARQ_WAY):  # room from the start: no growth amid the measurement
        assert runner.cache.layers[0]._key_storage.shape[2] == 512


def test_ratios_separate_cache_from_sparsity():
    steady = {"layers alone": 1, "stock dynamic": 12, "stock static": 6, "SparQ's cache": 4, "SparQ": 2}
    ways = {name: Measured([value] * 5, facts={"cache_bytes": 2**20}) for name, value in steady.items()}
    said = dict(name="tiny", layers=2, layers_of=2)
    row = Row({"dtype": "float32", "cached": 1000, "batch": 2}, ways).json()
    content = dict(model=said, settings=dict(r=None), rows=[row])
    whole = ways_grid(content)
    cells = [dict(zip(whole.columns, line, strict=True)) for line in whole.rows]
    assert [line["vs best stock"] for line in cells] == ["–", "–", "best stock", "1.50x", "3.00x"]
    assert cells[-1]["tokens/s"] == "1.0" and cells[-1]["ms per token"] == "2000.0"
    assert generation_grid(content).rows[0][-4:] == ("6.00x", "3.00x", "2.00x", "3.00x")


def test_layers_are_cut_where_asked():
    subject = models.build("tiny-neox", torch.bfloat16, layers=1)
    assert len(subject.model.gpt_neox.layers) == 1 and subject.model.dtype == torch.bfloat16
    whole = models.build("tiny-neox", torch.float32, layers=None)
    assert whole.name == "tiny-neox" and whole.layers == whole.layers_of == 3 and whole.vocabulary == 300


def test_scaling_fits_a_line_for_each_axis(run, tmp_path):
    out = tmp_path / "scaling.json"
    shown = run(
        generation,
        *("--scaling", "--model", "tiny-llama", "--contexts", "200", "300", "400", "--batches", "1", "2"),
        *("--rounds", "2", "--tokens", "3", "--json", str(out)),
    )
    assert "SparQ flatter" in shown
    result = json.loads(out.read_text())
    cases = [(row["axis"], row["case"]["cached"], row["case"]["batch"]) for row in result["rows"]]
    beside = [("batch", generation.BATCH_CONTEXT, batch) for batch in (1, 2)]
    assert cases == [("cached", 200, 1), ("cached", 300, 1), ("cached", 400, 1), *beside]
    lines = {(line["axis"], line["way"]): line for line in result["lines"]}
    assert len(lines) == 6 and lines["batch", "SparQ"]["slope_error"] is None, "two points"


def test_slopes_are_per_layer_and_thousand_cached_tokens():
    rows = []
    for cached, batch, axis in ((4000, 1, "cached"), (8000, 1, "cached"), (8000, 1, "batch"), (8000, 2, "batch")):
        ways = {way.name: Measured([0.01 + 0.0004 * cached / 1000 * batch] * 3) for way in generation.SCALING_WAYS}
        rows.append(Row({"cached": cached, "batch": batch}, ways, {"axis": axis}))
    lines = {(line["axis"], line["way"]): line for line in generation.lines_of(rows, layers=2)}
    assert lines["cached", "SparQ"]["slope"] == pytest.approx(0.2)
    assert lines["batch", "SparQ"]["slope"] == pytest.approx(1.6)
    assert lines["cached", "stock static"]["at_zero"] == pytest.approx(5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--scaling", "--contexts", "512", "512"], "must each be at least two different numbers"),
        (["--scaling", "--dtypes", "float32", "bfloat16"], "--scaling takes one of --dtypes"),
        (["--graphs"], "--graphs needs --device cuda"),
        (["--device", "cuda", "--profile"], "--profile needs --device cpu"),
        (["--dtypes", "int8", "--profile"], "--dtypes int8 needs --device cpu, and no --profile"),
    ),
)
def test_what_does_not_go_together_is_refused(capsys, arguments, message):
    with pytest.raises(SystemExit):
        generation.parse(arguments)
    assert message in capsys.readouterr().err


def test_graphs_are_ways_too():
    args = generation.parse(["--device", "cuda", "--graphs", "--dtypes", "float16"])
    assert {*opponents.GRAPHED_WAYS} < {*generation.ways_of(args)}
    assert not {*opponents.GRAPHED_WAYS} & {*generation.ways_of(generation.parse([]))}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generation", "--device", "cuda"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        generation.main()

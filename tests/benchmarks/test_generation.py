"""The whole-model benchmark: its checks, its rows and its command line, on tiny models."""

import json
import sys

import agreement
import generation
import model_options
import model_shapes
import pytest
import sparq_kernels
import torch
from generation_rows import Result, Row
from generation_tables import grids
from transformers import GPTNeoXConfig, LlamaConfig
from turns import Ratio, median_and_deciles
from ways import DYNAMIC, LAYERS_ALONE, OWN_CACHE, SPARQ, STATIC, bytes_of, make_runner, take_turns, twin


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
    monkeypatch.setitem(model_shapes.SHAPES, "tiny-llama", tiny_llama)
    monkeypatch.setitem(model_shapes.SHAPES, "tiny-neox", tiny_neox)


@pytest.fixture
def run(monkeypatch, capsys):
    def call(module, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        module.main()
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("name", ("tiny-llama", "tiny-neox"))
def test_every_way_is_measured_and_every_part_of_a_step(run, tmp_path, name):
    out, tables = tmp_path / "rows.json", tmp_path / "tables.md"
    shown = run(
        generation,
        *("--model", name, "--contexts", "300", "--batches", "2", "--dtypes", "float32", "--rounds", "2"),
        *("--tokens", "3", "--profile", "--json", str(out), "--markdown", str(tables)),
    )
    title = f"{name}: 2 of 3 layers, vocabulary of 256 instead of 300, random weights"
    assert title in " ".join(shown.split()) and title in tables.read_text()
    result = json.loads(out.read_text())
    assert result["machine"] and result["settings"]["rounds"] == 2 and str(tmp_path) not in out.read_text()
    assert result["model"]["layers"] == 2 and result["model"]["layers_of"] == 3
    (row,) = result["rows"]
    assert set(row["ways"]) == {"layers alone", "stock dynamic", "stock static", "SparQ's cache", "SparQ"}
    for way in row["ways"].values():
        assert way["steps"] == 3 and 0 < way["deciles"][0] <= way["seconds_per_token"] <= way["deciles"][1]
        assert way["first_token_seconds"] is None
        assert all(way["parts"][part] > 0 for part in ("attention", "cache update", "linear layers", "generate"))
    assert set(row["sparq_against"]) == set(row["ways"]) - {"SparQ"} and row["best_stock"].startswith("stock")


def test_a_real_model_is_prefilled_and_its_place_stays_private(run, tmp_path):
    model = model_shapes.build("tiny-llama", torch.float32, layers=None).model
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
    assert all(way["first_token_seconds"] > 0 and way["second_token_seconds"] > 0 for way in ways)


def test_quick_takes_little_and_leaves_what_was_asked_for():
    quick = generation.parse(["--quick", "--tokens", "7"])
    assert quick.settings == [(8192, 1)] and quick.dtypes == ["float32"] and (quick.rounds, quick.tokens) == (2, 7)
    demo = generation.parse(["--contexts", "16384", "65536", "--rounds", "2", "--tokens", "8"])
    assert demo.settings == [(16384, 1), (65536, 1)] and demo.dtypes == ["float32", "bfloat16"] and not demo.prefill
    assert generation.parse(["--model", "owner/name"]).prefill
    assert {(512, 1), (131072, 1), (16384, 8)} < set(generation.parse([]).settings)
    assert generation.parse(["--contexts", "7", "9", "--batches", "2"]).settings == [(7, 2), (9, 2)]
    assert generation.parse(["--quick", "--batches", "2", "3"]).settings == [(8192, 2), (8192, 3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--contexts", "0"], "must be an integer of at least 1"),
        (["--tokens", "1"], "must be an integer of at least 2"),
        (["--layers", "2", "--all-layers"], "exclude each other"),
        (["--model", "llama-9"], "--model must be one of"),
        (["--ratio", "0.5"], "ratio must be"),
        (["--dtypes", "int8"], "invalid choice"),
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
    model = model_shapes.build(name, torch.float32, layers=2).model
    assert agreement.wrong_model(model) is None
    monkeypatch.setattr(
        "sparq.attention.dense_attention", lambda *a, **k: (torch.zeros(a[2].shape).transpose(1, 2), None)
    )
    assert "logits differ" in agreement.wrong_model(model)


def test_twins_share_weights_and_nothing_else():
    model = model_shapes.build("tiny-llama", torch.float32, layers=2).model
    other = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    other.set_attn_implementation("eager")
    assert other.model is not model.model and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("way", (DYNAMIC, STATIC, OWN_CACHE, SPARQ, LAYERS_ALONE))
def test_a_runner_goes_on_from_its_own_cache(way):
    model = model_shapes.build("tiny-llama", torch.float32, layers=2).model
    runner = make_runner(model, way, context=256, batch=2, room=20, knobs=dict(min_length=0), prefill=False)
    held = 16 if way.bare else 256
    assert int(runner.cache.get_seq_length()) == held
    take_turns([runner], rounds=3, tokens=2, tick=lambda name: None)
    assert len(runner.seconds) == 4 and int(runner.cache.get_seq_length()) == held + 9
    position = 2 * 2 * 2 * 16 * 4  # layers, batch rows, KV heads, head_dim, bytes
    assert runner.cache_bytes == bytes_of(runner.cache) >= 2 * (held + 9) * position
    if way in (OWN_CACHE, SPARQ):  # room from the start: no growth amid the measurement
        assert runner.cache.layers[0]._key_storage.shape[2] == 512


def row(seconds: dict[str, list[float]]) -> Row:
    ways = (LAYERS_ALONE, DYNAMIC, STATIC, OWN_CACHE, SPARQ)
    results = {way.name: Result(way, seconds[way.name], None, None, 2**20, None) for way in ways}
    return Row("float32", 1000, 2, results, 8.0, 1.0, 0.9, {})


def test_ratios_separate_cache_from_sparsity_and_say_when_they_are_unclear():
    steady = {"layers alone": 1, "stock dynamic": 12, "stock static": 6, "SparQ's cache": 4, "SparQ": 2}
    ways, sources = grids([row({name: [value] * 5 for name, value in steady.items()})], "title")
    cells = [dict(zip(ways.columns, line, strict=True)) for line in ways.rows]
    assert [line["vs best stock"] for line in cells] == ["–", "0.50x", "best stock", "1.50x", "3.00x"]
    assert cells[-1]["tokens/s"] == "1.0" and cells[-1]["ms per token"] == "2000.0"
    source = dict(zip(sources.columns, sources.rows[0], strict=True))
    assert (source["SparQ vs dynamic"], source["of it: cache"], source["of it: sparsity"]) == (
        "6.00x",
        "3.00x",
        "2.00x",
    )
    assert source["vs static"] == "3.00x" and source["bytes read"] == "8.0x less"
    noisy = {name: [value * wave for wave in (0.1, 1, 10)] for name, value in steady.items()}
    noisy["SparQ"] = [20, 2, 0.2]
    assert "unclear (" in str(row(noisy).ratio("stock static"))


def test_pairs_of_steps_cancel_a_slow_machine():
    drift = [1.0, 2.0, 4.0, 8.0]
    assert Ratio.of([3 * wave for wave in drift], drift) == Ratio(3.0, 3.0, 3.0)
    assert median_and_deciles([2.0]) == (2.0, (2.0, 2.0))
    with pytest.raises(ValueError):
        Ratio.of([1.0, 2.0], [1.0])


def test_layers_are_cut_where_asked():
    subject = model_shapes.build("tiny-neox", torch.bfloat16, layers=1)
    assert len(subject.model.gpt_neox.layers) == 1 and subject.model.dtype == torch.bfloat16
    whole = model_shapes.build("tiny-neox", torch.float32, layers=None)
    assert str(whole) == "tiny-neox: 3 of 3 layers, random weights" and whole.vocabulary == 300
    assert model_options.MEASURED_LAYERS == 2

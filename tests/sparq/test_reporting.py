"""The report against numbers counted by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import rich.console
import torch
from transformers import DynamicCache

import sparq
from sparq import Report, SparqConfig
from tests.sparq.slow import Slow
from tests.sparq.tiny import build, next_tokens, prompt, teacher_forced

KNOBS = dict(r=4, k=12, min_length=0)


def run(family: str = "llama", steps: int = 3, inputs: dict | None = None, **knobs) -> Report:
    model = sparq.patch(build(family), **(KNOBS | knobs))
    teacher_forced(model, inputs or prompt(), next_tokens(steps=steps))
    return sparq.report(model)


def test_numbers_of_a_padded_batch() -> None:
    """Two rows, 40 cached positions of which the second row's first 9 are padding; 3 steps; 2 KV heads, d = 16."""
    report = run()
    valid = sum((40 + step) + (31 + step) for step in (1, 2, 3))
    read = 3 * (12 + 12)
    rows = 3 * 2
    elements = 2 * (valid * 4 + 2 * read * 16 + rows * 4 * 16)
    assert sorted(report.layers) == [0, 1, 2]
    for layer in report.layers.values():
        assert (layer.decode_steps, layer.sparse_steps, layer.dense_steps) == (3, 3, {})
        assert (layer.positions_cached, layer.positions_read) == (valid, read)
        assert layer.bytes_read == 4 * elements
        assert layer.bytes_dense == 4 * 2 * valid * 2 * 16
    total = report.total
    assert (total.decode_steps, total.sparse_steps, total.dense_steps) == (9, 9, {})
    assert (total.positions_cached, total.positions_read) == (3 * valid, 3 * read)
    assert (total.bytes_read, total.bytes_dense) == (3 * 4 * elements, 3 * 4 * 4 * valid * 16)


def test_bytes_count_the_element_size() -> None:
    model = sparq.patch(build().to(torch.bfloat16), **KNOBS)
    teacher_forced(model, prompt(), next_tokens(steps=3))
    single, half = run().total, sparq.report(model).total
    assert (single.bytes_read, single.bytes_dense) == (2 * half.bytes_read, 2 * half.bytes_dense)


def test_mean_alpha() -> None:
    inputs, tokens, slow = prompt(), next_tokens(), Slow(r=4, k=12)
    teacher_forced(slow.install(build()), inputs, tokens)
    report = run(steps=12)
    for index, layer in report.layers.items():
        assert layer.mean_alpha == pytest.approx(sum(slow.alphas[index]) / len(slow.alphas[index]), rel=1e-4)
        assert (layer.positions_read, layer.positions_cached) == (slow.read[index], slow.cached[index])
    every = [alpha for alphas in slow.alphas.values() for alpha in alphas]
    assert report.total.mean_alpha == pytest.approx(sum(every) / len(every), rel=1e-4)
    assert 0.05 < report.total.mean_alpha < 0.95  # neither a constant nor nothing left to choose


def test_dense_steps_and_their_reasons() -> None:
    """dense_layers, sliding windows, min_length and k: each is named, and its bytes are those of all positions."""
    everything = 4 * 2 * 2 * 2 * 16 * (41 + 42 + 43)  # float32, rows, KV heads, K and V, d, positions: padding too
    report = run(dense_layers=1)
    assert report.layers[0].dense_steps == {"one of the first dense_layers": 3}
    assert (report.layers[0].bytes_read, report.layers[0].bytes_dense) == (everything, everything)
    assert report.layers[0].mean_alpha is None and report.layers[1].sparse_steps == 3

    assert run(min_length=43).layers[0].dense_steps == {"shorter than min_length": 2}
    assert run(k=43).total.dense_steps == {"k covers the context": 9}
    assert run(k=42).layers[0].dense_steps == {"k covers the context": 2}

    gemma = run("gemma3")
    assert [gemma.layers[i].dense_steps for i in range(3)] == [
        {"sliding-window layer": 3},
        {},
        {"sliding-window layer": 3},
    ]
    assert gemma.total.dense_steps == {"sliding-window layer": 6} and gemma.total.sparse_steps == 3


def test_the_prompt_is_not_a_decode_step() -> None:
    model = sparq.patch(build(), **KNOBS)
    with torch.no_grad():
        model(**prompt())
        model(next_tokens(1, 1), use_cache=True)  # a prompt of one token
        model(**prompt(), use_cache=False)
    assert sparq.report(model).layers == {} and sparq.report(model).total.decode_steps == 0


def test_to_dict_is_plain_data() -> None:
    report = run(dense_layers=1)
    data = report.to_dict()
    again = json.loads(json.dumps(data, allow_nan=False))
    assert again["total"] == data["total"]
    assert again["layers"]["1"] == data["layers"][1]
    assert again["layers"]["0"]["dense_steps"] == {"one of the first dense_layers": 3}
    assert SparqConfig(**again["config"]) == report.config
    assert again["backend"] == report.backend


def test_table() -> None:
    report = run(dense_layers=1)
    lines = str(report).splitlines()
    assert any(line.strip() == "dense, 3 layer steps: one of the first dense_layers" for line in lines)
    assert max(len(line) for line in lines) <= 110
    layer = report.layers[1]
    share = f"{layer.positions_read:,} ({layer.positions_read / layer.positions_cached:.1%})"
    assert sum(share in line for line in lines) == 2  # layers 1 and 2
    assert sum(f"{report.total.mean_alpha:.3f}" in line for line in lines) >= 1
    assert report.backend in str(report) and "k=12" in str(report)


def test_table_of_a_model_that_has_not_decoded() -> None:
    report = sparq.report(sparq.patch(build()))
    assert "all" in str(report)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "environment",
    [
        {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color"},
        {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1", "TERM": "xterm"},
        {"TTY_COMPATIBLE": "1", "TERM": "dumb"},
        {"COLUMNS": "20", "LINES": "3", "JUPYTER_COLUMNS": "20"},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_the_text_is_the_same_everywhere(environment: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(dense_layers=1)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES", "TERM"):
        monkeypatch.delenv(name, raising=False)
    plain = str(report)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(report) == plain
    assert "\x1b" not in plain and "positions read" in plain


def test_in_a_notebook_the_text_holds_the_table_and_nothing_is_shown_besides(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(dense_layers=1)
    plain = str(report)
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    assert rich.console.Console().is_jupyter
    assert str(report) == plain and "│   all │" in plain
    assert capsys.readouterr().out == ""


def test_html_holds_what_the_text_holds() -> None:
    report = replace(run(dense_layers=1), config="<config & knobs>", backend="<cpp>")
    root = ElementTree.fromstring(report._repr_html_())
    table, below = root.find("table"), root.find("p")
    assert table is not None and below is not None
    rows = [[cell.text for cell in row] for row in table.iter("tr")]
    text = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in str(report).splitlines() if "│" in line]
    assert rows[0] == ["layer", "sparse", "dense", "mean α", "positions read", "MB read", "MB dense", "ratio"]
    assert rows[1:] == text and len(text) == 4
    assert table.findtext("caption") == "SparQ: decode steps, layer by layer (operator: <cpp>)"
    assert list(below.itertext()) == str(report).splitlines()[-4:]
    assert any("too high" in line for line in below.itertext()), "mean α is an estimate"
    assert below.text == "<config & knobs>"


def test_a_report_is_a_moment() -> None:
    model = sparq.patch(build(), **KNOBS)
    teacher_forced(model, prompt(), next_tokens(steps=2))
    early = sparq.report(model)
    before = early.to_dict()
    teacher_forced(model, prompt(), next_tokens(steps=2))
    assert early.to_dict() == before
    assert sparq.report(model).total.sparse_steps == 2 * early.total.sparse_steps


def test_cache_bytes_are_of_the_largest_cache() -> None:
    """3 layers of 2 KV heads of 16 in float32, 2 rows: storage for 256 positions and their index."""
    model = sparq.patch(build(), **KNOBS)
    assert sparq.report(model).cache_bytes == 0 and "largest cache" not in str(sparq.report(model))
    one_position = 3 * 2 * 2 * 16 * 4
    with torch.no_grad():
        model(**prompt(), past_key_values=DynamicCache(config=model.config))
    assert sparq.report(model).cache_bytes == 2 * 256 * one_position  # no index yet
    teacher_forced(model, prompt(), next_tokens(steps=1))
    codes = 3 * 2 * 2 * 16 * (256 // 2 + 2 * 4)  # half a byte each, and ranges
    whole = 2 * 256 * one_position + codes + one_position  # and the sum of V
    assert sparq.report(model).cache_bytes == sparq.report(model).to_dict()["cache_bytes"] == whole
    teacher_forced(model, prompt(batch=1), next_tokens(batch=1, steps=1))  # a smaller one
    assert sparq.report(model).cache_bytes == whole
    assert f"largest cache: {whole / 1e6:,.1f} MB" in str(sparq.report(model))
    assert sparq.report(sparq.patch(model, **KNOBS)).cache_bytes == 0


def test_needs_a_patched_model() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM is not"):
        sparq.report(build())


def test_the_operator_is_the_one_that_ran() -> None:
    """float64 is served by the reference alone; a model that was converted has run on both."""
    model = sparq.patch(build().double(), **KNOBS)
    assert sparq.report(model).backend == "reference"
    teacher_forced(model, prompt(), next_tokens(steps=1))
    assert sparq.report(model).backend == "reference"
    teacher_forced(model.float(), prompt(), next_tokens(steps=1))
    assert sparq.report(model).backend == "cpp, reference"
